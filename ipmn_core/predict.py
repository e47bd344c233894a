"""Predict probabilities of new cases with trained models. For research, not for clinical use."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
from tqdm import tqdm

from ipmn_core import data, federated, params
from ipmn_core.data.cubes import in_threads
from ipmn_core.params import Preprocessing
from ipmn_core.runs.trained import (
    PredictError,
    Trained,
    find,
    hashed,
    in_words,
    load,
    probabilities_of,
    roles,
)

NOTICE = "Not for clinical use: a research model without external validation."
PIECE = 64  # scans whose cubes are in memory at a time


@dataclass(frozen=True)
class Prediction:
    """Probabilities of one case: `folds` has one row per network, columns model, weights (path), classes.

    `axes` are the scan's stored axes; `how` is its preprocessing.
    """

    case: str
    task: str
    folds: pd.DataFrame
    warnings: tuple[str, ...]
    axes: str
    how: Preprocessing


def predict(
    image: str | Path,
    mask: str | Path | None,
    folders: str | Path | Sequence[str | Path],
    center: str | None = None,
    how: Preprocessing | None = None,
    device: str = "cpu",
    network: str | None = None,
) -> Prediction:
    """Predict one scan, an `image` with the `mask` of its pancreas, or a clean ROI, as `predict_each` does.

    Raises ScanError if it cannot be used, and the errors of `predict_each`.
    """
    scan = data.case_name(Path(image).name), str(image), str(mask or ""), "", ""
    scans = pd.DataFrame([scan], columns=data.UNLABELLED)
    (result,) = predict_each(scans, folders, center, how, device, network)
    if isinstance(result, ValueError):
        raise result
    return result


def predict_each(
    scans: pd.DataFrame,
    folders: str | Path | Sequence[str | Path],
    center: str | None = None,
    how: Preprocessing | None = None,
    device: str = "cpu",
    network: str | None = None,
) -> Iterator[Prediction | ValueError]:
    """Predict `scans` (see `data.unlabelled`) with the trained networks in `folders` (see `trained.find`).

    Yields for each scan, in order, its prediction in float32, or the error that says why it cannot be used.
    The bits do not depend on the other scans. Scans are preprocessed as the networks' runs say or, for bare
    weights of `network`, as `how` says (default: as in the paper). For an arm with one model per center,
    `center` says whose networks to use. One network is in memory at a time. Raises PredictError or
    ParamsError before it reads a scan.
    """
    settings = {"device": device, **asdict(how or Preprocessing())}
    where, trained = federated.device_of(params.validate(settings, "predict")), find(folders, how, network)
    _refuse_mixed(trained)
    for one in trained:
        load(one, center)
    of, used = trained[0], [(one.name, _roles(one, center)) for one in trained]
    names = pd.DataFrame([(one.name, str(one.weights)) for one in trained], columns=["model", "weights"])
    with tqdm(total=len(scans) * len(trained), desc="predicting", disable=len(scans) < 2) as bar:
        for start in range(0, len(scans), PIECE):
            piece = scans[data.UNLABELLED].iloc[start : start + PIECE]
            with federated.one_thread():  # so that bits do not depend on the other scans
                read = list(in_threads(-1, partial(_read, of), piece.to_numpy()))
            cubes = [usable[0] for usable in read if isinstance(usable, tuple)]
            bar.update((len(read) - len(cubes)) * len(trained))
            prob = zip(*[probabilities_of(one, cubes, where, bar, center) for one in trained], strict=True)
            for case, found in zip(piece["case_id"], read, strict=True):
                if not isinstance(found, tuple):
                    yield found
                    continue
                folds = names.join(pd.DataFrame(next(prob), columns=list(of.classes)))
                warnings = (*found[1], *_case_warnings(case, used))
                yield Prediction(case, of.task, folds, warnings, found[2], of.how)


def _read(of: Trained, case: str, image: str, mask: str, modality: str, error: str):
    """Cube (S, S, S), warnings and axes of a scan for the network `of`, or why it cannot be used."""
    if error:
        return ValueError(error)
    try:
        scan = data.read_scan(image, mask, case, of.how)
    except data.ScanError as unusable:
        return unusable
    warnings = [f"{Path(where).name}: {problem}; {remedy}" for _, where, problem, remedy in scan.remarks]
    if of.modality and modality.casefold() not in ("", of.modality.casefold()):
        warnings.append(f"its modality is {modality}, but the models' is {of.modality}")
    return data.to_cube(np.asanyarray(scan.roi.dataobj), of.how.size, of.how.intensity), warnings, scan.axes


def _refuse_mixed(trained: list[Trained]) -> None:
    kinds = {f"{one.task} ({', '.join(one.classes)}) {one.modality} {in_words(one.how)}" for one in trained}
    if len(kinds) > 1:
        raise PredictError(f"models of several kinds: {', '.join(sorted(kinds))}; use each separately")


def _roles(one: Trained, center: str | None) -> dict[str, str] | None:
    """{hashed case: role} in a run (with `center`, its cases only); None if unknown."""
    known = roles(one)
    mine = known[known["center"].eq(center) | (center is None)]
    return None if known.empty else dict(zip(mine["case"], mine["role"], strict=True))


def _case_warnings(case: str, used: list[tuple[str, dict[str, str] | None]]) -> list[str]:
    """A warning if the case, by its name, was or may have been one of the models' own cases."""
    known = [(name, of.get(hashed(case), "")) for name, of in used if of is not None]
    said = ", ".join(f"{name}: {role}" for name, role in known if role)
    warnings = [f"not an independent test: it was a case of these models ({said})"] if said else []
    text = "may not be an independent test: the models' training cases are unknown"
    return [*warnings, text] if len(known) < len(used) else warnings


def table(result: Prediction) -> pd.DataFrame:
    """One row per model, then `mean` and `std` (ddof = 0) over models; columns model and classes."""
    folds = result.folds.drop(columns="weights").set_index("model")
    over = pd.DataFrame({"mean": folds.mean(), "std": folds.std(ddof=0)}).T
    return pd.concat([folds, over]).rename_axis("model").reset_index()


def by_case(scans: pd.DataFrame, results: Iterable[Prediction | ValueError]) -> pd.DataFrame:
    """One row per scan: `case_id, image`, each class's mean and std over models, `warnings`, `error`.

    Columns of a class: `mean CLASS` and `std CLASS` (ddof = 0). `error` says why a scan cannot be used.
    """
    rows = []
    for scan, result in zip(scans.itertuples(), results, strict=True):
        row = {"case_id": scan.case_id, "image": scan.image, "warnings": "", "error": ""}
        if isinstance(result, Prediction):
            over = table(result).set_index("model").loc[["mean", "std"]]
            row |= {f"{of} {name}": over.loc[of, name] for of in over.index for name in over}
            row["warnings"] = " | ".join(result.warnings)
        else:
            row["error"] = str(result)
        rows.append(row)
    frame = pd.DataFrame(rows)
    return frame[[*frame.columns.drop(["warnings", "error"]), "warnings", "error"]]
