import json
import tempfile

import numpy as np
import pandas as pd
import pytest
import torch
from test_federated import settings

from ipmn_core import metrics, params, runs
from ipmn_core.data import Cubes, assign_folds
from ipmn_core.federated import machine, training
from ipmn_core.runs import records, run, spread

CONTRACT = ["case_id", "center", "modality", "task", "arm", "fold", "seed", "epoch", "y_true"]


@pytest.fixture(scope="module")
def data():
    """Eight cases of three centers and two modalities; bright cubes are high risk."""
    rows = [
        (f"{c}{k}", f"{c}{k}", c, m, k % 3)
        for m in ("t1", "t2")
        for c in ("NYU", "AHN", "EMC")
        for k in range(8)
    ]
    scans = pd.DataFrame(rows, columns=["case_id", "patient_id", "center", "modality", "label"])
    rng = np.random.default_rng(0)
    array = rng.random((len(scans), 32, 32, 32)).astype(np.float16)
    array[scans["label"] == 2] += 1
    return scans, Cubes(array, "data-1")


def profile(folder, **changes):
    small = {
        "profile": "t",
        "outputs": str(folder),
        "size": 32,
        "three_class_models": ["shufflenetv2", "mobilenetv2"],
        "binary_model": "shufflenetv2",
        "arms": ["centralized", "fedprox_0.1"],
        "modalities": ["t1"],
        "three_class_folds": 2,
        "binary_folds": 2,
        "epochs": 2,
        "rounds": 2,
        "threads": 1,
        "device": "cpu",
        "checkpoint_seconds": 0.0,
    }
    return params.validate({**small, **changes}, "test")


