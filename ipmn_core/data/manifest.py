"""A manifest: anybody's cohort as one table, CSV or Excel, a row per scan.

    image     path of the NIfTI file, relative to the manifest    mask        likewise; without: a clean ROI
    label     class, a number or a word; blank: left out          case_id     default: the image's name
    center    hospital                                            patient_id  default: the case's name
    modality  default: mri                                        fold        for `fold_rule: given`

Other columns are ignored.
"""

from collections import Counter, defaultdict
from pathlib import Path

from ipmn_core.data.releases import case_name
from ipmn_core.data.sheets import CohortError, column, is_blank, read_table, text

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
        rows = list(_rows(path, problems))
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
            words = f"{scan['modality']} case {scan['case_id']!r} is given twice"
            problems.append(
                ("error", scan["where"], words, "keep one row per scan, or give each a `case_id`")
            )
    return scans, dict(unlabelled)


def _rows(path, problems):
    """(row number, {column: text}) of every row that holds anything."""
    table = read_table(path, [f"^{name}$" for name in NEEDED], problems)
    headers = [header.casefold() for header in table.header]
    wanted = [name for name in (*NEEDED, *OPTIONAL) if name in NEEDED or name in headers]
    places = {name: column(table, f"^{name}$", f"column `{name}`", problems) for name in wanted}
    for number, row in table.rows:
        cells = {name: "" if is_blank(row[i]) else text(row[i]) for name, i in places.items()}
        yield number, dict.fromkeys(OPTIONAL, "") | cells


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
    for needed in ("image", "center"):
        if not cells[needed]:
            raise CohortError(
                where, f"`{needed}` of {case or 'a row'} is blank", "fill it in, or take the row out"
            )
    if cells["center"].casefold() in TAKEN:
        words = f"a center cannot be called {cells['center']!r}, the name of all centers together"
        raise CohortError(where, words, "call it otherwise")
    folds = {f"fold_{task}": cells["fold"] for task in ("multiclass", "binary")}
    named = {
        "case_id": case,
        "patient_id": cells["patient_id"] or case,
        "modality": cells["modality"] or MODALITY,
    }
    return files | folds | named | {"where": where, "label": cells["label"], "center": cells["center"]}
