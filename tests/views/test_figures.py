import itertools

import numpy as np
import pandas as pd
import pytest
from drawn import is_clean, legend, line, titles
from matplotlib.colors import to_rgb
from sklearn.metrics import auc, roc_auc_score

from ipmn_core import data, metrics, views
from ipmn_core.metrics import tables
from ipmn_core.names import ARMS, MODELS
from ipmn_core.views import style

pytestmark = [pytest.mark.filterwarnings("error"), pytest.mark.usefixtures("house_style")]
ROWS = ["NYU", "MCF", "AHN", "global"]


def histories(epochs=3):
    runs = itertools.product(("resnet34", "densenet121"), ("t1", "t2"), (0, 1), range(1, epochs + 1))
    frame = pd.DataFrame(runs, columns=["arm", "modality", "fold", "epoch"])
    return frame.assign(loss=1 / frame["epoch"] + 0.1 * frame["fold"] + 0.3 * (frame["modality"] == "t2"))


@pytest.fixture(scope="module")
def t2(binary_predictions):
    return binary_predictions.query("modality == 't2'")


def test_every_name_has_one_color_even_if_nobody_lists_it():
    unlisted = [f"{kind}{k}" for k in range(20) for kind in ("fedprox_9.", "network", "CENTER")]
    first = {name: views.color(name) for name in unlisted}
    assert first == {name: views.color(name) for name in reversed(unlisted)}
    listed = {to_rgb(value) for value in style.COLORS.values()}
    assert len(set(first.values())) == len(unlisted) and not listed & {to_rgb(c) for c in first.values()}
    for group in (*style.GROUPS, style.REFERENCES):
        assert len({views.color(name) for name in group}) == len(group)
    arms = {views.color(arm) for arm in (*ARMS, *MODELS)}
    assert not arms & {views.color("t1"), views.color("t2")}


def test_centers_are_as_they_come_global_last_and_arms_in_order_unlisted_ones_behind():
    assert style.centers_in(["global", "X", "EMC", "NYU", "EMC"]) == ["X", "EMC", "NYU", "global"]
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
    assert titles(figure) == ["ResNet-34", "DenseNet-121"] and is_clean(figure)
    for ax, arm in zip(figure.axes, ("resnet34", "densenet121"), strict=True):
        for label in ("T1", "T2"):
            rows = frame[(frame["arm"] == arm) & (frame["modality"] == label.lower())]
            np.testing.assert_allclose(line(ax, label).get_ydata(), rows.groupby("epoch")["loss"].mean())
            assert list(line(ax, label).get_xdata()) == [1, 2, 3]
        assert sum(drawn.get_linewidth() < 1 and len(drawn.get_xdata()) == 3 for drawn in ax.lines) == 4
    undefined = histories(epochs=1).assign(loss=np.nan)
    assert is_clean(views.training_curves(undefined, "loss", "AUC", "epoch", reference=0.5))


def test_a_loss_that_one_arm_begins_high_is_drawn_by_factors_and_an_auc_never():
    high = histories().assign(loss=lambda frame: frame["loss"].where(frame["arm"] == "resnet34", 12))
    for column, scale in ((high["loss"], "log"), (high["loss"] / 12.1, "linear")):
        figure = views.training_curves(high.assign(loss=column), "loss", "y", "epoch")
        assert {ax.get_yscale() for ax in figure.axes} == {scale} and is_clean(figure)


def test_a_forest_has_each_center_at_its_mean_and_na_where_there_is_none(binary_predictions):
    summary = metrics.over_folds(metrics.by_fold(binary_predictions))
    figure = views.forests(summary)
    assert titles(figure) == [f"Positive against the rest, {m}" for m in ("T1", "T2")] and is_clean(figure)
    ax, rows = figure.axes[1], summary[summary["modality"] == "t2"]
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == [*ROWS[:3], "Global"]
    notes = [text for text in ax.texts if text.get_text().startswith("n/a: no positive")]
    assert len(notes) == 2 and all(round(text.get_position()[1]) == 2 for text in notes)  # AHN, both arms
    ours = rows[rows["arm"] == "centralized"].set_index("center").loc[ROWS]
    by_row = np.argsort(line(ax, "Centralized").get_ydata())
    np.testing.assert_allclose(line(ax, "Centralized").get_xdata()[by_row], ours["auc_mean"])
    segments = np.array([one for c in ax.collections for one in c.get_segments() if len(one)])
    level = (segments[:, 0, 1] == segments[:, 1, 1]) & np.isfinite(segments).all(axis=(1, 2))
    known = rows.dropna(subset=["auc_mean"])
    ends = np.column_stack([known["auc_mean"] + sign * known["auc_std"] for sign in (-1, 1)])
    np.testing.assert_allclose(np.sort(segments[level, :, 0], axis=0), np.sort(ends, axis=0))


