import hashlib
import json
import re
import shutil
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from small_runs import quick, trained_profile

from ipmn_core import cli, data, metrics, models, pipeline, runs
from ipmn_core.metrics import heterogeneity, inference, tables
from ipmn_core.params import Preprocessing
from ipmn_core.predict import score
from ipmn_core.runs.trained import PredictError, find

HOW = Preprocessing(32)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A profile whose runs of both tasks are trained; not to be changed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(models.MODELS, "quick", quick)
        p = trained_profile(tmp_path_factory.getbasetemp() / "small_runs")
        yield p.model_copy(update={"arms": ("centralized",)})


@pytest.fixture
def there(trained):
    """A profile of the same cohort that trains nothing; what it leaves is deleted afterwards."""
    p = trained.model_copy(update={"profile": "there", "arms": (), "multiclass_models": ()})
    yield p
    shutil.rmtree(p.folder, ignore_errors=True)


def bare(folder, n_outputs=1):
    """Files of weights as the data set's authors lay them out."""
    files = [folder / f"{n_outputs}" / "fedavg" / "t2" / f"fold{k}" / "model_auc.pth" for k in (0, 1)]
    for k, file in enumerate(files):
        file.parent.mkdir(parents=True)
        torch.manual_seed(k)
        torch.save(quick(n_outputs).state_dict(), file)
    return files


def given(p, paths, **options):
    return score(p, paths, how=HOW, network="quick", **options)


def expected(p, file, n_outputs=1):
    """Probability of the last class that the weights in a file give each case, by case."""
    cohort, network = data.load_cohort(p), quick(n_outputs).eval()
    network.load_state_dict(torch.load(file))
    with torch.inference_mode():
        logits = network(torch.from_numpy(np.float32(cohort.cubes)).unsqueeze(1))
    prob = logits.sigmoid() if n_outputs == 1 else logits.softmax(1)
    return pd.Series(prob[:, -1].numpy(), cohort.scans["case_id"])


@pytest.mark.parametrize(("task", "arm"), [("binary", "centralized"), ("multiclass", "quick")])
def test_scored_runs_give_the_predictions_that_they_stored(trained, there, task, arm):
    home, new = trained.folder / "runs" / task / "t2" / arm, f"scored_{arm}"
    result = score(there, [home])
    assert result.arm == there.folder / "runs" / task / "t2" / new and not result.remarks
    mine, stored = runs.predictions(there, task), metrics.select(runs.predictions(trained, task))
    both = stored.merge(mine, on=["fold", "case_id", "center", "y_true", "modality", "task"])
    assert len(both) == len(stored) == len(mine) == 24
    assert set(mine["epoch"]) == {metrics.AS_GIVEN} and set(mine["arm"]) == {new}
    for name in mine.filter(like="prob_"):
        assert np.ptp(both[f"{name}_x"]) > 1e-2  # or any case would do for any other
        # the runs predicted in batches, which round otherwise
        np.testing.assert_allclose(both[f"{name}_x"], both[f"{name}_y"], atol=1e-5)
    for fold in (0, 1):
        path, file = result.arm / f"fold{fold}" / "run.json", home / f"fold{fold}" / "model.pt"
        record, digest = json.loads(path.read_text()), hashlib.sha256(file.read_bytes()).hexdigest()
        origin = {"file": str(file), "sha256": digest, "trained_on": "see its splits.csv"}
        assert record["weights"] == [origin] and record["trained_here"] is False
        settings = {"task": task, "modality": "t2", "arm": new, "fold": fold, "model": "quick", "folds": 2}
        assert record["settings"] == {**settings, "fold_rule": "center", "max_per_cell": None, **vars(HOW)}
        assert record["data"] == json.loads(file.with_name("run.json").read_text())["data"]
        roles = pd.read_csv(path.with_name("splits.csv")).groupby("role")["case_id"].agg(set)
        assert roles["test"] == set(mine.loc[mine["fold"] == fold, "case_id"])
        assert roles["not tested"] == set(mine.loc[mine["fold"] != fold, "case_id"])
    written = path.stat().st_mtime_ns
    pd.testing.assert_frame_equal(score(there, [home]).folds, result.folds)
    assert path.stat().st_mtime_ns == written  # kept


def test_bare_files_test_the_fold_of_their_folder_or_the_one_that_is_asked_for(there, tmp_path):
    files = bare(tmp_path)
    result = given(there, files[::-1])  # as the folders' names say, not the order
    assert "the training cases of bare files are unknown" in result.remarks[0]
    assert '"trained_on": "unknown"' in (result.arm / "fold1" / "run.json").read_text()
    given(there, files, arm="swapped", folds=[1, 0])
    tested = runs.predictions(there, "binary").set_index("case_id").groupby(["arm", "fold"])["prob_1"]
    for arm, fold, k in (("released", 0, 0), ("released", 1, 1), ("swapped", 0, 1), ("swapped", 1, 0)):
        prob = tested.get_group((arm, fold))
        np.testing.assert_allclose(prob, expected(there, files[k])[prob.index], atol=1e-6)
    part = given(there, files[1:], arm="part")
    assert "1 of 2 folds: means are over these" in part.remarks and part.folds["fold"].tolist() == [1]


