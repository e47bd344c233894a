"""Anybody's cohort: what a manifest may hold, what is said of it, and its folds."""

import os

import pandas as pd
import pytest
from tiny import MANIFEST, manifest, only_error, problems_of, save_volume

from ipmn_core import data
from ipmn_core.params import Params

ROWS = [("a_1", "benign", "Nord"), ("a_2", "malignant", "Nord"), ("b_1", "malignant", "St. Jørgen 2")]


# What is read


def test_two_centers_and_two_classes_are_read_as_met(tmp_path):
    cohort = data.read(manifest(tmp_path, ROWS))
    assert cohort.centers == ("Nord", "St. Jørgen 2") and cohort.classes == ("benign", "malignant")
    assert (cohort.positive, cohort.is_paper, cohort.name) == (("malignant",), False, "scans.csv")
    first = cohort.scans.iloc[0].to_dict()
    assert first["image"] == str(tmp_path / "a_1.nii.gz")
    expected = {"case_id": "a_1", "patient_id": "a_1", "modality": "mri", "mask": "", "fold_binary": ""}
    assert expected.items() <= first.items()
    assert cohort.scans["label"].tolist() == [0, 1, 1] and cohort.scans["positive"].tolist() == [0, 1, 1]
    assert data.table1(cohort).columns.tolist() == ["center", "modality", "benign", "malignant", "total"]


def test_a_workbook_is_read_as_a_csv_file_is(tmp_path):
    path = manifest(tmp_path, ROWS, separator=";", name="plain.txt")
    pd.read_csv(path, sep=";").to_excel(tmp_path / "scans.XLSX", index=False, engine="openpyxl")
    pd.testing.assert_frame_equal(data.read(tmp_path / "scans.XLSX").scans, data.read(path).scans)


@pytest.mark.parametrize(
    ("labels", "classes"),
    [
        (["10", "9", "9"], ("9", "10")),
        (["1.0", "0.0", "1"], ("0", "1")),  # a column of pandas in which a cell is missing
        (["2", "-1", "0.5"], ("-1", "0.5", "2")),
        (["no", "Yes", "no"], ("Yes", "no")),
        (["grade 2", "grade  2", "1"], ("1", "grade 2")),
        (["ja", "a\u0308", "ä"], ("ja", "ä")),
    ],
)
def test_classes_are_the_labels_in_order_and_the_choice_is_problems_of(tmp_path, labels, classes):
    path = manifest(tmp_path, [(f"c_{k}", label, "A") for k, label in enumerate(labels)])
    cohort, _ = data.inspect(path)
    assert cohort.classes == classes and cohort.positive == classes[-1:]
    (note,) = [note for note in problems_of(path, "note") if "the labels give the classes" in note]
    assert f"0 {classes[0]}, " in note and f"positive: {classes[-1]} | set `classes` and `positive`" in note


def test_a_profile_orders_merges_and_chooses_classes_and_names_centers(tmp_path):
    path = manifest(tmp_path, [*ROWS, ("b_2", "none", "nord"), ("b_3", "unclear", "Nord")])
    classes = {"none": "benign", "malignant": "malignant", "benign": "benign", "unclear": "malignant"}
    names = {"St. Jørgen 2": "J", "nord": "N", "Nord": "N", "West": "W"}
    cohort, problems = data.inspect(path, Params(classes=classes, positive=["benign"], center_names=names))
    assert cohort.classes == ("benign", "malignant") and cohort.positive == ("benign",)
    assert cohort.scans["case_id"].tolist() == ["b_1", "a_1", "a_2", "b_2", "b_3"]
    assert cohort.centers == ("J", "N") and cohort.scans["label"].tolist() == [1, 0, 1, 0, 1]
    assert "no scan belongs to W" in problems["problem"].tolist() and "error" not in set(problems["severity"])


def test_blank_labels_are_left_out_and_counted_and_a_word_for_missing_is_problems_of(tmp_path):
    path = manifest(tmp_path, [*ROWS, ("b_2", "", "Nord"), ("b_3", "None", "Nord")])
    assert len(data.read(path)) == 3
    assert any("2 mri scans have no label" in note for note in problems_of(path, "note"))
    (warning,) = [text for text in problems_of(path, "warning") if "split" not in text]
    assert "label None is read as missing" in warning and "`classes`" in warning


