import os
import re
import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
import torch
from small_runs import AFFINE, change_settings, quick, train_small, write_scan

from ipmn_core import cli, metrics, models, predict
from ipmn_core.data import CohortError, ScanError, load_roi, to_cube, unlabelled
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
        assert warning.startswith("not an independent test: it was a case of these models")
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
    with pytest.raises(PredictError, match=f"several kinds: .*{value}.*; use each separately"):
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
    with pytest.raises(PredictError, match=r"model.pt is refused: it holds code, .*no code in it was run"):
        predict.predict(*scan, fold)
    assert not harm.exists()
    torch.load(fold / "model.pt", weights_only=False)
    assert harm.exists()  # the file was one that does harm


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda s: dict([*s.items()][1:]), "these are not weights of quick .*: fetch .*Missing .*0.weight"),
        (lambda s: {**s, "head.bias": torch.zeros(2)}, "Unexpected key.*head.bias"),
        (lambda s: models.build("tiny", 2).state_dict(), "they fit tiny: name that .*Missing .*Unexpected"),
        (lambda s: quick(3).state_dict(), r"mismatch for 5.weight: .* shape .*\[3, 8\].* shape .*\[2, 8\]"),
        (lambda s: {**s, "0.weight": s["0.weight"] * np.nan}, "0.weight holds NaN or infinity"),
        (lambda s: {**s, "0.weight": s["0.weight"].int()}, "0.weight is of type torch.int32"),
        (
            lambda s: {k: v.int() if "running_mean" in k else v for k, v in s.items()},
            "running_mean is of type",
        ),
        (lambda s: {**s, "epoch": 3}, "more than named tensors: 'epoch' is of type int; ask for a plain"),
        (lambda s: list(s.values()), "more than named tensors: 'list'"),
        (lambda s: {k: v * 0 - 1 if "running_var" in k else v for k, v in s.items()}, "are NaN"),
        (lambda s: b"", "is refused: it is empty; no code in it was run; fetch the file again"),
        (lambda s: b"version https://git-lfs.github.com/spec/v1\noid", "is a Git LFS pointer .`git lfs pull"),
        (lambda s: b"<!DOCTYPE html>", "cannot be read as plain tensors"),
    ],
)
def test_weights_that_do_not_fit_are_refused_with_file_and_key(fold, scan, damage, message, monkeypatch):
    monkeypatch.setattr(models, "MODELS", {name: models.MODELS[name] for name in ("quick", "tiny")})
    damaged = damage(torch.load(fold / "model.pt", weights_only=True))
    if isinstance(damaged, bytes):
        (fold / "model.pt").write_bytes(damaged)
    else:
        torch.save(damaged, fold / "model.pt")
    with pytest.raises(PredictError, match=rf"fold0/model\.pt.*{message}"):
        predict.predict(*scan if "are NaN" in message else ("no", "scan"), fold)


@pytest.fixture
def bare(tmp_path, monkeypatch):
    """Where to put bare weights, of a network that takes no time."""
    monkeypatch.setitem(models.MODELS, "densenet121", quick)
    return tmp_path / "weights.pt"


@pytest.mark.parametrize("outputs", [1, 2, 3])
def test_bare_weights_in_any_wrapping_give_torchs_own_probabilities(bare, scan, outputs):
    network = quick(outputs).eval()
    state, how = network.state_dict(), Preprocessing(40, 2.0, "zscore", "canonical")
    torch.save(state, bare)
    result = predict.predict(*scan, bare, how=how)
    x = torch.from_numpy(to_cube(np.asanyarray(load_roi(*scan, how=how).dataobj), 40, "zscore")).float()
    with torch.inference_mode():
        logits = network(x[None, None])[0]
    expected = logits.softmax(0) if outputs > 1 else torch.cat([(-logits).sigmoid(), logits.sigmoid()])
    classes = ["no risk", "low risk", "high risk"] if outputs == 3 else ["not high risk", "high risk"]
    assert result.folds.columns.tolist() == ["model", "weights", *classes]
    np.testing.assert_allclose(result.folds[classes].to_numpy(float)[0], expected, atol=1e-6)
    (warning,) = result.warnings
    assert "the models' training cases are unknown" in warning
    uncounted = {key: value for key, value in state.items() if "num_batches" not in key}
    for same in (
        {f"module._orig_mod.{key}": value for key, value in state.items()},
        {"epoch": 3, "state_dict": state},
        {"model": {key: value.double() for key, value in uncounted.items()}},
    ):
        torch.save(same, bare)
        pd.testing.assert_frame_equal(predict.predict(*scan, bare, how=how).folds, result.folds)


