"""Test weights from elsewhere on a cohort's test folds, or on all of it, and write runs as training does."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
from tqdm import tqdm

from ipmn_core import data, federated, metrics, params
from ipmn_core.data import Cohort
from ipmn_core.disk import digest
from ipmn_core.names import REFERENCES, fusion, is_personal
from ipmn_core.params import Params, Preprocessing
from ipmn_core.runs import store
from ipmn_core.runs.grid import LOCAL_ONLY, Run, folder_of
from ipmn_core.runs.run import predictions_of
from ipmn_core.runs.trained import PredictError, Trained, find, hashed, load, probabilities_of, roles


@dataclass(frozen=True)
class Scored:
    """The folder of a scored arm, one row per fold (fold, n, positives, acc, auc, weights), and remarks."""

    arm: Path
    folds: pd.DataFrame
    remarks: tuple[str, ...]


def score(
    p: Params,
    paths: Sequence[str | Path],
    arm: str | None = None,
    modality: str | None = None,
    folds: Sequence[int] | None = None,
    whole: bool = False,
    how: Preprocessing | None = None,
    network: str | None = None,
) -> Scored:
    """Test given weights (`trained.find`) on a profile's cohort; write one run per fold, not trained here.

    The weights of a run test its own fold. Bare files test the `folds`, in order. By default a file in a
    folder `fold<k>` tests fold k; otherwise one file per fold is needed, for folds 0, 1, ... If `whole`,
    every case gets the mean over all weights, as fold 0 of 1. Scans are preprocessed as the weights say.
    `predictions.parquet` has the epoch `metrics.AS_GIVEN`; `run.json` has file and SHA-256. Earlier scores
    are kept. Raises PredictError for weights that do not fit the profile, for weights that were trained on a
    case they would test, and for an arm on disk with other weights.
    """
    federated.prepare(p.threads)
    given = find(paths, how, network)
    task, modality, arm = given[0].task, _modality(p, given, modality), _arm(p, given[0], arm)
    for one in given:
        load(one)  # refuse bad weights before reading scans
    cohort = _cohort(p, given[0], modality, whole)
    counts = cohort.scans["fold"].value_counts().sort_index()
    of_fold = {0: given} if whole and not folds else _folds(given, folds, list(counts.index))
    weights = {Run(task, modality, arm, k): of for k, of in of_fold.items()}
    about = {run: _about(p, run, of, cohort, whole) for run, of in weights.items()}
    known = len(set().union(*(_trained_on(one, cohort, run.fold) for run in weights for one in weights[run])))
    todo = [run for run in weights if not _there(folder_of(p, run), about[run])]
    total = sum(len(weights[run]) * counts[run.fold] for run in todo)
    with tqdm(desc="scoring", total=total, unit="scan", delay=2) as bar:
        for run in todo:
            _test(p, run, weights[run], cohort, about[run], bar)
    tested = pd.concat([pd.read_parquet(folder_of(p, run) / "predictions.parquet") for run in weights])
    table = metrics.by_fold(tested).query("center == 'global'")[["fold", "n", "positives", "acc", "auc"]]
    said = {
        "the training cases of bare files are unknown: check that no tested case is among them": (
            not given[0].arm
        ),
        f"{len(weights)} of {len(counts)} folds: means are over these": len(weights) < len(counts),
        f"{known} tested cases have the names of training cases: no test, unless they are other scans": known,
    }
    remarks = tuple(text for text, applies in said.items() if applies)
    files = [", ".join(str(one.weights) for one in of) for of in weights.values()]
    return Scored(p.folder / "runs" / task / modality / arm, table.assign(weights=files), remarks)


def _modality(p: Params, given: list[Trained], asked: str | None) -> str:
    """The modality of the weights. Raises PredictError for weights of several kinds or another modality."""
    kinds = {f"{one.task}, {one.network}, {one.modality}, {one.arm}, {one.how}" for one in given}
    if len(kinds) > 1:
        raise PredictError(f"weights of several kinds: {'; '.join(sorted(kinds))}; score each separately")
    of, only = given[0].modality, p.modalities[0] if len(p.modalities) == 1 else None
    modality = asked or of or only
    own = [name for name in p.modalities if not fusion(name)[1]]  # weights take one scan
    if modality not in own or of not in (None, modality):
        text = f"{given[0].weights} is of modality {of or 'unknown'}, asked for is {asked or 'none'}"
        raise PredictError(f"{text}; give `--modality`, one of the profile's: {', '.join(own)}")
    return modality


def _arm(p: Params, one: Trained, asked: str | None) -> str:
    """The name of the arm to write."""
    if one.arm and is_personal(one.arm):
        raise PredictError(f"{one.weights} is of {one.arm}; score an arm with one model for all centers")
    arm = asked or (f"scored_{one.arm}" if one.arm else "released")
    taken = *(p.multiclass_models if one.task == "multiclass" else p.arms), *REFERENCES, LOCAL_ONLY
    if arm in taken or not re.fullmatch(params.PLAIN, arm):
        text = f"arm {arm!r} is trained by the profile, is a reference, or is no plain name"
        raise PredictError(f"{text}; give another with `--arm`, such as released_fedavg")
    return arm


def _folds(given: list[Trained], asked: Sequence[int] | None, known: list[int]) -> dict[int, list[Trained]]:
    """Return the weights that test each fold."""
    in_name = [re.fullmatch(r"fold(\d+)", one.weights.parent.name) for one in given]
    own = [one.fold for one in given] if given[0].arm else [int(name[1]) for name in in_name if name]
    if not (asked or len(own) == len(given) or (not own and len(given) == len(known))):
        text = f"{len(given)} weights, {len(own)} of them in a folder fold<k>"
        raise PredictError(f"{text}; say with `--folds` which fold each file tests")
    own = own or list(range(len(given)))
    folds = list(asked or own)
    of = dict(zip(folds, given, strict=False))
    if not len(of) == len(folds) == len(given) or {*of} - {*known} or (given[0].arm and folds != own):
        text = f"{len(given)} weights for the folds {folds}; the cohort has the folds {known}"
        raise PredictError(f"{text}; give each file its own fold with `--folds`; runs keep theirs")
    return {k: [of[k]] for k in sorted(of)}


def _cohort(p: Params, one: Trained, modality: str, whole: bool) -> Cohort:
    """The cases of a modality, preprocessed for the weights, each with its `fold`."""
    names = data.open_cohort(p).names(one.task)
    if names != one.classes if one.arm else len(names) != len(one.classes):
        text = f"{one.weights} tells {', '.join(one.classes)} apart, this cohort has {', '.join(names)}"
        raise PredictError(f"{text}; score it on a cohort with its classes, or set `classes` and `positive`")
    cohort = data.load_cohort(params.validate({**p.model_dump(), **asdict(one.how)}, "the weights"))
    fold = 0 if whole else data.assign_folds(cohort, p.folds(one.task), p.fold_rule, one.task)
    return replace(cohort, scans=cohort.scans.assign(fold=fold)).of(modality)


def _about(p: Params, run: Run, of: list[Trained], cohort: Cohort, whole: bool) -> dict:
    """The content of a run's `run.json`."""
    folds, rule = (1, None) if whole else (p.folds(run.task), p.fold_rule)
    settings = asdict(run) | {"model": of[0].network, "folds": folds, "fold_rule": rule}
    settings |= {"max_per_cell": p.max_per_cell, **asdict(of[0].how)}
    about = {"settings": settings, "data": cohort.key, "cohort": cohort.name, "trained_here": False}
    about |= {"classes": cohort.names(run.task), "centers": cohort.centers, "weights": []}
    for one in of:
        known = "see its splits.csv" if one.arm else "unknown"
        file = {"file": str(one.weights), "sha256": digest(one.weights), "trained_on": known}
        about["weights"].append(file)
    return about