def test_paths_are_relative_to_the_manifest_absolute_or_from_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("sub/a.nii.gz", "b.nii", "c.nii.gz"):
        save_volume(tmp_path / name)
    (tmp_path / "sub" / "scans.csv").write_text(
        f"IMAGE,mask,label,center\na.nii.gz,../c.nii.gz,1,A\n{tmp_path}/b.nii,,0,A\n~/c.nii.gz,,1,A\n"
    )
    monkeypatch.chdir(tmp_path)
    scans = data.read("sub/scans.csv").scans
    assert scans["case_id"].tolist() == ["a", "b", "c"] and os.path.samefile(scans["mask"][0], "c.nii.gz")


def test_cases_named_by_their_modality_are_one_patient_by_default(tmp_path):
    rows = [("7_T1", "a", "X", "T1"), ("7_t2w", "a", "X", "T2"), ("8_T1", "b", "X", "T1")]
    scans = data.read(manifest(tmp_path, rows, (*MANIFEST, "modality"))).scans
    assert scans["patient_id"].tolist() == ["7", "8", "7"]


# What is refused, or said


@pytest.mark.parametrize(
    ("row", "parts"),
    [
        ("gone,benign,A", ["scans.csv row 4", "no image", "gone.nii.gz", "relative to the manifest"]),
        ("b_1,benign,", ["scans.csv row 4", "`center` of b_1 is blank", "fill it in"]),
        ("b_1,benign,NA", ["row 4", "`center`", "blank or says missing"]),
        ("b_1,benign,GLOBAL", ["a center is called global", "`center_names`"]),
        ("b_1,benign,A,t1/t2", ["row 4", "modality 't1/t2'", "digits"]),
        ("b_1,benign,A,,A_1", ["row 2 and scans.csv row 4", "mri case 'a_1' is given 2 times"]),
        ("a_1,benign,A,,x", ["row 2 and scans.csv row 4", "all have the image", "patient_id"]),
        ("b_1,total,A", ["'malignant', 'total'", "rename them with `classes`"]),
        ("b_1,Benign,A", ["'Benign', 'benign', 'malignant'", "too similar"]),
    ],
)
def test_a_row_that_cannot_be_used_is_named_with_a_remedy(tmp_path, row, parts):
    columns = (*MANIFEST, "modality", "case_id")[: max(3, row.count(",") + 1)]
    path = manifest(tmp_path, [*ROWS[:2], row.split(",")], columns)
    (tmp_path / "gone.nii.gz").unlink(missing_ok=True)
    only_error(path, *parts)


def test_two_masks_of_one_image_are_two_scans_of_one_patient(tmp_path):
    save_volume(tmp_path / "m.nii.gz")
    rows = [("a_1", "x", "A", "", "p", "1"), ("a_1", "y", "A", "m.nii.gz", "p", "2")]
    columns = (*MANIFEST, "mask", "patient_id", "case_id")
    assert len(data.read(manifest(tmp_path, rows, columns))) == 2
    only_error(manifest(tmp_path, [rows[0], (*rows[1][:4], "q", "2")], columns), "one `patient_id`")


def test_names_that_differ_in_capitals_only_are_problems_of(tmp_path):
    path = manifest(tmp_path, [*ROWS, ("b_2", "benign", "NORD")])
    assert any("names of a center" in w and "'Nord', 'NORD'" in w for w in problems_of(path, "warning"))


def test_what_is_no_manifest_says_what_one_is(tmp_path):
    only_error(manifest(tmp_path, ROWS, name="scans.ods"), "scans.ods", "is no table", ".csv", ".xlsx")
    only_error(tmp_path / "nowhere.csv", "nowhere.csv", "no such file")
    only_error(manifest(tmp_path, []), "classes none")
    named = "'malignant' of a_2 is none of benign, x"
    only_error(manifest(tmp_path, ROWS[:2]), "row 3", named, classes=["benign", "x"])
    for missing in MANIFEST:
        columns = ["remark" if name == missing else name for name in MANIFEST]
        path = manifest(tmp_path, ROWS, columns=columns)
        only_error(path, f"column `{missing}`", "'remark'", "rename the headers")


def test_one_center_of_one_modality_is_a_cohort(tmp_path):
    rows = [(f"c_{k}", str(k % 2), "42") for k in range(8)]
    cohort = data.open_cohort(Params(data=str(manifest(tmp_path, rows)), modalities=["mri"]))
    assert cohort.centers == ("42",) and data.assign_folds(cohort, 4, task="binary").nunique() == 4
