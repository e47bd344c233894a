"""A run is arm x modality x fold: the grid, one run trained and tested each epoch, resume, workers."""

from __future__ import annotations

import contextlib
import multiprocessing
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from tqdm import tqdm

from ipmn_core import federated, metrics, models
from ipmn_core.data import Cubes, assign_folds, inner_validation
from ipmn_core.federated import machine, training
from ipmn_core.names import CENTERS
from ipmn_core.params import Params
from ipmn_core.runs import records, spread

TASKS = ("three_class", "binary")
LOCAL_ONLY = "local_only"  # every center trains alone
PER_ROUND = ("clients_per_round", "clip_norm", "noise_multiplier")  # settings of a federated round


@dataclass(frozen=True)
class Run:
    """One cell of the grid: which task, modality, arm and fold is tested."""

    task: str
    modality: str
    arm: str
    fold: int


def grid(p: Params, task: str) -> list[Run]:
    """All runs of a task: models x modalities x folds, or arms x modalities x folds.

    Raises ValueError naming an unknown task, model or arm.
    """
    if task not in TASKS:
        raise ValueError(f"{task}: unknown task; known are {', '.join(TASKS)}")
    arms = p.three_class_models if task == "three_class" else p.arms
    for name in {*p.three_class_models, *p.epochs_by_model, p.binary_model} - set(models.MODELS):
        raise ValueError(f"{name}: unknown model; known are {', '.join(models.MODELS)}")
    for arm in set(p.arms) - {"centralized", LOCAL_ONLY}:
        federated.strategy(arm)
    # arms innermost: workers then seldom train the largest model at the same time, which bounds memory
    return [Run(task, m, arm, k) for m in p.modalities for k in range(p.folds(task)) for arm in arms]


def named(run: Run) -> str:
    """A run as people read it: `binary t2 fedavg fold 0`."""
    return f"{run.task} {run.modality} {run.arm} fold {run.fold}"


def folder_of(p: Params, run: Run) -> Path:
    """Where a run lies: `<outputs>/<profile>/runs/<task>/<modality>/<arm>/fold<k>`."""
    return p.folder / "runs" / run.task / run.modality / run.arm / f"fold{run.fold}"


def settings_of(p: Params, run: Run) -> dict[str, Any]:
    """Everything that a run's result depends on, as plain values for `run.json`: protocol and machine."""
    device, protocol = machine.device_of(p), protocol_of(p, run)
    of_machine = {
        "device": device.type,
        "bfloat16": machine.uses_bfloat16(p, device, protocol["model"]),
        "channels_last": device.type == "cuda" or protocol["model"] in models.CHANNELS_LAST,
    }
    return {**protocol, **of_machine}


def protocol_of(p: Params, run: Run) -> dict[str, Any]:
    """What of the profile a run's result depends on, whatever machine trains it."""
    model = run.arm if run.task == "three_class" else p.binary_model
    if run.arm == LOCAL_ONLY:
        length = {"epochs": p.rounds * p.local_epochs, "local_epochs": 1, "mu": None}
    elif run.task == "binary" and run.arm != "centralized":
        of_profile = {field: getattr(p, field) for field in PER_ROUND}
        strategy = asdict(federated.strategy(run.arm, **of_profile))
        length = {"epochs": p.rounds, "local_epochs": p.local_epochs, **strategy}
    else:
        own = p.epochs_by_model if run.task == "three_class" else {}
        length = {"epochs": own.get(model, p.epochs), "local_epochs": 1, "mu": None}
    return {
        **asdict(run),
        "model": model,
        "folds": p.folds(run.task),
        "fold_rule": p.fold_rule,
        "inner_validation": p.inner_validation,
        "max_per_cell": p.max_per_cell,
        "size": p.size,
        **length,
        "batch_size": p.batch_size,
        "batches_per_epoch": p.batches_per_epoch,
        "lr": p.lr,
        "weight_decay": p.weight_decay,
        "lr_step": p.lr_step,
        "lr_gamma": p.lr_gamma,
        "augment_prob": p.augment_prob,
        "seed": p.seed,
        "threads": p.threads,
    }


def run_grid(p: Params, task: str, scans: pd.DataFrame, cubes: Cubes) -> pd.DataFrame:
    """The predictions of all runs of `task`, after training those that are not on disk yet (`train`)."""
    train(p, [task], scans, cubes)
    return predictions(p, task)