@pytest.mark.parametrize("n_outputs", [1, 2, 3])
def test_a_whole_cohort_gets_the_mean_over_the_models(there, tmp_path, n_outputs):
    files, task = bare(tmp_path, n_outputs), "multiclass" if n_outputs == 3 else "binary"
    result = given(there, files, whole=True)
    # of no fold: another number or rule changes nothing
    changed = there.model_copy(update={f"{task}_folds": 3, "fold_rule": "patient"})
    tested = runs.predictions(changed, task).set_index("case_id")
    mean = sum(expected(there, file, n_outputs) for file in files) / 2
    prob = tested[f"prob_{max(n_outputs, 2) - 1}"]
    np.testing.assert_allclose(prob, mean[tested.index], atol=1e-6)
    assert len(tested) == 24 and set(tested["fold"]) == {0} and result.folds["n"].tolist() == [24]
    assert len(json.loads((result.arm / "fold0" / "run.json").read_text())["weights"]) == 2


def test_a_case_that_was_trained_on_is_refused_by_name_or_said_where_only_its_name_is_known(trained, there):
    home = trained.folder / "runs" / "binary" / "t2" / "centralized"
    with pytest.raises(PredictError, match=r"fold0/model\.pt was trained on 12 of the cases .*such as NYU"):
        score(there, [home], whole=True)
    assert not there.folder.exists()
    (remark,) = score(there.model_copy(update={"max_per_cell": 3}), [home], whole=True).remarks
    assert remark.startswith("18 tested cases have the names of training cases: no test")


FUSED = "t1+t2_channels"
OTHERS = {"classes": {"0": "low", "1": "low", "2": "high"}}
REFUSED = [  # outputs or arms, settings of the profile, options, message
    (
        1,
        {},
        {"folds": [0, 2]},
        r"the folds \[0, 2\]; the cohort has the folds \[0, 1\]; give each file its own",
    ),
    (1, {}, {"folds": [0, 1, 1]}, r"2 weights for the folds \[0, 1, 1\]"),
    (1, {"arms": ["centralized"]}, {"arm": "centralized"}, "'centralized' is trained by the profile"),
    (1, {}, {"arm": "oracle"}, r"'oracle' is .* a reference"),
    (1, {}, {"arm": "../x"}, r"'\.\./x' is .* no plain name"),
    (1, {}, {"modality": "t1"}, "modality unknown, asked for is t1; give `--modality`, one of .*: t2"),
    (1, {"modalities": [FUSED, "t2"]}, {"modality": FUSED}, "channels; give `--modality`, one of .*: t2$"),
    (3, OTHERS, {}, "tells no risk, low risk, high risk apart, this cohort has low, high"),
    (["binary/t2/centralized"], OTHERS, {}, "not high risk, high risk apart, this cohort has not high,"),
    (["binary/t2/centralized"], {}, {"folds": [1, 0]}, "runs keep theirs"),
    (["binary/t2/centralized", "multiclass/t2/quick"], {}, {}, "several kinds: binary, quick, t2, .*multi"),
]


@pytest.mark.parametrize(("weights", "settings", "options", "message"), REFUSED)
def test_what_does_not_fit_the_profile_is_refused(
    trained, there, tmp_path, weights, settings, options, message
):
    p, home = there.model_copy(update=settings), trained.folder / "runs"
    files = bare(tmp_path, weights) if isinstance(weights, int) else [home / arm for arm in weights]
    with pytest.raises(PredictError, match=message):
        given(p, files, **options)
    assert not p.folder.exists()


def test_all_weights_are_tried_and_their_folds_known_before_a_scan_is_scored(there, tmp_path):
    files = bare(tmp_path)
    state = torch.load(files[1])
    torch.save(state | {"0.bias": state["0.bias"] * np.nan}, files[1])
    with pytest.raises(PredictError, match=r"fold1/model_auc\.pth: 0\.bias holds NaN"):
        given(there, files)
    elsewhere = tmp_path / "third.pth"
    shutil.copy(files[0], elsewhere)
    for some in ([elsewhere], [files[0], elsewhere]):
        with pytest.raises(PredictError, match="say with `--folds` which fold each file tests"):
            given(there, some)
    assert not there.folder.exists()
    scored = given(there, [elsewhere], folds=[1])
    with pytest.raises(PredictError, match=r"fold1 is a test of weights from elsewhere; give .*third\.pth"):
        find(scored.arm)
    runs.discard(there.model_copy(update={"modalities": ("t1",)}))
    assert (scored.arm / "fold1" / "run.json").exists()


