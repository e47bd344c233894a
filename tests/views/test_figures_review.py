import itertools

import numpy as np
import pandas as pd
import pytest
from drawn import is_clean, legend, line, texts, titles

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


@pytest.mark.parametrize("n_rounds", [1, 30])
def test_drift_has_a_thin_line_a_fold_and_the_mean_of_every_client_in_its_color(n_rounds):
    columns = ["modality", "arm", "fold", "client", "round", "distance"]
    frame = table(columns, MODALITIES, METHODS[1:], (0, 1, 2), CENTERS[::-1], range(1, n_rounds + 1))
    figure = review.drift(frame)
    assert titles(figure) == ["T1, FedAvg", "T1, FedProx (μ=0.1)", "T2, FedAvg", "T2, FedProx (μ=0.1)"]
    assert legend(figure.axes[1]) == list(CENTERS[::-1])
    for ax, (_, rows) in zip(figure.axes, frame.groupby(["modality", "arm"]), strict=True):
        assert len(ax.lines) == 7 * 4  # three folds and their mean
        mean, expected = line(ax, "EMC"), rows[rows["client"] == "EMC"].groupby("round")["distance"].mean()
        np.testing.assert_allclose(mean.get_ydata(), expected, rtol=1e-12)  # sums in another order
        assert mean.get_color() == style.PALETTE[0]  # it comes first
        assert (mean.get_marker() == ".") == (n_rounds <= 10)  # a line of one point shows nothing
    assert is_clean(figure) and all(tick.is_integer() for tick in figure.axes[2].get_xticks())


def test_cosines_are_heat_maps_from_minus_one_to_one_with_their_numbers():
    frame = table(["modality", "arm", "client", "other", "cosine"], MODALITIES, METHODS[1:], CENTERS, CENTERS)
    frame["cosine"] = 2 * frame["cosine"] - 1.7
    frame.loc[[0, 1], "cosine"] = np.nan, -0.001
    figure = review.cosines(frame)
    panels = figure.axes[:4]  # the fifth is the color bar
    for ax, (_, rows) in zip(panels, frame.groupby(["modality", "arm"]), strict=True):
        (image,) = ax.images
        expected = rows["cosine"].to_numpy().reshape(7, 7)
        np.testing.assert_array_equal(image.get_array().filled(np.nan), expected)
        assert image.get_clim() == (-1, 1) and ax.texts[3 * 7 + 4].get_text() == f"{expected[3, 4]:.2f}"
    assert [text.get_text() for text in panels[0].texts[:2]] == ["n/a", "0.00"]
    assert [text.get_text() for text in panels[2].get_xticklabels()] == list(CENTERS)
    assert figure.axes[4].get_ylabel() == "cosine between updates" and is_clean(figure)


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


def test_of_many_clients_those_that_move_most_are_named_and_a_map_has_no_numbers():
    many, keys = [f"Universitätsklinikum {k}" for k in range(30)], ["modality", "arm"]
    frame = table([*keys, "fold", "client", "round", "distance"], ("mri",), METHODS[1:], (0, 1), many, (1, 2))
    figure = review.drift(frame)
    far = frame.groupby("client")["distance"].mean().sort_values()
    named = legend(figure.axes[-1])
    assert {name[-2:] for name in named[:-1]} == {name[-2:] for name in far.index[-len(named) + 1 :]}
    others = frame[frame["client"].isin(far.index[: 1 - len(named)]) & (frame["arm"] == METHODS[1])]
    mean = line(figure.axes[0], "mean of the others").get_ydata()
    np.testing.assert_allclose(mean, others.groupby("round")["distance"].mean())
    assert named[-1] == "mean of the others" and len(named) == style.MANY and is_clean(figure)
    cosines = review.cosines(table([*keys, "client", "other", "cosine"], ("mri",), METHODS[1:], many, many))
    assert not cosines.axes[0].texts and cosines.axes[0].images[0].get_array().shape == (30, 30)
    assert is_clean(cosines)


@pytest.mark.parametrize("figure", [review.drift, review.cosines, review.gain])
def test_a_profile_without_a_federated_arm_is_told_so(figure):
    keys = ["modality", "arm", "fold", "round", "client", "other", "center", "over"]
    empty = pd.DataFrame(columns=[*keys, "difference", "distance"])
    assert any(text.startswith("n/a: nothing to show") for text in texts(figure(empty)))


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
