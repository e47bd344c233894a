import os
import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
import torch
from small_runs import AFFINE, change_settings, quick, train_small, write_scan

from ipmn_core import cli, metrics, models, predict
from ipmn_core.data import ScanError, load_roi, to_cube
from ipmn_core.params import Preprocessing
from ipmn_core.runs.trained import PredictError, find, load


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """As `train_small`, with its network registered; not to be changed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(models.MODELS, "quick", quick)
        yield train_small(tmp_path_factory.getbasetemp() / "small_runs")


@pytest.fixture(scope="module")
def arm(trained):
    return trained[0] / "binary" / "t2" / "centralized"


@pytest.fixture
def fold(arm, tmp_path):
    """A copy of one run, to be damaged."""
    return Path(shutil.copytree(arm / "fold0", tmp_path / "fold0"))


@pytest.fixture
def scan(tmp_path):
    """Image and mask of a case that no run has seen."""
    return write_scan(tmp_path, "EMC_01_002")


@pytest.mark.parametrize("which", ["binary/t2/centralized", "binary/t2/local_only", "multiclass/t2/quick"])
def test_a_runs_own_test_case_gets_the_probability_that_the_run_stored(trained, which):
    root, scans = trained
    stored = metrics.select(pd.read_parquet(root / which / "fold1" / "predictions.parquet"))
    assert np.ptp(stored["prob_1"]) > 1e-2  # or any case would do for any other
    for row in stored.groupby("center").head(2).to_dict("records"):
        scan = scans.set_index("case_id").loc[row["case_id"]]
        center = row["center"] if "local" in which else None
        result = predict.predict(scan["image"], scan["mask"], root / which / "fold1", center)
        prob = result.folds.drop(columns=["model", "weights"]).to_numpy()[0]
        # the run predicted in batches, which round otherwise
        np.testing.assert_allclose(prob, [row[f"prob_{c}"] for c in range(len(prob))], atol=1e-5)


def test_an_arm_gives_one_row_per_fold_then_their_mean_and_deviation(trained, scan):
    arm = trained[0] / "multiclass" / "t2" / "quick"
    result = predict.predict(*scan, arm)
    table = predict.table(result)
    assert list(table["model"]) == ["quick fold 0", "quick fold 1", "mean", "std"]
    assert list(table.columns[1:]) == ["no risk", "low risk", "high risk"]
    one, two, mean, std = table.drop(columns="model").to_numpy(float)
    np.testing.assert_allclose(one.sum(), 1, atol=1e-6)  # softmax in float32
    np.testing.assert_allclose(mean, (one + two) / 2)
    np.testing.assert_allclose(std, abs(one - two) / 2)  # ddof = 0
    assert (std > 0).all()
    assert (result.case, result.task) == ("EMC_01_002", "multiclass")
    again = predict.predict(*scan, [arm / "fold0", str(arm / "fold1" / "model.pt"), arm])
    pd.testing.assert_frame_equal(predict.table(again), table)  # the same bits, each model once


def test_a_case_that_the_models_know_is_pointed_out_with_its_role(arm, scan, tmp_path):
    roles = [pd.read_csv(arm / f"fold{k}" / "splits.csv").set_index("case_id")["role"] for k in (0, 1)]
    known = {case: write_scan(tmp_path, case.lower()) for case in ("NYU00", "AHN05", "AHN11")}
    for case, files in known.items():  # sheets and files differ in case
        (warning,) = predict.predict(*files, arm).warnings
        assert warning.startswith(f"no independent test, {case.lower()} was a case of these models")
        assert all(f"centralized fold {k}: {roles[k][case]}" in warning for k in (0, 1))
    assert predict.predict(*scan, arm).warnings == ()
    local = arm.with_name("local_only")
    assert predict.predict(*known["NYU00"], local, "NYU").warnings
    assert predict.predict(*known["NYU00"], local, "AHN").warnings == ()  # another center's case


def test_a_center_is_chosen_where_each_has_its_model_and_only_there(arm, scan):
    for center in (None, "EMC"):
        with pytest.raises(PredictError, match=r"one model per center: choose `center` of NYU, AHN"):
            predict.predict(*scan, arm.with_name("local_only"), center)
    with pytest.raises(PredictError, match="one model for all centers; leave out center NYU"):
        predict.predict(*scan, arm, "NYU")


@pytest.mark.parametrize(
    "change",
    [{"task": "multiclass"}, {"modality": "t1"}, {"size": 48}, {"spacing": 1.5}, {"intensity": "zscore"}],
)
def test_models_of_two_kinds_are_not_averaged(arm, fold, scan, change):
    (value,) = change.values()
    with pytest.raises(PredictError, match=f"several kinds: .*{value}.*; use each by itself"):
        predict.predict(*scan, [arm / "fold1", change_settings(fold, **change)])


class Malicious:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_code_in_a_file_of_weights_is_refused_and_not_run(fold, scan, tmp_path):
    harm = tmp_path / "harm"
    state = torch.load(fold / "model.pt", weights_only=True)
    torch.save({**state, "more": Malicious(harm)}, fold / "model.pt")
    with pytest.raises(PredictError, match=r"model.pt is refused: .*nothing in it was run"):
        predict.predict(*scan, fold)
    assert not harm.exists()
    torch.load(fold / "model.pt", weights_only=False)
    assert harm.exists()  # the file was one that does harm


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda s: dict([*s.items()][1:]), 'Missing.*"0.weight".*; no weights of quick'),
        (lambda s: {**s, "head.bias": torch.zeros(2)}, 'Unexpected.*"head.bias"'),
        (lambda s: {**s, "0.weight": s["0.weight"][:3]}, "size mismatch for 0.weight"),
        (lambda s: {**s, "0.weight": s["0.weight"] * np.nan}, "0.weight holds NaN or infinity"),
        (lambda s: {"state_dict": s}, "more than tensors by name; ask for a plain state dict"),
        (lambda s: list(s.values()), "more than tensors by name"),
        (lambda s: {k: v * 0 - 1 if "running_var" in k else v for k, v in s.items()}, "not numbers"),
    ],
)
def test_weights_that_do_not_fit_are_refused_with_file_and_key(fold, scan, damage, message):
    torch.save(damage(torch.load(fold / "model.pt", weights_only=True)), fold / "model.pt")
    with pytest.raises(PredictError, match=rf"fold0/model\.pt.*{message}"):
        predict.predict(*scan, fold)


def test_bare_weights_predict_as_the_network_they_are_of(tmp_path, scan, monkeypatch):
    monkeypatch.setitem(models.MODELS, "densenet121", quick)  # so that it takes no time
    network = quick(3).eval()
    torch.save(network.state_dict(), tmp_path / "weights.pt")
    how = Preprocessing(40, 2.0, "zscore", "canonical")
    result = predict.predict(*scan, tmp_path / "weights.pt", how=how)
    cube = to_cube(np.asanyarray(load_roi(*scan, how=how).dataobj), 40, "zscore")
    with torch.inference_mode():
        expected = network(torch.from_numpy(cube)[None, None].float()).softmax(1)[0]
    np.testing.assert_allclose(predict.table(result).iloc[0, 1:].astype(float), expected, atol=1e-6)
    assert (
        "EMC_01_002 was a case of these models or may have been (weights.pt: unknown)" in result.warnings[0]
    )
    torch.save({"out.weight": torch.zeros(4, 8)}, tmp_path / "weights.pt")
    with pytest.raises(PredictError, match="its last layer has 4 outputs"):
        predict.predict(*scan, tmp_path / "weights.pt")


def test_a_clean_roi_without_a_mask_is_predicted_like_the_image_with_its_mask(arm, scan, tmp_path):
    nib.save(load_roi(*scan), tmp_path / "roi.nii.gz")
    one, two = predict.predict(*scan, arm), predict.predict(tmp_path / "roi.nii.gz", None, arm)
    pd.testing.assert_frame_equal(one.folds, two.folds)


def test_a_scan_is_judged_as_in_a_cohort_and_what_is_in_doubt_is_said(arm, tmp_path):
    image, mask = write_scan(tmp_path, "EMC7", affine=np.diag([15.0, 12, 6, 1]))
    (warning,) = predict.predict(image, None, arm).warnings
    assert warning.startswith("EMC7.nii.gz: size of the ROI: it is 360 mm long") and ";" in warning
    assert predict.predict(image, mask, arm).warnings == ()  # 12 voxels of 15 mm
    nib.save(nib.Nifti1Image(nib.load(mask).get_fdata(), AFFINE), mask)
    (warning,) = predict.predict(image, mask, arm).warnings
    assert warning.startswith("EMC7.nii.gz: image and mask in different places")
    nib.save(nib.Nifti1Image(np.zeros((24, 20, 8), np.uint8), AFFINE), mask)
    with pytest.raises(ScanError, match=r"EMC7: .* is an empty mask; draw the pancreas"):
        predict.predict(image, mask, arm)
    with pytest.raises(ScanError, match=r"cannot be read .*; replace it by a whole NIfTI file"):
        predict.predict(tmp_path / "nowhere.nii", None, arm)


def test_scans_are_preprocessed_as_those_that_the_models_were_trained_on(arm, fold, scan):
    change_settings(fold, spacing=2.0, intensity="zscore", orientation="canonical")
    how = Preprocessing(32, 2.0, "zscore", "canonical")
    result = predict.predict(*scan, fold)
    assert (result.how, result.scan.axes) == (how, "LAS")
    assert nib.aff2axcodes(result.scan.roi.affine) == ("R", "A", "S")
    network = load(find(fold)[0])
    cube = to_cube(np.asanyarray(load_roi(*scan, how=how).dataobj), 32, "zscore")
    with torch.inference_mode():
        expected = network(torch.from_numpy(cube)[None, None].float()).softmax(1)[0]
    np.testing.assert_allclose(predict.table(result).iloc[0, 1:].astype(float), expected, atol=1e-6)
    pd.testing.assert_frame_equal(predict.predict(*scan, fold, how=how).folds, result.folds)
    with pytest.raises(PredictError, match=r"trained with .*spacing=2.0.* not .*; leave these options out"):
        predict.predict(*scan, fold, how=Preprocessing(32))
    assert not result.folds.equals(predict.predict(*scan, arm / "fold0").folds)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "run.json").unlink(), "fold0 holds no finished run"),
        (lambda f: (f / "run.json").write_text("{"), r"run.json is damaged or of no network"),
        (lambda f: change_settings(f, task="four"), "damaged or of no network.*four"),
        (lambda f: (f / "model.pt").unlink(), r"model\.pt: no such file"),
        (
            lambda f: os.truncate(f / "model.pt", 1000),
            r"model\.pt is refused: it cannot be read as plain tensors",
        ),
        (shutil.rmtree, "no such folder or file"),
    ],
)
def test_a_run_that_is_not_complete_is_refused_and_named(fold, scan, damage, message):
    damage(fold)
    with pytest.raises(PredictError, match=message):
        predict.predict(*scan, fold)


def test_the_command_prints_a_table_and_draws(arm, scan, tmp_path, capsys, house_style):
    png = tmp_path / "case.png"
    asked = ["predict", scan[0], "--mask", scan[1], "--device", "cpu", "--picture", str(png), "--models"]
    assert cli.main([*asked, str(arm)]) == 0
    printed = capsys.readouterr().out
    table = predict.table(predict.predict(*scan, arm)).to_markdown(index=False, floatfmt=".3f")
    assert table in printed and printed.rstrip().endswith(predict.NOTICE)
    assert "axes as stored: LAS; cube: 32^3, spacing as stored, intensity minmax, stored axes\n" in printed
    assert png.read_bytes().startswith(b"\x89PNG")
    assert cli.main([*asked, str(arm), "--intensity", "zscore", "--size", "32"]) == 1
    assert "leave these options out" in capsys.readouterr().err
    assert cli.main([*asked, str(arm), "--spacing", "0"]) == 1
    assert "spacing: " in capsys.readouterr().err
    assert cli.main([*asked, "nowhere"]) == 1
    assert capsys.readouterr().err.startswith("ipmn: nowhere: no such folder or file")
