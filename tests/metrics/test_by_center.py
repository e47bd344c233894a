import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import confusion_matrix, roc_auc_score

from ipmn_core import metrics
from ipmn_core.metrics import centers, inference


@pytest.fixture(scope="module")
def three_classes():
    """Two folds of one network, three classes, two centers, three epochs."""
    rng, rows = np.random.default_rng(1), []
    for epoch in (1, 2, 3):
        for k in range(24):
            prob = rng.dirichlet((1, 1, 1))
            case = (f"c{k}", ("NYU", "MCF")[k % 2], "t1", "three_class", "resnet34", k // 12, 0, epoch, k % 3)
            rows.append((*case, *prob))
    return pd.DataFrame(rows, columns=[*metrics.COLUMNS, "prob_0", "prob_1", "prob_2"])


def test_every_rule_is_that_of_metrics(three_classes):
    selected = centers.by_rules(three_classes, three_classes)
    assert list(dict.fromkeys(selected["rule"])) == list(centers.RULES) == list(metrics.RULES)
    for rule, rows in selected.groupby("rule"):
        expected = metrics.select(three_classes, rule, three_classes)
        pd.testing.assert_frame_equal(rows.drop(columns="rule").reset_index(drop=True), expected)


def test_without_an_inner_split_there_is_no_such_rule(three_classes):
    for validation in (None, three_classes.iloc[:0]):
        assert set(centers.by_rules(three_classes, validation)["rule"]) == {"best_test", "last"}


def test_the_summary_holds_the_numbers_of_inference_for_both_tasks(three_classes, binary_predictions):
    selected = centers.by_rules(pd.concat([three_classes, binary_predictions]))
    summary = centers.summary(selected, n_resamples=50)
    for (rule, task), rows in selected.groupby(["rule", "task"]):
        numbers = inference.intervals(rows.drop(columns="rule"), 50).set_index([*metrics.ARM, "center"])
        for metric in ("acc", "auc"):
            mine = summary[(summary[["rule", "task", "metric"]] == [rule, task, metric]).all(axis=1)]
            mine = mine.set_index([*metrics.ARM, "center"])
            for name, column in (("mean", metric), ("low", f"{metric}_low"), ("high", f"{metric}_high")):
                pd.testing.assert_series_equal(mine[name], numbers[column], check_names=False)
    assert len(summary) == 2 * 2 * (3 + 2 * 2 * 4)  # metrics, rules, centers of the one arm, of the others


def test_high_risk_against_the_rest_is_the_last_class(three_classes, binary_predictions):
    rows = centers.as_high_risk(metrics.select(three_classes, "last"))
    y, prob = metrics.y_and_prob(rows)
    last = three_classes[three_classes["epoch"] == 3]
    assert metrics.auc(y, prob) == pytest.approx(roc_auc_score(last["y_true"] == 2, last["prob_2"]))
    same = centers.as_high_risk(binary_predictions)
    np.testing.assert_allclose(same["prob_1"], binary_predictions["prob_1"])


def test_confusions_are_scikit_learns(three_classes, binary_predictions):
    rows = metrics.select(three_classes, "last")
    predicted = rows[["prob_0", "prob_1", "prob_2"]].to_numpy().argmax(axis=1)
    np.testing.assert_array_equal(centers.confusion(rows), confusion_matrix(rows["y_true"], predicted))
    one_class = binary_predictions.query("center == 'AHN' and modality == 't2' and arm == 'centralized'")
    matrix = centers.confusion(one_class)
    assert matrix.shape == (2, 2) and matrix.sum() == 12 and not matrix[1].any()


def test_the_worst_case_is_that_whose_truth_was_least_probable(three_classes):
    rows = metrics.select(three_classes, "last")
    worst = centers.most_wrong(rows, 5)
    given = rows[["prob_0", "prob_1", "prob_2"]].to_numpy()[np.arange(len(rows)), rows["y_true"]]
    np.testing.assert_allclose(worst["probability"], np.sort(given)[:5])
    assert worst["case_id"].iloc[0] == rows["case_id"].iloc[given.argmin()]


def test_a_center_or_all(binary_predictions):
    assert set(centers.at(binary_predictions, "NYU")["center"]) == {"NYU"}
    assert centers.at(binary_predictions, "global") is binary_predictions
