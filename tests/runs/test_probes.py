from dataclasses import replace

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
from sklearn.ensemble import RandomForestClassifier
from small_profile import profile, small_cohort

from ipmn_core import metrics, runs
from ipmn_core.data import assign_folds
from ipmn_core.names import CENTERS
from ipmn_core.runs import StaleRunError, probes

pytestmark = pytest.mark.filterwarnings("error")


def scans_of(center, label=0, image=""):
    frame = pd.DataFrame({"center": center, "label": label, "image": image, "modality": "t1"})
    return frame.assign(case_id=[f"case_{i}" for i in range(len(frame))])


def features(name, scans, cubes=None):
    return probes.PROBES[name](scans, cubes)


def write_image(path, zooms=(1.0, 1.0, 1.0), shape=(2, 3, 4)):
    """A tiny NIfTI file whose header holds `zooms` as they are, valid or not."""
    header = nib.Nifti1Header()
    header.set_data_dtype(np.uint8)
    header.set_data_shape(shape)
    header["pixdim"][1:4] = zooms
    header["vox_offset"] = 352
    path.write_bytes(header.binaryblock + bytes(4) + bytes(int(np.prod(shape))))
    return str(path)


def test_header_features_are_spacing_and_matrix_as_written_as_far_as_they_are_finite(tmp_path):
    zooms = [(0.75, 1.5, 7.25), (0, 0, 0), (np.nan, 1, 5), (np.inf, -2, 1e-30), (1, 1, 5)]
    shapes = [(5, 6, 7), (2, 3, 4), (2, 3, 4), (2, 3, 4, 1), (2, 3)]
    rows = zip(zooms, shapes, strict=True)
    files = [write_image(tmp_path / f"{i}.nii", *row) for i, row in enumerate(rows)]
    x = features("header_only", scans_of("NYU", image=files))
    assert x.shape == (5, 9) and x[0].tolist() == [0.75, 1.5, 7.25, 5, 6, 7, -1, 2, 3]  # NIfTI's default: LAS
    np.testing.assert_array_equal(x[1:4, :3], [[1, 1, 1], [np.nan, 1, 5], [np.nan, 2, np.float32(1e-30)]])
    x, y, test = np.tile(x, (8, 1)), np.arange(40) % 2, np.arange(40) >= 30
    x[:30, 0] = 1.0  # where only test cases lack a spacing
    assert np.isfinite(probes.predict("header_only", x, y, test, 2, 0)).all()


def test_header_features_hold_the_stored_axes(tmp_path):
    affine = np.array([[0, 0, -1, 0], [1, 0, 0, 0], [0, -1, 0, 0], [0, 0, 0, 1]])
    nib.save(nib.Nifti1Image(np.zeros((2, 3, 4), np.uint8), affine), tmp_path / "a.nii.gz")
    assert "".join(nib.aff2axcodes(affine)) == "AIL"
    x = features("header_only", scans_of(["NYU"], image=str(tmp_path / "a.nii.gz")))
    assert x[0, 6:].tolist() == [2, -3, -1]


def test_histograms_are_shares_of_the_non_zero_voxels():
    cubes = np.zeros((2, 2, 2, 2), np.float16)  # the second is empty
    cubes[0, 0, 0, 0], cubes[0, 0, 1], cubes[0, 1, 1, 1] = 1, (1 / 32, 0.999 / 32), 0.5
    x = features("histogram_only", scans_of(["NYU"] * 2), cubes)
    expected = np.zeros((2, 32))
    expected[0, [0, 1, 16, 31]] = 0.25  # the last bin is closed, the others hold their lower edge
    np.testing.assert_array_equal(x, expected)
    cubes = cubes * 8 - (cubes != 0) * 3  # -3 to 5, zero outside
    x = features("histogram_only", scans_of(["NYU"] * 2), cubes)
    assert x[0].sum() == 1 and x[0, 0] > 0 and x[0, 31] > 0 and not x[1].any()