def train(p: Params, tasks: Sequence[str], scans: pd.DataFrame, cubes: Cubes) -> None:
    """Trains the runs of `tasks` not on disk yet, `p.jobs` at a time; `scans` and `cubes` row by row.

    The result is that of one at a time if `p.threads` is set. Raises StaleRunError before any training if a
    run on disk, finished or not, was made with other settings or data, RunsFailedError after all others.
    """
    key, calls, folders = records.data_key(scans, cubes), [], []
    for task in tasks:
        folds = assign_folds(scans, p.folds(task), p.fold_rule, binary=task == "binary")
        for run in grid(p, task):
            if not records.finished(folder_of(p, run), settings_of(p, run), key):
                calls.append((named(run), execute, (p, run, scans, folds, cubes)))
                folders.append(folder_of(p, run))
    done = lambda: sum(records.share_done(folder) for folder in folders)  # noqa: E731
    spread.over_workers(calls, p.jobs, p.backend, done, f"training {', '.join(tasks)}")


def execute(p: Params, run: Run, scans: pd.DataFrame, folds: pd.Series, cubes: Cubes) -> Path:
    """The folder of `run`, trained, tested each epoch and written; resumed if it was interrupted.

    Writes `predictions.parquet`, `history.csv`, `splits.csv` (which case was trained on, held out for inner
    validation, tested), `model.pt` (the epoch with the highest global AUC on the test fold, the paper's rule)
    and, last, `run.json`; with an inner validation split also its `validation.parquet`, for a federated arm
    `updates.csv`, the inner products of the clients' updates, and `left_out.csv` if a client was left out of
    a round. Each appears whole or not at all.
    """
    n_gpus = 0 if p.device != "auto" or p.jobs == 1 else torch.cuda.device_count()
    with spread.own_gpu(n_gpus) if n_gpus > 1 else contextlib.nullcontext() as gpu:
        if gpu is not None:
            p = p.model_copy(update={"device": f"cuda:{gpu}"})
        folder = _train(p, run, scans, folds, cubes)
    if multiprocessing.parent_process() is None:  # otherwise this process ends with its memory
        machine.release_memory()
    return folder


def _train(p: Params, run: Run, scans: pd.DataFrame, folds: pd.Series, cubes: Cubes) -> Path:
    started = time.perf_counter()
    machine.prepare(p.threads)
    record = {"settings": settings_of(p, run), "data": records.data_key(scans, cubes)}
    record["cohort"] = Path(p.data).name
    mine = (scans["modality"] == run.modality).to_numpy()
    rows = with_roles(scans[mine], folds[mine] == run.fold, p, run)
    epochs = lambda learning: _epochs(p, run, record["settings"], rows, cubes.array[mine], learning)  # noqa: E731
    return keep(p, run, record, rows, epochs, started)


def keep(
    p: Params,
    run: Run,
    record: dict[str, Any],
    rows: pd.DataFrame,
    epochs: Callable[[Any], Iterator[tuple[training.Epoch, torch.nn.Module]]],
    started: float,
) -> Path:
    """The folder of `run`, after its epochs were noted one by one, checkpoints kept, and all was written.

    `epochs` is called with the learning state of the last checkpoint, or None, and goes on from there. `rows`
    are the cases with their `role`; those held out in the order in which an Epoch's probabilities follow.
    """
    folder = folder_of(p, run)
    folder.mkdir(parents=True, exist_ok=True)
    held_out = held_out_of(rows)
    progress, learning = records.load_checkpoint(folder)
    last_save = time.perf_counter()
    for epoch, model in epochs(learning):
        auc = _note(progress, epoch, run, p.seed, held_out)
        for client, reason in epoch.left_out.items():
            tqdm.write(f"{named(run)}, round {epoch.number}: {client} left out: {reason}", file=sys.stderr)
        records.note_share(folder, epoch.number / record["settings"]["epochs"])
        untested = epoch.prob is None and not epoch.centers
        if not untested and not auc <= progress["best_auc"]:  # undefined: the last, as `metrics.select` takes
            progress["best_auc"] = auc
            records.save_model(folder, model)
        if time.perf_counter() - last_save >= p.checkpoint_seconds:
            progress["seconds"] += time.perf_counter() - started
            started = last_save = time.perf_counter()
            records.save_checkpoint(folder, record, progress, epoch.checkpoint())
    progress["seconds"] += time.perf_counter() - started
    records.write(folder, record, progress, rows, machine.device_of(p))
    return folder


