"""Use trained networks: predict new cases, or test them on a cohort. For research, not for clinical use."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from tqdm import tqdm

from ipmn_core import data, federated, metrics, params, runs
from ipmn_core.data import Cohort
from ipmn_core.data.cubes import in_threads
from ipmn_core.disk import digest
from ipmn_core.names import REFERENCES, fusion, is_personal
from ipmn_core.params import Params, Preprocessing
from ipmn_core.runs import Run, folder_of, store
from ipmn_core.runs.trained import (
    PredictError,
    Trained,
    find,
    hashed,
    in_words,
    load,
    probabilities_of,
    roles,
)

NOTICE = "Not for clinical use: a research model without external validation."
PIECE = 64  # scans whose cubes are in memory at a time


@dataclass(frozen=True)
class Prediction:
    """Probabilities of one case: `folds` has one row per network, columns model, weights (path), classes.

    `axes` are the scan's stored axes; `how` is its preprocessing.
    """

    case: str
    task: str
    folds: pd.DataFrame
    warnings: tuple[str, ...]
    axes: str
    how: Preprocessing


def predict(
    image: str | Path,
    mask: str | Path | None,
    folders: str | Path | Sequence[str | Path],
    center: str | None = None,
    **options: Any,
) -> Prediction:
    """Predict one scan, an `image` with the `mask` of its pancreas, or a clean ROI, as `predict_each` does.

    Raises ScanError if it cannot be used, and the errors of `predict_each`.
    """
    scan = data.case_name(Path(image).name), str(image), str(mask or ""), "", ""
    (result,) = predict_each(pd.DataFrame([scan], columns=data.UNLABELLED), folders, center, **options)
    if isinstance(result, ValueError):
        raise result
    return result


def predict_each(
    scans: pd.DataFrame,
    folders: str | Path | Sequence[str | Path],
    center: str | None = None,
    how: Preprocessing | None = None,
    device: str = "cpu",
    network: str | None = None,
) -> Iterator[Prediction | ValueError]:
    """Predict `scans` (see `data.unlabelled`) with the trained networks in `folders` (see `trained.find`).

    Yields for each scan, in order, its prediction in float32, or the error that says why it cannot be used.
    The bits do not depend on the other scans. Scans are preprocessed as the networks' runs say or, for bare
    weights of `network`, as `how` says (default: as in the paper). For an arm with one model per center,
    `center` says whose networks to use. One network is in memory at a time. Raises PredictError or
    ParamsError before it reads a scan.
    """
    settings = {"device": device, **asdict(how or Preprocessing())}
    where, trained = federated.device_of(params.validate(settings, "predict")), find(folders, how, network)
    _refuse_mixed(trained)
    for one in trained:
        load(one, center)
    of, used = trained[0], [(one.name, _roles(one, center)) for one in trained]
    names = pd.DataFrame([(one.name, str(one.weights)) for one in trained], columns=["model", "weights"])
    with tqdm(total=len(scans) * len(trained), desc="predicting", disable=len(scans) < 2) as bar:
        for start in range(0, len(scans), PIECE):
            piece = scans[data.UNLABELLED].iloc[start : start + PIECE]
            with federated.one_thread():  # so that bits do not depend on the other scans
                read = list(in_threads(-1, partial(_read, of), piece.to_numpy()))
            cubes = [usable[0] for usable in read if isinstance(usable, tuple)]
            bar.update((len(read) - len(cubes)) * len(trained))
            prob = zip(*[probabilities_of(one, cubes, where, bar, center) for one in trained], strict=True)
            for case, found in zip(piece["case_id"], read, strict=True):
                if not isinstance(found, tuple):
                    yield found
                    continue
                folds = names.join(pd.DataFrame(next(prob), columns=list(of.classes)))
                warnings = (*found[1], *_case_warnings(case, used))
                yield Prediction(case, of.task, folds, warnings, found[2], of.how)


def _read(of: Trained, case: str, image: str, mask: str, modality: str, error: str):
    """Cube (S, S, S), warnings and axes of a scan for the network `of`, or why it cannot be used."""
    if error:
        return ValueError(error)
    try:
        scan = data.read_scan(image, mask, case, of.how)
    except data.ScanError as unusable:
        return unusable
    warnings = [f"{Path(where).name}: {problem}; {remedy}" for _, where, problem, remedy in scan.remarks]
    if of.modality and modality.casefold() not in ("", of.modality.casefold()):
        warnings.append(f"its modality is {modality}, but the models' is {of.modality}")
    return data.to_cube(np.asanyarray(scan.roi.dataobj), of.how.size, of.how.intensity), warnings, scan.axes


def _refuse_mixed(trained: list[Trained]) -> None:
    kinds = {f"{one.task} ({', '.join(one.classes)}) {one.modality} {in_words(one.how)}" for one in trained}
    if len(kinds) > 1:
        raise PredictError(f"models of several kinds: {', '.join(sorted(kinds))}; use each separately")


def _roles(one: Trained, center: str | None) -> dict[str, str] | None:
    """{hashed case: role} in a run (with `center`, its cases only); None if unknown."""
    known = roles(one)
    mine = known[known["center"].eq(center) | (center is None)]
    return None if known.empty else dict(zip(mine["case"], mine["role"], strict=True))


def _case_warnings(case: str, used: list[tuple[str, dict[str, str] | None]]) -> list[str]:
    """A warning if the case, by its name, was or may have been one of the models' own cases."""
    known = [(name, of.get(hashed(case), "")) for name, of in used if of is not None]
    said = ", ".join(f"{name}: {role}" for name, role in known if role)
    warnings = [f"not an independent test: it was a case of these models ({said})"] if said else []
    text = "may not be an independent test: the models' training cases are unknown"
    return [*warnings, text] if len(known) < len(used) else warnings


