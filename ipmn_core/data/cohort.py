"""A cohort as a data frame, one row a labelled scan: read from sheets and folders, checked, split in folds.

Both releases of the data set are read as they lie on disk:

    first    IPMN_labels_t{1,2}_total.xlsx    t{1,2}_clean_ROI/NAME.nii.gz
    second   IPMN_labels_total.xlsx           IPMN_images_masks/t{1,2}/{images,masks}/NAME.nii.gz

`scans` has the columns `case_id, patient_id, center, modality, label, image, mask`, T1 rows first, in sheet
order. `mask` is "" in the first release, whose images are masked and cropped already.
"""

import os
import re
import warnings
from collections import defaultdict
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from ipmn_core.names import CENTERS, LABEL_NAMES, LABELS, MODALITIES

SCAN_COLUMNS = ["case_id", "patient_id", "center", "modality", "label", "image", "mask"]
PROBLEM_COLUMNS = ["severity", "where", "problem", "remedy"]

FORMULA = r"[=+\-@\t\r\n]"  # what a cell starts with that a spreadsheet runs
NA = ("", "na", "n/a", "#n/a", "#na", "<na>", "nan", "null", "none")  # cells that say "missing"

# The words in a scan's name that give its center; CAD scans are Mayo Clinic Florida's.
CENTER_WORDS = {center.lower(): center for center in CENTERS} | {"cad": "MCF", "northwestern": "NU"}

# Release -> sheet -> what to find there: (pattern of its header, its position in the released sheet).
NAME, RISK = r"(?<![a-z])(patient|id|name|case)(?![a-z])", "risk"
SHEETS = {
    "first": {f"IPMN_labels_{m}_total.xlsx": {m: (NAME, 0), "label": (RISK, 5)} for m in MODALITIES},
    "second": {
        "IPMN_labels_total.xlsx": {
            "t1": (r"(?<![a-z])t1(?!\d)", 0),
            "t2": (r"(?<![a-z])t2(?!\d)", 1),
            "label": (RISK, 6),
        }
    },
}
# Release -> modality -> folders of the images and, in the second, of their masks.
FOLDERS = {
    "first": {m: [f"{m}_clean_ROI"] for m in MODALITIES},
    "second": {m: [f"IPMN_images_masks/{m}/images", f"IPMN_images_masks/{m}/masks"] for m in MODALITIES},
}


@dataclass(frozen=True)
class Cohort:
    """Scans and their ROI cubes, kept together row by row.

    `scans` has one row per scan (columns as in this module's docstring, index from 0), `cubes` (N, S, S, S)
    float16 in [0, 1], perhaps memory-mapped; `key` is a SHA-256 over the files, the recipe of the cubes and
    the rows as loaded, and stays the same when the cohort is narrowed.
    """

    scans: pd.DataFrame
    cubes: np.ndarray
    key: str

    def __len__(self) -> int:
        return len(self.scans)

    def where(self, keep) -> "Cohort":
        """The scans for which the boolean array `keep` (N,) is true, with their cubes."""
        keep = np.asarray(keep)
        return Cohort(self.scans[keep].reset_index(drop=True), self.cubes[keep], self.key)

    def of(self, modality: str) -> "Cohort":
        """The scans of one modality, with their cubes."""
        return self.where(self.scans["modality"] == modality)


class CohortError(ValueError):
    """A cohort that cannot be used, raised with where, what is wrong and what to do."""

    def __str__(self):
        return ": ".join(map(str, self.args))


def center_of(name: str) -> str:
    """The center, one of `CENTERS`, that the words in a scan's name give; ValueError if none or two."""
    centers = {CENTER_WORDS[word] for word in re.findall("[a-z]+", name.lower()) if word in CENTER_WORDS}
    if len(centers) != 1:
        found = " and ".join(sorted(centers)) or "no center"
        raise ValueError(f"the name {name!r} gives {found}; known prefixes: {', '.join(CENTER_WORDS)}")
    return centers.pop()


def case_name(raw) -> str:
    """The name of a case: a sheet's cell or a file's name less .nii, .nii.gz and nnU-Net's trailing _0000."""
    return re.sub(r"(_0000)?(\.nii(\.gz)?)?$", "", str(raw).strip(), flags=re.IGNORECASE).strip()


