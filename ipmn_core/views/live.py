"""Live views: ES modules that show the same in JupyterLab and, without a kernel, on the report's page.

A cell's output holds the widget, a still picture (PNG) and, as `MIME`, the state from which a page makes the
view live. Names come from files, so JSON is escaped: no name can end a script.
"""

from __future__ import annotations

import base64
import json
import zlib
from collections.abc import Callable, Sequence
from html import escape
from importlib.resources import files
from typing import Any

import anywidget
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from traitlets import Dict, Unicode

from ipmn_core.data import ScanError, headers
from ipmn_core.names import display_name
from ipmn_core.params import Preprocessing
from ipmn_core.views import gradcam
from ipmn_core.views.gradcam import Look
from ipmn_core.views.scans import HEAT, OPACITY, Case, middle, open_case, three_planes
from ipmn_core.views.style import centers_in, png

MIME = "application/vnd.ipmn.view+json"
PARTS = ("elements", "viewer", "explorer", "by_hand")
LAB = "export default { render };"
PAGE = 'for (const view of document.querySelectorAll(".ipmn-view")) await enliven(view);'
ESCAPES = str.maketrans({"<": "\\u003c", ">": "\\u003e", "&": "\\u0026"})  # HTML's special characters

VOXELS = 2**18  # limit for an image on a page: about 0.25 MB packed
MARGIN = 10  # mm kept around the pancreas when an image is cut
STORED = ("uint8", "int16", "uint16", "float32")  # types that the modules read; others become float32

Arrays = dict[str, np.ndarray]


def module(last: str = PAGE) -> str:
    """The ES module of all views; its end makes the views of a page live."""
    return "\n".join([*((files(__package__) / f"{part}.js").read_text("utf-8") for part in PARTS), last])


def css() -> str:
    """The style sheet of all views."""
    return (files(__package__) / "views.css").read_text("utf-8")


class LiveView(anywidget.AnyWidget):
    """A view (one of `PARTS`) with a `state` for the kernel and one for a page (default: the same).

    `still` draws the picture shown where no script runs; `alt` is its description. `answer` returns what a
    live view requests: JSON and arrays.
    """

    _esm = module(LAB)
    _css = css()
    view = Unicode().tag(sync=True)
    state = Dict().tag(sync=True)

    def __init__(
        self,
        view: str,
        state: dict[str, Any],
        still: Callable[[], Figure],
        alt: str,
        page: Callable[[], dict[str, Any]] | None = None,
        answer: Callable[[Any], tuple[dict[str, Any], Arrays]] | None = None,
    ):
        super().__init__(view=view, state=state)
        self.still, self.alt, self.page, self.answer = still, alt, page or (lambda: state), answer
        self.on_msg(self._reply)

    def _reply(self, _, message: dict[str, Any], __) -> None:
        about, arrays = self.answer(message["question"])
        about = about | {"arrays": [[name, array.dtype.name] for name, array in arrays.items()]}
        buffers = [array.tobytes(order="F") for array in arrays.values()]
        self.send({"number": message["number"], "about": about}, buffers)

    def _repr_mimebundle_(self, **kwargs):
        data, metadata = super()._repr_mimebundle_(**kwargs)
        picture = base64.b64encode(png(self.still())).decode()
        on_page = {"view": self.view, "alt": self.alt, "state": self.page()}
        return data | {"image/png": picture, MIME: on_page}, metadata


def packed(arrays: Arrays) -> list[list[str]]:
    """Arrays for a page: name, type, and bytes (first axis fastest), deflated (zlib) and in base64.

    Measured on seven T1 phantoms: 0.78 of the raw bytes. PNG gives 0.70, but a page reads it through a
    canvas, whose pixels some browsers change to prevent tracking.
    """
    deflated = {name: zlib.compress(array.tobytes(order="F"), 9) for name, array in arrays.items()}
    return [
        [name, arrays[name].dtype.name, base64.b64encode(text).decode()] for name, text in deflated.items()
    ]


def as_html(data: dict[str, Any], png: str) -> str:
    """HTML of an output's view for a page: its picture (PNG in base64) and the data for `module`.

    Raises ValueError if the state holds NaN, which JSON lacks.
    """
    state = json.dumps(data["state"], separators=(",", ":"), allow_nan=False).translate(ESCAPES)
    return (
        f'<div class="ipmn-view" data-view="{escape(data["view"])}">'
        f'<img alt="{escape(data["alt"])}" src="data:image/png;base64,{png}" style="max-width: 100%">'
        f'<script type="application/json">{state}</script></div>'
    )


# ---- the ROI viewer


