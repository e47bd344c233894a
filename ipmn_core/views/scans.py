"""Figures of scans: slices as radiologists see them, the ROI, the cube; a prediction beside its ROI."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import matplotlib.pyplot as plt
import nibabel as nib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ipmn_core.data import bounding_box, check_range, crop, headers, load_image, load_mask, to_cube
from ipmn_core.names import LABELS, class_names
from ipmn_core.views.style import PALETTE, centers_in

AXES = {"axial": 2, "coronal": 1, "sagittal": 0}  # what a plane is perpendicular to, in RAS+
HEAT = plt.get_cmap("magma")  # perceptually ordered, and nowhere as blue as the lesion's outline
OPACITY = 0.75  # of a heat map where it is 1; where it is 0 the image shows as it is
EDGES = {"axial": "RLAP", "coronal": "RLHF", "sagittal": "APHF"}  # left, right, top, bottom


def scan_volumes(scan) -> tuple[nib.Nifti1Image, np.ndarray | None, nib.Nifti1Image]:
    """Whole image, mask (X, Y, Z) bool and clean ROI of a cohort row, in canonical (RAS+) orientation.

    A clean ROI of the first release has no whole image: it is both, and the mask is None.
    """
    image = load_image(scan["image"], scan["case_id"])
    if not scan["mask"]:
        image = nib.as_closest_canonical(image)
        return image, None, image
    mask = load_mask(scan["mask"], image.shape, scan["case_id"])
    labels = nib.as_closest_canonical(nib.Nifti1Image(mask.astype(np.uint8), image.affine))
    image, mask = nib.as_closest_canonical(image), np.asanyarray(labels.dataobj).astype(bool)
    return image, mask, crop(image, mask)


@dataclass(frozen=True)
class Case:
    """One scan opened for looking, in canonical (RAS+) orientation.

    `roi` begins at voxel `first` of `image`; `cube` (S, S, S) in [0, 1] is what a network gets of it.
    """

    scan: pd.Series
    image: nib.Nifti1Image
    mask: np.ndarray | None
    roi: nib.Nifti1Image
    cube: np.ndarray
    first: tuple[int, int, int]


def open_case(scan: pd.Series, size: int) -> Case:
    """A cohort row's image, mask, ROI and its cube of edge `size`, all in canonical orientation.

    Raises ScanError as `preprocess.load_roi`.
    """
    image, mask, roi = scan_volumes(scan)
    check_range(np.asanyarray(roi.dataobj), scan["image"], scan["case_id"])
    first = (0, 0, 0) if mask is None else tuple(side.start for side in bounding_box(mask))
    return Case(scan, image, mask, roi, to_cube(np.asanyarray(roi.dataobj), size), first)


def in_cube(case: Case, position: Sequence[int]) -> list[int]:
    """Voxel of the cube that holds a voxel of the image, the nearest one if it is outside."""
    ends = [(start, n, case.cube.shape[0]) for start, n in zip(case.first, case.roi.shape, strict=True)]
    return [
        int(np.clip((at - start + 0.5) * size / n, 0, size - 1))
        for at, (start, n, size) in zip(position, ends, strict=True)
    ]


def middle(case: Case) -> list[int]:
    """Voxel of the image to show first: the middle of the pancreas in its widest axial slice."""
    inside = np.asanyarray(case.roi.dataobj) != 0 if case.mask is None else case.mask
    k = widest_slice(inside)
    return [*(int(v) for v in np.argwhere(inside[:, :, k]).mean(axis=0).round()), k]


def section(volume: np.ndarray, plane: str, k: int) -> np.ndarray:
    """Slice `k` of a canonical volume as rows from below: patient's right, or front, on the left."""
    return np.moveaxis(volume, AXES[plane], 0)[k][::-1].T  # a view: np.take would copy the whole volume


def show_plane(
    ax: Axes, volume: np.ndarray, spacing: Sequence[float], plane: str, position: Sequence[int], **style
) -> Axes:
    """The slice of a canonical `volume` through voxel `position`, with its cross-hair, in mm aspect.

    `spacing` (3,) mm; `style` goes to `imshow`, for instance vmin and vmax.
    """
    across, up = (axis for axis in range(3) if axis != AXES[plane])
    flat = section(volume, plane, position[AXES[plane]])
    ax.imshow(flat, cmap="gray", origin="lower", aspect=spacing[up] / spacing[across], **style)
    line = {"color": PALETTE[5], "linewidth": 0.7}
    ax.axvline(volume.shape[across] - 1 - position[across], **line)
    ax.axhline(position[up], **line)
    left, right, top, bottom = EDGES[plane]
    for letter, x, y in ((left, 0.03, 0.5), (right, 0.97, 0.5), (top, 0.5, 0.95), (bottom, 0.5, 0.05)):
        ax.text(x, y, letter, color=PALETTE[1], fontsize=8, ha="center", va="center", transform=ax.transAxes)
    ax.set(xticks=[], yticks=[])  # an axis that is off still makes its ticks
    ax.set_axis_off()
    return ax