def inspect(root, columns="header") -> tuple[pd.DataFrame, pd.DataFrame]:
    """The scans that can be used, and the problems (`severity, where, problem, remedy`), errors first.

    `columns="header"` finds a sheet's columns by their headers, `"position"` by the released sheets' order:
    columns 0 and 5 in the first release; 0, 1 and 6 in the second. Row 1 is the header; a blank or NA cell is
    missing. Scans without a label are left out and counted in `scans.attrs["unlabelled"]`. No volume is read:
    see `preprocess.volume_problems`. ValueError for any other `columns`.
    """
    if columns not in ("header", "position"):
        raise ValueError(f"columns is {columns!r}; it is 'header' or 'position'")
    root, listed, found, problems = Path(root), [], [], []
    with _noting_errors(problems):
        release = _release(root)
        listed = _listed_scans(root, SHEETS[release], FOLDERS[release], columns, problems)
        found = [s for m in MODALITIES for s in _found_scans(root, m, FOLDERS[release][m], listed, problems)]
    scans = pd.DataFrame(found, columns=SCAN_COLUMNS).astype({"label": int})
    problems += _disagreements(scans)
    for n_folds, binary in ((5, False), (4, True)):  # the paper's two experiments
        problems += fold_problems(scans, n_folds, binary).itertuples(index=False, name=None)
    blank = {m: [_blank(scan["label"]) for scan in listed if scan["modality"] == m] for m in MODALITIES}
    scans.attrs["unlabelled"] = {m: sum(blank[m]) for m in MODALITIES}
    if listed:
        counts = " and ".join(f"{sum(blank[m])} of {len(blank[m])} {m} scans" for m in MODALITIES)
        problems.append(("note", str(root), f"{counts} have no label", "none needed: they are left out"))
    return scans, worst_first(pd.DataFrame(problems, columns=PROBLEM_COLUMNS).drop_duplicates())


def worst_first(problems: pd.DataFrame) -> pd.DataFrame:
    """The same problems, errors first, then warnings, then notes."""
    rank = problems["severity"].map(("error", "warning", "note").index)
    return problems.loc[rank.sort_values(kind="stable").index].reset_index(drop=True)


def for_spreadsheet(table: pd.DataFrame) -> pd.DataFrame:
    """The same table with an apostrophe before each text, header or cell, that a spreadsheet would run.

    Such text starts with = + - @, a tab or a line's end (OWASP, "CSV injection"). Apostrophes before these
    count as part of it, so that `from_spreadsheet` gives back every text.
    """
    return _each_text(table, lambda text: re.sub(rf"^(?='*{FORMULA})", "'", text))


def from_spreadsheet(table: pd.DataFrame) -> pd.DataFrame:
    """The table that `for_spreadsheet` was given."""
    return _each_text(table, lambda text: re.sub(rf"^'(?='*{FORMULA})", "", text))


def read(root, columns="header") -> pd.DataFrame:
    """The labelled scans of a cohort on disk; CohortError lists what `inspect` calls errors, at most ten."""
    scans, problems = inspect(root, columns)
    errors = problems[problems["severity"] == "error"]
    if errors.empty:
        return scans
    lines = [f"{row.where}: {row.problem}: {row.remedy}" for row in errors.head(10).itertuples()]
    if len(errors) > 10:
        lines.append(f"and {len(errors) - 10} more; `ipmn check {root}` lists all")
    raise CohortError(root, "\n  ".join([f"errors in this cohort, {len(errors)} in all", *lines]))


