"""The reader, its errors and the folds, on tiny cohorts written to disk."""

import re
import subprocess
import sys
import types
import warnings
import zipfile
from pathlib import Path

import nibabel
import numpy as np
import pandas as pd
import pytest
from sklearn.model_selection import StratifiedKFold

import ipmn_core
from ipmn_core import data
from ipmn_core.data import cohort
from ipmn_core.names import CENTERS

PAPER_TABLE1 = pd.read_csv(Path(cohort.__file__).parents[1] / "paper" / "table1.csv")
FIRST_HEADERS = ["Patient ID", "Age", "Sex", "Center", "Scanner", "Risk assessment"]
SECOND_HEADERS = ["T1", "T2", "Age", "Sex", "Center", "Scanner", "IPMN risk"]


def save_volume(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(np.ones((3, 3, 3), np.uint8), np.eye(4)), path)


def save_sheet(path, headers, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    pd.DataFrame([headers, *rows]).to_excel(path, header=False, index=False)


def first_release(root, t1=(), t2=(), headers=FIRST_HEADERS):
    """A first release with rows (name, label) in each sheet and a file for each name."""
    for modality, rows in (("t1", t1), ("t2", t2)):
        rows = [(name, 60, "F", "", "", label) for name, label in rows]
        save_sheet(root / f"IPMN_labels_{modality}_total.xlsx", headers, rows)
        (root / f"{modality}_clean_ROI").mkdir(exist_ok=True)
        for name, *_ in rows:
            if name:
                save_volume(root / f"{modality}_clean_ROI" / f"{data.case_name(name)}.nii.gz")
    return root


def second_release(root, rows, headers=SECOND_HEADERS):
    """A second release with sheet rows (t1 name, t2 name, label) and an image and a mask for each name."""
    rows = [(t1, t2, 60, "F", "", "", label) for t1, t2, label in rows]
    save_sheet(root / "IPMN_labels_total.xlsx", headers, rows)
    for i, modality in enumerate(("t1", "t2")):
        for kind in ("images", "masks"):
            (root / f"IPMN_images_masks/{modality}/{kind}").mkdir(parents=True)
            for name in filter(None, (row[i] for row in rows)):
                save_volume(root / f"IPMN_images_masks/{modality}/{kind}/{data.case_name(name)}.nii.gz")
    return root


def problems_of(root, severity="error", **options):
    """Where, problem and remedy of each problem of one severity, as one text each; every one has a remedy."""
    problems = data.inspect(root, **options)[1]
    assert problems["remedy"].str.len().gt(0).all()
    rows = problems[problems["severity"] == severity]
    return [f"{row.where} | {row.problem} | {row.remedy}" for row in rows.itertuples()]


def only_error(root, *parts, **options):
    """Asserts that a cohort has one error, which names every part."""
    (error,) = problems_of(root, **options)
    for part in parts:
        assert str(part) in error
    return error


def scans_of(counts, paired=False):
    """Scans without files from rows (center, modality, no, low, high), labels in an irregular order."""
    rows = []
    for center, modality, *n in counts:
        labels = np.random.default_rng(len(rows)).permutation(np.repeat([0, 1, 2], n))
        for i, label in enumerate(labels):
            name = f"{center}_{i}" if paired else f"{center}_{modality}_{i}"
            rows.append((name, name.lower(), center, modality, label, f"{name}.nii.gz", ""))
    scans = pd.DataFrame(rows, columns=data.SCAN_COLUMNS)
    return scans.sort_values("modality", kind="stable", ignore_index=True)


def paper_scans():
    columns = ["center", "modality", "no_risk", "low_risk", "high_risk"]
    return scans_of(PAPER_TABLE1[columns].itertuples(index=False))


# Names


@pytest.mark.parametrize(
    ("name", "center"),
    [
        ("nyu_0001", "NYU"),
        ("CAD_28_T1", "MCF"),
        ("MCF_03", "MCF"),
        ("NU_03", "NU"),
        ("northwestern_0001", "NU"),
        ("ahn05", "AHN"),
        ("AHN05", "AHN"),
        ("mca_05", "MCA"),
        ("IU_2", "IU"),
        ("EMC007", "EMC"),
        ("EMC_01_002", "EMC"),
        ("ipmn-0001-Nyu", "NYU"),
        ("mcf_CAD_3", "MCF"),
    ],
)
def test_a_name_gives_its_center(name, center):
    assert data.center_of(name) == center


@pytest.mark.parametrize("name", ["ucsf_01", "0001", "", "nuclear_1", "nyu_vs_mca_3"])
def test_a_name_of_no_center_or_two_is_refused_with_the_known_prefixes(name):
    with pytest.raises(ValueError) as error:
        data.center_of(name)
    assert repr(name) in str(error.value)
    assert all(word in str(error.value) for word in ("nyu", "cad", "northwestern", "emc"))


@pytest.mark.parametrize(
    "raw", ["AHN05", " AHN05 ", "AHN05.nii.gz", "AHN05.NII", "AHN05_0000.nii.gz", "AHN05_0000"]
)
def test_a_case_name_has_no_suffix(raw):
    assert data.case_name(raw) == "AHN05"


def test_only_a_trailing_channel_number_is_removed_from_a_case_name():
    assert data.case_name("EMC_0000_002.nii.gz") == "EMC_0000_002"


# The two layouts


def test_the_first_release_is_read_in_sheet_order_t1_first(tmp_path):
    first_release(tmp_path, t1=[("nyu_2", 2), ("AHN01.nii.gz", 0)], t2=[("ahn01", 0), ("CAD_3", 1)])
    scans = data.read(tmp_path)
    assert list(scans.columns) == data.SCAN_COLUMNS
    assert scans["case_id"].tolist() == ["nyu_2", "AHN01", "ahn01", "CAD_3"]
    assert scans["patient_id"].tolist() == ["nyu_2", "ahn01", "ahn01", "cad_3"]
    assert scans["center"].tolist() == ["NYU", "AHN", "AHN", "MCF"]
    assert scans["modality"].tolist() == ["t1", "t1", "t2", "t2"]
    assert scans["label"].tolist() == [2, 0, 0, 1]
    assert scans["label"].dtype.kind == "i"
    assert scans["image"].tolist()[1] == str(tmp_path / "t1_clean_ROI" / "AHN01.nii.gz")
    assert set(scans["mask"]) == {""}


def test_the_second_release_is_read_with_masks_and_the_row_as_patient(tmp_path):
    second_release(tmp_path, [("CAD_28_T1", "CAD_28_T2", 1), (None, "EMC_01_002", 0), ("IU_2", None, 2)])
    scans = data.read(tmp_path)
    assert scans["case_id"].tolist() == ["CAD_28_T1", "IU_2", "CAD_28_T2", "EMC_01_002"]
    assert scans["patient_id"].tolist() == ["cad_28_t1", "iu_2", "cad_28_t1", "emc_01_002"]
    assert scans["label"].tolist() == [1, 2, 1, 0]
    assert scans["mask"].tolist()[2] == str(tmp_path / "IPMN_images_masks/t2/masks/CAD_28_T2.nii.gz")


def test_files_match_in_any_case_with_nii_or_nii_gz_and_with_the_channel_number(tmp_path):
    first_release(tmp_path, t1=[("nyu_1", 0), ("MCF_2.nii.gz", 1), ("iu_3", 2)])
    folder = tmp_path / "t1_clean_ROI"
    (folder / "nyu_1.nii.gz").rename(folder / "NYU_1_0000.nii.gz")
    (folder / "MCF_2.nii.gz").rename(folder / "mcf_2.NII.GZ")
    (folder / "iu_3.nii.gz").unlink()
    save_volume(folder / "IU_3.nii")
    assert [Path(f).name for f in data.read(tmp_path)["image"]] == [
        "NYU_1_0000.nii.gz",
        "mcf_2.NII.GZ",
        "IU_3.nii",
    ]


def test_blank_labels_are_left_out_and_counted_and_blank_rows_are_skipped(tmp_path):
    rows = [
        ("nyu_1", "nyu_1", 1),
        (None,) * 3,
        ("nyu_2", None, None),
        ("nyu_3", "nyu_3", " "),
        (None, "nyu_4", 0),
    ]
    second_release(tmp_path, rows)
    scans = data.read(tmp_path)
    assert list(zip(scans["modality"], scans["case_id"], strict=True)) == [
        ("t1", "nyu_1"),
        ("t2", "nyu_1"),
        ("t2", "nyu_4"),
    ]
    assert scans.attrs["unlabelled"] == {"t1": 2, "t2": 1}
    assert "2 of 3 t1 scans and 1 of 3 t2 scans have no label" in problems_of(tmp_path, "note")[-1]


def test_the_file_of_an_unlabelled_scan_is_no_stray(tmp_path):
    second_release(tmp_path, [("nyu_1", None, None)])
    assert not [w for w in problems_of(tmp_path, "warning") if "no row" in w]


@pytest.mark.parametrize("label", [1, 1.0, "1", " 1 ", "1.0"])
def test_a_whole_label_is_read_from_a_number_or_a_text(tmp_path, label):
    first_release(tmp_path, t1=[("nyu_1", label)])
    assert data.read(tmp_path)["label"].tolist() == [1]


def test_a_first_release_with_one_modality_only_is_read(tmp_path):
    first_release(tmp_path, t1=[("nyu_1", 1)])
    (tmp_path / "IPMN_labels_t2_total.xlsx").unlink()
    (tmp_path / "t2_clean_ROI").rmdir()
    assert len(data.read(tmp_path)) == 1


# Columns


@pytest.mark.parametrize("header", ["Patient ID", "patient_id", "PatientID", "Case", "scan name", "ID"])
def test_the_name_column_is_found_wherever_it_stands(tmp_path, header):
    first_release(tmp_path, headers=["Risk assessment", "Age", "Sex", "Center", "Width", header])
    sheet = tmp_path / "IPMN_labels_t1_total.xlsx"
    save_sheet(sheet, ["Risk assessment", "Age", "Idiom", header], [(2, 60, "", "nyu_1")])
    save_volume(tmp_path / "t1_clean_ROI" / "nyu_1.nii.gz")
    assert data.read(tmp_path)["label"].tolist() == [2]


@pytest.mark.parametrize(
    ("headers", "named"),
    [
        (["Patient ID", "b", "c", "d", "e", "f"], ["the label", "'Patient ID', 'b'"]),
        (["a", "b", "c", "d", "e", "Risk"], ["the t1 name", "none", "'Risk'"]),
        (["Patient ID", "Center name", "c", "d", "e", "Risk"], ["'Patient ID' or 'Center name'"]),
        (["Patient ID", "b", "c", "d", "Risk factors", "Risk"], ["'Risk factors' or 'Risk'"]),
    ],
)
def test_a_column_that_is_missing_or_ambiguous_is_an_error_and_positions_are_the_way_out(
    tmp_path, headers, named
):
    first_release(tmp_path, t1=[("nyu_1", 2)], headers=headers)
    save_sheet(tmp_path / "IPMN_labels_t2_total.xlsx", FIRST_HEADERS, [])
    only_error(tmp_path, "IPMN_labels_t1_total.xlsx", "rename", "position", *named)
    assert data.read(tmp_path, columns="position")["label"].tolist() == [2]


@pytest.mark.parametrize(
    "headers", [["a", "T2", *"cdef", "Risk"], ["T1", "T1 date", *"cdef", "Risk"], [*"abcdefg"]]
)
def test_the_second_release_too_falls_back_on_positions_only_when_told(tmp_path, headers):
    second_release(tmp_path, [("nyu_1", "nyu_1", 2)], headers=headers)
    only_error(tmp_path, "IPMN_labels_total.xlsx", str(headers), "position")
    assert data.read(tmp_path, columns="position")["label"].tolist() == [2, 2]


def test_t1_within_a_longer_word_is_no_t1_header(tmp_path):
    second_release(
        tmp_path, [("nyu_1", "nyu_1", 2)], ["T1_file", "T2_file", "Patient1", "T10", "T21", "f", "risk"]
    )
    assert len(data.read(tmp_path)) == 2


def test_positions_beyond_the_sheet_are_an_error(tmp_path):
    first_release(tmp_path)
    save_sheet(tmp_path / "IPMN_labels_t1_total.xlsx", ["Patient ID", "Risk"], [("nyu_1", 1)])
    only_error(tmp_path, "IPMN_labels_t1_total.xlsx", "the label", "'Patient ID', 'Risk'", columns="position")


def test_another_way_to_find_columns_is_refused(tmp_path):
    with pytest.raises(ValueError, match="guess"):
        data.inspect(tmp_path, columns="guess")


# Errors


def test_a_root_with_neither_release_is_an_error(tmp_path):
    only_error(tmp_path, tmp_path, "IPMN_labels_t1_total.xlsx", "IPMN_labels_total.xlsx", "label sheets")


def test_a_root_with_both_releases_is_an_error(tmp_path):
    first_release(tmp_path)
    second_release(tmp_path, [])
    only_error(tmp_path, tmp_path, "IPMN_labels_t1_total.xlsx", "IPMN_images_masks", "own folder")


def test_a_missing_sheet_is_an_error(tmp_path):
    first_release(tmp_path, t1=[("nyu_1", 1)])
    (tmp_path / "IPMN_labels_t1_total.xlsx").unlink()
    only_error(tmp_path, "IPMN_labels_t1_total.xlsx", "cannot be read")


@pytest.mark.parametrize("content", [b"", b"no workbook"])
def test_a_damaged_sheet_is_an_error(tmp_path, content):
    second_release(tmp_path, [])
    (tmp_path / "IPMN_labels_total.xlsx").write_bytes(content)
    only_error(tmp_path, "IPMN_labels_total.xlsx", "cannot be read")


def test_an_empty_sheet_is_an_error(tmp_path):
    second_release(tmp_path, [])
    pd.DataFrame().to_excel(tmp_path / "IPMN_labels_total.xlsx", header=False, index=False)
    only_error(tmp_path, "IPMN_labels_total.xlsx")


def test_a_missing_folder_is_one_error_however_many_scans_it_held(tmp_path):
    first_release(tmp_path, t1=[("nyu_1", 1), ("nyu_2", 1)])
    for file in (tmp_path / "t1_clean_ROI").iterdir():
        file.unlink()
    (tmp_path / "t1_clean_ROI").rmdir()
    only_error(tmp_path, tmp_path / "t1_clean_ROI", "no such folder")


def test_a_label_without_a_file_is_an_error_with_the_name_tried_and_the_folder(tmp_path):
    first_release(tmp_path, t1=[("nyu_1", 1), ("nyu_2", 2)])
    (tmp_path / "t1_clean_ROI" / "nyu_2.nii.gz").unlink()
    only_error(tmp_path, "IPMN_labels_t1_total.xlsx row 3", "nyu_2.nii.gz", tmp_path / "t1_clean_ROI")
    assert data.inspect(tmp_path)[0]["case_id"].tolist() == ["nyu_1"]


def test_a_link_to_nowhere_is_no_file(tmp_path):
    first_release(tmp_path, t1=[("nyu_1", 1)])
    (tmp_path / "t1_clean_ROI" / "nyu_1.nii.gz").unlink()
    (tmp_path / "t1_clean_ROI" / "nyu_1.nii.gz").symlink_to(tmp_path / "gone.nii.gz")
    only_error(tmp_path, "row 2", "no image of nyu_1")


def test_an_image_without_its_mask_is_an_error(tmp_path):
    second_release(tmp_path, [("nyu_1", "nyu_1", 1)])
    (tmp_path / "IPMN_images_masks/t2/masks/nyu_1.nii.gz").unlink()
    only_error(tmp_path, "IPMN_labels_total.xlsx row 2", "no mask of nyu_1", "IPMN_images_masks/t2/masks")


def test_two_files_of_one_name_are_an_error(tmp_path):
    first_release(tmp_path, t1=[("nyu_1", 1)])
    save_volume(tmp_path / "t1_clean_ROI" / "nyu_1_0000.nii.gz")
    only_error(tmp_path, "row 2", "nyu_1.nii.gz", "nyu_1_0000.nii.gz", "keep one")


@pytest.mark.parametrize(
    ("name", "said"), [("ucsf_7", "no center"), ("nyu_mca_7", "MCA and NYU"), (7, "no center")]
)
def test_an_unknown_or_ambiguous_center_is_an_error(tmp_path, name, said):
    first_release(tmp_path, t1=[("nyu_1", 1), (name, 1)])
    only_error(tmp_path, "IPMN_labels_t1_total.xlsx row 3", repr(str(name)), said, "northwestern", "rename")


@pytest.mark.parametrize("label", [3, -1, "high", 1.5, True, "true", "01", "2.5"])
def test_a_label_other_than_0_1_2_is_an_error(tmp_path, label):
    first_release(tmp_path, t1=[("nyu_1", 0), ("nyu_2", label)])
    only_error(tmp_path, "IPMN_labels_t1_total.xlsx row 3", f"label {label!r}", "nyu_2")


def test_row_numbers_are_the_spreadsheets_blank_rows_counted(tmp_path):
    second_release(tmp_path, [(None, None, None), ("nyu_1", None, 0), (None, None, None), ("nyu_2", None, 5)])
    only_error(tmp_path, "IPMN_labels_total.xlsx row 5", "nyu_2")


def test_a_label_without_a_name_is_an_error(tmp_path):
    second_release(tmp_path, [("nyu_1", None, 0), (None, None, 2)])
    only_error(tmp_path, "IPMN_labels_total.xlsx row 3", "name ''")


def test_a_name_twice_in_a_modality_is_an_error_with_both_rows(tmp_path):
    first_release(tmp_path, t1=[("NYU_1", 1), ("nyu_2", 1), ("nyu_1.nii.gz", 1)], t2=[("nyu_2", 1)])
    (tmp_path / "t1_clean_ROI" / "NYU_1.nii.gz").unlink(missing_ok=True)
    only_error(tmp_path, "IPMN_labels_t1_total.xlsx", "rows 2 and 4", "NYU_1")


@pytest.mark.parametrize("name", ["../nyu_1", "t1/nyu_1", "t1\\nyu_1", "nyu_.._1"])
def test_a_name_with_a_path_in_it_is_an_error(tmp_path, name):
    first_release(tmp_path)
    save_sheet(tmp_path / "IPMN_labels_t1_total.xlsx", ["Patient", "Risk"], [(name, 1)])
    only_error(tmp_path, "IPMN_labels_t1_total.xlsx row 2", repr(name), "path")


def test_a_name_with_a_character_that_does_not_print_is_an_error_that_shows_it(tmp_path):
    first_release(tmp_path)
    save_sheet(tmp_path / "IPMN_labels_t1_total.xlsx", ["Patient", "Risk"], [("nyu_\u200b1", 1)])
    only_error(tmp_path, "IPMN_labels_t1_total.xlsx row 2", r"'nyu_\u200b1'", "does not print")


def test_no_volume_is_read(tmp_path):
    first_release(tmp_path, t1=[("nyu_1", 1)])
    (tmp_path / "t1_clean_ROI" / "nyu_1.nii.gz").write_bytes(b"")
    assert problems_of(tmp_path) == []


def test_a_name_twice_with_two_labels_says_both(tmp_path):
    first_release(tmp_path, t1=[("nyu_1", 1), ("NYU_1", 2), ("nyu_1", None)])
    only_error(tmp_path, "rows 2 and 3 and 4", "different labels: 1, 2, none", "keep one row")


@pytest.mark.parametrize("cell", ["=1+1", "#REF!", "#DIV/0!"])
def test_a_label_that_is_a_formula_never_computed_or_an_error_is_no_blank(tmp_path, cell):
    first_release(tmp_path, t1=[("nyu_1", 0), ("nyu_2", cell)])
    only_error(tmp_path, "IPMN_labels_t1_total.xlsx row 3", repr(cell), "nyu_2")


@pytest.mark.parametrize("attributes", ["", ' t="array" ref="F3"'])
def test_a_formula_counts_as_the_value_it_had_last(tmp_path, attributes):
    sheet = tmp_path / "IPMN_labels_t1_total.xlsx"
    first_release(tmp_path, t1=[("nyu_1", 0), ("nyu_2", "=1+1")])
    with zipfile.ZipFile(sheet) as book:
        parts = {name: book.read(name) for name in book.namelist()}
    cells = parts["xl/worksheets/sheet1.xml"].decode()
    computed = re.sub(r"<f>1\+1</f><v */>", f"<f{attributes}>1+1</f><v>2</v>", cells)
    assert computed != cells
    with zipfile.ZipFile(sheet, "w") as book:
        for name, part in (parts | {"xl/worksheets/sheet1.xml": computed.encode()}).items():
            book.writestr(name, part)
    assert data.read(tmp_path)["label"].tolist() == [0, 2]


def test_t1_and_t2_of_different_centers_in_one_row_are_an_error(tmp_path):
    second_release(tmp_path, [("nyu_1", "mcf_1", 1)])
    only_error(tmp_path, "patient nyu_1", "t1 nyu_1 NYU", "t2 mcf_1 MCF")


def test_read_lists_ten_errors_and_counts_the_rest(tmp_path):
    first_release(tmp_path, t1=[(f"nyu_{i}", 9) for i in range(12)])
    with pytest.raises(data.CohortError) as error:
        data.read(tmp_path)
    lines = str(error.value).splitlines()
    assert "12" in lines[0] and str(tmp_path) in lines[0]
    assert "row 2" in lines[1] and "row 11" in lines[10]
    assert lines[11].strip() == f"and 2 more; `ipmn check {tmp_path}` lists all"
    assert len(lines) == 12


# Warnings and notes


def test_a_file_without_a_row_is_a_warning(tmp_path):
    second_release(tmp_path, [("nyu_1", None, 1)])
    folder = tmp_path / "IPMN_images_masks/t2/masks"
    save_volume(folder / "iu_9.nii.gz")
    for name in ("._iu_9.nii.gz", ".DS_Store", "readme.txt"):
        (folder / name).touch()
    strays = [w for w in problems_of(tmp_path, "warning") if "no row" in w]
    assert len(strays) == 1 and str(folder / "iu_9.nii.gz") in strays[0]
    assert len(data.read(tmp_path)) == 1


def test_different_labels_of_a_patients_t1_and_t2_are_a_warning(tmp_path):
    first_release(tmp_path, t1=[("NYU_1", 1), ("nyu_2", 0)], t2=[("nyu_1", 2), ("nyu_2", 0)])
    (warning,) = [w for w in problems_of(tmp_path, "warning") if "different labels" in w]
    assert "patient nyu_1" in warning and "t1 NYU_1 1" in warning and "t2 nyu_1 2" in warning


def test_too_few_cases_for_the_folds_are_a_warning_with_the_center(tmp_path):
    first_release(tmp_path, t1=[(f"iu_{i}", 1) for i in range(4)])
    folds, classes = problems_of(tmp_path, "warning")  # 4 cases do for the 4 folds of the binary task
    assert folds.startswith("IU t1") and "5 folds" in folds and "4 low risk" in folds
    assert classes.startswith("IU t1") and "one class only (not high risk)" in classes


def test_a_center_of_one_class_is_a_warning():
    scans = scans_of([("EMC", "t1", 0, 0, 6), ("NYU", "t1", 5, 6, 7)])
    for n_folds, binary in ((5, False), (4, True)):
        (row,) = data.fold_problems(scans, n_folds, binary).itertuples(index=False)
        assert row.severity == "warning" and row.where == "EMC t1" and "n/a" in row.remedy
        assert row.problem == "holds 6 cases of one class only (high risk)"


def test_problems_come_errors_first_then_warnings_then_notes(tmp_path):
    first_release(tmp_path, t1=[("nyu_1", 1), ("nyu_2", 7)])
    severities = data.inspect(tmp_path)[1]["severity"].tolist()
    assert severities == sorted(severities, key=["error", "warning", "note"].index)
    assert set(severities) == {"error", "warning", "note"}


def test_a_class_smaller_than_the_folds_is_a_note_not_a_warning():
    problems = data.fold_problems(paper_scans(), 5, False)
    assert set(problems["severity"]) == {"note"}
    assert set(problems["where"]) == {f"{c} {m}" for c in ("AHN", "MCA", "IU") for m in ("t1", "t2")}
    assert "1 no risk, 4 high risk" in problems.set_index("where").loc["AHN t1", "problem"]
    assert data.fold_problems(paper_scans(), 4, True).empty


# Table 1, subsets


def test_table_1_of_the_papers_counts_is_the_papers():
    shuffled = paper_scans().sample(frac=1, random_state=0)
    pd.testing.assert_frame_equal(data.table1(shuffled), PAPER_TABLE1.drop(columns="name"), check_names=False)


def test_table_1_has_no_row_for_what_does_not_occur():
    table = data.table1(scans_of([("EMC", "t2", 0, 3, 0), ("NYU", "t1", 1, 0, 0)]))
    assert table.to_numpy().tolist() == [["NYU", "t1", 1, 0, 0, 1], ["EMC", "t2", 0, 3, 0, 3]]


def test_a_subset_has_the_first_scans_of_every_cell():
    scans = paper_scans()
    few = data.subset(scans, 3)
    expected = PAPER_TABLE1[["no_risk", "low_risk", "high_risk"]].clip(upper=3)
    assert (data.table1(few)[list(expected)].to_numpy() == expected.to_numpy()).all()
    nyu = scans.query("center == 'NYU' and modality == 't2' and label == 2")["case_id"].head(3).tolist()
    assert few.query("center == 'NYU' and modality == 't2' and label == 2")["case_id"].tolist() == nyu
    pd.testing.assert_frame_equal(data.subset(scans, None), scans)


def test_a_subset_keeps_the_attributes_and_takes_both_scans_of_a_patient():
    scans = pd.concat([scans_of([("NYU", "t1", 5, 5, 5)], True), scans_of([("NYU", "t2", 5, 5, 5)], True)])
    scans.attrs["unlabelled"] = {"t1": 1, "t2": 2}
    few = data.subset(scans, 2)
    assert few.attrs == scans.attrs
    assert few.groupby("patient_id").size().eq(2).all()


# Folds


def folds_by_hand(scans, n_folds, binary):
    """The paper's folds by a plain loop: case and modality -> fold."""
    fold_of = {}
    for modality in ("t1", "t2"):
        for center in CENTERS:
            part = [s for s in scans.itertuples() if s.center == center and s.modality == modality]
            y = [int(s.label == 2) if binary else s.label for s in part]
            for fold, (_, test) in enumerate(StratifiedKFold(n_folds, shuffle=False).split(y, y)):
                for i in test:
                    assert (part[i].case_id, modality) not in fold_of  # tested once only
                    fold_of[part[i].case_id, modality] = fold
    return fold_of


@pytest.mark.filterwarnings("ignore:The least populated class")
@pytest.mark.parametrize(("n_folds", "binary"), [(5, False), (4, True)])
def test_folds_of_the_papers_counts_are_those_of_a_plain_loop(n_folds, binary):
    scans = paper_scans()
    by_hand = folds_by_hand(scans, n_folds, binary)
    shifted = scans.set_axis(range(1000, 1000 + len(scans)))
    folds = data.assign_folds(shifted, n_folds, binary=binary)
    assert folds.index.equals(shifted.index)
    assert folds.dtype.kind == "i"
    assert folds.tolist() == [by_hand[row.case_id, row.modality] for row in scans.itertuples()]
    assert set(folds) == set(range(n_folds))


@pytest.mark.parametrize(("n_folds", "binary"), [(5, False), (4, True)])
def test_folds_depend_on_nothing_but_the_order_within_a_center_and_modality(n_folds, binary):
    scans = paper_scans()
    ahn = scans[(scans["center"] == "AHN") & (scans["modality"] == "t2")]
    everywhere = data.assign_folds(scans, n_folds, binary=binary)
    assert data.assign_folds(ahn, n_folds, binary=binary).equals(everywhere[ahn.index])


def test_every_fold_of_every_center_holds_its_share_of_each_class():
    scans = paper_scans().assign(fold=data.assign_folds(paper_scans(), 5))
    per_fold = scans.groupby(["modality", "center", "label", "fold"]).size().unstack(fill_value=0)
    assert (per_fold.max(axis=1) - per_fold.min(axis=1)).max() <= 1


def test_small_classes_split_without_a_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(data.assign_folds(scans_of([("AHN", "t1", 1, 11, 4)]), 5)) == 16


@pytest.mark.parametrize(("binary", "n_folds"), [(False, 5), (True, 4)])
def test_the_patient_rule_keeps_t1_and_t2_of_a_patient_in_one_fold(binary, n_folds):
    t1, t2 = scans_of([("NYU", "t1", 9, 12, 8)], True), scans_of([("NYU", "t2", 12, 10, 11)], True)
    scans = pd.concat([t1, t2], ignore_index=True)  # names pair up, labels often differ, four T2 have no T1
    folds = data.assign_folds(scans, n_folds, rule="patient", binary=binary)
    assert folds.groupby(scans["patient_id"]).nunique().eq(1).all()
    assert data.assign_folds(scans, n_folds, binary=binary).groupby(scans["patient_id"]).nunique().max() == 2
    label = {}  # patients in sheet order with the larger label
    for row in scans.itertuples():
        label[row.patient_id] = max(row.label, label.get(row.patient_id, 0))
    y = [int(k == 2) if binary else k for k in label.values()]
    for fold, (_, test) in enumerate(StratifiedKFold(n_folds).split(y, y)):
        assert {list(label)[i] for i in test} == set(scans["patient_id"][folds == fold])


def test_the_papers_cohort_splits_by_patients_too():
    columns = ["center", "modality", "no_risk", "low_risk", "high_risk"]
    scans = scans_of(PAPER_TABLE1[columns].itertuples(index=False), paired=True)
    for n_folds, binary in ((5, False), (4, True)):
        folds = data.assign_folds(scans, n_folds, rule="patient", binary=binary)
        assert set(folds) == set(range(n_folds))


@pytest.mark.parametrize(("rule", "where"), [("center", "MCA t1"), ("patient", "MCA patients")])
def test_a_center_that_cannot_be_split_is_an_error_with_its_counts(rule, where):
    scans = scans_of([("NYU", "t1", 9, 9, 9), ("MCA", "t1", 2, 4, 3)])
    with pytest.raises(data.CohortError) as error:
        data.assign_folds(scans, 5, rule=rule)
    assert all(
        part in str(error.value) for part in (where, "5 folds", "2 no risk, 4 low risk, 3 high risk", "fewer")
    )
    with pytest.raises(ValueError):  # scikit-learn's own rule
        StratifiedKFold(5).split([0] * 9, [0] * 2 + [1] * 4 + [2] * 3).__next__()


def test_a_center_that_cannot_be_split_for_the_binary_task_is_named():
    with pytest.raises(data.CohortError, match=r"MCA t2.*4 folds.*3 not high risk, 2 high risk"):
        data.assign_folds(scans_of([("MCA", "t2", 1, 2, 2)]), 4, binary=True)


def test_an_unknown_fold_rule_is_refused():
    with pytest.raises(ValueError, match="scanner"):
        data.assign_folds(paper_scans(), 5, rule="scanner")


# Spreadsheets and terminals


@pytest.mark.parametrize("start", ["=", "+", "-", "@", "\t", "\r", "\n", "'=", "''+"])
def test_text_that_a_spreadsheet_would_run_gets_an_apostrophe_and_loses_it_again(start):
    table = pd.DataFrame({f"{start}head": [f"{start}cmd", "nyu_1"], "n": [-1, 2.5], "plain": [None, "'x"]})
    table = table.set_axis([5, 7])
    escaped = data.for_spreadsheet(table)
    assert escaped.columns.tolist() == [f"'{start}head", "n", "plain"] and escaped["n"].equals(table["n"])
    assert escaped.iloc[:, 0].tolist() == [f"'{start}cmd", "nyu_1"]
    assert escaped["plain"].iloc[1] == "'x"
    pd.testing.assert_frame_equal(data.from_spreadsheet(escaped), table)


def test_a_problem_is_one_cell_and_moves_no_cursor():
    assert data.in_one_cell("a|b\x1b[2J\nü\udcff") == r"a\|b\x1b[2J\nü\udcff"


# A profile's cohort


def profile(folder, **changes):
    settings = {
        "data": str(folder),
        "cohort_root": Path(folder),
        "columns": "header",
        "modalities": ("t1", "t2"),
    }
    return types.SimpleNamespace(
        **settings | {"seed": 3, "jobs": 2, "phantom_max_per_cell": 7, "phantom_shortcut": 0.5} | changes
    )


def test_a_profile_opens_a_folder_with_its_modalities(tmp_path):
    second_release(tmp_path, [(f"nyu_{i}", f"nyu_{i}", 1) for i in range(3)] + [("nyu_9", None, None)])
    scans = data.open_cohort(profile(tmp_path, modalities=("t2",)))
    assert scans["case_id"].tolist() == ["nyu_0", "nyu_1", "nyu_2"]
    assert scans.index.tolist() == [0, 1, 2]
    assert set(scans["modality"]) == {"t2"}
    assert scans.attrs["unlabelled"] == {"t1": 1, "t2": 0}


def test_the_phantom_is_written_once_where_the_profile_says(tmp_path, monkeypatch):
    written = []

    def write(root, seed, max_per_cell, shortcut, jobs):
        written.append((root, seed, max_per_cell, shortcut, jobs))
        root.mkdir()
        second_release(root, [("nyu_1", "nyu_1", 1)])

    monkeypatch.setattr(ipmn_core, "phantom", types.SimpleNamespace(write=write), raising=False)
    p = profile("phantom", cohort_root=tmp_path / "phantom")
    assert len(data.open_cohort(p)) == len(data.open_cohort(p)) == 2
    assert written == [(tmp_path / "phantom", 3, 7, 0.5, 2)]


def test_a_missing_folder_says_where_it_was_looked_for_and_how_to_get_data(tmp_path):
    with pytest.raises(data.CohortError) as error:
        data.open_cohort(profile(tmp_path / "nowhere"))
    assert all(part in str(error.value) for part in (str(tmp_path / "nowhere"), "osf.io/74vfs", "phantom"))


def test_a_profile_without_a_scan_left_is_an_error(tmp_path):
    second_release(tmp_path, [("nyu_1", None, 1)])
    with pytest.raises(data.CohortError, match="no labelled t2 scan"):
        data.open_cohort(profile(tmp_path, modalities=("t2",)))


def test_importing_the_reader_imports_nothing_heavy():
    code = "import sys, ipmn_core.data; print({'torch', 'monai', 'sklearn'} & set(sys.modules))"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == "set()"
