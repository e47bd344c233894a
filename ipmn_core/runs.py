"""A run is arm x modality x fold: the grid, one run whole or absent on disk, resume, workers."""

from __future__ import annotations

import hashlib
import io
import json
import os
import platform
import time
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import joblib
import monai
import numpy as np
import pandas as pd
import torch
from tqdm import tqdm

from ipmn_core import cohort, federated, metrics, models, training
from ipmn_core.params import Params
from ipmn_core.preprocess import Cubes

TASKS = ("three_class", "binary")


class StaleRunError(RuntimeError):
    """A run on disk was made with other settings or data than those asked for."""


@dataclass(frozen=True)
class Run:
    """One cell of the grid: which task, modality, arm and fold is tested."""

    task: str
    modality: str
    arm: str
    fold: int

    @property
    def path(self) -> Path:
        """The run's folder below `runs/`."""
        return Path(self.task, self.modality, self.arm, f"fold{self.fold}")


def grid(p: Params, task: str) -> list[Run]:
    """All runs of a task: models x modalities x folds, or arms x modalities x folds.

    Raises ValueError naming an unknown task, model or arm.
    """
    if task not in TASKS:
        raise ValueError(f"{task}: unknown task; known are {', '.join(TASKS)}")
    arms, folds = (
        (p.three_class_models, p.three_class_folds) if task == "three_class" else (p.arms, p.binary_folds)
    )
    for name in {*p.three_class_models, *p.epochs_by_model, p.binary_model} - set(models.MODELS):
        raise ValueError(f"{name}: unknown model; known are {', '.join(models.MODELS)}")
    for arm in set(p.arms) - {"centralized"}:
        federated.strategy(arm)
    # arms innermost: workers then seldom train the largest model at the same time, which bounds memory
    return [Run(task, m, arm, k) for m in p.modalities for k in range(folds) for arm in arms]


def device_of(p: Params) -> torch.device:
    """The device asked for; `auto` is the first GPU if there is one. Raises ValueError for an absent GPU."""
    if p.device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if p.device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(
            f"device: {p.device} was asked for, but torch sees no GPU; set `device: auto` or `cpu`"
        )
    return torch.device(p.device)


def bfloat16_pays(device: torch.device) -> bool:
    """Whether bfloat16 autocast is faster than float32 there: a GPU that has it, or a CPU with AMX.

    AVX512-BF16 alone was measured not to pay for these networks, so only the matrix unit counts.
    """
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    probe = getattr(torch.cpu, "_is_amx_tile_supported", None)
    return bool(probe and probe())


def settings_of(p: Params, run: Run) -> dict[str, Any]:
    """Everything of the profile that a run's result depends on, as plain values for `run.json`."""
    device = device_of(p)
    model = run.arm if run.task == "three_class" else p.binary_model
    if run.task == "binary" and run.arm != "centralized":
        length = {"rounds": p.rounds, "local_epochs": p.local_epochs, "mu": federated.strategy(run.arm).mu}
    else:
        own = p.epochs_by_model if run.task == "three_class" else {}
        length = {"epochs": own.get(model, p.epochs), "mu": None}
    return {
        **asdict(run),
        "model": model,
        "folds": p.three_class_folds if run.task == "three_class" else p.binary_folds,
        "fold_rule": p.fold_rule,
        "max_per_cell": p.max_per_cell,
        "size": p.size,
        **length,
        "batch_size": p.batch_size,
        "lr": p.lr,
        "weight_decay": p.weight_decay,
        "lr_step": p.lr_step,
        "lr_gamma": p.lr_gamma,
        "augment_prob": p.augment_prob,
        "seed": p.seed,
        "device": device.type,
        "bfloat16": p.precision == "bfloat16" or (p.precision == "auto" and bfloat16_pays(device)),
        "channels_last": model not in models.CONTIGUOUS,
        "threads": p.threads,
    }


def run_grid(p: Params, task: str, scans: pd.DataFrame, cubes: Cubes) -> pd.DataFrame:
    """The predictions of all runs of `task`, after training those that are not on disk yet.

    `scans` and `cubes` row by row; `p.jobs` runs are trained at a time, with the same result as one.
    Raises StaleRunError before any training if a run on disk was made with other settings or data.
    """
    runs_root = p.folder / "runs"
    todo = [run for run in grid(p, task) if not finished(runs_root, run, settings_of(p, run), cubes.key)]
    folds = cohort.assign_folds(scans, *_fold_arguments(p, task))
    work = joblib.Parallel(n_jobs=min(p.jobs, max(len(todo), 1)), return_as="generator_unordered")(
        joblib.delayed(execute)(p, run, scans, folds, cubes) for run in todo
    )
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", message="A worker stopped"
        )  # joblib renews one that has grown large
        for _ in tqdm(work, f"training {task}", total=len(todo), unit="run", disable=not todo, mininterval=1):
            pass
    return predictions(p, task)


