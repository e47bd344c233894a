import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import roc_auc_score
from test_metrics import predictions

from ipmn_core.metrics import heterogeneity


def updates(vectors, **run):
    """The long form of the inner products of {client: update}."""
    rows = [(a, b, float(np.dot(vectors[a], vectors[b]))) for a in vectors for b in vectors]
    run = {"modality": "t1", "arm": "fedavg", "fold": 0, "round": 1} | run
    return pd.DataFrame(rows, columns=["client", "other", "inner_product"]).assign(**run)


def test_drift_is_the_length_of_a_clients_update():
    table = heterogeneity.drift(updates({"NYU": np.array([3.0, 4.0]), "AHN": np.array([0.0, 2.0])}))
    assert table.set_index("client")["distance"].to_dict() == {"NYU": 5.0, "AHN": 2.0}


def test_cosines_are_those_of_the_vectors_in_the_order_of_the_centers():
    rng = np.random.default_rng(0)
    vectors = {name: rng.standard_normal(50) for name in ("EMC", "NYU", "AHN")}
    table = heterogeneity.cosines(updates(vectors))
    assert table["client"].drop_duplicates().tolist() == ["NYU", "AHN", "EMC"]
    for row in table.itertuples():
        a, b = vectors[row.client], vectors[row.other]
        assert row.cosine == pytest.approx(a @ b / np.linalg.norm(a) / np.linalg.norm(b), abs=1e-12)


def test_cosines_are_means_over_rounds_and_folds_and_undefined_for_a_client_that_stood_still():
    east, north, still = np.array([1.0, 0.0]), np.array([0.0, 1.0]), np.zeros(2)
    rounds = [updates({"NYU": east, "AHN": east}), updates({"NYU": east, "AHN": north}, round=2)]
    table = heterogeneity.cosines(pd.concat(rounds)).set_index(["client", "other"])["cosine"]
    assert table["NYU", "AHN"] == 0.5 and table["NYU", "NYU"] == 1
    table = heterogeneity.cosines(updates({"NYU": east, "AHN": still})).set_index(["client", "other"])[
        "cosine"
    ]
    assert np.isnan(table["NYU", "AHN"]) and table["NYU", "NYU"] == 1


def three_arms():
    rng = np.random.default_rng(1)
    y, center = rng.integers(0, 2, 80), np.repeat(["NYU", "AHN"], 40)
    y[40:] = 0  # AHN has no high-risk case
    frames = []
    for arm in ("centralized", "local_only", "fedavg"):
        frame = predictions(y, rng.random(80), center, arm=arm)
        frames.append(frame.assign(fold=np.arange(80) % 2))
    return pd.concat(frames, ignore_index=True)


def test_gain_is_the_difference_of_the_centers_pooled_auc():
    arms = three_arms()
    table = heterogeneity.gain(arms).set_index(["over", "center"])
    assert len(table) == 2 * 3
    for over in ("centralized", "local_only"):
        auc = {
            arm: roc_auc_score(rows["y_true"], rows["prob_1"])
            for arm, rows in arms[arms["center"] == "NYU"].groupby("arm")
        }
        row = table.loc[(over, "NYU")]
        assert row["difference"] == pytest.approx(auc["fedavg"] - auc[over], abs=1e-12)
        assert row["low"] < row["difference"] < row["high"] and row["undefined"] == ""
        assert (row["n"], row["positives"]) == (40, arms["y_true"][:40].sum())


def test_gain_of_a_center_of_one_class_is_undefined_with_the_reason():
    row = heterogeneity.gain(three_arms()).query("center == 'AHN'").iloc[0]
    assert np.isnan(row["difference"]) and row["undefined"] == "no high-risk case"


def test_gain_says_why_it_has_no_interval_and_compares_local_only_within_centers_alone():
    arms = three_arms()
    arms.loc[(arms["center"] == "AHN") & (arms["case_id"] == "case_50"), "y_true"] = 1
    table = heterogeneity.gain(arms).set_index(["over", "center"])
    row = table.loc[("centralized", "AHN")]
    assert row["positives"] == 1 and np.isfinite(row["difference"]) and np.isnan(row["low"])
    assert row["undefined"] == "one high-risk case: too few for a DeLong interval"
    assert np.isfinite(table.loc[("centralized", "global"), "difference"])
    row = table.loc[("local_only", "global")]
    assert np.isnan(row["difference"]) and "no common scale" in row["undefined"]


def test_gain_refuses_arms_tested_on_other_cases_and_several_epochs():
    arms = three_arms()
    lost = (arms["arm"] == "fedavg") & (arms["case_id"] == "case_7")
    with pytest.raises(ValueError, match=r"Case case_7 .*tested by centralized, not by fedavg"):
        heterogeneity.gain(arms[~lost])
    with pytest.raises(ValueError, match="several epochs"):
        heterogeneity.gain(pd.concat([arms, arms.assign(epoch=2)]))


def test_gain_leaves_out_what_was_not_trained():
    table = heterogeneity.gain(three_arms().query("arm != 'local_only'"))
    assert set(table["over"]) == {"centralized"}
    assert heterogeneity.gain(three_arms().query("arm == 'centralized'")).empty
