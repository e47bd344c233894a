"""The reader of the releases and its errors, on tiny cohorts written to disk."""

import re
import shutil
import zipfile
from pathlib import Path

import pandas as pd
import pytest
from sklearn.model_selection import StratifiedKFold
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
from ipmn_core.data.releases import SCAN_COLUMNS, read_release

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
    scans = data.read(tmp_path)
    assert scans.groupby("center", sort=False)["case_id"].apply(list).to_dict() == names


def test_the_first_release_is_read_in_sheet_order_t1_first(tmp_path):
    first_release(tmp_path, t1=[("nyu_2", 2), ("AHN01.nii.gz", 0)], t2=[("ahn01", 0), ("CAD_3", 1)])
    scans = data.read(tmp_path)
    assert list(scans.columns) == SCAN_COLUMNS and scans["label"].dtype.kind == "i"
    assert scans["case_id"].tolist() == ["nyu_2", "AHN01", "ahn01", "CAD_3"]
    assert scans["patient_id"].tolist() == ["nyu_2", "ahn01", "ahn01", "cad_3"]
    assert scans["center"].tolist() == ["NYU", "AHN", "AHN", "MCF"]
    assert scans["modality"].tolist() == ["t1", "t1", "t2", "t2"]
    assert scans["label"].tolist() == [2, 0, 0, 1]
    assert scans["image"].tolist()[1] == str(tmp_path / ROI / "AHN01.nii.gz")
    assert set(scans["mask"]) == {""}


def test_the_second_release_is_read_with_masks_and_the_row_as_patient(tmp_path):
    second_release(tmp_path, [("CAD_28_T1", "CAD_28_T2", 1), (None, "EMC_01_002", 0), ("IU_2", None, 2)])
    scans = data.read(tmp_path)
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
    found = [Path(file).name for file in data.read(tmp_path)["image"]]
    assert found == ["NYU_1_0000.nii.gz", "mcf_2.NII.GZ", "IU_3.nii"]


def test_blank_labels_are_left_out_and_counted_and_blank_rows_are_skipped(tmp_path):
    rows = [("nyu_1", "nyu_1", 1), (None,) * 3, ("nyu_2", None, None), ("nyu_3", "nyu_3", " ")]
    second_release(tmp_path, [*rows, (None, "nyu_4", 0)])
    scans = data.read(tmp_path)
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
    assert data.read(tmp_path)["label"].tolist() == [1] * 5


def test_names_of_every_kind_in_the_data_set_give_center_and_folds_in_sheet_order(tmp_path):
    kinds = {
        "NYU": ["nyu_{:04}"],
        "MCF": ["CAD_{:02}", "MCF_{:02}"],
        "NU": ["NU_{:02}", "northwestern_{:04}"],
    }
    kinds |= {"AHN": ["AHN{:02}"], "MCA": ["mca_{:02}"], "IU": ["IU_{:02}"]}
    kinds |= {"EMC": ["EMC{:03}", "EMC_{:02}_001"]}
    rows = [
        (kind.format(i), 2 * (i % 3 == 0)) for of in kinds.values() for kind in of for i in range(90, 102)
    ]
    scans = data.read(first_release(tmp_path, t1=rows))
    assert scans.groupby("center", sort=False).size().to_dict() == {
        c: 12 * len(of) for c, of in kinds.items()
    }
    folds = data.assign_folds(scans, 4, "center", binary=True)
    for _, here in scans.groupby("center"):
        for k, (_, test) in enumerate(StratifiedKFold(4).split(here, here["label"] == 2)):
            assert (folds[here.index[test]] == k).all()


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
    scans, problems = data.inspect(first_release(tmp_path, t1=[(t1, 1)], t2=[(t2, 2)]))
    assert len(scans) == 2 and scans["patient_id"].nunique() == 1
    assert "different labels" in problems[problems["severity"] == "warning"]["problem"].iloc[0]
    second_release(tmp_path / "2", [(t1, None, 1), (None, t2, 1)])
    assert data.read(tmp_path / "2")["patient_id"].nunique() == 1


def test_names_that_only_look_like_a_modality_stay_apart(tmp_path):
    names = ["nyu_1", "nyu_t10", "nyu_1_t2", "nyu_set1", "nyu_2"]
    scans = data.read(first_release(tmp_path, t1=[(name, 1) for name in names]))
    assert scans["patient_id"].tolist() == names


# Copies of one modality


