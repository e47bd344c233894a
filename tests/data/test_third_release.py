"""The third layout of the data set, whole and in parts, and the folds of its split files."""

import shutil

import pytest
from tiny import first_release, only_error, problems_of, save_sheet, save_volume, third_release

from ipmn_core import data
from ipmn_core.data.releases import read_release

T1_SHEET = "IPMN_labels_t1_total.xlsx"
THIRD = [("CAD_28_T1", "CAD_28_T2", 1, "no change in 5 years"), ("EMC_01_002", "EMC007", 0, None)]
THIRD += [("IU_2", None, 2, "resected"), (None, "nyu_4", 2, "No change")]
T1_VOLUMES, T1_ROI = "IPMN_images_masks/t1/images", "IPMN_Classification/t1"


def test_the_third_release_is_read_from_images_and_masks_and_says_so(tmp_path):
    scans = data.read(third_release(tmp_path, THIRD)).scans
    assert scans["case_id"].tolist() == ["CAD_28_T1", "IU_2", "EMC_01_002", "nyu_4", "CAD_28_T2", "EMC007"]
    patients = ["cad_28", "iu_2", "emc_01_002", "nyu_4", "cad_28", "emc_01_002"]
    assert scans["patient_id"].tolist() == patients and scans["label"].tolist() == [1, 2, 0, 2, 1, 0]
    assert scans["image"][1] == str(tmp_path / T1_VOLUMES / "IU_2.nii.gz")
    assert scans["mask"][1] == str(tmp_path / "IPMN_images_masks/t1/masks/IU_2.nii.gz")
    assert set(scans["fold_binary"]) == set(scans["fold_multiclass"]) == {""}
    assert not [warning for warning in problems_of(tmp_path, "warning") if "folds" not in warning]
    note = f"3 t1 scans are read from {T1_VOLUMES} and IPMN_images_masks/t1/masks, not from {T1_ROI}"
    assert any(note in said for said in problems_of(tmp_path, "note"))


@pytest.mark.parametrize("sheets", [("t1", "t2", "both"), ("t1", "t2"), ("both",)])
@pytest.mark.parametrize(("roi", "volumes"), [(True, False), (False, True)])
def test_parts_of_the_third_release_are_read(tmp_path, sheets, roi, volumes):
    scans = data.read(third_release(tmp_path, THIRD, sheets, roi, volumes)).scans
    assert len(scans) == 6 and all(scans["mask"] == "") == roi
    assert scans["image"][1] == str(tmp_path / (T1_ROI if roi else T1_VOLUMES) / "IU_2.nii.gz")
    by_row = "both" in sheets  # EMC_01_002 and EMC007 are one patient only there
    assert scans["patient_id"].nunique() == (4 if by_row else 5)


def test_few_cases_of_the_third_release_are_one_warning_and_half_a_case_is_an_error(tmp_path):
    third_release(tmp_path, [(f"nyu_{i}", None, 1, None) for i in range(20)], roi=False)
    folders = [tmp_path / "IPMN_images_masks/t1" / kind for kind in ("images", "masks")]
    for i in range(3, 20):
        for folder in folders:
            (folder / f"nyu_{i}.nii.gz").unlink()
    assert data.read(tmp_path).scans["case_id"].tolist() == ["nyu_0", "nyu_1", "nyu_2"]
    (warning,) = [w for w in problems_of(tmp_path, "warning") if "no file" in w]
    assert "17 of 20 labeled t1 scans" in warning and "nyu_3, nyu_4" in warning and "nyu_19" not in warning
    (folders[1] / "nyu_2.nii.gz").unlink()
    only_error(tmp_path, "row 4", "no mask of 'nyu_2'", folders[1])
    for folder in folders:
        for i in range(3):
            (folder / f"nyu_{i}.nii.gz").unlink(missing_ok=True)
        save_volume(folder / "nyu_99.nii.gz")
    only_error(tmp_path, "20 of 20 labeled t1 scans", "download")


