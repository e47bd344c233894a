"""Live views for JupyterLab: thin; choosing is ipywidgets', drawing is `figures`'.

A picture is an Image widget, not what an Output widget captures: a client that runs the notebook headless
answers an Output widget while it waits for the kernel, and may then never see the kernel's reply.
"""

from __future__ import annotations

import ipywidgets as w
import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.figure import Figure

from ipmn_core import figures, figures_scan, metrics
from ipmn_core.cohort import CENTERS, LABELS, MODALITIES
from ipmn_core.preprocess import bounding_box


def roi_viewer(scans: pd.DataFrame) -> w.Widget:
    """A viewer of one case: choose center, modality, class and case, then move through the slices.

    Left the image with the pancreas outlined, right the clean ROI, both in radiological orientation.
    """
    center = w.Dropdown(options=[c for c in CENTERS if (scans["center"] == c).any()], description="center")
    modality = w.Dropdown(
        options=[m for m in MODALITIES if (scans["modality"] == m).any()], description="modality"
    )
    label = w.Dropdown(
        options=[("any", -1), *((name, k) for k, name in enumerate(LABELS))], description="class"
    )
    case = w.Dropdown(description="case")
    position = w.IntSlider(description="slice", min=0, max=1, continuous_update=False)
    picture = w.Image(format="png")
    loaded = {}

    def list_cases(_=None) -> None:
        rows = scans[(scans["center"] == center.value) & (scans["modality"] == modality.value)]
        rows = rows if label.value < 0 else rows[rows["label"] == label.value]
        case.options = [(scan.case_id, scan.Index) for scan in rows.itertuples()]
        if case.options:
            case.index = 0  # ipywidgets leaves a list that was empty without a choice

    def load(_=None) -> None:
        if case.value is None:
            picture.value = b""
            return
        loaded["scan"] = scans.loc[case.value]
        _, mask, roi = loaded["volumes"] = figures_scan.scan_volumes(loaded["scan"])
        loaded["first"] = 0 if mask is None else bounding_box(mask)[2].start
        position.unobserve_all("value")  # one picture, not one for each change
        position.max, position.value = roi.shape[2] - 1, figures_scan.widest_slice(roi.dataobj)
        position.observe(draw, "value")
        draw()

    def draw(_=None) -> None:
        if case.value is None:
            return
        picture.value = figures.png(_slice_beside_roi(**loaded, k=position.value))

    for control in (center, modality, label):
        control.observe(list_cases, "value")
    case.observe(load, "value")
    list_cases()
    return w.VBox([w.HBox([center, modality, label]), w.HBox([case, position]), picture])


def _slice_beside_roi(scan: pd.Series, volumes: tuple, first: int, k: int) -> Figure:
    """Slice `k` of the ROI, whose own begin at `first`, beside that of the image (`scan_volumes`)."""
    image, mask, roi = volumes
    figure, (left, right) = plt.subplots(1, 2, figsize=(8, 3.2))
    figures_scan.show_slice(left, image, first + k, mask)
    figures_scan.show_slice(right, roi, k)
    spacing = " x ".join(f"{mm:.2f}" for mm in image.header.get_zooms())
    place = f"slice {first + k + 1} of {image.shape[2]}"
    left.set_title(f"{scan['center']} {scan['case_id']}, {LABELS[scan['label']]}, {place}")
    right.set_title(f"ROI {' x '.join(map(str, roi.shape))} voxels of {spacing} mm")
    return figure


def center_explorer(selected: pd.DataFrame) -> w.Widget:
    """Per-center results of the binary task: choose modality, center and method.

    Shows the ROC of all methods, the scores of the chosen one, and the metric of every center.
    `selected` holds one epoch a run (`metrics.select`).
    """
    summary = metrics.over_folds(metrics.by_fold(selected))
    modality = w.Dropdown(options=list(dict.fromkeys(selected["modality"])), description="modality")
    center = w.Dropdown(
        options=[metrics.GLOBAL, *(c for c in CENTERS if (selected["center"] == c).any())],
        description="center",
    )
    arm = w.Dropdown(options=list(dict.fromkeys(selected["arm"])), description="method")
    metric = w.ToggleButtons(options=[("AUC", "auc"), ("ACC", "acc")], description="metric")
    picture = w.Image(format="png")

    def draw(_=None) -> None:
        rows = selected[selected["modality"] == modality.value]
        here = rows if center.value == metrics.GLOBAL else rows[rows["center"] == center.value]
        figure, (left, middle, right) = plt.subplots(1, 3, figsize=(11, 3.4))
        figures.roc(here, left, center.value)
        title = f"{center.value}: {figures.display_name(arm.value)}"
        figures.score_histogram(here[here["arm"] == arm.value], middle, title)
        figures.forest(summary[summary["modality"] == modality.value], right, metric.value)
        picture.value = figures.png(figure)

    for control in (modality, center, arm, metric):
        control.observe(draw, "value")
    draw()
    return w.VBox([w.HBox([modality, center, arm]), metric, picture])
