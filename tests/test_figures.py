import matplotlib.pyplot as plt
import nibabel as nib
import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_rgb
from matplotlib.text import Text
from sklearn.metrics import auc, roc_auc_score

from ipmn_core import figures, metrics, preprocess, tables
from ipmn_core.cohort import CENTERS

pytestmark = [pytest.mark.filterwarnings("error"), pytest.mark.usefixtures("house_style")]
ORIENTATIONS = ["RAS", "LPS", "LAI", "SAR", "PIR", "ASL"]
MM = (0.8, 1.3, 5.0)  # to the right, to the front, to the head


@pytest.fixture(scope="module")
def clean_rois(phantom_scans, tmp_path_factory):
    """The T2 scans of the phantom as the first release holds them: clean ROIs without a mask."""
    scans, folder = phantom_scans[phantom_scans["modality"] == "t2"], tmp_path_factory.mktemp("rois")
    paths = [str(folder / f"{case}.nii.gz") for case in scans["case_id"]]
    for scan, path in zip(scans.itertuples(), paths, strict=True):
        nib.save(preprocess.load_roi(scan.image, scan.mask), path)
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


def histories(epochs=3, folds=2):
    rows = [
        (arm, m, k, e, 1 / e + 0.1 * k + 0.3 * (m == "t2"))
        for arm in ("resnet34", "densenet121")
        for m in ("t1", "t2")
        for k in range(folds)
        for e in range(1, epochs + 1)
    ]
    return pd.DataFrame(rows, columns=["arm", "modality", "fold", "epoch", "loss"])


@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_however_a_scan_is_stored_the_patients_right_is_on_the_left_and_the_front_on_top(
    tmp_path, orientation
):
    image, mask, roi = figures.scan_volumes(stored(tmp_path, orientation))
    _, (left, right) = plt.subplots(1, 2)
    for ax in (figures.show_slice(left, image, 3, mask), figures.show_slice(right, roi, 2)):
        x, y = brightest(ax)
        assert x < 0.4 and y > 0.6


@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_a_pixel_has_the_proportions_of_its_millimetres(tmp_path, orientation):
    image, _, _ = figures.scan_volumes(stored(tmp_path, orientation))
    figure, ax = plt.subplots()
    figures.show_slice(ax, image, 3)
    figure.canvas.draw()
    width, height = ax.transData.transform((1, 1)) - ax.transData.transform((0, 0))
    assert height / width == pytest.approx(MM[1] / MM[0], rel=1e-3)  # pixels are placed in single precision


@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_volumes_are_canonical_and_the_roi_is_that_of_preprocessing(tmp_path, orientation):
    scan = stored(tmp_path, orientation)
    image, mask, roi = figures.scan_volumes(scan)
    assert nib.aff2axcodes(image.affine) == nib.aff2axcodes(roi.affine) == ("R", "A", "S")
    expected = nib.as_closest_canonical(preprocess.load_roi(scan["image"], scan["mask"]))
    np.testing.assert_array_equal(np.asanyarray(roi.dataobj), np.asanyarray(expected.dataobj))
    np.testing.assert_allclose(roi.affine, expected.affine, atol=1e-5)  # headers hold single precision
    box = preprocess.bounding_box(mask)
    inside = np.where(mask, np.asanyarray(image.dataobj), 0)[box]
    np.testing.assert_array_equal(np.asanyarray(roi.dataobj), inside)


@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_the_cube_is_shown_the_same_way_round_as_its_roi(tmp_path, orientation):
    scan = stored(tmp_path, orientation)
    roi = preprocess.load_roi(scan["image"], scan["mask"])
    cube = preprocess.to_cube(np.asanyarray(roi.dataobj), 32)
    left, right = figures.roi_and_cube(scan, cube).axes
    np.testing.assert_allclose(brightest(left), brightest(right), atol=0.2)  # the marker spans a fifth
    assert "14 x 11 x 4" in left.get_title() and "32 x 32 x 32" in right.get_title()


def test_the_widest_slice_is_that_with_most_voxels():
    mask = np.zeros((5, 5, 4))
    mask[1:3, 1:3, 1], mask[1:4, 1:4, 2] = 1, 0.1
    assert figures.widest_slice(mask) == 2


def test_the_gallery_has_two_rows_and_a_column_for_each_center_that_occurs(phantom_scans):
    axes = figures.center_gallery(phantom_scans).axes
    assert len(axes) == 2 * len(CENTERS) and all(len(ax.images) == 1 for ax in axes)
    assert [ax.get_title().split("\n")[0] for ax in axes[: len(CENTERS)]] == list(CENTERS)
    assert all(ax.get_title().endswith("high risk") for ax in axes[: len(CENTERS)])
    two = figures.center_gallery(phantom_scans[phantom_scans["center"].isin(["EMC", "AHN"])], "t1", 0)
    assert [ax.get_title().split("\n")[0] for ax in two.axes] == ["AHN", "EMC", "", ""]


