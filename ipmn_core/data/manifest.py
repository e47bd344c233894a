"""A manifest: any cohort as one table, CSV or Excel, with one row per scan.

    image     path of the NIfTI file, relative to the manifest    mask        its mask; blank: a clean ROI
    label     class, a number or a word; blank: left out          case_id     default: the image's name
    center    hospital                                            patient_id  default: the case's name
    modality  default: mri                                        fold        for `fold_rule: given`

Other columns are ignored. Without `patient_id`, cases whose names differ only in the modality (7_T1, 7_T2)
belong to one patient.
"""

import os
import re
import unicodedata
from collections import defaultdict
from pathlib import Path

import pandas as pd

from ipmn_core.data.releases import case_name, files_by_case, patient_name
from ipmn_core.data.sheets import CohortError, column, is_blank, read_table, text

NEEDED, OPTIONAL = ("image", "label", "center"), ("mask", "patient_id", "modality", "case_id", "fold")
SUFFIXES = (".csv", ".tsv", ".txt", ".xlsx", ".xlsm")
UNLABELLED = ["case_id", "image", "mask", "modality", "error"]
MODALITY = "mri"  # of a manifest without the column


def naming(labels) -> dict[str, str]:
    """{label: class} with each label as its class, in order: numbers by value, words by the alphabet."""
    try:
        return {label: label for label in sorted(labels, key=float)}
    except ValueError:
        return {label: label for label in sorted(labels)}


def read(path: Path, problems: list, labels=()) -> tuple[list[dict], dict[str, int]]:
    """Usable scans of the manifest, dicts of `SCAN_COLUMNS`, and {modality: number of unlabeled scans}.

    Words such as none and NA mean a missing label, unless they are in `labels`. Problems are appended to
    `problems` as (severity, where, problem, remedy).
    """
    scans, unlabelled, words = [], defaultdict(int), set()
    try:
        rows = list(_rows(path, problems))
    except CohortError as error:
        problems.append(("error", *error.args))
        return [], {}
    for where, cells in rows:
        missing = is_blank(cells["label"]) and cells["label"] not in labels
        unlabelled[cells["modality"] or MODALITY] += missing
        if missing:
            words.add(cells["label"])
            continue
        try:
            scans.append(_scan(path.parent, where, cells))
        except CohortError as error:
            problems.append(("error", *error.args))
    if words := ", ".join(sorted(words - {""})):
        remedy = "none needed; if it is a class, list it in `classes`"
        problems.append(("warning", path, f"the label {words} is read as missing", remedy))
    problems += _repeated(scans)
    return scans, dict(unlabelled)


def unlabelled(
    path: str | Path, masks: str | Path | None = None, problems: list | None = None
) -> pd.DataFrame:
    """Scans to predict: `case_id, image, mask, modality` and `error` (why a scan cannot be used, or "").

    `path` is an image, a folder of NIfTI files (`masks`: the folder of their masks, with the same case
    names), or a manifest that needs only the column `image`. `problems` as in `read`. Raises CohortError if
    there is no scan.
    """
    path, masks, problems = Path(path), masks and Path(masks), [] if problems is None else problems
    if path.is_dir():
        rows = list(_pairs(path, masks))
    elif path.suffix.lower() in SUFFIXES:
        if masks:
            raise CohortError(masks, f"is given together with {path}", "name the masks in its column `mask`")
        rows = [_row(path, *row) for row in _rows(path, problems, ("image",))]
    else:
        rows = [{"case_id": case_name(path.name), "image": str(path), "mask": str(masks or "")}]
    if not rows:
        raise CohortError(path, "holds no scan", "give an image, a folder of NIfTI files, or a manifest")
    scans = pd.DataFrame([dict.fromkeys(UNLABELLED, "") | row for row in rows])[UNLABELLED]
    again = (scans["modality"] + " " + scans["case_id"].str.casefold()).duplicated(keep=False)
    text = " is given several times; keep one row, or give each a `case_id`"
    scans.loc[again & scans["error"].eq(""), "error"] = scans["case_id"] + text
    return scans


