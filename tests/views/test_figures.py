import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from drawn import is_clean, texts, titles
from matplotlib.colors import to_rgb
from sklearn.metrics import auc, roc_auc_score

from ipmn_core import data, metrics, views
from ipmn_core.metrics import centers, tables
from ipmn_core.names import ARMS, CENTERS, MODELS, display_name
from ipmn_core.views import results, style

pytestmark = [pytest.mark.filterwarnings("error"), pytest.mark.usefixtures("house_style")]
ROWS = ["NYU", "MCF", "AHN", "global"]


def histories(epochs=3, folds=2):
    rows = [
        (arm, m, k, e, 1 / e + 0.1 * k + 0.3 * (m == "t2"))
        for arm in ("resnet34", "densenet121")
        for m in ("t1", "t2")
        for k in range(folds)
        for e in range(1, epochs + 1)
    ]
    return pd.DataFrame(rows, columns=["arm", "modality", "fold", "epoch", "loss"])


@pytest.fixture(scope="module")
def summary(binary_predictions):
    return metrics.over_folds(metrics.by_fold(binary_predictions))


@pytest.fixture(scope="module")
def explored(binary_predictions):
    """`centers.summary` of the last epoch of T2."""
    table = centers.summary(centers.by_rules(binary_predictions), n_resamples=50)
    return table.query("modality == 't2' and rule == 'last'")


@pytest.fixture(scope="module")
def t2(binary_predictions):
    return binary_predictions.query("modality == 't2'")


def markers(ax, label):
    """The one line of markers of this label."""
    (found,) = [line for line in ax.lines if line.get_label() == label]
    return found


def test_every_name_has_one_color_even_if_nobody_lists_it():
    unlisted = [f"{kind}{k}" for k in range(20) for kind in ("fedprox_9.", "network", "CENTER")]
    first = {name: views.color(name) for name in unlisted}
    assert first == {name: views.color(name) for name in reversed(unlisted)}
    listed = {to_rgb(value) for value in style.COLORS.values()}
    assert len(set(first.values())) == len(unlisted) and not listed & {to_rgb(c) for c in first.values()}
    for group in (ARMS, MODELS, CENTERS, style.REFERENCES):
        assert len({views.color(name) for name in group}) == len(group)
    arms = {views.color(arm) for arm in (*ARMS, *MODELS)}
    assert not arms & {views.color("t1"), views.color("t2")}


def test_names_are_in_the_papers_order_unlisted_ones_behind_and_global_last():
    assert style.centers_in(["global", "X", "EMC", "NYU", "EMC"]) == ["NYU", "EMC", "X", "global"]
    assert style.in_order(["oracle", "mine", "fedavg", "centralized"])[:2] == ["centralized", "fedavg"]


def test_a_table_shows_na_and_names_as_text_and_hides_an_index_that_counts():
    table = pd.DataFrame({"name": ["<b>", "x"], "auc": [0.12345, np.nan]}, index=[4, 7])
    shown = views.show(table).to_html()
    assert "&lt;b&gt;" in shown and "0.123" in shown and "n/a" in shown and ">4<" not in shown
    assert "12%" in views.show(table, formatter={"auc": "{:.0%}"}).to_html()
    assert "t1" in views.show(table.set_index(pd.Index(["t1", "t2"], name="modality")), 1).to_html()


def test_a_training_curve_has_a_thin_line_for_each_fold_and_their_mean():
    frame = histories()
    figure = views.training_curves(frame, "loss", "training loss", "epoch", reference=0.5)
    assert titles(figure) == ["ResNet-34", "DenseNet-121"]
    for ax, arm in zip(figure.axes, ("resnet34", "densenet121"), strict=True):
        for label in ("T1", "T2"):
            rows = frame[(frame["arm"] == arm) & (frame["modality"] == label.lower())]
            mean = markers(ax, label)
            np.testing.assert_allclose(mean.get_ydata(), rows.groupby("epoch")["loss"].mean())
            assert list(mean.get_xdata()) == [1, 2, 3]
        assert (
            len([line for line in ax.lines if line.get_linewidth() < 1 and len(line.get_xdata()) == 3]) == 4
        )


def test_curves_of_one_epoch_show_and_an_undefined_auc_leaves_no_nan():
    figure = views.training_curves(histories(epochs=1), "loss", "training loss", "epoch")
    figure.canvas.draw()
    pixels, box = np.asarray(figure.canvas.buffer_rgba())[::-1, :, :3] / 255, figure.axes[1].bbox
    panel = pixels[int(box.y0) + 2 : int(box.y1) - 2, int(box.x0) + 2 : int(box.x1) - 2]
    assert np.abs(panel - to_rgb(views.color("t1"))).max(axis=2).min() < 0.05  # 8-bit colors
    undefined = histories().assign(loss=np.nan)
    assert is_clean(views.training_curves(undefined, "loss", "AUC", "epoch", reference=0.5))


