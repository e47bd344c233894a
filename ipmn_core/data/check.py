"""What is wrong with a cohort on disk: one row per problem, `severity, where, problem, remedy`.

Errors are what keeps a scan, or the cohort, from being used.
"""

from collections import defaultdict
from contextlib import suppress
from pathlib import Path

import pandas as pd
from tqdm import tqdm

from ipmn_core.data import headers, releases
from ipmn_core.data.cubes import ScanError, in_threads, load_roi
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
        problems += fold_problems(scans, n_folds, binary)
    if any(n for _, n in listed.values()):
        counts = " and ".join(f"{blank} of {n} {m} scans" for m, (blank, n) in listed.items())
        problems.append(("note", str(root), f"{counts} have no label", "none needed: they are left out"))
    return scans, worst_first(pd.DataFrame(problems, columns=PROBLEM_COLUMNS).drop_duplicates())


def worst_first(problems: pd.DataFrame) -> pd.DataFrame:
    """The same problems, errors first, then warnings, then notes."""
    rank = problems["severity"].map(("error", "warning", "note").index)
    return problems.loc[rank.sort_values(kind="stable").index].reset_index(drop=True)


def fold_problems(scans: pd.DataFrame, n_folds: int, binary: bool) -> list[tuple[str, str, str, str]]:
    """Centers that cannot be split into folds or have one class only (warnings), small classes (notes)."""
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
    return problems


def volume_problems(scans: pd.DataFrame, progress: bool = False, jobs: int = -1) -> pd.DataFrame:
    """Problems of the volumes of `scans` (`PROBLEM_COLUMNS`), read by the code that training reads them with.

    Errors: what training refuses. Warnings: spacing unknown, image and mask in different places, header
    extensions. Notes: text in header fields, counted by folder, never repeated.
    """
    found = in_threads(jobs, _scan_problems, scans[["image", "mask", "case_id"]])
    found = tqdm(found, "reading volumes", len(scans), unit="scan", disable=not progress)
    problems = [problem for of_scan in found for problem in of_scan]
    problems += _text_problems(filter(None, scans[["image", "mask"]].to_numpy().ravel()))
    return pd.DataFrame(problems, columns=PROBLEM_COLUMNS).astype(str)


def _scan_problems(image, mask, case):
    try:
        load_roi(image, mask, case)
    except ScanError as error:
        return [("error", *error.args[1:])]
    return [("warning", *remark) for remark in headers.remarks(image, mask)]


def _text_problems(files):
    """One problem for each folder with files whose headers hold text; a warning if in extensions."""
    problems, folders = [], defaultdict(list)
    for file in files:
        with suppress(Exception):  # a file that cannot be read is an error already
            folders[str(Path(file).parent)].append(headers.text_fields(file))
    for folder, texts in folders.items():
        if fields := sorted(set().union(*texts)):
            severity = "warning" if headers.EXTENSIONS in fields else "note"
            n = f"{sum(map(bool, texts))} of {len(texts)} files"
            problem = f"{n} have text in their header ({', '.join(fields)}): it may hold patient data"
            remedy = "nothing here copies or prints it; clear it before you pass files on"
            problems.append((severity, folder, problem, remedy))
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
