"""The layouts of the real data set, each read into one table of scans, one row per labelled scan.

    first    IPMN_labels_t{1,2}_total.xlsx    t{1,2}_clean_ROI/NAME.nii.gz
    second   IPMN_labels_total.xlsx           IPMN_images_masks/t{1,2}/{images,masks}/NAME.nii.gz

The table has the columns `SCAN_COLUMNS`, T1 rows first, in sheet order. `mask` is "" in the first release,
whose images are masked and cropped already.
"""

import re
from collections import defaultdict
from contextlib import contextmanager

from ipmn_core.names import CENTERS, MODALITIES

SCAN_COLUMNS = ["case_id", "patient_id", "center", "modality", "label"]
SCAN_COLUMNS += ["fold_multiclass", "fold_binary", "image", "mask"]
NA = ("", "na", "n/a", "#n/a", "#na", "<na>", "nan", "null", "none")  # cells that say "missing"

# The words in a scan's name that give its center; CAD scans are Mayo Clinic Florida's.
CENTER_WORDS = {center.lower(): center for center in CENTERS} | {"cad": "MCF", "northwestern": "NU"}

# Release -> sheet -> what to find there, by a pattern of its header in row 1.
NAME, T1, T2 = r"(?<![a-z])(patient|id|name|case)(?![a-z])", r"(?<![a-z])t1(?!\d)", r"(?<![a-z])t2(?!\d)"
SHEETS = {
    "first": {f"IPMN_labels_{m}_total.xlsx": {m: NAME, "label": "risk"} for m in MODALITIES},
    "second": {"IPMN_labels_total.xlsx": {"t1": T1, "t2": T2, "label": "risk"}},
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


def case_name(raw):
    """The name of a case: a sheet's cell or a file's name less .nii, .nii.gz and nnU-Net's trailing _0000."""
    return re.sub(r"(_0000)?(\.nii(\.gz)?)?$", "", str(raw).strip(), flags=re.IGNORECASE).strip()


def read_release(root, problems):
    """Usable scans of the release in `root`, dicts with `SCAN_COLUMNS`, and {modality: unlabelled scans}.

    What is wrong is appended to `problems` as (severity, where, problem, remedy).
    """
    listed, scans = {m: defaultdict(list) for m in MODALITIES}, []
    with _noting_errors(problems):
        release = _release(root)
        _list_scans(root, SHEETS[release], FOLDERS[release], listed)
        for m, rows in listed.items():
            with _noting_errors(problems):
                scans += _found_scans([root / folder for folder in FOLDERS[release][m]], rows, problems)
    return scans, {
        m: sum(_blank(scan["label"]) for same_name in rows.values() for scan in same_name)
        for m, rows in listed.items()
    }


@contextmanager
def _noting_errors(problems):
    """A block that a CohortError ends, leaving a row in `problems`."""
    try:
        yield
    except CohortError as error:
        problems.append(("error", *error.args))


def _release(root):
    """The release in `root`, "first" or "second"."""
    parts = {r: [*SHEETS[r], *(folders[0] for folders in FOLDERS[r].values())] for r in SHEETS}
    found = [r for r in parts if any((root / name).exists() for name in parts[r])]
    if len(found) != 1:
        text = "has parts of two releases" if found else "has no label sheets"
        sheets = f"{parts['first'][0]} (first release) or {parts['second'][0]} (second release)"
        raise CohortError(root, text, f"give the folder that holds {sheets}, each release in its own")
    return found[0]


def _list_scans(root, sheets, folders, listed):
    """Add every row of the label sheets to `listed`: modality -> name in lower case -> its scans.

    A label is as it is there; the name is "" for a label without one.
    """
    for sheet, wanted in sheets.items():
        modality = next(iter(wanted))
        if len(sheets) > 1 and not (root / sheet).exists() and not (root / folders[modality][0]).exists():
            continue  # a first release of which only the other modality was downloaded
        for number, cells in _sheet_rows(root / sheet, wanted):
            label = cells.pop("label")
            names = {m: case_name(cell) for m, cell in cells.items() if not _blank(cell)}
            if not names and not _blank(label):
                names = {modality: ""}
            for m, name in names.items():
                patient = next(iter(names.values())).casefold()
                scan = {"modality": m, "case_id": name, "patient_id": patient, "label": label}
                listed[m][name.casefold()].append(scan | {"where": f"{sheet} row {number}"})


def _sheet_rows(path, wanted):
    """(row number in the spreadsheet, {what is wanted: cell}) of every row below the header."""
    try:
        header, *rows = workbook(path) or [()]
    except Exception as error:  # a damaged workbook raises whatever its zip, XML or cells provoke
        raise CohortError(path, f"cannot be read ({error})", "save or download the sheet again") from error
    headers = ["" if _blank(cell) else str(cell).strip() for cell in header]
    words = [re.sub("(?<=[a-z])(?=[A-Z])", " ", header).lower() for header in headers]  # PatientID: two words
    places = {}
    for field, pattern in wanted.items():
        found = [i for i, header in enumerate(words) if re.search(pattern, header)]
        if len(found) != 1:
            which = " or ".join(repr(headers[i]) for i in found) or "none"
            what = "label" if field == "label" else f"{field} name"
            text = f"the {what} may be in {which} of the headers {headers}"
            raise CohortError(path, text, "rename the headers in row 1")
        places[field] = found[0]
    cells = [{field: row[i] if i < len(row) else None for field, i in places.items()} for row in rows]
    return list(enumerate(cells, start=2))


def workbook(path):
    """The rows of a workbook's first sheet; a formula is its last value or, if never computed, its text.

    Not `pandas.read_excel`, to which a formula never computed and an error such as #REF! are blank cells.
    """
    import openpyxl

    def read(data_only):
        with open(path, "rb") as file:
            sheet = openpyxl.load_workbook(file, read_only=True, data_only=data_only).worksheets[0]
            sheet.reset_dimensions()  # what a sheet says of its own size is often wrong
            return list(sheet.values)

    rows = zip(read(data_only=True), read(data_only=False), strict=True)
    return [[text if value is None else value for value, text in zip(*pair, strict=True)] for pair in rows]


def _blank(cell):
    """Whether a cell of a sheet is empty, or says that something is missing."""
    return cell is None or str(cell).strip().casefold() in NA


def _found_scans(folders, rows, problems):
    """The scans of one modality that are listed with a label and a name of their own and have every file."""
    if not rows and not any(folder.exists() for folder in folders):
        return []  # nothing of this modality was downloaded
    scans, indices = [], [_index_files(folder) for folder in folders]
    for folder, index in zip(folders, indices, strict=True):
        strays = [folder / name for key, names in index.items() if key not in rows for name in names]
        remedy = "none needed if it is no part of the cohort; otherwise add a row"
        problems += [("warning", path, "no row in the label sheet", remedy) for path in strays]
    for same_name in rows.values():
        with _noting_errors(problems):
            if scan := _checked_scan(same_name):
                paths = [_file_of(scan, *place) for place in zip(folders, indices, strict=True)]
                scans.append(scan | {"image": paths[0], "mask": "".join(paths[1:])})
    return scans


def _checked_scan(rows):
    """The scan in the sheet rows of one name, with label and center; None if it has no label."""
    scan = rows[0]
    where, name, label = scan["where"], scan["case_id"], str(scan["label"]).strip()
    if len(rows) > 1:
        wheres = " and ".join(row["where"] for row in rows)
        raise CohortError(wheres, f"both have the {scan['modality']} name {name!r}", "keep one row per scan")
    if _blank(scan["label"]):
        return None
    if not re.fullmatch(r"[012](\.0*)?", label):  # on text, where True is not 1
        text = f"the label {scan['label']!r} of {name} is not 0, 1 or 2"
        raise CohortError(where, text, "correct it, or clear it to leave the scan out")
    centers = {CENTER_WORDS[word] for word in re.findall("[a-z]+", name.lower()) if word in CENTER_WORDS}
    if len(centers) != 1:
        found = " and ".join(sorted(centers)) or "no center"
        text = f"the name {name!r} gives {found}; known prefixes: {', '.join(CENTER_WORDS)}"
        raise CohortError(where, text, "rename the scan in the sheet and on disk")
    return scan | {"label": int(label[0]), "center": centers.pop(), "fold_multiclass": "", "fold_binary": ""}


def _index_files(folder):
    """Names of a folder's NIfTI files by lower-case case name; hidden ones (._NAME of macOS) are no scans."""
    if not folder.is_dir():
        raise CohortError(folder, "no such folder", "put the images, or masks, of the sheet's scans there")
    index = defaultdict(list)
    for path in sorted(folder.iterdir()):
        if re.search(r"(?is)^[^.].*\.nii(\.gz)?$", path.name) and path.is_file():
            index[case_name(path.name).casefold()].append(path.name)
    return index


def _file_of(scan, folder, index):
    """Path of a scan's file in an indexed folder; names are looked up, never joined to a path."""
    name, kind = scan["case_id"], "mask" if folder.name == "masks" else "image"
    files = index.get(name.casefold(), [])
    if len(files) != 1:
        found = f"{len(files)} {kind}s of {name!r} in {folder}: {', '.join(files)}"
        text = found if files else f"no {kind} of {name!r} in {folder}"
        remedy = f"keep one, {name}.nii.gz or {name}.nii; or clear the label to leave the scan out"
        raise CohortError(scan["where"], text, remedy)
    return str(folder / files[0])