@pytest.mark.parametrize("other", ["t1", "t2"])
@pytest.mark.parametrize("release", ["first", "second", "third"])
def test_a_copy_of_one_modality_is_read_without_an_error(tmp_path, release, other):
    if release == "first":
        first_release(tmp_path, t1=[("nyu_1", 1)], t2=[("nyu_1", 1)])
        shutil.rmtree(tmp_path / f"{other}_clean_ROI")
    elif release == "second":
        second_release(tmp_path, [("nyu_1", "nyu_1", 1)])
        shutil.rmtree(tmp_path / f"IPMN_images_masks/{other}")
    else:
        third_release(tmp_path, [("nyu_1", "nyu_1", 1, None)])
        shutil.rmtree(tmp_path / f"IPMN_images_masks/{other}")
        shutil.rmtree(tmp_path / f"IPMN_Classification/{other}")
    assert data.read(tmp_path)["modality"].tolist() == [{"t1": "t2", "t2": "t1"}[other]]
    assert any(f"1 labelled {other} scans are left out" in note for note in problems_of(tmp_path, "note"))


# The third layout

THIRD = [("CAD_28_T1", "CAD_28_T2", 1, "no change in 5 years"), ("EMC_01_002", "EMC007", 0, None)]
THIRD += [("IU_2", None, 2, "resected"), (None, "nyu_4", 2, "No change")]
T1_VOLUMES, T1_ROI = "IPMN_images_masks/t1/images", "IPMN_Classification/t1"


def test_the_third_release_is_read_from_images_and_masks_and_says_so(tmp_path):
    scans = data.read(third_release(tmp_path, THIRD))
    assert scans["case_id"].tolist() == ["CAD_28_T1", "EMC_01_002", "IU_2", "CAD_28_T2", "EMC007", "nyu_4"]
    patients = ["cad_28", "emc_01_002", "iu_2", "cad_28", "emc_01_002", "nyu_4"]
    assert scans["patient_id"].tolist() == patients and scans["label"].tolist() == [1, 0, 2, 1, 0, 2]
    assert scans["image"][2] == str(tmp_path / T1_VOLUMES / "IU_2.nii.gz")
    assert scans["mask"][2] == str(tmp_path / "IPMN_images_masks/t1/masks/IU_2.nii.gz")
    assert set(scans["fold_binary"]) == set(scans["fold_multiclass"]) == {""}
    assert not [warning for warning in problems_of(tmp_path, "warning") if "folds" not in warning]
    note = f"3 t1 scans are read from {T1_VOLUMES} and IPMN_images_masks/t1/masks, not from {T1_ROI}"
    assert any(note in said for said in problems_of(tmp_path, "note"))


@pytest.mark.parametrize("sheets", [("t1", "t2", "both"), ("t1", "t2"), ("both",)])
@pytest.mark.parametrize(("roi", "volumes"), [(True, False), (False, True)])
def test_parts_of_the_third_release_are_read(tmp_path, sheets, roi, volumes):
    scans = data.read(third_release(tmp_path, THIRD, sheets, roi, volumes))
    assert len(scans) == 6 and all(scans["mask"] == "") == roi
    assert scans["image"][2] == str(tmp_path / (T1_ROI if roi else T1_VOLUMES) / "IU_2.nii.gz")
    by_row = "both" in sheets  # EMC_01_002 and EMC007 are one patient only there
    assert scans["patient_id"].nunique() == (4 if by_row else 5)


def test_few_cases_of_the_third_release_are_one_warning_and_half_a_case_is_an_error(tmp_path):
    third_release(tmp_path, [(f"nyu_{i}", None, 1, None) for i in range(20)], roi=False)
    folders = [tmp_path / "IPMN_images_masks/t1" / kind for kind in ("images", "masks")]
    for i in range(3, 20):
        for folder in folders:
            (folder / f"nyu_{i}.nii.gz").unlink()
    assert data.read(tmp_path)["case_id"].tolist() == ["nyu_0", "nyu_1", "nyu_2"]
    (warning,) = [w for w in problems_of(tmp_path, "warning") if "no file" in w]
    assert "17 of 20 labelled t1 scans" in warning and "nyu_3, nyu_4" in warning and "nyu_19" not in warning
    (folders[1] / "nyu_2.nii.gz").unlink()
    only_error(tmp_path, "row 4", "no mask of 'nyu_2'", folders[1])
    for folder in folders:
        for i in range(3):
            (folder / f"nyu_{i}.nii.gz").unlink(missing_ok=True)
        save_volume(folder / "nyu_99.nii.gz")
    only_error(tmp_path, "20 of 20 labelled t1 scans", "download")


def test_images_of_the_third_release_without_a_sheet_or_masks_are_an_error(tmp_path):
    third_release(tmp_path / "1", THIRD, sheets=("t2",), roi=False)
    only_error(
        tmp_path / "1", "no label sheet for the t1 scans", "IPMN_labels_t1_total.xlsx", "IPMN_labels_total"
    )
    third_release(tmp_path / "2", THIRD, roi=False)
    shutil.rmtree(tmp_path / "2/IPMN_images_masks/t1/masks")
    only_error(tmp_path / "2", "IPMN_images_masks/t1/masks", "no such folder")


