"""What is wrong with a cohort on disk: one row per problem, `severity, where, problem, remedy`.

Errors are what keeps a scan, or the cohort, from being used.
"""

from collections import defaultdict
from pathlib import Path

import pandas as pd
from joblib import Parallel, delayed
from tqdm import tqdm

from ipmn_core.data import headers, releases
from ipmn_core.data.cubes import ScanError, load_roi
from ipmn_core.data.folds import assign_folds, class_counts, task_label
from ipmn_core.data.releases import SCAN_COLUMNS, CohortError

PROBLEM_COLUMNS = ["severity", "where", "problem", "remedy"]


def inspect(root, columns="header") -> tuple[pd.DataFrame, pd.DataFrame]:
    """The scans that can be used, and the problems (`PROBLEM_COLUMNS`), errors first.

    `columns="header"` finds a sheet's columns by their headers, `"position"` by the released sheets' order:
    columns 0 and 5 in the first release; 0, 1 and 6 in the second. Row 1 is the header; a blank or NA cell is
    missing. Scans without a label are left out and counted in `scans.attrs["unlabelled"]`. No volume is read:
    see `volume_problems`. ValueError for any other `columns`.
    """
    if columns not in ("header", "position"):
        raise ValueError(f"columns is {columns!r}; it is 'header' or 'position'")
    problems = []
    found, listed = releases.read_release(Path(root), columns, problems)
    scans = pd.DataFrame(found, columns=SCAN_COLUMNS).astype({"label": int})
    scans.attrs["unlabelled"] = {m: blank for m, (blank, _) in listed.items()}
    problems += _disagreements(scans)
    for n_folds, binary in ((5, False), (4, True)):  # the paper's two experiments
        problems += fold_problems(scans, n_folds, binary).itertuples(index=False, name=None)
    if any(n for _, n in listed.values()):
        counts = " and ".join(f"{blank} of {n} {m} scans" for m, (blank, n) in listed.items())
        problems.append(("note", str(root), f"{counts} have no label", "none needed: they are left out"))
    return scans, worst_first(pd.DataFrame(problems, columns=PROBLEM_COLUMNS).drop_duplicates())


def worst_first(problems: pd.DataFrame) -> pd.DataFrame:
    """The same problems, errors first, then warnings, then notes."""
    rank = problems["severity"].map(("error", "warning", "note").index)
    return problems.loc[rank.sort_values(kind="stable").index].reset_index(drop=True)


def fold_problems(scans: pd.DataFrame, n_folds: int, binary: bool) -> pd.DataFrame:
    """Problems of the paper's folds: centers that cannot be split, or of one class only (warnings), and
    small classes (notes).
    """
    problems = []
    for where, here in scans.groupby(scans["center"] + " " + scans["modality"], sort=False):
        counts = class_counts(task_label(here, binary), binary)
        small = ", ".join(f"{n} {name}" for name, n in counts.items() if n < n_folds)
        try:
            assign_folds(here, n_folds, binary=binary)
        except CohortError as error:
            problems.append(("warning", *error.args))
            continue
        if max(counts.values()) == len(here):
            text = f"holds {len(here)} cases of one class only ({max(counts, key=counts.get)})"
            remedy = "none needed: its AUC is n/a, and a model of it alone learns nothing"
            problems.append(("warning", where, text, remedy))
        elif small:
            text = f"{small}: too few for one in each of {n_folds} folds"
            problems.append(("note", where, text, "none needed: measures that need the class are n/a there"))
    return pd.DataFrame(problems, columns=PROBLEM_COLUMNS)


def volume_problems(scans: pd.DataFrame, progress: bool = False, jobs: int = -1) -> pd.DataFrame:
    """What is wrong with the volumes of `scans`, read by the code that training reads them with.

    Columns `PROBLEM_COLUMNS`. Errors: what training refuses. Warnings: spacing unknown, image and mask in
    different places, header extensions. Notes: text in header fields, counted by folder, never repeated.
    """
    rows = list(scans[["image", "mask", "case_id"]].itertuples(index=False, name=None))
    errors = Parallel(n_jobs=jobs, backend="threading", return_as="generator")(
        delayed(_error_of)(*row) for row in rows
    )
    errors = list(tqdm(errors, "reading volumes", len(rows), unit="scan", disable=not progress))
    said = [headers.of(image, mask) for image, mask, _ in rows]
    problems = [("error", *error.args[1:]) for error in errors if error]
    problems += [("warning", *remark) for pair in said for remark in headers.remarks(pair)]
    problems += _texts([header for pair in said for header in pair])
    return pd.DataFrame(problems, columns=PROBLEM_COLUMNS).astype(str)


def _error_of(image, mask, case):
    """The error that training would end with, None for a sound scan."""
    try:
        load_roi(image, mask, case)
    except ScanError as error:
        return error.with_traceback(None)  # its frames would keep the voxels


def _texts(said):
    """A note, and a warning for extensions, for each folder with files whose headers hold text."""
    problems, folders = [], defaultdict(list)
    for header in said:
        folders[str(Path(header.path).parent)].append(set(header.text))
    remedy = "nothing here copies or prints it; clear it before you pass files on"
    for folder, texts in folders.items():
        n_extended = sum(headers.EXTENSIONS in text for text in texts)
        n_fields = sum(bool(text - {headers.EXTENSIONS}) for text in texts)
        if n_extended:
            problem = f"{n_extended} of {len(texts)} files have header extensions: they may hold patient data"
            problems.append(("warning", folder, problem, remedy))
        if n_fields:
            fields = ", ".join(field for field in headers.TEXT_FIELDS if field in set.union(*texts))
            problem = f"{n_fields} of {len(texts)} files have text in their header ({fields})"
            problems.append(("note", folder, f"{problem}: it may hold patient data", remedy))
    return problems


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
