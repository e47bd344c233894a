"""One run from split to result: build, train, test after each epoch, record, write."""

from __future__ import annotations

import itertools
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from fnmatch import fnmatch
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from tqdm import tqdm

from ipmn_core import data, federated, metrics, models
from ipmn_core.data import Cohort
from ipmn_core.federated import Cases, Epoch, strategies
from ipmn_core.names import fusion
from ipmn_core.params import Params
from ipmn_core.runs import store
from ipmn_core.runs.grid import (
    LOCAL_ONLY,
    Run,
    RunSettings,
    folder_of,
    named,
    on_this_machine,
    run_settings,
    shown,
)
from ipmn_core.runs.store import Progress

CHECKPOINT_SHARE = 0.05  # of a run's time, at most, goes into checkpoints


def execute(p: Params, run: Run, cohort: Cohort) -> Path:
    """Train a run, test it after each epoch and write it; resume it if it was interrupted.

    Returns its folder with `predictions.parquet`, `history.csv`, `splits.csv` (the role of each case) and,
    written last, `run.json`. If the profile keeps it, `model.pt` has the weights of the epoch with the
    highest global AUC on the test fold, the paper's rule. Where they apply, there are also
    `validation.parquet`, `updates.csv`, `left_out.csv` and `cross.parquet`.
    """
    federated.prepare(p.threads)
    settings = on_this_machine(p, run_settings(p, run))
    cases = with_roles(cohort, settings)
    progress = store.resume(folder_of(p, run))
    clients = list(indices(cases.scans, "train"))
    model = build(settings, federated.device_of(p), len(cohort.names(run.task)), clients)
    epochs = learn(model, cases, settings, progress)
    folder = record(p, run, settings, cases, model, epochs, progress)
    federated.release_memory()
    return folder


def with_roles(cohort: Cohort, settings: RunSettings) -> Cohort:
    """The cases of the run's modality, each with its `role` in the run: test, validation or train.

    Folds are those of the whole cohort, because the rule "patient" uses both modalities.
    """
    fold = data.assign_folds(cohort, settings.folds, settings.fold_rule, settings.task)
    tested = cohort.scans.assign(role=np.where(fold == settings.fold, "test", "train"))
    cohort = replace(cohort, scans=tested).of(settings.modality)
    trained = cohort.scans[cohort.scans["role"] == "train"]
    held_out = data.inner_validation(trained, settings.inner_validation, settings.seed)
    cohort.scans.loc[held_out, "role"] = "validation"
    return cohort


def build(
    settings: RunSettings, device: torch.device, n_classes: int, clients: Sequence[str]
) -> torch.nn.Module:
    """The untrained network of a run on its device; for `local_only` one per client, with equal weights."""
    make = partial(models.build, settings.model, n_classes, settings.seed[0], fusion(settings.modality)[1])
    local = settings.arm == LOCAL_ONLY
    model = torch.nn.ModuleList([make() for _ in clients]) if local else make()
    for layer in strategies.batch_norms(model).values():
        layer.momentum = settings.batch_norm_momentum or layer.momentum
    model = model.to(device)
    return model.to(memory_format=torch.channels_last_3d) if settings.channels_last else model


def learn(
    model: torch.nn.Module, cases: Cohort, settings: RunSettings, progress: Progress
) -> Iterator[Epoch]:
    """The remaining epochs of a run; each leaves its weights in `model`."""
    device = next(model.parameters()).device
    y = data.targets(cases.scans, settings.task).to_numpy()
    x = torch.tensor(cases.cubes)
    x = x if x.ndim == 5 else x.unsqueeze(1)  # (N, C, S, S, S): fused modalities have two channels
    tensors = Cases(x.to(device), torch.tensor(y, device=device))
    train, held_out = indices(cases.scans, "train"), indices(cases.scans, "test", "validation")
    if settings.strategy:
        fit = federated.fit_federated if settings.strategy.finetune is None else federated.fit_finetuned
        fit = partial(fit, strategy=settings.strategy)
    else:
        fit = federated.fit_local_only if settings.arm == LOCAL_ONLY else federated.fit_centralized
    return fit(model, train, held_out, tensors, settings, checkpoint=progress.learning)