def test_a_mix_of_releases_is_refused(tmp_path):
    third_release(first_release(tmp_path), THIRD)
    only_error(tmp_path, "parts of two releases, first and third")


def test_labels_that_differ_between_the_sheets_of_the_third_release_are_a_warning(tmp_path):
    third_release(tmp_path, THIRD)
    sheet = tmp_path / T1_ROI / ".." / T1_SHEET
    save_sheet(sheet, ["Name", "Risk"], [("CAD_28_T1", 2), ("EMC_01_002", None), ("IU_2", "2.0")])
    labels = data.read(tmp_path).query("modality == 't1'")
    assert labels["label"].tolist() == [2, 2] and labels["patient_id"].tolist() == ["cad_28", "iu_2"]
    warnings = [w for w in problems_of(tmp_path, "warning") if "the first is used" in w]
    assert "CAD_28_T1 has the label '2', but '1' in IPMN_labels_total.xlsx row 2" in warnings[0]
    assert len(warnings) == 2 and f"{T1_SHEET} row 3 | EMC_01_002 has the label ''" in warnings[1]


def test_unnamed_columns_of_the_third_release_are_those_of_the_authors_code_if_their_cells_fit(tmp_path):
    third_release(tmp_path, THIRD, sheets=("t1",))
    sheet = tmp_path / "IPMN_Classification" / T1_SHEET
    rows = [("CAD_28_T1", 60, 1, 1, 1, 2), ("IU_2", 50, 0, 0, 0, 0)]
    for headers in (["x", "Age", "c", "d", "e", "Grade"], ["ID", "Age", "Risk c", "d", "e", "Risk f"]):
        save_sheet(sheet, headers, rows)
        shutil.rmtree(tmp_path / "IPMN_Classification/t2", ignore_errors=True)
        shutil.rmtree(tmp_path / "IPMN_images_masks/t2", ignore_errors=True)
        assert data.read(tmp_path)["label"].tolist() == [2, 0]
        (said,) = [w for w in problems_of(tmp_path, "warning") if "the label is read" in w]
        assert f"column 6, {headers[5]!r}" in said
    save_sheet(sheet, headers, [*rows, ("EMC_01_002", 40, 0, 0, 0, "low")])
    only_error(tmp_path, T1_SHEET, "'Risk c' or 'Risk f'", "rename")


def test_the_histology_cohort_is_without_those_followed_up_without_change(tmp_path):
    third_release(tmp_path, THIRD)
    problems = []
    scans, _ = read_release(tmp_path, problems, cohort="histology")
    assert [s["case_id"] for s in scans] == ["EMC_01_002", "IU_2", "EMC007", "nyu_4"]
    assert sum("1 t1 scans are followed up" in problem[2] for problem in problems) == 1
    first_release(tmp_path / "1", t1=[("nyu_1", 1)])
    assert read_release(tmp_path / "1", problems, cohort="histology")[0] == []
    assert problems[-1][0] == "error" and "follow-up" in problems[-1][2] and "all" in problems[-1][3]


# The third release's folds

SPLIT = [("nyu_0", 0), ("nyu_1", 1), ("CAD_2", 2), ("IU_3", 3), ("nyu_4", 0), ("nyu_5", 1)]
SPLIT_FILES = {
    "names and folds": "label,Fold,name\n" + "".join(f"{f % 3},{f},{n}\n" for n, f in SPLIT),
    "by content": ",a,b,c\n" + "".join(f"{i},x/{n}.nii.gz,{f % 2},{f}\n" for i, (n, f) in enumerate(SPLIT)),
    "semicolons": "patient;path;fold\n" + "".join(f"{n}.nii.gz;t1/{n}.nii.gz;fold_{f}\n" for n, f in SPLIT),
    "rows of train and test": "fold,case,split\n"
    + "".join(f"{k},{n},{'test' if f == k else 'train'}\n" for k in range(4) for n, f in SPLIT),
    "a column of train and val per fold": "ID,fold0,fold1,fold2,fold3\n"
    + "".join(f"{n},{','.join('val' if f == k else 'train' for k in range(4))}\n" for n, f in SPLIT),
    "a column of names per fold": "test 0,train 0,test 1,test 2,test 3\n"
    "nyu_0,nyu_1,nyu_1,CAD_2,IU_3\nnyu_4,CAD_2,NYU_5,,\n",
}


