"""The table of scans, one row per labelled scan, and the cohort: that table with a cube for each row."""

import hashlib
from dataclasses import dataclass

import numpy as np
import pandas as pd

from ipmn_core.data.check import inspect
from ipmn_core.data.cubes import load_cubes
from ipmn_core.data.releases import CohortError
from ipmn_core.names import CENTERS, LABELS, MODALITIES


@dataclass(frozen=True)
class Cohort:
    """Scans (columns `releases.SCAN_COLUMNS`, index from 0) and their cubes (N, S, S, S), row by row.

    `key` is a SHA-256 over files, recipe and rows as loaded; a narrowed cohort keeps it.
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
    scans = read(root)
    scans = scans[scans["modality"].isin(p.modalities)].reset_index(drop=True)
    if scans.empty:
        raise CohortError(root, f"no labelled {' or '.join(p.modalities)} scan", "choose other `modalities`")
    return scans


def load_cohort(p) -> Cohort:
    """The scans that a profile trains on: its cohort, cut to `max_per_cell`, with cubes from the cache.

    Raises CohortError, or ScanError naming the first case that cannot be used.
    """
    scans = subset(open_cohort(p), p.max_per_cell)
    cubes, key = load_cubes(scans, p.preprocessing, p.folder.parent / "cache", p.jobs)
    rows = scans[["case_id", "patient_id", "center", "modality", "label"]].to_csv(index=False)
    return Cohort(scans, cubes, hashlib.sha256((key + rows).encode()).hexdigest())


def read(root) -> pd.DataFrame:
    """The labelled scans of a cohort on disk; CohortError lists what `inspect` calls errors, at most ten."""
    scans, problems = inspect(root)
    errors = problems[problems["severity"] == "error"]
    if errors.empty:
        return scans
    first = [f"{row.where}: {row.problem}: {row.remedy}" for row in errors.head(10).itertuples()]
    title = f"{len(errors)} error(s) in this cohort; `ipmn check {root}` lists all, these are the first"
    raise CohortError(root, "\n  ".join([title, *first]))


def subset(scans: pd.DataFrame, max_per_cell: int | None) -> pd.DataFrame:
    """The first `max_per_cell` scans of each modality, center and label, in sheet order (None: all scans)."""
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


def read_truth(p) -> pd.DataFrame:
    """The phantom's `truth.csv`, one row per patient: findings, true probabilities; empty for real data."""
    path = p.cohort_root / "truth.csv"
    return pd.read_csv(path) if path.exists() else pd.DataFrame()
