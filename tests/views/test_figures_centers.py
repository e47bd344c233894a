import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from matplotlib.text import Text

from ipmn_core import metrics, views
from ipmn_core.metrics import centers

pytestmark = [pytest.mark.filterwarnings("error"), pytest.mark.usefixtures("house_style")]


@pytest.fixture(scope="module")
def summary(binary_predictions):
    table = centers.summary(centers.by_rules(binary_predictions), n_resamples=50)
    return table.query("modality == 't2' and rule == 'last' and metric == 'auc'")


def texts(figure):
    return [text.get_text() for text in figure.findobj(Text)]


def test_each_center_has_its_mean_and_interval_and_na_where_there_is_none(summary):
    _, ax = plt.subplots()
    views.intervals(summary, ax, "MCF")
    assert [label.get_text() for label in ax.get_yticklabels()] == ["NYU", "MCF", "AHN", "Global"]
    for container, (_, rows) in zip(ax.containers, summary.groupby("arm", sort=False), strict=True):
        points, _, (bars,) = container
        rows = rows.set_index("center").reindex(["NYU", "MCF", "AHN", "global"])
        np.testing.assert_allclose(points.get_xdata(orig=False), rows["mean"])
        ends = [
            segment[:, 0]
            for segment in bars.get_segments()
            if np.size(segment) and np.isfinite(segment).all()
        ]
        known = rows[["low", "high"]].dropna().astype(float)
        np.testing.assert_allclose(ends, known, atol=1e-12)
    assert texts(ax.figure).count("n/a") == 2  # AHN has no high risk on T2: once an arm


def test_the_details_are_those_of_the_center_and_the_arm(binary_predictions):
    rows = binary_predictions.query("modality == 't2'")
    figure = views.center_in_detail(rows, "NYU", "fedprox_0.1")
    _, middle, right = figure.axes
    matrix = centers.confusion(rows.query("center == 'NYU' and arm == 'fedprox_0.1'"))
    assert [text.get_text() for text in middle.texts] == [str(n) for n in matrix.flat]
    assert sum(bar.get_height() for bar in right.patches) == matrix.sum() == 12
    assert any("NYU" in text for text in texts(figure))


@pytest.mark.parametrize(("center", "arm"), [("AHN", "centralized"), ("EMC", "centralized"), ("NYU", "none")])
def test_a_center_with_one_class_or_without_cases_is_said(binary_predictions, center, arm):
    figure = views.center_in_detail(binary_predictions.query("modality == 't2'"), center, arm)
    figure.canvas.draw()
    said = " ".join(texts(figure))
    why = {"AHN": "one class only", "EMC": "no cases", "NYU": "not among the arms shown"}[center]
    assert why in said and "nan" not in said.lower()


def test_three_classes_are_shown_as_high_risk_against_the_rest(binary_predictions):
    rows = binary_predictions.assign(task="three_class", prob_2=binary_predictions["prob_1"])
    rows["prob_1"] = 0.0
    rows["y_true"] *= 2
    rows = rows.query("modality == 't1'")
    left, middle, _ = views.center_in_detail(rows, metrics.GLOBAL, "centralized").axes
    assert len(middle.texts) == 9
    assert "12 of 36 high risk" in left.get_title()


def test_scores_of_a_model_a_center_are_not_pooled(binary_predictions):
    rows = binary_predictions.query("modality == 't1'").replace({"arm": {"fedprox_0.1": "local_only"}})
    for center, arms in ((metrics.GLOBAL, ["Centralized"]), ("NYU", ["Centralized", "Local only"])):
        left = views.center_in_detail(rows, center, "centralized").axes[0]
        curves = [line.get_label().rsplit(" ", 1)[0] for line in left.lines if line.get_label()[0] != "_"]
        assert curves == arms


def test_the_overview_names_every_arm(summary):
    assert {"Centralized", "FedProx (μ=0.1)"} <= set(texts(views.overview(summary)))


def test_an_accuracy_is_that_of_all_cases_and_an_auc_the_mean_over_folds(binary_predictions):
    table = centers.summary(centers.by_rules(binary_predictions), n_resamples=50)
    table = table.query("modality == 't2' and rule == 'last'")
    named = {m: views.overview(table[table["metric"] == m]) for m in ("acc", "auc")}
    assert "ACC, all test cases, with 95 % interval" in texts(named["acc"])
    assert "AUC, mean over folds, with 95 % interval" in texts(named["auc"])
    acc = table[(table["metric"] == "acc") & (table["center"] == "NYU")].set_index("arm")["mean"]
    rows = binary_predictions.query("modality == 't2' and center == 'NYU'")
    right = (rows["prob_1"] > rows["prob_0"]) == (rows["y_true"] == 1)
    np.testing.assert_allclose(acc, right.groupby(rows["arm"]).mean()[acc.index])


def test_a_method_that_is_not_shown_is_not_called_a_center_without_cases(binary_predictions):
    rows = binary_predictions.query("modality == 't2' and arm == 'centralized'")
    said = texts(views.center_in_detail(rows, "NYU", "fedprox_0.1"))
    assert said.count("NYU: FedProx (μ=0.1) is not among the arms shown") == 2


def test_the_legend_of_many_methods_stays_in_the_picture(binary_predictions):
    one = binary_predictions.query("modality == 't2' and arm == 'centralized'")
    arms = ("centralized", "fedavg", "fedprox_0.1", "fedprox_0.3", *views.REFERENCES)
    figure = views.center_in_detail(pd.concat([one.assign(arm=arm) for arm in arms]), "NYU", arms[0])
    figure.canvas.draw()
    (legend,) = figure.legends
    box, page = legend.get_window_extent(), figure.bbox
    assert page.x0 <= box.x0 and box.x1 <= page.x1 and page.y0 <= box.y0
