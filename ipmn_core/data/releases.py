"""The layouts of the real data set, each read into one table of scans, one row per labelled scan.

    first    IPMN_labels_t{1,2}_total.xlsx    t{1,2}_clean_ROI/NAME.nii.gz
    second   IPMN_labels_total.xlsx           IPMN_images_masks/t{1,2}/{images,masks}/NAME.nii.gz

The table has the columns `SCAN_COLUMNS`, T1 rows first, in sheet order. `mask` is "" in the first release,
whose images are masked and cropped already.
"""

import os
import re
from collections import defaultdict
from contextlib import contextmanager

from ipmn_core.names import CENTERS, MODALITIES

SCAN_COLUMNS = ["case_id", "patient_id", "center", "modality", "label", "image", "mask"]
NA = ("", "na", "n/a", "#n/a", "#na", "<na>", "nan", "null", "none")  # cells that say "missing"

# The words in a scan's name that give its center; CAD scans are Mayo Clinic Florida's.
CENTER_WORDS = {center.lower(): center for center in CENTERS} | {"cad": "MCF", "northwestern": "NU"}

# Release -> sheet -> what to find there: (pattern of its header, its position in the released sheet).
NAME, RISK = r"(?<![a-z])(patient|id|name|case)(?![a-z])", "risk"
T1, T2 = r"(?<![a-z])t1(?!\d)", r"(?<![a-z])t2(?!\d)"
SHEETS = {
    "first": {f"IPMN_labels_{m}_total.xlsx": {m: (NAME, 0), "label": (RISK, 5)} for m in MODALITIES},
    "second": {"IPMN_labels_total.xlsx": {"t1": (T1, 0), "t2": (T2, 1), "label": (RISK, 6)}},
}
# Release -> modality -> folders of the images and, in the second, of their masks.
FOLDERS = {
    "first": {m: [f"{m}_clean_ROI"] for m in MODALITIES},
    "second": {m: [f"IPMN_images_masks/{m}/images", f"IPMN_images_masks/{m}/masks"] for m in MODALITIES},
}


class CohortError(ValueError):
    """A cohort that cannot be used, raised with where, what is wrong and what to do."""

    def __str__(self):
        return ": ".join(map(str, self.args))


def center_of(name):
    """The center, one of `CENTERS`, that the words in a scan's name give; ValueError if none or two."""
    centers = {CENTER_WORDS[word] for word in re.findall("[a-z]+", name.lower()) if word in CENTER_WORDS}
    if len(centers) != 1:
        found = " and ".join(sorted(centers)) or "no center"
        raise ValueError(f"the name {name!r} gives {found}; known prefixes: {', '.join(CENTER_WORDS)}")
    return centers.pop()


def case_name(raw):
    """The name of a case: a sheet's cell or a file's name less .nii, .nii.gz and nnU-Net's trailing _0000."""
    return re.sub(r"(_0000)?(\.nii(\.gz)?)?$", "", str(raw).strip(), flags=re.IGNORECASE).strip()


def read_release(root, columns, problems):
    """Scans of the release in `root` that can be used, and the number of listed and unlabelled ones.

    Returns a list of dicts with `SCAN_COLUMNS` and {modality: (unlabelled, listed)}, which is empty if no
    sheet can be read. What is wrong is appended to `problems` as (severity, where, problem, remedy).
    """
    listed, scans = [], []
    with _noting_errors(problems):
        release = _release(root)
        listed = _listed_scans(root, SHEETS[release], FOLDERS[release], columns)
        scans = [s for m in MODALITIES for s in _found_scans(root, m, FOLDERS[release][m], listed, problems)]
    blank = {m: [_blank(scan["label"]) for scan in listed if scan["modality"] == m] for m in MODALITIES}
    return scans, {m: (sum(cells), len(cells)) for m, cells in blank.items()}


@contextmanager
def _noting_errors(problems):
    """A block that a CohortError ends, leaving a row in `problems`."""
    try:
        yield
    except CohortError as error:
        problems.append(("error", *map(str, error.args)))


