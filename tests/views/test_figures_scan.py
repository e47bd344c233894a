from types import SimpleNamespace

import matplotlib.pyplot as plt
import nibabel as nib
import numpy as np
import pandas as pd
import pytest
from drawn import MM, ORIENTATIONS, is_clean, stored, titles

from ipmn_core import views
from ipmn_core.data import bounding_box, load_roi, to_cube
from ipmn_core.names import CENTERS
from ipmn_core.params import Preprocessing
from ipmn_core.views import live, scans

pytestmark = [pytest.mark.filterwarnings("error"), pytest.mark.usefixtures("house_style")]


def brightest(ax):
    """Place of the brightest pixel on the screen, as fractions of the picture from left and from below."""
    ax.figure.canvas.draw()
    (image,) = ax.images
    row, column = np.unravel_index(np.argmax(image.get_array()), image.get_array().shape)
    x, y = ax.transData.transform((column, row))
    box = ax.get_window_extent()
    return (x - box.x0) / box.width, (y - box.y0) / box.height


@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_any_stored_orientation_is_shown_radiologically_and_true_to_millimeters(tmp_path, orientation):
    scan = stored(tmp_path, orientation)
    image, mask, roi = scans.scan_volumes(scan)
    assert nib.aff2axcodes(image.affine) == nib.aff2axcodes(roi.affine) == ("R", "A", "S")
    expected = nib.as_closest_canonical(load_roi(scan["image"], scan["mask"]))
    np.testing.assert_array_equal(np.asanyarray(roi.dataobj), np.asanyarray(expected.dataobj))
    np.testing.assert_allclose(roi.affine, expected.affine, atol=1e-5)  # headers hold single precision
    inside = np.where(mask, np.asanyarray(image.dataobj), 0)[bounding_box(mask)]
    np.testing.assert_array_equal(np.asanyarray(roi.dataobj), inside)
    _, (left, right) = plt.subplots(1, 2)
    for ax in (views.show_slice(left, image, 3, mask), views.show_slice(right, roi, 2)):
        x, y = brightest(ax)
        assert x < 0.4 and y > 0.6
    width, height = left.transData.transform((1, 1)) - left.transData.transform((0, 0))
    assert height / width == pytest.approx(MM[1] / MM[0], rel=1e-3)  # pixels are placed in single precision


@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_the_cube_is_shown_the_same_way_round_as_its_roi(tmp_path, orientation):
    scan = stored(tmp_path, orientation)
    cube = to_cube(np.asanyarray(load_roi(scan["image"], scan["mask"]).dataobj), 32)
    left, right = views.roi_and_cube(scan, cube).axes
    np.testing.assert_allclose(brightest(left), brightest(right), atol=0.2)  # the marker spans a fifth
    assert "14 x 11 x 4" in left.get_title() and "32 x 32 x 32" in right.get_title()


def test_the_gallery_has_a_column_for_each_center_by_a_case_of_the_class_or_its_first(phantom_scans):
    figure = views.center_gallery(phantom_scans)
    assert len(figure.axes) == 2 * len(CENTERS) and all(len(ax.images) == 1 for ax in figure.axes)
    above = titles(figure)[: len(CENTERS)]
    assert [title.split("\n")[0] for title in above] == list(CENTERS)
    assert all(title.endswith("high risk") for title in above) and is_clean(figure, 13)
    some = phantom_scans[phantom_scans["center"].isin(["EMC", "MCA"])]
    some = some[(some["modality"] == "t1") & ((some["center"] == "EMC") | (some["label"] < 2))]
    first = some.query("center == 'MCA'").iloc[0]  # MCA has no case without risk, and here none of high risk
    mca, emc, *below = titles(views.center_gallery(some, "t1"))
    assert mca == f"MCA\n{first['case_id']}, low risk" and emc.endswith("high risk") and below == ["", ""]


def test_thirty_centers_stand_in_rows(tmp_path):
    row = stored(tmp_path, "RAS")
    many = pd.DataFrame([{**row, "center": f"Hôpital général Saint-Luc {k}"} for k in range(30)])
    figure = views.center_gallery(many, "t2")
    assert sum(bool(ax.images) for ax in figure.axes) == 60 and is_clean(figure, 15)