def test_a_loss_that_one_arm_begins_high_is_drawn_by_factors_and_an_auc_never():
    high = histories().assign(loss=lambda frame: frame["loss"].where(frame["arm"] == "resnet34", 12))
    for column, scale in ((high["loss"], "log"), (high["loss"] / 12.1, "linear")):
        figure = views.training_curves(high.assign(loss=column), "loss", "y", "epoch")
        assert {ax.get_yscale() for ax in figure.axes} == {scale} and is_clean(figure)


def test_a_forest_has_each_center_at_its_mean_and_na_where_there_is_none(summary):
    figure = views.forests(summary)
    assert titles(figure) == ["High risk, T1", "High risk, T2"] and is_clean(figure)
    ax, rows = figure.axes[1], summary[summary["modality"] == "t2"]
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == [*ROWS[:3], "Global"]
    notes = [text for text in ax.texts if text.get_text().startswith("n/a: no high-risk")]
    assert len(notes) == 2 and all(round(text.get_position()[1]) == 2 for text in notes)  # AHN, both arms
    ours = rows[rows["arm"] == "centralized"].set_index("center").loc[ROWS]
    by_row = np.argsort(markers(ax, "Centralized").get_ydata())
    np.testing.assert_allclose(markers(ax, "Centralized").get_xdata()[by_row], ours["auc_mean"])
    segments = [one for c in ax.collections for one in c.get_segments()]
    bars = [one[:, 0] for one in segments if np.size(one) and np.isfinite(one).all()]
    known = rows.dropna(subset=["auc_mean"])
    ends = np.column_stack([known["auc_mean"] + sign * known["auc_std"] for sign in (-1, 1)])
    np.testing.assert_allclose(np.sort(bars, axis=0), np.sort(ends, axis=0))
    accuracies = views.forests(summary, "acc").axes[1]
    assert not accuracies.texts and accuracies.get_xlabel().startswith("ACC")


def test_the_papers_values_are_hollow_in_the_row_of_their_center_and_arm(summary):
    ax = views.forests(summary, paper=tables.paper(3)).axes[0]
    names = [line.get_label() for line in ax.lines]
    theirs = ax.lines[names.index("Centralized") + 1]
    assert theirs.get_markerfacecolor() == "white" != markers(ax, "Centralized").get_markerfacecolor()
    assert theirs.get_color() == views.color("centralized")
    printed = tables.paper(3).query("modality == 't1' and method == 'centralized' and center in @ROWS")
    np.testing.assert_allclose(theirs.get_xdata(), printed["auc_mean"], equal_nan=True)
    assert np.round(theirs.get_ydata()).tolist() == printed["center"].map(ROWS.index).tolist()


def test_a_center_and_an_arm_that_nobody_lists_are_drawn(summary):
    renamed = summary.replace({"center": {"MCF": "Clinic"}, "arm": {"fedprox_0.1": "fedmine"}})
    ax = views.forests(renamed).axes[0]
    assert [label.get_text() for label in ax.get_yticklabels()] == ["NYU", "AHN", "Clinic", "Global"]
    assert markers(ax, "fedmine").get_color() == views.color("fedmine")


def test_table_2_is_drawn_with_ours_filled_and_the_papers_hollow():
    table = tables.paper(2)
    table["auc_mean"] -= 7
    figure = views.against_paper(tables.beside_paper(table, 2))
    labels = [line.get_label() for line in figure.axes[0].lines]
    for modality in ("T1", "T2"):
        ours = markers(figure.axes[0], modality)
        theirs = figure.axes[0].lines[labels.index(modality) + 1]
        printed = tables.paper(2).query(f"modality == '{modality.lower()}'")["auc_mean"]
        np.testing.assert_allclose(theirs.get_xdata(), printed)
        np.testing.assert_allclose(ours.get_xdata(), printed - 7)
        assert theirs.get_markerfacecolor() == "white" != ours.get_markerfacecolor()
    assert is_clean(figure)
    some = tables.paper(2).query("model != 'resnet34'")  # a model that was not run
    assert is_clean(views.against_paper(tables.beside_paper(some, 2)))


def test_a_roc_curve_encloses_the_auc_that_its_legend_prints(binary_predictions):
    rows = binary_predictions[binary_predictions["modality"] == "t1"]
    ax = results.roc(rows, plt.subplots()[1], "global")
    for (arm, part), line in zip(rows.groupby("arm", sort=False), ax.lines, strict=False):
        expected = roc_auc_score(part["y_true"], part["prob_1"])
        assert auc(*line.get_data()) == pytest.approx(expected)
        assert line.get_label() == f"{display_name(arm)} {expected:.2f}"
        assert line.get_color() == views.color(arm)
    assert ax.get_title() == "global (12 of 36 high risk)"