def test_the_paper_grid_is_complete():
    p = params.Params()
    three_class, binary = runs.grid(p, "three_class"), runs.grid(p, "binary")
    assert len(set(three_class)) == len(three_class) == 5 * 2 * 5
    assert len(set(binary)) == len(binary) == 5 * 2 * 4
    assert len({runs.folder_of(p, run) for run in three_class + binary}) == 90


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"three_class_models": ["vgg"]}, "vgg: unknown model; known are resnet34"),
        ({"arms": ["fedsgd"]}, "fedsgd: unknown federated arm"),
        ({"binary_model": "vit"}, "vit: unknown model"),
    ],
)
def test_an_unknown_model_or_arm_is_named(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        runs.grid(profile(tmp_path, **changes), "binary")


def test_a_run_leaves_the_contract_and_is_not_repeated(tmp_path, data):
    p = profile(tmp_path)
    predictions = runs.run_grid(p, "binary", *data)
    assert list(predictions.columns) == [*CONTRACT, "prob_0", "prob_1"]
    assert not predictions.duplicated(["case_id", "arm", "fold", "epoch"]).any()
    assert (
        predictions.groupby(["arm", "epoch"])["case_id"].nunique().eq(24).all()
    )  # each case tested once an epoch
    np.testing.assert_allclose(predictions["prob_0"] + predictions["prob_1"], 1, atol=1e-6)
    folder = tmp_path / "t" / "runs" / "binary" / "t1" / "fedprox_0.1" / "fold1"
    assert {path.name for path in folder.iterdir()} == {
        "predictions.parquet",
        "history.csv",
        "model.pt",
        "run.json",
        "splits.csv",
        "updates.csv",
    }
    record = json.loads((folder / "run.json").read_text())
    assert (
        record["settings"]["mu"] == 0.1
        and record["data"] == records.data_key(*data)
        and record["seconds"] > 0
    )
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    again = runs.run_grid(p, "binary", *data)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before
    pd.testing.assert_frame_equal(predictions, again)


def test_predictions_are_those_of_the_fold_that_was_held_out(tmp_path, data):
    predictions = runs.run_grid(profile(tmp_path), "three_class", *data)
    scans = data[0][data[0]["modality"] == "t1"]
    folds = assign_folds(scans, 2).to_numpy()
    for fold, rows in predictions.groupby("fold"):
        assert set(rows["case_id"]) == set(scans["case_id"][folds == fold])
    assert set(predictions["y_true"]) == {0, 1, 2}


def test_the_model_kept_is_that_of_the_epoch_with_the_highest_auc(tmp_path, data):
    p = profile(tmp_path, epochs=4, arms=["centralized"])
    predictions = runs.run_grid(p, "binary", *data)
    folder = tmp_path / "t" / "runs" / "binary" / "t1" / "centralized" / "fold0"
    history = pd.read_csv(folder / "history.csv")
    best = history.loc[history["test_auc"].idxmax(), "epoch"]
    model = runs.models.build("shufflenetv2", 2)
    model.load_state_dict(torch.load(folder / "model.pt", weights_only=True))
    rows = predictions[(predictions["fold"] == 0) & (predictions["epoch"] == best)]
    scans, cubes = data
    index = [
        np.flatnonzero((scans["case_id"] == c) & (scans["modality"] == "t1"))[0] for c in rows["case_id"]
    ]
    x = torch.from_numpy(cubes.array[index]).unsqueeze(1)
    prob = training.evaluate(model, torch.arange(len(x)), training.Cases(x, torch.zeros(len(x))), settings())
    np.testing.assert_allclose(prob[:, 1], rows["prob_1"], atol=1e-6)  # another batch size rounds otherwise


@pytest.mark.parametrize(
    ("changes", "key", "difference"),
    [
        ({"lr": 0.01}, "data-1", "lr: 0.001 on disk, 0.01 now"),
        ({"seed": 1}, "data-1", "seed: 0 on disk, 1 now"),
        ({}, "data-2", "data: '"),
    ],
)
def test_a_run_of_other_settings_or_data_is_refused_with_the_difference(
    tmp_path, data, changes, key, difference
):
    only = {"arms": ["centralized"], "epochs": 1}
    runs.run_grid(profile(tmp_path, **only), "binary", *data)
    with pytest.raises(records.StaleRunError, match=difference):
        runs.run_grid(profile(tmp_path, **only, **changes), "binary", data[0], Cubes(data[1].array, key))


def test_a_corrected_label_is_other_data(tmp_path, data):
    p, (scans, cubes) = profile(tmp_path, arms=["centralized"], epochs=1), data
    runs.run_grid(p, "binary", scans, cubes)
    corrected = scans.assign(label=scans["label"].where(scans.index != 5, 0))
    assert corrected.loc[5, "label"] != scans.loc[5, "label"]
    with pytest.raises(records.StaleRunError, match="data: '"):
        runs.run_grid(p, "binary", corrected, cubes)


def test_every_setting_of_the_protocol_arrives(tmp_path, data, monkeypatch):
    seen = []
    monkeypatch.setattr(training, "fit", lambda *arguments: seen.append(arguments[4]) or iter([]))
    monkeypatch.setattr(runs.federated, "fit", lambda *arguments: seen.append(arguments[4]) or iter([]))
    shared = {"batch_size": 5, "batches_per_epoch": 3, "lr": 0.2, "weight_decay": 0.3, "lr_step": 9}
    shared |= {"lr_gamma": 0.4, "augment_prob": 0.5}
    changed = shared | {"epochs": 7, "rounds": 8, "local_epochs": 2, "seed": 11}
    p, (scans, cubes) = profile(tmp_path, **changed), data
    for arm in ("centralized", "fedprox_0.1"):
        run = runs.Run("binary", "t1", arm, 1)
        rows = scans[scans["modality"] == "t1"].assign(role="train")
        rows.loc[rows.groupby("center").head(1).index, "role"] = "test"
        list(run._epochs(p, run, runs.settings_of(p, run), rows, cubes.array[:24], None))
    common = shared | {"bfloat16": False, "channels_last": True, "seed": (11, 1)}
    assert seen[0] == training.Settings(epochs=7, local_epochs=1, **common)
    assert seen[1] == training.Settings(epochs=8, local_epochs=2, **common)


@pytest.mark.parametrize("arm", ["centralized", "fedprox_0.1", "local_only"])
def test_an_interrupted_run_goes_on_and_ends_bit_identical(tmp_path, data, arm, monkeypatch):
    whole, broken = (profile(tmp_path / name, arms=[arm], inner_validation=0.3) for name in ("a", "b"))
    runs.run_grid(whole, "binary", *data)
    monkeypatch.setattr(run, "_note", interrupt_after(1, run._note))
    with pytest.raises(KeyboardInterrupt):
        runs.run_grid(broken, "binary", *data)
    monkeypatch.undo()
    first = broken.folder / "runs" / "binary" / "t1" / arm / "fold0"
    left = {"checkpoint.pt", "model.pt", "share_done"}
    assert {path.name for path in first.iterdir()} == left  # no run.json, no run
    with pytest.raises(FileNotFoundError, match="no finished run; run notebook 03"):
        runs.predictions(broken, "binary")
    runs.run_grid(broken, "binary", *data)
    pd.testing.assert_frame_equal(runs.predictions(whole, "binary"), runs.predictions(broken, "binary"))
    files = {"predictions.parquet", "validation.parquet", "history.csv", "splits.csv", "model.pt", "run.json"}
    assert {path.name for path in first.iterdir()} == files | ({"updates.csv"} if "fed" in arm else set())
    for path in first.parent.glob("fold*/*"):
        same = path.read_bytes() == (whole.folder / path.relative_to(broken.folder)).read_bytes()
        assert same or path.name == "run.json"  # it holds the seconds


def interrupt_after(epochs, note):
    seen = []

    def interrupted(*arguments):
        if len(seen) == epochs:
            raise KeyboardInterrupt
        seen.append(1)
        return note(*arguments)

    return interrupted


def test_a_checkpoint_of_other_settings_is_refused_before_any_training(tmp_path, data, monkeypatch):
    only = {"three_class_models": ["shufflenetv2"], "epochs": 2}
    monkeypatch.setattr(run, "_note", interrupt_after(3, run._note))  # in the second fold
    with pytest.raises(KeyboardInterrupt):
        runs.run_grid(profile(tmp_path, **only), "three_class", *data)
    monkeypatch.undo()
    folder = tmp_path / "t" / "runs" / "three_class" / "t1" / "shufflenetv2"
    for path in (folder / "fold0").iterdir():
        path.unlink()
    with pytest.raises(records.StaleRunError, match=r"fold1 .*lr: 0\.001 on disk, 0\.01 now"):
        runs.run_grid(profile(tmp_path, **only, lr=0.01), "three_class", *data)
    assert not list((folder / "fold0").iterdir())


def test_predictions_of_other_settings_are_not_read_as_these(tmp_path, data):
    runs.run_grid(profile(tmp_path, arms=["centralized"], epochs=1), "binary", *data)
    with pytest.raises(records.StaleRunError, match="epochs: 1 on disk, 2 now"):
        runs.predictions(profile(tmp_path, arms=["centralized"], epochs=2), "binary")


def test_what_is_finished_is_read_task_by_task(tmp_path, data):
    p = profile(tmp_path, arms=["centralized"], epochs=1, inner_validation=0.25)
    with pytest.raises(FileNotFoundError, match="no task is finished"):
        runs.finished_predictions(p)
    binary = runs.run_grid(p, "binary", *data)
    tested, inner = runs.finished_predictions(p)
    pd.testing.assert_frame_equal(tested, binary)
    pd.testing.assert_frame_equal(inner, runs.validation(p, "binary"))


@pytest.mark.parametrize("backend", ["loky", "dask", "ray"])
def test_two_workers_give_the_same_bits_as_one(tmp_path, data, backend):
    one, two = profile(tmp_path / "a"), profile(tmp_path / "b", jobs=2, backend=backend)
    pd.testing.assert_frame_equal(runs.run_grid(one, "binary", *data), runs.run_grid(two, "binary", *data))


def test_runs_that_fail_are_named_and_they_alone_are_repeated(tmp_path, data):
    p = profile(tmp_path, arms=["centralized"], modalities=["t1", "t2"], epochs=1, jobs=2)
    scans, cubes = data
    array = cubes.array.copy()
    array[scans["modality"] == "t2"] = np.nan
    with pytest.raises(spread.RunsFailedError, match="2 of 4 runs failed") as error:
        runs.run_grid(p, "binary", scans, Cubes(array, cubes.key))
    for fold in (0, 1):
        assert f"binary t2 centralized fold {fold}: DivergedError: the training loss" in str(error.value)
    assert " t1 " not in str(error.value)
    before = {path: path.stat().st_mtime_ns for path in p.folder.glob("runs/binary/t1/centralized/*/*")}
    assert sum(path.name == "run.json" for path in before) == 2
    assert set(runs.run_grid(p, "binary", scans, cubes)["modality"]) == {"t1", "t2"}
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_how_many_work_where_is_no_setting_of_a_run(tmp_path):
    run = runs.Run("binary", "t1", "centralized", 0)
    elsewhere = profile(tmp_path, jobs=4, backend="ray")
    assert runs.settings_of(elsewhere, run) == runs.settings_of(profile(tmp_path), run)


def test_the_precision_of_a_run_is_that_of_its_model(tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "has_bfloat16", lambda device: True)
    p = profile(tmp_path, precision="auto")  # binary_model is shufflenetv2, which bfloat16 slows down
    used = {
        arm: runs.settings_of(p, runs.Run(task, "t1", arm, 0))["bfloat16"]
        for task, arm in (("three_class", "densenet121"), ("binary", "fedavg"))
    }
    assert used == {"densenet121": True, "fedavg": False}


def test_of_several_gpus_each_worker_takes_one_that_is_free(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))  # where the locks lie
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(run, "_train", lambda p, *data: p.device)
    device = lambda **changes: runs.execute(profile(tmp_path, **changes), *[None] * 4)  # noqa: E731
    assert device(device="auto", jobs=2) == "cuda:0"
    with spread.own_gpu(2):
        assert device(device="auto", jobs=2) == "cuda:1"
    assert device(device="auto") == "auto"  # one worker: the first GPU
    assert device(device="cuda:1", jobs=2) == "cuda:1"


