"""Live views without a kernel: an ROI viewer and a per-center explorer, each a piece of HTML with its data.

A piece holds a picture, for where nothing runs, and JSON. `views.js`, once per page, turns pieces live;
`views.css` is their design. Names come from files: JSON is escaped so that none of them ends a script.
"""

from __future__ import annotations

import base64
import json
import zlib
from collections.abc import Sequence

import nibabel as nib
import numpy as np
import pandas as pd
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from ipmn_core import metrics
from ipmn_core.data import headers
from ipmn_core.metrics import centers
from ipmn_core.names import LABELS, class_names, display_name
from ipmn_core.views.results import overview
from ipmn_core.views.scans import Case, header_facts, middle, open_case, three_planes, widest_slice, window_of
from ipmn_core.views.style import REFERENCES, centers_in, color, in_order, png

VOXELS = 2**18  # of an image as shown, at most: about 0.25 MB of page once packed
MARGIN = 10  # mm around the pancreas that stay where an image is cut
TASKS = {"binary": "high risk or not", "three_class": "three classes"}
METRICS = {"auc": "AUC", "acc": "accuracy"}
ESCAPES = str.maketrans({"<": "\\u003c", ">": "\\u003e", "&": "\\u0026"})  # what HTML reads as its own


def viewer(scans: pd.DataFrame, size: int) -> str:
    """HTML of a viewer of the cohort rows `scans` (a few: they become part of the page), cubes of `size`^3.

    Images are windowed to bytes between their percentiles 1 and 99.5, in RAS+. One of more than VOXELS is cut
    to the pancreas and MARGIN mm around it, then averaged in blocks until it fits; the page says so.
    Raises ValueError without rows, and ScanError for a scan that cannot be used.
    """
    if scans.empty:
        raise ValueError("The viewer has no scan to show: pass at least one row of the cohort.")
    cases = [_case(open_case(scan, size)) for _, scan in scans.iterrows()]  # one at a time
    first = open_case(scans.iloc[0], size)
    picture = three_planes(first, middle(first))
    alt = "The first case in three planes, and below them the cube that a network sees"
    return _view("viewer", picture, alt, {"size": size, "cases": cases})


def explorer(selected: pd.DataFrame, summary: pd.DataFrame) -> str:
    """HTML of an explorer of results by center, from the two tables of `centers`.

    `selected`: rows of predictions, one epoch a run and rule: task, modality, arm, fold, rule, case_id,
    center, y_true, prob_0 ..., epoch. `summary`: task, modality, arm, rule, center (with "global"), metric
    ("acc", "auc"), mean, low, high, undefined (why, else ""). Raises ValueError without rows, if a
    probability is not finite, or if a case has two labels or centers, or is given twice in one arm and rule.
    """
    if selected.empty:
        raise ValueError("The explorer has no results to show: pass the predictions of at least one run.")
    rules = [[rule, words] for rule, words in centers.RULES.items() if (selected["rule"] == rule).any()]
    tables = [
        (rows, summary[(summary["task"] == task) & (summary["modality"] == modality)])
        for (task, modality), rows in selected.groupby(["task", "modality"])
    ]
    first = tables[0][1]
    first = first[(first["rule"] == rules[0][0]) & (first["metric"] == "auc")]
    alt = "AUC by center, mean over folds with its 95 % interval, a color per arm"
    data = {"rules": rules, "metrics": list(METRICS.items()), "views": [_results(*pair) for pair in tables]}
    return _view("explorer", overview(first), alt, data)


def _view(kind: str, picture: Figure, alt: str, data: dict) -> str:
    image = base64.b64encode(png(picture)).decode()
    return (
        f'<div class="ipmn-view" data-view="{kind}">'
        f'<img alt="{alt}" src="data:image/png;base64,{image}" style="max-width: 100%">'
        f'<script type="application/json">{_json(data)}</script></div>'
    )


def _json(data: dict) -> str:
    """ASCII JSON without a character that HTML reads as its own. Raises ValueError on NaN."""
    return json.dumps(data, separators=(",", ":"), allow_nan=False).translate(ESCAPES)