def test_table_2_is_drawn_with_ours_filled_and_the_papers_hollow():
    printed = tables.paper(2)
    ours = printed.assign(auc_mean=printed["auc_mean"] - 7).query("model != 'resnet34'")  # that was not run
    figure = views.benchmark(tables.beside_paper(ours, 2))
    drawn = figure.axes[0].lines
    for modality, filled, hollow in zip(("t1", "t2"), drawn[::2], drawn[1::2], strict=True):
        expected = printed.loc[printed["modality"] == modality, "auc_mean"]
        np.testing.assert_allclose(hollow.get_xdata(), expected)
        np.testing.assert_allclose(filled.get_xdata()[1:], expected[1:] - 7)
    assert is_clean(figure)


def test_a_roc_curve_encloses_the_auc_that_its_panel_prints(t2):
    figure = views.roc_by_center(t2)
    assert [title.split("\n")[0] for title in titles(figure)] == ["Global", "NYU", "MCF", "AHN"]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["Centralized", "FedProx (μ=0.1)"]
    for ax, center in zip(figure.axes[:3], ("global", "NYU", "MCF"), strict=True):
        here = t2 if center == "global" else t2[t2["center"] == center]
        for (arm, part), curve in zip(here.groupby("arm"), ax.lines, strict=False):
            expected = roc_auc_score(part["y_true"], part["prob_1"])
            assert auc(*curve.get_data()) == pytest.approx(expected)
            assert curve.get_label() == f"{expected:.2f}" in legend(ax)
            assert curve.get_color() == views.color(arm)
    ahn = figure.axes[3]
    assert ahn.get_legend() is None and ahn.texts[0].get_text() == "n/a: one class only"
    assert ahn.get_title() == "AHN\n0 of 12 positive" and is_clean(figure)


def test_scores_of_one_model_per_center_are_not_pooled(t2):
    both, nyu, *_ = views.roc_by_center(t2.replace({"arm": {"fedprox_0.1": "local_only"}})).axes
    assert (len(legend(both)), len(legend(nyu))) == (1, 2)
    assert is_clean(views.roc_by_center(t2.assign(arm="local_only")))  # nothing to pool


@pytest.mark.parametrize("n_centers", [2, 30])
def test_few_and_many_centers_with_long_names_have_room(n_centers):
    rng, names = np.random.default_rng(0), [f"Hôpital général Saint-Luc {k}" for k in range(n_centers)]
    keys = itertools.product(("centralized", "fedavg", "local_only"), (0, 1), names, range(6))
    rows = pd.DataFrame(keys, columns=["arm", "fold", "center", "k"]).assign(task="binary", modality="CT")
    rows["case_id"] = rows["center"] + rows["fold"].astype(str) + rows["k"].astype(str)
    prob = rng.random(len(rows))
    rows = rows.assign(seed=0, epoch=1, y_true=rows["k"] % 2, prob_0=1 - prob, prob_1=prob)
    forest = views.forests(metrics.over_folds(metrics.by_fold(rows)))
    assert len(forest.axes[0].get_yticks()) == n_centers + 1 and forest.get_size_inches()[1] < 16
    roc = views.roc_by_center(rows)
    assert sum(bool(ax.get_title()) for ax in roc.axes) == min(1 + n_centers, style.MANY)
    facts = rows.assign(in_plane_mm=1.0, slice_mm=3.0, roi_median=rng.uniform(90, 900, len(rows)))
    for figure in (forest, roc, views.scanners(facts)):
        assert is_clean(figure)
        box, page = figure.get_tightbbox(), figure.bbox_inches  # nothing is cut off: legends, names
        assert box.x0 > -0.3 and box.x1 < page.width + 0.3 and box.y0 > -0.3 and box.y1 < page.height + 0.3


def test_scanners_draw_a_point_for_each_scan(phantom_scans):
    facts = data.scanner_facts(pd.concat([phantom_scans.head(7), phantom_scans.tail(7)]))
    figure = views.scanners(facts)
    assert all(sum(len(points.get_offsets()) for points in ax.collections) == 14 for ax in figure.axes)
    assert is_clean(figure)
