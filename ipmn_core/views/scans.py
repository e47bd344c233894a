"""Figures of scans: slices as radiologists see them, the ROI, the cube, a prediction with its ROI."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass

import matplotlib.pyplot as plt
import nibabel as nib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ipmn_core.data import bounding_box, read_scan, to_cube
from ipmn_core.names import display_name
from ipmn_core.params import Preprocessing
from ipmn_core.views.style import PALETTE, SMALL, centers_in, short

AXES = {"axial": 2, "coronal": 1, "sagittal": 0}  # the axis perpendicular to a plane, in RAS+
HEAT = plt.get_cmap("magma")  # perceptually ordered, and unlike the blue outline of the lesion
OPACITY = 0.75  # of a heat map at 1; at 0 it is transparent
EDGES = {"axial": "RLAP", "coronal": "RLHF", "sagittal": "APHF"}  # left, right, top, bottom


def scan_volumes(scan, how: Preprocessing | None = None):
    """Whole image, mask (X, Y, Z) bool and clean ROI of a cohort row, in canonical (RAS+) orientation.

    Without a mask the clean ROI is also the image. Only the ROI is resampled, if `how` says so. Raises
    ScanError as `data.read_scan`.
    """
    found = read_scan(scan["image"], scan["mask"], scan["case_id"], how)
    image, roi = map(nib.as_closest_canonical, (found.image, found.roi))
    if found.mask is None:
        return image, None, roi
    return image, nib.apply_orientation(found.mask, nib.io_orientation(found.image.affine)), roi


@dataclass(frozen=True)
class Case:
    """One scan to show, in canonical (RAS+) orientation.

    `roi` fills `box` of `image`; `cube` (S, S, S) is the network's input.
    """

    scan: pd.Series
    image: nib.Nifti1Image
    mask: np.ndarray | None
    roi: nib.Nifti1Image
    cube: np.ndarray
    box: tuple[slice, slice, slice]

    @property
    def window(self) -> tuple[float, float]:
        """Stored values shown black and white: percentiles 1 and 99.5 of about 2^18 voxels of the image."""
        voxels = np.asanyarray(self.image.dataobj).ravel("K")
        low, high = np.percentile(voxels[:: max(1, voxels.size // 2**18)], (1, 99.5))
        return float(low), float(high)

    @property
    def cube_window(self) -> tuple[float, float]:
        """Values of the cube shown black and white: 0 and 1, or the cube's limits if they are beyond."""
        return min(0.0, float(self.cube.min())), max(1.0, float(self.cube.max()))


def open_case(scan: pd.Series, how: Preprocessing) -> Case:
    """Open a cohort row, with its cube made as `how` says. Raises ScanError as `data.read_scan`."""
    image, mask, roi = scan_volumes(scan, how)
    box = bounding_box(np.ones(image.shape) if mask is None else mask)
    return Case(scan, image, mask, roi, to_cube(np.asanyarray(roi.dataobj), how.size, how.intensity), box)


def middle(inside: np.ndarray) -> list[int]:
    """The voxel to show first: in the widest axial slice, the inside voxel nearest to the center."""
    inside = inside if inside.any() else np.ones_like(inside)  # averaging may empty a thin mask
    k = widest_slice(inside)
    plane = np.argwhere(inside[:, :, k])
    i, j = plane[np.square(plane - plane.mean(axis=0)).sum(axis=1).argmin()]
    return [int(i), int(j), k]


def section(volume: np.ndarray, plane: str, k: int) -> np.ndarray:
    """Slice `k` of a canonical volume as rows from below: patient's right, or front, on the left."""
    return np.moveaxis(volume, AXES[plane], 0)[k][::-1].T


def show_slice(
    ax: Axes,
    image: nib.Nifti1Image,
    k: int,
    mask: np.ndarray | None = None,
    plane: str = "axial",
    window: tuple[float, float] | None = None,
    color: str = PALETTE[1],
) -> Axes:
    """Slice `k` of a canonical image as radiologists see it, in mm aspect, with `mask` >= 0.5 outlined.

    `window` gives the stored values shown black and white (default: the image's percentiles 1 and 99.5).
    """
    data, spacing = np.asanyarray(image.dataobj), image.header.get_zooms()
    across, up = (axis for axis in range(3) if axis != AXES[plane])
    low, high = window or np.percentile(data, (1, 99.5))
    look = {"cmap": "gray", "origin": "lower", "aspect": spacing[up] / spacing[across]}
    ax.imshow(section(data, plane, k), vmin=low, vmax=high, **look)
    if mask is not None and (section(mask, plane, k) >= 0.5).any():
        ax.contour(section(mask, plane, k), levels=[0.5], colors=[color], linewidths=1.2)
    ax.set_axis_off()
    return ax


def widest_slice(mask: np.ndarray) -> int:
    """Index of the axial slice with the most voxels of the mask (X, Y, Z)."""
    return int((np.asarray(mask) != 0).sum(axis=(0, 1)).argmax())


