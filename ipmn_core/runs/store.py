"""Run folders on disk: written whole or not at all, checked when they are read.

No `run.json`, no run: it is written last. An unfinished run has a `checkpoint.pt` from which it resumes.
"""

from __future__ import annotations

import hashlib
import io
import json
import platform
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from ipmn_core import metrics
from ipmn_core.disk import atomic
from ipmn_core.names import CENTERS
from ipmn_core.runs.grid import MACHINE


class StaleRunError(RuntimeError):
    """A run on disk was made with other settings or data than those of the profile."""


@dataclass
class Progress:
    """The results of the epochs so far, and the learning state to go on from (None at the start)."""

    frames: list[pd.DataFrame] = field(default_factory=list)
    history: list[tuple] = field(default_factory=list)
    inner_products: list[list] = field(default_factory=list)
    left_out: list[tuple] = field(default_factory=list)
    centers: list[tuple] = field(default_factory=list)
    best_auc: float = -1.0
    seconds: float = 0.0
    learning: dict[str, Any] | None = None


def finished(folder: Path, protocol: dict[str, Any], key: str) -> bool:
    """Whether `folder` holds a finished run. Raises StaleRunError, with the difference, if a run there,
    finished or not, was made with other settings or data.
    """
    if (folder / "run.json").exists():
        _refuse_other(json.loads((folder / "run.json").read_text()), {**protocol, "data": key}, folder)
        return True
    if (folder / "checkpoint.pt").exists():
        _refuse_other(_read_checkpoint(folder), {**protocol, "data": key}, folder)
    return False


def whole(folder: Path, protocol: dict[str, Any]) -> Path:
    """`folder` itself, if it holds a finished run of these settings, of whatever data.

    Raises FileNotFoundError or StaleRunError.
    """
    if not (folder / "run.json").exists():
        chapter = "02" if protocol["task"] == "three_class" else "03"
        raise FileNotFoundError(f"{folder} holds no finished run; run notebook {chapter} or `ipmn run` first")
    record = json.loads((folder / "run.json").read_text())
    _refuse_other(record, {**protocol, "data": record["data"]}, folder)
    return folder


def _refuse_other(record: dict[str, Any], wanted: dict[str, Any], folder: Path) -> None:
    found = {key: value for key, value in record["settings"].items() if key not in MACHINE}
    found["data"] = record["data"]
    keys = [key for key in {**found, **wanted} if found.get(key) != wanted.get(key)]
    if keys:
        changes = "; ".join(f"{key}: {found.get(key)!r} on disk, {wanted.get(key)!r} now" for key in keys)
        raise StaleRunError(
            f"{folder} was made with other settings or data ({changes}). Give this profile another name, "
            "delete that folder, or start the whole profile afresh with `ipmn run --fresh`"
        )


def note_share(folder: Path, share: float) -> None:
    """Note the share of a run that is done, for the display of progress."""
    (folder / "share_done").write_text(f"{share}")


def share_done(folder: Path) -> float:
    """The share of the run in `folder` that is done, 0 to 1."""
    if (folder / "run.json").exists():
        return 1.0
    try:
        return float((folder / "share_done").read_text())
    except (FileNotFoundError, ValueError):  # not begun, or being written
        return 0.0


def resume(folder: Path) -> Progress:
    """The progress of the last checkpoint in `folder`; an empty one if there is none."""
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
    """Write `checkpoint.pt`: tensors and plain values only, so that it loads without unpickling code."""
    content = {key: value for key, value in vars(progress).items() if key != "learning"}
    content["frames"] = pd.concat(progress.frames).to_parquet() if progress.frames else b""
    with atomic(folder / "checkpoint.pt") as tmp:
        torch.save({**about, "progress": content, "learning": learning}, tmp)


def save_model(folder: Path, model: torch.nn.Module) -> None:
    """Write `model.pt`, the best weights so far, to be read on any machine."""
    with atomic(folder / "model.pt") as tmp:
        torch.save({key: value.cpu() for key, value in model.state_dict().items()}, tmp)


