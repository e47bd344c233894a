import os
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from filelock import Timeout
from small_profile import Carried, profile, small_cohort

from ipmn_core import data, models, runs
from ipmn_core.runs import RunsFailedError, workers

TWO = {"modalities": ["t1", "t2"], "epochs": 2}


@pytest.fixture(scope="module")
def cohort():
    return small_cohort()


@pytest.mark.skipif(sys.platform == "win32", reason="a process is killed by a signal")
def test_runs_of_a_killed_worker_are_named_and_a_second_call_ends_as_one_worker(tmp_path, cohort):
    one, two = profile(tmp_path / "a", **TWO), profile(tmp_path / "b", **TWO, jobs=2)
    carried = Carried(**vars(cohort), tiny=models.MODELS["tiny"], deadly="t2", home=os.getpid())
    with pytest.raises(RunsFailedError, match=r"of 4 runs failed; the others are finished and kept") as error:
        runs.train(two, ["binary"], carried)
    for fold in (0, 1):
        told = f"binary t2 centralized fold {fold}: a worker process was ended from outside"
        assert told in str(error.value)
    again = runs.run_grid(two, "binary", replace(carried, deadly=""))
    pd.testing.assert_frame_equal(again, runs.run_grid(one, "binary", cohort))


def test_runs_that_fail_are_named_and_they_alone_are_repeated(tmp_path, cohort, capsys):
    p, cubes = profile(tmp_path, **TWO), cohort.cubes.copy()
    cubes[cohort.scans["modality"] == "t2"] = np.nan
    with pytest.raises(RunsFailedError, match="2 of 4 runs failed") as error:
        runs.train(p, ["binary"], replace(cohort, cubes=cubes))
    for fold in (0, 1):
        assert f"binary t2 centralized fold {fold}: DivergedError: the training loss" in str(error.value)
    assert " t1 " not in str(error.value)
    before = {path: path.stat().st_mtime_ns for path in p.folder.glob("runs/binary/t1/centralized/*/*")}
    assert sum(path.name == "run.json" for path in before) == 2
    assert set(runs.run_grid(p, "binary", cohort)["modality"]) == {"t1", "t2"}
    assert {path: path.stat().st_mtime_ns for path in before} == before
    capsys.readouterr()
    runs.train(p, ["binary"], cohort)
    assert capsys.readouterr().err == ""  # without runs no progress is shown


def without(cohort, p, center, fold):
    """The cohort less the T1 scans of patients of `center` whom `fold` tests."""
    folds = data.assign_folds(cohort, p.binary_folds, p.fold_rule, "binary")
    scans = cohort.scans
    return cohort.where((scans["center"] != center) | (scans["modality"] != "t1") | (folds != fold))


def test_a_center_without_a_test_case_in_a_fold_trains_and_is_tested_in_the_others(tmp_path, cohort):
    arms = {"arms": ["fedprox_0.1", "local_only"], "epochs": 1, "rounds": 1, "binary_folds": 3}
    p = profile(tmp_path, **arms, modalities=["t1", "t2"], fold_rule="patient")
    told = runs.run_grid(p, "binary", without(cohort, p, "EMC", 2)).query("modality == 't1'")
    counts = told.groupby(["arm", "center", "fold"]).size().unstack(fill_value=0)
    assert counts.loc[:, 2].to_dict() == {(arm, c): 2 * (c != "EMC") for arm, c in counts.index}
    assert (counts.drop(columns=2) == 3).all(axis=None)


UNSEEN = {"fold_rule": data.UNSEEN, "multiclass_folds": 3, "binary_folds": 3}
ALL = ["NYU", "AHN", "EMC"]


@pytest.mark.parametrize(
    ("arms", "keep", "changes", "error"),
    [
        (["centralized", "ditto_0.1"], ["NYU", "EMC0", "EMC1"], {}, r"fold 0: EMC \(1\); .* or leave the"),
        (["centralized", "fedavg"], ["NYU"], {}, r"two centers, t1 has NYU.* `arms: \[centralized\]`"),
        (["fedavg", "local_only"], ALL, UNSEEN, "local_only: one model per center.*leave them out of `arms`"),
        (["fedavg"], ["NYU", "AHN"], UNSEEN | {"binary_folds": 2}, "three centers .one is left out"),
        (["fedavg"], ALL, UNSEEN | {"binary_folds": 4}, "set `binary_folds: 3`"),
    ],
)
def test_centers_that_cannot_train_are_refused_before_any_training(
    tmp_path, cohort, arms, keep, changes, error
):
    p = profile(tmp_path, **changes, arms=arms)
    some = cohort.where(cohort.scans[["center", "case_id"]].isin(keep).any(axis=1))  # centers, or cases
    with pytest.raises((ValueError, data.CohortError), match=error):
        runs.train(p, ["binary"], some)
    assert not (p.folder / "runs").exists()
    if not changes:
        runs.check_folds(profile(tmp_path), ["binary"], some)  # centralized training can use them


