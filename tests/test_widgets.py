import itertools

import matplotlib.pyplot as plt
import numpy as np
import pytest

from ipmn_core import figures, figures_scan, widgets

pytestmark = pytest.mark.filterwarnings("error")


@pytest.fixture
def shown(monkeypatch):
    """The contents of the figures that were shown."""
    contents, png = [], figures.png

    def noted(figure):
        contents.append([content(ax) for ax in figure.axes])
        return png(figure)

    monkeypatch.setattr(figures, "png", noted)
    yield contents
    plt.close("all")


def content(ax):
    """Everything of a panel that a choice may change: words, lines, points, bars and pixels."""
    words = (ax.get_title(), ax.get_xlabel(), *ax.get_legend_handles_labels()[1])
    lines = [np.round(line.get_xydata(), 6).tolist() for line in ax.lines]
    pixels = [np.asarray(image.get_array()).tobytes() for image in ax.images]
    return words, lines, [bar.get_height() for bar in ax.patches], pixels


def controls(widget):
    """The widgets below `widget` by their description."""
    children = getattr(widget, "children", ())
    own = {widget.description: widget} if getattr(widget, "description", "") else {}
    return own | {name: w for child in children for name, w in controls(child).items()}


def choose(control, text):
    """What a click on the entry `text` does: the browser sends the entry's index."""
    control.index = control._options_labels.index(text)


def all_differ(contents):
    return not any(one == other for one, other in itertools.combinations(contents, 2))


def test_the_viewer_opens_with_the_first_case_at_its_widest_slice(phantom_scans, shown):
    view = controls(widgets.roi_viewer(phantom_scans))
    assert view["case"].label == phantom_scans.iloc[0]["case_id"] and view["class"].label == "any"
    _, _, roi = figures_scan.scan_volumes(phantom_scans.iloc[0])
    assert view["slice"].value == figures_scan.widest_slice(roi.dataobj)
    assert len(shown) == 1


def test_the_viewer_lists_the_cases_of_center_modality_and_class(phantom_scans, shown):
    view = controls(widgets.roi_viewer(phantom_scans))
    for center, modality, label in (
        ("EMC", "t2", "any"),
        ("AHN", "t1", "high risk"),
        ("NU", "t2", "no risk"),
    ):
        for control, text in (("center", center), ("modality", modality), ("class", label)):
            choose(view[control], text)
        rows = phantom_scans[(phantom_scans["center"] == center) & (phantom_scans["modality"] == modality)]
        if label != "any":
            rows = rows[rows["label"] == ("no risk", "low risk", "high risk").index(label)]
        assert view["case"].options == tuple(zip(rows["case_id"], rows.index, strict=True))
        assert view["case"].label == rows.iloc[0]["case_id"]


def test_another_slice_is_another_picture_and_slices_are_those_of_the_roi(phantom_scans, shown):
    view = controls(widgets.roi_viewer(phantom_scans))
    choose(view["center"], "EMC")
    scan = phantom_scans.loc[view["case"].value]
    _, _, roi = figures_scan.scan_volumes(scan)
    position = view["slice"]
    assert (position.min, position.max) == (0, roi.shape[2] - 1)
    before = len(shown)
    others = [k for k in range(roi.shape[2]) if k != position.value][:4]
    for k in others:
        position.value = k
    assert len(shown) == before + len(others) and all_differ(shown[before - 1 :])


def test_another_case_is_drawn_once(phantom_scans, shown):
    view = controls(widgets.roi_viewer(phantom_scans))
    for case in phantom_scans.query("center == 'NYU' and modality == 't1'")["case_id"].iloc[1:]:
        shown.clear()
        choose(view["case"], case)
        assert len(shown) == 1


def test_an_empty_class_empties_the_view_and_the_way_back_is_open(phantom_scans, shown):
    view = controls(widgets.roi_viewer(phantom_scans))
    choose(view["center"], "MCA")
    shown.clear()
    choose(view["class"], "no risk")  # MCA has none
    assert view["case"].options == () and view["case"].value is None
    view["slice"].value = (view["slice"].value + 1) % (view["slice"].max + 1)
    assert not shown
    choose(view["class"], "high risk")
    assert len(shown) == 1 and phantom_scans.loc[view["case"].value, "label"] == 2
    choose(view["class"], "no risk")
    choose(view["class"], "any")
    assert view["class"].label == "any" and len(view["case"].options) == 2 and len(shown) == 2


def test_a_viewer_that_opens_on_nothing_takes_the_slider(phantom_scans, shown):
    view = controls(widgets.roi_viewer(phantom_scans.iloc[:0]))
    view["slice"].value = 1
    assert not shown and view["case"].value is None


def test_the_viewer_takes_clean_rois_of_the_first_release(phantom_scans, shown):
    only = phantom_scans.iloc[[0]].assign(mask="")
    view = controls(widgets.roi_viewer(only))
    image, _, _ = figures_scan.scan_volumes(only.iloc[0])
    assert view["slice"].max == image.shape[2] - 1 and len(shown) == 1


def test_the_viewer_leaves_no_figure_open(phantom_scans, shown):
    view = controls(widgets.roi_viewer(phantom_scans))
    choose(view["center"], "AHN")
    view["slice"].value = 0
    assert shown and not plt.get_fignums()


def test_the_explorer_redraws_for_every_combination(binary_predictions, shown):
    view = controls(widgets.center_explorer(binary_predictions))
    names = ["modality", "center", "method", "metric"]
    assert view["center"].options == ("global", "NYU", "MCF", "AHN") and len(shown) == 1
    seen = []
    for combination in itertools.product(*(view[name]._options_labels for name in names)):
        for name, text in zip(names, combination, strict=True):
            choose(view[name], text)
        seen.append(shown[-1])
    assert len(seen) == 2 * 4 * 2 * 2 and all_differ(seen)


def test_the_explorer_takes_a_center_and_a_method_that_one_modality_lacks(binary_predictions, shown):
    both = binary_predictions["modality"] == "t1"
    some = (binary_predictions["center"] != "AHN") & (binary_predictions["arm"] == "centralized")
    view = controls(widgets.center_explorer(binary_predictions[both | some]))
    choose(view["center"], "AHN")
    choose(view["method"], "fedprox_0.1")
    choose(view["modality"], "t2")
    before = len(shown)
    choose(view["center"], "NYU")
    choose(view["method"], "centralized")
    assert len(shown) > before


def test_the_explorer_leaves_no_figure_open(binary_predictions, shown):
    view = controls(widgets.center_explorer(binary_predictions))
    choose(view["center"], "NYU")
    assert len(shown) == 2 and not plt.get_fignums()