def test_images_of_the_third_release_without_a_sheet_or_masks_are_an_error(tmp_path):
    third_release(tmp_path / "1", THIRD, sheets=("t2",), roi=False)
    only_error(tmp_path / "1", "no label sheet for the t1 scans", T1_SHEET, "IPMN_labels_total")
    third_release(tmp_path / "2", THIRD, roi=False)
    shutil.rmtree(tmp_path / "2/IPMN_images_masks/t1/masks")
    only_error(tmp_path / "2", "IPMN_images_masks/t1/masks", "no such folder")


def test_a_mix_of_releases_is_refused(tmp_path):
    third_release(first_release(tmp_path), THIRD)
    only_error(tmp_path, "parts of two releases, first and third")
    only_error(tmp_path / "IPMN_Classification", "part of a release", "the folder above")


def test_labels_that_differ_between_the_sheets_of_the_third_release_are_a_warning(tmp_path):
    third_release(tmp_path, THIRD)
    sheet = tmp_path / T1_ROI / ".." / T1_SHEET
    save_sheet(sheet, ["Name", "Risk"], [("CAD_28_T1", 2), ("EMC_01_002", None), ("IU_2", "2.0")])
    labels = data.read(tmp_path).scans.query("modality == 't1'")
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
        assert data.read(tmp_path).scans["label"].tolist() == [2, 0]
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
    scans = data.read(third_release(tmp_path, rows, splits=files)).scans
    fold = scans.set_index("case_id")["fold_binary"]
    assert fold[[row[0] for row in rows]].tolist() == ["0", "1", "2", "3", "0", ""]
    assert set(scans["fold_multiclass"]) == {""}
    (note,) = [n for n in problems_of(tmp_path, "note") if "no fold" in n]
    assert "2-class/t1.csv | 1 of 6 t1 scans have no fold: nyu_9" in note


def test_a_case_in_two_official_folds_is_named_and_has_none(tmp_path):
    split = "name,fold\n" + "".join(f"{n},{f}\n" for n, f in [*SPLIT, ("NYU_1.nii.gz", 2), ("CAD_2", 2)])
    third_release(tmp_path, [(n, None, 0, None) for n, _ in SPLIT], splits={"3-class/t1.csv": split})
    fold = data.read(tmp_path).scans.set_index("case_id")["fold_multiclass"]
    assert fold[[n for n, _ in SPLIT]].tolist() == ["0", "", "2", "3", "0", "1"]
    (warning,) = [w for w in problems_of(tmp_path, "warning") if "fold" in w and "3-class" in w]
    assert "1 of 6 t1 scans are in two folds: nyu_1 |" in warning and "official" in warning


UNCLEAR = ["", "name,fold\n", "a,b\n1,2\n", "a,b\nnyu_0,nyu_1\n", "nyu_0,0\nnyu_1,1\n"]
UNCLEAR += ["name,label\nnyu_0,1\nnyu_1,0\n", "name,use\nnyu_0,train\nnyu_1,test\n"]
UNCLEAR += ["name,outer fold,inner fold\nnyu_0,0,1\nnyu_1,1,0\n"]
UNCLEAR += ["T1,T2,fold\nnyu_0,CAD_0,0\nnyu_1,CAD_1,1\n"]


@pytest.mark.parametrize("content", UNCLEAR)
def test_a_split_file_that_is_unclear_is_shown_and_gives_no_fold(tmp_path, content):
    rows = [("nyu_0", None, 0, None), ("nyu_1", None, 0, None)]
    third_release(tmp_path, rows, splits={"2-class/t1.csv": content})
    assert data.read(tmp_path).scans["fold_binary"].tolist() == ["", ""]
    (warning,) = [w for w in problems_of(tmp_path, "warning") if "unclear" in w]
    header = content.partition("\n")[0]
    assert "2-class/t1.csv" in warning and str(header.split(",") if header else []) in warning
