"""The table of scans: table 1, subsets, a profile's cohort."""

import types

import numpy as np
import pandas as pd
import pytest
from made_up import paper_cohort
from tiny import COUNTS, PAPER_TABLE1, first_release, paper_scans, scans_of, second_release

import ipmn_core
from ipmn_core import data
from ipmn_core.params import Params


def test_problems_come_errors_first_then_warnings_then_notes(tmp_path):
    first_release(tmp_path, t1=[("nyu_1", 1), ("nyu_2", 7), ("nyu_3", None)])
    severities = data.inspect(tmp_path)[1]["severity"].tolist()
    assert severities == sorted(severities, key=["error", "warning", "note"].index)
    assert set(severities) == {"error", "warning", "note"}


def test_table_1_of_the_papers_counts_is_the_papers_and_has_no_row_for_what_does_not_occur():
    table = data.table1(paper_cohort(paper_scans()))
    pd.testing.assert_frame_equal(table, PAPER_TABLE1.drop(columns="name"), check_names=False)
    table = data.table1(paper_cohort(scans_of([("EMC", "t2", 0, 3, 0), ("NYU", "t1", 1, 0, 0)])))
    assert table.to_numpy().tolist() == [["NYU", "t1", 1, 0, 0, 1], ["EMC", "t2", 0, 3, 0, 3]]


def test_a_subset_has_the_first_scans_of_every_cell():
    scans = paper_scans()
    few = data.subset(paper_cohort(scans), 3)
    expected = COUNTS[["no_risk", "low_risk", "high_risk"]].clip(upper=3)
    assert (data.table1(few)[list(expected)].to_numpy() == expected.to_numpy()).all()
    nyu = "center == 'NYU' and modality == 't2' and label == 2"
    assert few.scans.query(nyu)["case_id"].tolist() == scans.query(nyu)["case_id"].head(3).tolist()
    pd.testing.assert_frame_equal(data.subset(paper_cohort(scans), None).scans, paper_cohort(scans).scans)


def test_a_subset_keeps_the_attributes_and_takes_both_scans_of_a_patient():
    t1, t2 = scans_of([("NYU", "t1", 5, 5, 5)], True), scans_of([("NYU", "t2", 5, 5, 5)], True)
    scans = pd.concat([t1, t2], ignore_index=True)
    scans.attrs["unlabelled"] = {"t1": 1, "t2": 2}
    few = data.subset(paper_cohort(scans), 2).scans
    assert few.attrs == scans.attrs
    assert few.groupby("patient_id").size().eq(2).all()


def profile(root, **changes):
    settings = {"data": str(root), "outputs": str(root / "out"), "size": 32, "jobs": 2, "max_per_cell": 2}
    return Params(**settings | changes)


def test_a_profile_opens_a_folder_with_its_modalities(tmp_path):
    second_release(tmp_path, [(f"nyu_{i}", f"nyu_{i}", 1) for i in range(3)] + [("nyu_9", None, None)])
    scans = data.open_cohort(profile(tmp_path, modalities=("t2",))).scans
    assert scans["case_id"].tolist() == ["nyu_0", "nyu_1", "nyu_2"] and scans.index.tolist() == [0, 1, 2]
    assert set(scans["modality"]) == {"t2"}
    assert scans.attrs["unlabelled"] == {"t1": 1, "t2": 0}


def test_a_cohort_keeps_scans_and_cubes_together_and_its_key_follows_files_and_rows(phantom_root, tmp_path):
    p = profile(phantom_root, outputs=str(tmp_path), max_per_cell=1)
    cohort = data.load_cohort(p)
    assert len(cohort) == len(cohort.scans) == len(cohort.cubes) > 0
    t2 = cohort.of("t2").where(cohort.of("t2").scans["label"] == 2)
    assert set(t2.scans["modality"]) == {"t2"} and t2.key == cohort.key
    assert t2.scans.index.tolist() == list(range(len(t2)))
    for scan, cube in zip(t2.scans.itertuples(), t2.cubes, strict=True):
        roi = data.load_roi(scan.image, scan.mask)
        assert np.array_equal(cube, data.to_cube(np.asanyarray(roi.dataobj), 32))
    assert data.load_cohort(p).key == cohort.key
    assert data.load_cohort(p.model_copy(update={"modalities": ("t1",)})).key != cohort.key


def test_the_phantom_is_written_once_where_the_profile_says(tmp_path, monkeypatch):
    written = []

    def write(root, seed, max_per_cell, shortcut, shift, jobs):
        written.append((root, seed, max_per_cell, shortcut, shift, jobs))
        second_release(root, [("nyu_1", "nyu_1", 1)])

    monkeypatch.setattr(ipmn_core, "phantom", types.SimpleNamespace(write=write), raising=False)
    drawn = {"phantom_seed": 3, "phantom_max_per_cell": 7, "phantom_shortcut": 0.5, "phantom_shift": 0.75}
    p = profile(tmp_path, data="phantom", **drawn)
    assert len(data.open_cohort(p)) == len(data.open_cohort(p)) == 2
    assert written == [(p.phantom_root, 3, 7, 0.5, 0.75, 2)] and tmp_path in p.phantom_root.parents
    assert data.read_truth(p).empty


def test_a_missing_folder_and_a_profile_without_a_scan_left_say_what_to_do(tmp_path):
    with pytest.raises(data.CohortError, match=rf"{tmp_path / 'nowhere'}.*a manifest.*phantom"):
        data.open_cohort(profile(tmp_path / "nowhere"))
    second_release(tmp_path, [("nyu_1", None, 1)])
    with pytest.raises(data.CohortError, match=r"no labeled scan of t2; found: t1: set `modalities: "):
        data.open_cohort(profile(tmp_path, modalities=("t2",)))