def roi_viewer(scans: pd.DataFrame, how: Preprocessing) -> LiveView:
    """A viewer of the cases of `scans` in three planes, with the cube that a network gets (made as `how`).

    A page has one case per center, of the center's highest class and the last modality.
    """
    last = scans[scans["modality"] == scans["modality"].iloc[-1]]
    first = last.sort_values("label", ascending=False, kind="stable").groupby("center").head(1)
    return _viewer(scans, how, first.sort_values("center", key=lambda c: c.map(centers_in(c).index)))


def attention_viewer(looks: Sequence[Look], scans: pd.DataFrame) -> LiveView:
    """The viewer for the cases of `looks` (`gradcam.of_run`), with the heat map over the cube.

    A page has the first case of each class.
    """
    by_case = {look.case_id: look for look in looks}
    mine = scans[scans["case_id"].isin(by_case) & (scans["modality"] == looks[0].modality)]
    return _viewer(mine, looks[0].how, mine.groupby("label").head(1), by_case)


def _viewer(scans, how: Preprocessing, shown: pd.DataFrame, looks: dict[str, Look] | None = None):
    """The viewer of `scans`; a page has only the cases in `shown`."""

    def page() -> dict[str, Any]:
        held = [on_page(scan, how, (looks or {}).get(scan["case_id"])) for _, scan in shown.iterrows()]
        return viewer_state(shown, how) | {"held": dict(enumerate(held))}

    def still() -> Figure:
        first = open_case(shown.iloc[0], how)
        inside = np.asanyarray(first.image.dataobj) if first.mask is None else first.mask
        return three_planes(first, middle(inside))

    alt = "The first case in three planes, and below them the cube that a network sees"
    return LiveView("viewer", viewer_state(scans, how), still, alt, page, answering(scans, how, looks))


def viewer_state(scans: pd.DataFrame, how: Preprocessing) -> dict[str, Any]:
    """The state of a viewer: its cases, centers in order of appearance; it requests cases not in `held`."""
    palette = HEAT(np.arange(256), bytes=True)  # (256, 4) red, green, blue, opacity
    palette[:, 3] = OPACITY * np.arange(256)
    return {
        "size": how.size,
        "cases": scans[["case_id", "center", "modality", "label"]].to_numpy().tolist(),
        "held": {},
        "modalities": {m: display_name(m) for m in scans["modality"].unique()},
        "classes": dict(scans.sort_values("label").groupby("label")["class"].first()),
        "palette": base64.b64encode(palette.tobytes()).decode(),
    }


def answering(scans: pd.DataFrame, how: Preprocessing, looks: dict[str, Look] | None = None):
    """A function from a case's row number in `scans` to its `case_data`."""

    def answer(place: int) -> tuple[dict[str, Any], Arrays]:
        scan = scans.iloc[place]
        return case_data(scan, how, (looks or {}).get(scan["case_id"]))

    return answer


def on_page(scan: pd.Series, how: Preprocessing, look: Look | None = None) -> dict[str, Any]:
    """`case_data` for a page, cut to `VOXELS` and packed."""
    about, arrays = case_data(scan, how, look, VOXELS)
    return about | {"arrays": packed(arrays)}


def case_data(
    scan: pd.Series, how: Preprocessing, look: Look | None = None, most: int | None = None
) -> tuple[dict[str, Any], Arrays]:
    """A case for the viewer; lists have one entry per axis: to the patient's right, front, head (RAS+).

    The image is as stored. With `most`, it is in bytes between its percentiles 1 and 99.5, and an image with
    more voxels is cut to the pancreas with MARGIN mm around it and averaged in blocks. `inside` has one bit
    per voxel. Of a scan that cannot be read only the reason, `wrong`.
    """
    try:
        case = open_case(scan, how)
    except ScanError as error:
        return {"wrong": str(error)}, {}
    spacing, shape = np.array(case.image.header.get_zooms()[:3], float), case.image.shape
    cut, step = framing(shape, spacing, case.box, most or np.inf)
    (low, high), voxels, scale = case.window, np.asanyarray(case.image.dataobj), [0.0, 1.0]
    if most:
        voxels, scale = averaged(windowed(voxels, low, high)[cut], step), [low, (high - low) / 255]
    elif voxels.dtype.name not in STORED:
        voxels = voxels.astype(np.float32)
    arrays, inside = {"voxels": voxels, "cube": windowed(np.float32(case.cube), *case.cube_window)}, voxels
    if case.mask is not None:
        inside = averaged(case.mask[cut], step).astype(bool)
        arrays["inside"] = np.packbits(inside.ravel("F"), bitorder="little")
    if look is not None:
        _, heat, lesion, _ = gradcam.canonical(look)
        maps = {"heat": heat, "lesion": lesion}
        arrays |= {name: windowed(values, 0, 1) for name, values in maps.items() if values is not None}
    about = {
        "facts": list(_facts(case, look, cut, step).items()),
        "whole": list(shape),
        "spacing": spacing.tolist(),
        "start": [side.start for side in cut],
        "step": list(step),
        "shape": list(voxels.shape),
        "box": [[side.start, side.stop - side.start] for side in case.box],
        "at": middle(inside),
        "window": [low, high],
        "scale": scale,  # stored value of a voxel: scale[0] + scale[1] * voxel
    }
    return about, arrays


