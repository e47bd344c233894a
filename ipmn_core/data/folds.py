"""Folds of cross-validation and the inner split. Scans of one patient and modality share a fold."""

from __future__ import annotations

import warnings

import numpy as np
import pandas as pd

from ipmn_core.data.releases import CohortError

UNSEEN = "leave_one_center_out"


def targets(scans: pd.DataFrame, task: str) -> pd.Series:
    """The label of each scan in a task, int64: its class, or for `binary` 1 if positive, else 0."""
    return (scans["positive"] if task == "binary" else scans["label"]).astype(np.int64)


def assign_folds(cohort, n_folds: int, rule: str = "center", task: str = "multiclass") -> pd.Series:
    """The fold (0 ... n_folds-1) in which each scan of a `Cohort` is tested, on the index of its `scans`.

    - "center", the paper's rule: unshuffled `StratifiedKFold` on the task's class, over the patients of each
      modality and center. A patient with several classes counts as the largest.
    - "patient". Departs from the paper: the same over the patients of each center, all modalities together,
      so that T1 and T2 of one pancreas share a fold.
    - "given" or "official": the folds of the manifest, or of the release.
    - "leave_one_center_out". Departs from the paper: fold k is the k-th center; its run never sees it.

    Raises ValueError for another rule. Raises CohortError for a center in which no class has `n_folds`
    patients, and for given folds that cannot be used. Leave-one-center-out raises it if the number of folds
    is not that of centers, and for a patient of two centers.
    """
    scans = cohort.scans
    if rule in ("given", "official"):
        return _given_folds(scans, n_folds, task)
    if rule == UNSEEN:
        return _centers_as_folds(cohort, n_folds, task)
    if rule not in ("center", "patient"):
        raise ValueError(f"fold_rule {rule!r}: choose center, patient, given, official or {UNSEEN}")
    fold = pd.Series(-1, scans.index, name="fold")
    for where, rows, y in _cells(scans, rule, task):
        split = _stratified_folds(y, n_folds, cohort.names(task), where)
        fold.iloc[rows] = scans["patient_id"].iloc[rows].map(split)
    return fold


def problems(cohort, n_folds: int, rule: str, task: str) -> list[tuple[str, str, str, str]]:
    """Problems with a task's folds: refused folds (warnings), classes with too few patients (notes)."""
    found = []
    try:
        assign_folds(cohort, n_folds, rule, task)
    except CohortError as error:
        found.append(("warning", *error.args))
    small = []
    if rule == UNSEEN:  # absent classes are reported where the center is tested
        return found
    for where, _, y in _cells(cohort.scans, "center", task):
        few = [f"{n} {name}" for name, n in _counts(y, cohort.names(task)).items() if n < n_folds]
        small += [f"{where}: {', '.join(few)}"] if few else []
    if small:
        text = f"too few patients for one in each of {n_folds} folds: {'; '.join(small)}"
        remedy = "none needed: measures that need the class are n/a there"
        found.append(("note", f"folds of {task}", text, remedy))
    return found


def _cells(scans, rule, task):
    """(Name, rows, class by patient) of each group that is split on its own: one center and modality."""
    patient = ["patient_id"] if rule == "patient" else ["modality", "patient_id"]
    home = scans.groupby(patient)["center"].transform("first").rename("home")  # one center per patient
    kind = pd.Series("patients", scans.index) if rule == "patient" else scans["modality"]
    for (center, of), rows in scans.groupby([home, kind], sort=False).indices.items():
        here = scans.iloc[rows]
        yield f"{center} {of}", rows, targets(here, task).groupby(here["patient_id"], sort=False).max()


def inner_validation(scans: pd.DataFrame, share: float, seed) -> pd.Index:
    """The index of the training `scans` that are held out to choose the epoch.

    Holds out whole patients, a `share` of each center and class. Departs from the paper: its released code
    chooses the epoch on the test fold.
    """
    patients = scans.drop_duplicates("patient_id")
    rng = np.random.default_rng(seed)
    held_out = patients.groupby(["center", "label"]).sample(frac=share, random_state=rng)["patient_id"]
    return scans.index[scans["patient_id"].isin(held_out)]


def _counts(y, names):
    """Cases by class name."""
    return {name: int((y == k).sum()) for k, name in enumerate(names)}


def _stratified_folds(y, n_folds, names, where):
    """The test fold of each label, on the index of y."""
    from sklearn.model_selection import StratifiedKFold

    counts = _counts(y, names)
    if max(counts.values()) < n_folds:  # scikit-learn refuses this, too, but cannot say where
        cases = ", ".join(f"{n} {name}" for name, n in counts.items())
        text = f"cannot be split into {n_folds} folds ({cases})"
        raise CohortError(where, text, "take fewer folds, or more cases of one class")
    fold = pd.Series(-1, y.index)
    with warnings.catch_warnings():
        # The paper's cohort has classes below n_folds; `problems` reports them.
        warnings.filterwarnings("ignore", message="The least populated class")
        for k, (_, test) in enumerate(StratifiedKFold(n_folds).split(y, y)):
            fold.iloc[test] = k
    return fold


def _centers_as_folds(cohort, n_folds, task):
    """The index of each scan's center among the centers."""
    scans, names, where = cohort.scans, cohort.centers, f"folds of {task}"
    if len(names) != n_folds:
        text = f"{UNSEEN} needs one fold per center: {len(names)} centers ({', '.join(names)}), not {n_folds}"
        remedy = f"set `{task}_folds: {len(names)}`" if len(names) > 1 else "choose another `fold_rule`"
        raise CohortError(where, text, remedy)
    homes = scans.groupby("patient_id")["center"].nunique()
    if len(moved := homes.index[homes > 1]):
        text = f"{UNSEEN} would test patients that it trains on: {', '.join(moved[:10])} are in two centers"
        raise CohortError(where, text, "give each patient one center, or choose another `fold_rule`")
    return scans["center"].map(names.index).rename("fold")


def _given_folds(scans, n_folds, task):
    """The given folds as numbers, in the order of their names (numbers by value)."""
    where = f"folds of {task}"
    given = scans[f"fold_{task}"].astype(str).str.strip()
    patient = given.groupby([scans["modality"], scans["patient_id"]])
    for wrong, text in (
        (given == "", "no single fold is given for"),
        (patient.transform("nunique") > 1, "two folds are given for scans of one patient and modality:"),
    ):
        if wrong.any():
            cases = scans.loc[wrong, "modality"] + " " + scans.loc[wrong, "case_id"]
            more = f" and {len(cases) - 10} more" if len(cases) > 10 else ""
            text = f"{text} {', '.join(cases[:10])}{more}"
            raise CohortError(where, text, "give each patient one, or choose another `fold_rule`")
    names = sorted(given.unique(), key=lambda name: (int(name) if name.isdecimal() else np.inf, name))
    if len(names) != n_folds:
        text = f"{len(names)} folds are given ({', '.join(names)}), but the profile sets {n_folds}"
        raise CohortError(where, text, f"set `{task}_folds: {len(names)}`")
    return given.map(names.index).rename("fold")
