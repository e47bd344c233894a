"""Run folders on disk: write files atomically, check them when they are read, read many runs together.

`run.json` is written last, so a folder without it is unfinished; it resumes from its `checkpoint.pt`.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import platform
import shutil
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from ipmn_core import federated, metrics
from ipmn_core.disk import atomic
from ipmn_core.names import TASKS
from ipmn_core.params import Params, project_root
from ipmn_core.runs.grid import LOCAL_ONLY, MACHINE, Run, folder_of, protocols, scored


class StaleRunError(RuntimeError):
    """A run on disk was made with other settings or data than the profile's."""


@dataclass
class Progress:
    """The results of the epochs so far, and the learning state to resume from (None at the start)."""

    frames: list[pd.DataFrame] = field(default_factory=list)
    history: list[tuple] = field(default_factory=list)
    updates: list[tuple] = field(default_factory=list)
    left_out: list[tuple] = field(default_factory=list)
    centers: list[tuple] = field(default_factory=list)
    seconds: float = 0.0
    learning: dict[str, Any] | None = None


COLUMNS = {  # of the tables in `Progress`; a table without rows is not written
    "history": ["epoch", "loss", "test_acc", "test_auc"],
    "updates": ["round", "client", "other", "inner_product"],
    "left_out": ["round", "client", "reason"],
    "centers": ["round", "center", "n", "acc", "auc"],
}
CPU = torch.device("cpu")
TRAINED_HERE = "trained_here"  # a file that keeps shipped runs from being copied here
# text as it is: a center may be called 042, or NA
AS_WRITTEN = {"dtype": dict.fromkeys(("client", "other", "center"), str)}
AS_WRITTEN |= {"keep_default_na": False, "na_values": [""]}


def finished(folder: Path, protocol: dict[str, Any], key: str | None = None) -> bool:
    """Whether `folder` holds a finished run with these settings and the data `key` (None: any data).

    Raises StaleRunError with the difference if a run there, finished or not, has other settings or data.
    """
    done = (folder / "run.json").exists()
    if not done and not (folder / "checkpoint.pt").exists():
        return False
    record = json.loads((folder / "run.json").read_text()) if done else _read_checkpoint(folder)
    found = {name: value for name, value in record["settings"].items() if name not in MACHINE}
    found["data"] = record["data"]
    wanted = {**protocol, "data": key or record["data"]}
    differ = [name for name in {**found, **wanted} if found.get(name) != wanted.get(name)]
    if differ:
        changes = [f"{name}: {found.get(name)!r} on disk, {wanted.get(name)!r} now" for name in differ]
        remedy = "Give this profile another name, delete that folder, or train again with `ipmn run --fresh`"
        if not record.get("trained_here", True):
            remedy = "Delete that folder, and `ipmn score` the weights again"
        raise StaleRunError(f"{folder} was made with other settings or data ({'; '.join(changes)}). {remedy}")
    return done


def whole(folder: Path, protocol: dict[str, Any]) -> Path:
    """Return `folder`; raises FileNotFoundError or StaleRunError without a finished run of these settings."""
    if not finished(folder, protocol):
        text = "holds no finished run; use `ipmn run`, or run notebook 02 or 03, first"
        raise FileNotFoundError(f"{folder} {text}")
    return folder


def unfinished(p: Params, wanted: dict[Run, dict[str, Any]], key: str) -> list[Run]:
    """The runs in `wanted` ({run: protocol}) that are neither on disk nor shipped. Raises StaleRunError."""
    for run, protocol in wanted.items():
        _take_shipped(p, folder_of(p, run), protocol, key)
    return [run for run, protocol in wanted.items() if not finished(folder_of(p, run), protocol, key)]


def _take_shipped(p: Params, folder: Path, protocol: dict[str, Any], key: str) -> None:
    """Copy a run, without weights, from `outputs/reference/` if its settings and data are the same."""
    shipped = project_root() / "outputs" / "reference" / folder.relative_to(p.folder.parent)
    if folder.exists() or (p.folder / "runs" / TRAINED_HERE).exists():
        return
    with contextlib.suppress(StaleRunError):
        if finished(shipped, protocol, key):
            arriving = folder.with_name(f"{folder.name}.tmp{os.getpid()}")
            shutil.copytree(shipped, arriving)
            arriving.replace(folder)


def discard(p: Params) -> None:
    """Delete the runs and probes of a profile; keep runs with weights from elsewhere (`score`).

    Shipped runs are not copied to this folder afterwards.
    """
    root = p.folder / "runs"
    records = {path: path.read_text() for path in root.glob("*/*/*/fold*/run.json")}
    kept = {path.parents[1] for path, text in records.items() if '"trained_here": false' in text}
    for arm in set(root.glob("*/*/*")) - kept:
        shutil.rmtree(arm, ignore_errors=True)
    root.mkdir(parents=True, exist_ok=True)
    (root / TRAINED_HERE).touch()


