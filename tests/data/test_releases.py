"""The reader of the releases and its errors, on tiny cohorts written to disk."""

import re
import shutil
import zipfile
from pathlib import Path

import pandas as pd
import pytest
from tiny import (
    first_release,
    only_error,
    problems_of,
    save_sheet,
    save_volume,
    second_release,
    third_release,
)

from ipmn_core import data
from ipmn_core.data.releases import SCAN_COLUMNS

T1_SHEET, ROI = "IPMN_labels_t1_total.xlsx", "t1_clean_ROI"


def test_a_case_name_has_no_suffix_and_no_trailing_channel_number():
    for raw in ("AHN05", " AHN05 ", "AHN05.nii.gz", "AHN05.NII", "AHN05_0000.nii.gz", "AHN05_0000"):
        assert data.case_name(raw) == "AHN05"
    assert data.case_name("EMC_0000_002.nii.gz") == "EMC_0000_002"


# The first and the second layout


def test_a_name_gives_its_center(tmp_path):
    names = {
        "NYU": ["nyu_0001", "ipmn-0001-Nyu"],
        "MCF": ["CAD_28_T1", "MCF_03", "mcf_CAD_3"],
        "NU": ["NU_03", "northwestern_0001"],
        "AHN": ["ahn05"],
        "MCA": ["mca_05"],
        "IU": ["IU_2"],
        "EMC": ["EMC007", "EMC_01_002"],
    }
    first_release(tmp_path, t1=[(name, 0) for of in names.values() for name in of])
    scans = data.read(tmp_path).scans
    assert scans.groupby("center", sort=False)["case_id"].apply(list).to_dict() == names


def test_the_first_release_is_read_t1_first_centers_in_the_papers_order(tmp_path):
    first_release(tmp_path, t1=[("nyu_2", 2), ("AHN01.nii.gz", 0)], t2=[("ahn01", 0), ("CAD_3", 1)])
    scans = data.read(tmp_path).scans
    assert list(scans.columns) == [*SCAN_COLUMNS, "class", "positive"] and scans["label"].dtype.kind == "i"
    assert scans["case_id"].tolist() == ["nyu_2", "AHN01", "CAD_3", "ahn01"]
    assert scans["patient_id"].tolist() == ["nyu_2", "ahn01", "cad_3", "ahn01"]
    assert scans["center"].tolist() == ["NYU", "AHN", "MCF", "AHN"]
    assert scans["modality"].tolist() == ["t1", "t1", "t2", "t2"]
    assert scans["label"].tolist() == [2, 0, 1, 0]
    assert scans["image"].tolist()[1] == str(tmp_path / ROI / "AHN01.nii.gz")
    assert set(scans["mask"]) == {""}


def test_the_second_release_is_read_with_masks_and_the_row_as_patient(tmp_path):
    second_release(tmp_path, [("CAD_28_T1", "CAD_28_T2", 1), (None, "EMC_01_002", 0), ("IU_2", None, 2)])
    scans = data.read(tmp_path).scans
    assert scans["case_id"].tolist() == ["CAD_28_T1", "IU_2", "CAD_28_T2", "EMC_01_002"]
    assert scans["patient_id"].tolist() == ["cad_28", "iu_2", "cad_28", "emc_01_002"]
    assert scans["label"].tolist() == [1, 2, 1, 0]
    assert scans["mask"].tolist()[2] == str(tmp_path / "IPMN_images_masks/t2/masks/CAD_28_T2.nii.gz")


def test_files_match_in_any_case_with_nii_or_nii_gz_and_with_the_channel_number(tmp_path):
    first_release(tmp_path, t1=[("nyu_1", 0), ("MCF_2.nii.gz", 1), ("iu_3", 2)])
    folder = tmp_path / ROI
    (folder / "nyu_1.nii.gz").rename(folder / "NYU_1_0000.nii.gz")
    (folder / "MCF_2.nii.gz").rename(folder / "mcf_2.NII.GZ")
    (folder / "iu_3.nii.gz").unlink()
    save_volume(folder / "IU_3.nii")
    found = [Path(file).name for file in data.read(tmp_path).scans["image"]]
    assert found == ["NYU_1_0000.nii.gz", "mcf_2.NII.GZ", "IU_3.nii"]