def _pairs(images, masks):
    """One row per case with a file in the folder of images, or in that of masks, if given."""
    folders = {"image": images} | ({"mask": masks} if masks else {})
    if masks and not masks.is_dir():
        raise CohortError(masks, "is no folder", f"give the folder of the masks of {images}")
    files = {kind: files_by_case(folder) for kind, folder in folders.items()}
    for case in sorted(set().union(*files.values())):
        names = {kind: files[kind].get(case, []) for kind in folders}
        case = case_name(next(name for found in names.values() for name in found))
        row = {kind: str(folders[kind] / found[0]) for kind, found in names.items() if len(found) == 1}
        odd = [kind for kind, found in names.items() if len(found) != 1]
        wrong = [f"{len(names[kind]) or 'no'} {kind} files in {folders[kind]}" for kind in odd]
        error = f"{case}: {' and '.join(wrong)}; give it one" if odd else ""
        yield row | {"case_id": case, "error": error}


def _row(path, where, cells):
    """The row of a scan in the manifest `path`."""
    try:
        return _scan(path.parent, where, cells, ("image",)) | {"modality": cells["modality"]}
    except CohortError as error:
        case = cells["case_id"] or case_name(Path(cells["image"]).name)
        return {"case_id": case, "image": cells["image"], "error": str(error)}


def _rows(path, problems, needed=NEEDED):
    """(where, {column: text}) of every row that is not empty."""
    if not path.is_file() or path.suffix.lower() not in SUFFIXES:
        what = "is no table" if path.exists() else "no such file or folder"
        raise CohortError(path, what, f"give the folder of a release, or a manifest ({', '.join(SUFFIXES)})")
    table = read_table(path, [f"^{name}$" for name in needed], problems)
    headers = [header.casefold() for header in table.header]
    wanted = [name for name in (*needed, *OPTIONAL) if name in needed or name in headers]
    places = {name: column(table, f"^{name}$", f"column `{name}`", problems) for name in wanted}
    for number, row in table.rows:
        cells = {
            name: text(row[i]) if name in ("image", "mask") else _word(row[i]) for name, i in places.items()
        }
        blank = [name for name in cells if is_blank(cells[name]) and name != "label"]
        every = dict.fromkeys((*NEEDED, *OPTIONAL), "")
        yield f"{table.where} row {number}", every | cells | dict.fromkeys(blank, "")


def _word(cell):
    """A cell as text with normalized blanks and accents, and 1 for 1.0."""
    words = unicodedata.normalize("NFC", " ".join(text(cell).split()))
    number = re.fullmatch(r"(-?\d+)\.0+", words)
    return number[1] if number else words


def _scan(folder, where, cells, needed=("image", "center")):
    """The scan of a row."""
    case = cells["case_id"] or case_name(re.split(r"[/\\]", cells["image"])[-1])
    modality, files = cells["modality"] or MODALITY, {}
    for name in needed:
        if not cells[name]:
            words = f"`{name}` of {case or 'a row'} is blank or says missing"
            raise CohortError(where, words, "fill it in, or delete the row")
    for kind in ("image", "mask"):
        files[kind] = str(folder / os.path.expanduser(cells[kind])) if cells[kind] else ""
        if files[kind] and not os.path.isfile(files[kind]):
            remedy = "correct the path: it is relative to the manifest"
            raise CohortError(where, f"no {kind} {files[kind]}", remedy)
    if not re.fullmatch(r"\w[\w .+-]*", modality):
        words = f"the modality {modality!r} cannot be the name of a folder"
        raise CohortError(where, words, "write it with letters, digits, blanks, and . _ + -")
    named = {"case_id": case, "modality": modality, "label": cells["label"], "center": cells["center"]}
    named["patient_id"] = cells["patient_id"].casefold() or patient_name(modality, case)
    folds = {f"fold_{task}": cells["fold"] for task in ("multiclass", "binary")}
    return files | folds | named | {"where": where}


def _repeated(scans):
    """Errors: several cases with one name, and several rows with one image, unless with different masks."""
    cases, images = defaultdict(list), defaultdict(list)
    for scan in scans:
        cases[scan["modality"], scan["case_id"].casefold()].append(scan)
        images[os.path.realpath(scan["image"])].append(scan)
    for rows in cases.values():
        if len(rows) > 1:
            words = f"{rows[0]['modality']} case {rows[0]['case_id']!r} is given {len(rows)} times"
            yield "error", _wheres(rows), words, "keep one row per scan, or give each a `case_id`"
    for image, rows in images.items():
        different = len({scan["mask"] for scan in rows}) == len(rows)
        if len(rows) > 1 and not (different and len({scan["patient_id"] for scan in rows}) == 1):
            remedy = "keep one row per scan; masks of one image need one `patient_id`"
            yield "error", _wheres(rows), f"all have the image {image}", remedy


def _wheres(rows):
    return " and ".join(scan["where"] for scan in rows)