def in_one_cell(text: str) -> str:
    """The text for a cell of a Markdown table on a terminal: what does not print, and the bar, escaped."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text).replace("|", r"\|")


def subset(scans: pd.DataFrame, max_per_cell: int | None) -> pd.DataFrame:
    """The first `max_per_cell` scans of each modality, center and label, in sheet order (None: all scans).

    The sheets list T1 and T2 in one order of patients, so a patient's two scans are taken together as far as
    the patients who have only one of them allow.
    """
    if max_per_cell is None:
        return scans
    rank = scans.groupby(["modality", "center", "label"]).cumcount()
    return scans[rank < max_per_cell].reset_index(drop=True)


def table1(scans: pd.DataFrame) -> pd.DataFrame:
    """Table 1, scans per center and modality: `center, modality, no_risk, low_risk, high_risk, total`."""
    counts = pd.crosstab([scans["center"], scans["modality"]], scans["label"])
    counts = counts.reindex(columns=range(len(LABELS)), fill_value=0)
    counts.columns = [name.replace(" ", "_") for name in LABELS]
    counts["total"] = counts.sum(axis="columns")
    present = [(c, m) for c in CENTERS for m in MODALITIES if (c, m) in counts.index]
    return counts.loc[present].reset_index()


def assign_folds(scans: pd.DataFrame, n_folds: int, rule="center", binary=False) -> pd.Series:
    """The fold (0 ... n_folds-1) in which each scan is tested, on the index of `scans`.

    `rule="center"` is the paper's: unshuffled `StratifiedKFold` on the label (binary: on label == 2) within
    each modality and center; fold k of the cohort is fold k of all centers together.
    `rule="patient"`: Departs from the paper: the same within each center over patients, by the larger of a
    patient's labels, so that T1 and T2 of one pancreas never stand on both sides of a split.
    CohortError for a center without a class of `n_folds` members.
    """
    if rule not in ("center", "patient"):
        raise ValueError(f"rule is {rule!r}; it is 'center' or 'patient'")
    by_scan = rule == "center"
    cell = scans["center"] + " " + (scans["modality"] if by_scan else "patients")
    unit = pd.Series(range(len(scans)), scans.index) if by_scan else scans["patient_id"]
    y = _task_label(scans, binary)
    fold = pd.Series(-1, scans.index, name="fold")
    for where, rows in scans.groupby(cell, sort=False).indices.items():
        y_of_unit = y.iloc[rows].groupby(unit.iloc[rows], sort=False).max()
        fold.iloc[rows] = unit.iloc[rows].map(_stratified_folds(y_of_unit, n_folds, binary, where))
    return fold


def inner_validation(scans: pd.DataFrame, share: float, seed) -> pd.Index:
    """The index of those of the training `scans` that are held out to choose the epoch on, drawn by `seed`.

    `share` of every center and label, to the nearest whole case: none of two cases at 0.2, one of three.
    Departs from the paper: its released code chooses on the test fold. With a share of 0 nothing is held out.
    """
    rng = np.random.default_rng(seed)
    return scans.groupby(["center", "label"]).sample(frac=share, random_state=rng).index


def fold_problems(scans: pd.DataFrame, n_folds: int, binary: bool) -> pd.DataFrame:
    """Problems of the paper's folds: centers that cannot be split or hold one class only (warnings), small
    classes (note).
    """
    problems = []
    y = _task_label(scans, binary)
    for where, y_here in y.groupby(scans["center"] + " " + scans["modality"], sort=False):
        counts = _class_counts(y_here, binary)
        small = ", ".join(f"{n} {name}" for name, n in counts.items() if n < n_folds)
        if max(counts.values()) < n_folds:
            problems.append(("warning", where, *_unsplittable(counts, n_folds)))
        elif max(counts.values()) == len(y_here):
            text = f"holds {len(y_here)} cases of one class only ({LABEL_NAMES[binary][y_here.iloc[0]]})"
            remedy = "none needed: its AUC is n/a, and a model of it alone learns nothing"
            problems.append(("warning", where, text, remedy))
        elif small:
            text = f"{small}: too few for one in each of {n_folds} folds"
            problems.append(("note", where, text, "none needed: measures that need the class are n/a there"))
    return pd.DataFrame(problems, columns=PROBLEM_COLUMNS)


def open_cohort(p) -> pd.DataFrame:
    """All labelled scans of a profile's cohort, of its `modalities`, from the folder `p.cohort_root`.

    A phantom that is not there is written first. CohortError if there is no folder or no scan.
    """
    root = p.cohort_root
    if p.data == "phantom" and not root.exists():
        from ipmn_core import phantom

        options = {"max_per_cell": p.phantom_max_per_cell, "shortcut": p.phantom_shortcut}
        phantom.write(root, seed=p.phantom_seed, jobs=p.jobs, **options)
    if not root.is_dir():
        remedy = "set `data` to its folder (get it from https://osf.io/74vfs) or to phantom (synthetic)"
        raise CohortError(root, "no such folder, so no cohort", remedy)
    scans = read(root, p.columns)
    scans = scans[scans["modality"].isin(p.modalities)].reset_index(drop=True)
    if scans.empty:
        raise CohortError(root, f"no labelled {' or '.join(p.modalities)} scan", "choose other `modalities`")
    return scans


def read_truth(p) -> pd.DataFrame:
    """The phantom's `truth.csv`, a row a patient: findings and true probabilities; empty for real data."""
    path = p.cohort_root / "truth.csv"
    return pd.read_csv(path) if path.exists() else pd.DataFrame()


