"""The phantom's files: all layouts, determinism, complete or absent."""

import hashlib
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import psutil
import pytest

from ipmn_core import data, phantom
from ipmn_core.params import Params
from ipmn_core.phantom import files


def digests(root):
    paths = root.rglob("*.nii.gz")
    return {str(p.relative_to(root)): hashlib.sha256(p.read_bytes()).hexdigest() for p in paths}


def write_some(monkeypatch, root, rows, **settings):
    """Write only those rows of the cohort."""
    for name in ("patients", "patients_of"):
        all_of = getattr(phantom, name)
        monkeypatch.setattr(files, name, lambda *given, all_of=all_of: all_of(*given).iloc[rows].copy())
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


def test_todays_release_holds_scaled_rois_splits_and_the_seconds_volumes(phantom_root, tmp_path, monkeypatch):
    third = write_some(monkeypatch, tmp_path / "third", slice(8), layout="third")
    volumes = {name: d for name, d in digests(third).items() if name.startswith("IPMN_images_masks")}
    assert len(volumes) == 32 and volumes.items() <= digests(phantom_root).items()
    name = pd.read_csv(third / "truth.csv").patient_id[1]
    roi = nib.load(third / "IPMN_Classification" / "t2" / f"{name}.nii.gz")
    mask = nib.load(third / "IPMN_images_masks" / "t2" / "masks" / f"{name}.nii.gz")
    assert roi.header.get_zooms() == pytest.approx((1, 1, 1))
    voxels, ml = np.asarray(roi.dataobj), np.asarray(mask.dataobj).sum() * np.prod(mask.header.get_zooms())
    inside = voxels[voxels != 0]
    assert len(inside) == pytest.approx(ml, rel=0.05) and voxels[0, 0, 0] == 0  # 1 mm: a voxel is 1 cubic mm
    assert (inside.mean(), inside.std()) == pytest.approx((0, 1), abs=1e-3)
    cohort = data.read(third)
    assert len(cohort) == 12 and set(cohort.scans["fold_multiclass"]) == set("01234")
    per_center = cohort.of("t1").scans.groupby("center")["fold_binary"]
    assert per_center.apply(sorted).to_dict() == {"NYU": ["0", "1", "2"], "MCF": ["0", "1", "2"]}
    histology = data.inspect(third, Params(cohort="histology"))[0]
    assert 0 < len(histology) < len(cohort) and (histology.scans["label"] == 2).sum() == 4


def test_a_manifest_has_invented_centers_and_classes_and_joins_its_truth(tmp_path, monkeypatch):
    root = write_some(monkeypatch, tmp_path / "own", slice(8), layout="manifest", centers=[" 7 ", "St. Ü"])
    cohort, truth = data.read(root / "scans.csv"), data.read_truth(Params(data=str(root / "scans.csv")))
    assert cohort.centers == ("7", "St. Ü") and cohort.classes == phantom.CLASSES and not cohort.is_paper
    assert len(cohort) == 12 and cohort.scans.attrs["unlabelled"] == {"t1": 2, "t2": 2}
    assert (cohort.scans["case_id"] == cohort.scans["patient_id"]).all()
    of = truth.set_index("patient_id").loc[cohort.scans["case_id"]]
    assert (of["label_t2"].to_numpy() == cohort.scans["label"]).all()
    assert set(of["scanner"]) == {"NYU", "MCF"} and (of["center"].to_numpy() == cohort.scans["center"]).all()
    image, mask = phantom.volumes(of.iloc[-1], 0, "t2")
    for kind, drawn in (("image", image), ("mask", mask)):
        stored = nib.load(cohort.scans[kind].iloc[-1])
        assert np.array_equal(np.asarray(stored.dataobj), np.asarray(drawn.dataobj))
    with pytest.raises(ValueError, match="layout second has the paper's centers"):
        phantom.write(tmp_path / "new", centers=["7"])


def test_other_axes_leave_every_voxel_in_its_place(phantom_root, tmp_path, monkeypatch):
    turned = write_some(monkeypatch, tmp_path / "turned", [0, 3, 6, 9, 12, 15, 18], axes=True)
    truth = pd.read_csv(turned / "truth.csv")
    assert truth["stored_axes"].nunique() == truth["center"].nunique() >= 5
    for row in truth.itertuples():
        for kind in ("images", "masks"):
            name = Path("IPMN_images_masks", "t1", kind, f"{row.patient_id}.nii.gz")
            stored, plain = nib.load(turned / name), nib.load(phantom_root / name)
            assert "".join(nib.aff2axcodes(stored.affine)) == row.stored_axes
            back = nib.as_closest_canonical(stored)
            assert np.array_equal(np.asarray(back.dataobj), np.asarray(plain.dataobj))
            assert np.allclose(back.affine, plain.affine) and stored.header["qform_code"] == 1
    lesion = phantom.lesion(row, 0, "t1")
    assert lesion.shape == stored.shape and np.allclose(lesion.affine, stored.affine)


def test_files_depend_on_seed_and_shortcut_and_not_on_the_processes(phantom_root, tmp_path, monkeypatch):
    some, here = [0, 9, 20], digests(phantom_root)  # among them int16 and float32 centers
    two = digests(write_some(monkeypatch, tmp_path / "two", some, jobs=2))
    assert len(two) == 12 and two.items() <= here.items()
    # until idle processes end, after five minutes, the one that started them does not end either
    assert not any("popen_loky" in " ".join(each.cmdline()) for each in psutil.Process().children())
    monkeypatch.chdir(tmp_path)
    for settings in ({"seed": 1}, {"shortcut": 1}, {"shift": 0.25}):
        other = write_some(monkeypatch, Path(str(settings)), some, jobs=2, **settings)
        truth = pd.read_csv(other / "truth.csv")
        kept = truth.center == "NYU" if "shift" in settings else False  # whose scanner is the common one
        changed = truth[
            ((truth.protocol == "dedicated") | ("shortcut" not in settings)) & ~np.array(kept)
        ].patient_id
        assert len(changed) > 0
        for name, digest in digests(other).items():
            assert (digest != here.get(name)) == (Path(name).name.split(".")[0] in set(changed)), name


def test_an_existing_root_is_refused_and_a_failed_write_leaves_nothing(phantom_root, tmp_path, monkeypatch):
    with pytest.raises(FileExistsError, match="remove it"):
        phantom.write(phantom_root, max_per_cell=1)

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(files, "save", fail)
    with pytest.raises(OSError, match="disk full"):
        phantom.write(tmp_path / "cohort", max_per_cell=1, progress=False)
    assert list(tmp_path.iterdir()) == []