def test_the_share_done_of_a_run_is_what_was_noted_until_it_is_whole(tmp_path):
    assert records.share_done(tmp_path / "not begun") == 0
    (tmp_path / "share_done").write_text("")  # caught while it is written
    assert records.share_done(tmp_path) == 0
    records.note_share(tmp_path, 0.25)
    assert records.share_done(tmp_path) == 0.25
    (tmp_path / "run.json").write_text("{}")
    assert records.share_done(tmp_path) == 1


def test_a_run_notes_its_share_after_every_epoch(tmp_path, data, monkeypatch):
    noted = []
    monkeypatch.setattr(records, "note_share", lambda folder, share: noted.append((folder.name, share)))
    runs.run_grid(profile(tmp_path, arms=["fedprox_0.1"], rounds=2), "binary", *data)
    assert noted == [("fold0", 0.5), ("fold0", 1.0), ("fold1", 0.5), ("fold1", 1.0)]


def test_a_run_says_what_every_case_was_used_for(tmp_path, data):
    p = profile(tmp_path, arms=["centralized"], epochs=2, inner_validation=0.3)
    predictions, validation = runs.run_grid(p, "binary", *data), runs.validation(p, "binary")
    scans = data[0][data[0]["modality"] == "t1"]
    for fold in (0, 1):
        splits = pd.read_csv(
            p.folder / "runs" / "binary" / "t1" / "centralized" / f"fold{fold}" / "splits.csv"
        )
        assert sorted(splits["case_id"]) == sorted(scans["case_id"])
        role = splits.set_index("case_id")["role"]
        for frame, name in ((predictions, "test"), (validation, "validation")):
            rows = frame[frame["fold"] == fold]
            assert set(rows["case_id"]) == set(role.index[role == name])
            assert rows.groupby("case_id")["epoch"].apply(list).map(lambda e: e == [1, 2]).all()
        labels = scans.set_index("case_id").loc[role.index].assign(role=role)
        cells = labels[labels["role"] != "test"].groupby(["center", "label"])["role"]
        held = cells.agg(lambda r: (r == "validation").sum())
        assert (held == (0.3 * cells.size()).round()).all() and held.sum() > 0
    assert list(validation.columns) == list(predictions.columns)


