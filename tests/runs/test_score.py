import hashlib
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from small_runs import PROFILE, quick, write_scan

from ipmn_core import cli, data, metrics, models, params, runs
from ipmn_core.metrics import heterogeneity, inference, tables
from ipmn_core.names import LABELS, TASKS
from ipmn_core.params import Preprocessing
from ipmn_core.runs.score import score
from ipmn_core.runs.trained import PredictError

HOW = Preprocessing(32)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A profile whose runs of both tasks are trained, on 24 scans of two centers; not to be changed."""
    folder, rows = tmp_path_factory.mktemp("score"), []
    for k in range(24):
        name = f"{'NYU' if k < 12 else 'AHN'}{k:02d}"
        rows.append((*write_scan(folder, name, k % 3), k % 3, name[:3], "t2"))
    table = pd.DataFrame(rows, columns=["image", "mask", "label", "center", "modality"])
    table.to_csv(folder / "scans.csv", index=False)
    values = PROFILE | {"data": str(folder / "scans.csv"), "classes": dict(zip("012", LABELS, strict=True))}
    p = params.validate(values | {"outputs": str(folder), "arms": ["centralized"]}, "test")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(models.MODELS, "quick", quick)
        runs.train(p, TASKS, data.load_cohort(p))
        yield p


@pytest.fixture
def there(trained, request):
    """A profile of the same cohort, by which nothing is trained; its runs are deleted afterwards."""
    p = trained.model_copy(update={"profile": "there", "arms": (), "multiclass_models": ()})
    yield p
    shutil.rmtree(p.folder, ignore_errors=True)


def bare(folder, n_outputs=1, folds=2):
    """Files of weights as the data set's authors lay them out."""
    files = [folder / "2-class" / "fedavg" / "t2" / f"fold{k}" / "model_auc.pth" for k in range(folds)]
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
    home = trained.folder / "runs" / task / "t2" / arm
    result = score(there, [home])
    assert result.arm == there.folder / "runs" / task / "t2" / f"scored_{arm}" and result.remarks == ()
    mine, keys = runs.predictions(there, task), ["fold", "case_id"]
    stored = metrics.select(runs.predictions(trained, task))
    both = stored.merge(mine, on=[*keys, "center", "y_true", "modality", "task"])
    assert len(both) == len(stored) == len(mine) == 24
    for k in range(len(data.open_cohort(there).names(task))):
        assert np.ptp(both[f"prob_{k}_x"]) > 1e-2  # or any case would do for any other
        # the runs predicted in batches, which round otherwise
        np.testing.assert_allclose(both[f"prob_{k}_x"], both[f"prob_{k}_y"], atol=1e-5)
    assert set(mine["epoch"]) == {metrics.AS_GIVEN} and set(mine["arm"]) == {f"scored_{arm}"}
    for fold in (0, 1):
        record = json.loads((result.arm / f"fold{fold}" / "run.json").read_text())
        file = home / f"fold{fold}" / "model.pt"
        digest = hashlib.sha256(file.read_bytes()).hexdigest()
        origin = {"file": str(file), "sha256": digest, "trained_on": "splits.csv beside the file"}
        assert record["weights"] == [origin] and record["trained_here"] is False
        settings = {"task": task, "modality": "t2", "arm": f"scored_{arm}", "fold": fold, "model": "quick"}
        settings |= {"folds": 2, "fold_rule": "center", "max_per_cell": None, **vars(HOW)}
        assert record["settings"] == settings and record["centers"] == ["NYU", "AHN"]
        assert record["data"] == json.loads(file.with_name("run.json").read_text())["data"]
        splits = pd.read_csv(result.arm / f"fold{fold}" / "splits.csv").groupby("role")["case_id"].agg(set)
        assert splits["test"] == set(mine.loc[mine["fold"] == fold, "case_id"])
        assert splits["not tested"] == set(mine.loc[mine["fold"] != fold, "case_id"])
    written = (result.arm / "fold0" / "run.json").stat().st_mtime_ns
    pd.testing.assert_frame_equal(score(there, [home]).folds, result.folds)
    assert (result.arm / "fold0" / "run.json").stat().st_mtime_ns == written