def share_done(folder: Path) -> float:
    """The share of the run in `folder` that is done, 0 to 1, for the progress bar."""
    try:
        return 1.0 if (folder / "run.json").exists() else float((folder / "share_done").read_text())
    except (FileNotFoundError, ValueError):  # not started, or being written
        return 0.0


def resume(folder: Path) -> Progress:
    """The progress of the last checkpoint in `folder`; empty without a checkpoint."""
    if not (folder / "checkpoint.pt").exists():
        return Progress()
    saved = _read_checkpoint(folder)
    progress = Progress(**saved["progress"], learning=saved["learning"])
    progress.frames = [pd.read_parquet(io.BytesIO(progress.frames))] if progress.frames else []
    return progress


def _read_checkpoint(folder: Path) -> dict[str, Any]:
    return torch.load(folder / "checkpoint.pt", map_location="cpu", weights_only=True, mmap=True)


def save_checkpoint(
    folder: Path, about: dict[str, Any], progress: Progress, learning: dict[str, Any]
) -> None:
    """Write `checkpoint.pt` with tensors and plain values only, so that loading it runs no code."""
    content = {key: value for key, value in vars(progress).items() if key != "learning"}
    content["frames"] = pd.concat(progress.frames).to_parquet() if progress.frames else b""
    with atomic(folder / "checkpoint.pt") as tmp:
        torch.save({**about, "progress": content, "learning": learning}, tmp)


def save_model(folder: Path, model: torch.nn.Module, own: dict[str, federated.State] | None = None) -> None:
    """Write `model.pt`, the best weights so far, readable on any machine.

    With clients' `own` tensors, it holds one model per client, with the prefix `0.`, `1.`, ... to its keys.
    """
    state = model.state_dict()
    if own:
        numbered = enumerate({**state, **of_client} for of_client in own.values())
        state = {f"{k}.{key}": value for k, whole in numbered for key, value in whole.items()}
    with atomic(folder / "model.pt") as tmp:
        torch.save({key: value.cpu() for key, value in state.items()}, tmp)


def write(
    folder: Path, about: dict[str, Any], progress: Progress, scans: pd.DataFrame, device: torch.device
) -> None:
    """Write the files of a finished run, from its progress and the `role` of every case."""
    if progress.frames:
        noted = pd.concat(progress.frames, ignore_index=True)
        for name, role in (("predictions", "test"), ("validation", "validation")):
            rows = noted[noted["role"] == role].drop(columns="role")
            if role == "test" or about["settings"]["inner_validation"]:
                write_table(folder / f"{name}.parquet", rows)
    for name, columns in COLUMNS.items():
        if rows := getattr(progress, name):
            write_table(folder / f"{name}.csv", pd.DataFrame(rows, columns=columns))
    seal(folder, about, scans, progress.seconds, device)
    for name in ("checkpoint.pt", "share_done"):
        (folder / name).unlink(missing_ok=True)


def write_table(path: Path, rows: pd.DataFrame) -> None:
    """Write a table as CSV or Parquet, atomically."""
    with atomic(path) as tmp:
        if path.suffix == ".csv":
            rows.to_csv(tmp, index=False)
        else:
            few_rows = {"store_schema": False, "write_statistics": False}  # half the size, the same table
            rows.to_parquet(tmp, index=False, compression="zstd", **few_rows)


def seal(
    folder: Path, about: dict[str, Any], scans: pd.DataFrame, seconds: float, device: torch.device = CPU
) -> None:
    """Finish a run: write `splits.csv` (the `role` of every case of `scans`), then `run.json`."""
    settings = json.dumps(about["settings"], sort_keys=True)
    versions = {"python": platform.python_version(), "torch": torch.__version__, "monai": version("monai")}
    record = {
        **about,
        "settings_hash": hashlib.sha256(settings.encode()).hexdigest(),
        "versions": versions,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine(),
        "seconds": round(seconds, 2),
    }
    write_table(folder / "splits.csv", scans[["case_id", "center", "role"]])
    with atomic(folder / "run.json") as tmp:
        tmp.write_text(json.dumps(record, indent=2) + "\n")


def read_predictions(folder: Path, protocol: dict[str, Any], role: str = "test") -> pd.DataFrame:
    """A run's predictions for its test or inner validation cases, validated.

    Raises FileNotFoundError if there is no finished run, StaleRunError if it was made with other settings,
    PredictionsError naming file and row.
    """
    path = whole(folder, protocol) / {"test": "predictions.parquet", "validation": "validation.parquet"}[role]
    if not path.exists() and (folder / "centers.csv").exists():
        text = "a hospital shared no scores, so there are no predictions and no pooled AUC"
        remedy = "use `ipmn federation run` with `--share scores` at every site, or read centers.csv"
        raise metrics.PredictionsError(f"{folder}: {text}; {remedy}")
    return metrics.check(pd.read_parquet(path), _not_of(role, folder), str(path))


