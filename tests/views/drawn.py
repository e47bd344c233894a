"""What the tests of figures and views share: eyes for a figure, and a scan stored in any orientation."""

import itertools
from unittest import mock

import nibabel as nib
import numpy as np
import pandas as pd
from matplotlib.text import Text

from ipmn_core.views import style

ORIENTATIONS = ["RAS", "LPS", "SAR", "PIR"]
MM = (0.8, 1.3, 5.0)  # to the right, to the front, to the head


def titles(figure):
    return [ax.get_title() for ax in figure.axes]


def legend(ax):
    return [text.get_text() for text in ax.get_legend().get_texts()]


def line(ax, label):
    """The one line of a panel with this label."""
    (found,) = [drawn for drawn in ax.lines if drawn.get_label() == label]
    return found


def is_clean(figure, width=style.WIDTH):
    """At most `width` inches wide, and no drawn text says nan, overlaps another or is below 8 points."""
    drawn, draw = [], Text.draw

    def record(text, renderer):
        if text.get_visible() and text.get_text().strip():
            drawn.append(text)
        draw(text, renderer)

    with mock.patch.object(Text, "draw", record):  # axes also keep tick labels that they do not draw
        figure.canvas.draw()
    boxes = [text.get_window_extent().shrunk(0.95, 0.8) for text in drawn]  # letters rarely fill their box
    names = [text.get_text() for text in drawn]
    assert not [text.get_text() for text in drawn if text.get_fontsize() < style.SMALL]
    pairs = itertools.combinations(range(len(boxes)), 2)
    assert not [(names[a], names[b]) for a, b in pairs if boxes[a].overlaps(boxes[b])]
    assert not any("nan" in name.lower() for name in names)
    return bool(drawn) and figure.get_size_inches()[0] <= width


def stored(folder, orientation, case="NYU1"):
    """A cohort row whose files are stored in `orientation`; brightest to the right, front and head."""
    rng = np.random.default_rng(0)
    data, mask = rng.uniform(50, 100, (20, 16, 6)).astype(np.float32), np.zeros((20, 16, 6), np.uint8)
    mask[4:18, 3:14, 1:5] = 1
    mask[4:8, 3:6, 1:3] = 0  # so that no mirror image is the same
    data[15:18, 11:14, 3:5] = 900
    affine = np.diag((*MM, 1))
    affine[:3, 3] = -40, 20, 7
    turn = nib.orientations.ornt_transform(*map(nib.orientations.axcodes2ornt, ("RAS", orientation)))
    paths = [str(folder / f"{orientation}_{name}.nii.gz") for name in ("image", "mask")]
    for path, voxels in zip(paths, (data, mask), strict=True):
        nib.save(nib.Nifti1Image(voxels, affine).as_reoriented(turn), path)
    row = {"case_id": case, "center": "NYU", "modality": "t2", "label": 2, "class": "high risk"}
    return pd.Series({**row, "image": paths[0], "mask": paths[1]})
