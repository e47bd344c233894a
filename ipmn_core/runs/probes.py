"""Probes: scikit-learn models on the folds of the arms, which see no shape.

A network that scores no higher than a probe may have learned the center or the scanner, not the pancreas, as
one that told the hospitals of chest radiographs apart (Zech et al., PLoS Medicine 2018).
"""

from __future__ import annotations

import time
from dataclasses import asdict, replace
from typing import Any

import nibabel as nib
import numpy as np
import pandas as pd
from tqdm import tqdm

from ipmn_core import data
from ipmn_core.data import Cohort
from ipmn_core.names import CENTERS, class_names
from ipmn_core.params import Params
from ipmn_core.runs import store
from ipmn_core.runs.grid import Run, folder_of
from ipmn_core.runs.run import targets

BINS = 32


def features(name: str, scans: pd.DataFrame, array: np.ndarray) -> np.ndarray:
    """The features of each scan for the probe `name`, (N, F) float64; NaN where a header says nothing.

    `scans` are rows of one modality: T1 and T2 differ in their headers anyway. `array` (N, S, S, S) holds
    their cubes, row by row, in [0, 1]; only "histogram_only" reads it. Raises ValueError for an unknown
    probe, several modalities or another number of cubes.
    """
    if scans["modality"].nunique() > 1:
        raise ValueError("Scans of several modalities: pass the rows of one, a probe is made for each.")
    if len(array) != len(scans):
        raise ValueError(f"{len(array)} cubes for {len(scans)} scans: pass the cubes of these rows.")
    return PROBES[_known(name)](scans, array)


def center_one_hot(scans: pd.DataFrame, _array: np.ndarray) -> np.ndarray:
    """Which of `CENTERS` each scan is from, (N, 7)."""
    return (scans["center"].to_numpy()[:, None] == np.array(CENTERS)).astype(float)


def header(scans: pd.DataFrame, _array: np.ndarray) -> np.ndarray:
    """Voxel spacing (mm) and matrix, (N, 6): dx, dy, dz, nx, ny, nz of the image's header; no voxel is read.

    A spacing that is not finite is NaN; one of zero is 1 mm, as nibabel reads it. The images of the data
    set's first release are cut to the pancreas, so there nx, ny, nz also tell its size, which is anatomy.
    """
    headers = [nib.load(path).header for path in scans["image"]]
    spacing = np.array([h["pixdim"][1:4] for h in headers], dtype=float)
    spacing[~np.isfinite(spacing)] = np.nan
    return np.hstack([spacing, [h["dim"][1:4] for h in headers]])


def histogram(_scans: pd.DataFrame, array: np.ndarray) -> np.ndarray:
    """Share of each cube's non-zero voxels in 32 equal bins of [0, 1], (N, 32).

    It knows no place or shape, but is no mere nuisance: the fluid of a large cyst or wide duct shows in it.
    An arm that does no better need not have used any shape.
    """
    return np.stack([_histogram(np.asarray(cube)) for cube in array])  # cube by cube: it may be a memory map


def _histogram(cube: np.ndarray) -> np.ndarray:
    values = cube[cube > 0].astype(np.float32)
    counts = np.bincount(np.minimum((values * BINS).astype(int), BINS - 1), minlength=BINS)
    return counts / max(len(values), 1)


PROBES = {"center_only": center_one_hot, "header_only": header, "histogram_only": histogram}


def predict(name: str, x: np.ndarray, y: np.ndarray, train, test, seed: int) -> np.ndarray:
    """Class probabilities (n_test, K) of rows `test` by the probe `name`, fitted to rows `train`.

    x (N, F) are its `features`, y (N,) class indices; K = max(y) + 1, and a class absent from training has
    probability 0. `train` and `test` are indices or masks. The same seed gives the same numbers. Raises
    ValueError for an unknown probe.
    """
    model = _model(_known(name), seed).fit(x[train], y[train])
    prob = np.zeros((len(x[test]), int(y.max()) + 1))
    prob[:, model.classes_] = model.predict_proba(x[test])
    return prob