def _fold_arguments(p: Params, task: str) -> tuple[int, str, bool]:
    binary = task == "binary"
    return p.binary_folds if binary else p.three_class_folds, p.fold_rule, binary


def finished(runs_root: Path, run: Run, settings: dict[str, Any], data_key: str) -> bool:
    """Whether `run` is whole on disk. Raises StaleRunError, with the difference, if it is another's."""
    record = runs_root / run.path / "run.json"
    if not record.exists():
        return False
    _refuse_other(json.loads(record.read_text()), settings, data_key, record.parent)
    return True


def _refuse_other(record: dict[str, Any], settings: dict[str, Any], data_key: str, folder: Path) -> None:
    old, new = {**record["settings"], "data": record["data"]}, {**settings, "data": data_key}
    keys = [key for key in {**old, **new} if old.get(key) != new.get(key)]
    if keys:
        changes = "; ".join(f"{key}: {old.get(key)!r} on disk, {new.get(key)!r} now" for key in keys)
        raise StaleRunError(
            f"{folder} was made with other settings or data ({changes}). Give this profile another name, "
            "or start it afresh with `ipmn run --fresh`"
        )


def execute(p: Params, run: Run, scans: pd.DataFrame, folds: pd.Series, cubes: Cubes) -> Path:
    """The folder of `run`, trained, tested each epoch and written; resumed if it was interrupted.

    Writes `predictions.parquet`, `history.csv`, `model.pt` (the epoch with the highest global AUC on the
    test fold, the paper's rule) and, last, `run.json`; each appears whole or not at all.
    """
    started = time.perf_counter()
    if p.threads:
        torch.set_num_threads(p.threads)
    torch.set_flush_denormal(True)
    folder = p.folder / "runs" / run.path
    folder.mkdir(parents=True, exist_ok=True)
    settings = settings_of(p, run)
    saved = _load_checkpoint(folder, settings, cubes.key)
    mine = (scans["modality"] == run.modality).to_numpy()
    rows = scans[mine].assign(test=folds[mine] == run.fold)
    new = {"frames": [], "history": [], "best_auc": -1.0, "seconds": 0.0}
    progress = saved["progress"] if saved else new
    last_save = time.perf_counter()
    for epoch, model in _epochs(p, run, settings, rows, cubes.array[mine], saved and saved["learning"]):
        auc = _note(progress, epoch, run, p.seed, rows[rows["test"]])
        if auc > progress["best_auc"] or epoch.number == 1:
            progress["best_auc"] = auc
            write_atomically(folder / "model.pt", partial(torch.save, model.state_dict()))
        if time.perf_counter() - last_save >= p.checkpoint_seconds:
            progress["seconds"] += time.perf_counter() - started
            started = last_save = time.perf_counter()
            record = {"settings": settings, "data": cubes.key}
            _save(folder / "checkpoint.pt", {**record, "progress": progress, "learning": epoch.checkpoint()})
    seconds = progress["seconds"] + time.perf_counter() - started
    _write(folder, run, settings, cubes.key, progress, seconds)
    return folder


def _epochs(
    p: Params, run: Run, settings: dict[str, Any], rows: pd.DataFrame, array: np.ndarray, learning: Any
) -> Iterator[tuple[training.Epoch, torch.nn.Module]]:
    device = torch.device(p.device if p.device.startswith("cuda:") else settings["device"])
    names = [
        field for field in training.Settings.__dataclass_fields__ if field in settings and field != "seed"
    ]
    protocol = training.Settings(**{k: settings[k] for k in names}, seed=(p.seed, run.fold))
    y = targets(rows["label"].to_numpy(), run.task)
    data = training.Cases(torch.tensor(array).unsqueeze(1).to(device), torch.tensor(y, device=device))
    model = models.build(settings["model"], 2 if run.task == "binary" else 3, p.seed).to(device)
    if protocol.channels_last:
        model = model.to(memory_format=torch.channels_last_3d)
    is_test = rows["test"].to_numpy()
    train, test = (torch.from_numpy(np.flatnonzero(where)) for where in (~is_test, is_test))
    if settings["mu"] is None:
        epochs = training.fit(model, train, test, data, protocol, learning)
    else:
        centers = rows["center"].to_numpy()
        names = [c for c in cohort.CENTERS if c in set(centers)]
        clients = {c: train[torch.from_numpy(centers[~is_test] == c)] for c in names}
        epochs = federated.fit(model, clients, test, data, protocol, federated.strategy(run.arm), learning)
    for epoch in epochs:
        yield epoch, model


