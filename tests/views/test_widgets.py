import itertools
import re

import matplotlib.pyplot as plt
import nibabel as nib
import numpy as np
import pytest

from ipmn_core import views
from ipmn_core.metrics import centers
from ipmn_core.views import scans, static, style, widgets
from ipmn_core.views.gradcam import Look

pytestmark = pytest.mark.filterwarnings("error")


@pytest.fixture
def shown(monkeypatch):
    """The contents of the figures that were shown."""
    contents, png = [], views.png

    def noted(figure):
        contents.append([content(ax) for ax in figure.axes])
        return png(figure)

    monkeypatch.setattr(style, "png", noted)
    yield contents
    plt.close("all")


def content(ax):
    """What of a panel a choice may change: words, lines, points, bars, outlines, pixels, limits."""
    words = (ax.get_title(), ax.get_xlabel(), *ax.get_legend_handles_labels()[1])
    words += tuple(text.get_text() for text in ax.texts)
    lines = [np.round(np.asarray(line.get_xydata(), float), 6).tolist() for line in ax.lines]
    outlines = [len(path.vertices) for c in ax.collections for path in c.get_paths()]
    pixels = [(np.asarray(image.get_array()).tobytes(), image.get_clim()) for image in ax.images]
    bars = [bar.get_height() for bar in ax.patches]
    return words, lines, outlines, bars, pixels, ax.get_xlim(), ax.get_ylim()


def choose(control, text):
    """What a click on the entry `text` does: the browser sends the entry's index."""
    control.index = control._options_labels.index(text)


def all_differ(contents):
    return not any(one == other for one, other in itertools.combinations(contents, 2))


@pytest.fixture
def viewer(phantom_scans, shown):
    return views.roi_viewer(phantom_scans)


def test_the_viewer_opens_with_the_first_case_at_the_pancreas_middle(phantom_scans, viewer, shown):
    assert viewer.case.label == phantom_scans.iloc[0]["case_id"] and viewer.label.label == "any"
    opened = scans.open_case(phantom_scans.iloc[0], 32)
    assert [slider.value - 1 for slider in viewer.position] == scans.middle(opened)
    assert [slider.max for slider in viewer.position] == list(opened.image.shape)
    assert len(shown) == 1 and len(shown[0]) == 6


def test_the_viewer_lists_the_cases_of_center_modality_and_class(phantom_scans, viewer):
    for center, modality, label in (
        ("EMC", "t2", "any"),
        ("AHN", "t1", "high risk"),
        ("NU", "t2", "no risk"),
    ):
        for control, text in (
            (viewer.center, center),
            (viewer.modality, modality.upper()),
            (viewer.label, label),
        ):
            choose(control, text)
        rows = phantom_scans[(phantom_scans["center"] == center) & (phantom_scans["modality"] == modality)]
        if label != "any":
            rows = rows[rows["label"] == ("no risk", "low risk", "high risk").index(label)]
        assert viewer.case.options == tuple(zip(rows["case_id"], rows.index, strict=True))
        assert viewer.case.label == rows.iloc[0]["case_id"]


@pytest.mark.parametrize("axis", range(3))
def test_each_slider_moves_its_plane_and_the_cross_hair_of_the_others(viewer, shown, axis):
    before = shown[-1]
    slider = viewer.position[axis]
    slider.value = slider.value + 5 if slider.value + 5 <= slider.max else slider.value - 5
    after, planes = shown[-1], list(scans.AXES)
    for k, plane in enumerate(planes):  # upper row: the image
        same_pixels = before[k][4] == after[k][4]
        same_lines = before[k][1] == after[k][1]
        moved = scans.AXES[plane] == axis
        assert same_pixels != moved and same_lines == moved


def test_window_and_level_change_what_is_black_and_white(viewer, shown):
    viewer.window.value = viewer.window.value / 2
    viewer.level.value = viewer.level.min
    assert len(shown) == 3
    limits = [panel[4][0][1] for panel in (contents[0] for contents in shown)]
    (low, high), (a, b), (c, d) = limits
    assert b - a == pytest.approx((high - low) / 2) and (c + d) / 2 == pytest.approx(viewer.level.min)
    assert shown[0][3] == shown[2][3]  # the cube is what the network gets, whatever the window


