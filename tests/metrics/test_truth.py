import numpy as np
import pandas as pd
import pytest
from frames import random_run
from sklearn.metrics import roc_auc_score

from ipmn_core import metrics
from ipmn_core.data import Cohort
from ipmn_core.metrics import centers, truth
from ipmn_core.names import LABELS


def cohort(scans=None, positive=LABELS[2:]):
    return Cohort("made up", scans, LABELS, positive)


@pytest.fixture(scope="module")
def patients():
    """True probabilities, and a guideline class that goes with them, of the 60 cases of `random_run`."""
    prob = np.random.default_rng(0).dirichlet(np.ones(3), 60)
    table = pd.DataFrame(prob, columns=["prob_0", "prob_1", "prob_2"])
    names = [f"CASE_{i}" for i in range(60)]
    return table.assign(patient_id=names, guideline=np.digitize(prob[:, 2], (0.3, 0.6)))


def test_oracle_and_guideline_answer_for_the_same_cases_in_the_same_folds(patients):
    run, three = random_run(2, epochs=1), random_run(3, epochs=1)
    halves = [run.iloc[:30], run.iloc[30:].assign(fold=1)]
    t1 = run.assign(modality="t1")
    arms = pd.concat([*halves, t1, t1.assign(arm="centralized"), three])
    known = metrics.check(truth.reference_arms(arms, patients, cohort()))
    sizes = {("binary", "guideline"): 120, ("binary", "oracle"): 120, ("multiclass", "oracle"): 60}
    assert known.groupby(["task", "arm"]).size().to_dict() == sizes
    columns = ["task", "modality", "fold", "case_id", "y_true"]
    theirs = arms[columns].drop_duplicates().sort_values(columns, ignore_index=True)
    ours = known.query("arm == 'oracle'")[columns].sort_values(columns, ignore_index=True)
    pd.testing.assert_frame_equal(ours, theirs)


def test_the_ceiling_of_a_cohort_is_the_auc_of_its_true_probabilities(patients):
    prob = patients[["prob_0", "prob_1", "prob_2"]].to_numpy()
    label = np.array([np.random.default_rng(k).choice(3, p=q) for k, q in enumerate(prob)])
    scans = pd.DataFrame({"case_id": patients["patient_id"].str.lower(), "center": "NYU", "label": label})
    scans["positive"] = label == 2
    scans = pd.concat([scans.assign(modality="t1"), scans.iloc[::-1].assign(modality="t2")])
    ceiling = truth.ceiling(cohort(scans), patients).set_index(["task", "modality", "arm"])
    ceiling = ceiling["auc"].sort_index()
    assert len(ceiling) == 6
    for modality in ("t1", "t2"):
        high, three = ceiling["binary", modality], ceiling["multiclass", modality]
        assert high["oracle"] == pytest.approx(roc_auc_score(label == 2, prob[:, 2]), abs=1e-12)
        assert high["guideline"] == pytest.approx(roc_auc_score(label == 2, patients["guideline"]), abs=1e-12)
        assert three["oracle"] == pytest.approx(roc_auc_score(label, prob, multi_class="ovr"), abs=1e-12)
    some = cohort(scans.assign(positive=scans["label"] > 0), LABELS[1:])
    any_risk = truth.ceiling(some, patients).query("task == 'binary' and arm == 'oracle'")["auc"]
    assert any_risk.tolist() == pytest.approx([roc_auc_score(label > 0, 1 - prob[:, 0])] * 2, abs=1e-12)


def test_real_data_have_no_truth_and_so_no_reference_arms():
    run = random_run(2, epochs=1)
    assert truth.reference_arms(run, pd.DataFrame(), cohort()).empty
    gap = truth.gap_closed(centers.decompose(run))
    assert gap[["pooled_closed", "within_closed"]].isna().all(axis=None) and gap["pooled"].notna().all()
    assert set(gap["undefined"]) == {"no oracle"}


def test_cases_without_a_patient_are_named(patients):
    with pytest.raises(ValueError, match=r"2 cases have no patient in the .* truth, such as case_0, case_1"):
        truth.reference_arms(random_run(2, epochs=1), patients.iloc[2:], cohort())


def test_the_gap_is_0_at_chance_1_at_the_oracle_and_negative_below_chance():
    arms = [("oracle", 0.9, 0.8), ("good", 0.8, 0.65), ("chance", 0.5, 0.5), ("bad", 0.4, 0.5)]
    table = pd.DataFrame(arms, columns=["arm", "pooled", "within"])
    gap = truth.gap_closed(table.assign(task="binary", modality="t1", undefined="")).set_index("arm")
    assert gap["pooled_closed"].round(12).to_dict() == {"oracle": 1, "good": 0.75, "chance": 0, "bad": -0.25}
    assert gap["within_closed"].round(12).to_dict() == {"oracle": 1, "good": 0.5, "chance": 0, "bad": 0}
