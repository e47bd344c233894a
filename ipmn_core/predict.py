"""A new case and trained models -> probabilities. For research, not for clinical use."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import nn

from ipmn_core import data, federated, params
from ipmn_core.runs import LOCAL_ONLY
from ipmn_core.runs.trained import PredictError, Trained, find, load

NOTICE = "Not for clinical use: a research model without external validation."
LONGEST_MM = 250  # a longer ROI is probably a whole image: a pancreas is 120 to 150 mm long


@dataclass(frozen=True)
class Prediction:
    """Probabilities of one case: `folds` has one row per network, columns model, weights (path), classes."""

    case: str
    task: str
    folds: pd.DataFrame
    warnings: tuple[str, ...]


def predict(
    image: str | Path,
    mask: str | Path | None,
    folders: str | Path | Sequence[str | Path],
    center: str | None = None,
    size: int = 96,
    device: str = "cpu",
) -> Prediction:
    """Predict a scan with the trained networks in `folders` (see `trained.find`), in float32.

    `image` with its pancreas `mask`, or a clean ROI without. `center`: whose networks to use, for the arm
    `local_only`. `size`: edge of the cubes, for bare weights. Raises PredictError or ScanError.
    """
    where = federated.device_of(params.validate({"device": device, "size": size}, "predict"))
    trained = find(folders, size)
    _refuse_mixed(trained, center)
    case, of = data.case_name(Path(image).name), trained[0]
    roi = data.load_roi(image, mask, case)
    cube = data.to_cube(np.asanyarray(roi.dataobj), of.size)
    x = torch.from_numpy(cube).float()[None, None].to(where)  # (1, 1, S, S, S)
    prob = [_probabilities(load(one, center).to(where), x, one.weights) for one in trained]
    names = pd.DataFrame([(one.name, str(one.weights)) for one in trained], columns=["model", "weights"])
    folds = names.join(pd.DataFrame(prob, columns=list(of.classes)))
    longest, warnings = float(np.max(np.multiply(roi.shape, roi.header.get_zooms()))), []
    if longest > LONGEST_MM:
        warnings = [f"the ROI is {longest:.0f} mm long, more than a pancreas: check mask and voxel size"]
    warnings += _case_warnings(case, trained, center)
    return Prediction(case, of.task, folds, tuple(warnings))


def _refuse_mixed(trained: list[Trained], center: str | None) -> None:
    kinds = {f"{one.task} {one.modality} {one.size}^3" for one in trained}
    if len(kinds) > 1:
        raise PredictError(f"models of several kinds: {', '.join(sorted(kinds))}; use each by itself")
    shared = [one for one in trained if one.arm != LOCAL_ONLY]
    if center and shared:
        raise PredictError(f"{shared[0].weights} holds one model for all centers; leave out center {center}")


@torch.inference_mode()
def _probabilities(network: nn.Module, x: torch.Tensor, source: Path) -> np.ndarray:
    """Class probabilities (K,) float64 of one cube (1, 1, S, S, S); the same bits each time."""
    with torch.backends.cudnn.flags(benchmark=False, deterministic=True, allow_tf32=False):
        prob = network(x).softmax(1)[0].double().cpu().numpy()
    if not np.isfinite(prob).all():
        raise PredictError(f"{source}: its probabilities are not numbers; its training diverged: repeat it")
    return prob


def _case_warnings(case: str, trained: list[Trained], center: str | None) -> list[str]:
    """A warning if the case, by its name, was one of the models' own, or may have been."""
    roles = {one.name: _role(case, one.weights.with_name("splits.csv"), center) for one in trained}
    known = ", ".join(f"{name}: {role}" for name, role in roles.items() if role)
    return (
        [f"no independent test, {case} was a case of these models or may have been ({known})"]
        if known
        else []
    )


def _role(case: str, path: Path, center: str | None) -> str:
    """What a run (its `center`) used a case for, by `splits.csv`: train, validation, test, "" or unknown."""
    if not path.exists():
        return "unknown"
    splits = pd.read_csv(path, dtype=str, keep_default_na=False)
    ids = splits["case_sha256"] if "case_sha256" in splits else splits["case_id"].map(hashed)
    mine = (ids == hashed(case)) & (splits["center"].eq(center) | (center is None))
    return next(iter(splits.loc[mine, "role"]), "")


def hashed(case_id: str) -> str:
    """SHA-256 of a case's name in lower case, because files and sheets differ in case."""
    return hashlib.sha256(case_id.lower().encode()).hexdigest()


def table(result: Prediction) -> pd.DataFrame:
    """One row per model, then `mean` and `std` over them (ddof = 0): columns model and classes."""
    folds = result.folds.drop(columns="weights").set_index("model")
    over = pd.DataFrame({"mean": folds.mean(), "std": folds.std(ddof=0)}).T
    return pd.concat([folds, over]).rename_axis("model").reset_index()
