"""A run is arm x modality x fold: the grid, one run whole or absent on disk, resume, workers."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import hashlib
import io
import json
import os
import platform
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields
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
    arms = p.three_class_models if task == "three_class" else p.arms
    for name in {*p.three_class_models, *p.epochs_by_model, p.binary_model} - set(models.MODELS):
        raise ValueError(f"{name}: unknown model; known are {', '.join(models.MODELS)}")
    for arm in set(p.arms) - {"centralized"}:
        federated.strategy(arm)
    # arms innermost: workers then seldom train the largest model at the same time, which bounds memory
    return [Run(task, m, arm, k) for m in p.modalities for k in range(p.folds(task)) for arm in arms]


def device_of(p: Params) -> torch.device:
    """The device asked for; `auto` is the first GPU if there is one. Raises ValueError for an absent GPU."""
    if p.device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(p.device)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        n = torch.cuda.device_count()
        raise ValueError(
            f"device: {p.device} was asked for, torch sees {n} GPU(s); set `device: auto` or `cpu`"
        )
    return device


def uses_bfloat16(p: Params, device: torch.device) -> bool:
    """Whether to train under bfloat16 autocast: as set, or for `auto` where the device has units for it.

    A GPU that supports it, or a CPU with AMX. Raises ValueError if it is demanded of another CPU: with
    AVX512-BF16 alone, oneDNN 3.12 returns wrong weight gradients for 3x3x3 convolutions at 2x2x2 voxels,
    which DenseNet-121 and ResNet-34 meet at 32^3 (measured against float64; float32 is right).
    """
    if device.type == "cuda":
        able = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        able = bool(getattr(torch.cpu, "_is_amx_tile_supported", bool)())
    if p.precision == "bfloat16" and not able:
        raise ValueError(
            f"precision: bfloat16 is not safe on this {device.type}; set `precision: float32` or `auto`"
        )
    return able and p.precision != "float32"


def settings_of(p: Params, run: Run) -> dict[str, Any]:
    """Everything of the profile that a run's result depends on, as plain values for `run.json`."""
    device = device_of(p)
    model = run.arm if run.task == "three_class" else p.binary_model
    if run.task == "binary" and run.arm != "centralized":
        length = {"epochs": p.rounds, "local_epochs": p.local_epochs, "mu": federated.strategy(run.arm).mu}
    else:
        own = p.epochs_by_model if run.task == "three_class" else {}
        length = {"epochs": own.get(model, p.epochs), "local_epochs": 1, "mu": None}
    return {
        **asdict(run),
        "model": model,
        "folds": p.folds(run.task),
        "fold_rule": p.fold_rule,
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
        "device": device.type,
        "bfloat16": uses_bfloat16(p, device),
        "channels_last": device.type == "cpu" and model in models.CHANNELS_LAST,
        "threads": p.threads,
    }


def run_grid(p: Params, task: str, scans: pd.DataFrame, cubes: Cubes) -> pd.DataFrame:
    """The predictions of all runs of `task`, after training those that are not on disk yet.

    `scans` and `cubes` row by row. `p.jobs` runs are trained at a time; the result is that of one at a time
    if `p.threads` is set. Raises StaleRunError before any training if a run on disk, finished or not, was
    made with other settings or data.
    """
    runs_root = p.folder / "runs"
    key = data_key(scans, cubes)
    todo = [run for run in grid(p, task) if not finished(runs_root, run, settings_of(p, run), key)]
    folds = cohort.assign_folds(scans, p.folds(task), p.fold_rule, binary=task == "binary")
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


def data_key(scans: pd.DataFrame, cubes: Cubes) -> str:
    """A SHA-256 over the cubes' fingerprint and the rows they belong to: cases, patients, centers, labels."""
    rows = scans[["case_id", "patient_id", "center", "modality", "label"]].to_csv(index=False)
    return hashlib.sha256((cubes.key + rows).encode()).hexdigest()


def finished(runs_root: Path, run: Run, settings: dict[str, Any], key: str) -> bool:
    """Whether `run` is whole on disk. Raises StaleRunError, with the difference, if what lies there,
    finished or not, was made with other settings or data.
    """
    folder = runs_root / run.path
    if (folder / "run.json").exists():
        _refuse_other(json.loads((folder / "run.json").read_text()), {**settings, "data": key}, folder)
        return True
    if (folder / "checkpoint.pt").exists():
        _refuse_other(_read_checkpoint(folder), {**settings, "data": key}, folder)
    return False


def _refuse_other(record: dict[str, Any], wanted: dict[str, Any], folder: Path) -> None:
    found = {**record["settings"], "data": record["data"]}
    keys = [key for key in {**found, **wanted} if found.get(key) != wanted.get(key)]
    if keys:
        changes = "; ".join(f"{key}: {found.get(key)!r} on disk, {wanted.get(key)!r} now" for key in keys)
        raise StaleRunError(
            f"{folder} was made with other settings or data ({changes}). Give this profile another name, "
            "delete that folder, or start the whole profile afresh with `ipmn run --fresh`"
        )