def test_blank_labels_are_left_out_and_counted_and_blank_rows_are_skipped(tmp_path):
    rows = [("nyu_1", "nyu_1", 1), (None,) * 3, ("nyu_2", None, None), ("nyu_3", "nyu_3", " ")]
    second_release(tmp_path, [*rows, (None, "nyu_4", 0)])
    scans = data.read(tmp_path).scans
    cases = list(zip(scans["modality"], scans["case_id"], strict=True))
    assert cases == [("t1", "nyu_1"), ("t2", "nyu_1"), ("t2", "nyu_4")]
    assert scans.attrs["unlabelled"] == {"t1": 2, "t2": 1}
    assert "2 t1 scans and 1 t2 scans have no label" in problems_of(tmp_path, "note")[-1]
    assert not [w for w in problems_of(tmp_path, "warning") if "no row" in w]


def test_a_first_release_with_one_modality_only_is_read_whole_labels_as_number_or_text(tmp_path):
    labels = [1, 1.0, "1", " 1 ", "1.0"]
    first_release(tmp_path, t1=[(f"nyu_{i}", label) for i, label in enumerate(labels)])
    (tmp_path / "IPMN_labels_t2_total.xlsx").unlink()
    (tmp_path / "t2_clean_ROI").rmdir()
    assert data.read(tmp_path).scans["label"].tolist() == [1] * 5


@pytest.mark.parametrize(
    ("t1", "t2"),
    [
        ("CAD_28_T1", "CAD_28_T2"),
        ("nyu_7-t1", "NYU_7-t2"),
        ("iu_3 T1", "iu_3 T2"),
        ("EMC_01_002.t1.nii.gz", "EMC_01_002.t2.nii.gz"),
        ("AHN05_T1W_0000", "ahn05_T2w_0000"),
        ("T1_NU_04", "T2_NU_04"),
        ("mca_T1_05", "mca_T2_05"),
        ("nyu_7", "nyu_7_T2"),
    ],
)
def test_names_that_differ_in_the_modality_are_one_patients(tmp_path, t1, t2):
    cohort, problems = data.inspect(first_release(tmp_path, t1=[(t1, 1)], t2=[(t2, 2)]))
    assert len(cohort) == 2 and cohort.scans["patient_id"].nunique() == 1
    assert "different labels" in problems[problems["severity"] == "warning"]["problem"].iloc[0]
    second_release(tmp_path / "2", [(t1, None, 1), (None, t2, 1)])
    assert data.read(tmp_path / "2").scans["patient_id"].nunique() == 1


def test_names_that_only_look_like_a_modality_stay_apart(tmp_path):
    names = ["nyu_1", "nyu_t10", "nyu_1_t2", "nyu_set1", "nyu_2"]
    scans = data.read(first_release(tmp_path, t1=[(name, 1) for name in names])).scans
    assert scans["patient_id"].tolist() == names


# Copies of one modality


@pytest.mark.parametrize("other", ["t1", "t2"])
@pytest.mark.parametrize("release", ["first", "second", "third"])
def test_a_copy_of_one_modality_is_read_without_an_error(tmp_path, release, other):
    if release == "first":
        first_release(tmp_path, t1=[("nyu_1", 1)], t2=[("nyu_1", 1)])
    elif release == "second":
        second_release(tmp_path, [("nyu_1", "nyu_1", 1)])
    else:
        third_release(tmp_path, [("nyu_1", "nyu_1", 1, None)])
    for folder in (f"{other}_clean_ROI", f"IPMN_images_masks/{other}", f"IPMN_Classification/{other}"):
        shutil.rmtree(tmp_path / folder, ignore_errors=True)
    assert data.read(tmp_path).scans["modality"].tolist() == [{"t1": "t2", "t2": "t1"}[other]]
    assert any(f"1 labeled {other} scans are left out" in note for note in problems_of(tmp_path, "note"))


