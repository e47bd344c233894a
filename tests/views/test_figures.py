import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_rgb
from matplotlib.text import Text
from sklearn.metrics import auc, roc_auc_score
from test_figures_review import is_clean

from ipmn_core import data, metrics, views
from ipmn_core.metrics import tables
from ipmn_core.names import display_name

pytestmark = [pytest.mark.filterwarnings("error"), pytest.mark.usefixtures("house_style")]


def texts(figure):
    return [text.get_text() for text in figure.findobj(Text)]


def histories(epochs=3, folds=2):
    rows = [
        (arm, m, k, e, 1 / e + 0.1 * k + 0.3 * (m == "t2"))
        for arm in ("resnet34", "densenet121")
        for m in ("t1", "t2")
        for k in range(folds)
        for e in range(1, epochs + 1)
    ]
    return pd.DataFrame(rows, columns=["arm", "modality", "fold", "epoch", "loss"])


def test_a_training_curve_has_a_thin_line_for_each_fold_and_their_mean():
    frame = histories()
    figure = views.training_curves(frame, "loss", "training loss", "epoch", reference=0.5)
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
    figure = views.training_curves(histories(epochs=1), "loss", "training loss", "epoch")
    figure.canvas.draw()
    pixels, box = (
        np.asarray(figure.canvas.buffer_rgba())[::-1, :, :3] / 255,
        figure.axes[1].get_window_extent(),
    )
    panel = pixels[int(box.y0) + 2 : int(box.y1) - 2, int(box.x0) + 2 : int(box.x1) - 2]
    assert np.abs(panel - to_rgb(views.color("t1"))).max(axis=2).min() < 0.05  # 8-bit colours


def test_a_forest_has_each_center_at_its_mean_and_na_where_there_is_none(binary_predictions):
    summary = metrics.over_folds(metrics.by_fold(binary_predictions))
    rows = summary[summary["modality"] == "t2"]
    figure, ax = plt.subplots()
    views.forest(rows, ax)
    assert [label.get_text() for label in ax.get_yticklabels()] == ["NYU", "MCF", "AHN", "Global"]
    assert texts(ax).count("n/a") == 2  # AHN, both methods
    assert all(text.get_position()[1] == pytest.approx(2, abs=0.5) for text in ax.texts)
    points = ax.containers[0].lines[0]
    ours = rows[rows["arm"] == "centralized"].set_index("center").loc[["NYU", "MCF", "AHN", "global"]]
    np.testing.assert_allclose(points.get_xdata(orig=False), ours["auc_mean"])
    assert is_clean(figure)


def test_a_forest_of_accuracies_has_no_na(binary_predictions):
    summary = metrics.over_folds(metrics.by_fold(binary_predictions))
    _, ax = plt.subplots()
    assert "n/a" not in texts(views.forest(summary[summary["modality"] == "t2"], ax, "acc"))
    assert ax.get_xlabel().startswith("ACC")


def test_forests_have_the_papers_values_hollow_beside_ours(binary_predictions):
    summary = metrics.over_folds(metrics.by_fold(binary_predictions))
    figure = views.forests(summary, paper=tables.paper(3))
    assert [ax.get_title() for ax in figure.axes] == ["High risk, T1", "High risk, T2"] and is_clean(figure)
    ours, theirs = (figure.axes[0].containers[k].lines[0] for k in (0, 1))
    assert ours.get_markerfacecolor() == views.PALETTE[0] and theirs.get_markerfacecolor() == "white"
    printed = tables.paper(3).query("modality == 't1' and method == 'centralized'").set_index("center")
    np.testing.assert_allclose(
        theirs.get_xdata(orig=False), printed.loc[["NYU", "MCF", "AHN", "global"], "auc_mean"], equal_nan=True
    )


def test_a_roc_curve_encloses_the_auc_that_its_legend_prints(binary_predictions):
    rows = binary_predictions[binary_predictions["modality"] == "t1"]
    _, ax = plt.subplots()
    views.roc(rows, ax, "global")
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
    views.roc(rows, ax, "AHN")
    assert "n/a: one class only" in texts(ax) and len(ax.lines) == 1 and ax.get_legend() is None
    assert ax.get_title() == "AHN (0 of 12 high risk)" and is_clean(figure)