def test_one_arm_is_of_one_kind_of_weights_and_one_model_for_all_centers(trained, there, tmp_path):
    files = bare(tmp_path)
    given(there, files)
    for options in ({"folds": [1, 0]}, {"whole": True}):
        with pytest.raises(PredictError, match=r"fold0 was made with other weights.*give another name"):
            given(there, files, **options)
    shutil.copytree(trained.folder / "runs" / "binary" / "t2" / "centralized", tmp_path / "local")
    for path in (tmp_path / "local").glob("*/run.json"):
        path.write_text(path.read_text().replace('"arm": "centralized"', '"arm": "local_only"'))
    with pytest.raises(PredictError, match="is of local_only; score an arm with one"):
        score(there, [tmp_path / "local"])


def test_a_scored_arm_of_other_folds_cases_or_data_is_stale(there, tmp_path):
    given(there, bare(tmp_path))
    for key, old, new in (("folds", 2, 3), ("fold_rule", "center", "patient"), ("max_per_cell", None, 2)):
        changed = there.model_copy(update={"binary_folds" if key == "folds" else key: new})
        told = re.escape(f"{key}: {old!r} on disk, {new!r} now")
        with pytest.raises(runs.StaleRunError, match=rf"released/fold0 was made with other.*{told}"):
            runs.predictions(changed, "binary")
    cohort = data.load_cohort(there)
    assert len(runs.run_grid(there, "binary", cohort)) == 24  # nothing to train
    with pytest.raises(runs.StaleRunError, match=r"fold0 was made with other settings or data \(data"):
        runs.train(there, ["binary"], replace(cohort, key="other"))
    with pytest.raises(ValueError, match="multiclass: no arm; list some in the profile, or score weights"):
        runs.run_grid(there, "multiclass", cohort)
    left_out = {"multiclass", "multiclass-trained", "binary-trained", "paper", "phantom", "unseen", "cross"}
    left_out |= {"strategies", "fusion", "dial", "seeds", "no-weights"}
    assert pipeline._foreign(there) == left_out and runs.predictions(there, "multiclass").empty


def test_tables_and_review_show_scored_arms_beside_trained_ones(trained, there, tmp_path, monkeypatch):
    monkeypatch.setattr(models, "complexity", lambda name: {"quick": (1.0, 2.0)}[name])
    shutil.copytree(trained.folder, there.folder)
    p, files = trained.model_copy(update={"profile": "there"}), bare(tmp_path)
    given(p, files)
    given(p, files, arm="whole", whole=True)
    given(p, bare(tmp_path, 3), arm="foreign")
    new = {"released", "whole", "foreign"}
    predictions, validation = runs.finished_predictions(p)
    assert set(validation["arm"]) == {"quick", "centralized"}
    selected = metrics.select(predictions, "best_inner", validation)
    summary = metrics.over_folds(metrics.by_fold(selected))
    complexity = {arm: models.complexity(network) for arm, network in runs.networks(p).items()}
    assert tables.table2(summary, complexity)["model"].tolist() == ["quick", "foreign"]
    table3 = tables.table3(summary).query("center == 'global'")
    assert table3["method"].tolist() == ["centralized", "released", "whole"]
    for inner in (validation, None):
        optimism = metrics.optimism(predictions, inner).set_index("arm")
        unknown = optimism["undefined"] == "weights from elsewhere: their epoch was chosen before"
        assert set(optimism.index[unknown]) == new
        numbers = optimism.filter(regex="best|last|peak")
        assert numbers[unknown].isna().all(axis=None) and numbers.loc[~unknown, "last"].notna().all()
    compared = inference.compare_arms(selected).set_index("arm")
    assert np.isfinite(compared.loc["released", "difference"])
    assert np.isnan(compared.loc["whole", "difference"])
    assert compared.loc["whole", "undefined"] == "not tested on the same cases in the same folds"
    assert heterogeneity.gain(selected).empty and set(runs.histories(p, "binary")["arm"]) == {"centralized"}
    runs.discard(p)
    assert {path.name for path in (p.folder / "runs").glob("*/*/*")} == new


def test_the_command_says_what_was_tested_and_what_is_in_doubt(there, tmp_path, capsys):
    (tmp_path / "there.yaml").write_text(json.dumps(there.model_dump(mode="json")))
    asked = ["score", str(tmp_path / "there.yaml"), "--network", "quick", "--size", "32", "--device", "cpu"]
    assert cli.main([*asked, "--models", *map(str, bare(tmp_path))]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"\|\s+fold \|\s+n \|", printed) and "fold1/model_auc.pth" in printed
    assert "note: the training cases of bare files are unknown" in printed and "released/" in printed
