"""A manifest: anybody's cohort as one table, CSV or Excel, a row per scan.

    image     path of the NIfTI file, relative to the manifest    mask        likewise; without: a clean ROI
    label     class, a number or a word; blank: left out          case_id     default: the image's name
    center    hospital                                            patient_id  default: the case's name
    modality  default: mri                                        fold        for `fold_rule: given`

Other columns are ignored. The names of a patient's cases may differ in the modality, as 7_T1 and 7_T2.
"""

import os
import re
import unicodedata
from collections import defaultdict
from pathlib import Path

from ipmn_core.data.releases import case_name, patient_name
from ipmn_core.data.sheets import CohortError, column, is_blank, read_table, text

NEEDED, OPTIONAL = ("image", "label", "center"), ("mask", "patient_id", "modality", "case_id", "fold")
SUFFIXES = (".csv", ".tsv", ".txt", ".xlsx", ".xlsm")
MODALITY = "mri"  # of a manifest without the column


def naming(labels) -> dict[str, str]:
    """Each label as the name of its class, in order: numbers by value, else by the alphabet."""
    try:
        return {label: label for label in sorted(labels, key=float)}
    except ValueError:
        return {label: label for label in sorted(labels)}


def read(path: Path, problems: list, labels=()) -> tuple[list[dict], dict[str, int]]:
    """Usable scans of the manifest, dicts of `SCAN_COLUMNS`, and {modality: unlabelled scans}.

    `labels` are never taken for words that say "missing", as none and NA else are. What is wrong is appended
    to `problems` as (severity, where, problem, remedy).
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
        remedy = "none needed, or list it in `classes` if it is one"
        problems.append(("warning", path, f"the label {words} is taken for a missing one", remedy))
    problems += _repeated(scans)
    return scans, dict(unlabelled)


def _rows(path, problems):
    """(where, {column: text}) of every row that holds anything."""
    if not path.is_file() or path.suffix.lower() not in SUFFIXES:
        what = "is no table" if path.exists() else "no such file or folder"
        raise CohortError(path, what, f"give the folder of a release, or a manifest ({', '.join(SUFFIXES)})")
    table = read_table(path, [f"^{name}$" for name in NEEDED], problems)
    headers = [header.casefold() for header in table.header]
    wanted = [name for name in (*NEEDED, *OPTIONAL) if name in NEEDED or name in headers]
    places = {name: column(table, f"^{name}$", f"column `{name}`", problems) for name in wanted}
    for number, row in table.rows:
        cells = {
            name: text(row[i]) if name in ("image", "mask") else _word(row[i]) for name, i in places.items()
        }
        blank = [name for name in cells if is_blank(cells[name]) and name != "label"]
        yield f"{table.where} row {number}", dict.fromkeys(OPTIONAL, "") | cells | dict.fromkeys(blank, "")


def _word(cell):
    """A cell as text in which blanks and accents are written in one way, and 1 for 1.0."""
    words = unicodedata.normalize("NFC", " ".join(text(cell).split()))
    number = re.fullmatch(r"(-?\d+)\.0+", words)
    return number[1] if number else words


def _scan(folder, where, cells):
    """The scan of a row."""
    case = cells["case_id"] or case_name(re.split(r"[/\\]", cells["image"])[-1])
    modality, files = cells["modality"] or MODALITY, {}
    for needed in ("image", "center"):
        if not cells[needed]:
            words = f"`{needed}` of {case or 'a row'} is blank, or a word that says missing"
            raise CohortError(where, words, "fill it in, or take the row out")
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
    """Errors: cases of one name, and images that are in several rows, unless as two masks of one patient."""
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