@pytest.mark.parametrize("form", SPLIT_FILES)
def test_official_folds_are_found_by_content(tmp_path, form):
    rows = [(name, None, 0, None) for name, _ in SPLIT[:5]] + [("nyu_9", None, 2, None)]
    files = {"2-class/t1.csv": SPLIT_FILES[form], "2-class/t2.csv": "any,thing\n1,2\n"}
    scans = data.read(third_release(tmp_path, rows, splits=files))
    assert scans["fold_binary"].tolist() == ["0", "1", "2", "3", "0", ""]
    assert set(scans["fold_multiclass"]) == {""}
    (note,) = [n for n in problems_of(tmp_path, "note") if "no fold" in n]
    assert "2-class/t1.csv | 1 of 6 t1 scans have no fold: nyu_9" in note


def test_a_case_in_two_official_folds_is_named_and_has_none(tmp_path):
    split = "name,fold\n" + "".join(f"{n},{f}\n" for n, f in [*SPLIT, ("NYU_1.nii.gz", 2), ("CAD_2", 2)])
    third_release(tmp_path, [(n, None, 0, None) for n, _ in SPLIT], splits={"3-class/t1.csv": split})
    assert data.read(tmp_path)["fold_multiclass"].tolist() == ["0", "", "2", "3", "0", "1"]
    (warning,) = [w for w in problems_of(tmp_path, "warning") if "fold" in w and "3-class" in w]
    assert "1 of 6 t1 scans are in two folds: nyu_1 |" in warning and "official" in warning


@pytest.mark.parametrize(
    "content",
    [
        "",
        "name,fold\n",
        "name,label\nnyu_0,1\nnyu_1,0\n",
        "a,b\n1,2\n",
        "nyu_0,0\nnyu_1,1\n",
        "name,outer fold,inner fold\nnyu_0,0,1\nnyu_1,1,0\n",
        "T1,T2,fold\nnyu_0,CAD_0,0\nnyu_1,CAD_1,1\n",
        "name,use\nnyu_0,train\nnyu_1,test\n",
        "a,b\nnyu_0,nyu_1\n",
    ],
)
def test_a_split_file_that_is_unclear_is_shown_and_gives_no_fold(tmp_path, content):
    rows = [("nyu_0", None, 0, None), ("nyu_1", None, 0, None)]
    third_release(tmp_path, rows, splits={"2-class/t1.csv": content})
    assert data.read(tmp_path)["fold_binary"].tolist() == ["", ""]
    (warning,) = [w for w in problems_of(tmp_path, "warning") if "unclear" in w]
    header = content.partition("\n")[0]
    assert "2-class/t1.csv" in warning and str(header.split(",") if header else []) in warning


# Columns


@pytest.mark.parametrize("header", ["Patient ID", "patient_id", "PatientID", "Case", "scan name", "ID"])
def test_the_name_column_is_found_wherever_it_is(tmp_path, header):
    first_release(tmp_path)
    save_sheet(tmp_path / T1_SHEET, ["Risk assessment", "Age", "Idiom", header], [(2, 60, "", "nyu_1")])
    save_volume(tmp_path / ROI / "nyu_1.nii.gz")
    assert data.read(tmp_path)["label"].tolist() == [2]


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
    assert len(data.read(tmp_path)) == 2


# Errors of sheets and files


def empty(sheet):
    pd.DataFrame().to_excel(sheet, header=False, index=False)


@pytest.mark.parametrize(
    ("spoil", "parts"),
    [
        (lambda root: second_release(root, []), ["two releases", "in its own"]),
        (lambda root: shutil.rmtree(root), ["no label sheets", T1_SHEET, "IPMN_labels_total.xlsx"]),
        (lambda root: (root / T1_SHEET).unlink(), ["no label sheet for the t1 scans", T1_SHEET]),
        (lambda root: (root / T1_SHEET).write_bytes(b"no workbook"), [T1_SHEET, "cannot be read"]),
        (lambda root: empty(root / T1_SHEET), [T1_SHEET, "none"]),
        (lambda root: (root / ROI).rename(root / "x"), ["no labelled scan has its files"]),
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
    assert data.read(tmp_path)["label"].tolist() == [0, 2]


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
    assert len(data.read(tmp_path)) == 1


def test_different_labels_or_centers_of_a_patients_t1_and_t2_are_a_warning(tmp_path):
    first_release(tmp_path / "1", t1=[("NYU_1", 1), ("nyu_2", 0)], t2=[("nyu_1", 2), ("nyu_2", 0)])
    second_release(tmp_path / "2", [("nyu_1", "mcf_1", 1)])
    for root, rows in (("1", "t1 NYU_1: NYU, label 1; t2 nyu_1: NYU, label 2"), ("2", "t2 mcf_1: MCF")):
        (warning,) = [w for w in problems_of(tmp_path / root, "warning") if "different" in w]
        assert "patient nyu_1" in warning and rows in warning