def _release(root):
    """The release in `root`, "first" or "second"."""
    tops = {r: [*SHEETS[r], *(f[0].split("/")[0] for f in FOLDERS[r].values())] for r in SHEETS}
    found = {r: sorted({name for name in tops[r] if (root / name).exists()}) for r in tops}
    if found["first"] and found["second"]:
        both = f"{', '.join(found['first'])} and {', '.join(found['second'])}"
        raise CohortError(root, f"has parts of two releases: {both}", "keep each release in its own folder")
    if not found["first"] and not found["second"]:
        text = f"has no {tops['first'][0]} (first release) and no {tops['second'][0]} (second release)"
        raise CohortError(root, text, "give the folder that holds the label sheets")
    return "first" if found["first"] else "second"


def _listed_scans(root, sheets, folders, columns):
    """Every scan in the label sheets, its label as it is there; case_id is "" for a label without a name."""
    listed = []
    for sheet, wanted in sheets.items():
        modality = next(iter(wanted))
        if len(sheets) > 1 and not (root / sheet).exists() and not (root / folders[modality][0]).exists():
            continue  # a first release of which only the other modality was downloaded
        for number, cells in _sheet_rows(root / sheet, wanted, columns):
            label = cells.pop("label")
            names = {m: case_name(cell) for m, cell in cells.items() if not _blank(cell)}
            if not names and not _blank(label):
                names = {modality: ""}
            for m, name in names.items():
                patient = next(iter(names.values())).casefold()
                scan = {"modality": m, "case_id": name, "patient_id": patient, "label": label}
                listed.append(scan | {"sheet": sheet, "row": number})
    return listed


def _sheet_rows(path, wanted, columns):
    """(row number in the spreadsheet, {what is wanted: cell}) of every row below the header."""
    try:
        sheet = _workbook(path)
        headers = ["" if _blank(cell) else str(cell).strip() for cell in next(iter(sheet), ())]
    except Exception as error:  # a damaged workbook raises whatever its zip, XML or cells provoke
        raise CohortError(path, f"cannot be read ({error})", "save or download the sheet again") from error
    words = [re.sub("(?<=[a-z])(?=[A-Z])", " ", header).lower() for header in headers]  # PatientID: two words
    places = []
    for field, (pattern, position) in wanted.items():
        found = [i for i, header in enumerate(words) if re.search(pattern, header)]
        if columns == "position":
            found = [position] if position < len(headers) else []
        if len(found) != 1:
            which = " or ".join(repr(headers[i]) for i in found) or "none"
            what = "label" if field == "label" else f"{field} name"
            remedy = "rename the headers in row 1, or use the released positions (columns: position)"
            raise CohortError(path, f"the {what} may be in {which} of the headers {headers}", remedy)
        places += found
    rows = [[row[i] if i < len(row) else None for i in places] for row in sheet[1:]]
    return [(number, dict(zip(wanted, row, strict=True))) for number, row in enumerate(rows, start=2)]


def _workbook(path):
    """The rows of a workbook's first sheet, each its cells; a formula is its last value, or else its text.

    Not `pandas.read_excel`, to which a formula never computed and an error such as #REF! are blank cells.
    """
    import openpyxl

    def read(data_only):
        with open(path, "rb") as file:
            sheet = openpyxl.load_workbook(file, read_only=True, data_only=data_only).worksheets[0]
            sheet.reset_dimensions()  # what a sheet says of its own size is often wrong
            return list(sheet.iter_rows(values_only=True))

    rows = read(data_only=False)
    if not any(_formula(cell).startswith("=") for row in rows for cell in row):
        return rows
    return [
        [_formula(cell) if value is None and cell else value for cell, value in zip(*pair, strict=True)]
        for pair in zip(rows, read(data_only=True), strict=True)
    ]


def _formula(cell):
    """The text of a cell; a formula of several cells is an object that holds its text."""
    return str(getattr(cell, "text", cell))


