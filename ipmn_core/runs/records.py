"""What a run leaves on disk: whole or absent, of the settings and data asked for, checked when it is read."""

from __future__ import annotations

import hashlib
import io
import json
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from ipmn_core import disk, metrics
from ipmn_core.data import Cubes, for_spreadsheet, from_spreadsheet
from ipmn_core.names import CENTERS

MACHINE = ("device", "bfloat16", "channels_last")  # settings that the machine decides


class StaleRunError(RuntimeError):
    """A run on disk was made with other settings or data than those asked for."""


def data_key(scans: pd.DataFrame, cubes: Cubes) -> str:
    """A SHA-256 over the cubes' fingerprint and the rows they belong to: cases, patients, centers, labels."""
    rows = scans[["case_id", "patient_id", "center", "modality", "label"]].to_csv(index=False)
    return hashlib.sha256((cubes.key + rows).encode()).hexdigest()


def finished(folder: Path, settings: dict[str, Any], key: str) -> bool:
    """Whether a whole run lies in `folder`. Raises StaleRunError, with the difference, if what lies there,
    finished or not, was made with other settings or data.
    """
    if (folder / "run.json").exists():
        _refuse_other(json.loads((folder / "run.json").read_text()), {**settings, "data": key}, folder)
        return True
    if (folder / "checkpoint.pt").exists():
        _refuse_other(_read_checkpoint(folder), {**settings, "data": key}, folder)
    return False


def note_share(folder: Path, share: float) -> None:
    """Notes which share of a run is done, for whoever shows progress."""
    (folder / "share_done").write_text(f"{share}")


def share_done(folder: Path) -> float:
    """Which share of the run in `folder` is done, 0 to 1."""
    if (folder / "run.json").exists():
        return 1.0
    try:
        return float((folder / "share_done").read_text())
    except (FileNotFoundError, ValueError):  # not begun, or being written
        return 0.0


def _refuse_other(record: dict[str, Any], wanted: dict[str, Any], folder: Path) -> None:
    found = {**record["settings"], "data": record["data"]}
    keys = [key for key in {**found, **wanted} if found.get(key) != wanted.get(key)]
    if keys:
        changes = "; ".join(f"{key}: {found.get(key)!r} on disk, {wanted.get(key)!r} now" for key in keys)
        raise StaleRunError(
            f"{folder} was made with other settings or data ({changes}). Give this profile another name, "
            "delete that folder, or start the whole profile afresh with `ipmn run --fresh`"
        )


def _read_checkpoint(folder: Path) -> dict[str, Any]:
    return torch.load(folder / "checkpoint.pt", map_location="cpu", weights_only=True, mmap=True)


def load_checkpoint(folder: Path) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """Progress and learning state to go on from; an empty progress and None where there is no checkpoint."""
    if not (folder / "checkpoint.pt").exists():
        progress = {key: [] for key in ("frames", "history", "inner_products", "left_out", "centers")}
        progress["best_auc"] = -1.0
        return {**progress, "seconds": 0.0}, None
    saved = _read_checkpoint(folder)
    progress = saved["progress"]
    frames = [pd.read_parquet(io.BytesIO(progress["frames"]))] if progress["frames"] else []
    return {"centers": [], **progress, "frames": frames}, saved["learning"]


def save_checkpoint(folder: Path, record: dict[str, Any], progress: dict, learning: dict[str, Any]) -> None:
    """Tensors and plain values only, so that it loads without unpickling code."""
    frames = pd.concat(progress["frames"]).to_parquet() if progress["frames"] else b""
    content = {**record, "progress": {**progress, "frames": frames}, "learning": learning}
    disk.write(folder / "checkpoint.pt", lambda tmp: torch.save(content, tmp))


def save_model(folder: Path, model: torch.nn.Module) -> None:
    """`model.pt`, the best weights so far: on disk at once, for they may be those of seven centers."""
    state = {key: value.cpu() for key, value in model.state_dict().items()}  # to be read on any machine
    disk.write(folder / "model.pt", lambda tmp: torch.save(state, tmp))