@contextmanager
def _noting_errors(problems):
    """A block that a CohortError ends, leaving a row in problems."""
    try:
        yield
    except CohortError as error:
        problems.append(("error", *map(str, error.args)))


def _release(root):
    """The release that lies at root, "first" or "second"."""
    tops = {r: [*SHEETS[r], *(f[0].split("/")[0] for f in FOLDERS[r].values())] for r in SHEETS}
    found = {r: sorted({name for name in tops[r] if (root / name).exists()}) for r in tops}
    if found["first"] and found["second"]:
        both = f"{', '.join(found['first'])} and {', '.join(found['second'])}"
        raise CohortError(root, f"has parts of two releases: {both}", "keep each release in its own folder")
    if not found["first"] and not found["second"]:
        text = f"has no {tops['first'][0]} (first release) and no {tops['second'][0]} (second release)"
        raise CohortError(root, text, "give the folder that holds the label sheets")
    return "first" if found["first"] else "second"


def _listed_scans(root, sheets, folders, columns, problems):
    """Every scan in the label sheets, its label as it stands; case_id is "" for a label without a name."""
    listed = []
    for sheet, wanted in sheets.items():
        modality = next(iter(wanted))
        if len(sheets) > 1 and not (root / sheet).exists() and not (root / folders[modality][0]).exists():
            continue  # a first release of which only the other modality was downloaded
        for number, cells in _sheet_rows(root / sheet, wanted, columns, problems):
            label = cells.pop("label")
            names = {m: case_name(cell) for m, cell in cells.items() if not _blank(cell)}
            if not names and not _blank(label):
                names = {modality: ""}
            for m, name in names.items():
                patient = next(iter(names.values())).casefold()
                scan = {"modality": m, "case_id": name, "patient_id": patient, "label": label}
                listed.append(scan | {"sheet": sheet, "row": number})
    return listed


def _sheet_rows(path, wanted, columns, problems):
    """(row number in the spreadsheet, cells by what is wanted) of every row below the header."""
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
            if len(found) == 1 and position not in found and position < len(headers):
                named = headers[found[0]]
                text = f"columns: position takes {headers[position]!r}, while a header says {named!r}"
                problems.append(("warning", str(path), text, "set columns: header if the columns moved"))
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
    if not any(_formula(cell) for row in rows for cell in row):
        return rows
    both = zip(rows, read(data_only=True), strict=True)
    return [
        [_formula(cell) or cell if value is None else value for cell, value in zip(row, values, strict=True)]
        for row, values in both
    ]


def _formula(cell):
    """The formula in a cell, "" if it holds none; that of several cells is an object with a text."""
    text = getattr(cell, "text", cell)
    return text if isinstance(text, str) and text.startswith("=") else ""


def _blank(cell):
    """Whether a cell of a sheet is empty, or says that something is missing."""
    return cell is None or str(cell).strip().casefold() in NA


