"""A manifest: anybody's cohort as one table, CSV or Excel, a row per scan.

    image     path of the NIfTI file, relative to the manifest    mask        likewise; without: a clean ROI
    label     class, a number or a word; blank: left out          case_id     default: the image's name
    center    hospital                                            patient_id  default: the case's name
    modality  default: mri                                        fold        for `fold_rule: given`

Other columns are ignored.
"""

import csv
from collections import Counter, defaultdict
from pathlib import Path

from ipmn_core.data.releases import NA, CohortError, case_name, workbook

NEEDED, OPTIONAL = ("image", "label", "center"), ("mask", "patient_id", "modality", "case_id", "fold")
SUFFIXES = (".csv", ".tsv", ".txt", ".xlsx", ".xlsm")
MODALITY = "mri"  # of a manifest without the column
TAKEN = {"global"}  # what tables call all centers together


def naming(labels) -> dict[str, str]:
    """Each label as the name of its class, in order: numbers by value, else by the alphabet."""
    try:
        return {label: label for label in sorted(labels, key=float)}
    except ValueError:
        return {label: label for label in sorted(labels)}


def read(path: Path, problems: list) -> tuple[list[dict], dict[str, int]]:
    """Usable scans of the manifest, dicts of `SCAN_COLUMNS`, and {modality: unlabelled scans}.

    What is wrong is appended to `problems` as (severity, where, problem, remedy).
    """
    scans, unlabelled = [], defaultdict(int)
    try:
        rows = _rows(path)
    except CohortError as error:
        problems.append(("error", *error.args))
        return [], {}
    for number, cells in rows:
        where = f"{path.name} row {number}"
        unlabelled[cells["modality"] or MODALITY] += not cells["label"]
        try:
            if cells["label"]:
                scans.append(_scan(path.parent, where, cells))
        except CohortError as error:
            problems.append(("error", *error.args))
    counts = Counter((scan["modality"], scan["case_id"].casefold()) for scan in scans)
    for scan in scans:
        if counts[scan["modality"], scan["case_id"].casefold()] > 1:
            text = f"{scan['modality']} case {scan['case_id']!r} is given twice"
            problems.append(("error", scan["where"], text, "keep one row per scan, or give each a `case_id`"))
    return scans, dict(unlabelled)


def _rows(path):
    """(row number, {column: text}) of every row that holds anything."""
    try:
        header, *rows = workbook(path) if path.suffix.lower().startswith(".xl") else _csv(path)
    except Exception as error:  # a damaged workbook raises whatever its zip, XML or cells provoke
        raise CohortError(path, f"cannot be read ({error})", "save it again, CSV as UTF-8") from error
    names = [_text(cell).casefold() for cell in header]
    for column in (*NEEDED, *OPTIONAL):
        if (n := names.count(column)) > 1 or (column in NEEDED and not n):
            text = f"{n or 'no'} columns `{column}` among the headers {', '.join(map(repr, names))}"
            raise CohortError(path, text, f"have one, in row 1; needed are {', '.join(NEEDED)}")
    places = {column: names.index(column) for column in (*NEEDED, *OPTIONAL) if column in names}
    for number, row in enumerate(rows, start=2):
        cells = {
            c: _text(row[places[c]]) if places.get(c, len(row)) < len(row) else ""
            for c in (*NEEDED, *OPTIONAL)
        }
        if any(cells.values()):
            yield number, cells


def _csv(path):
    with open(path, newline="", encoding="utf-8-sig") as file:
        first = file.readline()
        file.seek(0)
        delimiter = max(",;\t", key=first.count)
        return list(csv.reader(file, delimiter=delimiter))


def _text(cell):
    """A cell as text, "" for one that says that something is missing; 1.0 of a spreadsheet is 1."""
    if isinstance(cell, float) and cell.is_integer():
        cell = int(cell)
    text = str("" if cell is None else cell).strip()
    return "" if text.casefold() in NA else text


def _scan(folder, where, cells):
    """The scan of a row."""
    files = {}
    for kind in ("image", "mask"):
        files[kind] = str(folder / Path(cells[kind]).expanduser()) if cells[kind] else ""
        if files[kind] and not Path(files[kind]).is_file():
            raise CohortError(
                where, f"no {kind} {files[kind]}", "correct the path: it is relative to the manifest"
            )
    case = cells["case_id"] or case_name(Path(cells["image"]).name)
    for column in ("image", "center"):
        if not cells[column]:
            raise CohortError(
                where, f"`{column}` of {case or 'a row'} is blank", "fill it in, or take the row out"
            )
    if cells["center"].casefold() in TAKEN:
        text = f"a center cannot be called {cells['center']!r}, the name of all centers together"
        raise CohortError(where, text, "call it otherwise")
    folds = {f"fold_{task}": cells["fold"] for task in ("multiclass", "binary")}
    named = {
        "case_id": case,
        "patient_id": cells["patient_id"] or case,
        "modality": cells["modality"] or MODALITY,
    }
    return files | folds | named | {"where": where, "label": cells["label"], "center": cells["center"]}