def _facts(case: Case, look: Look | None, cut: tuple[slice, ...], step: Sequence[int]) -> dict[str, str]:
    """What the viewer tells of a case; no text fields of the header, which may name a patient."""
    header, (low, high) = headers.header_of(case.scan["image"]), case.cube_window
    affine, doubts = headers.place(header)
    spacing = " × ".join(f"{mm:.2f}" for mm in header.get_zooms()[:3])
    try:
        units, _ = header.get_xyzt_units()
    except KeyError:  # a code that NIfTI lacks
        units = "unknown"
    whole = cut == tuple(slice(0, n) for n in case.image.shape)
    part = "the whole image" if whole else f"the ROI and {MARGIN} mm around it"
    means = f", means of {' × '.join(map(str, step))} voxels" if max(step) > 1 else ""
    facts = {
        "case": f"{case.scan['center']} {case.scan['case_id']}, {display_name(case.scan['modality'])}",
        "class": case.scan["class"],
        "stored": f"{' × '.join(map(str, header.get_data_shape()))} voxels, {header.get_data_dtype()}",
        "voxel": f"{spacing} mm",
        "axes": headers.axes_of(affine),
        "ROI": f"{' × '.join(map(str, case.roi.shape))} voxels (canonical)",
        "cube": f"{len(case.cube)}^3 voxels, values {low:.3g} to {high:.3g}",
        "units": units,
        "mask": "a separate file" if case.scan["mask"] else "none: a clean ROI",
        "shown": part + means,
    }
    if doubts:
        facts["in doubt"] = "; ".join(problem for _, problem, _ in doubts)
    if look is not None:
        lesion = "n/a" if look.lesion is None else f"{look.share:.2f}, {look.expected:.2f} expected"
        facts["Grad-CAM of"] = f"{look.classes[-1]}, probability {look.prob:.2f}"
        facts["on the lesion"] = lesion
    return facts


def windowed(volume: np.ndarray, low: float, high: float) -> np.ndarray:
    """The volume as bytes (uint8): 0 at `low` and below, 255 at `high` and above, rounded in between."""
    span = max(high - low, np.finfo(np.float32).tiny)  # an ROI may be nearly all background
    return np.uint8(np.rint(np.clip((volume - low) / span, 0, 1) * 255))


def framing(shape, spacing: np.ndarray, box, most: float) -> tuple[tuple[slice, ...], tuple[int, ...]]:
    """The part of a volume to show (one slice per axis) and the number of voxels to average along each axis.

    The whole volume if it has at most `most` voxels. Otherwise `box` and MARGIN mm around it, averaged in the
    smallest sufficient blocks, as cubic as possible (spacing in mm).
    """
    if np.prod(shape) <= most:
        return tuple(slice(0, n) for n in shape), (1, 1, 1)
    sides = zip(box, np.ceil(MARGIN / spacing).astype(int).tolist(), shape, strict=True)
    cut = tuple(slice(max(side.start - more, 0), min(side.stop + more, n)) for side, more, n in sides)
    length, mm = np.array([side.stop - side.start for side in cut]), spacing.min()
    while True:
        step = np.clip(np.floor(mm / spacing).astype(int), 1, length)
        if np.prod(length // step) <= most:
            return cut, tuple(map(int, step))
        mm *= 1.05


def averaged(volume: np.ndarray, step: tuple[int, ...]) -> np.ndarray:
    """Means of blocks of `step` voxels, rounded (halves to even), uint8; incomplete blocks are left out."""
    if max(step) == 1:
        return volume
    length = [n // s for n, s in zip(volume.shape, step, strict=True)]
    whole = volume[tuple(slice(0, n * s) for n, s in zip(length, step, strict=True))]
    blocks = whole.reshape([n for pair in zip(length, step, strict=True) for n in pair])
    return np.uint8(np.rint(blocks.mean(axis=(1, 3, 5))))