def show_slice(ax: Axes, image: nib.Nifti1Image, k: int, mask: np.ndarray | None = None) -> Axes:
    """Axial slice `k` as radiologists see it (patient's right on the left), the mask outlined; mm aspect."""
    data = np.asanyarray(image.dataobj)[:, :, k]
    dx, dy = image.header.get_zooms()[:2]
    low, high = np.percentile(np.asanyarray(image.dataobj), (1, 99.5))
    ax.imshow(data[::-1].T, cmap="gray", origin="lower", aspect=dy / dx, vmin=low, vmax=high)
    if mask is not None and mask[:, :, k].any():
        ax.contour(mask[::-1, :, k].T, levels=[0.5], colors=[PALETTE[1]], linewidths=1.2)
    ax.set_axis_off()
    return ax


def widest_slice(mask: np.ndarray) -> int:
    """Index of the axial slice in which the mask (X, Y, Z) covers most voxels."""
    return int((np.asarray(mask) != 0).sum(axis=(0, 1)).argmax())


def center_gallery(scans: pd.DataFrame, modality: str = "t2", label: int = 2) -> Figure:
    """Figure 1 of the paper: for each center a scan with its ROI outlined, and the cropped ROI below it.

    Of each center the first case of class `label`, or its first case where there is none.
    """
    chosen = scans[scans["modality"] == modality]
    centers = centers_in(chosen["center"])
    figure, axes = plt.subplots(
        2, len(centers), figsize=(1.75 * len(centers), 2.9), squeeze=False, height_ratios=(3, 2)
    )
    for center, (above, below) in zip(centers, axes.T, strict=True):
        rows = chosen[chosen["center"] == center]
        scan = rows.sort_values("label", key=lambda v: v != label, kind="stable").iloc[0]
        image, mask, roi = scan_volumes(scan)
        show_slice(above, image, widest_slice(mask if mask is not None else image.dataobj), mask)
        show_slice(below, roi, widest_slice(roi.dataobj))
        above.set_title(f"{center}\n{scan['case_id']}, {LABELS[scan['label']]}", fontsize=8, parse_math=False)
    figure.suptitle(
        f"{modality.upper()}: pancreas outlined (above), masked and cropped ROI (below)", fontsize=10
    )
    return figure


