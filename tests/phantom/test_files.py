"""The phantom's files: both layouts, determinism, complete or absent."""

import hashlib
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import pytest

from ipmn_core import phantom
from ipmn_core.phantom import files


def digests(root):
    paths = root.rglob("*.nii.gz")
    return {str(p.relative_to(root)): hashlib.sha256(p.read_bytes()).hexdigest() for p in paths}


def write_some(monkeypatch, root, rows, **settings):
    """Write only those rows of the cohort."""
    monkeypatch.setattr(files, "patients", lambda *given: phantom.patients(*given).iloc[rows])
    return phantom.write(root, max_per_cell=1, progress=False, **settings)


def test_the_second_release_and_its_truth(phantom_root):
    sheet = pd.read_excel(phantom_root / "IPMN_labels_total.xlsx")
    columns = ["T1 name", "T2 name", "Patient ID", "Age", "Sex", "Center", "Risk assessment"]
    assert list(sheet.columns) == columns
    for modality in ("t1", "t2"):
        for kind in ("images", "masks"):
            names = {p.name for p in (phantom_root / "IPMN_images_masks" / modality / kind).iterdir()}
            assert names == {f"{name}.nii.gz" for name in sheet[f"{modality.upper()} name"].dropna()}
    truth = pd.read_csv(phantom_root / "truth.csv")
    pd.testing.assert_frame_equal(truth, phantom.patients(0, 1), check_dtype=False)
    assert list(sheet["Patient ID"]) == list(truth.patient_id)


def test_the_first_release_holds_the_masked_crop_with_the_right_affine(phantom_root, tmp_path, monkeypatch):
    first = write_some(monkeypatch, tmp_path / "first", slice(2), layout="first")
    for modality in ("t1", "t2"):
        sheet = pd.read_excel(first / f"IPMN_labels_{modality}_total.xlsx")
        assert (sheet.columns[0], sheet.columns[5]) == ("Patient ID", "Risk assessment")
        for name in sheet["Patient ID"]:
            roi = nib.load(first / f"{modality}_clean_ROI" / f"{name}.nii.gz")
            folder = phantom_root / "IPMN_images_masks" / modality
            image, mask = (nib.load(folder / kind / f"{name}.nii.gz") for kind in ("images", "masks"))
            masked = np.asarray(image.dataobj) * np.asarray(mask.dataobj)
            start = np.linalg.solve(image.affine, roi.affine[:, 3])[:3].round().astype(int)
            box = tuple(slice(a, a + n) for a, n in zip(start, roi.shape, strict=True))
            assert np.array_equal(np.asarray(roi.dataobj), masked[box])
            assert np.count_nonzero(masked[box]) == np.count_nonzero(masked)
            for axis in range(3):  # tight: each face of the box touches the mask
                faces = np.asarray(mask.dataobj)[box].take([0, -1], axis=axis)
                assert faces.any(axis=tuple({0, 1, 2} - {axis})).all()


def test_the_files_depend_on_seed_and_shortcut_and_not_on_the_number_of_processes(
    phantom_root, tmp_path, monkeypatch
):
    some, here = [0, 9, 20], digests(phantom_root)  # among them int16 and float32 centers
    two = digests(write_some(monkeypatch, tmp_path / "two", some, jobs=2))
    assert len(two) == 12 and two.items() <= here.items()
    for settings in ({"seed": 1}, {"shortcut": 1}):
        other = write_some(monkeypatch, tmp_path / str(settings), some, **settings)
        truth = pd.read_csv(other / "truth.csv")
        changed = truth[(truth.protocol == "dedicated") | ("seed" in settings)].patient_id
        assert len(changed) > 0
        for name, digest in digests(other).items():
            assert (digest != here.get(name)) == (Path(name).name.split(".")[0] in set(changed)), name


def test_an_existing_root_is_refused(phantom_root):
    with pytest.raises(FileExistsError, match="remove it"):
        phantom.write(phantom_root, max_per_cell=1)


def test_a_write_that_fails_leaves_nothing_behind(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(files, "save", fail)
    with pytest.raises(OSError, match="disk full"):
        phantom.write(tmp_path / "cohort", max_per_cell=1, progress=False)
    assert list(tmp_path.iterdir()) == []
