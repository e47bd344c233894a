"""Folds against a plain loop over scikit-learn's, and what is said of centers that cannot be split."""

import warnings

import pandas as pd
import pytest
from made_up import paper_cohort
from sklearn.model_selection import StratifiedKFold
from tiny import MANIFEST, first_release, manifest, paper_scans, problems_of, scans_of

from ipmn_core import data
from ipmn_core.data import folds as folds_of
from ipmn_core.names import CENTERS


def folds_by_hand(scans, n_folds, task):
    """The paper's folds by a plain loop: case and modality -> fold."""
    fold_of = {}
    for modality in ("t1", "t2"):
        for center in CENTERS:
            part = [s for s in scans.itertuples() if s.center == center and s.modality == modality]
            y = [int(s.label == 2) if task == "binary" else s.label for s in part]
            for fold, (_, test) in enumerate(StratifiedKFold(n_folds, shuffle=False).split(y, y)):
                for i in test:
                    assert (part[i].case_id, modality) not in fold_of  # tested once only
                    fold_of[part[i].case_id, modality] = fold
    return fold_of


@pytest.mark.filterwarnings("ignore:The least populated class")
@pytest.mark.parametrize(("n_folds", "task"), [(5, "multiclass"), (4, "binary")])
def test_folds_of_the_papers_counts_are_those_of_a_plain_loop(n_folds, task):
    scans = paper_scans()
    by_hand = folds_by_hand(scans, n_folds, task)
    shifted = scans.set_axis(range(1000, 1000 + len(scans)))
    folds = data.assign_folds(paper_cohort(shifted), n_folds, task=task)
    assert folds.index.equals(shifted.index) and folds.dtype.kind == "i"
    assert folds.tolist() == [by_hand[row.case_id, row.modality] for row in scans.itertuples()]
    assert set(folds) == set(range(n_folds))
    ahn = shifted[(shifted["center"] == "AHN") & (shifted["modality"] == "t2")]
    assert data.assign_folds(paper_cohort(ahn), n_folds, task=task).equals(folds[ahn.index])


def test_small_classes_split_without_a_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(data.assign_folds(paper_cohort(scans_of([("AHN", "t1", 1, 11, 4)])), 5)) == 16


@pytest.mark.parametrize(("task", "n_folds"), [("multiclass", 5), ("binary", 4)])
def test_the_patient_rule_keeps_t1_and_t2_of_a_patient_in_one_fold(task, n_folds):
    t1, t2 = scans_of([("NYU", "t1", 9, 12, 8)], True), scans_of([("NYU", "t2", 12, 10, 11)], True)
    scans = pd.concat([t1, t2], ignore_index=True)  # names pair up, labels often differ, four T2 have no T1
    cohort = paper_cohort(scans)
    folds = data.assign_folds(cohort, n_folds, "patient", task)
    assert folds.groupby(scans["patient_id"]).nunique().eq(1).all()
    assert data.assign_folds(cohort, n_folds, task=task).groupby(scans["patient_id"]).nunique().max() == 2
    label = {}  # patients in sheet order with the larger label
    for row in scans.itertuples():
        label[row.patient_id] = max(row.label, label.get(row.patient_id, 0))
    y = [int(k == 2) if task == "binary" else k for k in label.values()]
    for fold, (_, test) in enumerate(StratifiedKFold(n_folds).split(y, y)):
        assert {list(label)[i] for i in test} == set(scans["patient_id"][folds == fold])
    whole = data.assign_folds(paper_cohort(paper_scans(paired=True)), n_folds, "patient", task)
    assert set(whole) == set(range(n_folds))


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        ({"n_folds": 5}, ("MCA t1", "5 folds", "2 no risk, 4 low risk, 3 high risk", "fewer")),
        ({"n_folds": 5, "rule": "patient"}, ("MCA patients", "2 no risk, 4 low risk, 3 high risk")),
        ({"n_folds": 7, "task": "binary"}, ("MCA t1", "7 folds", "6 not high risk, 3 high risk")),
    ],
)
def test_a_center_that_cannot_be_split_is_an_error_with_its_counts(options, parts):
    cohort = paper_cohort(scans_of([("NYU", "t1", 9, 9, 9), ("MCA", "t1", 2, 4, 3)]))
    with pytest.raises(data.CohortError) as error:
        data.assign_folds(cohort, **options)
    assert all(part in str(error.value) for part in parts)
    with pytest.raises(ValueError, match="scanner"):
        data.assign_folds(cohort, 5, rule="scanner")


def test_small_classes_are_notes_and_a_center_that_cannot_be_split_is_a_warning(tmp_path):
    first_release(tmp_path, t1=[(f"iu_{i}", 1) for i in range(4)])
    (warning,) = problems_of(tmp_path, "warning")  # 4 cases do for the 4 folds of the binary task
    assert warning.startswith("IU t1") and "4 low risk" in warning and "5 folds" in warning
    (note,) = [note for note in problems_of(tmp_path, "note") if "multiclass" in note]
    assert "IU t1: 0 no risk, 4 low risk, 0 high risk" in note
    paper = paper_cohort(paper_scans())
    ((severity, where, problem, _),) = folds_of.problems(paper, 5, "center", "multiclass")
    assert (severity, where) == ("note", "folds of multiclass")
    assert "AHN t1: 1 no risk, 4 high risk;" in problem
    of = {f"{c} {m}" for c in CENTERS for m in ("t1", "t2") if f"{c} {m}:" in problem}
    assert of == {f"{c} {m}" for c in ("AHN", "MCA", "IU") for m in ("t1", "t2")}
    assert folds_of.problems(paper, 4, "center", "binary") == []


