"""The table of scans: table 1, subsets, a profile's cohort."""

import types

import numpy as np
import pandas as pd
import pytest
from tiny import COUNTS, PAPER_TABLE1, first_release, paper_scans, scans_of, second_release

import ipmn_core
from ipmn_core import data
from ipmn_core.params import Preprocessing


def test_problems_come_errors_first_then_warnings_then_notes(tmp_path):
    first_release(tmp_path, t1=[("nyu_1", 1), ("nyu_2", 7), ("nyu_3", None)])
    severities = data.inspect(tmp_path)[1]["severity"].tolist()
    assert severities == sorted(severities, key=["error", "warning", "note"].index)
    assert set(severities) == {"error", "warning", "note"}


def test_table_1_of_the_papers_counts_is_the_papers():
    shuffled = paper_scans().sample(frac=1, random_state=0)
    pd.testing.assert_frame_equal(data.table1(shuffled), PAPER_TABLE1.drop(columns="name"), check_names=False)


def test_table_1_has_no_row_for_what_does_not_occur():
    table = data.table1(scans_of([("EMC", "t2", 0, 3, 0), ("NYU", "t1", 1, 0, 0)]))
    assert table.to_numpy().tolist() == [["NYU", "t1", 1, 0, 0, 1], ["EMC", "t2", 0, 3, 0, 3]]


def test_a_subset_has_the_first_scans_of_every_cell():
    scans = paper_scans()
    few = data.subset(scans, 3)
    expected = COUNTS[["no_risk", "low_risk", "high_risk"]].clip(upper=3)
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


def profile(root, **changes):
    settings = {"data": str(root), "cohort_root": root, "modalities": ("t1", "t2")}
    settings |= {"phantom_seed": 3, "phantom_max_per_cell": 7, "phantom_shortcut": 0.5}
    settings |= {"jobs": 2, "max_per_cell": 2, "preprocessing": Preprocessing(32)}
    return types.SimpleNamespace(**settings | {"folder": root / "profile"} | changes)


def test_a_profile_opens_a_folder_with_its_modalities(tmp_path):
    second_release(tmp_path, [(f"nyu_{i}", f"nyu_{i}", 1) for i in range(3)] + [("nyu_9", None, None)])
    scans = data.open_cohort(profile(tmp_path, modalities=("t2",)))
    assert scans["case_id"].tolist() == ["nyu_0", "nyu_1", "nyu_2"] and scans.index.tolist() == [0, 1, 2]
    assert set(scans["modality"]) == {"t2"}
    assert scans.attrs["unlabelled"] == {"t1": 1, "t2": 0}


def test_a_cohort_keeps_scans_and_cubes_together_and_its_key_follows_files_and_rows(phantom_root, tmp_path):
    p = profile(phantom_root, folder=tmp_path / "profile", max_per_cell=1)
    cohort = data.load_cohort(p)
    assert len(cohort) == len(cohort.scans) == len(cohort.cubes) > 0
    t2 = cohort.of("t2").where(cohort.of("t2").scans["label"] == 2)
    assert set(t2.scans["modality"]) == {"t2"} and t2.key == cohort.key
    assert t2.scans.index.tolist() == list(range(len(t2)))
    for scan, cube in zip(t2.scans.itertuples(), t2.cubes, strict=True):
        roi = data.load_roi(scan.image, scan.mask)
        assert np.array_equal(cube, data.to_cube(np.asanyarray(roi.dataobj), 32))
    assert data.load_cohort(p).key == cohort.key
    only = types.SimpleNamespace(**vars(p) | {"modalities": ("t1",)})
    assert data.load_cohort(only).key != cohort.key


def test_the_phantom_is_written_once_where_the_profile_says(tmp_path, monkeypatch):
    written = []

    def write(root, seed, max_per_cell, shortcut, jobs):
        written.append((root, seed, max_per_cell, shortcut, jobs))
        second_release(root, [("nyu_1", "nyu_1", 1)])

    monkeypatch.setattr(ipmn_core, "phantom", types.SimpleNamespace(write=write), raising=False)
    p = profile(tmp_path / "phantom", data="phantom")
    assert len(data.open_cohort(p)) == len(data.open_cohort(p)) == 2
    assert written == [(tmp_path / "phantom", 3, 7, 0.5, 2)]
    assert data.read_truth(p).empty


def test_a_missing_folder_and_a_profile_without_a_scan_left_say_what_to_do(tmp_path):
    with pytest.raises(data.CohortError, match=rf"{tmp_path / 'nowhere'}.*osf.io/74vfs.*phantom"):
        data.open_cohort(profile(tmp_path / "nowhere"))
    second_release(tmp_path, [("nyu_1", None, 1)])
    with pytest.raises(data.CohortError, match="no labelled t2 scan"):
        data.open_cohort(profile(tmp_path, modalities=("t2",)))
