import json
import shutil
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from small_profile import profile, small_cohort

from ipmn_core import federated, metrics, runs
from ipmn_core.data import assign_folds
from ipmn_core.federated import client
from ipmn_core.runs import Run, StaleRunError, run, store
from ipmn_core.runs import trained as networks

ARMS = ["centralized", "fedprox_0.1", "local_only"]
ALL = {"arms": ARMS, "inner_validation": 0.3}
CONTRACT = ["case_id", "center", "modality", "task", "arm", "fold", "seed", "epoch", "y_true"]
FILES = {"predictions.parquet", "validation.parquet", "history.csv", "model.pt", "run.json", "splits.csv"}


@pytest.fixture(scope="module")
def cohort():
    return small_cohort()


@pytest.fixture(scope="module")
def trained(tmp_path_factory, cohort):
    """A profile, all of whose runs are finished; not to be changed."""
    p = profile(tmp_path_factory.mktemp("trained"), **ALL)
    runs.train(p, runs.TASKS, cohort)
    return p


@pytest.fixture
def copied(trained, tmp_path):
    """The same, to be changed."""
    shutil.copytree(trained.folder, tmp_path / "t")
    return profile(tmp_path, **ALL)


def times(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


def test_a_run_leaves_the_contract_and_is_not_repeated(trained, cohort):
    predictions = runs.predictions(trained, "binary")
    assert list(predictions.columns) == [*CONTRACT, "prob_0", "prob_1"]
    assert list(runs.predictions(trained, "multiclass").columns) == [*CONTRACT, "prob_0", "prob_1", "prob_2"]
    assert not predictions.duplicated(["case_id", "arm", "fold", "epoch"]).any()
    assert predictions.groupby(["arm", "epoch"])["case_id"].nunique().eq(24).all()  # each case is tested once
    assert set(predictions["epoch"]) == {1, 2, 3}
    np.testing.assert_allclose(predictions["prob_0"] + predictions["prob_1"], 1, atol=1e-6)
    for arm in ARMS:
        folder = trained.folder / "runs" / "binary" / "t1" / arm / "fold1"
        more = {"updates.csv"} if arm.startswith("fed") else set()
        more |= {"cross.parquet"} if arm == "local_only" else set()
        assert {path.name for path in folder.iterdir()} == FILES | more
    record = json.loads((folder / "run.json").read_text())
    assert record["settings"]["arm"] == "local_only" and record["data"] == "data-1" and record["seconds"] > 0
    before = times(trained.folder)
    pd.testing.assert_frame_equal(runs.run_grid(trained, "binary", cohort), predictions)
    assert times(trained.folder) == before


def test_a_run_says_what_every_case_was_used_for(trained, cohort):
    scans = cohort.of("t1").scans
    fold = assign_folds(cohort.of("t1"), 2, "center", "binary").to_numpy()
    predictions, validation = runs.predictions(trained, "binary"), runs.validation(trained, "binary")
    assert list(validation.columns) == list(predictions.columns)
    for k in (0, 1):
        splits = pd.read_csv(trained.folder / f"runs/binary/t1/centralized/fold{k}/splits.csv")
        role = splits.set_index("case_id")["role"]
        assert sorted(role.index) == sorted(scans["case_id"])
        assert set(role.index[role == "test"]) == set(scans["case_id"][fold == k])
        for frame, name in ((predictions, "test"), (validation, "validation")):
            for _, rows in frame[frame["fold"] == k].groupby(["arm", "epoch"]):
                assert set(rows["case_id"]) == set(role.index[role == name])
        cells = scans.set_index("case_id").loc[role.index].assign(role=role)
        cells = cells[role != "test"].groupby(["center", "label"])["role"]
        held = cells.agg(lambda r: (r == "validation").sum())
        assert (held == (0.3 * cells.size()).round()).all() and held.sum() > 0


def test_every_local_model_is_tested_everywhere_and_at_home_as_in_its_own_predictions(trained):
    cross, own = runs.cross(trained), runs.predictions(trained, "binary").query("arm == 'local_only'")
    last = own[own["epoch"] == 3].reset_index(drop=True)
    assert list(cross.columns) == [*own.columns, "model_center"]
    at_home = cross[cross["center"] == cross["model_center"]].drop(columns="model_center")
    at_home, last = (of.sort_values(["fold", "case_id"], ignore_index=True) for of in (at_home, last))
    pd.testing.assert_frame_equal(at_home, last, check_exact=True)
    for center, rows in cross.groupby("model_center"):
        assert sorted(rows["case_id"]) == sorted(last["case_id"])
        away = rows[rows["center"] != center].merge(last, on="case_id")
        assert (away["prob_1_x"] != away["prob_1_y"]).any()


def test_the_held_out_cases_do_not_train(trained, cohort, monkeypatch):
    seen = {}
    monkeypatch.setattr(federated, "fit_centralized", lambda *a, **_: seen.update(train=a[1], held=a[2]))
    settings = runs.run_settings(trained, Run("binary", "t1", "centralized", 0))
    cases = runs.with_roles(cohort, settings)
    run.learn(torch.nn.Linear(1, 1), cases, settings, store.Progress())
    roles = cases.scans["role"].to_numpy()
    train, held = (np.sort(torch.cat(list(part.values())).numpy()) for part in seen.values())
    assert (train == np.flatnonzero(roles == "train")).all()
    assert (held == np.flatnonzero(roles != "train")).all()


def interrupt(monkeypatch, module, name, at):
    """Raise KeyboardInterrupt at the `at`-th call of a function, counted from 1, before it does anything."""
    honest, calls = getattr(module, name), []

    def interrupted(*given):
        calls.append(1)
        if len(calls) == at:
            raise KeyboardInterrupt
        return honest(*given)

    monkeypatch.setattr(module, name, interrupted)


PLACES = {  # and the share of the run's three epochs that is noted there
    "after the first epoch": (run, "note", 2, 1 / 3),
    "before the best weights": (store, "save_model", 1, 1 / 3),
    "before the first checkpoint": (store, "save_checkpoint", 1, 1 / 3),
    "before the second checkpoint": (store, "save_checkpoint", 2, 2 / 3),
    "between the tables": (store, "write_table", 2, 1),
    "before run.json": (store, "seal", 1, 1),
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("arm", ARMS)
def test_an_interrupted_run_goes_on_to_the_same_bits(trained, tmp_path, cohort, arm, place, monkeypatch):
    broken, this, (*where, share) = profile(tmp_path, **ALL), Run("binary", "t1", arm, 0), PLACES[place]
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt(patch, *where)
        runs.execute(broken, this, cohort)
    folder = runs.folder_of(broken, this)
    assert not (folder / "run.json").exists()  # no run.json, no run
    assert store.share_done(folder) == share
    with pytest.raises(FileNotFoundError, match="no finished run"):
        runs.predictions(broken, "binary")
    runs.execute(broken, this, cohort)
    whole = runs.folder_of(trained, this)
    assert {path.name for path in folder.iterdir()} == {path.name for path in whole.iterdir()}
    for path in whole.iterdir():
        same = path.read_bytes() == (folder / path.name).read_bytes()
        assert same or path.name == "run.json", path.name  # it holds the seconds


@pytest.mark.parametrize(
    ("changes", "key", "difference"),
    [
        ({"lr": 0.01}, "data-1", "lr: 0.001 on disk, 0.01 now"),
        ({"seed": 1}, "data-1", r"seed: \[0, 0\] on disk, \[1, 0\] now"),
        ({}, "data-2", "data: 'data-1' on disk, 'data-2' now"),
    ],
)
def test_a_run_of_other_settings_or_data_is_refused_and_named(trained, cohort, changes, key, difference):
    other = trained.model_copy(update=changes)
    with pytest.raises(StaleRunError, match=difference):
        runs.run_grid(other, "binary", replace(cohort, key=key))
    if changes:
        with pytest.raises(StaleRunError, match=difference):
            runs.predictions(other, "binary")


def test_a_checkpoint_of_other_settings_is_refused_before_any_training(tmp_path, cohort, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt(patch, run, "note", 2)
        runs.execute(profile(tmp_path), Run("binary", "t1", "centralized", 1), cohort)
    with pytest.raises(StaleRunError, match=r"fold1 .*lr: 0\.001 on disk, 0\.01 now"):
        runs.train(profile(tmp_path, lr=0.01), ["binary"], cohort)
    assert not (tmp_path / "t/runs/binary/t1/centralized/fold0").exists()


def test_results_are_read_task_by_task(trained, copied):
    tested, inner = runs.finished_predictions(trained)
    both = [runs.predictions(trained, task) for task in runs.TASKS]
    pd.testing.assert_frame_equal(tested, pd.concat(both, ignore_index=True))
    assert set(inner["task"]) == set(runs.TASKS)
    assert runs.histories(trained, "binary").groupby(["arm", "fold"])["epoch"].agg(list).map(len).eq(3).all()
    shutil.rmtree(copied.folder / "runs" / "binary")
    pd.testing.assert_frame_equal(runs.finished_predictions(copied)[0], both[0])
    shutil.rmtree(copied.folder / "runs" / "multiclass")
    with pytest.raises(FileNotFoundError, match="no task is finished"):
        runs.finished_predictions(copied)


def test_updates_of_the_clients_are_kept_by_round(trained):
    updates = runs.updates(trained)
    assert set(updates["arm"]) == {"fedprox_0.1"} and set(updates["round"]) == {1, 2, 3}
    assert len(updates) == 2 * 3 * 3 * 3  # folds, rounds, pairs of three centers
    assert (updates.query("client == other")["inner_product"] > 0).all()
    assert runs.left_out(trained).empty


def test_a_client_that_was_left_out_is_named_on_disk_and_on_the_screen(tmp_path, cohort, monkeypatch, capsys):
    honest = client.local_update

    def local_update(model, *given):
        if given[-1][-2:] == [2, 1]:  # round and client
            raise OSError("the disk is gone")
        return honest(model, *given)

    monkeypatch.setattr(client, "local_update", local_update)
    p = profile(tmp_path, arms=["fedavg"])
    runs.train(p, ["binary"], cohort)
    rows, name = runs.left_out(p)[["fold", "round", "client", "reason"]], cohort.centers[1]
    assert rows.to_numpy().tolist() == [[fold, 2, name, "OSError: the disk is gone"] for fold in (0, 1)]
    assert f"binary t1 fedavg fold 0, round 2: {name} left out: OSError" in capsys.readouterr().err


def test_weights_are_kept_for_the_runs_that_a_pattern_names(tmp_path, cohort):
    arms = ["centralized", "fedavg", "local_only"]  # chapter 3 shows the first and the last
    p = profile(tmp_path, arms=arms, keep_models=["binary/t?/fed*/fold1"])
    predictions = runs.run_grid(p, "binary", cohort)
    kept = {str(path.relative_to(p.folder / "runs")) for path in p.folder.rglob("model.pt")}
    expected = ("centralized/fold0", "fedavg/fold1", "local_only/fold0")
    assert kept == {f"binary/t1/{run}/model.pt" for run in expected}
    assert set(predictions["fold"]) == {0, 1} and runs.validation(p, "binary").empty


@pytest.mark.parametrize(("seconds", "epochs"), [(0.0, [1, 2, 3, 4, 5]), (5.0, [1, 3, 5]), (25.0, [3])])
def test_checkpoints_take_a_twentieth_of_the_time_at_most(tmp_path, cohort, monkeypatch, seconds, epochs):
    clock, saved = [0.0], []

    def save_checkpoint(folder, about, progress, learning):
        clock[0] += 1  # second
        saved.append(learning["epoch"])

    def note(*_):
        clock[0] += 10  # seconds
        return 0.5

    monkeypatch.setattr(run.time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(store, "save_checkpoint", save_checkpoint)
    monkeypatch.setattr(run, "note", note)
    monkeypatch.setattr(store, "write", lambda *_: None)
    p = profile(tmp_path, epochs=6, checkpoint_seconds=seconds)
    runs.execute(p, Run("binary", "t1", "centralized", 0), cohort)
    assert saved == epochs


@pytest.mark.parametrize("name", ["predictions", "validation", "cross"])
def test_a_case_that_was_also_trained_on_is_refused_with_file_and_row(copied, name):
    path = copied.folder / "runs" / "binary" / "t1" / "local_only" / "fold1" / f"{name}.parquet"
    splits, frame = pd.read_csv(path.with_name("splits.csv")), pd.read_parquet(path)
    frame.loc[2, "case_id"] = leaked = splits.loc[splits["role"] == "train", "case_id"].iloc[0]
    frame.to_parquet(path)
    text = rf"{name}\.parquet, row 2 \(case {leaked} .* was trained on"
    with pytest.raises(metrics.PredictionsError, match=text):
        getattr(runs, name)(copied, *(["binary"] if name != "cross" else []))


@pytest.mark.parametrize("arm", ["fedbn", "fedavg_bn_local", "fedavg_bn_recomputed", "ditto_0.1", "finetune"])
def test_the_weights_of_a_personal_arm_are_one_network_per_center(tmp_path, cohort, arm):
    p = profile(tmp_path, arms=[arm])
    folder = run.execute(p, Run("binary", "t1", arm, 0), cohort)
    (one,) = networks.find(folder)
    stored = metrics.select(pd.read_parquet(folder / "predictions.parquet"))  # of the weights that are kept
    cases = cohort.of("t1")
    assert one.centers == ("NYU", "AHN", "EMC")
    for center, rows in stored.groupby("center"):
        places = cases.scans.reset_index().set_index("case_id")["index"][rows["case_id"]]
        cubes = torch.tensor(cases.cubes[places]).unsqueeze(1).float()
        prob = networks.probabilities(networks.load(one, center), cubes, folder)
        np.testing.assert_allclose(prob[:, 1], rows["prob_1"], atol=1e-6)  # one by one, not in a batch


@pytest.mark.parametrize("momentum", [None, 0.5])
def test_running_statistics_take_the_weight_of_a_batch_that_is_set(tmp_path, momentum):
    p = profile(tmp_path, batch_norm_momentum=momentum)
    settings = runs.run_settings(p, runs.Run("binary", "t1", "centralized", 0))
    norm = runs.build(settings, torch.device("cpu"), 2, ["A"])[1]
    norm(torch.full((2, 4, 2, 2, 2), 8.0))  # from 0 towards 8
    assert norm.running_mean.tolist() == pytest.approx([8.0 * (momentum or 0.1)] * 4)