def test_the_outline_runs_round_the_mask(phantom_scans):
    image, mask, _ = scans.scan_volumes(phantom_scans.query("center == 'IU' and modality == 't2'").iloc[0])
    k = scans.widest_slice(mask)
    (outline,) = views.show_slice(plt.subplots()[1], image, k, mask).collections
    inside = np.argwhere(mask[::-1, :, k])  # columns, rows of the picture
    vertices = np.concatenate([path.vertices for path in outline.get_paths()])
    np.testing.assert_allclose(vertices.min(axis=0), inside.min(axis=0) - 0.5)
    np.testing.assert_allclose(vertices.max(axis=0), inside.max(axis=0) + 0.5)
    outside = int(np.flatnonzero(~mask.any(axis=(0, 1)))[0])
    assert not views.show_slice(plt.subplots()[1], image, outside, mask).collections


def test_a_clean_roi_of_the_first_release_is_shown_whole_and_without_an_outline(tmp_path):
    scan = stored(tmp_path, "PIR")
    nib.save(load_roi(scan["image"], scan["mask"]), scan["image"])
    scan["mask"] = ""
    gallery = views.center_gallery(scan.to_frame().T)
    assert len(gallery.axes) == 2 and not any(ax.collections for ax in gallery.axes)
    _, _, roi = scans.scan_volumes(scan)
    figure = views.slices(scan)
    assert len(figure.axes) == roi.shape[2] and is_clean(figure, 13)
    for k, ax in enumerate(figure.axes):  # from foot to head
        np.testing.assert_array_equal(ax.images[0].get_array(), np.asanyarray(roi.dataobj)[::-1, :, k].T)


def test_a_header_that_places_nothing_is_shown_as_it_is_read(tmp_path):
    scan = stored(tmp_path, "RAS")
    image = nib.load(scan["image"])
    header, flat = image.header.copy(), image.affine.copy()
    flat[2] = 0  # no voxel is above another
    header.set_sform(flat, code=1)
    header.set_qform(None, code=0)
    nib.save(nib.Nifti1Image(np.asanyarray(image.dataobj), None, header), scan["image"])
    how = Preprocessing(16)
    assert dict(live.on_page(scan, how)["facts"])["axes"] == "RAS"
    assert views.roi_and_cube(scan, scans.open_case(scan, how).cube).axes


def test_three_planes_show_the_same_place_in_image_and_cube(tmp_path):
    opened = scans.open_case(stored(tmp_path, "PIR"), Preprocessing(16))
    figure = scans.three_planes(opened, (16, 12, 3))  # inside the marker
    assert titles(figure) == [
        *("image, axial, slice 4 of 6", "image, coronal, slice 13 of 16", "image, sagittal, slice 17 of 20"),
        *("cube, axial, slice 11 of 16", "cube, coronal, slice 14 of 16", "cube, sagittal, slice 15 of 16"),
    ]
    assert all(ax.collections for ax in figure.axes[:3]) and is_clean(figure)
    for ax in figure.axes:
        right, up = (line.get_data()[k][0] for k, line in enumerate(ax.lines))
        picture = ax.images[0].get_array()
        assert picture[up, right] > 0.8 * picture.max()


def test_a_prediction_is_drawn_beside_its_roi_with_a_bar_per_class_and_a_dot_per_model(tmp_path):
    scan = stored(tmp_path, "LPS")
    folds = pd.DataFrame({"model": ["a", "b"], "not high risk": [0.25, 0.75], "high risk": [0.75, 0.25]})
    result = SimpleNamespace(case="NYU $x_$", task="binary", folds=folds)
    figure = views.prediction(result, load_roi(scan["image"], scan["mask"]))
    left, right = figure.axes
    x, y = brightest(left)
    assert x < 0.4 and y > 0.6 and "NYU $x_$" in left.get_title()  # a name is no formula
    assert [bar.get_width() for bar in right.patches] == [0.5, 0.5]
    assert [line.get_xdata().tolist() for line in right.lines] == [[0.25, 0.75], [0.75, 0.25]]
    assert "Not for clinical use" in figure.get_suptitle() and is_clean(figure, 13)