def test_without_inner_validation_there_is_none(tmp_path, data):
    p = profile(tmp_path, arms=["centralized"], epochs=1)
    predictions = runs.run_grid(p, "binary", *data)
    assert runs.validation(p, "binary").empty
    assert metrics.optimism(predictions, runs.validation(p, "binary"))["best_inner"].isna().all()


def test_the_held_out_cases_do_not_train(tmp_path, data, monkeypatch):
    seen = {}
    monkeypatch.setattr(training, "fit", lambda *a: seen.update(train=a[1], test=a[2]) or iter([]))
    p, (scans, cubes) = profile(tmp_path, inner_validation=0.3), data
    run = runs.Run("binary", "t1", "centralized", 0)
    mine = scans[scans["modality"] == "t1"]
    rows = runs.with_roles(mine, assign_folds(mine, 2, binary=True) == 0, p, run)
    list(run._epochs(p, run, runs.settings_of(p, run), rows, cubes.array[:24], None))
    assert set(rows["role"]) == {"train", "validation", "test"}
    assert seen["train"].tolist() == np.flatnonzero(rows["role"] == "train").tolist()
    assert sorted(seen["test"].tolist()) == np.flatnonzero(rows["role"] != "train").tolist()


def test_local_only_tests_each_center_with_its_own_model(tmp_path, data):
    p = profile(tmp_path, arms=["local_only"], local_epochs=2)
    predictions = runs.run_grid(p, "binary", *data)
    assert set(predictions["epoch"]) == {1, 2, 3, 4}  # as many as the federation's local epochs
    assert predictions.groupby("epoch")["case_id"].nunique().eq(24).all()
    folder = p.folder / "runs" / "binary" / "t1" / "local_only" / "fold0"
    history, kept = pd.read_csv(folder / "history.csv"), torch.load(folder / "model.pt", weights_only=True)
    best = history.loc[history["test_auc"].idxmax(), "epoch"]
    best = predictions[(predictions["fold"] == 0) & (predictions["epoch"] == best)]
    scans, cubes = data
    for center in ("NYU", "AHN", "EMC"):
        model = runs.models.build("shufflenetv2", 2)
        own = {key.removeprefix(f"{center}."): v for key, v in kept.items() if key.startswith(f"{center}.")}
        model.load_state_dict(own)
        rows = best[best["center"] == center]
        where = (scans["modality"] == "t1").to_numpy()
        index = [np.flatnonzero(where & (scans["case_id"] == c))[0] for c in rows["case_id"]]
        x = torch.from_numpy(cubes.array[index]).unsqueeze(1)
        alone = training.Cases(x, torch.zeros(len(x)))
        prob = training.evaluate(model, torch.arange(len(x)), alone, settings(channels_last=True))
        np.testing.assert_allclose(
            prob[:, 1], rows["prob_1"], atol=1e-6
        )  # another batch size rounds otherwise