# Columns


@pytest.mark.parametrize("header", ["Patient ID", "patient_id", "PatientID", "Case", "scan name", "ID"])
def test_the_name_column_is_found_wherever_it_is(tmp_path, header):
    first_release(tmp_path)
    save_sheet(tmp_path / T1_SHEET, ["Risk assessment", "Age", "Idiom", header], [(2, 60, "", "nyu_1")])
    save_volume(tmp_path / ROI / "nyu_1.nii.gz")
    assert data.read(tmp_path).scans["label"].tolist() == [2]


@pytest.mark.parametrize(
    ("headers", "named"),
    [
        (["Patient ID", "b", "c", "d", "e", "f"], ["the label", "'Patient ID', 'b'"]),
        (["a", "b", "c", "d", "e", "Risk"], ["the t1 name", "none", "'Risk'"]),
        (["Patient ID", "Center name", "c", "d", "e", "Risk"], ["'Patient ID' or 'Center name'"]),
        (["Patient ID", "b", "c", "d", "Risk factors", "Risk"], ["'Risk factors' or 'Risk'"]),
        (["a", "T2", *"cdef", "Risk"], ["the t1 name", "none"]),
        (["T1", "T1 date", *"cdef", "Risk"], ["the t1 name", "'T1' or 'T1 date'"]),
    ],
)
def test_a_column_that_is_missing_or_ambiguous_is_an_error_that_names_the_headers(tmp_path, headers, named):
    if len(headers) == 6:
        first_release(tmp_path, t1=[("nyu_1", 2)], headers=headers)
    else:
        second_release(tmp_path, [("nyu_1", None, 2)], headers=headers)
    only_error(tmp_path, "IPMN_labels_", "rename", *named)


def test_t1_within_a_longer_word_is_no_t1_header(tmp_path):
    headers = ["T1_file", "T2_file", "Patient1", "T10", "T21", "f", "risk"]
    second_release(tmp_path, [("nyu_1", "nyu_1", 2)], headers)
    assert len(data.read(tmp_path).scans) == 2


# Errors of sheets and files


def empty(sheet):
    pd.DataFrame().to_excel(sheet, header=False, index=False)


@pytest.mark.parametrize(
    ("spoil", "parts"),
    [
        (lambda root: second_release(root, []), ["two releases", "in its own"]),
        (lambda root: shutil.rmtree(root), ["no such file or folder", "a release, or a manifest"]),
        (lambda root: (root / T1_SHEET).unlink(), ["no label sheet for the t1 scans", T1_SHEET]),
        (lambda root: empty(root / T1_SHEET), [T1_SHEET, "none"]),
        (lambda root: (root / ROI).rename(root / "x"), ["no labeled scan has its files"]),
        (lambda root: (root / ROI / "nyu_2.nii.gz").unlink(), [f"{T1_SHEET} row 3", "nyu_2.nii.gz", ROI]),
        (lambda root: save_volume(root / ROI / "nyu_2_0000.nii.gz"), ["row 3", "nyu_2_0000", "keep one"]),
    ],
)
def test_a_sheet_or_file_that_cannot_be_used_is_one_error_with_its_name(tmp_path, spoil, parts):
    first_release(tmp_path, t1=[("nyu_1", 1), ("nyu_2", 2)])
    spoil(tmp_path)
    only_error(tmp_path, *parts)


def test_an_image_without_its_mask_is_an_error(tmp_path):
    second_release(tmp_path, [("nyu_1", "nyu_1", 1)])
    (tmp_path / "IPMN_images_masks/t2/masks/nyu_1.nii.gz").unlink()
    only_error(tmp_path, "IPMN_labels_total.xlsx row 2", "no mask of 'nyu_1'", "IPMN_images_masks/t2/masks")