def _packed(array: np.ndarray) -> str:
    """The bytes of an array, first axis fastest, deflated (zlib) and in base64.

    Measured on seven T1 phantoms: 0.78 of the raw bytes, after differences along an axis 1.1. PNG gives 0.70,
    but a page reads it back through a canvas, whose pixels some browsers change against tracking.
    """
    return base64.b64encode(zlib.compress(array.tobytes(order="F"), 9)).decode()


def _case(case: Case) -> dict:
    """Data of a scan for the viewer; lists have one entry per axis: to the patient's right, front, head."""
    spacing = np.array(case.image.header.get_zooms(), float)
    low, high = window_of(case)
    voxels = windowed(np.asanyarray(case.image.dataobj), low, high)
    box = tuple(slice(start, start + n) for start, n in zip(case.first, case.roi.shape, strict=True))
    cut, step = framing(case.image.shape, spacing, box, VOXELS)
    shown = averaged(voxels[cut], step)
    inside = None if case.mask is None else averaged(case.mask[cut], step).astype(bool)
    name, modality = str(case.scan["case_id"]), case.scan["modality"]
    return {
        "case": name,
        "center": str(case.scan["center"]),
        "modality": modality,
        "title": f"{name}, {display_name(modality)}, {LABELS[case.scan['label']]}",
        "facts": list((header_facts(case) | _more_facts(case, cut, step)).items()),
        "whole": list(case.image.shape),
        "spacing": spacing.tolist(),
        "start": [side.start for side in cut],
        "step": list(step),
        "shape": list(shown.shape),
        "box": [[side.start, side.stop - side.start] for side in box],
        "at": _first_look(shown if inside is None else inside),
        "window": [low, high],
        "voxels": _packed(shown),
        "mask": None if inside is None else _packed(np.packbits(inside.ravel("F"), bitorder="little")),
        "cube": _packed(windowed(case.cube.astype(np.float32), 0, 1)),
    }


def windowed(volume: np.ndarray, low: float, high: float) -> np.ndarray:
    """The volume as bytes (uint8): 0 at `low` and below, 255 at `high` and above, rounded in between."""
    span = max(high - low, np.finfo(np.float32).tiny)  # an ROI may be nearly all background
    return np.uint8(np.rint(np.clip((volume - low) / span, 0, 1) * 255))