def test_a_resnet50_of_one_output_is_loaded_and_told_from_the_other_networks(bare):
    state = models.build("resnet50", 1).state_dict()
    torch.save(state, bare)
    loaded = load(find(bare, network="resnet50")[0])
    assert not loaded.training and loaded.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[key]) for key, value in loaded.state_dict().items())
    with pytest.raises(PredictError, match=r"not weights of densenet121 .*; they fit resnet50: name that"):
        load(find(bare)[0])


def test_bare_weights_that_are_no_classifier_or_of_another_network_are_refused(bare, arm, scan):
    for state, found in (({"out.weight": torch.zeros(4, 8)}, "out.weight, has 4"), ({}, "none, has 0")):
        torch.save(state, bare)
        with pytest.raises(PredictError, match=f"its last linear layer, {found} outputs"):
            predict.predict(*scan, bare)
    with pytest.raises(PredictError, match=r"no finished run .*; give its files: .*weights\.pt"):
        predict.predict(*scan, bare.parent)
    with pytest.raises(PredictError, match="has the network quick, not resnet34; leave out --network"):
        predict.predict(*scan, arm, network="resnet34")
    with pytest.raises(ValueError, match=r"unknown model 'vgg': choose one of .*densenet121"):
        predict.predict(*scan, bare, network="vgg")


@pytest.fixture
def many(tmp_path):
    """Folders of images and masks: three good cases, and one of each kind that cannot be used."""
    folders = [tmp_path / name for name in ("images", "masks")]
    for folder in folders:
        folder.mkdir()
    for k, case in enumerate(["EMC_1", "EMC_2", "007", "broken", "bare", "lost", "twice"]):
        for path, folder in zip(map(Path, write_scan(tmp_path, case, k % 3)), folders, strict=True):
            path.rename(folder / f"{case}.nii.gz")
    (folders[0] / "EMC_2.nii.gz").rename(folders[0] / "emc_2_0000.nii.gz")  # nnU-Net's spelling
    os.truncate(folders[0] / "broken.nii.gz", 500)
    (folders[1] / "bare.nii.gz").unlink()
    (folders[0] / "lost.nii.gz").unlink()
    shutil.copy(folders[0] / "twice.nii.gz", folders[0] / "twice_0000.nii.gz")
    return folders


ERRORS = {
    "bare": "bare: no mask files in .*masks; give it one",
    "broken": "broken: .*broken.nii.gz cannot be read",
    "lost": "lost: no image files in .*images; give it one",
    "twice": "twice: 2 image files in .*images; give it one",
}