# Errors of rows


@pytest.mark.parametrize(
    ("row", "parts"),
    [
        (("ucsf_7", 1), ["'ucsf_7'", "no center", "northwestern", "rename"]),
        (("nyu_mca_7", 1), ["'nyu_mca_7'", "MCA and NYU"]),
        ((7, 1), ["'7'", "no center"]),
        (("../nyu_2", 1), ["no image of '../nyu_2'"]),
        *((("nyu_2", x), [f"label {x!r}", "nyu_2"]) for x in (3, 1.5, True, "high", "01", "=1+1", "#REF!")),
        ((None, 2), ["name ''"]),
        *((("NYU_1.nii.gz", label), ["row 2 and", "'nyu_1'", "keep one row"]) for label in (1, None)),
    ],
)
def test_a_row_that_cannot_be_used_is_an_error_with_its_number_and_name(tmp_path, row, parts):
    first_release(tmp_path, t1=[("nyu_1", 1), (None, None), row], t2=[("nyu_1", 1)])
    (tmp_path / ROI / "NYU_1.nii.gz").unlink(missing_ok=True)
    only_error(tmp_path, T1_SHEET, "4", *parts)


def test_a_formula_counts_as_the_value_it_had_last(tmp_path):
    sheet = tmp_path / T1_SHEET
    first_release(tmp_path, t1=[("nyu_1", 0), ("nyu_2", "=1+1")])
    with zipfile.ZipFile(sheet) as book:
        parts = {name: book.read(name) for name in book.namelist()}
    cells = parts["xl/worksheets/sheet1.xml"].decode()
    computed = re.sub(r"<f>1\+1</f><v */>", "<f>1+1</f><v>2</v>", cells)
    assert computed != cells
    with zipfile.ZipFile(sheet, "w") as book:
        for name, part in (parts | {"xl/worksheets/sheet1.xml": computed.encode()}).items():
            book.writestr(name, part)
    assert data.read(tmp_path).scans["label"].tolist() == [0, 2]


def test_read_lists_ten_errors_and_counts_the_rest(tmp_path):
    first_release(tmp_path, t1=[(f"nyu_{i}", 9) for i in range(12)])
    with pytest.raises(data.CohortError) as error:
        data.read(tmp_path)
    lines = str(error.value).splitlines()
    assert "12 error(s)" in lines[0] and f"`ipmn check {tmp_path}`" in lines[0]
    assert "row 2" in lines[1] and "row 11" in lines[10] and len(lines) == 11


# Warnings and notes


def test_a_file_without_a_row_is_a_warning(tmp_path):
    second_release(tmp_path, [("nyu_1", None, 1)])
    folder = tmp_path / "IPMN_images_masks/t2/masks"
    save_volume(folder / "iu_9.nii.gz")
    for name in ("._iu_9.nii.gz", ".DS_Store", "readme.txt"):
        (folder / name).touch()
    strays = [w for w in problems_of(tmp_path, "warning") if "no row" in w]
    assert len(strays) == 1 and str(folder / "iu_9.nii.gz") in strays[0]
    assert len(data.read(tmp_path).scans) == 1


def test_different_labels_or_centers_of_a_patients_t1_and_t2_are_a_warning(tmp_path):
    first_release(tmp_path / "1", t1=[("NYU_1", 1), ("nyu_2", 0)], t2=[("nyu_1", 2), ("nyu_2", 0)])
    second_release(tmp_path / "2", [("nyu_1", "mcf_1", 1)])
    for root, rows in (("1", "t1 NYU_1: NYU, low risk; t2 nyu_1: NYU, high risk"), ("2", "t2 mcf_1: MCF")):
        (warning,) = [w for w in problems_of(tmp_path / root, "warning") if "different" in w]
        assert "patient nyu_1" in warning and rows in warning
