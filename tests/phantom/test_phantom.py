"""The phantom cohort: its counts, its truth and its files."""

import hashlib
import time
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import roc_auc_score

from ipmn_core import cli, phantom
from ipmn_core.names import CENTERS
from ipmn_core.phantom import cohort as phantom_cohort

TABLE1 = pd.read_csv(Path(phantom_cohort.__file__).parents[1] / "paper" / "table1.csv").set_index(
    ["center", "modality"]
)
CLASSES = ["no_risk", "low_risk", "high_risk"]


@pytest.fixture(scope="module")
def cohort():
    return phantom.patients(0)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return phantom.write(tmp_path_factory.mktemp("phantom") / "cohort", max_per_cell=1, progress=False)


def digests(root, pattern="*.nii.gz"):
    return {str(p.relative_to(root)): hashlib.sha256(p.read_bytes()).hexdigest() for p in root.rglob(pattern)}


def counts(labels, centers):
    """Counts (center x class) in the order of CENTERS."""
    return pd.crosstab(centers, labels).reindex(index=CENTERS, columns=range(3), fill_value=0).to_numpy()


@pytest.mark.parametrize("modality", ["t1", "t2"])
def test_labelled_counts_are_exactly_table_1(cohort, modality):
    table = TABLE1.xs(modality, level="modality").loc[list(CENTERS)]
    assert (counts(cohort[f"label_{modality}"], cohort.center) == table[CLASSES].to_numpy()).all()


def test_all_scans_of_the_data_set_are_there_and_the_spare_ones_have_no_label(cohort):
    assert (cohort.has_t1.sum(), cohort.has_t2.sum()) == (723, 738)
    assert (cohort.label_t1.count(), cohort.label_t2.count()) == (652, 655)
    blank = cohort[cohort.label_t1.isna() & cohort.label_t2.isna()]
    assert set(blank.center) == set(CENTERS)


def test_as_many_patients_as_can_be_have_both_scans_with_one_label(cohort):
    both = cohort[cohort.label_t1.notna() & cohort.label_t2.notna()]
    wide = TABLE1[CLASSES].stack().unstack("modality")
    assert len(both) == wide.min(axis=1).sum()
    assert (both.label_t1 == both.label_t2).all()


def test_names_are_unique_and_labels_are_not_sorted_in_the_sheet(cohort):
    assert cohort.patient_id.str.casefold().is_unique
    nyu = cohort[cohort.center == "NYU"].label_t1.dropna().to_numpy(int)
    assert (np.diff(nyu) != 0).mean() > 0.3  # sorted labels would change twice in 149 steps
    assert list(dict.fromkeys(cohort.center)) == list(CENTERS)


def test_patients_are_drawn_in_less_than_two_seconds():
    start = time.process_time()
    phantom.patients(7)
    assert time.process_time() - start < 2


def test_max_per_cell_keeps_a_part_of_the_same_cohort(cohort):
    small = phantom.patients(0, max_per_cell=2)
    assert set(small.patient_id) < set(cohort.patient_id)
    assert counts(small.label_t2, small.center).max() == 2
    assert small[small.label_t1.isna() & small.label_t2.isna()].groupby("center").size().max() == 1
    same = cohort.set_index("patient_id").loc[small.patient_id].reset_index()[small.columns]
    pd.testing.assert_frame_equal(same, small)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("modality", ["t1", "t2"])
def test_the_true_model_and_the_guideline_discriminate_as_published(seed, modality):
    known = phantom.patients(seed).dropna(subset=f"label_{modality}")
    label, probs = known[f"label_{modality}"].astype(int), known[["prob_0", "prob_1", "prob_2"]]
    assert 0.83 <= roc_auc_score(label == 2, known.prob_2) <= 0.87
    # 0.78-0.80 in the population; the cohort is stratified on it, which leaves a scatter of about 0.004
    assert 0.775 <= roc_auc_score(label == 2, known.guideline) <= 0.805
    assert 0.77 <= roc_auc_score(label, probs, multi_class="ovr") <= 0.83


def test_labels_follow_the_probabilities_of_the_model():
    drawn = phantom.population(np.random.default_rng(1), 50_000)
    probs = drawn[["prob_0", "prob_1", "prob_2"]].to_numpy()
    assert np.allclose(probs.sum(axis=1), 1)
    likely = drawn[drawn.prob_2 > 0.5]
    # binomial: five standard errors
    error = 5 * np.sqrt((likely.prob_2 * (1 - likely.prob_2)).sum()) / len(likely)
    assert abs((likely.label == 2).mean() - likely.prob_2.mean()) < error