def write(
    folder: Path, record: dict[str, Any], progress: dict, rows: pd.DataFrame, device: torch.device
) -> None:
    """The files of a finished run, from its `progress` and the `role` of every case, and no checkpoint."""
    history = pd.DataFrame(progress["history"], columns=["epoch", "loss", "test_acc", "test_auc"])
    noted = pd.concat(progress["frames"], ignore_index=True) if progress["frames"] else None
    for name, role in (("predictions", "test"), ("validation", "validation")):
        if noted is not None and (role == "test" or record["settings"]["inner_validation"]):
            frame = noted[noted["role"] == role].drop(columns="role")
            disk.write(folder / f"{name}.parquet", lambda tmp, f=frame: f.to_parquet(tmp, index=False))
    if progress["centers"]:
        centers = pd.DataFrame(progress["centers"], columns=["round", "center", "n", "acc", "auc"])
        disk.write(folder / "centers.csv", lambda tmp: centers.to_csv(tmp, index=False))
    disk.write(folder / "history.csv", lambda tmp: history.to_csv(tmp, index=False))
    if progress["inner_products"]:
        trained_on = set(rows.loc[rows["role"] == "train", "center"])
        updates = _updates(progress["inner_products"], [c for c in CENTERS if c in trained_on])
        disk.write(folder / "updates.csv", lambda tmp: updates.to_csv(tmp, index=False))
    if progress["left_out"]:
        left_out = pd.DataFrame(progress["left_out"], columns=["round", "client", "reason"])
        disk.write(folder / "left_out.csv", lambda tmp: left_out.to_csv(tmp, index=False))
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    seal(folder, record, rows, progress["seconds"], name)
    for name in ("checkpoint.pt", "share_done"):
        (folder / name).unlink(missing_ok=True)


def _updates(inner_products: list[list[list[float]]], clients: list[str]) -> pd.DataFrame:
    """Inner products of the clients' updates in long form: columns round, client, other, inner_product."""
    rounds = range(1, len(inner_products) + 1)
    index = pd.MultiIndex.from_product([rounds, clients, clients], names=["round", "client", "other"])
    return pd.Series(np.ravel(inner_products), index, name="inner_product").reset_index()


def seal(
    folder: Path, record: dict[str, Any], rows: pd.DataFrame, seconds: float, device: str | None = None
) -> None:
    """Makes a run whole: `splits.csv` with the `role` of every case of `rows` and, last, `run.json`."""
    splits = for_spreadsheet(rows[["case_id", "center", "role"]])
    settings = json.dumps(record["settings"], sort_keys=True)
    record = {
        **record,
        "settings_hash": hashlib.sha256(settings.encode()).hexdigest(),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "monai": version("monai"),
        },
        "device": device or platform.machine(),
        "seconds": round(seconds, 2),
    }
    disk.write(folder / "splits.csv", lambda tmp: splits.to_csv(tmp, index=False))
    disk.write(folder / "run.json", lambda tmp: tmp.write_text(json.dumps(record, indent=2) + "\n"))


def read_predictions(folder: Path, settings: dict[str, Any], role: str = "test") -> pd.DataFrame:
    """A run's predictions of its test or its inner validation cases, refused if a row cannot be right.

    Raises FileNotFoundError if there is no whole run, StaleRunError if it was made with other settings,
    PredictionsError naming file and row.
    """
    name = {"test": "predictions.parquet", "validation": "validation.parquet"}[role]
    if not (whole(folder, settings) / name).exists() and (folder / "centers.csv").exists():
        raise metrics.PredictionsError(
            f"{folder}: a hospital shared no scores, so predictions and a pooled AUC are not available; "
            "`ipmn federation run` with `--share scores` at every site, or read centers.csv"
        )
    frame = pd.read_parquet(folder / name)
    splits = from_spreadsheet(pd.read_csv(folder / "splits.csv"))
    frame = metrics.check(frame, splits.loc[splits["role"] != role, "case_id"], str(folder / name))
    wanted = set(splits.loc[splits["role"] == role, "case_id"])
    for epoch, rows in frame.groupby("epoch"):
        lost = sorted(wanted - set(rows["case_id"]))
        if lost:
            raise metrics.PredictionsError(
                f"{folder / name}, epoch {epoch}: no row of case {lost[0]}; {metrics.REPEAT}"
            )
    return frame


def whole(folder: Path, settings: dict[str, Any]) -> Path:
    """`folder` itself, if a whole run of these settings lies in it, perhaps made on another machine.

    Raises FileNotFoundError or StaleRunError.
    """
    if not (folder / "run.json").exists():
        notebook = "02" if settings["task"] == "three_class" else "03"
        raise FileNotFoundError(
            f"{folder} holds no finished run; run notebook {notebook} or `ipmn run` first"
        )
    record = json.loads((folder / "run.json").read_text())
    machine = {key: value for key, value in record["settings"].items() if key in MACHINE}
    _refuse_other(record, {**settings, **machine, "data": record["data"]}, folder)
    return folder
