import matplotlib.pyplot as plt
import nibabel as nib
import numpy as np
import pandas as pd
import pytest
from matplotlib.text import Text

from ipmn_core import views
from ipmn_core.data import ScanError, bounding_box, load_roi, to_cube
from ipmn_core.names import CENTERS

pytestmark = [pytest.mark.filterwarnings("error"), pytest.mark.usefixtures("house_style")]
ORIENTATIONS = ["RAS", "LPS", "LAI", "SAR", "PIR", "ASL"]
MM = (0.8, 1.3, 5.0)  # to the right, to the front, to the head


@pytest.fixture(scope="module")
def clean_rois(phantom_scans, tmp_path_factory):
    """The T2 scans of the phantom as the first release holds them: clean ROIs without a mask."""
    scans, folder = phantom_scans[phantom_scans["modality"] == "t2"], tmp_path_factory.mktemp("rois")
    paths = [str(folder / f"{case}.nii.gz") for case in scans["case_id"]]
    for scan, path in zip(scans.itertuples(), paths, strict=True):
        nib.save(load_roi(scan.image, scan.mask), path)
    return scans.assign(image=paths, mask="")


def stored(folder, orientation):
    """A cohort row whose files are stored in `orientation`; brightest at the patient's right and front."""
    rng = np.random.default_rng(0)
    data, mask = rng.uniform(50, 100, (20, 16, 6)).astype(np.float32), np.zeros((20, 16, 6), np.uint8)
    mask[4:18, 3:14, 1:5] = 1
    data[15:18, 11:14, 1:5] = 900
    affine = np.diag((*MM, 1))
    affine[:3, 3] = -40, 20, 7
    turn = nib.orientations.ornt_transform(
        nib.orientations.axcodes2ornt("RAS"), nib.orientations.axcodes2ornt(orientation)
    )
    for name, voxels in (("image", data), ("mask", mask)):
        nib.save(nib.Nifti1Image(voxels, affine).as_reoriented(turn), folder / f"{name}.nii.gz")
    return pd.Series(
        {
            "case_id": "NYU1",
            "center": "NYU",
            "modality": "t2",
            "label": 2,
            "image": str(folder / "image.nii.gz"),
            "mask": str(folder / "mask.nii.gz"),
        }
    )


def brightest(ax):
    """Where the brightest pixel lies on the screen, as fractions of the picture from left and from below."""
    ax.figure.canvas.draw()
    (image,) = ax.images
    row, column = np.unravel_index(np.argmax(image.get_array()), image.get_array().shape)
    x, y = ax.transData.transform((column, row))
    box = ax.get_window_extent()
    return (x - box.x0) / box.width, (y - box.y0) / box.height


def texts(figure):
    return [text.get_text() for text in figure.findobj(Text)]


def is_clean(figure):
    figure.canvas.draw()
    return not any("nan" in text.lower() for text in texts(figure))


@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_however_a_scan_is_stored_the_patients_right_is_on_the_left_and_the_front_on_top(
    tmp_path, orientation
):
    image, mask, roi = views.scan_volumes(stored(tmp_path, orientation))
    _, (left, right) = plt.subplots(1, 2)
    for ax in (views.show_slice(left, image, 3, mask), views.show_slice(right, roi, 2)):
        x, y = brightest(ax)
        assert x < 0.4 and y > 0.6


@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_a_pixel_has_the_proportions_of_its_millimetres(tmp_path, orientation):
    image, _, _ = views.scan_volumes(stored(tmp_path, orientation))
    figure, ax = plt.subplots()
    views.show_slice(ax, image, 3)
    figure.canvas.draw()
    width, height = ax.transData.transform((1, 1)) - ax.transData.transform((0, 0))
    assert height / width == pytest.approx(MM[1] / MM[0], rel=1e-3)  # pixels are placed in single precision


@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_volumes_are_canonical_and_the_roi_is_that_of_preprocessing(tmp_path, orientation):
    scan = stored(tmp_path, orientation)
    image, mask, roi = views.scan_volumes(scan)
    assert nib.aff2axcodes(image.affine) == nib.aff2axcodes(roi.affine) == ("R", "A", "S")
    expected = nib.as_closest_canonical(load_roi(scan["image"], scan["mask"]))
    np.testing.assert_array_equal(np.asanyarray(roi.dataobj), np.asanyarray(expected.dataobj))
    np.testing.assert_allclose(roi.affine, expected.affine, atol=1e-5)  # headers hold single precision
    box = bounding_box(mask)
    inside = np.where(mask, np.asanyarray(image.dataobj), 0)[box]
    np.testing.assert_array_equal(np.asanyarray(roi.dataobj), inside)


@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_the_cube_is_shown_the_same_way_round_as_its_roi(tmp_path, orientation):
    scan = stored(tmp_path, orientation)
    roi = load_roi(scan["image"], scan["mask"])
    cube = to_cube(np.asanyarray(roi.dataobj), 32)
    left, right = views.roi_and_cube(scan, cube).axes
    np.testing.assert_allclose(brightest(left), brightest(right), atol=0.2)  # the marker spans a fifth
    assert "14 x 11 x 4" in left.get_title() and "32 x 32 x 32" in right.get_title()


def test_the_widest_slice_is_that_with_most_voxels():
    mask = np.zeros((5, 5, 4))
    mask[1:3, 1:3, 1], mask[1:4, 1:4, 2] = 1, 0.1
    assert views.widest_slice(mask) == 2