def table(result: Prediction) -> pd.DataFrame:
    """One row per model, then `mean` and `std` (ddof = 0) over models; columns model and classes."""
    folds = result.folds.drop(columns="weights").set_index("model")
    over = pd.DataFrame({"mean": folds.mean(), "std": folds.std(ddof=0)}).T
    return pd.concat([folds, over]).rename_axis("model").reset_index()


def by_case(scans: pd.DataFrame, results: Iterable[Prediction | ValueError]) -> pd.DataFrame:
    """One row per scan: `case_id, image`, each class's mean and std over models, `warnings`, `error`.

    Columns of a class: `mean CLASS` and `std CLASS` (ddof = 0). `error` says why a scan cannot be used.
    """
    rows = []
    for scan, result in zip(scans.itertuples(), results, strict=True):
        row = {"case_id": scan.case_id, "image": scan.image, "warnings": "", "error": ""}
        if isinstance(result, Prediction):
            over = table(result).set_index("model").loc[["mean", "std"]]
            row |= {f"{of} {name}": over.loc[of, name] for of in over.index for name in over}
            row["warnings"] = " | ".join(result.warnings)
        else:
            row["error"] = str(result)
        rows.append(row)
    frame = pd.DataFrame(rows)
    return frame[[*frame.columns.drop(["warnings", "error"]), "warnings", "error"]]


@dataclass(frozen=True)
class Scored:
    """The folder of a scored arm, one row per fold (fold, n, positives, acc, auc, weights), and remarks."""

    arm: Path
    folds: pd.DataFrame
    remarks: list[str]


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
    The epoch is `metrics.AS_GIVEN`. Earlier scores are kept. Raises PredictError for weights that do not fit
    the profile or were trained on a case they would test, and for an arm on disk with other weights.
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
    of_runs = metrics.by_fold(tested).query("center == 'global'")[["fold", "n", "positives", "acc", "auc"]]
    bare = "the training cases of bare files are unknown: check that no tested case is among them"
    part = f"{len(weights)} of {len(counts)} folds: means are over these"
    again = f"{known} tested cases have the names of training cases: no test, unless they are other scans"
    applies = {bare: not given[0].arm, part: len(weights) < len(counts), again: known}
    remarks = [text for text, yes in applies.items() if yes]
    files = [", ".join(str(one.weights) for one in of) for of in weights.values()]
    return Scored(p.folder / "runs" / task / modality / arm, of_runs.assign(weights=files), remarks)


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
    taken = *(p.multiclass_models if one.task == "multiclass" else p.arms), *REFERENCES, runs.LOCAL_ONLY
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
    known = "see its splits.csv" if of[0].arm else "unknown"
    files = [{"file": str(w), "sha256": digest(w), "trained_on": known} for w in (one.weights for one in of)]
    return about | {"classes": cohort.names(run.task), "centers": cohort.centers, "weights": files}


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
    started, device, folder = time.perf_counter(), federated.device_of(p), folder_of(p, run)
    test = (cohort.scans["fold"] == run.fold).to_numpy()
    cubes = [cohort.cubes[i] for i in np.flatnonzero(test)]  # views
    total = sum(np.stack(probabilities_of(one, cubes, device, bar)) for one in of)
    scans = cohort.scans.assign(role=np.where(test, "test", "not tested"))
    folder.mkdir(parents=True, exist_ok=True)
    frame = runs.predictions_of(metrics.AS_GIVEN, total / len(of), run, 0, scans[test])
    store.write_table(folder / "predictions.parquet", frame.drop(columns="role"))
    store.seal(folder, about, scans, time.perf_counter() - started, device)