def with_roles(scans: pd.DataFrame, is_test: pd.Series, p: Params, run: Run) -> pd.DataFrame:
    """The scans, indexed by their place in the cubes, each with its `role`: test, validation or train."""
    rows = scans.reset_index(drop=True).assign(role=np.where(is_test, "test", "train"))
    drawn = inner_validation(rows[rows["role"] == "train"], p.inner_validation, (p.seed, run.fold))
    rows.loc[drawn, "role"] = "validation"
    return rows


def held_out_of(rows: pd.DataFrame) -> pd.DataFrame:
    """The cases not trained on, center by center: the order in which every arm predicts them."""
    held_out = rows[rows["role"] != "train"]
    return held_out.sort_values("center", key=lambda c: c.map(CENTERS.index), kind="stable")


def _epochs(
    p: Params, run: Run, settings: dict[str, Any], rows: pd.DataFrame, array: np.ndarray, learning: Any
) -> Iterator[tuple[training.Epoch, torch.nn.Module]]:
    device, protocol = machine.device_of(p), steps_of(settings)
    data = cases_of(rows, array, run.task, device)
    train, test = indices(rows[rows["role"] == "train"]), indices(held_out_of(rows))
    build = lambda: build_of(settings)  # noqa: E731
    if run.arm == "centralized" or run.task == "three_class":
        model = placed(build(), device, protocol)
        train = torch.cat(list(train.values())).sort().values
        epochs = training.fit(model, train, torch.cat(list(test.values())), data, protocol, learning)
    elif run.arm == LOCAL_ONLY:
        model = placed(torch.nn.ModuleDict({center: build() for center in train}), device, protocol)
        epochs = federated.fit_local_only(model, train, test, data, protocol, learning)
    else:
        model = placed(build(), device, protocol)
        strategy = strategy_of(settings)
        epochs = federated.fit(model, train, list(test.values()), data, protocol, strategy, learning)
    for epoch in epochs:
        yield epoch, model


def strategy_of(settings: dict[str, Any]) -> federated.Strategy:
    """The strategy among the settings of a federated run (`protocol_of`)."""
    return federated.Strategy(**{field.name: settings[field.name] for field in fields(federated.Strategy)})


def steps_of(settings: dict[str, Any]) -> training.Settings:
    """What of a run's settings (`settings_of`) reaches a step of training."""
    names = [field.name for field in fields(training.Settings) if field.name != "seed"]
    return training.Settings(
        **{name: settings[name] for name in names}, seed=(settings["seed"], settings["fold"])
    )


def build_of(settings: dict[str, Any]) -> torch.nn.Module:
    """The untrained network of a run's settings."""
    return models.build(settings["model"], 2 if settings["task"] == "binary" else 3, settings["seed"])


def cases_of(rows: pd.DataFrame, array: np.ndarray, task: str, device: torch.device) -> training.Cases:
    """Cubes (N, S, S, S) of `rows` and their targets, on `device`."""
    y = targets(rows["label"].to_numpy(), task)
    return training.Cases(torch.tensor(array).unsqueeze(1).to(device), torch.tensor(y, device=device))


def indices(rows: pd.DataFrame) -> dict[str, torch.Tensor]:
    """Places in the cubes of each center's rows, the centers in their usual order."""
    places = rows.groupby("center").groups
    return {c: torch.tensor(places[c].to_numpy()) for c in CENTERS if c in places}


def placed(model: torch.nn.Module, device: torch.device, settings: training.Settings) -> torch.nn.Module:
    model = model.to(device)
    return model.to(memory_format=torch.channels_last_3d) if settings.channels_last else model


def targets(labels: np.ndarray, task: str) -> np.ndarray:
    """Class indices (N,) int64: the three risks, or high risk (1) against the rest (0)."""
    return (labels == 2).astype(np.int64) if task == "binary" else labels.astype(np.int64)


def _note(progress: dict, epoch: training.Epoch, run: Run, seed: int, held_out: pd.DataFrame) -> float:
    """The global AUC of an epoch on the test fold, after adding what the epoch left to `progress`."""
    acc = auc = float("nan")
    if epoch.prob is not None:
        frame = frame_of(epoch.number, epoch.prob, run, seed, held_out)
        progress["frames"].append(frame)
        test = (held_out["role"] == "test").to_numpy()
        y = frame["y_true"].to_numpy()
        acc, auc = metrics.accuracy(y[test], epoch.prob[test]), metrics.auc(y[test], epoch.prob[test])
    elif epoch.centers:
        _, n, accs, _ = zip(*epoch.centers, strict=True)
        acc = float(np.average(accs, weights=n))
    progress["centers"] += [(epoch.number, *center) for center in epoch.centers]
    progress["history"].append((epoch.number, epoch.loss, acc, auc))
    if epoch.inner_products is not None:
        progress["inner_products"].append(epoch.inner_products.tolist())
    progress["left_out"] += [(epoch.number, *fault) for fault in epoch.left_out.items()]
    return auc


