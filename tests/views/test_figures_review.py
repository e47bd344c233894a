import itertools

import numpy as np
import pandas as pd
import pytest
from drawn import is_clean, legend, line, titles

from ipmn_core import metrics
from ipmn_core.metrics import audit, calibration, tables
from ipmn_core.names import CENTERS
from ipmn_core.views import results, review, style

pytestmark = [pytest.mark.filterwarnings("error"), pytest.mark.usefixtures("house_style")]
MODALITIES, METHODS = ("t1", "t2"), ("centralized", "fedavg", "fedprox_0.1")
SHOWN = ["Centralized", "FedAvg", "FedProx (μ=0.1)"]
HIGH_RISK = ["Positive against the rest, T1", "Positive against the rest, T2"]
THREE = ["All classes, T1", "All classes, T2"]


def table(columns, *levels, seed=0):
    """One row for every combination of levels, the rest of the columns drawn from 0.5 to 0.9."""
    keys = list(itertools.product(*levels))
    numbers = np.random.default_rng(seed).uniform(0.5, 0.9, (len(keys), len(columns) - len(levels)))
    return pd.DataFrame([(*key, *row) for key, row in zip(keys, numbers, strict=True)], columns=columns)


def rows_of(ax):
    return [text.get_text() for text in ax.get_yticklabels()]


def check_dots(ax, label, expected):
    """The dots of one arm of a forest are these values, one per row from above."""
    x, y = line(ax, label).get_data()
    np.testing.assert_array_equal(np.round(np.sort(y)), range(len(y)))
    np.testing.assert_array_equal(x[np.argsort(y)], expected)


def test_a_reliability_diagram_draws_the_curve_of_every_arm_in_the_panel_of_its_task(binary_predictions):
    three = binary_predictions.query("modality == 't2'").replace({"arm": {"fedprox_0.1": "resnet34"}})
    three = three.assign(task="multiclass", prob_2=three["prob_1"], prob_1=0.0, y_true=2 * three["y_true"])
    curve = calibration.reliability(pd.concat([binary_predictions, three]))
    figure = review.reliability_diagrams(curve)
    assert titles(figure) == [*HIGH_RISK, *THREE] and is_clean(figure)
    assert legend(figure.axes[1]) == SHOWN[::2] and legend(figure.axes[3]) == ["Centralized", "ResNet-34"]
    assert figure.axes[2].texts[0].get_text().startswith("n/a") and not figure.axes[2].lines
    rows = curve.query("task == 'binary' and modality == 't2' and arm == 'centralized'")
    drawn = line(figure.axes[1], "Centralized").get_xydata()
    np.testing.assert_array_equal(drawn, rows[["predicted", "observed"]])
    bars, markers = figure.axes[1].collections[:2]  # of the first arm
    np.testing.assert_array_equal([bar[:, 1] for bar in bars.get_segments()], rows[["low", "high"]])
    np.testing.assert_allclose(markers.get_sizes() / rows["n"], 90 / curve["n"].max())


def test_decision_curves_have_the_two_defaults_below_the_arms(binary_predictions):
    curve = calibration.decision_curve(binary_predictions)
    figure = review.decision_curves(curve)
    assert titles(figure) == HIGH_RISK and is_clean(figure)
    assert legend(figure.axes[1]) == ["Centralized", "FedProx (μ=0.1)", "treat all", "treat none"]
    ax, rows = figure.axes[0], curve[curve["modality"] == "t1"]
    for arm, label in (("centralized", "Centralized"), ("treat all", "treat all")):
        expected = rows.loc[rows["arm"] == arm, ["threshold", "net_benefit"]]
        np.testing.assert_array_equal(line(ax, label).get_xydata(), expected)
    assert line(ax, "treat all").get_zorder() < line(ax, "Centralized").get_zorder()
    assert ax.get_ylim()[0] < 0 < rows["net_benefit"].max() < ax.get_ylim()[1]


def test_a_method_is_right_of_the_line_where_it_beats_the_majority_class():
    frame = audit.majority_class()
    figure = review.majority(frame)
    assert titles(figure) == HIGH_RISK and is_clean(figure)
    ax, rows = figure.axes[0], frame[frame["modality"] == "t1"]
    check_dots(ax, "FedAvg", rows["fedavg"])
    lines = [one for one in ax.collections[0].get_segments() if one[0, 0] == one[1, 0]]
    lines.sort(key=lambda one: one[:, 1].mean())
    assert [one[0, 0] for one in lines] == rows["majority"].tolist()