def write(
    folder: Path, about: dict[str, Any], progress: Progress, scans: pd.DataFrame, device: torch.device
) -> None:
    """Write the files of a finished run, from its progress and the `role` of every case."""
    if progress.frames:
        noted = pd.concat(progress.frames, ignore_index=True)
        for name, role in (("predictions", "test"), ("validation", "validation")):
            rows = noted[noted["role"] == role].drop(columns="role")
            if role == "test" or about["settings"]["inner_validation"]:
                write_parquet(folder / f"{name}.parquet", rows)
    _csv(folder / "history.csv", progress.history, ["epoch", "loss", "test_acc", "test_auc"])
    if progress.centers:
        _csv(folder / "centers.csv", progress.centers, ["round", "center", "n", "acc", "auc"])
    if progress.left_out:
        _csv(folder / "left_out.csv", progress.left_out, ["round", "client", "reason"])
    if progress.inner_products:
        trained = set(scans.loc[scans["role"] == "train", "center"])
        clients = [center for center in CENTERS if center in trained]
        index = pd.MultiIndex.from_product([range(1, len(progress.inner_products) + 1), clients, clients])
        rows = [(*key, value) for key, value in zip(index, np.ravel(progress.inner_products), strict=True)]
        _csv(folder / "updates.csv", rows, ["round", "client", "other", "inner_product"])
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    seal(folder, about, scans, progress.seconds, name)
    for name in ("checkpoint.pt", "share_done"):
        (folder / name).unlink(missing_ok=True)


def write_parquet(path: Path, rows: pd.DataFrame) -> None:
    """Write a table whole or not at all."""
    with atomic(path) as tmp:
        rows.to_parquet(tmp, index=False)


def _csv(path: Path, rows: list[tuple] | pd.DataFrame, columns: list[str] | None = None) -> None:
    with atomic(path) as tmp:
        pd.DataFrame(rows, columns=columns).to_csv(tmp, index=False)


def seal(
    folder: Path, about: dict[str, Any], scans: pd.DataFrame, seconds: float, device: str = platform.machine()
) -> None:
    """Make a run whole: write `splits.csv`, the `role` of every case of `scans`, and, last, `run.json`."""
    settings = json.dumps(about["settings"], sort_keys=True)
    versions = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "monai": version("monai"),
    }
    record = {
        **about,
        "settings_hash": hashlib.sha256(settings.encode()).hexdigest(),
        "versions": versions,
        "device": device,
        "seconds": round(seconds, 2),
    }
    _csv(folder / "splits.csv", scans[["case_id", "center", "role"]])
    with atomic(folder / "run.json") as tmp:
        tmp.write_text(json.dumps(record, indent=2) + "\n")


def read_predictions(folder: Path, protocol: dict[str, Any], role: str = "test") -> pd.DataFrame:
    """A run's predictions of its test or its inner validation cases, refused if a row cannot be right.

    Raises FileNotFoundError if there is no finished run, StaleRunError if it was made with other settings,
    PredictionsError naming file and row.
    """
    path = whole(folder, protocol) / {"test": "predictions.parquet", "validation": "validation.parquet"}[role]
    if not path.exists() and (folder / "centers.csv").exists():
        raise metrics.PredictionsError(
            f"{folder}: a hospital shared no scores, so predictions and a pooled AUC are not available; "
            "`ipmn federation run` with `--share scores` at every site, or read centers.csv"
        )
    frame = pd.read_parquet(path)
    splits = pd.read_csv(folder / "splits.csv", dtype=str, keep_default_na=False)
    frame = metrics.check(frame, splits.loc[splits["role"] != role, "case_id"], str(path))
    wanted = set(splits.loc[splits["role"] == role, "case_id"])
    for epoch, rows in frame.groupby("epoch"):
        lost = sorted(wanted - set(rows["case_id"]))
        if lost:
            raise metrics.PredictionsError(
                f"{path}, epoch {epoch}: no row of case {lost[0]}; {metrics.REPEAT}"
            )
    return frame