def targets(labels: np.ndarray, task: str) -> np.ndarray:
    """Class indices (N,) int64: the three risks, or high risk (1) against the rest (0)."""
    return (labels == 2).astype(np.int64) if task == "binary" else labels.astype(np.int64)


def _note(progress: dict, epoch: training.Epoch, run: Run, seed: int, test: pd.DataFrame) -> float:
    """The global AUC of an epoch on the test fold, after adding its predictions and history to `progress`."""
    y = targets(test["label"].to_numpy(), run.task)
    frame = test[["case_id", "center", "modality"]].assign(
        task=run.task, arm=run.arm, fold=run.fold, seed=seed, epoch=epoch.number, y_true=y
    )
    for k in range(epoch.prob.shape[1]):
        frame[f"prob_{k}"] = epoch.prob[:, k]
    auc = metrics.auc(y, epoch.prob)
    progress["frames"].append(frame)
    progress["history"].append((epoch.number, epoch.loss, metrics.accuracy(y, epoch.prob), auc))
    return auc


def _load_checkpoint(folder: Path, settings: dict[str, Any], data_key: str) -> dict[str, Any] | None:
    path = folder / "checkpoint.pt"
    if not path.exists():
        return None
    saved = torch.load(path, map_location="cpu", weights_only=True)
    _refuse_other(saved, settings, data_key, folder)
    frames = pd.read_parquet(io.BytesIO(saved["progress"].pop("frames")))
    saved["progress"]["frames"] = [frames]
    return saved


def _save(path: Path, content: dict[str, Any]) -> None:
    """Writes a checkpoint of tensors and plain values, so that it loads without unpickling code."""
    frames = pd.concat(content["progress"]["frames"]).to_parquet()
    write_atomically(
        path, lambda tmp: torch.save({**content, "progress": {**content["progress"], "frames": frames}}, tmp)
    )


def _write(
    folder: Path, run: Run, settings: dict[str, Any], data_key: str, progress: dict, seconds: float
) -> None:
    history = pd.DataFrame(progress["history"], columns=["epoch", "loss", "test_acc", "test_auc"])
    predictions = pd.concat(progress["frames"], ignore_index=True)
    record = {
        "settings": settings,
        "settings_hash": hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest(),
        "data": data_key,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "monai": monai.__version__,
        },
        "device": torch.cuda.get_device_name()
        if settings["device"] == "cuda"
        else platform.processor() or "cpu",
        "seconds": round(seconds, 2),
    }
    write_atomically(folder / "predictions.parquet", lambda tmp: predictions.to_parquet(tmp, index=False))
    write_atomically(folder / "history.csv", lambda tmp: history.to_csv(tmp, index=False))
    write_atomically(folder / "run.json", lambda tmp: tmp.write_text(json.dumps(record, indent=2) + "\n"))
    (folder / "checkpoint.pt").unlink(missing_ok=True)


def write_atomically(path: Path, write: Any) -> None:
    """Calls `write` with a temporary name beside `path`, then moves it there: whole or absent."""
    tmp = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        write(tmp)
        os.replace(tmp, path)
    finally:
        tmp.unlink(missing_ok=True)


def predictions(p: Params, task: str) -> pd.DataFrame:
    """The test predictions of all runs of a task, one row a case and epoch.

    Raises FileNotFoundError naming the first run that is not finished.
    """
    return pd.concat([pd.read_parquet(_whole(p, run) / "predictions.parquet") for run in grid(p, task)])


def histories(p: Params, task: str) -> pd.DataFrame:
    """Training loss, test accuracy and test AUC of every epoch of all runs of a task.

    Raises FileNotFoundError naming the first run that is not finished.
    """
    frames = [pd.read_csv(_whole(p, run) / "history.csv").assign(**asdict(run)) for run in grid(p, task)]
    return pd.concat(frames, ignore_index=True)


def _whole(p: Params, run: Run) -> Path:
    folder = p.folder / "runs" / run.path
    if not (folder / "run.json").exists():
        notebook = "02" if run.task == "three_class" else "03"
        raise FileNotFoundError(
            f"{folder} holds no finished run; run notebook {notebook} or `ipmn run` first"
        )
    return folder