def test_roc_by_center_prints_the_aucs_beside_each_panel_and_the_methods_once(t2):
    figure = views.roc_by_center(t2)
    assert [title.split(" ")[0] for title in titles(figure)] == ["Global", "NYU", "MCF", "AHN"]
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["Centralized", "FedProx (μ=0.1)"]
    for ax, center in zip(figure.axes[1:3], ("NYU", "MCF"), strict=True):
        parts = [part for _, part in t2[t2["center"] == center].groupby("arm", sort=False)]
        expected = [f"{roc_auc_score(part['y_true'], part['prob_1']):.2f}" for part in parts]
        assert [text.get_text() for text in ax.get_legend().get_texts()] == expected
    ahn = figure.axes[3]  # one class only
    assert ahn.get_legend() is None and ahn.texts[0].get_text() == "n/a: one class only"
    assert ahn.get_title() == "AHN (0 of 12 high risk)" and is_clean(figure)


def test_scanners_draw_a_point_for_each_scan(phantom_scans):
    facts = data.scanner_facts(pd.concat([phantom_scans.head(7), phantom_scans.tail(7)]))
    figure = views.scanners(facts)
    assert all(sum(len(points.get_offsets()) for points in ax.collections) == 14 for ax in figure.axes)
    assert is_clean(figure)


def test_a_saved_figure_is_a_png_and_is_returned(tmp_path):
    figure = plt.figure()
    assert views.save(figure, "strip", tmp_path / "new" / "folder") is figure
    assert (tmp_path / "new" / "folder" / "strip.png").read_bytes().startswith(b"\x89PNG")


# ---- the per-center explorer


def test_the_overview_has_every_arms_interval_and_shades_the_center(explored):
    named = {metric: explored[explored["metric"] == metric] for metric in ("acc", "auc")}
    (ax,) = views.overview(named["auc"], "MCF").axes
    for arm, rows in named["auc"].groupby("arm", sort=False):
        drawn = markers(ax, display_name(arm)).get_xdata()
        np.testing.assert_allclose(drawn, rows["mean"].astype(float))
    assert (0.5, 1.5) in [(p.get_y(), p.get_y() + p.get_height()) for p in ax.patches]
    assert "AUC, mean over folds, with 95 % interval" in texts(ax.figure)
    assert "ACC, all test cases, with 95 % interval" in texts(views.overview(named["acc"]))


def test_the_details_are_those_of_the_center_and_the_arm(t2):
    _, middle, right = views.center_in_detail(t2, "NYU", "fedprox_0.1").axes
    matrix = centers.confusion(t2.query("center == 'NYU' and arm == 'fedprox_0.1'"))
    assert [text.get_text() for text in middle.texts] == [str(n) for n in matrix.flat]
    assert [sum(bar.get_height() for bar in bars) for bars in right.containers] == [8, 4]
    assert middle.get_title() == "NYU: FedProx (μ=0.1)"


@pytest.mark.parametrize(("center", "arm"), [("AHN", "centralized"), ("EMC", "centralized"), ("NYU", "none")])
def test_a_center_with_one_class_or_without_cases_or_the_arm_is_said(t2, center, arm):
    figure = views.center_in_detail(t2, center, arm)
    figure.canvas.draw()
    said = " ".join(texts(figure))
    why = {"AHN": "one class only", "EMC": "no cases", "NYU": "NYU: none is not among the arms shown"}[center]
    assert why in said and "nan" not in said.lower()


def test_three_classes_are_shown_as_high_risk_against_the_rest(binary_predictions):
    rows = binary_predictions.assign(task="three_class", prob_2=binary_predictions["prob_1"])
    rows = rows.assign(prob_1=0.0, y_true=rows["y_true"] * 2).query("modality == 't1'")
    left, middle, _ = views.center_in_detail(rows, metrics.GLOBAL, "centralized").axes
    assert len(middle.texts) == 9 and "12 of 36 high risk" in left.get_title()


def test_scores_of_one_model_per_center_are_not_pooled(binary_predictions):
    rows = binary_predictions.query("modality == 't1'").replace({"arm": {"fedprox_0.1": "local_only"}})
    for center, arms in ((metrics.GLOBAL, ["Centralized"]), ("NYU", ["Centralized", "Local only"])):
        left = views.center_in_detail(rows, center, "centralized").axes[0]
        curves = [line.get_label().rsplit(" ", 1)[0] for line in left.lines if line.get_label()[0] != "_"]
        assert curves == arms


def test_the_legend_of_many_arms_stays_in_the_picture(t2):
    one = t2.query("arm == 'centralized'")
    arms = ("centralized", "fedavg", "fedprox_0.1", "fedprox_0.3", *style.REFERENCES)
    figure = views.center_in_detail(pd.concat([one.assign(arm=arm) for arm in arms]), "NYU", arms[0])
    figure.canvas.draw()
    (legend,) = figure.legends
    box, page = legend.get_window_extent(), figure.bbox
    assert page.x0 <= box.x0 and box.x1 <= page.x1 and page.y0 <= box.y0
