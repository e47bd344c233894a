import itertools

import numpy as np
import pandas as pd
import pytest
from drawn import is_clean, titles
from matplotlib.colors import to_hex

from ipmn_core.metrics import calibration, tables
from ipmn_core.names import CENTERS
from ipmn_core.views import review, style

pytestmark = [pytest.mark.filterwarnings("error"), pytest.mark.usefixtures("house_style")]
MODALITIES, METHODS = ("t1", "t2"), ("centralized", "fedavg", "fedprox_0.1")
SHOWN = ["Centralized", "FedAvg", "FedProx (μ=0.1)"]


def table(columns, *levels, seed=0):
    """One row for every combination of levels, the rest of the columns drawn from 0.5 to 0.9."""
    keys = list(itertools.product(*levels))
    numbers = np.random.default_rng(seed).uniform(0.5, 0.9, (len(keys), len(columns) - len(levels)))
    return pd.DataFrame([(*key, *row) for key, row in zip(keys, numbers, strict=True)], columns=columns)


def legend(ax):
    return [text.get_text() for text in ax.get_legend().get_texts()]


def line(ax, label):
    """The one line of a panel with this label."""
    (found,) = [drawn for drawn in ax.lines if drawn.get_label() == label]
    return found


def predictions(task="binary", arms=METHODS, modalities=MODALITIES):
    rng, n, frames = np.random.default_rng(0), 60, []
    for modality, arm in itertools.product(modalities, arms):
        y, prob = rng.integers(0, 2, n), rng.random(n).round(2)
        run = {"center": "NYU", "modality": modality, "task": task, "arm": arm, "fold": 0, "epoch": 1}
        frame = pd.DataFrame({"case_id": range(n), **run, "y_true": y, "prob_0": 1 - prob, "prob_1": prob})
        if task == "three_class":
            frame = frame.assign(y_true=2 * y, prob_1=0.0, prob_2=prob)
        frames.append(frame)
    return pd.concat(frames, ignore_index=True)


@pytest.fixture
def intervals():
    frame = table(["modality", "arm", "center", "auc"], MODALITIES, METHODS, (*CENTERS, "global"))
    frame = frame.assign(auc_low=frame["auc"] - 0.1, auc_high=frame["auc"] + 0.1, undefined="")
    ahn = (frame["center"] == "AHN") & (frame["modality"] == "t1")
    frame.loc[ahn, ["auc", "auc_low", "auc_high"]] = np.nan
    frame.loc[ahn, "undefined"] = "no high-risk case in fold 2 and fold 3"
    return frame


def test_a_reliability_diagram_draws_the_curve_of_every_arm_in_the_panel_of_its_modality():
    curve = calibration.reliability(predictions())
    figure = review.reliability_diagrams(curve)
    assert titles(figure) == ["High risk, T1", "High risk, T2"] and legend(figure.axes[1]) == SHOWN
    for ax, modality in zip(figure.axes, MODALITIES, strict=True):
        for arm, label in zip(METHODS, SHOWN, strict=True):
            rows = curve[(curve["modality"] == modality) & (curve["arm"] == arm)]
            np.testing.assert_array_equal(line(ax, label).get_xydata(), rows[["predicted", "observed"]])
        bars, markers = ax.collections[:2]  # of the first arm
        rows = curve[(curve["modality"] == modality) & (curve["arm"] == METHODS[0])]
        ends = [segment[:, 1] for segment in bars.get_segments()]
        np.testing.assert_array_equal(ends, rows[["low", "high"]])
        sizes = markers.get_sizes() / rows["n"]
        assert np.ptp(sizes) < 1e-9 * sizes.max()  # float64: area is proportional to the cases
    assert is_clean(figure)


def test_both_tasks_have_a_row_of_panels_each_with_its_own_legend_and_a_missing_one_says_so():
    both = pd.concat([predictions(), predictions("three_class", ("resnet34",), ("t2",))])
    for draw, compute in (
        (review.reliability_diagrams, calibration.reliability),
        (review.decision_curves, calibration.decision_curve),
    ):
        figure = draw(compute(both))
        expected = ["High risk, T1", "High risk, T2", "Three classes, T1: no runs", "Three classes, T2"]
        assert titles(figure) == expected
        assert legend(figure.axes[1])[:3] == SHOWN and legend(figure.axes[3])[0] == "ResNet-34"
        assert is_clean(figure)