def frame_of(number: int, prob: np.ndarray, run: Run, seed: int, held_out: pd.DataFrame) -> pd.DataFrame:
    """The rows of `predictions.parquet` of one epoch, with the `role` of each case of `held_out`."""
    frame = held_out[["role", "case_id", "center", "modality"]].assign(
        task=run.task,
        arm=run.arm,
        fold=run.fold,
        seed=seed,
        epoch=number,
        y_true=targets(held_out["label"].to_numpy(), run.task),
    )
    return frame.assign(**{f"prob_{k}": prob[:, k] for k in range(prob.shape[1])})


def predictions(p: Params, task: str) -> pd.DataFrame:
    """The test predictions of all runs of a task, one row a case and epoch, checked (`metrics.check`).

    Raises FileNotFoundError naming the first run that is not finished, PredictionsError naming a bad row.
    """
    frames = [records.read_predictions(*_wanted(p, run)) for run in grid(p, task)]
    return metrics.check(pd.concat(frames, ignore_index=True), source=f"{p.folder / 'runs' / task}, all runs")


def finished_predictions(p: Params) -> tuple[pd.DataFrame, pd.DataFrame]:
    """`predictions` and `validation` of every task whose runs are all finished, one under the other.

    Raises FileNotFoundError if no task is finished.
    """
    tested, inner = [], []
    for task in TASKS:
        with contextlib.suppress(FileNotFoundError):
            of_task = predictions(p, task), validation(p, task)
            tested.append(of_task[0])
            inner.append(of_task[1])
    if not tested:
        raise FileNotFoundError(f"{p.folder / 'runs'}: no task is finished; run chapter 2 or 3 first")
    return pd.concat(tested, ignore_index=True), pd.concat(inner, ignore_index=True)


def validation(p: Params, task: str) -> pd.DataFrame:
    """The predictions of the inner validation cases, in the form of `predictions`; empty without a split."""
    if not p.inner_validation:
        return pd.DataFrame(columns=metrics.COLUMNS)
    frames = [records.read_predictions(*_wanted(p, run), "validation") for run in grid(p, task)]
    return pd.concat(frames, ignore_index=True)


def updates(p: Params) -> pd.DataFrame:
    """Inner products of the clients' updates in every round of all federated runs: columns modality, arm,
    fold, round, client, other, inner_product. Raises FileNotFoundError naming a run that is not finished.
    """
    federated_runs = [run for run in grid(p, "binary") if run.arm in federated.STRATEGIES]
    frames = [
        pd.read_csv(records.whole(*_wanted(p, run)) / "updates.csv").assign(**asdict(run))
        for run in federated_runs
    ]
    columns = ["modality", "arm", "fold", "round", "client", "other", "inner_product"]
    return pd.concat(frames, ignore_index=True)[columns] if frames else pd.DataFrame(columns=columns)


def left_out(p: Params) -> pd.DataFrame:
    """Clients that were left out of a round, with the reason: columns modality, arm, fold, round, client,
    reason. Raises FileNotFoundError naming a run that is not finished.
    """
    frames = [pd.DataFrame(columns=["modality", "arm", "fold", "round", "client", "reason"])]
    for run in grid(p, "binary"):
        path = records.whole(*_wanted(p, run)) / "left_out.csv"
        if path.exists():
            frames.append(pd.read_csv(path).assign(modality=run.modality, arm=run.arm, fold=run.fold))
    return pd.concat(frames[1:] or frames, ignore_index=True)[frames[0].columns]


def histories(p: Params, task: str) -> pd.DataFrame:
    """Training loss, test accuracy and test AUC of every epoch of all runs of a task.

    Raises FileNotFoundError naming the first run that is not finished.
    """
    frames = [
        pd.read_csv(records.whole(*_wanted(p, run)) / "history.csv").assign(**asdict(run))
        for run in grid(p, task)
    ]
    return pd.concat(frames, ignore_index=True)


def _wanted(p: Params, run: Run) -> tuple[Path, dict[str, Any]]:
    return folder_of(p, run), protocol_of(p, run)
