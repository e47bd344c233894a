"""A new case and trained models -> probabilities. For research, not for clinical use."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from ipmn_core import data, federated, params
from ipmn_core.params import Preprocessing
from ipmn_core.runs.trained import PredictError, Trained, find, load, probabilities

NOTICE = "Not for clinical use: a research model without external validation."


@dataclass(frozen=True)
class Prediction:
    """Probabilities of one case: `folds` has one row per network, columns model, weights (path), classes.

    `scan` is the case as it was read and judged, `how` how it was made a cube.
    """

    case: str
    task: str
    folds: pd.DataFrame
    warnings: tuple[str, ...]
    scan: data.Scan
    how: Preprocessing


def predict(
    image: str | Path,
    mask: str | Path | None,
    folders: str | Path | Sequence[str | Path],
    center: str | None = None,
    how: Preprocessing | None = None,
    device: str = "cpu",
) -> Prediction:
    """Predict a scan with the trained networks in `folders` (see `trained.find`), in float32.

    `image` with its pancreas `mask`, or a clean ROI without; preprocessed as the networks' runs say or, for
    bare weights, as `how` (default: as in the paper). `center`: whose networks to use, for the arm
    `local_only`. `warnings` say what is in doubt. Raises PredictError, ParamsError or ScanError.
    """
    where = federated.device_of(
        params.validate({"device": device, **asdict(how or Preprocessing())}, "predict")
    )
    trained = find(folders, how)
    _refuse_mixed(trained)
    case, of = data.case_name(Path(image).name), trained[0]
    scan = data.read_scan(image, mask, case, of.how)
    cube = data.to_cube(np.asanyarray(scan.roi.dataobj), of.how.size, of.how.intensity)
    x = torch.from_numpy(cube).float()[None, None].to(where)  # (1, 1, S, S, S)
    prob = [probabilities(load(one, center).to(where), x, one.weights)[0] for one in trained]
    names = pd.DataFrame([(one.name, str(one.weights)) for one in trained], columns=["model", "weights"])
    folds = names.join(pd.DataFrame(prob, columns=list(of.classes)))
    warnings = [f"{Path(where).name}: {problem}; {remedy}" for _, where, problem, remedy in scan.remarks]
    warnings += _case_warnings(case, trained, center)
    return Prediction(case, of.task, folds, tuple(warnings), scan, of.how)


def _refuse_mixed(trained: list[Trained]) -> None:
    kinds = {f"{one.task} {one.modality} {in_words(one.how)}" for one in trained}
    if len(kinds) > 1:
        raise PredictError(f"models of several kinds: {', '.join(sorted(kinds))}; use each by itself")


def _case_warnings(case: str, trained: list[Trained], center: str | None) -> list[str]:
    """A warning if the case, by its name, was one of the models' own, or may have been."""
    roles = {one.name: _role(case, one, center) for one in trained}
    known = ", ".join(f"{name}: {role}" for name, role in roles.items() if role)
    return (
        [f"no independent test, {case} was a case of these models or may have been ({known})"]
        if known
        else []
    )


def _role(case: str, of: Trained, center: str | None) -> str:
    """What a run (its `center`) used a case for, by `splits.csv`: train, validation, test, "" or unknown."""
    if not of.splits or not of.splits.exists():
        return "unknown"
    splits = pd.read_csv(of.splits, dtype=str, keep_default_na=False)
    splits = splits[splits["fold"] == str(of.fold)] if "fold" in splits else splits
    ids = splits["case_sha256"] if "case_sha256" in splits else splits["case_id"].map(hashed)
    mine = (ids == hashed(case)) & (splits["center"].eq(center) | (center is None))
    return next(iter(splits.loc[mine, "role"]), "")


def in_words(how: Preprocessing) -> str:
    """How scans are preprocessed: `96^3, spacing as stored, minmax, stored axes`."""
    spacing = f"{how.spacing:g} mm" if how.spacing else "spacing as stored"
    return f"{how.size}^3, {spacing}, intensity {how.intensity}, {how.orientation} axes"


def hashed(case_id: str) -> str:
    """SHA-256 of a case's name in lower case, because files and sheets differ in case."""
    return hashlib.sha256(case_id.lower().encode()).hexdigest()


def table(result: Prediction) -> pd.DataFrame:
    """One row per model, then `mean` and `std` over them (ddof = 0): columns model and classes."""
    folds = result.folds.drop(columns="weights").set_index("model")
    over = pd.DataFrame({"mean": folds.mean(), "std": folds.std(ddof=0)}).T
    return pd.concat([folds, over]).rename_axis("model").reset_index()