def test_updates_of_the_clients_are_kept_by_round(tmp_path, data):
    p = profile(tmp_path)
    runs.run_grid(p, "binary", *data)
    updates = runs.updates(p)
    assert set(updates["arm"]) == {"fedprox_0.1"} and set(updates["round"]) == {1, 2}
    assert len(updates) == 2 * 2 * 3 * 3  # folds, rounds, pairs of three centers
    assert (updates.query("client == other")["inner_product"] > 0).all()


@pytest.mark.parametrize("name", ["predictions.parquet", "validation.parquet"])
def test_a_case_that_was_also_trained_on_is_refused_with_file_and_row(tmp_path, data, name):
    p = profile(tmp_path, arms=["centralized"], epochs=1, inner_validation=0.3)
    runs.run_grid(p, "binary", *data)
    path = p.folder / "runs" / "binary" / "t1" / "centralized" / "fold1" / name
    splits, frame = pd.read_csv(path.with_name("splits.csv")), pd.read_parquet(path)
    frame.loc[2, "case_id"] = leaked = splits.loc[splits["role"] == "train", "case_id"].iloc[0]
    frame.to_parquet(path)
    with pytest.raises(metrics.PredictionsError, match=rf"{name}, row 2 \(case {leaked} .* was trained on"):
        (runs.predictions if name.startswith("p") else runs.validation)(p, "binary")


def test_a_case_tested_in_two_folds_is_refused(tmp_path, data):
    p = profile(tmp_path, arms=["centralized"], epochs=1)
    runs.run_grid(p, "binary", *data)
    one, two = (p.folder / "runs" / "binary" / "t1" / "centralized" / f"fold{k}" for k in (0, 1))
    for name in ("predictions.parquet", "splits.csv"):
        (two / name).write_bytes((one / name).read_bytes())
    frame = pd.read_parquet(two / "predictions.parquet").assign(fold=1)
    frame.to_parquet(two / "predictions.parquet", index=False)
    with pytest.raises(metrics.PredictionsError, match=r"row 12 \(case .*tested in two folds"):
        runs.predictions(p, "binary")


def test_an_epoch_that_lacks_a_test_case_is_refused(tmp_path, data):
    p = profile(tmp_path, arms=["centralized"], epochs=2)
    runs.run_grid(p, "binary", *data)
    path = p.folder / "runs" / "binary" / "t1" / "centralized" / "fold0" / "predictions.parquet"
    frame = pd.read_parquet(path)
    lost = frame.loc[3, "case_id"]
    frame.drop(index=3).to_parquet(path, index=False)
    with pytest.raises(metrics.PredictionsError, match=rf"epoch 1: no row of case {lost}"):
        runs.predictions(p, "binary")


def test_runs_of_another_machine_can_be_read_on_this_one(tmp_path, data):
    p = profile(tmp_path, arms=["centralized"], epochs=1)
    here = runs.run_grid(p, "binary", *data)
    for fold in (0, 1):
        path = p.folder / "runs" / "binary" / "t1" / "centralized" / f"fold{fold}" / "run.json"
        record = json.loads(path.read_text())
        record["settings"] |= {"device": "cuda", "bfloat16": True, "channels_last": False}
        path.write_text(json.dumps(record))
    gpu = p.model_copy(update={"device": "cuda:7", "precision": "bfloat16"})  # this machine has neither
    pd.testing.assert_frame_equal(runs.predictions(gpu, "binary"), here)
