from ipmn_core import bench, cohort, growth


def test_every_step_is_measured_at_every_size(monkeypatch):
    monkeypatch.setattr(growth, "SCANS", (105, 210))
    monkeypatch.setattr(growth, "CASES", (5_000,))
    monkeypatch.setattr(growth, "CLIENTS", (2,))
    rows = growth.run()["rows"]
    assert [(row["what"], row["size"]) for row in rows] == [
        *((what, n) for what in ("index", "check", "folds") for n in (105, 210)),
        ("DeLong", 5_000),
        ("bootstrap", 5_000),
        ("FedAvg round, clients", 2),
    ]
    assert all(row["seconds"] > 0 and row["gigabytes"] >= 0 for row in rows)


def test_the_cohort_that_is_written_can_be_read_and_split_in_folds(tmp_path):
    growth.write_cohort(tmp_path / "105", 105)
    scans = cohort.read(tmp_path / "105")
    assert len(scans) == 105 and set(scans["modality"]) == {"t2"}
    assert scans.groupby(["center", "label"]).size().tolist() == [5] * 21
    assert sorted(set(cohort.assign_folds(scans, 5))) == [0, 1, 2, 3, 4]
    assert (tmp_path / "105" / "t2_clean_ROI" / "NYU_00000.nii.gz").stat().st_nlink > 105


def test_memory_is_that_of_the_measured_process():
    before, after = (bench.apart(hold, megabytes)[1] for megabytes in (0, 300))
    assert 0.25 < after - before < 0.35  # GB


def hold(megabytes):
    return len(bytearray(b"x") * (megabytes * 1_000_000))