def framing(shape, spacing, box, voxels: int) -> tuple[tuple[slice, ...], tuple[int, ...]]:
    """The part of a volume to show (one slice per axis) and how many voxels of each axis to average into one.

    All of it, if it has at most `voxels`; else `box` and MARGIN mm around it, in blocks as cubic as they can
    be (spacing in mm) and just large enough.
    """
    if np.prod(shape) <= voxels:
        return tuple(slice(0, n) for n in shape), (1, 1, 1)
    more = np.ceil(MARGIN / np.asarray(spacing)).astype(int)
    cut = tuple(
        slice(max(side.start - int(m), 0), min(side.stop + int(m), n))
        for side, m, n in zip(box, more, shape, strict=True)
    )
    length, mm = np.array([side.stop - side.start for side in cut]), min(spacing)
    while True:
        step = np.clip(np.floor(mm / np.asarray(spacing)).astype(int), 1, length)
        if np.prod(length // step) <= voxels:
            return cut, tuple(map(int, step))
        mm *= 1.05


def averaged(volume: np.ndarray, step: tuple[int, ...]) -> np.ndarray:
    """Means of blocks of `step` voxels, rounded (a half to even), uint8; an incomplete block is left out."""
    length = [n // s for n, s in zip(volume.shape, step, strict=True)]
    whole = volume[tuple(slice(0, n * s) for n, s in zip(length, step, strict=True))]
    blocks = whole.reshape([n for pair in zip(length, step, strict=True) for n in pair])
    return np.uint8(np.rint(blocks.mean(axis=(1, 3, 5))))


def _first_look(inside: np.ndarray) -> list[int]:
    """A voxel of the widest axial slice: of those inside the one nearest to their middle."""
    inside = inside if inside.any() else np.ones_like(inside)  # means of a thin mask may all be below a half
    k = widest_slice(inside)
    plane = np.argwhere(inside[:, :, k])
    i, j = plane[np.square(plane - plane.mean(axis=0)).sum(axis=1).argmin()]
    return [int(i), int(j), k]


def _more_facts(case: Case, cut: Sequence[slice], step: Sequence[int]) -> dict[str, str]:
    """Of a header's text fields, which may name a patient, none: units are one of NIfTI's own words."""
    try:
        units, _ = nib.load(case.scan["image"]).header.get_xyzt_units()
    except KeyError:  # a code that is none of NIfTI's
        units = "unknown"
    doubt = headers.spacing_doubt(case.scan["image"])
    whole = all(side.stop - side.start == n for side, n in zip(cut, case.image.shape, strict=True))
    part = "the whole image" if whole else f"the pancreas and {MARGIN} mm around it"
    means = f", means of {' × '.join(map(str, step))} voxels" if max(step) > 1 else ""
    mask = "beside the image" if case.scan["mask"] else "none: a clean ROI"
    facts = {"units": units, "mask": mask, "shown": part + means}
    return facts | ({"in doubt": doubt} if doubt else {})


def _results(rows: pd.DataFrame, summary: pd.DataFrame) -> dict:
    """Data of one task and modality for the explorer; arms, centers and cases by their place in a list."""
    task, modality = rows[["task", "modality"]].iloc[0]
    arms, cases = in_order(rows["arm"]), _cases(rows)
    centers = centers_in([*cases["center"], *summary["center"], metrics.GLOBAL])
    return {
        "task": task,
        "taskName": TASKS.get(task, task),
        "modality": modality,
        "modalityName": display_name(modality),
        "classes": class_names(task),
        "arms": [_arm(arm) for arm in arms],
        "centers": [display_name(center) for center in centers],
        "cases": {
            "id": cases["case_id"].astype(str).tolist(),
            "center": cases["center"].map(centers.index).tolist(),
            "y": cases["y_true"].astype(int).tolist(),
        },
        "scores": _scores(rows, arms, cases),
        "summary": _summary(summary, arms, centers),
    }


def _arm(name: str) -> dict:
    """How an arm is shown; references, which train no network, share colors with others and are dashed."""
    hue = to_hex(color(name))
    return {"name": name, "label": display_name(name), "color": hue, "reference": name in REFERENCES}


def _cases(rows: pd.DataFrame) -> pd.DataFrame:
    """Each case once: case_id, center, y_true."""
    cases = rows[["case_id", "center", "y_true"]].drop_duplicates(ignore_index=True)
    for fault, table, key in (
        ("has two labels or centers", cases, ["case_id"]),
        ("is given twice in one arm and rule", rows, ["case_id", "arm", "rule"]),
    ):
        if (twice := table.duplicated(key)).any():
            case = table.loc[twice, "case_id"].iloc[0]
            raise ValueError(f"Case {case} {fault}: pass one epoch per run and rule, of one cohort.")
    return cases


def _scores(rows: pd.DataFrame, arms: list[str], cases: pd.DataFrame) -> list[dict]:
    """Probabilities (N, K) of every arm and rule, float32 as the networks gave them: rounding would tie some.

    NaN marks a case that was not tested. `epochs` are those chosen, by fold.
    """
    place = pd.Series(cases.index, cases["case_id"])
    scored = []
    for (arm, rule), part in rows.groupby(["arm", "rule"], sort=False):
        _, prob = metrics.y_and_prob(part)
        table = np.full((len(cases), prob.shape[1]), np.nan, "<f4")
        table[place[part["case_id"]]] = prob
        epochs = part.groupby("fold")["epoch"].first().tolist()
        packed = base64.b64encode(table.tobytes()).decode()
        scored.append({"arm": arms.index(arm), "rule": rule, "epochs": epochs, "p": packed})
    return scored


def _summary(summary: pd.DataFrame, arms: list[str], centers: list[str]) -> list[list]:
    """Rows arm, rule, metric, center, mean, low, high (3 decimals, None where undefined), why."""
    known = summary[summary["arm"].isin(arms)]
    numbers = known[["mean", "low", "high"]].to_numpy(float).round(3)
    return [
        [
            arms.index(row.arm),
            row.rule,
            row.metric,
            centers.index(row.center),
            *(v if np.isfinite(v) else None for v in values.tolist()),
            row.undefined,
        ]
        for row, values in zip(known.itertuples(), numbers, strict=True)
    ]
