import warnings
from dataclasses import replace

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
from sklearn.ensemble import RandomForestClassifier
from small_profile import profile

from ipmn_core import metrics, runs
from ipmn_core.data import Cohort, assign_folds
from ipmn_core.metrics import centers
from ipmn_core.names import CENTERS
from ipmn_core.runs import StaleRunError, probes


@pytest.fixture(autouse=True)
def no_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def scans_of(center, label=0, image=""):
    frame = pd.DataFrame({"center": center, "label": label, "image": image, "modality": "t1"})
    return frame.assign(case_id=[f"case_{i}" for i in range(len(frame))])


def write_image(path, zooms=(1.0, 1.0, 1.0), shape=(2, 3, 4)):
    """A tiny NIfTI file whose header holds `zooms` as they are, valid or not."""
    header = nib.Nifti1Header()
    header.set_data_dtype(np.uint8)
    header.set_data_shape(shape)
    header["pixdim"][1:4] = zooms
    header["vox_offset"] = 352
    path.write_bytes(header.binaryblock + bytes(4) + bytes(int(np.prod(shape))))
    return str(path)


def out_of_fold(name, scans, x, n_folds=4, seed=0):
    """Predictions of a probe over folds that take turns; labels are the binary task's."""
    y, fold = scans["label"].to_numpy(), np.arange(len(scans)) % n_folds
    frame = scans.assign(task="binary", arm=name, fold=fold, seed=seed, epoch=1, y_true=y)
    for k in range(n_folds):
        prob = probes.predict(name, x, y, fold != k, fold == k, seed)
        frame.loc[fold == k, ["prob_0", "prob_1"]] = prob
    return frame


def test_center_features_are_one_column_a_center_in_their_order():
    x = probes.features("center_only", scans_of(["MCF", "EMC", "MCF"]), np.zeros((3, 2, 2, 2)))
    assert x.dtype == np.float64
    assert x.tolist() == [[0, 1, 0, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0, 1], [0, 1, 0, 0, 0, 0, 0]]


def test_header_features_are_spacing_and_matrix_as_written(tmp_path):
    data = np.zeros((5, 6, 7), np.int16)
    nib.save(nib.Nifti1Image(data, np.diag([0.75, 1.5, 7.25, 1])), tmp_path / "a.nii.gz")
    nib.save(nib.Nifti1Image(data[:2], np.diag([-2, 1.5, 3, 1])), tmp_path / "b.nii")  # left-handed
    files = [str(tmp_path / "a.nii.gz"), str(tmp_path / "b.nii")]
    x = probes.features("header_only", scans_of("NYU", image=files), np.zeros((2, 2, 2, 2)))
    assert x.dtype == np.float64
    assert x.tolist() == [[0.75, 1.5, 7.25, 5, 6, 7], [2, 1.5, 3, 2, 6, 7]]


def test_odd_headers_are_used_as_far_as_they_go(tmp_path):
    zooms = [(0, 0, 0), (np.nan, 1, 5), (np.inf, -2, 1e-30), (1, 1, 1e30), (1, 1, 5)]
    shapes = [(2, 3, 4), (2, 3, 4), (2, 3, 4), (2, 3, 4, 1), (2, 3)]
    files = [
        write_image(tmp_path / f"{i}.nii", *row) for i, row in enumerate(zip(zooms, shapes, strict=True))
    ]
    x = probes.features("header_only", scans_of("NYU", image=files), np.zeros((5, 2, 2, 2)))
    np.testing.assert_array_equal(x[:3, :3], [[1, 1, 1], [np.nan, 1, 5], [np.nan, 2, np.float32(1e-30)]])
    assert x.shape == (5, 6)
    x, y = np.tile(x, (8, 1)), np.arange(40) % 2
    prob = probes.predict("header_only", x, y, np.arange(30), np.arange(30, 40), 0)
    assert np.isfinite(prob).all()
    x[:30, 0] = 1.0  # and where only test cases lack a spacing
    assert np.isfinite(probes.predict("header_only", x, y, np.arange(30), np.arange(30, 40), 0)).all()