def test_decision_curves_have_the_two_defaults_below_the_arms():
    curve = calibration.decision_curve(predictions())
    figure = review.decision_curves(curve)
    assert titles(figure) == ["High risk, T1", "High risk, T2"]
    assert legend(figure.axes[1]) == [*SHOWN, "treat all", "treat none"]
    ax, rows = figure.axes[0], curve[curve["modality"] == "t1"]
    for arm, label in (("fedavg", "FedAvg"), ("treat all", "treat all"), ("treat none", "treat none")):
        expected = rows.loc[rows["arm"] == arm, ["threshold", "net_benefit"]]
        np.testing.assert_array_equal(line(ax, label).get_xydata(), expected)
    assert line(ax, "treat all").get_zorder() < line(ax, "FedAvg").get_zorder()
    assert ax.get_ylim()[0] < 0 < rows["net_benefit"].max() < ax.get_ylim()[1]
    assert is_clean(figure)


def test_the_majority_class_is_a_thick_line_and_a_method_not_above_it_is_hollow():
    centers = (*CENTERS, "global")
    audit = table(["center", "modality", "majority", *METHODS], centers, MODALITIES)
    audit["fedavg"] = audit["majority"]  # equal is not above
    audit["centralized"], audit["n"], audit["beaten_by"] = audit["majority"] + 0.01, 20, 1
    figure = review.majority(audit)
    assert titles(figure) == ["T1", "T2"] and legend(figure.axes[1]) == ["majority class", *SHOWN]
    rows = audit[audit["modality"] == "t2"]
    thick, first, _, second = figure.axes[1].collections[:4]
    assert [segment[0, 0] for segment in thick.get_segments()] == rows["majority"].tolist()
    assert [round(segment[:, 1].mean()) for segment in thick.get_segments()] == list(range(8))
    np.testing.assert_array_equal(first.get_offsets()[:, 0], rows["centralized"])
    assert {to_hex(c) for c in first.get_facecolor()} == {style.PALETTE[0].lower()}
    assert {to_hex(c) for c in second.get_facecolor()} == {"#ffffff"}
    assert {to_hex(c) for c in second.get_edgecolor()} == {style.PALETTE[1].lower()}
    assert [t.get_text() for t in figure.axes[0].get_yticklabels()] == [*CENTERS, "Global"]
    assert is_clean(figure)


def test_intervals_of_auc_lie_in_the_row_of_their_center_and_na_says_why(intervals):
    figure = review.auc_intervals(intervals)
    assert titles(figure) == ["T1", "T2"] and legend(figure.axes[1]) == SHOWN
    for ax, modality in zip(figure.axes, MODALITIES, strict=True):
        for arm, label in zip(METHODS, SHOWN, strict=True):
            rows = intervals[(intervals["modality"] == modality) & (intervals["arm"] == arm)]
            x, y = line(ax, label).get_data()
            np.testing.assert_array_equal(x, rows["auc"])
            assert np.round(y).tolist() == list(range(8))
        bars = [segment[:, 0] for bars in ax.collections for segment in bars.get_segments() if len(segment)]
        rows = intervals[intervals["modality"] == modality].dropna()
        np.testing.assert_array_equal(np.array(bars), rows[["auc_low", "auc_high"]])
    notes = figure.axes[0].texts
    assert [text.get_text() for text in notes] == ["n/a: no high-risk case ..."] * 3
    assert all(round(text.get_position()[1]) == CENTERS.index("AHN") for text in notes)
    assert not figure.axes[1].texts and is_clean(figure)


def test_the_papers_aucs_are_hollow_in_the_row_of_their_center_and_method(intervals):
    figure = review.auc_intervals(intervals, tables.paper(3))
    assert figure.axes[1].get_legend().get_title().get_text() == "hollow: the paper"
    printed = tables.paper(3).query("method == 'fedavg' and modality == 't2'")
    ax = figure.axes[1]
    ours = [drawn.get_label() for drawn in ax.lines].index("FedAvg")
    hollow = ax.lines[ours + 1]
    np.testing.assert_array_equal(hollow.get_xdata(), printed["auc_mean"])
    rows = printed["center"].map((*CENTERS, "global").index)
    assert np.round(hollow.get_ydata()).tolist() == rows.tolist() and is_clean(figure)