def _blank(cell):
    """Whether a cell of a sheet is empty, or says that something is missing."""
    return cell is None or str(cell).strip().casefold() in NA


def _found_scans(root, modality, folders, listed, problems):
    """The scans of one modality that are listed with a label and a name of their own and have every file."""
    rows = defaultdict(list)
    for scan in listed:
        if scan["modality"] == modality:
            rows[scan["case_id"].casefold()].append(scan)
    folders, scans, indices = [root / folder for folder in folders], [], []
    if not rows and not any(folder.exists() for folder in folders):
        return scans  # nothing of this modality was downloaded
    for folder in folders:
        with _noting_errors(problems):
            indices.append(_index_files(folder))
            strays = [name for key, names in indices[-1].items() if key not in rows for name in names]
            remedy = "none needed if it is no part of the cohort; otherwise add a row"
            problems += [("warning", str(folder / n), "no row in the label sheet", remedy) for n in strays]
    for same_name in rows.values():
        with _noting_errors(problems):
            scan = _checked_scan(same_name)
            if scan and len(indices) == len(folders):
                paths = [_file_of(scan, *place) for place in zip(folders, indices, strict=True)]
                scans.append(scan | dict(zip(("image", "mask"), [*paths, ""], strict=False)))
    return scans


def _checked_scan(rows):
    """The scan in the sheet rows of one name, with label and center; None if it has no label."""
    scan, where = rows[0], f"{rows[0]['sheet']} row {rows[0]['row']}"
    name, label = scan["case_id"], str(scan["label"]).strip()
    if len(rows) > 1:
        numbers = " and ".join(str(row["row"]) for row in rows)
        labels = list(dict.fromkeys("none" if _blank(row["label"]) else str(row["label"]) for row in rows))
        text = f"rows {numbers} have the same {scan['modality']} name {name!r}"
        text += f" and different labels: {', '.join(labels)}" if len(labels) > 1 else ""
        raise CohortError(scan["sheet"], text, "keep one row per scan")
    if _blank(scan["label"]):
        return None
    if re.search(r"[/\\]|\.\.", name) or not name.isprintable():
        text = f"the name {name!r} has a path in it, or a character that does not print"
        raise CohortError(where, text, "type the bare name anew")
    if not re.fullmatch(r"[012](\.0*)?", label):  # on text, where True is not 1
        text = f"the label {scan['label']!r} of {name} is not 0, 1 or 2"
        raise CohortError(where, text, "correct it, or clear it to leave the scan out")
    try:
        center = center_of(name)
    except ValueError as error:
        raise CohortError(where, error, "rename the scan in the sheet and on disk") from error
    return scan | {"label": int(label[0]), "center": center, "where": where}


def _index_files(folder):
    """Names of a folder's NIfTI files by lower-case case name; hidden ones (._NAME of macOS) are no scans."""
    if not folder.is_dir():
        raise CohortError(folder, "no such folder", "put the images, or masks, of the sheet's scans there")
    index = defaultdict(list)
    with os.scandir(folder) as entries:
        for entry in sorted(entries, key=lambda entry: entry.name):
            if re.search(r"(?is)^[^.].*\.nii(\.gz)?$", entry.name) and entry.is_file():
                index[case_name(entry.name).casefold()].append(entry.name)
    return index


def _file_of(scan, folder, index):
    """Path of a scan's file in an indexed folder."""
    name, kind = scan["case_id"], "mask" if folder.name == "masks" else "image"
    files = index.get(name.casefold(), [])
    if len(files) > 1:
        text = f"{len(files)} files are the {kind} of {name} in {folder}: {', '.join(files)}"
        raise CohortError(scan["where"], text, "keep one of them")
    if not files:
        text = f"no {kind} of {name} in {folder}: no {name}.nii.gz or {name}.nii, with or without _0000"
        raise CohortError(scan["where"], text, "add the file, or clear the label to leave the scan out")
    return str(folder / files[0])
