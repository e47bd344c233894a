import json
import shutil
from pathlib import Path

import pandas as pd
import pytest
import torch
from sklearn.metrics import roc_auc_score
from small_runs import change_settings, quick, train_small, write_scan

from ipmn_core import card, cli, metrics, models, predict
from ipmn_core.metrics import inference
from ipmn_core.runs.trained import PredictError


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """As `train_small`, with its network registered; not to be changed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(models.MODELS, "quick", quick)
        yield train_small(tmp_path_factory.getbasetemp() / "small_runs")


@pytest.fixture
def arm(trained, tmp_path):
    """A copy of the centralized arm, to be changed."""
    return Path(shutil.copytree(trained[0] / "binary" / "t2" / "centralized", tmp_path / "centralized"))


def rows(text, first):
    """The cells of the table rows whose first cell is `first`."""
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if "|" in line]
    return [row for row in cells if row[0] == first]


def change_record(fold, **changes):
    path = fold / "run.json"
    record = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in record.items() if value is not None}))


@pytest.mark.parametrize("which", ["binary/t2/centralized", "binary/t2/local_only"])
def test_an_export_predicts_and_warns_as_the_runs_do_and_names_no_case(trained, tmp_path, which):
    root, scans = trained
    scan = scans.set_index("case_id").loc["AHN04"]
    center = "AHN" if "local" in which else None
    target = card.export(root / which, tmp_path / "models")
    of_runs, of_export = (
        predict.predict(scan["image"], scan["mask"], folder, center) for folder in (root / which, target)
    )
    pd.testing.assert_frame_equal(predict.table(of_runs), predict.table(of_export))
    assert of_runs.warnings == of_export.warnings != ()
    assert predict.predict(*write_scan(tmp_path, "EMC77"), target, center).warnings == ()
    files = {str(p.relative_to(target)): p.read_bytes() for p in target.rglob("*") if p.is_file()}
    of_folds = {f"fold{k}/{name}" for k in (0, 1) for name in ("model.pt", "run.json", "splits.csv")}
    assert set(files) == {"README.md"} | of_folds
    assert not any(case.encode() in content for case in scans["case_id"] for content in files.values())
    assert pd.read_csv(target / "fold0" / "splits.csv")["case_sha256"].is_monotonic_increasing


def test_an_export_that_fails_leaves_nothing(trained, tmp_path):
    arm = shutil.copytree(trained[0] / "binary" / "t2" / "local_only", tmp_path / "local_only")
    state = torch.load(arm / "fold1" / "model.pt", weights_only=True)
    torch.save(state | {"1.0.bias": state["1.0.bias"] * float("inf")}, arm / "fold1" / "model.pt")
    with pytest.raises(PredictError, match=r"fold1/model\.pt, AHN: 0\.bias holds NaN or infinity"):
        card.export(arm, tmp_path / "models")
    assert [path.name for path in tmp_path.iterdir()] == ["local_only"]


def test_the_card_gives_metrics_with_intervals_by_fold_and_by_center(arm):
    text = card.model_card(arm)
    assert "optimistic" in text and "Not for clinical use" in text.split("\n## ")[0]
    tested = pd.concat([pd.read_parquet(path) for path in arm.glob("fold*/predictions.parquet")])
    selected = metrics.select(tested)
    for k, part in selected.groupby("fold"):
        auc = f"{roc_auc_score(part['y_true'], part['prob_1']):.3f}"
        low, high = inference.auc_interval(part["y_true"], part["prob_1"])[1:]
        acc, epoch = f"{((part['prob_1'] > 0.5) == part['y_true']).mean():.3f}", str(part["epoch"].iloc[0])
        assert [str(k), "12", "4", acc, auc, epoch, f"{auc} ({low:.3f} to {high:.3f})", ""] in rows(
            text, str(k)
        )
    for row in inference.intervals(selected).itertuples():
        auc = f"{row.auc:.3f} ({row.auc_low:.3f} to {row.auc_high:.3f})"
        acc = f"{row.acc:.3f} ({row.acc_low:.3f} to {row.acc_high:.3f})"
        assert [row.center, str(row.n), str(row.positives), auc, acc, row.undefined] in rows(text, row.center)


def test_the_card_counts_the_cases_and_states_the_limits_of_these_runs(arm, trained):
    text, splits = card.model_card(arm), [pd.read_csv(arm / f"fold{k}" / "splits.csv") for k in (0, 1)]
    for center in ("NYU", "AHN"):
        roles = [list(s.loc[s["center"] == center, "role"]) for s in splits]
        cells = [" / ".join(str(r.count(name)) for name in ("train", "validation", "test")) for r in roles]
        assert [center, *cells] in rows(text, center)
    assert (
        "Small centers: AHN has 4 positive case(s) among 12 tested" in text and "folds are here" not in text
    )
    change_record(arm / "fold1", cohort="phantom")
    shutil.rmtree(arm / "fold0")
    text = card.model_card(arm)
    assert "1 of 2 folds are here" in text and "nothing here says anything about patients" in text
    assert "One model per center" in card.model_card(trained[0] / "binary" / "t2" / "local_only")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda fold: change_settings(fold, lr=0.5), "fold0 and .*fold1 differ in lr"),
        (lambda fold: change_record(fold, data=None), "fold1/run.json lacks data"),
        (lambda fold: (fold / "run.json").unlink(), "fold1 holds no finished run"),
        (
            lambda fold: (fold / "predictions.parquet").unlink(),
            "fold1 lacks predictions.parquet: give the runs",
        ),
    ],
)
def test_folds_that_do_not_make_an_arm_get_no_card(arm, damage, message):
    damage(arm / "fold1")
    with pytest.raises(PredictError, match=message):
        card.model_card(arm)


def test_the_command_exports_says_where_and_leaves_an_existing_target_alone(arm, tmp_path, capsys):
    target = tmp_path / "out"
    assert cli.main(["export", str(arm), str(target)]) == 0
    assert f"{target}/" in capsys.readouterr().out
    assert (target / "README.md").read_text() == card.model_card(arm)
    assert cli.main(["export", str(arm), str(target)]) == 1
    assert "already exists; choose another name" in capsys.readouterr().err