def test_probabilities_are_proportional_odds(cohort):
    logit = lambda p: np.log(p / (1 - p))  # noqa: E731
    gap = logit(cohort.prob_0 + cohort.prob_1) - logit(cohort.prob_0)
    assert np.allclose(gap, phantom.THRESHOLDS[1] - phantom.THRESHOLDS[0])


def test_guideline_classes_at_the_published_sizes():
    sizes = [
        (0, 4.9, 0, 0),
        (29, 3, 4.9, 0),
        (0, 5, 0, 1),
        (30, 3, 0, 1),
        (0, 9.9, 0, 1),
        (0, 10, 0, 2),
        (20, 3, 5, 2),
    ]
    cases = pd.DataFrame(sizes, columns=["cyst_mm", "duct_mm", "nodule_mm", "expected"])
    assert phantom.guideline(cases).tolist() == cases.expected.tolist()


def test_without_the_shortcut_everybody_is_scanned_by_the_standard_protocol(cohort):
    assert set(cohort.protocol) == {"standard"}
    pd.testing.assert_frame_equal(phantom.patients(0, shortcut=0.0), cohort)


@pytest.mark.parametrize("q", [0.1, 0.8])
def test_within_every_center_the_protocol_earns_the_stated_auc(q):
    seeds = range(10)
    drawn = pd.concat(phantom.patients(seed, shortcut=q).assign(seed=seed) for seed in seeds)
    drawn["dedicated"] = drawn.protocol == "dedicated"
    for modality in ("t1", "t2"):
        known = drawn.dropna(subset=f"label_{modality}")
        known = known.assign(high_risk=(known[f"label_{modality}"] == 2).astype(bool))
        for center, frame in known.groupby("center"):
            found = [roc_auc_score(part.high_risk, part.dedicated) for _, part in frame.groupby("seed")]
            n_1, n_0 = frame.high_risk.sum() / len(seeds), (~frame.high_risk).sum() / len(seeds)
            # AUC = (1 + P(dedicated | high risk) - P(dedicated | other)) / 2, two binomial proportions of
            # variance (1 - q^2) / 4n: four standard errors of the mean over seeds
            error = np.sqrt((1 - q**2) / 4 * (1 / n_1 + 1 / n_0) / len(seeds)) / 2
            assert np.mean(found) == pytest.approx((1 + q) / 2, abs=4 * error), (center, modality)
    blank = drawn[drawn.label_t1.isna() & drawn.label_t2.isna()]  # drawn as if not of high risk
    error = 4 * np.sqrt((1 - q**2) / 4 / len(blank))
    assert blank.dedicated.mean() == pytest.approx((1 - q) / 2, abs=error)


def test_at_1_the_protocol_is_the_label():
    cohort = phantom.patients(3, shortcut=1)
    high_risk = cohort.label_t1.fillna(cohort.label_t2).eq(2).fillna(False).astype(bool)
    assert ((cohort.protocol == "dedicated") == high_risk).all()


def test_the_shortcut_changes_nothing_but_the_protocol(cohort):
    tied = phantom.patients(0, shortcut=0.8)
    pd.testing.assert_frame_equal(tied.drop(columns="protocol"), cohort.drop(columns="protocol"))
    small = phantom.patients(0, max_per_cell=2, shortcut=0.8)
    assert tied[tied.number.isin(small.number)].protocol.tolist() == small.protocol.tolist()


@pytest.mark.parametrize("q", [-0.1, 1.01, np.nan, np.inf])
def test_a_shortcut_outside_0_to_1_is_refused(q, tmp_path):
    with pytest.raises(ValueError, match=r"from 0 \(off\) to 1"):
        phantom.write(tmp_path / "cohort", shortcut=q)
    assert list(tmp_path.iterdir()) == []


def test_the_shortcut_shows_in_the_files_of_high_risk_patients_only(root, tmp_path, monkeypatch):
    whole = phantom.patients
    monkeypatch.setattr(phantom_cohort, "patients", lambda *settings: whole(*settings).iloc[::3])
    tied = phantom.write(tmp_path / "tied", max_per_cell=1, shortcut=1, progress=False)
    truth, here, there = pd.read_csv(tied / "truth.csv"), digests(root), digests(tied)
    dedicated = set(truth.patient_id[truth.protocol == "dedicated"])
    assert dedicated == set(truth.patient_id[truth.label_t1.fillna(truth.label_t2) == 2])
    assert 0 < len(dedicated) < len(truth) and there.keys() < here.keys()
    for name in there:
        changed = Path(name).name.removesuffix(".nii.gz") in dedicated
        assert (here[name] != there[name]) == changed, name
        thickness = [nib.load(folder / name).header.get_zooms()[2] for folder in (root, tied)]
        assert thickness[1] == pytest.approx(thickness[0] * (0.8 if changed else 1)), name
    sheets = [pd.read_excel(folder / "IPMN_labels_total.xlsx") for folder in (root, tied)]
    pd.testing.assert_frame_equal(sheets[0].iloc[::3].reset_index(drop=True), sheets[1], check_dtype=False)