def test_a_center_without_the_class_is_shown_by_another_case(phantom_scans):
    titles = [ax.get_title() for ax in figures.center_gallery(phantom_scans, "t2", 0).axes]
    first = phantom_scans.query("center == 'MCA' and modality == 't2'").iloc[
        0
    ]  # MCA has no case without risk
    assert f"MCA\n{first['case_id']}, low risk" in titles
    assert sum(title.endswith("no risk") for title in titles) == len(CENTERS) - 1


def test_the_outline_in_the_upper_row_runs_round_the_mask(phantom_scans):
    scans = phantom_scans[(phantom_scans["center"] == "IU") & (phantom_scans["label"] == 2)]
    above, below = figures.center_gallery(scans, "t2").axes
    (outline,) = above.collections
    assert not below.collections
    _, mask, _ = figures.scan_volumes(scans[scans["modality"] == "t2"].iloc[0])
    inside = np.argwhere(mask[::-1, :, figures.widest_slice(mask)])  # columns, rows of the picture
    vertices = np.concatenate([path.vertices for path in outline.get_paths()])
    np.testing.assert_allclose(vertices.min(axis=0), inside.min(axis=0) - 0.5)
    np.testing.assert_allclose(vertices.max(axis=0), inside.max(axis=0) + 0.5)


def test_a_slice_that_the_mask_does_not_meet_has_no_outline(tmp_path):
    image, mask, _ = figures.scan_volumes(stored(tmp_path, "RAS"))
    _, ax = plt.subplots()
    assert not figures.show_slice(ax, image, 0, mask).collections


def test_clean_rois_of_the_first_release_are_shown_without_an_outline(clean_rois):
    gallery = figures.center_gallery(clean_rois)
    assert len(gallery.axes) == 14 and not any(ax.collections for ax in gallery.axes) and is_clean(gallery)
    image, mask, roi = figures.scan_volumes(clean_rois.iloc[0])
    assert mask is None and image.shape == roi.shape


def test_slices_shows_every_slice_of_the_roi_from_foot_to_head(phantom_scans, clean_rois):
    scan = phantom_scans[phantom_scans["modality"] == "t2"].iloc[0]
    _, _, roi = figures.scan_volumes(scan)
    for row in (scan, clean_rois.iloc[0]):
        shown = [ax.images[0].get_array() for ax in figures.slices(row).axes if ax.images]
        assert len(shown) == roi.shape[2]
        for k, picture in enumerate(shown):
            np.testing.assert_array_equal(picture, np.asanyarray(roi.dataobj)[::-1, :, k].T)


def test_a_training_curve_has_a_thin_line_for_each_fold_and_their_mean():
    frame = histories()
    figure = figures.training_curves(frame, "loss", "training loss", "epoch", reference=0.5)
    assert [ax.get_title() for ax in figure.axes] == ["ResNet-34", "DenseNet-121"]
    for ax, arm in zip(figure.axes, ("resnet34", "densenet121"), strict=True):
        for label in ("T1", "T2"):
            (mean,) = [line for line in ax.lines if line.get_label() == label]
            rows = frame[(frame["arm"] == arm) & (frame["modality"] == label.lower())]
            np.testing.assert_allclose(mean.get_ydata(), rows.groupby("epoch")["loss"].mean())
            assert list(mean.get_xdata()) == [1, 2, 3]
        thin = [line for line in ax.lines if line.get_linewidth() < 1 and len(line.get_xdata()) == 3]
        assert len(thin) == 4


def test_a_training_of_one_epoch_is_still_to_be_seen():
    figure = figures.training_curves(histories(epochs=1), "loss", "training loss", "epoch")
    figure.canvas.draw()
    pixels, box = (
        np.asarray(figure.canvas.buffer_rgba())[::-1, :, :3] / 255,
        figure.axes[1].get_window_extent(),
    )
    panel = pixels[int(box.y0) + 2 : int(box.y1) - 2, int(box.x0) + 2 : int(box.x1) - 2]
    assert np.abs(panel - to_rgb(figures.PALETTE[0])).max(axis=2).min() < 0.05  # 8-bit colours


def test_a_forest_has_each_center_at_its_mean_and_na_where_there_is_none(binary_predictions):
    summary = metrics.over_folds(metrics.by_fold(binary_predictions))
    rows = summary[summary["modality"] == "t2"]
    figure, ax = plt.subplots()
    figures.forest(rows, ax)
    assert [label.get_text() for label in ax.get_yticklabels()] == ["NYU", "MCF", "AHN", "global"]
    assert texts(ax).count("n/a") == 2  # AHN, both methods
    assert all(text.get_position()[1] == pytest.approx(2, abs=0.5) for text in ax.texts)
    points = ax.containers[0].lines[0]
    ours = rows[rows["arm"] == "centralized"].set_index("center").loc[["NYU", "MCF", "AHN", "global"]]
    np.testing.assert_allclose(points.get_xdata(orig=False), ours["auc_mean"])
    assert is_clean(figure)


def test_a_forest_of_accuracies_has_no_na(binary_predictions):
    summary = metrics.over_folds(metrics.by_fold(binary_predictions))
    _, ax = plt.subplots()
    assert "n/a" not in texts(figures.forest(summary[summary["modality"] == "t2"], ax, "acc"))
    assert ax.get_xlabel().startswith("ACC")