def test_center_only_gives_each_center_its_prevalence_in_training():
    rng = np.random.default_rng(1)
    scans = scans_of(rng.choice(CENTERS, 400))
    y = rng.random(400) * 2.9 * np.array([*np.linspace(0.4, 1, 6), 0.3])[scans["center"].map(CENTERS.index)]
    y = y.astype(int)  # EMC has no case of class 1 or 2: a probability that a logistic model only approaches
    test = np.arange(400) >= 300
    prob = probes.predict("center_only", features("center_only", scans), y, test, 3, 0)
    for center in CENTERS:
        here = (scans["center"] == center).to_numpy()
        prevalence = np.bincount(y[here & ~test], minlength=3) / (here & ~test).sum()
        ours = prob[here[test]]
        assert (ours == ours[0]).all()
        np.testing.assert_allclose(ours[0], prevalence, atol=1e-4)  # weak regularization, solver's tolerance


@pytest.mark.parametrize("name", probes.PROBES)
def test_a_class_absent_from_training_has_probability_zero(name):
    rng = np.random.default_rng(0)
    x, y, test = rng.integers(0, 2, (60, 7)).astype(float), np.arange(60) % 3, np.arange(60) >= 50
    x, y, test = x[(y != 1) | test], y[(y != 1) | test], test[(y != 1) | test]
    prob = probes.predict(name, x, y, test, 3, 0)
    assert prob.shape == (10, 3) and (prob[:, 1] == 0).all()
    np.testing.assert_allclose(prob.sum(axis=1), 1, atol=1e-12)  # float64 sums


@pytest.fixture
def given(tmp_path):
    """A profile, and a cohort of 48 scans with a header each."""
    cohort = small_cohort()
    images = [write_image(tmp_path / f"{i}.nii", (1, 1, 3 + i % 5)) for i in range(len(cohort))]
    p = profile(tmp_path, modalities=["t1", "t2"], inner_validation=0.2)
    return p, replace(cohort, scans=cohort.scans.assign(image=images))


def test_probes_leave_runs_in_the_contract_that_are_not_repeated(given):
    p, cohort = given
    for task in runs.TASKS:
        fitted = probes.fit(p, task, cohort)
        metrics.check(fitted)
        assert set(fitted["arm"]) == set(probes.PROBES) and set(fitted["epoch"]) == {1}
        assert fitted.groupby(["arm", "modality"]).size().eq(24).all()  # each case once
        before = {path: path.stat().st_mtime_ns for path in p.folder.rglob("*")}
        pd.testing.assert_frame_equal(probes.fit(p, task, cohort), fitted)
        assert {path: path.stat().st_mtime_ns for path in p.folder.rglob("*")} == before
    with pytest.raises(StaleRunError, match="data: 'data-1' on disk, 'data-2' now"):
        probes.fit(p, "binary", replace(cohort, key="data-2"))
    with pytest.raises(StaleRunError, match="seed: 0 on disk, 1 now"):
        probes.predictions(p.model_copy(update={"seed": 1}), "binary")


def test_a_probe_trains_on_all_that_it_does_not_test_and_is_scikit_learns(given):
    p, cohort = given
    fitted, mine = probes.fit(p, "binary", cohort), cohort.of("t1")
    y = (mine.scans["label"] == 2).to_numpy()
    test = (assign_folds(mine, 2, "center", "binary") == 1).to_numpy()
    forest = RandomForestClassifier(200, min_samples_leaf=5, max_features=None, random_state=0)
    for name in ("header_only", "histogram_only"):
        x = features(name, mine.scans, mine.cubes)
        expected = forest.fit(x[~test], y[~test]).predict_proba(x[test])
        rows = fitted[(fitted["arm"] == name) & (fitted["modality"] == "t1") & (fitted["fold"] == 1)]
        assert (rows["case_id"] == mine.scans.loc[test, "case_id"].to_numpy()).all()
        assert (rows[["prob_0", "prob_1"]].to_numpy() == expected).all()
        splits = pd.read_csv(p.folder / "runs" / "binary" / "t1" / name / "fold1" / "splits.csv")
        assert splits["role"].value_counts().to_dict() == {"train": sum(~test), "test": sum(test)}
