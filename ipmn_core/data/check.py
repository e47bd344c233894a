"""What is wrong with the scans of a cohort: rows of severity, where, problem, remedy.

Errors are what keeps a scan, or the cohort, from being used.
"""

import numpy as np
import pandas as pd
from tqdm import tqdm

from ipmn_core.data.cubes import FILES, copies, in_threads, mixed_axes
from ipmn_core.data.scan import ScanError, read_scan
from ipmn_core.params import Preprocessing


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


def disagreements(cohort) -> list[tuple[str, str, str, str]]:
    """A warning for each patient whose scans differ in class or center."""
    scans, problems = cohort.scans, []
    differ = scans.groupby("patient_id")[["label", "center"]].transform("nunique").max(axis="columns") > 1
    for patient, part in scans[differ].groupby("patient_id", sort=False):
        rows = [f"{s.modality} {s.case_id}: {s.center}, {cohort.classes[s.label]}" for s in part.itertuples()]
        text = f"scans with different labels or centers: {'; '.join(rows)}"
        problems.append(("warning", f"patient {patient}", text, "correct the table if this is a slip"))
    return problems