def test_histograms_equal_numpys_over_the_non_zero_voxels():
    rng = np.random.default_rng(0)
    cubes = (rng.random((4, 6, 6, 6)) * (rng.random((4, 6, 6, 6)) < 0.4)).astype(np.float16)
    cubes[0, 0, 0, :3] = [1, 1 / 32, 0.5]  # the last bin is closed, the others hold their lower edge
    x = probes.features("histogram_only", scans_of(["NYU"] * 4), cubes)
    assert (x.shape, x.dtype) == ((4, 32), np.float64)
    for row, cube in zip(x, cubes, strict=True):
        counts, _ = np.histogram(cube[cube != 0].astype(float), bins=32, range=(0, 1))
        np.testing.assert_allclose(row, counts / counts.sum(), atol=1e-15)  # one division
    assert probes.features("histogram_only", scans_of(["NYU"]), np.zeros((1, 2, 2, 2), np.float16)).sum() == 0


def test_center_only_gives_each_center_its_prevalence_in_training():
    rng = np.random.default_rng(1)
    scans = scans_of(rng.choice(CENTERS, 400))
    y = rng.random(400) * 2.9 * np.array([*np.linspace(0.4, 1, 6), 0.3])[scans["center"].map(CENTERS.index)]
    y = y.astype(int)  # nobody at EMC is of class 1 or 2: a probability that a logistic model only approaches
    x = probes.features("center_only", scans, np.zeros((400, 1, 1, 1)))
    train = np.arange(400) < 300
    prob = probes.predict("center_only", x, y, train, ~train, 0)
    for center in CENTERS:
        here = (scans["center"] == center).to_numpy()
        prevalence = np.bincount(y[here & train], minlength=3) / (here & train).sum()
        ours = prob[here[~train]]
        assert (ours == ours[0]).all()
        np.testing.assert_allclose(ours[0], prevalence, atol=1e-4)  # weak regularization, solver's tolerance


def decomposed(name, scans, x):
    return centers.decompose(out_of_fold(name, scans, x)).iloc[0]


def test_center_only_orders_centers_but_no_pair_of_one_center():
    rng = np.random.default_rng(2)
    scans = scans_of(rng.choice(CENTERS, 400))
    prevalence = np.linspace(0.1, 0.7, 7)[scans["center"].map(CENTERS.index)]
    scans["label"] = (rng.random(400) < prevalence).astype(int)
    row = decomposed("center_only", scans, probes.features("center_only", scans, np.zeros((400, 1, 1, 1))))
    assert row["within"] == 0.5
    assert row["between"] > row["pooled"] > 0.6


@pytest.mark.parametrize(("protocols", "within"), [("tied", 0.8), ("random", 0.5), ("one", 0.5)])
def test_header_only_finds_a_protocol_inside_each_center_if_it_goes_with_the_label(protocols, within):
    rng = np.random.default_rng(0)
    n = 480
    at = rng.integers(0, 7, n)
    label = (rng.random(n) < np.linspace(0.2, 0.6, 7)[at]).astype(int)
    tied = np.where(label == 1, 0.8, 0.2)  # the share of thick slices: sensitivity = specificity = 0.8
    thick = rng.random(n) < {"tied": tied, "random": 0.5, "one": 0.0}[protocols]
    x = np.zeros((n, 6))
    x[:, 2] = 9 - at + 0.5 * thick  # thicker slices belong to centers with fewer positives
    if protocols != "one":
        x[:, :2] = rng.uniform(0.7, 1.7, (n, 1))
        x[:, 5] = 2 + np.arange(n) % 3
    row = decomposed("header_only", scans_of(np.array(CENTERS)[at], label), x)
    # about 2000 pairs within: standard error 0.03; the forest also splits on noise
    assert row["within"] == pytest.approx(within, abs=0.0 if protocols == "one" else 0.1)
    assert row["between"] > 0.55  # the headers tell the centers


def test_histogram_only_finds_brightness_that_goes_with_the_label():
    rng = np.random.default_rng(3)
    scans = scans_of(rng.choice(CENTERS, 200), rng.integers(0, 2, 200))
    level = 0.4 + 0.1 * scans["label"].to_numpy()[:, None, None, None]
    cubes = np.clip(level + 0.1 * rng.standard_normal((200, 6, 6, 6)), 0, 1).astype(np.float16)
    assert (
        decomposed("histogram_only", scans, probes.features("histogram_only", scans, cubes))["within"] > 0.95
    )