def _found_scans(root, modality, folders, listed, problems):
    """The rows of `scans` of one modality: those listed with a label, a name of their own and every file."""
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
    """The scan behind the sheet rows of one name, with label and center; None if it has no label."""
    scan, where = rows[0], f"{rows[0]['sheet']} row {rows[0]['row']}"
    if len(rows) > 1:
        numbers = " and ".join(str(row["row"]) for row in rows)
        text = f"rows {numbers} have the same {scan['modality']} name {scan['case_id']!r}"
        labels = list(dict.fromkeys("none" if _blank(row["label"]) else str(row["label"]) for row in rows))
        if len(labels) > 1:
            text += f" and different labels: {', '.join(labels)}"
        raise CohortError(scan["sheet"], text, "keep one row a scan")
    if _blank(scan["label"]):
        return None
    if re.search(r"[/\\]|\.\.", scan["case_id"]):
        raise CohortError(where, f"the name {scan['case_id']!r} has a path in it", "give the bare name")
    if not scan["case_id"].isprintable():
        text = f"the name {scan['case_id']!r} has a character that does not print"
        raise CohortError(where, text, "type it anew")
    label = str(scan["label"]).strip()
    if not re.fullmatch(r"[012](\.0*)?", label):  # on text, where True is not 1
        text = f"the label {scan['label']!r} of {scan['case_id']} is not 0, 1 or 2"
        raise CohortError(where, text, "correct it, or clear it to leave the scan out")
    try:
        center = center_of(scan["case_id"])
    except ValueError as error:
        raise CohortError(where, error, "rename the scan in the sheet and on disk") from error
    return scan | {"label": int(label[0]), "center": center, "where": where}


def _index_files(folder):
    """Names of a folder's NIfTI files by lower-case case name; hidden ones (._NAME of macOS) are no scans."""
    index = defaultdict(list)
    if not folder.is_dir():
        raise CohortError(folder, "no such folder", "put the images, or masks, of the sheet's scans there")
    with os.scandir(folder) as entries:
        for entry in sorted(entries, key=lambda entry: entry.name):
            if (
                re.search(r"^[^.].*\.nii(\.gz)?$", entry.name, flags=re.IGNORECASE | re.DOTALL)
                and entry.is_file()
            ):
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


def _disagreements(scans):
    """A warning for each patient whose scans differ in label, an error if they differ in center."""
    problems = []
    for severity, column in (("warning", "label"), ("error", "center")):
        differ = scans.groupby("patient_id")[column].transform("nunique") > 1
        for patient, part in scans[differ].groupby("patient_id", sort=False):
            values = zip(part["modality"], part["case_id"], part[column], strict=True)
            text = f"scans with different {column}s: " + ", ".join(f"{m} {case} {v}" for m, case, v in values)
            problems.append((severity, f"patient {patient}", text, "correct the sheet if this is a slip"))
    return problems


def _each_text(table, change):
    """The table with every text cell and header changed."""
    only_text = lambda cell: change(cell) if isinstance(cell, str) else cell  # noqa: E731
    changed = {i: table.iloc[:, i].map(only_text) for i in range(table.shape[1])}
    return pd.DataFrame(changed, index=table.index).set_axis(table.columns.map(only_text), axis=1)


def _task_label(scans, binary):
    """The class of each scan in the three-class task or, if binary, whether it is high risk."""
    return (scans["label"] == 2).astype(int) if binary else scans["label"]


def _class_counts(y, binary):
    """Cases by class name."""
    return {name: int((y == k).sum()) for k, name in enumerate(LABEL_NAMES[binary])}


def _unsplittable(counts, n_folds):
    """What is wrong with a center where no class has a case for every fold, and the remedy."""
    cases = ", ".join(f"{n} {name}" for name, n in counts.items())
    return f"cannot be split into {n_folds} folds ({cases})", "take fewer folds, or more cases of one class"


def _stratified_folds(y, n_folds, binary, where):
    """The test fold of each label, on the index of y."""
    from sklearn.model_selection import StratifiedKFold

    counts = _class_counts(y, binary)
    if max(counts.values()) < n_folds:  # scikit-learn refuses the same, but cannot say where
        raise CohortError(where, *_unsplittable(counts, n_folds))
    fold = pd.Series(-1, y.index)
    with warnings.catch_warnings():
        # The paper's cohort has classes below n_folds; `fold_problems` reports them.
        warnings.filterwarnings("ignore", message="The least populated class")
        for k, (_, test) in enumerate(StratifiedKFold(n_folds).split(y, y)):
            fold.iloc[test] = k
    return fold
