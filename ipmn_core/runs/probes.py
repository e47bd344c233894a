"""Probes: scikit-learn models that see no shape, on the folds of the arms.

A network that scores no higher than a probe may have learned the center or the scanner, not the pancreas.
This happened with chest radiographs, where a network recognized hospitals (Zech et al., PLoS Medicine 2018).
"""

from __future__ import annotations

import time
from dataclasses import asdict, replace
from itertools import groupby
from typing import Any

import nibabel as nib
import numpy as np
import pandas as pd
from sklearn.ensemble import RandomForestClassifier
from sklearn.linear_model import LogisticRegression
from tqdm import tqdm

from ipmn_core import data
from ipmn_core.data import Cohort, headers
from ipmn_core.names import single
from ipmn_core.params import Params
from ipmn_core.runs import store
from ipmn_core.runs.grid import Run, folder_of
from ipmn_core.runs.run import predictions_of


def center_one_hot(scans: pd.DataFrame, _array: np.ndarray) -> np.ndarray:
    """The center of each scan, one-hot: (N, C)."""
    center = scans["center"].to_numpy()
    return (center[:, None] == scans["center"].unique().to_numpy()).astype(float)


def header(scans: pd.DataFrame, _array: np.ndarray) -> np.ndarray:
    """Spacing (mm), matrix and stored axes, (N, 9): dx, dy, dz, nx, ny, nz, ax, ay, az of the image's header.

    An axis is 1, 2, 3 if it points to the patient's right, front, head, and negative for left, back, feet. No
    voxel is read. A spacing that is not finite is NaN; a spacing of 0 is 1 mm, as nibabel reads it. In images
    that are cut to the pancreas, nx, ny, nz also give its size, which is anatomy.
    """
    of = [headers.header_of(path) for path in scans["image"]]
    spacing = np.array([h["pixdim"][1:4] for h in of], dtype=float)
    spacing[~np.isfinite(spacing)], spacing[spacing == 0] = np.nan, 1
    turns = [nib.io_orientation(headers.place(h)[0]) for h in of]
    axes = [(turn[:, 0] + 1) * turn[:, 1] for turn in turns]
    return np.hstack([spacing, [h["dim"][1:4] for h in of], axes])


def histogram(_scans: pd.DataFrame, array: np.ndarray) -> np.ndarray:
    """Share of each cube's non-zero voxels in 32 equal bins of [0, 1], or of the range of values if wider.

    (N, 32). It has no place or shape, but it shows disease: the fluid of a large cyst or a wide duct. An arm
    that is no better need not have used any shape.
    """
    ends = [(cube.min(), cube.max()) for cube in map(np.asarray, array)]  # the array may be a memory map
    low, high = np.clip(np.array(ends, float), (-np.inf, 1), (0, np.inf)).T
    ends = low.min(), high.max()
    counts = [np.histogram(cube[cube != 0].astype(float), 32, ends)[0] for cube in map(np.asarray, array)]
    return np.array([count / max(count.sum(), 1) for count in counts])


# functions of the scans of one modality and their cubes (N, S, S, S); features (N, F) float64
PROBES = {"center_only": center_one_hot, "header_only": header, "histogram_only": histogram}


def predict(
    name: str, x: np.ndarray, y: np.ndarray, test: np.ndarray, n_classes: int, seed: int
) -> np.ndarray:
    """Class probabilities (n_test, K) of the rows in the mask `test`, from the probe fitted to all others.

    x (N, F) are features, y (N,) class indices; a class absent from training has probability 0.

    "center_only" is a logistic regression, almost unregularized, that returns the center's prevalence. The
    others are random forests. They accept NaN, and they find a header that depends on the label within each
    center, which a linear model of pooled values misses. Every split may use every column, so that
    uninformative columns do not hide an informative one.
    """
    model = RandomForestClassifier(200, min_samples_leaf=5, max_features=None, random_state=seed, n_jobs=1)
    if name == "center_only":
        model = LogisticRegression(C=1e6, tol=1e-6, max_iter=10_000)
    model.fit(x[~test], y[~test])
    prob = np.zeros((test.sum(), n_classes))
    prob[:, model.classes_] = model.predict_proba(x[test])
    return prob


def grid(p: Params, task: str) -> list[Run]:
    """The runs of all probes of a task: probes x modalities x folds."""
    folds, modalities = range(p.folds(task)), single(p.modalities)
    return [Run(task, m, name, k) for m in modalities for name in PROBES for k in folds]


def protocols(p: Params, task: str) -> dict[Run, dict[str, Any]]:
    """All runs of a task's probes with the settings that their results depend on, for `run.json`."""
    same = {"folds": p.folds(task), "fold_rule": p.fold_rule, "max_per_cell": p.max_per_cell}
    same |= {**asdict(p.preprocessing), "seed": p.seed}
    return {run: {**asdict(run), **same} for run in grid(p, task)}


def fit(p: Params, task: str, cohort: Cohort) -> pd.DataFrame:
    """Fit the probes of a task that are not on disk; return the predictions of all of them.

    A probe's run is stored like an arm's and has one epoch. No case is held out for inner validation, because
    there is no epoch to choose. Raises StaleRunError as `runs.train`.
    """
    todo = store.unfinished(p, protocols(p, task), cohort.key)
    fold = data.assign_folds(cohort, p.folds(task), p.fold_rule, task).to_numpy()
    bar = tqdm(todo, f"probing {task}", unit="run", disable=not todo, mininterval=1)
    for (modality, name), runs in groupby(bar, lambda run: (run.modality, run.arm)):
        mine = cohort.of(modality)
        scans = mine.scans.assign(fold=fold[cohort.scans["modality"] == modality])
        x = PROBES[name](scans, mine.cubes)
        for run in runs:
            _fit(p, run, replace(mine, scans=scans), x)
    return predictions(p, task)


def _fit(p: Params, run: Run, cohort: Cohort, x: np.ndarray) -> None:
    started, scans, names = time.perf_counter(), cohort.scans, cohort.names(run.task)
    test = (scans["fold"] == run.fold).to_numpy()
    y = data.targets(scans, run.task).to_numpy()
    prob = predict(run.arm, x, y, test, len(names), p.seed)
    roles = scans.assign(role=np.where(test, "test", "train"))
    frame = predictions_of(1, prob, run, p.seed, roles[test]).drop(columns="role")
    folder = folder_of(p, run)
    folder.mkdir(parents=True, exist_ok=True)
    store.write_table(folder / "predictions.parquet", frame)
    about = {"settings": protocols(p, run.task)[run], "data": cohort.key, "classes": names}
    store.seal(folder, about, roles, time.perf_counter() - started)


def predictions(p: Params, task: str) -> pd.DataFrame:
    """The test predictions of all probes of a task, in the form of `runs.predictions`, with one epoch."""
    return store.read_all(p, protocols(p, task))