def test_bare_files_test_the_fold_of_their_folder_or_the_one_that_is_asked_for(there, tmp_path):
    files = bare(tmp_path)
    result = given(there, files[::-1])  # as the folders' names say, not the order
    assert "what bare files were trained on is not known" in result.remarks[0]
    record = json.loads((result.arm / "fold1" / "run.json").read_text())
    assert record["weights"][0]["file"] == str(files[1])
    assert record["weights"][0]["trained_on"] == "unknown"
    swapped = given(there, files, arm="swapped", folds=[1, 0])
    assert swapped.folds["weights"].tolist() == [str(files[1]), str(files[0])]
    tested = runs.predictions(there, "binary").set_index("case_id").groupby(["arm", "fold"])["prob_1"]
    for arm, order in (("released", (0, 1)), ("swapped", (1, 0))):
        for fold, k in enumerate(order):
            prob = tested.get_group((arm, fold))
            np.testing.assert_allclose(prob, expected(there, files[k])[prob.index], atol=1e-6)
    part = given(there, files[1:], arm="part")
    assert "1 of 2 folds: means are over these" in part.remarks and part.folds["fold"].tolist() == [1]


@pytest.mark.parametrize("n_outputs", [1, 2, 3])
def test_a_whole_cohort_gets_the_mean_over_the_models(there, tmp_path, n_outputs):
    files = bare(tmp_path, n_outputs)
    result = given(there, files, whole=True)
    tested = runs.predictions(there, "multiclass" if n_outputs == 3 else "binary").set_index("case_id")
    mean = sum(expected(there, file, n_outputs) for file in files) / 2
    last = f"prob_{max(n_outputs, 2) - 1}"
    np.testing.assert_allclose(tested[last], mean[tested.index], atol=1e-6)
    assert len(tested) == 24 and set(tested["fold"]) == {0} and result.folds["n"].tolist() == [24]
    assert len(json.loads((result.arm / "fold0" / "run.json").read_text())["weights"]) == 2
    changed = there.model_copy(update={"binary_folds": 3, "multiclass_folds": 3, "fold_rule": "patient"})
    assert len(runs.predictions(changed, tested["task"].iloc[0])) == 24  # of no fold


def test_a_case_that_was_trained_on_is_refused_by_name_or_said_where_only_its_name_is_known(trained, there):
    home = trained.folder / "runs" / "binary" / "t2" / "centralized"
    with pytest.raises(PredictError, match=r"fold0/model\.pt was trained on 12 of the cases .*such as NYU"):
        score(there, [home], whole=True)
    assert not there.folder.exists()
    other = there.model_copy(update={"max_per_cell": 3})
    (remark,) = score(other, [home], whole=True).remarks
    assert remark.startswith("18 tested cases have names that were trained on, in other data")


REFUSED = {
    r"2 weights for the folds \[0, 2\], known are \[0, 1\]; give each file a fold": {"folds": [0, 2]},
    r"2 weights for the folds \[0, 1, 1\]": {"folds": [0, 1, 1]},
    "arm 'centralized' is trained by the profile": {"arm": "centralized", "arms": ("centralized",)},
    "arm 'oracle' is .* a reference": {"arm": "oracle"},
    "arm '../x' is .* no plain name": {"arm": "../x"},
    "is of modality unknown, asked for is t1; give `--modality`, one of the profile's: t2": {
        "modality": "t1"
    },
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_does_not_fit_the_profile_is_refused(there, tmp_path, message):
    options = REFUSED[message]
    p = there.model_copy(update={"arms": options.pop("arms", ())})
    with pytest.raises(PredictError, match=message):
        given(p, bare(tmp_path), **options)
    assert not there.folder.exists()


def test_weights_of_other_classes_kinds_or_origin_are_refused(trained, there, tmp_path):
    home, files = trained.folder / "runs", bare(tmp_path)
    fewer = there.model_copy(update={"classes": {"0": "low", "1": "low", "2": "high"}, "positive": None})
    with pytest.raises(
        PredictError, match=r"tells no risk, low risk, high risk apart, this cohort has low, high"
    ):
        given(fewer, bare(tmp_path / "three", 3))
    with pytest.raises(
        PredictError, match="tells not high risk, high risk apart, this cohort has not high, hi"
    ):
        score(fewer, [home / "binary" / "t2" / "centralized"])
    with pytest.raises(PredictError, match=r"several kinds: binary, quick, t2, .*multiclass"):
        score(there, [home / "binary" / "t2" / "centralized", home / "multiclass" / "t2" / "quick"])
    given(there, files)
    with pytest.raises(PredictError, match=r"released/fold0 was made with other weights.*give another name"):
        given(there, files[::-1], folds=[0, 1])
    with pytest.raises(PredictError, match="fold0 was made with other weights, settings or data; delete"):
        given(there, files, whole=True)
    shutil.copytree(home / "binary" / "t2" / "centralized", tmp_path / "local")
    for path in (tmp_path / "local").glob("*/run.json"):
        path.write_text(path.read_text().replace('"arm": "centralized"', '"arm": "local_only"'))
    with pytest.raises(PredictError, match="holds one model per center"):
        score(there, [tmp_path / "local"])


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"binary_folds": 3}, "folds: 2 on disk, 3 now"),
        ({"fold_rule": "patient"}, "fold_rule: 'center' on disk, 'patient' now"),
        ({"max_per_cell": 2}, "max_per_cell: None on disk, 2 now"),
    ],
)
def test_a_scored_arm_of_other_folds_cases_or_data_is_stale(there, tmp_path, change, told):
    given(there, bare(tmp_path))
    assert len(runs.predictions(there, "binary")) == 24
    with pytest.raises(runs.StaleRunError, match=rf"released/fold0 was made with other.*{told}"):
        runs.predictions(there.model_copy(update=change), "binary")
    cohort = data.load_cohort(there)
    runs.train(there, ["binary"], cohort)
    with pytest.raises(runs.StaleRunError, match=r"fold0 was made with other settings or data \(data"):
        runs.train(there, ["binary"], replace(cohort, key="other"))