def test_forests_have_the_papers_values_hollow_beside_ours(binary_predictions):
    summary = metrics.over_folds(metrics.by_fold(binary_predictions))
    figure = figures.forests(summary, paper=tables.paper(3))
    assert [ax.get_title() for ax in figure.axes] == ["T1", "T2"] and is_clean(figure)
    ours, theirs = (figure.axes[0].containers[k].lines[0] for k in (0, 1))
    assert ours.get_markerfacecolor() == figures.PALETTE[0] and theirs.get_markerfacecolor() == "white"
    printed = tables.paper(3).query("modality == 't1' and method == 'centralized'").set_index("center")
    np.testing.assert_allclose(
        theirs.get_xdata(orig=False), printed.loc[["NYU", "MCF", "AHN", "global"], "auc_mean"], equal_nan=True
    )


def test_a_roc_curve_encloses_the_auc_that_its_legend_prints(binary_predictions):
    rows = binary_predictions[binary_predictions["modality"] == "t1"]
    _, ax = plt.subplots()
    figures.roc(rows, ax, "global")
    for (_, part), line in zip(rows.groupby("arm", sort=False), ax.lines, strict=False):
        expected = roc_auc_score(part["y_true"], part["prob_1"])
        assert auc(*line.get_data()) == pytest.approx(expected)
        assert line.get_label().endswith(f" {expected:.2f}")
    assert ax.get_title() == "global (12 of 36 high risk)"


def test_the_roc_of_one_class_says_na(binary_predictions):
    rows = binary_predictions[
        (binary_predictions["modality"] == "t2") & (binary_predictions["center"] == "AHN")
    ]
    figure, ax = plt.subplots()
    figures.roc(rows, ax, "AHN")
    assert "n/a: one class only" in texts(ax) and len(ax.lines) == 1 and ax.get_legend() is None
    assert ax.get_title() == "AHN (0 of 12 high risk)" and is_clean(figure)


def test_roc_by_center_has_a_panel_for_all_and_for_each_center(binary_predictions):
    figure = figures.roc_by_center(binary_predictions[binary_predictions["modality"] == "t2"])
    assert [ax.get_title().split(" ")[0] for ax in figure.axes] == ["global", "NYU", "MCF", "AHN"]
    assert is_clean(figure)


def test_a_score_histogram_counts_every_case_once(binary_predictions):
    rows = binary_predictions.query("modality == 't1' and arm == 'centralized'")
    _, ax = plt.subplots()
    figures.score_histogram(rows, ax)
    assert [sum(bar.get_height() for bar in bars) for bars in ax.containers] == [24, 12]


def test_table_2_is_drawn_with_ours_filled_and_the_papers_hollow():
    table = tables.paper(2)
    table["auc_mean"] -= 7
    figure = figures.against_paper(tables.beside_paper(table, 2))
    containers = {c.get_label(): c.lines[0] for c in figure.axes[0].containers}
    assert list(containers) == ["T1, this run", "T1, paper", "T2, this run", "T2, paper"]
    for modality in ("T1", "T2"):
        ours, theirs = containers[f"{modality}, this run"], containers[f"{modality}, paper"]
        printed = tables.paper(2).query(f"modality == '{modality.lower()}'")["auc_mean"]
        np.testing.assert_allclose(theirs.get_xdata(orig=False), printed)
        np.testing.assert_allclose(ours.get_xdata(orig=False), printed - 7)
        assert theirs.get_markerfacecolor() == "white" != ours.get_markerfacecolor()
    assert is_clean(figure)


def test_a_model_that_was_not_run_leaves_no_nan_in_table_2s_picture():
    ours = tables.paper(2).query("model != 'resnet34'")
    assert is_clean(figures.against_paper(tables.beside_paper(ours, 2)))


def test_scanners_draw_a_point_for_each_scan(phantom_scans):
    facts = preprocess.facts(pd.concat([phantom_scans.head(7), phantom_scans.tail(7)]))
    figure = figures.scanners(facts)
    assert all(sum(len(points.get_offsets()) for points in ax.collections) == 14 for ax in figure.axes)
    assert is_clean(figure)


def test_a_saved_figure_is_a_png_and_is_returned(tmp_path, phantom_scans):
    figure = figures.slices(phantom_scans.iloc[0])
    assert figures.save(figure, "strip", tmp_path / "new" / "folder") is figure
    assert (tmp_path / "new" / "folder" / "strip.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("modality", ["t1", "t2"])
def test_figures_of_scans_are_drawn_without_a_warning_or_nan(phantom_scans, modality):
    scan = phantom_scans[phantom_scans["modality"] == modality].iloc[-1]
    for figure in (figures.center_gallery(phantom_scans, modality), figures.slices(scan)):
        assert is_clean(figure)


def test_an_undefined_auc_of_every_epoch_leaves_no_nan_in_the_curves():
    undefined = histories().assign(loss=np.nan)
    assert is_clean(figures.training_curves(undefined, "loss", "AUC", "epoch", reference=0.5))