# Of a manifest: patients with several scans, and given folds

FOLDS = (*MANIFEST, "patient_id", "modality", "fold")


def several(folder):
    """Two centers, three modalities, twelve patients each of four scans per modality, three given folds."""
    rows = [
        (f"{c}{k}{s}_{m}", "yes" if k % 6 < 2 else "no", c, f"{c}{k // 2}", m, f"{k // 6 % 3}")
        for m in ("t1", "t2", "CT 1.5")
        for c in "AB"
        for k in range(24)
        for s in "xy"
    ]
    return manifest(folder, rows, FOLDS)


@pytest.mark.parametrize("rule", ["center", "patient", "given"])
@pytest.mark.parametrize("task", ["multiclass", "binary"])
def test_no_patient_is_in_two_folds_of_a_modality_whatever_the_rule(tmp_path, rule, task):
    cohort = data.read(several(tmp_path))
    scans, folds = cohort.scans, data.assign_folds(cohort, 3, rule, task)
    unit = ["modality", "patient_id"] if rule == "center" else ["patient_id"]
    assert (folds.groupby([scans[key] for key in unit]).nunique() == 1).all()
    of_class = folds.groupby([scans[key] for key in ("center", "modality", "class")])
    assert len(of_class) == 12 and (of_class.nunique() == 3).all()
    held = data.inner_validation(scans[scans["modality"] == "t1"], 0.3, 0)
    assert not {*scans["patient_id"][held]} & {*scans[scans["modality"] == "t1"].drop(held)["patient_id"]}


def test_notes_of_folds_count_patients_and_given_folds_that_are_not_used_are_problems_of(tmp_path):
    notes = problems_of(several(tmp_path), "note", multiclass_folds=5, binary_folds=4)
    assert any("5 folds: A t1: 4 yes; B t1: 4 yes; A t2" in note for note in notes)
    assert not any("4 folds" in note for note in notes)  # 4 patients of 16 scans
    assert any("given with the data are not used | set `fold_rule: given`" in note for note in notes)
    assert not any("not used" in note for note in problems_of(several(tmp_path), "note", fold_rule="given"))


@pytest.mark.parametrize(
    ("given", "folds"), [("9 10 9 x", [0, 1, 0, 2]), ("1.0 0 1 0", [1, 0, 1, 0]), ("b ä b b", [0, 1, 0, 0])]
)
def test_given_folds_are_taken_in_the_order_of_their_names(tmp_path, given, folds):
    rows = [(f"c_{k}", "ab"[k % 2], "A", "", "", fold) for k, fold in enumerate(given.split())]
    cohort = data.read(manifest(tmp_path, rows, FOLDS))
    assert data.assign_folds(cohort, len(set(folds)), "given").tolist() == folds
    with pytest.raises(data.CohortError, match=f"profile sets 7: set `binary_folds: {len(set(folds))}`"):
        data.assign_folds(cohort, 7, "given", "binary")


@pytest.mark.parametrize(
    ("patient", "fold", "part"),
    [("", "", "no single fold is given for mri c_2"), ("p", "1", "two folds.*c_0, mri c_2")],
)
def test_given_folds_that_cannot_be_used_name_the_cases(tmp_path, patient, fold, part):
    rows = [("c_0", "a", "A", "P", "", "0"), ("c_1", "b", "A", "", "", "1")]
    path = manifest(tmp_path, [*rows, ("c_2", "b", "A", patient, "", fold)], FOLDS)
    with pytest.raises(data.CohortError, match=f"folds of multiclass: {part}"):
        data.assign_folds(data.read(path), 2, "given")
    assert any(part[:9] in text for text in problems_of(path, "warning", fold_rule="given"))


def test_leave_one_center_out_tests_each_center_by_itself_in_the_order_of_the_cohort():
    cohort = paper_cohort(paper_scans(paired=True))
    for task in ("multiclass", "binary"):
        folds = data.assign_folds(cohort, len(cohort.centers), data.UNSEEN, task)
        assert [cohort.scans["center"][folds == k].unique().tolist() for k in range(7)] == [
            [center] for center in cohort.centers
        ]
        assert folds_of.problems(cohort, 7, data.UNSEEN, task) == []


def test_leave_one_center_out_with_other_folds_or_a_patient_of_two_centers_is_refused(tmp_path):
    rows = [(f"c_{k}", "ab"[k % 2], "XYZ"[k % 3], "", "", "") for k in range(12)]
    path = manifest(tmp_path, rows, FOLDS)
    with pytest.raises(data.CohortError, match=r"3 centers \(X, Y, Z\), not 4: set `binary_folds: 3`"):
        data.assign_folds(data.read(path), 4, data.UNSEEN, "binary")
    told = problems_of(path, "warning", fold_rule=data.UNSEEN, multiclass_folds=3, binary_folds=4)
    assert len(told) == 1 and "set `binary_folds: 3`" in told[0]
    rows += [(f"d_{k}", "a", "XY"[k], "moved", "", "") for k in range(2)]
    with pytest.raises(data.CohortError, match="moved are in two centers: give each patient one center"):
        data.assign_folds(data.read(manifest(tmp_path, rows, FOLDS)), 3, data.UNSEEN)