def test_the_gallery_has_two_rows_and_a_column_for_each_center_that_occurs(phantom_scans):
    axes = views.center_gallery(phantom_scans).axes
    assert len(axes) == 2 * len(CENTERS) and all(len(ax.images) == 1 for ax in axes)
    assert [ax.get_title().split("\n")[0] for ax in axes[: len(CENTERS)]] == list(CENTERS)
    assert all(ax.get_title().endswith("high risk") for ax in axes[: len(CENTERS)])
    two = views.center_gallery(phantom_scans[phantom_scans["center"].isin(["EMC", "AHN"])], "t1", 0)
    assert [ax.get_title().split("\n")[0] for ax in two.axes] == ["AHN", "EMC", "", ""]


def test_a_center_without_the_class_is_shown_by_another_case(phantom_scans):
    titles = [ax.get_title() for ax in views.center_gallery(phantom_scans, "t2", 0).axes]
    first = phantom_scans.query("center == 'MCA' and modality == 't2'").iloc[
        0
    ]  # MCA has no case without risk
    assert f"MCA\n{first['case_id']}, low risk" in titles
    assert sum(title.endswith("no risk") for title in titles) == len(CENTERS) - 1


def test_the_outline_in_the_upper_row_runs_round_the_mask(phantom_scans):
    scans = phantom_scans[(phantom_scans["center"] == "IU") & (phantom_scans["label"] == 2)]
    above, below = views.center_gallery(scans, "t2").axes
    (outline,) = above.collections
    assert not below.collections
    _, mask, _ = views.scan_volumes(scans[scans["modality"] == "t2"].iloc[0])
    inside = np.argwhere(mask[::-1, :, views.widest_slice(mask)])  # columns, rows of the picture
    vertices = np.concatenate([path.vertices for path in outline.get_paths()])
    np.testing.assert_allclose(vertices.min(axis=0), inside.min(axis=0) - 0.5)
    np.testing.assert_allclose(vertices.max(axis=0), inside.max(axis=0) + 0.5)


def test_a_slice_that_the_mask_does_not_meet_has_no_outline(tmp_path):
    image, mask, _ = views.scan_volumes(stored(tmp_path, "RAS"))
    _, ax = plt.subplots()
    assert not views.show_slice(ax, image, 0, mask).collections


def test_clean_rois_of_the_first_release_are_shown_without_an_outline(clean_rois):
    gallery = views.center_gallery(clean_rois)
    assert len(gallery.axes) == 14 and not any(ax.collections for ax in gallery.axes) and is_clean(gallery)
    image, mask, roi = views.scan_volumes(clean_rois.iloc[0])
    assert mask is None and image.shape == roi.shape


def test_slices_shows_every_slice_of_the_roi_from_foot_to_head(phantom_scans, clean_rois):
    scan = phantom_scans[phantom_scans["modality"] == "t2"].iloc[0]
    _, _, roi = views.scan_volumes(scan)
    for row in (scan, clean_rois.iloc[0]):
        shown = [ax.images[0].get_array() for ax in views.slices(row).axes if ax.images]
        assert len(shown) == roi.shape[2]
        for k, picture in enumerate(shown):
            np.testing.assert_array_equal(picture, np.asanyarray(roi.dataobj)[::-1, :, k].T)


@pytest.mark.parametrize("modality", ["t1", "t2"])
def test_figures_of_scans_are_drawn_without_a_warning_or_nan(phantom_scans, modality):
    scan = phantom_scans[phantom_scans["modality"] == modality].iloc[-1]
    for figure in (views.center_gallery(phantom_scans, modality), views.slices(scan)):
        assert is_clean(figure)


def test_a_header_that_places_nothing_is_shown_as_it_is_read(tmp_path):
    scan = stored(tmp_path, "RAS")
    image = nib.load(scan["image"])
    header, flat = image.header.copy(), image.affine.copy()
    flat[2] = 0  # no voxel lies above another
    header.set_sform(flat, code=1)
    header.set_qform(None, code=0)
    nib.save(nib.Nifti1Image(np.asanyarray(image.dataobj), None, header), scan["image"])
    shown = views.open_case(scan, 16)
    assert np.linalg.matrix_rank(nib.load(scan["image"]).affine) == 3
    assert views.header_facts(shown)["axes"] == "RAS"
    assert views.roi_and_cube(scan, shown.cube).axes


def test_an_roi_of_one_value_is_refused_as_training_refuses_it(tmp_path):
    scan = stored(tmp_path, "RAS")
    mask = nib.load(scan["mask"])
    one = np.zeros(mask.shape, np.uint8)
    one[5, 5, 2] = 1
    nib.save(nib.Nifti1Image(one, mask.affine), scan["mask"])
    with pytest.raises(ScanError, match="one single value"):
        views.open_case(scan, 16)


def test_a_name_with_two_dollars_is_no_formula(tmp_path):
    scans = stored(tmp_path, "RAS").to_frame().T.assign(case_id="NYU $x_$ 1")
    for figure in (views.center_gallery(scans, "t2"), views.slices(scans.iloc[0])):
        figure.canvas.draw()
        assert any("NYU $x_$ 1" in text for text in texts(figure))


@pytest.mark.parametrize("plane", views.AXES)
def test_a_section_is_a_view_of_its_volume(plane):
    volume = np.asfortranarray(np.arange(60).reshape(3, 4, 5))
    one = views.section(volume, plane, 1)
    assert np.shares_memory(one, volume)
    np.testing.assert_array_equal(one, np.take(volume, 1, views.AXES[plane])[::-1].T)