@pytest.mark.parametrize("name", probes.PROBES)
def test_a_class_absent_from_training_has_probability_zero(name):
    rng = np.random.default_rng(0)
    x, y = rng.integers(0, 2, (60, 7)).astype(float), np.arange(60) % 3
    train = np.flatnonzero((y != 1) & (np.arange(60) < 50))
    prob = probes.predict(name, x, y, train, np.arange(50, 60), 0)
    assert prob.shape == (10, 3)
    assert (prob[:, 1] == 0).all()
    assert (prob[:, [0, 2]] > 0).any(axis=0).all()
    np.testing.assert_allclose(prob.sum(axis=1), 1, atol=1e-12)  # float64 sums


@pytest.mark.parametrize("name", probes.PROBES)
def test_the_seed_decides_and_masks_equal_indices(name):
    rng = np.random.default_rng(0)
    x, y, test = rng.random((80, 7)), rng.integers(0, 2, 80), np.arange(80) % 4 == 0
    first = probes.predict(name, x, y, ~test, test, 5)
    again = probes.predict(name, x, y, np.flatnonzero(~test), np.flatnonzero(test), 5)
    np.testing.assert_array_equal(first, again)
    if name != "center_only":  # a logistic model draws nothing
        assert (first != probes.predict(name, x, y, ~test, test, 6)).any()


def test_wrong_calls_are_refused_with_the_remedy():
    scans, cubes, x = scans_of(["NYU", "IU"]), np.zeros((2, 2, 2, 2)), np.zeros((2, 7))
    known = "center_only, header_only, histogram_only"
    with pytest.raises(ValueError, match=f"'age_only': choose one of {known}"):
        probes.features("age_only", scans, cubes)
    with pytest.raises(ValueError, match=f"'age_only': choose one of {known}"):
        probes.predict("age_only", x, np.array([0, 1]), [0], [1], 0)
    with pytest.raises(ValueError, match="3 cubes for 2 scans"):
        probes.features("histogram_only", scans, np.zeros((3, 2, 2, 2)))
    with pytest.raises(ValueError, match="several modalities"):
        probes.features("center_only", scans.assign(modality=["t1", "t2"]), cubes)


@pytest.fixture
def given(tmp_path):
    """A profile, and a cohort of 48 scans of two centers and modalities with a header each."""
    cells = [(c, m, k) for m in ("t1", "t2") for c in ("NYU", "AHN") for k in range(12)]
    rows = [(f"{c}{k}", f"{c}{k}", c, m, k % 3) for c, m, k in cells]
    scans = pd.DataFrame(rows, columns=["case_id", "patient_id", "center", "modality", "label"])
    scans["image"] = [write_image(tmp_path / f"{i}.nii", (1, 1, 3 + i % 5)) for i in range(len(scans))]
    cubes = np.random.default_rng(0).random((len(scans), 8, 8, 8)).astype(np.float16)
    p = profile(tmp_path, modalities=["t1", "t2"], inner_validation=0.2)
    return p, Cohort(scans, cubes, "data-1")


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
    test = (assign_folds(mine.scans, 2, binary=True) == 1).to_numpy()
    forest = RandomForestClassifier(200, min_samples_leaf=5, max_features=None, random_state=0)
    for name in ("header_only", "histogram_only"):
        x = probes.features(name, mine.scans, mine.cubes)
        expected = forest.fit(x[~test], y[~test]).predict_proba(x[test])
        rows = fitted[(fitted["arm"] == name) & (fitted["modality"] == "t1") & (fitted["fold"] == 1)]
        assert (rows["case_id"] == mine.scans.loc[test, "case_id"].to_numpy()).all()
        assert (rows[["prob_0", "prob_1"]].to_numpy() == expected).all()
        splits = pd.read_csv(p.folder / "runs" / "binary" / "t1" / name / "fold1" / "splits.csv")
        assert splits["role"].value_counts().to_dict() == {"train": sum(~test), "test": sum(test)}


def test_a_cohort_without_high_risk_still_has_three_classes(given):
    p, cohort = given
    scans = cohort.scans.assign(label=cohort.scans["label"] % 2)
    assert (probes.fit(p, "three_class", replace(cohort, scans=scans))["prob_2"] == 0).all()