def _trained_on(one: Trained, cohort: Cohort, fold: int) -> set[str]:
    """The cases of a fold with the name of a training case. Raises PredictError if the data are the same."""
    known = roles(one).query("role != 'test'")["case"]
    tested = cohort.scans.loc[cohort.scans["fold"] == fold, "case_id"]
    both = tested[tested.map(hashed).isin(known)]
    if len(both) and one.data == cohort.key:
        text = f"{one.weights} was trained on {len(both)} of the cases that it would test, such as"
        raise PredictError(f"{text} {both.iloc[0]}; score it on its own test fold, or on another cohort")
    return set(both)


def _there(folder: Path, about: dict) -> bool:
    """Whether these weights were already scored. Raises PredictError for an arm with other weights."""
    for path in folder.parent.glob("fold*/run.json"):
        mine, theirs = (
            ({**of["settings"], "fold": None}, of["data"], [w["sha256"] for w in of.get("weights", ())])
            for of in (about, json.loads(path.read_text()))
        )
        if mine[:2] != theirs[:2] or (path.parent == folder and mine != theirs):
            text = f"{path.parent} was made with other weights, settings or data"
            raise PredictError(f"{text}; delete {folder.parent}, or give another name with `--arm`")
    return (folder / "run.json").exists()


def _test(p: Params, run: Run, of: list[Trained], cohort: Cohort, about: dict, bar: tqdm) -> None:
    """Write a run: the mean over networks, with one network in memory at a time."""
    started, device = time.perf_counter(), federated.device_of(p)
    test = (cohort.scans["fold"] == run.fold).to_numpy()
    total = 0.0
    for one in of:
        cubes = (cohort.cubes[i] for i in np.flatnonzero(test))
        total += np.stack(probabilities_of(one, cubes, device, bar))
    scans, folder = cohort.scans.assign(role=np.where(test, "test", "not tested")), folder_of(p, run)
    folder.mkdir(parents=True, exist_ok=True)
    frame = predictions_of(metrics.AS_GIVEN, total / len(of), run, 0, scans[test])
    store.write_table(folder / "predictions.parquet", frame.drop(columns="role"))
    store.seal(folder, about, scans, time.perf_counter() - started, device)
