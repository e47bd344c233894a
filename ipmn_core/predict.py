"""A new case and trained models -> probabilities, JSON. For research, not for clinical use."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import torch
from torch import nn

from ipmn_core import data, federated, params
from ipmn_core.names import class_names
from ipmn_core.runs import LOCAL_ONLY
from ipmn_core.runs.trained import PredictError, Trained, find, load

NOTICE = "Not for clinical use: a research model without external validation."
LONGEST_MM = 250  # a longer ROI is probably a whole image: a pancreas is 120 to 150 mm long
ROLES = {  # warnings by what a run used a case for
    "train": "{case} was trained on by {names}: this is no test",
    "validation": "{case} was held out of the training of {names} for validation: this is no test either",
    "test": "{case} was a test case of {names}, whose epoch was chosen on the test cases: this is optimistic",
    "unknown": "the training cases of {names} are unknown; if {case} was one, this is no test",
}


@dataclass(frozen=True)
class Prediction:
    """Probabilities of one case: `folds` has one row per network, columns model, weights (path), classes.

    `center` is the center whose networks were used (arm `local_only`), else None; `warnings` are sentences.
    """

    case: str
    task: str
    modality: str | None
    size: int
    center: str | None
    device: str
    folds: pd.DataFrame
    warnings: tuple[str, ...]


def predict(
    image: str | Path,
    mask: str | Path | None,
    folders: str | Path | Sequence[str | Path],
    center: str | None = None,
    size: int = 96,
    device: str = "cpu",
    case: str | None = None,
) -> Prediction:
    """Predict a scan with the trained networks in `folders` (see `trained.find`), in float32.

    `image` with its pancreas `mask`, or a clean ROI without. `center`: whose networks to use, for the arm
    `local_only`. `size`: edge of the cubes, for bare weights. `case`: its name in the cohort, by default the
    file's; from it the warnings say whether the case was trained on. Raises PredictError or ScanError.
    """
    where = federated.device_of(params.validate({"device": device, "size": size}, "predict"))
    trained = find(folders, size)
    _refuse_mixed(trained, center)
    case = case or data.case_name(Path(image).name)
    roi = data.load_roi(image, mask, case)
    of = trained[0]
    cube = data.to_cube(np.asanyarray(roi.dataobj), of.size)
    x = torch.from_numpy(cube).float()[None, None].to(where)  # (1, 1, S, S, S)
    prob = [_probabilities(load(one, center).to(where), x, one.weights) for one in trained]
    names = pd.DataFrame([(one.name, str(one.weights)) for one in trained], columns=["model", "weights"])
    folds = names.join(pd.DataFrame(prob, columns=list(class_names(of.task))))
    warnings = (*_roi_warnings(roi), *_case_warnings(case, trained, center))
    return Prediction(case, of.task, of.modality, of.size, center, str(where), folds, warnings)


def _refuse_mixed(trained: list[Trained], center: str | None) -> None:
    first = trained[0]
    for key in ("task", "modality", "size"):
        for one in trained:
            a, b = getattr(first, key), getattr(one, key)
            if a != b:
                known = f"{first.weights} has {a or 'none'}, {one.weights} {b or 'none'}"
                raise PredictError(f"models of more than one {key}: {known}; predict with each by itself")
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


def _roi_warnings(roi: nib.Nifti1Image) -> list[str]:
    longest = float(np.max(np.multiply(roi.shape, roi.header.get_zooms())))
    text = f"the ROI is {longest:.0f} mm long, more than a pancreas: check mask and voxel size"
    return [text] if longest > LONGEST_MM else []


def _case_warnings(case: str, trained: list[Trained], center: str | None) -> list[str]:
    """Warnings about networks that have seen the case, by its name."""
    names = {}
    for one in trained:
        names.setdefault(_role(case, one.weights.with_name("splits.csv"), center), []).append(one.name)
    return [text.format(case=case, names=", ".join(names[r])) for r, text in ROLES.items() if r in names]


def _role(case: str, path: Path, center: str | None) -> str:
    """What a run (its `center`) used a case for, by `splits.csv`: train, validation, test, "" or unknown."""
    if not path.exists():
        return "unknown"
    try:
        splits = pd.read_csv(path, dtype=str, keep_default_na=False)
        ids = splits["case_sha256"] if "case_sha256" in splits else splits["case_id"].map(hashed)
        mine = (ids == hashed(case)) & (splits["center"].eq(center) | (center is None))
        return next(iter(splits.loc[mine, "role"]), "")
    except (ValueError, KeyError) as error:
        raise PredictError(f"{path} is damaged ({error}); restore it, or delete it to do without") from error


def hashed(case_id: str) -> str:
    """SHA-256 of a case's name in lower case, because files and sheets differ in case."""
    return hashlib.sha256(case_id.lower().encode()).hexdigest()


def table(result: Prediction) -> pd.DataFrame:
    """One row per model, then `mean` and `std` over them (ddof = 0): columns model and classes."""
    over = pd.DataFrame(over_models(result)).T.rename_axis("model").reset_index()
    return pd.concat([result.folds.drop(columns="weights"), over], ignore_index=True)


def over_models(result: Prediction) -> dict[str, dict[str, float]]:
    """Mean and standard deviation (ddof = 0) of each class over the models."""
    prob = result.folds[list(class_names(result.task))]
    return {"mean": prob.mean().to_dict(), "std": prob.std(ddof=0).to_dict()}


def to_json(result: Prediction) -> str:
    """The prediction in plain values: case, settings, each model, mean and std over them, warnings."""
    settings = {key: getattr(result, key) for key in ("task", "modality", "size", "center", "device")}
    content = {
        "notice": NOTICE,
        "case": result.case,
        "settings": {**settings, "precision": "float32"},
        "folds": result.folds.to_dict("records"),
        **over_models(result),
        "warnings": list(result.warnings),
    }
    return json.dumps(content, indent=2)