def test_the_command_passes_the_shortcut_on(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(phantom, "write", lambda root, **settings: asked.append(settings) or root)
    assert cli.main(["phantom", str(tmp_path / "a"), "--shortcut", "0.8"]) == 0
    assert cli.main(["phantom", str(tmp_path / "b")]) == 0
    assert [settings["shortcut"] for settings in asked] == [0.8, 0]


def test_the_second_release_is_written_as_it_lies_on_disk(root):
    sheet = pd.read_excel(root / "IPMN_labels_total.xlsx")
    assert ["t1" in c.lower() for c in sheet.columns] == [True] + 6 * [False]
    assert ["t2" in c.lower() for c in sheet.columns] == [False, True] + 5 * [False]
    assert ["risk" in c.lower() for c in sheet.columns] == 6 * [False] + [True]
    for k, modality in enumerate(("t1", "t2")):
        for kind in ("images", "masks"):
            files = {p.name for p in (root / "IPMN_images_masks" / modality / kind).iterdir()}
            assert files == {f"{name}.nii.gz" for name in sheet.iloc[:, k].dropna()}
        named = sheet[sheet.iloc[:, k].notna()]
        expected = np.minimum(TABLE1.xs(modality, level="modality").loc[list(CENTERS), CLASSES], 1)
        assert (counts(named["Risk assessment"], named["Center"]) == expected.to_numpy()).all()


def test_truth_keeps_latents_and_probabilities(root):
    truth = pd.read_csv(root / "truth.csv")
    pd.testing.assert_frame_equal(truth, phantom.patients(0, 1), check_dtype=False)


def test_the_first_release_holds_the_masked_crop_with_the_right_affine(root, tmp_path, monkeypatch):
    cohort = phantom.patients(0, 1).head(2)
    monkeypatch.setattr(phantom_cohort, "patients", lambda *_: cohort)
    first = phantom.write(tmp_path / "first", layout="first", max_per_cell=1, progress=False)
    for modality in ("t1", "t2"):
        sheet = pd.read_excel(first / f"IPMN_labels_{modality}_total.xlsx")
        assert (sheet.columns[0], sheet.columns[5]) == ("Patient ID", "Risk assessment")
        for name in sheet["Patient ID"]:
            roi = nib.load(first / f"{modality}_clean_ROI" / f"{name}.nii.gz")
            folder = root / "IPMN_images_masks" / modality
            image, mask = (nib.load(folder / kind / f"{name}.nii.gz") for kind in ("images", "masks"))
            masked = np.asarray(image.dataobj) * np.asarray(mask.dataobj)
            start = np.linalg.solve(image.affine, roi.affine[:, 3])[:3].round().astype(int)
            box = tuple(slice(a, a + n) for a, n in zip(start, roi.shape, strict=True))
            assert np.array_equal(np.asarray(roi.dataobj), masked[box])
            assert np.count_nonzero(masked[box]) == np.count_nonzero(masked)
            for axis in range(3):  # tight: each face of the box touches the mask
                faces = np.asarray(mask.dataobj)[box].take([0, -1], axis=axis)
                assert faces.any(axis=tuple({0, 1, 2} - {axis})).all()


def test_files_depend_on_the_seed_and_not_on_the_number_of_processes(root, tmp_path, monkeypatch):
    cohort = phantom.patients(0, 1).iloc[[0, 9, 20]]  # among them int16 and float32 centers
    monkeypatch.setattr(phantom_cohort, "patients", lambda *_: cohort)
    two = phantom.write(tmp_path / "two", max_per_cell=1, jobs=2, progress=False)
    other = phantom.write(tmp_path / "other", max_per_cell=1, seed=1, progress=False)
    here, there, elsewhere = digests(root), digests(two), digests(other)
    assert len(there) == 12
    assert there.items() <= here.items()
    assert all(there[name] != elsewhere[name] for name in there)


def test_an_existing_root_and_an_unknown_layout_are_refused(root, tmp_path):
    with pytest.raises(FileExistsError, match="remove it"):
        phantom.write(root, max_per_cell=1)
    with pytest.raises(ValueError, match="choose 'first'"):
        phantom.write(tmp_path / "third", layout="third")


def test_a_write_that_fails_leaves_nothing_behind(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(phantom_cohort, "save", fail)
    with pytest.raises(OSError, match="disk full"):
        phantom.write(tmp_path / "cohort", max_per_cell=1, progress=False)
    assert list(tmp_path.iterdir()) == []
