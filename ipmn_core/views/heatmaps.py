"""Static figures of Grad-CAM: the cube as a network sees it, its heat map over it, the lesion outlined."""

from __future__ import annotations

from collections.abc import Sequence

import matplotlib.pyplot as plt
import nibabel as nib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ipmn_core.names import LABELS, class_names
from ipmn_core.views.attention import Look
from ipmn_core.views.planes import HEAT, show_heat


def overlay(
    ax: Axes,
    image: np.ndarray,
    heat: np.ndarray | None = None,
    lesion: np.ndarray | None = None,
    aspect: float = 1.0,
) -> Axes:
    """A slice of a cube in [0, 1], its heat map over it and the lesion's outline, as radiologists see it.

    All three (A, B), of arrays in canonical (RAS+) orientation: [:, :, k] is axial, [:, k] coronal and [k]
    sagittal; the patient's right, or front, comes to lie on the left. `aspect`: mm along B over mm along A.
    """
    ax.imshow(image[::-1].T, cmap="gray", origin="lower", aspect=aspect, vmin=0, vmax=_white(image))
    show_heat(ax, *(None if cut is None else cut[::-1].T for cut in (heat, lesion)))
    ax.set_axis_off()
    return ax


def _white(image: np.ndarray) -> float:
    return float(np.percentile(image, 99.5)) or 1.0


def canonical(look: Look) -> tuple[np.ndarray, np.ndarray, np.ndarray | None, np.ndarray]:
    """Cube, heat map, lesion (or None), each (S, S, S) in RAS+ orientation, and a voxel's size (3,) in mm."""
    turned = [
        None if volume is None else nib.apply_orientation(volume, look.turn)
        for volume in (look.cube, look.heat, look.lesion)
    ]
    mm = np.empty(3)
    mm[look.turn[:, 0].astype(int)] = look.mm
    return (*turned, mm)


def by_class(looks: Sequence[Look]) -> Figure:
    """A column for one case of each risk class: the axial slice as the network sees it, and with Grad-CAM.

    Of each class the case whose lesion is of median size among those with one, or the first of all: chosen
    by what is there, not by where the network looks. The slice with most lesion or, where none is known, with
    most attention on the pancreas; the lesion is outlined. Raises ValueError for no `looks`.
    """
    shown = [_example(looks, label) for label in sorted({look.label for look in looks})]
    if not shown:
        raise ValueError("no case to show: pass what `attention.of_run` gives")
    figure, axes = plt.subplots(2, len(shown), figsize=(0.5 + 2.7 * len(shown), 3.6), squeeze=False)
    for look, (above, below) in zip(shown, axes.T, strict=True):
        cube, heat, lesion, mm = canonical(look)
        k = int(_where(look, cube, heat, lesion).argmax())
        cut = [cube[:, :, k], heat[:, :, k], None if lesion is None else lesion[:, :, k]]
        overlay(above, cut[0], None, cut[2], mm[1] / mm[0])
        overlay(below, *cut, mm[1] / mm[0])
        above.set_title(title(look), fontsize=8, parse_math=False)
        below.set_title(in_words(look), fontsize=8)
    scale = plt.cm.ScalarMappable(plt.Normalize(0, 1), HEAT)
    figure.colorbar(scale, ax=axes[1], label="Grad-CAM (0 to 1)", pad=0.01)
    asked = list(class_names(shown[0].task))[shown[0].asked]
    figure.suptitle(f"Grad-CAM of “{asked}”, layer {shown[0].layer}", fontsize=10)
    return figure


def _example(looks: Sequence[Look], label: int) -> Look:
    of_class = [look for look in looks if look.label == label]
    found = sorted((look for look in of_class if look.expected > 0), key=lambda look: look.expected)
    return found[len(found) // 2] if found else of_class[0]


def _where(look: Look, cube: np.ndarray, heat: np.ndarray, lesion: np.ndarray | None) -> np.ndarray:
    """How much each axial slice (S,) holds of the lesion or, without one, of attention on the pancreas."""
    found = lesion is not None and look.expected > 0
    return (lesion if found else heat * (cube > 0)).sum(axis=(0, 1))


def title(look: Look) -> str:
    """Case, class and probability of the class asked, on two lines."""
    asked = list(class_names(look.task))[look.asked]
    return f"{look.center} {look.case_id}: {LABELS[look.label]}\nprobability of {asked} {look.prob:.2f}"


def in_words(look: Look) -> str:
    """The share of attention inside the lesion, beside the share expected; or why there is none."""
    if look.lesion is None:
        return f"{look.in_pancreas:.0%} of attention on the pancreas"
    if not look.expected > 0:
        return "no lesion in this scan"
    if np.isnan(look.share):
        return "no attention on the pancreas"
    return f"attention in the lesion {look.share:.1%}\nexpected {look.expected:.1%}, ratio {look.ratio:.2f}"