@pytest.mark.parametrize("switch", ["outline", "near"])
def test_outline_and_close_up_can_be_switched_off(viewer, shown, switch):
    getattr(viewer, switch).value = False
    assert all_differ([shown[0][:3], shown[1][:3]]) and shown[0][3:] == shown[1][3:]


def test_another_case_is_drawn_once_and_its_header_is_told(phantom_scans, viewer, shown):
    for case in phantom_scans.query("center == 'NYU' and modality == 't1'")["case_id"].iloc[1:]:
        shown.clear()
        choose(viewer.case, case)
        assert len(shown) == 1
        facts = scans.header_facts(scans.open_case(phantom_scans.loc[viewer.case.value], 32))
        assert all(text in viewer.facts.value for text in facts.values()) and case in facts["case"]


def test_what_a_file_is_called_stays_text(phantom_scans, shown):
    named = phantom_scans.iloc[[0]].assign(case_id="<img src=x onerror=alert(1)>")
    assert "<img" not in views.roi_viewer(named).facts.value


def test_an_empty_class_empties_the_view_and_the_way_back_is_open(phantom_scans, viewer, shown):
    choose(viewer.center, "MCA")
    shown.clear()
    choose(viewer.label, "no risk")  # MCA has none
    assert viewer.case.options == () and viewer.case.value is None and viewer.picture.value == b""
    viewer.position[2].value = 1
    assert not shown
    choose(viewer.label, "high risk")
    assert len(shown) == 1 and phantom_scans.loc[viewer.case.value, "label"] == 2
    choose(viewer.label, "no risk")
    choose(viewer.label, "any")
    assert viewer.label.label == "any" and len(viewer.case.options) == 2 and len(shown) == 2


def test_the_viewer_leaves_no_figure_open(viewer, shown):
    choose(viewer.center, "AHN")
    viewer.position[2].value = 1
    assert shown and not plt.get_fignums()


def test_niivue_gets_image_and_mask_or_says_what_it_needs(phantom_scans, viewer):
    if viewer.niivue.disabled:
        assert "ipmn[viewer]" in viewer.niivue.tooltip
        return
    viewer.niivue.value = True
    (native,) = viewer.native.children
    assert [str(v.path) for v in native.volumes] == list(phantom_scans.iloc[0][["image", "mask"]])
    viewer.niivue.value = False
    assert not viewer.native.children


def test_the_viewer_carries_its_static_form_of_one_case_a_center(phantom_scans, viewer, monkeypatch):
    given = []
    monkeypatch.setattr(static, "viewer", lambda rows, size: given.append((rows, size)) or "<i>v</i>")
    bundle = viewer._repr_mimebundle_()
    assert bundle["text/html"] == "<i>v</i>" and "application/vnd.jupyter.widget-view+json" in bundle
    ((rows, size),) = given
    assert size == 32 and list(rows["center"]) == ["NYU", "MCF", "NU", "AHN", "MCA", "IU", "EMC"]
    assert set(rows["label"]) == {2}


@pytest.fixture
def explorer(binary_predictions, phantom_scans, shown):
    cases = phantom_scans[phantom_scans["center"].isin(["NYU", "MCF", "AHN"])]
    return views.center_explorer(binary_predictions, None, cases)


def test_every_choice_of_the_explorer_is_another_picture(explorer, shown):
    assert explorer.center._options_labels == ("Global", "NYU", "MCF", "AHN") and len(shown) == 3
    seen = [(explorer.forest.value, explorer.details.value)]
    for control in (explorer.modality, explorer.metric, explorer.center, explorer.arm):
        for text in control._options_labels[1:]:
            choose(control, text)
            seen.append((explorer.forest.value, explorer.details.value))
    assert len(set(seen)) == len(seen) == 1 + 1 + 1 + 3 + 1