def test_intervals_of_the_three_class_task_have_panels_of_their_own_without_the_paper(intervals):
    models = intervals.assign(
        task="three_class", arm=intervals["arm"].replace(METHODS, ("resnet34", "shufflenetv2", "mobilenetv2"))
    )
    figure = review.auc_intervals(pd.concat([intervals.assign(task="binary"), models]), tables.paper(3))
    assert titles(figure) == ["High risk, T1", "High risk, T2", "Three classes, T1", "Three classes, T2"]
    assert legend(figure.axes[3]) == ["ResNet-34", "ShuffleNet-V2", "MobileNet-V2"]


def test_pooled_within_and_between_are_three_markers_in_the_row_of_their_arm():
    arms = ("fedavg", "center_only", "oracle")
    frame = table(["modality", "arm", "pooled", "within", "between"], MODALITIES, arms)
    frame.loc[1, "within"] = np.nan
    frame.loc[2, ["pooled", "within", "between"]] = np.nan
    figure = review.within_and_between(frame)
    assert titles(figure) == ["T1", "T2"]
    labels = ["all pairs (pooled)", "within a center", "between centers"]
    assert legend(figure.axes[1]) == labels
    assert [t.get_text() for t in figure.axes[0].get_yticklabels()] == ["FedAvg", "Center only", "Oracle"]
    for ax, (_, rows) in zip(figure.axes, frame.groupby("modality"), strict=True):
        for label, column, marker in zip(labels, ("pooled", "within", "between"), "osD", strict=True):
            drawn_line = line(ax, label)
            np.testing.assert_array_equal(drawn_line.get_xdata(), rows[column])
            assert drawn_line.get_marker() == marker and list(drawn_line.get_ydata()) == [0, 1, 2]
        assert (
            line(ax, labels[0]).get_markerfacecolor() != "none" == line(ax, labels[2]).get_markerfacecolor()
        )
        assert any(list(other.get_xdata()) == [0.5, 0.5] for other in ax.lines)
    assert is_clean(figure)


def test_optimism_has_a_panel_for_each_task_and_modality_with_a_row_for_each_of_its_arms():
    columns = ["task", "modality", "arm", "best_test", "best_inner", "last"]
    frame = pd.concat(
        [
            table(columns, ("three_class",), MODALITIES, ("resnet34", "densenet121")),
            table(columns, ("binary",), MODALITIES, METHODS, seed=1),
        ]
    )
    figure = review.optimism(frame)
    assert titles(figure) == ["High risk, T1", "High risk, T2", "Three classes, T1", "Three classes, T2"]
    names = [[t.get_text() for t in ax.get_yticklabels()] for ax in figure.axes]
    assert names[0] == SHOWN and names[2] == ["ResNet-34", "DenseNet-121"]
    assert legend(figure.axes[1]) == ["best on test fold", "best on inner split", "last epoch"]
    assert figure.axes[3].get_legend() is None  # it would say the same
    rows = frame.query("task == 'three_class' and modality == 't2'")
    np.testing.assert_array_equal(line(figure.axes[3], "last epoch").get_xdata(), rows["last"])
    (bars,) = [c for c in figure.axes[3].collections if hasattr(c, "get_segments")]
    ends = [segment[:, 0] for segment in bars.get_segments()]
    numbers = rows[["best_test", "best_inner", "last"]]
    np.testing.assert_array_equal(ends, np.column_stack([numbers.min(axis=1), numbers.max(axis=1)]))
    assert is_clean(figure)
    figure = review.optimism(frame.assign(best_inner=np.nan))  # without an inner split
    assert legend(figure.axes[1]) == ["best on test fold", "last epoch"]


@pytest.mark.parametrize("n_rounds", [1, 2, 30])
def test_drift_has_a_thin_line_a_fold_and_the_mean_of_every_client_in_its_color(n_rounds):
    columns = ["modality", "arm", "fold", "client", "round", "distance"]
    frame = table(columns, MODALITIES, METHODS[1:], (0, 1, 2), CENTERS[::-1], range(1, n_rounds + 1))
    figure = review.drift(frame)
    assert titles(figure) == ["T1, FedAvg", "T1, FedProx (μ=0.1)", "T2, FedAvg", "T2, FedProx (μ=0.1)"]
    assert legend(figure.axes[1]) == list(CENTERS)
    for ax, (_, rows) in zip(figure.axes, frame.groupby(["modality", "arm"]), strict=True):
        assert len(ax.lines) == 7 * 4  # three folds and their mean
        for client in CENTERS:
            mean = line(ax, client)
            expected = rows[rows["client"] == client].groupby("round")["distance"].mean()
            np.testing.assert_allclose(mean.get_ydata(), expected, rtol=1e-12)  # sums in another order
            assert mean.get_color() == style.color(client)
            assert np.round(mean.get_xdata()).tolist() == list(range(1, n_rounds + 1))
            assert (mean.get_marker() == "o") == (n_rounds <= 10)  # a line of one point shows nothing
    assert is_clean(figure) and all(tick.is_integer() for tick in figure.axes[2].get_xticks())


