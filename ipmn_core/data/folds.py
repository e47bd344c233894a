"""Folds of cross-validation and the inner split."""

import warnings

import numpy as np
import pandas as pd

from ipmn_core.data.releases import CohortError
from ipmn_core.names import LABEL_NAMES


def assign_folds(scans: pd.DataFrame, n_folds: int, rule="center", binary=False) -> pd.Series:
    """The fold (0 ... n_folds-1) in which each scan is tested, on the index of `scans`.

    `rule="center"` is the paper's: unshuffled `StratifiedKFold` on the label (binary: on label == 2) within
    each modality and center. `rule="patient"`: Departs from the paper: the same within each center over
    patients, by the larger of a patient's labels, so that T1 and T2 of one pancreas are never on both sides
    of a split. Raises CohortError for a center without a class of `n_folds` members.
    """
    if rule not in ("center", "patient"):
        raise ValueError(f"rule is {rule!r}; it is 'center' or 'patient'")
    by_scan = rule == "center"
    cell = scans["center"] + " " + (scans["modality"] if by_scan else "patients")
    unit = pd.Series(range(len(scans)), scans.index) if by_scan else scans["patient_id"]
    y = task_label(scans, binary)
    fold = pd.Series(-1, scans.index, name="fold")
    for where, rows in scans.groupby(cell, sort=False).indices.items():
        y_of_unit = y.iloc[rows].groupby(unit.iloc[rows], sort=False).max()
        fold.iloc[rows] = unit.iloc[rows].map(_stratified_folds(y_of_unit, n_folds, binary, where))
    return fold


def inner_validation(scans: pd.DataFrame, share: float, seed) -> pd.Index:
    """The index of the training `scans` held out to choose the epoch on: `share` of every center and label.

    Departs from the paper: its released code chooses on the test fold. With a share of 0 nothing is held out.
    """
    rng = np.random.default_rng(seed)
    return scans.groupby(["center", "label"]).sample(frac=share, random_state=rng).index


def task_label(scans, binary):
    """The class of each scan in the three-class task or, if binary, whether it is high risk."""
    return (scans["label"] == 2).astype(int) if binary else scans["label"]


def class_counts(y, binary):
    """Cases by class name."""
    return {name: int((y == k).sum()) for k, name in enumerate(LABEL_NAMES[binary])}


def _stratified_folds(y, n_folds, binary, where):
    """The test fold of each label, on the index of y."""
    from sklearn.model_selection import StratifiedKFold

    counts = class_counts(y, binary)
    if max(counts.values()) < n_folds:  # scikit-learn refuses the same, but cannot say where
        cases = ", ".join(f"{n} {name}" for name, n in counts.items())
        text = f"cannot be split into {n_folds} folds ({cases})"
        raise CohortError(where, text, "take fewer folds, or more cases of one class")
    fold = pd.Series(-1, y.index)
    with warnings.catch_warnings():
        # The paper's cohort has classes below n_folds; `check.fold_problems` reports them.
        warnings.filterwarnings("ignore", message="The least populated class")
        for k, (_, test) in enumerate(StratifiedKFold(n_folds).split(y, y)):
            fold.iloc[test] = k
    return fold