def pairs(n: int, most: int, width: float, heights: tuple[float, float]):
    """A figure for `n` pairs of pictures, one above the other, at most `most` across; axes (above, below)."""
    down = -(-n // most)
    across = -(-n // down)
    rows = {"squeeze": False, "height_ratios": heights * down}
    figure, axes = plt.subplots(2 * down, across, figsize=(width * across, sum(heights) * down), **rows)
    for ax in axes.flat:
        ax.set_axis_off()
    return figure, axes.reshape(down, 2, across).swapaxes(1, 2).reshape(-1, 2).tolist()[:n]


def center_gallery(scans: pd.DataFrame, modality: str = "t2") -> Figure:
    """Figure 1 of the paper: for each center a scan with its ROI outlined, and the cropped ROI below it.

    Shows each center's first case of the last class, or else its first case.
    """
    chosen, label = scans[scans["modality"] == modality], scans["label"].max()
    centers = centers_in(chosen["center"])
    figure, axes = pairs(len(centers), 8, 1.75, (1.74, 1.16))
    for center, (above, below) in zip(centers, axes, strict=True):
        cases = chosen[chosen["center"] == center]
        scan = cases.sort_values("label", key=lambda v: v != label, kind="stable").iloc[0]
        image, mask, roi = scan_volumes(scan)
        show_slice(above, image, widest_slice(mask if mask is not None else image.dataobj), mask)
        show_slice(below, roi, widest_slice(roi.dataobj))
        case = textwrap.fill(f"{scan['case_id']}, {scan['class']}", 30)
        above.set_title(f"{short(center)}\n{case}", fontsize=SMALL)
    title = f"{display_name(modality)}: mask outlined (above), masked and cropped ROI (below)"
    figure.suptitle(title, fontsize=10)
    return figure


def slices(scan) -> Figure:
    """All axial slices of the clean ROI of a cohort row, from foot to head."""
    _, _, roi = scan_volumes(scan)
    depth, columns = roi.shape[2], 8
    rows = -(-depth // columns)
    figure = plt.figure(figsize=(1.3 * columns, 0.75 * rows + 0.3))
    for k in range(depth):
        show_slice(figure.add_subplot(rows, columns, k + 1), roi, k)
    title = f"{scan['center']} {scan['case_id']}, {display_name(scan['modality'])}, {scan['class']}"
    figure.suptitle(title, fontsize=9)
    return figure


def roi_and_cube(scan, cube: np.ndarray, how: Preprocessing | None = None) -> Figure:
    """The clean ROI of a cohort row (left, mm aspect) and its cube (S, S, S) for a network (right)."""
    stored = read_scan(scan["image"], scan["mask"], scan["case_id"], how).roi
    roi, turn = nib.as_closest_canonical(stored), nib.io_orientation(stored.affine)
    figure, (left, right) = plt.subplots(1, 2, figsize=(6, 2.6))
    show_slice(left, roi, widest_slice(roi.dataobj))
    left.set_title(f"ROI, {' x '.join(map(str, roi.shape))} voxels")
    shown = nib.Nifti1Image(nib.apply_orientation(cube.astype(np.float32), turn), np.eye(4))
    show_slice(right, shown, widest_slice(shown.dataobj))
    right.set_title(f"cube, {' x '.join(map(str, cube.shape))} voxels")
    return figure


def three_planes(case: Case, position: Sequence[int]) -> Figure:
    """The image at voxel `position` in three planes and, below, the same place in the cube."""
    cube, size = nib.Nifti1Image(case.cube.astype(np.float32), np.eye(4)), len(case.cube)
    start, length = np.array([(side.start, side.stop - side.start) for side in case.box]).T
    within = (np.array(position) - start + 0.5) * size / length
    within = np.clip(within, 0, size - 1).astype(int)  # the nearest voxel for a place outside the cube
    rows = [
        ("image", case.image, case.mask, case.window, position),
        ("cube", cube, None, case.cube_window, within),
    ]
    figure, axes = plt.subplots(2, 3, figsize=(9, 5.2))
    for row, (name, image, mask, window, at) in zip(axes, rows, strict=True):
        for ax, plane in zip(row, AXES, strict=True):
            k = at[AXES[plane]]
            _cross_hair(show_slice(ax, image, k, mask, plane, window), image.shape, plane, at)
            ax.set_title(f"{name}, {plane}, slice {k + 1} of {image.shape[AXES[plane]]}")
    return figure


def _cross_hair(ax: Axes, shape: Sequence[int], plane: str, position: Sequence[int]) -> None:
    """Draw the other two planes as lines, and letters for left, right, front, back, head and foot."""
    across, up = (axis for axis in range(3) if axis != AXES[plane])
    line = {"color": PALETTE[5], "linewidth": 0.7}
    ax.axvline(shape[across] - 1 - position[across], **line)
    ax.axhline(position[up], **line)
    look = {"color": PALETTE[1], "fontsize": SMALL, "ha": "center", "va": "center"}
    for letter, at in zip(EDGES[plane], [(0.03, 0.5), (0.97, 0.5), (0.5, 0.95), (0.5, 0.05)], strict=True):
        ax.text(*at, letter, transform=ax.transAxes, **look)


def prediction(result, roi: nib.Nifti1Image) -> Figure:
    """The widest slice of an ROI (`data.load_roi`) and, for each class, a bar (mean) and one dot per model.

    `result` is a `predict.Prediction`; its `folds` have one row per model and one column per class.
    """
    classes = [name for name in result.folds if name not in ("model", "weights")]
    roi = nib.as_closest_canonical(roi)
    figure, (left, right) = plt.subplots(1, 2, figsize=(7, 2.6), layout="constrained")
    show_slice(left, roi, widest_slice(roi.dataobj))
    left.set_title(f"{result.case}, ROI")
    prob = result.folds[classes]
    right.barh(classes, prob.mean(), color=PALETTE[5])
    for k, name in enumerate(classes):
        right.plot(prob[name], np.full(len(prob), k), "o", ms=4, color=PALETTE[0], alpha=0.7)
    right.set(xlim=(0, 1), xlabel=f"probability: mean (bar) of {len(prob)} model(s) (dots)")
    figure.suptitle("Not for clinical use: a research model without external validation.", fontsize=8)
    return figure