def test_roc_by_center_has_a_panel_for_all_and_for_each_center(binary_predictions):
    figure = views.roc_by_center(binary_predictions[binary_predictions["modality"] == "t2"])
    assert [ax.get_title().split(" ")[0] for ax in figure.axes] == ["Global", "NYU", "MCF", "AHN"]
    assert is_clean(figure)


def test_roc_by_center_prints_the_aucs_beside_each_panel_and_the_methods_once(binary_predictions):
    rows = binary_predictions[binary_predictions["modality"] == "t2"]
    figure = views.roc_by_center(rows)
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["Centralized", "FedProx (μ=0.1)"]
    for ax, center in zip(figure.axes[1:3], ("NYU", "MCF"), strict=True):
        parts = [part for _, part in rows[rows["center"] == center].groupby("arm", sort=False)]
        expected = [f"{roc_auc_score(part['y_true'], part['prob_1']):.2f}" for part in parts]
        assert [text.get_text() for text in ax.get_legend().get_texts()] == expected
    assert figure.axes[3].get_legend() is None  # AHN, one class only


def test_an_arm_has_one_colour_in_all_figures_and_no_modality_has_it(binary_predictions):
    assert len({views.color(arm) for arm in views.METHODS}) == len(views.METHODS)
    assert len({views.color(arm) for arm in views.MODELS}) == len(views.MODELS)
    arms = {views.color(arm) for arm in (*views.METHODS, *views.MODELS)}
    assert not arms & {views.color("t1"), views.color("t2")}
    order = ["fedprox_0.1", "centralized"]  # the colour is the arm's own, not that of its place
    rows = binary_predictions.set_index("arm").loc[order].reset_index().query("modality == 't1'")
    summary = metrics.over_folds(metrics.by_fold(rows))
    _, (left, right) = plt.subplots(1, 2)
    views.forest(summary, left)
    views.roc(rows, right)
    intervals = summary.assign(auc=summary["auc_mean"], auc_low=0.1, auc_high=0.9)
    review = views.auc_intervals(intervals).axes[0]
    for arm, container in zip(order, left.containers, strict=True):
        (curve,) = (c for c in right.lines if c.get_label().startswith(display_name(arm)))
        (drawn,) = (c for c in review.lines if c.get_label() == display_name(arm))
        colors = {container.lines[0].get_color(), curve.get_color(), drawn.get_color()}
        assert colors == {views.color(arm)}


def test_a_loss_that_one_arm_begins_high_is_drawn_by_factors_and_an_auc_never():
    high = histories().assign(loss=lambda frame: frame["loss"].where(frame["arm"] == "resnet34", 12))
    for column, scale in ((high["loss"], "log"), (high["loss"] / 12.1, "linear")):
        figure = views.training_curves(high.assign(loss=column), "loss", "y", "epoch")
        assert {ax.get_yscale() for ax in figure.axes} == {scale} and is_clean(figure)


def test_a_score_histogram_counts_every_case_once(binary_predictions):
    rows = binary_predictions.query("modality == 't1' and arm == 'centralized'")
    _, ax = plt.subplots()
    views.score_histogram(rows, ax)
    assert [sum(bar.get_height() for bar in bars) for bars in ax.containers] == [24, 12]


def test_table_2_is_drawn_with_ours_filled_and_the_papers_hollow():
    table = tables.paper(2)
    table["auc_mean"] -= 7
    figure = views.against_paper(tables.beside_paper(table, 2))
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
    assert is_clean(views.against_paper(tables.beside_paper(ours, 2)))


def test_scanners_draw_a_point_for_each_scan(phantom_scans):
    facts = data.scanner_facts(pd.concat([phantom_scans.head(7), phantom_scans.tail(7)]))
    figure = views.scanners(facts)
    assert all(sum(len(points.get_offsets()) for points in ax.collections) == 14 for ax in figure.axes)
    assert is_clean(figure)


def test_a_saved_figure_is_a_png_and_is_returned(tmp_path, phantom_scans):
    figure = views.slices(phantom_scans.iloc[0])
    assert views.save(figure, "strip", tmp_path / "new" / "folder") is figure
    assert (tmp_path / "new" / "folder" / "strip.png").read_bytes().startswith(b"\x89PNG")


def test_an_undefined_auc_of_every_epoch_leaves_no_nan_in_the_curves():
    undefined = histories().assign(loss=np.nan)
    assert is_clean(views.training_curves(undefined, "loss", "AUC", "epoch", reference=0.5))
