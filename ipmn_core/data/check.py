"""What is wrong with the scans of a cohort: rows of severity, where, problem, remedy.

Errors are what keeps a scan, or the cohort, from being used.
"""

import pandas as pd
from tqdm import tqdm

from ipmn_core.data import headers
from ipmn_core.data.cubes import FILES, ScanError, in_threads, load_roi


def volume_problems(scans: pd.DataFrame) -> list[tuple[str, str, str, str]]:
    """Problems of the volumes of `scans`, read by the code that training reads them with.

    Errors: what training refuses. Warnings: spacing unknown, image and mask in different places.
    """
    found = in_threads(-1, _scan_problems, scans[FILES].to_numpy())
    found = tqdm(found, "reading volumes", len(scans), unit="scan")
    return [problem for of_scan in found for problem in of_scan]


def _scan_problems(image, mask, case):
    try:
        load_roi(image, mask, case)
    except ScanError as error:
        return [("error", *error.args[1:])]
    return [("warning", *remark) for remark in headers.remarks(image, mask)]


def disagreements(cohort) -> list[tuple[str, str, str, str]]:
    """A warning for each patient whose scans differ in class or center."""
    scans, problems = cohort.scans, []
    differ = scans.groupby("patient_id")[["label", "center"]].transform("nunique").max(axis="columns") > 1
    for patient, part in scans[differ].groupby("patient_id", sort=False):
        rows = [f"{s.modality} {s.case_id}: {s.center}, {cohort.classes[s.label]}" for s in part.itertuples()]
        text = f"scans with different labels or centers: {'; '.join(rows)}"
        problems.append(("warning", f"patient {patient}", text, "correct the table if this is a slip"))
    return problems