def slices(scan) -> Figure:
    """All axial slices of the clean ROI of a cohort row, from foot to head."""
    _, _, roi = scan_volumes(scan)
    depth, columns = roi.shape[2], 8
    rows = -(-depth // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(1.3 * columns, 0.75 * rows + 0.3), squeeze=False)
    for ax in axes.flat:
        ax.set_axis_off()
    for k, ax in enumerate(axes.flat[:depth]):
        show_slice(ax, roi, k)
    title = f"{scan['center']} {scan['case_id']}, {scan['modality'].upper()}, {LABELS[scan['label']]}"
    figure.suptitle(title, fontsize=9, parse_math=False)
    return figure


def roi_and_cube(scan, cube: np.ndarray) -> Figure:
    """The clean ROI of a cohort row (left, mm aspect) beside its cube (S, S, S) for a network."""
    _, _, roi = scan_volumes(scan)
    figure, (left, right) = plt.subplots(1, 2, figsize=(6, 2.6))
    show_slice(left, roi, widest_slice(roi.dataobj))
    left.set_title(f"ROI, {' x '.join(map(str, roi.shape))} voxels")
    # a cube keeps the stored axes, the eye wants RAS+
    turn = nib.io_orientation(headers.placing(nib.load(scan["image"]).affine))
    shown = nib.Nifti1Image(nib.apply_orientation(cube.astype(np.float32), turn), np.eye(4))
    show_slice(right, shown, widest_slice(shown.dataobj))
    right.set_title(f"cube, {' x '.join(map(str, cube.shape))} voxels")
    return figure


def three_planes(
    case: Case,
    position: Sequence[int],
    window: tuple[float, float] | None = None,
    outline: bool = True,
    near: bool = False,
    heat: np.ndarray | None = None,
    lesion: np.ndarray | None = None,
) -> Figure:
    """The image through voxel `position` in three planes and, below, the same place in the cube.

    `window` gives the stored values shown black and white; `near` shows the pancreas' surroundings only;
    `heat` and `lesion` (share of each voxel), (S, S, S) in [0, 1] and canonical, are drawn over the cube.
    """
    figure = Figure(figsize=(9, 5.2), layout="none")
    axes = figure.subplots(
        2, 3, gridspec_kw={"left": 0, "right": 1, "bottom": 0, "top": 0.95, "hspace": 0.14, "wspace": 0.02}
    )
    low, high = window or window_of(case)
    spacing, data = case.image.header.get_zooms()[:3], np.asanyarray(case.image.dataobj)
    for ax, plane in zip(axes[0], AXES, strict=True):
        show_plane(ax, data, spacing, plane, position, vmin=low, vmax=high)
        _outline(ax, case.mask if outline else None, plane, position[AXES[plane]])
        if near:
            _zoom(ax, case, plane)
        k, n = position[AXES[plane]] + 1, case.image.shape[AXES[plane]]
        ax.set_title(f"image, {plane}, slice {k} of {n}", fontsize=9)
    within = in_cube(case, position)
    for ax, plane in zip(axes[1], AXES, strict=True):
        show_plane(ax, case.cube.astype(np.float32), (1, 1, 1), plane, within, vmin=0, vmax=1)
        k = within[AXES[plane]]
        show_heat(ax, *(None if v is None else section(v, plane, k) for v in (heat, lesion)))
        ax.set_title(f"cube, {plane}, slice {k + 1} of {len(case.cube)}", fontsize=9)
    return figure


def window_of(case: Case) -> tuple[float, float]:
    """Stored values to show black and white: the 1st and 99.5th percentile of the image."""
    low, high = np.percentile(np.asanyarray(case.image.dataobj), (1, 99.5))
    return float(low), float(high)


def _outline(ax: Axes, mask: np.ndarray | None, plane: str, k: int) -> None:
    if mask is not None and (inside := section(mask, plane, k)).any():
        ax.contour(inside, levels=[0.5], colors=[PALETTE[1]], linewidths=1)


def _zoom(ax: Axes, case: Case, plane: str, margin: float = 12.0) -> None:
    """Limit the axes to the ROI and `margin` mm around it."""
    across, up = (axis for axis in range(3) if axis != AXES[plane])
    n = np.array(case.image.shape)
    more = margin / np.array(case.image.header.get_zooms())
    low, high = np.maximum(case.first - more, 0), np.minimum(case.first + np.array(case.roi.shape) + more, n)
    ax.set(xlim=(n[across] - high[across] - 0.5, n[across] - low[across] - 0.5))
    ax.set(ylim=(low[up] - 0.5, high[up] - 0.5))


def show_heat(ax: Axes, heat: np.ndarray | None, lesion: np.ndarray | None) -> None:
    """Draw a heat map and the lesion's outline, as `section` cuts them, over the slice of a cube on `ax`."""
    if heat is not None:
        over = HEAT(heat)
        over[..., 3] = OPACITY * heat
        ax.imshow(over, origin="lower", aspect=ax.get_aspect(), interpolation="bilinear")
    if lesion is not None and lesion.min() < 0.5 <= lesion.max():
        ax.contour(lesion, levels=[0.5], colors=[PALETTE[5]], linewidths=1.4)


def prediction(result, roi: nib.Nifti1Image) -> Figure:
    """The widest slice of an ROI (`data.load_roi`) and, for each class, a bar (mean) and one dot per model.

    `result` is a `predict.Prediction`: `case`, `task` and `folds`, a row per model, a column per class.
    """
    classes, roi = list(class_names(result.task)), nib.as_closest_canonical(roi)
    figure, (left, right) = plt.subplots(1, 2, figsize=(7, 2.6), layout="constrained")
    show_slice(left, roi, widest_slice(roi.dataobj))
    left.set_title(f"{result.case}, ROI", parse_math=False)
    prob = result.folds[classes]
    right.barh(classes, prob.mean(), color=PALETTE[5])
    for k, name in enumerate(classes):
        right.plot(prob[name], np.full(len(prob), k), "o", ms=4, color=PALETTE[0], alpha=0.7)
    right.set(xlim=(0, 1), xlabel=f"probability: mean (bar) of {len(prob)} model(s) (dots)")
    figure.suptitle("Not for clinical use: a research model without external validation.", fontsize=8)
    return figure


def header_facts(case: Case) -> dict[str, str]:
    """Facts of the file's header: name -> text."""
    stored = nib.load(case.scan["image"])
    spacing = " × ".join(f"{mm:.2f}" for mm in stored.header.get_zooms()[:3])
    roi = " × ".join(map(str, case.roi.shape))
    return {
        "case": f"{case.scan['center']} {case.scan['case_id']}, {case.scan['modality'].upper()}",
        "class": LABELS[case.scan["label"]],
        "stored": f"{' × '.join(map(str, stored.shape))} voxels, {stored.get_data_dtype()}",
        "voxel": f"{spacing} mm",
        "axes": "".join(nib.aff2axcodes(headers.placing(stored.affine))),
        "ROI": f"{roi} voxels (canonical)",
        "cube": f"{len(case.cube)}^3 voxels, scaled to 0-1",
    }