def test_the_explorer_draws_the_chosen_arms_alone(explorer):
    before = explorer.forest.value
    explorer.arms.value = ("centralized",)
    assert explorer.forest.value != before and set(explorer.rows()["arm"]) == {"centralized"}
    explorer.arms.value = ()
    assert explorer.forest.value == b"" and explorer.details.value == b""


def test_the_explorer_lists_the_worst_cases_and_opens_one(binary_predictions, phantom_scans, shown):
    names = phantom_scans.query("modality == 't1' and center == 'NYU'")["case_id"]
    known = binary_predictions["case_id"].isin(["NYU00", "NYU01", "NYU02"])
    rows = binary_predictions[known].replace(dict(zip(["NYU00", "NYU01", "NYU02"], names, strict=True)))
    explorer = views.center_explorer(rows, None, phantom_scans)
    worst = centers.most_wrong(rows.query("modality == 't1' and arm == 'centralized'"))
    assert explorer.worst._options_values[1:] == tuple((case, "t1") for case in worst["case_id"])
    assert explorer.viewer.layout.display == "none"
    explorer.worst.index = 2
    assert explorer.viewer.layout.display != "none"
    assert explorer.viewer.case.label == worst["case_id"].iloc[1]


def test_the_explorer_leaves_no_figure_open_and_carries_its_static_form(explorer):
    choose(explorer.center, "NYU")
    assert not plt.get_fignums()
    assert re.search(r'data-view="explorer"', explorer._repr_mimebundle_()["text/html"])


@pytest.mark.parametrize("modality", ["t1", "t2"])
def test_a_heat_map_lies_over_the_cube_of_its_own_scan(phantom_scans, shown, modality):
    """Most cases have a T1 and a T2 scan of one name."""
    scan = phantom_scans[(phantom_scans["modality"] == modality) & (phantom_scans["label"] == 2)].iloc[0]
    opened = scans.open_case(scan, 8)
    turn = nib.io_orientation(nib.load(scan["image"]).affine)
    heat = np.zeros((8, 8, 8), np.float32)
    heat[2:6, 2:6, 2:6] = 1
    names = [*(scan[key] for key in ("case_id", "center", "label")), opened.cube, heat, np.ones(3), turn]
    look = Look(*names, "binary", modality, "densenet121", 1, "layer", 0.25, heat)
    viewer = views.attention_viewer([look], phantom_scans)
    assert viewer.modality.value == modality and viewer.case.label == scan["case_id"]
    assert "high risk, probability 0.25" in viewer.facts.value and "expected" in viewer.facts.value
    viewer.heat.value = False
    with_heat, without = shown
    assert with_heat[:3] == without[:3]  # the image
    assert all(len(a[4]) == 2 and len(b[4]) == 1 for a, b in zip(with_heat[3:], without[3:], strict=True))
    assert "<p>" in viewer.still()


def test_every_control_of_fedprox_by_hand_is_another_picture(shown):
    view = views.fedprox_by_hand()
    (mu, steps, rounds), (apart, optimizer) = (box.children for box in view.children[:2])
    picture = view.children[2]
    seen = [picture.value]
    for control, value in ((mu, 0.0), (steps, 5), (rounds, 2), (apart, 0.5), (optimizer, "AdamW")):
        control.value = value
        seen.append(picture.value)
    assert len(set(seen)) == len(seen) == len(shown) and not plt.get_fignums()
    assert "text/html" in view._repr_mimebundle_()


def test_a_case_that_cannot_be_read_is_named_and_no_other_is_shown_in_its_place(
    phantom_scans, shown, tmp_path
):
    two = phantom_scans.query("center == 'NYU' and modality == 't2'").head(2).copy()
    (tmp_path / "broken.nii.gz").write_bytes(b"no image")
    two.iloc[1, two.columns.get_loc("image")] = str(tmp_path / "broken.nii.gz")
    viewer = widgets.RoiViewer(two)
    seen = viewer.picture.value
    viewer.case.index = 1
    assert viewer.opened is None and viewer.picture.value == b"" and "broken.nii.gz" in viewer.facts.value
    for slider in (*viewer.position, viewer.level):
        slider.value = slider.min
    viewer.case.index = 0
    assert viewer.picture.value == seen