def test_tables_and_review_show_scored_arms_beside_trained_ones(trained, there, tmp_path):
    shutil.copytree(trained.folder, there.folder)
    p = trained.model_copy(update={"profile": "there"})
    files = bare(tmp_path, 1)
    given(p, files)
    given(p, files, arm="whole", whole=True)
    given(p, bare(tmp_path / "three", 3), arm="foreign")
    assert runs.networks(p) == {"quick": "quick", "foreign": "quick"}
    runs.train(p, TASKS, data.load_cohort(p))  # a scored arm is never trained
    predictions, validation = runs.finished_predictions(p)
    assert set(validation["arm"]) == {"quick", "centralized"}
    selected = metrics.select(predictions, "best_inner", validation)
    summary = metrics.over_folds(metrics.by_fold(selected))
    complexity = {arm: models.complexity(network) for arm, network in runs.networks(p).items()}
    assert tables.table2(summary, complexity)["model"].tolist() == ["quick", "foreign"]
    table3 = tables.table3(summary).query("center == 'global'")["method"].tolist()
    assert table3 == ["centralized", "released", "whole"]
    for inner in (validation, None):
        optimism = metrics.optimism(predictions, inner).set_index("arm")
        unknown = optimism["undefined"] == "weights from elsewhere: their epoch was chosen before"
        assert set(optimism.index[unknown]) == {"released", "whole", "foreign"}
        assert (
            optimism.loc[unknown]
            .drop(columns=["task", "modality", "epochs", "undefined"])
            .isna()
            .all(axis=None)
        )
        assert optimism.loc[~unknown, ["best_test", "last"]].notna().all(axis=None)
    compared = inference.compare_arms(selected).set_index("arm")
    assert np.isfinite(compared.loc["released", "difference"])
    assert np.isnan(compared.loc["whole", "difference"])
    assert compared.loc["whole", "undefined"] == "not tested on the same cases in the same folds"
    assert heterogeneity.gain(selected).empty and set(runs.histories(p, "binary")["arm"]) == {"centralized"}
    runs.discard(p)
    assert {path.name for path in (p.folder / "runs").glob("*/*/*")} == {"released", "whole", "foreign"}


def test_the_command_says_what_was_tested_and_what_is_in_doubt(there, tmp_path, capsys):
    values = there.model_dump(mode="json") | {"outputs": str(Path(there.outputs))}
    (tmp_path / "there.yaml").write_text(json.dumps(values))
    asked = ["score", str(tmp_path / "there.yaml"), "--network", "quick", "--size", "32", "--device", "cpu"]
    assert cli.main([*asked, "--models", *map(str, bare(tmp_path))]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"\|\s+fold \|\s+n \|", printed) and "fold1/model_auc.pth" in printed
    assert "note: what bare files were trained on is not known" in printed and "released/" in printed
    assert cli.main([*asked, "--models", "nowhere"]) == 1
    assert capsys.readouterr().err.startswith("ipmn: nowhere: no such folder or file")