def _model(name: str, seed: int):
    """The center's prevalence, almost unregularized, for "center_only"; else trees, which accept NaN.

    Trees, for a header may go with the label inside each center while the centers differ more, which no
    linear model of pooled values sees. Every split may use every column: one that tells must not be hidden
    by five that do not.
    """
    from sklearn.ensemble import RandomForestClassifier
    from sklearn.linear_model import LogisticRegression

    if name == "center_only":
        return LogisticRegression(C=1e6, tol=1e-6, max_iter=10_000)
    return RandomForestClassifier(200, min_samples_leaf=5, max_features=None, random_state=seed, n_jobs=1)


def _known(name: str) -> str:
    if name not in PROBES:
        raise ValueError(f"Unknown probe {name!r}: choose one of {', '.join(PROBES)}.")
    return name


def grid(p: Params, task: str) -> list[Run]:
    """The runs of all probes of a task: probes x modalities x folds."""
    return [Run(task, m, name, k) for m in p.modalities for name in PROBES for k in range(p.folds(task))]


def protocol(p: Params, run: Run) -> dict[str, Any]:
    """The settings that a probe's result depends on, as plain values for `run.json`."""
    split = {"folds": p.folds(run.task), "fold_rule": p.fold_rule, "max_per_cell": p.max_per_cell}
    return {**asdict(run), **split, "size": p.size, "seed": p.seed}


def unfinished(p: Params, task: str, cohort: Cohort) -> list[Run]:
    """The probes of a task that are not on disk yet. Raises StaleRunError as `runs.train`."""
    return [
        run for run in grid(p, task) if not store.finished(folder_of(p, run), protocol(p, run), cohort.key)
    ]


def fit(p: Params, task: str, cohort: Cohort) -> pd.DataFrame:
    """Fit the probes of a task that are not on disk yet; return the predictions of all of them.

    A probe's run is among those of the arms and has one epoch; no case is held out for inner validation, for
    there is no epoch to choose. Raises StaleRunError as `runs.train`.
    """
    todo = unfinished(p, task, cohort)
    fold = data.assign_folds(cohort.scans, p.folds(task), p.fold_rule, binary=task == "binary")
    cohort = replace(cohort, scans=cohort.scans.assign(fold=fold))
    seen: dict[tuple[str, str], tuple[Cohort, np.ndarray]] = {}
    for run in tqdm(todo, f"probing {task}", unit="run", disable=not todo, mininterval=1):
        if (run.modality, run.arm) not in seen:
            mine = cohort.of(run.modality)
            seen = {(run.modality, run.arm): (mine, features(run.arm, mine.scans, mine.cubes))}
        _fit(p, run, *seen[run.modality, run.arm])
    return predictions(p, task)


def _fit(p: Params, run: Run, cohort: Cohort, x: np.ndarray) -> None:
    started = time.perf_counter()
    test = (cohort.scans["fold"] == run.fold).to_numpy()
    y = targets(cohort.scans["label"].to_numpy(), run.task)
    prob = predict(run.arm, x, y, ~test, test, p.seed)
    absent = len(class_names(run.task)) - prob.shape[1]  # classes above all labels of the cohort
    prob = np.pad(prob, ((0, 0), (0, absent)))
    frame = cohort.scans.loc[test, ["case_id", "center", "modality"]].assign(
        task=run.task, arm=run.arm, fold=run.fold, seed=p.seed, epoch=1, y_true=y[test]
    )
    frame = frame.assign(**{f"prob_{k}": prob[:, k] for k in range(prob.shape[1])})
    folder = folder_of(p, run)
    folder.mkdir(parents=True, exist_ok=True)
    store.write_parquet(folder / "predictions.parquet", frame)
    scans = cohort.scans.assign(role=np.where(test, "test", "train"))
    store.seal(
        folder, {"settings": protocol(p, run), "data": cohort.key}, scans, time.perf_counter() - started
    )


def predictions(p: Params, task: str) -> pd.DataFrame:
    """The test predictions of all probes of a task, as `runs.predictions` of the arms, with one epoch."""
    frames = [store.read_predictions(folder_of(p, run), protocol(p, run)) for run in grid(p, task)]
    return pd.concat(frames, ignore_index=True)
