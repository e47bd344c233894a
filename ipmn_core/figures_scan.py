"""Static figures of scans: slices as radiologists see them, the ROI, the cube; figures are returned."""

from __future__ import annotations

import matplotlib.pyplot as plt
import nibabel as nib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ipmn_core.cohort import CENTERS, LABELS
from ipmn_core.figures import PALETTE
from ipmn_core.preprocess import crop, load_image, load_mask


def scan_volumes(scan) -> tuple[nib.Nifti1Image, np.ndarray | None, nib.Nifti1Image]:
    """Whole image, mask (X, Y, Z) bool and clean ROI of a cohort row, in canonical (RAS+) orientation.

    A clean ROI of the first release has no whole image: it stands for both, and the mask is None.
    """
    image = load_image(scan["image"], scan["case_id"])
    if not scan["mask"]:
        image = nib.as_closest_canonical(image)
        return image, None, image
    mask = load_mask(scan["mask"], image.shape, scan["case_id"])
    labels = nib.as_closest_canonical(nib.Nifti1Image(mask.astype(np.uint8), image.affine))
    image, mask = nib.as_closest_canonical(image), np.asanyarray(labels.dataobj).astype(bool)
    return image, mask, nib.Nifti1Image(*crop(np.asanyarray(image.dataobj), image.affine, mask))


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
    """The axial slice in which the mask (X, Y, Z) covers most voxels."""
    return int((np.asarray(mask) != 0).sum(axis=(0, 1)).argmax())


def center_gallery(scans: pd.DataFrame, modality: str = "t2", label: int = 2) -> Figure:
    """Figure 1 of the paper: for each center a scan with its ROI outlined, and the cropped ROI below it.

    The first case of class `label` stands for its center, or the first of all where there is none.
    """
    chosen = scans[scans["modality"] == modality]
    centers = [c for c in CENTERS if (chosen["center"] == c).any()]
    figure, axes = plt.subplots(
        2, len(centers), figsize=(1.75 * len(centers), 2.9), squeeze=False, height_ratios=(3, 2)
    )
    for center, (above, below) in zip(centers, axes.T, strict=True):
        rows = chosen[chosen["center"] == center]
        scan = rows.sort_values("label", key=lambda v: v != label, kind="stable").iloc[0]
        image, mask, roi = scan_volumes(scan)
        show_slice(above, image, widest_slice(mask if mask is not None else image.dataobj), mask)
        show_slice(below, roi, widest_slice(roi.dataobj))
        above.set_title(f"{center}\n{scan['case_id']}, {LABELS[scan['label']]}", fontsize=8)
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
    figure.suptitle(
        f"{scan['center']} {scan['case_id']}, {scan['modality'].upper()}, {LABELS[scan['label']]}", fontsize=9
    )
    return figure


def roi_and_cube(scan, cube: np.ndarray) -> Figure:
    """The clean ROI of a cohort row (left, mm aspect) beside its cube (S, S, S) for a network."""
    _, _, roi = scan_volumes(scan)
    figure, (left, right) = plt.subplots(1, 2, figsize=(6, 2.6))
    show_slice(left, roi, widest_slice(roi.dataobj))
    left.set_title(f"ROI, {' x '.join(map(str, roi.shape))} voxels")
    turn = nib.io_orientation(
        nib.load(scan["image"]).affine
    )  # a cube keeps the stored axes, the eye wants RAS+
    shown = nib.Nifti1Image(nib.apply_orientation(cube.astype(np.float32), turn), np.eye(4))
    show_slice(right, shown, widest_slice(shown.dataobj))
    right.set_title(f"cube, {' x '.join(map(str, cube.shape))} voxels")
    return figure