def test_intervals_of_auc_have_bars_and_the_papers_aucs_of_the_binary_task_have_none():
    frame = table(["modality", "arm", "center", "auc"], MODALITIES, METHODS, (*CENTERS, "global"))
    ends = {"auc_low": frame["auc"] - 0.1, "auc_high": frame["auc"] + 0.1}
    intervals = frame.assign(**ends, undefined="", task="binary")
    models = intervals["arm"].replace(METHODS, ("resnet34", "shufflenetv2", "mobilenetv2"))
    both = pd.concat([intervals, intervals.assign(task="multiclass", arm=models)])
    figure = review.auc_intervals(both, tables.paper(3))
    assert titles(figure) == [*HIGH_RISK, *THREE]
    binary, three = figure.axes[1], figure.axes[3]
    ours = intervals.query("modality == 't2' and arm == 'fedavg'")
    theirs = tables.paper(3).query("modality == 't2' and method == 'fedavg'")
    check_dots(binary, "FedAvg", ours["auc"])
    hollow = binary.lines[[drawn.get_label() for drawn in binary.lines].index("FedAvg") + 1]
    np.testing.assert_array_equal(hollow.get_xdata(), theirs["auc_mean"])
    bars = [one for c in binary.collections for one in c.get_segments() if len(one) and one[0, 0] < one[1, 0]]
    expected = intervals.query("modality == 't2'")[["auc_low", "auc_high"]]
    np.testing.assert_array_equal([bar[:, 0] for bar in bars], expected)
    assert all(np.isnan(drawn.get_xdata()).all() for drawn in three.lines[1::2])


def test_numbers_of_one_arm_are_side_by_side_in_its_row_each_task_with_its_own_arms():
    columns = ["task", "modality", "arm", "best_test", "best_inner", "last"]
    networks = table(columns, ("multiclass",), MODALITIES, ("resnet34", "densenet121"))
    frame = pd.concat([networks, table(columns, ("binary",), MODALITIES, METHODS, seed=1)])
    figure = review.optimism(frame)
    assert titles(figure) == [*THREE, *HIGH_RISK] and is_clean(figure)
    assert rows_of(figure.axes[0]) == ["ResNet-34", "DenseNet-121"]
    assert figure.axes[3].get_legend() is None  # it would say the same
    mine = frame.query("task == 'binary' and modality == 't2'")
    check_dots(figure.axes[3], "last epoch or round", mine["last"])
    figure = review.optimism(frame.assign(best_inner=np.nan))  # without an inner split
    assert legend(figure.axes[1]) == ["best on the test fold (paper)", "last epoch or round"]
    pairs = table(["task", "modality", "arm", *style.PAIRS], ("binary",), MODALITIES, ("fedavg", "oracle"))
    figure = review.within_and_between(pairs)
    assert legend(figure.axes[1]) == list(style.PAIRS.values()) and rows_of(figure.axes[0])[1] == "Oracle"


def test_gain_has_a_panel_for_each_modality_and_reference_around_a_zero_line():
    columns, levels = ["modality", "over", "arm", "center", "difference"], ("centralized", "local_only")
    frame = table(columns, MODALITIES, levels, METHODS[1:], (*CENTERS, "global"))
    frame["difference"] -= 0.7
    frame = frame.assign(low=frame["difference"] - 0.1, high=frame["difference"] + 0.1, undefined="")
    frame.loc[3, ["difference", "low", "high", "undefined"]] = np.nan, np.nan, np.nan, "no other case"
    figure = review.gain(frame)
    assert titles(figure)[:2] == ["T1, gain over Centralized", "T1, gain over Local only"]
    assert legend(figure.axes[1]) == SHOWN[1:] and figure.axes[3].get_legend() is None and is_clean(figure)
    assert [text.get_text() for text in figure.axes[0].texts] == ["n/a: no other case"]
    rows = frame.query("modality == 't2' and over == 'local_only' and arm == 'fedavg'")
    check_dots(figure.axes[3], "FedAvg", rows["difference"])
    for ax in figure.axes:
        assert ax.get_xlim()[0] < frame["low"].min() < frame["high"].max() < ax.get_xlim()[1]


def test_a_reference_is_square_or_dashed(binary_predictions):
    probes = binary_predictions.replace({"arm": {"centralized": "oracle"}})
    forest = results.forests(metrics.over_folds(metrics.by_fold(probes)))
    assert line(forest.axes[0], "Oracle").get_marker() == "s" != line(forest.axes[0], SHOWN[2]).get_marker()
    curves = review.decision_curves(calibration.decision_curve(probes))
    assert line(curves.axes[0], "Oracle").get_linestyle() == "--"


def test_a_profile_without_a_federated_arm_is_told_so():
    empty = pd.DataFrame(columns=["modality", "arm", "center", "over", "difference"])
    assert review.gain(empty).axes[0].texts[0].get_text().startswith("n/a: nothing to show")


def test_the_cross_site_figure_has_a_row_per_model_with_the_common_ones_below():
    sites, trained = ["A", "B"], [("local_only", "A"), ("local_only", "B"), ("fedavg", "global")]
    rows = [("t2", *model, at, k / 10) for k, (model, at) in enumerate(itertools.product(trained, sites))]
    shown = pd.DataFrame(rows, columns=["modality", "arm", "trained_at", "center", "auc"])
    shown.loc[1, "auc"] = np.nan
    figure = review.cross_site(shown)
    assert is_clean(figure) and titles(figure)[0] == "T2"
    ax = figure.axes[0]
    assert rows_of(ax) == ["A", "B", "FedAvg"]
    cells = ["0.00", "n/a", "0.20", "0.30", "0.40", "0.50"]
    assert [text.get_text() for text in ax.texts] == cells
    assert ax.lines[0].get_ydata()[0] == 1.5  # the gap
