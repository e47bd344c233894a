import numpy as np
import pandas as pd
import pytest
from frames import rows
from sklearn.metrics import roc_auc_score

from ipmn_core.metrics import heterogeneity


def updates(vectors, **run):
    """The long form of the inner products of {client: update}."""
    products = [(a, b, float(np.dot(vectors[a], vectors[b]))) for a in vectors for b in vectors]
    run = {"modality": "t1", "arm": "fedavg", "fold": 0, "round": 1} | run
    return pd.DataFrame(products, columns=["client", "other", "inner_product"]).assign(**run)


def test_drift_is_the_length_and_cosines_are_those_of_the_vectors_in_order_of_appearance():
    rng = np.random.default_rng(0)
    vectors = {name: rng.standard_normal(50) for name in ("EMC", "NYU", "AHN")}
    length = {name: np.linalg.norm(vector) for name, vector in vectors.items()}
    drift = heterogeneity.drift(updates(vectors)).set_index("client")["distance"]
    assert drift.to_dict() == pytest.approx(length)
    table = heterogeneity.cosines(updates(vectors))
    assert table["client"].drop_duplicates().tolist() == ["EMC", "NYU", "AHN"]
    for row in table.itertuples():
        product = vectors[row.client] @ vectors[row.other]
        assert row.cosine == pytest.approx(product / length[row.client] / length[row.other], abs=1e-12)


def test_cosines_are_means_over_rounds_and_undefined_for_a_client_that_did_not_move():
    east, north = np.array([1.0, 0.0]), np.array([0.0, 1.0])
    rounds = [updates({"NYU": east, "AHN": east}), updates({"NYU": east, "AHN": north}, round=2)]
    still = updates({"NYU": east, "AHN": np.zeros(2)})
    for frame, expected in ((pd.concat(rounds), 0.5), (still, np.nan)):
        cosine = heterogeneity.cosines(frame).set_index(["client", "other"])["cosine"]
        np.testing.assert_equal([cosine["NYU", "AHN"], cosine["NYU", "NYU"]], [expected, 1])


@pytest.fixture
def three_arms():
    rng = np.random.default_rng(1)
    y, center = rng.integers(0, 2, 80), np.repeat(["NYU", "AHN"], 40)
    y[40:] = 0  # AHN has no positive case
    names = ("centralized", "local_only", "fedavg")
    arms = [rows(y, rng.random(80), center, arm=arm, fold=np.arange(80) % 2) for arm in names]
    return pd.concat(arms, ignore_index=True)


def test_gain_is_the_difference_of_the_centers_pooled_auc(three_arms):
    table = heterogeneity.gain(three_arms).set_index(["over", "center"])
    assert len(table) == 2 * 3
    at_nyu = three_arms[three_arms["center"] == "NYU"].groupby("arm")
    auc = {arm: roc_auc_score(mine["y_true"], mine["prob_1"]) for arm, mine in at_nyu}
    for over in ("centralized", "local_only"):
        row = table.loc[(over, "NYU")]
        assert row["difference"] == pytest.approx(auc["fedavg"] - auc[over], abs=1e-12)
        assert row["low"] < row["difference"] < row["high"] and row["undefined"] == ""
        assert (row["n"], row["positives"]) == (40, three_arms["y_true"][:40].sum())
    row = table.loc[("centralized", "AHN")]
    assert np.isnan(row["difference"]) and row["undefined"] == "no positive case"


def test_gain_says_why_it_has_no_interval_and_compares_local_only_within_centers_alone(three_arms):
    three_arms.loc[(three_arms["center"] == "AHN") & (three_arms["case_id"] == "case_50"), "y_true"] = 1
    table = heterogeneity.gain(three_arms).set_index(["over", "center"])
    row = table.loc[("centralized", "AHN")]
    assert row["positives"] == 1 and np.isfinite(row["difference"]) and np.isnan(row["low"])
    assert row["undefined"] == "DeLong needs two cases of each class"
    assert np.isfinite(table.loc[("centralized", "global"), "difference"])
    row = table.loc[("local_only", "global")]
    assert np.isnan(row["difference"]) and "no common scale" in row["undefined"]


def test_gain_leaves_out_what_was_not_trained(three_arms):
    assert set(heterogeneity.gain(three_arms.query("arm != 'local_only'"))["over"]) == {"centralized"}
    assert heterogeneity.gain(three_arms.query("arm == 'centralized'")).empty
