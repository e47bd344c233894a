import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.metrics import roc_auc_score
from test_predict import Malicious, change_settings, train_small, write_scan

from ipmn_core import card, cli, metrics, predict
from ipmn_core.metrics import inference
from ipmn_core.predict import PredictError


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The runs' folder and their scans; not to be changed."""
    return train_small(tmp_path_factory.getbasetemp() / "small_runs")


@pytest.fixture
def arm(trained, tmp_path):
    """A copy of the centralized arm, to be changed."""
    return Path(shutil.copytree(trained[0] / "binary" / "t2" / "centralized", tmp_path / "centralized"))


def section(text, name):
    return text.split(f"\n## {name}\n")[1].split("\n## ")[0]


def rows(text, first):
    """The cells of the table rows whose first cell is `first`."""
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if "|" in line]
    return [row for row in cells if row[0] == first]


def change_record(fold, **changes):
    path = fold / "run.json"
    record = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in record.items() if value is not None}))


def files_of(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize(
    "which", ["binary/t2/centralized", "binary/t2/local_only", "three_class/t2/shufflenetv2"]
)
def test_an_exported_arm_predicts_and_warns_as_the_runs_do(trained, tmp_path, which):
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
    assert [path.name for path in tmp_path.iterdir() if path.suffix != ".gz"] == [
        "models"
    ]  # nothing left over


def test_an_export_names_no_case(trained, tmp_path):
    root, scans = trained
    target = card.export(root / "binary" / "t2" / "centralized", tmp_path / "models")
    files = files_of(target)
    assert set(files) == {"README.md"} | {
        f"fold{k}/{name}" for k in (0, 1) for name in ("model.pt", "run.json", "splits.csv")
    }
    for case in scans["case_id"]:
        assert not any(case.encode() in content for content in files.values())
    splits = pd.read_csv(target / "fold0" / "splits.csv")
    assert len(splits) == len(scans) and splits["case_sha256"].is_monotonic_increasing


def test_an_existing_target_is_refused_and_left_alone(arm, tmp_path):
    (tmp_path / "there").mkdir()
    with pytest.raises(FileExistsError, match="there is there already; choose another name"):
        card.export(arm, tmp_path / "there")
    assert list((tmp_path / "there").iterdir()) == []


def test_an_export_that_fails_leaves_nothing(arm, tmp_path):
    path = arm / "fold1" / "model.pt"
    state = torch.load(path, weights_only=True)
    torch.save({key: value * float("nan") for key, value in state.items()}, path)
    with pytest.raises(PredictError, match=r"fold1/model\.pt: 0\.0\.weight holds NaN"):
        card.export(arm, tmp_path / "models")
    assert [path.name for path in tmp_path.iterdir()] == ["centralized"]


def test_code_in_weights_is_neither_run_nor_handed_on(arm, tmp_path):
    torch.save(Malicious(tmp_path / "harm"), arm / "fold0" / "model.pt")
    with pytest.raises(PredictError, match=r"model\.pt is refused"):
        card.export(arm, tmp_path / "models")
    assert [path.name for path in tmp_path.iterdir()] == ["centralized"]


def test_every_centers_model_is_checked(trained, tmp_path):
    arm = shutil.copytree(trained[0] / "binary" / "t2" / "local_only", tmp_path / "local_only")
    state = torch.load(arm / "fold0" / "model.pt", weights_only=True)
    state["AHN.0.0.weight"] = state["AHN.0.0.weight"] * float("inf")
    torch.save(state, arm / "fold0" / "model.pt")
    with pytest.raises(PredictError, match=r"fold0/model\.pt, AHN: 0\.0\.weight holds NaN or infinity"):
        card.export(arm, tmp_path / "models")


def test_the_card_gives_auc_and_interval_of_the_exported_epoch(arm):
    results = section(card.model_card(arm), "Results")
    exported, honest = results.split("At the epoch that cases held out of the training choose")
    assert "flatter" in exported
    for k in (0, 1):
        tested = pd.read_parquet(arm / f"fold{k}" / "predictions.parquet")
        history = pd.read_csv(arm / f"fold{k}" / "history.csv").set_index("epoch")
        best, inner = history["test_auc"].idxmax(), inner_epoch(arm / f"fold{k}")
        for text, epoch in ((exported, best), (honest, inner)):
            part = tested[tested["epoch"] == epoch]
            auc = f"{roc_auc_score(part['y_true'], part['prob_1']):.3f}"
            low, high = inference.auc_interval(part["y_true"], part["prob_1"])[1:]
            acc = f"{np.mean((part['prob_1'] > 0.5) == part['y_true']):.3f}"
            interval = f"{auc} ({low:.3f} to {high:.3f})"
            assert rows(text, str(k)) == [[str(k), "12", "4", acc, auc, str(epoch), interval, ""]]


def inner_epoch(folder):
    validation = pd.read_parquet(folder / "validation.parquet")
    aucs = {e: roc_auc_score(v["y_true"], v["prob_1"]) for e, v in validation.groupby("epoch")}
    return max(aucs, key=aucs.get)


def test_the_card_gives_every_center_and_all_of_them_with_intervals(arm):
    text = section(card.model_card(arm), "Results")
    tested = pd.concat([pd.read_parquet(path) for path in arm.glob("fold*/predictions.parquet")])
    table = inference.intervals(metrics.select(tested))
    assert list(table["center"]) == ["NYU", "AHN", "global"]
    for row in table.itertuples():
        auc, acc = (
            f"{getattr(row, m):.3f} ({getattr(row, m + '_low'):.3f} to {getattr(row, m + '_high'):.3f})"
            for m in ("auc", "acc")
        )
        assert [row.center, str(row.n), str(row.positives), auc, acc, row.undefined] in rows(text, row.center)


def test_the_numbers_of_the_card_come_from_the_predictions(arm):
    before = section(card.model_card(arm), "Results")
    for path in arm.glob("fold*/predictions.parquet"):
        frame = pd.read_parquet(path)
        frame.assign(prob_0=frame["prob_1"], prob_1=frame["prob_0"]).to_parquet(path)
    after = section(card.model_card(arm), "Results")
    for row in (*"01", "NYU", "AHN", "global"):
        assert rows(before, row)[0] != rows(after, row)[0]


def test_the_card_counts_the_cases_of_each_center_and_role(arm):
    text = section(card.model_card(arm), "Data")
    splits = [pd.read_csv(arm / f"fold{k}" / "splits.csv") for k in (0, 1)]
    for center in ("NYU", "AHN"):
        roles = [list(s.loc[s["center"] == center, "role"]) for s in splits]
        cells = [" / ".join(str(r.count(name)) for name in ("train", "validation", "test")) for r in roles]
        assert rows(text, center) == [[center, *cells]]
    assert "/ 12" in rows(text, "global")[0][1]
    assert json.loads((arm / "fold0" / "run.json").read_text())["data"] in text


def test_settings_hashes_and_versions_stand_as_the_runs_have_them(arm):
    for k in (0, 1):
        change_settings(arm / f"fold{k}", lr=1e-5)
    text = card.model_card(arm)
    record = json.loads((arm / "fold1" / "run.json").read_text())
    for key, value in record["settings"].items():
        shown = "0, 1" if key == "fold" else str(value)
        assert [key, shown] in rows(section(text, "Protocol"), key)
    files = section(text, "Files and versions")
    digest = hashlib.sha256((arm / "fold1" / "model.pt").read_bytes()).hexdigest()
    assert rows(files, "fold1/model.pt")[0][2] == digest
    assert {*record["versions"].values(), str(record["seconds"])} < set(rows(files, "1")[0])


@pytest.mark.parametrize(
    ("recorded", "said"),
    [
        ({"cohort": "phantom"}, ("The phantom cohort", "nothing here says anything about patients")),
        ({"cohort": "ipmn"}, ("`ipmn`", "")),
        (
            {"cohort": None},
            ("Not named by the run", "does not say whether its images are patients' or synthetic"),
        ),
    ],
)
def test_the_card_says_whether_the_images_are_synthetic(arm, recorded, said):
    for fold in arm.iterdir():
        change_record(fold, **recorded)
    text = card.model_card(arm)
    assert said[0] in section(text, "Data") and said[1] in section(text, "Limits")
    assert ("synthetic" in text) == (recorded != {"cohort": "ipmn"})
    assert "Not for clinical use" in text.split("\n## ")[0]


def test_the_limits_are_those_of_the_runs(trained, arm):
    whole = section(card.model_card(arm), "Limits")
    assert "folds are here" not in whole and "One model a center" not in whole
    assert "Small centers: AHN has 4 high-risk case(s) among 12 tested" in whole
    shutil.rmtree(arm / "fold0")
    part = section(card.model_card(arm), "Limits")
    assert "1 of 2 folds are here" in part and "AHN has 2 high-risk case(s) among 6 tested" in part
    assert "One model a center" in card.model_card(trained[0] / "binary" / "t2" / "local_only")


def test_without_an_inner_split_the_card_has_no_honest_epoch_and_says_so(arm):
    for folder in arm.iterdir():
        change_settings(folder, inner_validation=0.0)
        (folder / "validation.parquet").unlink()
        splits = pd.read_csv(folder / "splits.csv")
        splits.replace({"role": {"validation": "train"}}).to_csv(folder / "splits.csv", index=False)
    results = section(card.model_card(arm), "Results")
    assert "At the epoch that cases held out" not in results and "no inner validation split" in results


def test_where_a_fold_held_nobody_out_there_is_no_honest_epoch_either(arm):
    folder = arm / "fold1"
    pd.read_parquet(folder / "validation.parquet").iloc[:0].to_parquet(folder / "validation.parquet")
    splits = pd.read_csv(folder / "splits.csv")
    splits.replace({"role": {"validation": "train"}}).to_csv(folder / "splits.csv", index=False)
    assert "no inner validation split" in section(card.model_card(arm), "Results")


def test_of_one_high_risk_case_the_card_says_why_there_is_no_interval(arm):
    for path in arm.glob("fold0/*.parquet"):
        frame = pd.read_parquet(path)
        keep = frame["case_id"].isin(frame.loc[frame["y_true"] == 1, "case_id"].unique()[:1])
        frame = frame.assign(y_true=keep.astype(int)) if path.stem == "predictions" else frame
        frame.to_parquet(path)
    first = rows(section(card.model_card(arm), "Results"), "0")[0]
    assert first[-2].endswith("(n/a to n/a)") and "one high-risk case: too few for a DeLong" in first[-1]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda fold: change_settings(fold, lr=0.5), "fold0 and .*fold1 differ in lr"),
        (lambda fold: change_record(fold, data="other"), "fold0 and .*fold1 differ in data"),
        (lambda fold: change_record(fold, data=None), "fold1/run.json lacks data"),
        (lambda fold: (fold / "run.json").unlink(), "fold1 holds no finished run"),
        (lambda fold: (fold / "predictions.parquet").unlink(), "fold1 lacks predictions.parquet"),
    ],
)
def test_folds_that_do_not_make_an_arm_get_no_card(arm, damage, message):
    damage(arm / "fold1")
    with pytest.raises(PredictError, match=message):
        card.model_card(arm)


def test_an_export_and_bare_weights_have_no_card(arm, tmp_path):
    target = card.export(arm, tmp_path / "models")
    with pytest.raises(PredictError, match=r"lacks predictions\.parquet: give the runs, not an export"):
        card.model_card(target)
    weights = shutil.copy(arm / "fold0" / "model.pt", tmp_path / "weights.pt")
    with pytest.raises(PredictError, match=r"weights\.pt is of no run"):
        card.model_card(weights)


def test_the_command_exports_and_says_where(arm, tmp_path, capsys):
    assert cli.main(["export", str(arm), str(tmp_path / "out")]) == 0
    assert f"{tmp_path}/out/" in capsys.readouterr().out
    assert (tmp_path / "out" / "README.md").read_text() == card.model_card(arm)
    assert cli.main(["export", str(arm), str(tmp_path / "out")]) == 1
    assert "is there already; choose another name" in capsys.readouterr().err