def execute(p: Params, run: Run, scans: pd.DataFrame, folds: pd.Series, cubes: Cubes) -> Path:
    """The folder of `run`, trained, tested each epoch and written; resumed if it was interrupted.

    Writes `predictions.parquet`, `history.csv`, `model.pt` (the epoch with the highest global AUC on the
    test fold, the paper's rule) and, last, `run.json`; each appears whole or not at all.
    """
    folder = _train(p, run, scans, folds, cubes)
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):  # glibc: joblib renews a worker that stays large
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    return folder


def _train(p: Params, run: Run, scans: pd.DataFrame, folds: pd.Series, cubes: Cubes) -> Path:
    started = time.perf_counter()
    if p.threads:
        torch.set_num_threads(p.threads)
    torch.set_flush_denormal(True)
    folder = p.folder / "runs" / run.path
    folder.mkdir(parents=True, exist_ok=True)
    record = {"settings": settings_of(p, run), "data": data_key(scans, cubes)}
    mine = (scans["modality"] == run.modality).to_numpy()
    rows = scans[mine].assign(test=folds[mine] == run.fold)
    progress, learning = _load_checkpoint(folder)
    last_save = time.perf_counter()
    for epoch, model in _epochs(p, run, record["settings"], rows, cubes.array[mine], learning):
        auc = _note(progress, epoch, run, p.seed, rows[rows["test"]])
        if not auc <= progress["best_auc"]:  # an undefined AUC keeps the last epoch, as `metrics.select` does
            progress["best_auc"], progress["best"] = auc, training.snapshot(model)
        if time.perf_counter() - last_save >= p.checkpoint_seconds:
            progress["seconds"] += time.perf_counter() - started
            started = last_save = time.perf_counter()
            _save_checkpoint(folder, record, progress, epoch.checkpoint())
    progress["seconds"] += time.perf_counter() - started
    _write(folder, record, progress, device_of(p))
    return folder


def _epochs(
    p: Params, run: Run, settings: dict[str, Any], rows: pd.DataFrame, array: np.ndarray, learning: Any
) -> Iterator[tuple[training.Epoch, torch.nn.Module]]:
    device = device_of(p)
    names = [field.name for field in fields(training.Settings) if field.name != "seed"]
    protocol = training.Settings(**{name: settings[name] for name in names}, seed=(p.seed, run.fold))
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


def _read_checkpoint(folder: Path) -> dict[str, Any]:
    return torch.load(folder / "checkpoint.pt", map_location="cpu", weights_only=True, mmap=True)


def _load_checkpoint(folder: Path) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """Progress and learning state to go on from; an empty progress and None where there is no checkpoint."""
    if not (folder / "checkpoint.pt").exists():
        return {"frames": [], "history": [], "best": None, "best_auc": -1.0, "seconds": 0.0}, None
    saved = _read_checkpoint(folder)
    progress = saved["progress"]
    return {**progress, "frames": [pd.read_parquet(io.BytesIO(progress["frames"]))]}, saved["learning"]


def _save_checkpoint(folder: Path, record: dict[str, Any], progress: dict, learning: dict[str, Any]) -> None:
    """Tensors and plain values only, so that it loads without unpickling code."""
    frames = pd.concat(progress["frames"]).to_parquet()
    content = {**record, "progress": {**progress, "frames": frames}, "learning": learning}
    write_atomically(folder / "checkpoint.pt", lambda tmp: torch.save(content, tmp))


def _write(folder: Path, record: dict[str, Any], progress: dict, device: torch.device) -> None:
    history = pd.DataFrame(progress["history"], columns=["epoch", "loss", "test_acc", "test_auc"])
    predictions = pd.concat(progress["frames"], ignore_index=True)
    settings = json.dumps(record["settings"], sort_keys=True)
    record = {
        **record,
        "settings_hash": hashlib.sha256(settings.encode()).hexdigest(),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "monai": monai.__version__,
        },
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine(),
        "seconds": round(progress["seconds"], 2),
    }
    write_atomically(folder / "predictions.parquet", lambda tmp: predictions.to_parquet(tmp, index=False))
    write_atomically(folder / "history.csv", lambda tmp: history.to_csv(tmp, index=False))
    best = {key: value.cpu() for key, value in progress["best"].items()}  # to be read on any machine
    write_atomically(folder / "model.pt", lambda tmp: torch.save(best, tmp))
    write_atomically(folder / "run.json", lambda tmp: tmp.write_text(json.dumps(record, indent=2) + "\n"))
    (folder / "checkpoint.pt").unlink(missing_ok=True)


def write_atomically(path: Path, write: Callable[[Path], Any]) -> None:
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
    record = json.loads((folder / "run.json").read_text())
    machine = {key: record["settings"][key] for key in ("device", "bfloat16")}  # may be read on another one
    _refuse_other(record, {**settings_of(p, run), **machine, "data": record["data"]}, folder)
    return folder