def test_a_fold_that_tests_nobody_is_refused_before_any_training(tmp_path, cohort):
    p = profile(tmp_path, modalities=["t1", "t2"], fold_rule="patient", binary_folds=3)
    for center in ALL:
        cohort = without(cohort, p, center, 2)
    with pytest.raises(ValueError, match="binary t1 fold 2 has no case to test"):
        runs.train(p, ["binary"], cohort)


def test_each_run_takes_a_gpu_that_is_free_and_shares_one_if_none_is(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))  # where the locks are
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    p = profile(tmp_path, device="auto", jobs=3)
    with workers.own_gpu(p) as first:
        with workers.own_gpu(p) as second, workers.own_gpu(p) as shared:
            assert (first, second) == ("cuda:0", "cuda:1") and shared in (first, second)
        with workers.own_gpu(p) as freed:
            assert freed == second
    for error in (BlockingIOError, Timeout):  # an error of the run comes out, and frees the GPU
        with pytest.raises(error), workers.own_gpu(p) as device:
            raise error("no more processes")
        assert device == "cuda:0"
    for changes in ({"jobs": 1}, {"device": "cuda:1"}):  # one worker takes the first GPU
        of_one = p.model_copy(update=changes)
        with workers.own_gpu(of_one) as device:
            assert device == of_one.device


def test_progress_shows_what_is_done_and_the_time_left(capsys):
    started = time.monotonic()
    with workers.progress_bar(lambda: 1 + 0.05 * int(time.monotonic() - started), 2, "training binary"):
        time.sleep(3.5)
    said = capsys.readouterr().err
    assert re.search(r"training binary:  50%\|.*\| 1\.0/2 runs", said)
    left = dict(re.findall(r"runs \[00:0(\d)<00:(\d\d)\]", said))
    assert {"1", "2", "3"} <= set(left)  # renewed every second
    assert all(int(seconds) >= 10 for seconds in left.values())  # 0.8 to 0.95 runs at 0.05 per second


WORKER = "import sys, time; from ipmn_core import process; process.end_with(int(sys.argv[1])); time.sleep(99)"
PARENT = (
    "import subprocess, sys, time; "
    "subprocess.Popen([sys.executable, '-c', sys.argv[1]]); "
    "time.sleep(2); print('begun', flush=True); time.sleep(60)"
)


@pytest.mark.skipif(sys.platform == "win32", reason="there a process does not change its parent")
def test_a_worker_ends_with_the_process_that_started_it():
    parent = subprocess.Popen([sys.executable, "-c", PARENT, WORKER], stdout=subprocess.PIPE)
    assert parent.stdout.readline() == b"begun\n"
    parent.kill()
    killed = time.monotonic()
    assert parent.stdout.read() == b""  # until the worker, too, has closed it
    assert time.monotonic() - killed < 20  # seconds
    parent.wait()


def test_centers_of_any_name_stay_themselves(tmp_path, cohort):
    names = {"NYU": "042", "AHN": "42", "EMC": "1.50"}
    cohort = replace(cohort, scans=cohort.scans.replace({"center": names}))
    p = profile(tmp_path, arms=["fedavg", "local_only"], epochs=1, rounds=1)
    assert set(runs.run_grid(p, "binary", cohort)["center"]) == set(names.values())
    updates = runs.updates(p)
    assert set(updates["client"]) == set(updates["other"]) == set(names.values())


def test_a_center_left_out_is_tested_by_runs_of_all_others(tmp_path, cohort):
    few = {"epochs": 2, "rounds": 2, "inner_validation": 0.3}
    p = profile(tmp_path, **UNSEEN, **few, arms=["centralized", "fedprox_0.1"])
    told = runs.run_grid(p, "binary", cohort)
    assert told.groupby("fold")["center"].unique().map(list).tolist() == [["NYU"], ["AHN"], ["EMC"]]
    seen = runs.validation(p, "binary").groupby("fold")["center"].unique().map(sorted).tolist()
    assert seen == [["AHN", "EMC"], ["EMC", "NYU"], ["AHN", "NYU"]]
    clients = runs.updates(p).groupby("fold")["client"].unique().map(list).tolist()
    assert clients == [["AHN", "EMC"], ["NYU", "EMC"], ["NYU", "AHN"]]
