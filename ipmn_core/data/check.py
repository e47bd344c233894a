"""What is wrong with a cohort on disk: one row per problem, `severity, where, problem, remedy`.

Errors are what keeps a scan, or the cohort, from being used.
"""

from pathlib import Path

import numpy as np
import pandas as pd
from tqdm import tqdm

from ipmn_core.data import releases
from ipmn_core.data.cubes import FILES, copies, in_threads, mixed_axes
from ipmn_core.data.folds import class_counts, task_label
from ipmn_core.data.releases import SCAN_COLUMNS
from ipmn_core.data.scan import ScanError, read_scan
from ipmn_core.params import Preprocessing

PROBLEM_COLUMNS = ["severity", "where", "problem", "remedy"]
SEVERITIES = ["error", "warning", "note"]


def inspect(root, volumes=False) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The scans that can be used, and the problems (`PROBLEM_COLUMNS`), errors first.

    Scans without a label are left out and counted in `scans.attrs["unlabelled"]`. If `volumes`, every volume
    is read, too (`volume_problems`).
    """
    problems = []
    found, unlabelled = releases.read_release(Path(root), problems)
    scans = pd.DataFrame(found, columns=SCAN_COLUMNS).astype({"label": int})
    scans.attrs["unlabelled"] = unlabelled
    problems += _disagreements(scans)
    for n_folds, binary in ((5, False), (4, True)):  # the paper's two experiments
        problems += fold_problems(scans, n_folds, binary)
    if any(unlabelled.values()):
        counts = " and ".join(f"{n} {m} scans" for m, n in unlabelled.items())
        problems.append(("note", root, f"{counts} have no label", "none needed: they are left out"))
    problems += volume_problems(scans) if volumes else []
    table = pd.DataFrame(problems, columns=PROBLEM_COLUMNS).astype(str).drop_duplicates()
    worst_first = table["severity"].map(SEVERITIES.index).sort_values(kind="stable").index
    return scans, table.loc[worst_first].reset_index(drop=True)


def fold_problems(scans: pd.DataFrame, n_folds: int, binary: bool) -> list[tuple[str, str, str, str]]:
    """Centers that cannot be split into folds (warnings), and classes with fewer cases than folds (notes)."""
    problems = []
    for where, here in scans.groupby(scans["center"] + " " + scans["modality"], sort=False):
        counts = class_counts(task_label(here, binary), binary)
        small = ", ".join(f"{n} {name}" for name, n in counts.items() if n < n_folds)
        severity, remedy = "note", "none needed: measures that need the class are n/a there"
        if max(counts.values()) < n_folds:  # `assign_folds` refuses them
            severity, remedy = "warning", "take fewer folds, or more cases of one class"
        if small:
            problems.append((severity, where, f"{small}: too few for one in each of {n_folds} folds", remedy))
    return problems


def volume_problems(scans: pd.DataFrame, how: Preprocessing | None = None) -> list[tuple[str, str, str, str]]:
    """Problems of the volumes of `scans`, as `read_scan` judges them, and of all of them together.

    Errors: what training refuses with the settings `how`; None: with any.
    """

    def judged(image, mask, case):
        try:
            scan = read_scan(image, mask, case, how)
        except ScanError as error:
            return [("error", *error.args[1:])], None, None
        return scan.remarks, scan.axes, scan.digest

    found = in_threads(-1, judged, scans[FILES].to_numpy())
    found = list(tqdm(found, "reading volumes", len(scans), unit="scan"))
    usable = scans[np.array([axes is not None for _, axes, _ in found], bool)]
    of_usable = [row for row in found if row[1] is not None]
    problems = [problem for of_scan, _, _ in found for problem in of_scan]
    return problems + copies(usable, of_usable) + mixed_axes(usable, of_usable)


def _disagreements(scans):
    """A warning for each patient whose scans differ in label or center."""
    problems = []
    differ = scans.groupby("patient_id")[["label", "center"]].transform("nunique").max(axis="columns") > 1
    for patient, part in scans[differ].groupby("patient_id", sort=False):
        rows = [f"{s.modality} {s.case_id}: {s.center}, label {s.label}" for s in part.itertuples()]
        text = f"scans with different labels or centers: {'; '.join(rows)}"
        problems.append(("warning", f"patient {patient}", text, "correct the sheet if this is a slip"))
    return problems