def test_scans_of_a_folder_get_the_bits_they_get_alone(arm, many, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(predict, "PIECE", 2)
    asked = ["predict", str(many[0]), "--mask", str(many[1]), "--device", "cpu", "--models", str(arm)]
    asked += ["--table", str(tmp_path / "table.csv")]
    assert cli.main(asked) == 1
    printed, scans = capsys.readouterr().out, unlabelled(*many)
    assert "3 of 7 scans predicted, 0 with warnings; 4 cannot be used" in printed
    assert all(re.search(f"\nerror: {text}", printed) for text in ERRORS.values())
    assert re.search(r"\n\| 007 +\| +0\.\d{3} \|", printed) and printed.rstrip().endswith(predict.NOTICE)
    table = pd.read_csv(tmp_path / "table.csv", dtype=str, keep_default_na=False)
    assert table["case_id"].tolist() == ["007", "bare", "broken", "EMC_1", "emc_2", "lost", "twice"]
    numbers = [f"{of} {name}" for of in ("mean", "std") for name in ("not high risk", "high risk")]
    assert table.columns.tolist() == ["case_id", "image", *numbers, "warnings", "error"]
    for row, scan in zip(table.to_dict("records"), scans.itertuples(), strict=True):
        if row["case_id"] in ERRORS:
            assert re.match(ERRORS[row["case_id"]], row["error"])
            assert {row[name] for name in numbers} == {""}
        else:
            alone = predict.table(predict.predict(scan.image, scan.mask, arm)).iloc[-2:, 1:]
            assert [float(row[name]) for name in numbers] == alone.to_numpy().ravel().tolist()
    assert table["mean high risk"].nunique() == 4  # three, and none
    assert cli.main(asked) == 1  # an existing file is kept
    assert "table.csv exists, or its folder does not" in capsys.readouterr().err
    assert cli.main([*asked[:-2], "--picture", "x.png"]) == 1
    assert "--picture draws one scan" in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    assert cli.main([*asked[:3], str(tmp_path / "empty"), *asked[4:-2]]) == 1
    assert "0 of 6 scans predicted, 0 with warnings; 6 cannot be used" in capsys.readouterr().out


def test_a_manifest_without_labels_is_enough(arm, many, tmp_path, capsys):
    (tmp_path / "new.csv").write_text(
        "image,mask,case_id,modality\n"
        "images/EMC_1.nii.gz,masks/EMC_1.nii.gz,NYU00,T2\nimages/007.nii.gz,masks/007.nii.gz,a,t1\n"
        "images/gone.nii.gz,,,\nimages/007.nii.gz,,b,\nimages/007.nii.gz,,B,\n"
    )
    scans = unlabelled(tmp_path / "new.csv")
    known, other, *failed = predict.by_case(scans, predict.predict_each(scans, arm)).to_dict("records")
    assert known["warnings"].startswith("not an independent test: it was a case of these models")
    assert other["warnings"] == "its modality is t1, but the models' is t2"
    for row, words in zip(failed, ("row 4: no image .*gone", "b is given", "B is given"), strict=True):
        assert re.search(words, row["error"]) and np.isnan(row["mean high risk"])
    assert cli.main(["predict", str(tmp_path / "new.csv"), "--models", str(arm), "--device", "cpu"]) == 1
    assert "NYU00: not an independent test" in capsys.readouterr().out


def test_scans_that_cannot_be_listed_are_explained(many, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "new.csv").write_text("image\nimages/007.nii.gz\n")
    for given, words in (
        ((tmp_path / "empty",), "empty: holds no scan: give an image, a folder"),
        ((many[0], many[1] / "007.nii.gz"), "is no folder: give the folder of the masks"),
        ((tmp_path / "new.csv", many[1]), "name the masks in its column `mask`"),
        ((tmp_path / "nowhere.csv",), "no such file"),
    ):
        with pytest.raises(CohortError, match=words):
            unlabelled(*given)


def test_a_clean_roi_without_a_mask_is_predicted_like_the_image_with_its_mask(arm, scan, tmp_path):
    nib.save(load_roi(*scan), tmp_path / "roi.nii.gz")
    one, two = predict.predict(*scan, arm), predict.predict(tmp_path / "roi.nii.gz", None, arm)
    pd.testing.assert_frame_equal(one.folds, two.folds)


def test_a_scan_is_judged_as_in_a_cohort_and_what_is_in_doubt_is_said(arm, tmp_path):
    image, mask = write_scan(tmp_path, "EMC7", affine=np.diag([15.0, 12, 6, 1]))
    (warning,) = predict.predict(image, None, arm).warnings
    assert warning.startswith("EMC7.nii.gz: size of the ROI: it is 360 mm long") and ";" in warning
    assert predict.predict(image, mask, arm).warnings == ()  # 12 voxels of 15 mm
    nib.save(nib.Nifti1Image(np.zeros((24, 20, 8), np.uint8), AFFINE), mask)
    with pytest.raises(ScanError, match=r"EMC7: .* is an empty mask; draw the pancreas"):
        predict.predict(image, mask, arm)


def test_scans_are_preprocessed_as_those_that_the_models_were_trained_on(arm, fold, scan):
    change_settings(fold, spacing=2.0, intensity="zscore", orientation="canonical")
    how = Preprocessing(32, 2.0, "zscore", "canonical")
    result = predict.predict(*scan, fold)
    assert (result.how, result.axes) == (how, "LAS")
    network = load(find(fold)[0])
    cube = to_cube(np.asanyarray(load_roi(*scan, how=how).dataobj), 32, "zscore")
    with torch.inference_mode():
        expected = network(torch.from_numpy(cube)[None, None].float()).softmax(1)[0]
    np.testing.assert_allclose(predict.table(result).iloc[0, 1:].astype(float), expected, atol=1e-6)
    pd.testing.assert_frame_equal(predict.predict(*scan, fold, how=how).folds, result.folds)
    with pytest.raises(PredictError, match=r"trained with .* 2 mm, .* not .*; leave out --size"):
        predict.predict(*scan, fold, how=Preprocessing(32))
    assert not result.folds.equals(predict.predict(*scan, arm / "fold0").folds)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "run.json").unlink(), "fold0 holds no finished run"),
        (lambda f: (f / "run.json").write_text("{"), r"run.json cannot be read as a run or bundle"),
        (lambda f: change_settings(f, task="four"), "cannot be read as a run.*four"),
        (lambda f: (f / "model.pt").unlink(), r"model\.pt: no such file"),
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
    assert cli.main([*asked, str(arm), "--spacing", "0"]) == 1
    assert "spacing: " in capsys.readouterr().err
    assert cli.main([*asked, "nowhere"]) == 1
    assert capsys.readouterr().err.startswith("ipmn: nowhere: no such folder or file")