def test_cosines_are_heat_maps_from_minus_one_to_one_with_their_numbers():
    frame = table(["modality", "arm", "client", "other", "cosine"], MODALITIES, METHODS[1:], CENTERS, CENTERS)
    frame["cosine"] = 2 * frame["cosine"] - 1.7
    frame.loc[0, "cosine"] = np.nan
    figure = review.cosines(
        frame.sample(frac=1, random_state=0).sort_values(["modality", "arm"], kind="stable")
    )
    panels = figure.axes[:4]  # the fifth is the color bar
    assert [ax.get_title() for ax in panels][:2] == ["T1, FedAvg", "T1, FedProx (μ=0.1)"]
    for ax, (_, rows) in zip(panels, frame.groupby(["modality", "arm"]), strict=True):
        (image,) = ax.images
        expected = rows["cosine"].to_numpy().reshape(7, 7)
        np.testing.assert_array_equal(image.get_array().filled(np.nan), expected)
        assert image.get_clim() == (-1, 1)
        written = np.array([text.get_text() for text in ax.texts]).reshape(7, 7)
        assert written[3, 4] == f"{expected[3, 4]:.2f}" and len(ax.texts) == 49
    assert panels[0].texts[0].get_text() == "n/a" and figure.axes[4].get_ylabel() == "cosine between updates"
    assert [t.get_text() for t in panels[2].get_xticklabels()] == list(CENTERS)
    assert is_clean(figure)


def test_gain_has_a_panel_for_each_modality_and_reference_around_a_zero_line():
    columns = ["modality", "over", "arm", "center", "difference"]
    centers = (*CENTERS, "global")
    frame = table(columns, MODALITIES, ("centralized", "local_only"), ("fedavg", "fedprox_0.1"), centers)
    frame["difference"] -= 0.7
    frame = frame.assign(low=frame["difference"] - 0.1, high=frame["difference"] + 0.1)
    frame.loc[3, ["difference", "low", "high"]] = np.nan
    for shown, note in ((frame, "n/a"), (frame.assign(undefined="no other case"), "n/a: no other case")):
        figure = review.gain(shown)
        assert titles(figure)[:2] == ["T1, gain over Centralized", "T1, gain over Local only"]
        assert legend(figure.axes[1]) == SHOWN[1:] and figure.axes[3].get_legend() is None
        assert [text.get_text() for text in figure.axes[0].texts] == [note]
        rows = frame.query("modality == 't2' and over == 'local_only' and arm == 'fedavg'")
        np.testing.assert_array_equal(line(figure.axes[3], "FedAvg").get_xdata(), rows["difference"])
        assert all(any(list(zero.get_xdata()) == [0, 0] for zero in ax.lines) for ax in figure.axes)
        assert is_clean(figure)


def test_references_are_square_or_dashed(intervals):
    probes = intervals.assign(arm=intervals["arm"].replace("centralized", "center_only"))
    ax = review.auc_intervals(probes).axes[0]
    assert line(ax, "Center only").get_marker() == "s" and line(ax, "FedAvg").get_marker() == "o"
    curve = calibration.decision_curve(predictions(arms=("fedavg", "oracle")))
    ax = review.decision_curves(curve).axes[0]
    assert line(ax, "Oracle").get_linestyle() == "--" and line(ax, "FedAvg").get_linestyle() == "-"


@pytest.mark.parametrize("figure", [review.drift, review.cosines, review.gain])
def test_a_profile_without_a_federated_arm_is_told_so(figure):
    (ax,) = figure(pd.DataFrame(columns=["modality", "arm"])).axes
    assert "no run of this kind" in ax.texts[0].get_text()