def _not_of(role: str, folder: Path) -> pd.Series:
    """The cases of a run with another role."""
    splits = pd.read_csv(folder / "splits.csv", dtype=str, keep_default_na=False)
    return splits.loc[splits["role"] != role, "case_id"]


def read_all(p: Params, wanted: dict[Run, dict[str, Any]], role: str = "test") -> pd.DataFrame:
    """`read_predictions` of all runs in `wanted` ({run: protocol}), in one table."""
    frames = [read_predictions(folder_of(p, run), protocol, role) for run, protocol in wanted.items()]
    return pd.concat(frames or [metrics.none()], ignore_index=True)


def predictions(p: Params, task: str) -> pd.DataFrame:
    """The test predictions of all runs of a task, one row per case and epoch, checked (`metrics.check`).

    Trained runs, then scored ones (`grid.scored`). Raises FileNotFoundError naming the first unfinished run,
    PredictionsError naming an invalid row.
    """
    frame = read_all(p, protocols(p, task) | scored(p, task))
    return metrics.check(frame, source=f"{p.folder / 'runs' / task}, all runs")


def validation(p: Params, task: str) -> pd.DataFrame:
    """The predictions of the inner validation cases, in the form of `predictions`; empty without a split."""
    if not p.inner_validation:
        return pd.DataFrame(columns=metrics.COLUMNS)
    return read_all(p, protocols(p, task), "validation")


def finished_predictions(p: Params) -> tuple[pd.DataFrame, pd.DataFrame]:
    """`predictions` and `validation` of all tasks whose runs are all finished.

    Raises FileNotFoundError if no task is finished.
    """
    found = []
    for task in TASKS:
        with contextlib.suppress(FileNotFoundError):
            found.append((predictions(p, task), validation(p, task)))
    if not found:
        raise FileNotFoundError(f"{p.folder / 'runs'}: no task is finished; run chapter 2 or 3 first")
    tested, inner = (pd.concat(frames, ignore_index=True) for frames in zip(*found, strict=True))
    return tested, inner


def histories(p: Params, task: str) -> pd.DataFrame:
    """Training loss, test accuracy and test AUC of every epoch of all runs of a task."""
    return _of_runs(p, task, "history")


def seconds(p: Params, task: str) -> pd.DataFrame:
    """Time of each run on its machine: modality, arm, fold, seconds, per_epoch (per epoch or round)."""
    rows = []
    for run, protocol in protocols(p, task).items():
        record = json.loads((whole(folder_of(p, run), protocol) / "run.json").read_text())
        took = record["seconds"]
        rows.append((run.modality, run.arm, run.fold, took, took / record["settings"]["epochs"]))
    return pd.DataFrame(rows, columns=["modality", "arm", "fold", "seconds", "per_epoch"])


def updates(p: Params) -> pd.DataFrame:
    """Inner products of the clients' updates in every round: modality, arm, fold, and those in `COLUMNS`."""
    return _of_runs(p, "binary", "updates")


def cross(p: Params) -> pd.DataFrame:
    """Test predictions of every `local_only` model at every center, last epoch, checked.

    The columns of `predictions`, and `model_center`, where the model was trained. Raises FileNotFoundError
    for an unfinished run, PredictionsError naming an invalid row.
    """
    frames = []
    for run, protocol in protocols(p, "binary").items():
        if run.arm == LOCAL_ONLY:
            path = whole(folder_of(p, run), protocol) / "cross.parquet"
            frames.append(pd.read_parquet(path))
            for _, of_one in frames[-1].groupby("model_center"):
                metrics.check(of_one, _not_of("test", path.parent), str(path))
    return pd.concat(frames or [metrics.none().assign(model_center="")], ignore_index=True)


def left_out(p: Params) -> pd.DataFrame:
    """Clients that were left out of a round: columns modality, arm, fold, round, client, reason."""
    return _of_runs(p, "binary", "left_out")


def _of_runs(p: Params, task: str, name: str) -> pd.DataFrame:
    """The CSV file `name` of all runs of a task that have it, with each run's modality, arm and fold.

    Raises FileNotFoundError naming the first unfinished run.
    """
    columns = ["modality", "arm", "fold", *COLUMNS[name]]
    frames = []
    for run, protocol in protocols(p, task).items():
        path = whole(folder_of(p, run), protocol) / f"{name}.csv"
        if path.exists():
            frames.append(pd.read_csv(path, **AS_WRITTEN).assign(**asdict(run)))
    return pd.concat(frames or [pd.DataFrame(columns=columns)], ignore_index=True)[columns]