def record(
    p: Params,
    run: Run,
    settings: RunSettings,
    cases: Cohort,
    model: torch.nn.Module,
    epochs: Iterator[Epoch],
    progress: Progress,
) -> Path:
    """Record each epoch, keep the best weights, save checkpoints, write the run; return its folder.

    `cases` have their `role`. An Epoch's probabilities are of the cases not trained on, center by center.
    """
    folder = folder_of(p, run)
    folder.mkdir(parents=True, exist_ok=True)
    place = folder.relative_to(p.folder / "runs").as_posix()
    keeps = run in shown(p) or any(fnmatch(place, pattern) for pattern in p.keep_models)
    about = {"settings": settings.record(), "data": cases.key, "cohort": cases.name}
    about |= {"classes": cases.names(run.task), "centers": list(indices(cases.scans, "train"))}
    tested = cases.scans.loc[np.concatenate(list(indices(cases.scans, "test", "validation").values()))]
    saved = time.perf_counter()
    started, cost = saved - progress.seconds, 0.0  # cost: seconds that the last checkpoint took
    for epoch in epochs:
        note(progress, epoch, settings, tested)
        for client, reason in epoch.left_out.items():
            tqdm.write(f"{named(run)}, round {epoch.number}: {client} left out: {reason}", file=sys.stderr)
        if epoch.cross is not None:  # in the last epoch, after which no checkpoint follows
            store.write_table(folder / "cross.parquet", cross_of(epoch, settings, tested))
        (folder / "share_done").write_text(f"{epoch.number / settings.epochs}")
        judged = [(number, acc, auc) for number, _, acc, auc in progress.history if acc == acc]
        elsewhere = settings.strategy and settings.strategy.personal and not epoch.own  # at the sites
        if keeps and not elsewhere and metrics.best_epoch(judged) == epoch.number:
            store.save_model(folder, model, epoch.own)
        now = time.perf_counter()
        progress.seconds = now - started
        pause = max(p.checkpoint_seconds, cost / CHECKPOINT_SHARE) if p.checkpoint_seconds else 0.0
        if now - saved >= pause and epoch.number < settings.epochs:
            store.save_checkpoint(folder, about, progress, federated.checkpoint_of(model, epoch))
            saved = time.perf_counter()
            cost = saved - now
    store.write(folder, about, progress, cases.scans, federated.device_of(p))
    return folder


def indices(scans: pd.DataFrame, *roles: str) -> dict[str, torch.Tensor]:
    """Positions in the cubes of each center's cases with these roles; centers in the order of `scans`."""
    places = scans[scans["role"].isin(roles)].groupby("center").groups
    order = scans["center"].unique()
    return {center: torch.tensor(places[center].to_numpy()) for center in order if center in places}


def note(progress: Progress, epoch: Epoch, settings: RunSettings, tested: pd.DataFrame) -> None:
    """Add an epoch to `progress` with its global ACC and AUC on the test fold; NaN if it was not tested."""
    number, acc, auc = epoch.number, float("nan"), float("nan")
    if epoch.prob is not None:
        frame = predictions_of(number, epoch.prob, settings, settings.seed[0], tested)
        progress.frames.append(frame)
        test = (tested["role"] == "test").to_numpy()
        y, prob = frame.loc[test, "y_true"].to_numpy(), epoch.prob[test]
        acc, auc = metrics.accuracy(y, prob), metrics.auc(y, prob)
    elif epoch.centers:
        _, n, accs, _ = zip(*epoch.centers, strict=True)
        acc = float(np.average(accs, weights=n))
    progress.history.append((number, epoch.loss, acc, auc))
    progress.centers += [(number, *center) for center in epoch.centers]
    progress.left_out += [(number, *fault) for fault in epoch.left_out.items()]
    if epoch.inner_products is not None:
        pairs = itertools.product(epoch.learners, repeat=2)
        values = epoch.inner_products.ravel().tolist()
        progress.updates += [(number, *pair, value) for pair, value in zip(pairs, values, strict=True)]


def predictions_of(number: int, prob: np.ndarray, run: Run, seed: int, tested: pd.DataFrame) -> pd.DataFrame:
    """The rows of `predictions.parquet` of one epoch, with the `role` of each case in `tested`."""
    about = {"task": run.task, "arm": run.arm, "fold": run.fold, "seed": seed, "epoch": number}
    frame = tested[["role", "case_id", "center", "modality"]].assign(**about)
    frame["y_true"] = data.targets(tested, run.task)
    return frame.assign(**{f"prob_{k}": prob[:, k] for k in range(prob.shape[1])})


def cross_of(epoch: Epoch, settings: RunSettings, tested: pd.DataFrame) -> pd.DataFrame:
    """The rows of `cross.parquet`: predictions of each center's model, which `model_center` names."""
    how = settings, settings.seed[0], tested
    rows = [
        predictions_of(epoch.number, prob, *how).assign(model_center=center)
        for center, prob in zip(epoch.learners, epoch.cross, strict=True)
    ]
    rows = pd.concat(rows, ignore_index=True)
    return rows[rows["role"] == "test"].drop(columns="role")
