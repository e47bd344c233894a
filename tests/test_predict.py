import functools
import json
import pickle
import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
import torch
from monai.networks.nets import DenseNet121
from test_runs import profile

from ipmn_core import cli, metrics, models, predict, runs
from ipmn_core.data import ScanError, load_cubes, load_roi, to_cube
from ipmn_core.runs import trained as trained_models
from ipmn_core.runs.trained import PredictError

AFFINE = np.array([[-1.4, 0, 0, 90], [0, 1.2, 0, -60], [0, 0, 6.0, 30], [0, 0, 0, 1]], float)


def write_scan(folder, name, label=0, affine=AFFINE):
    """The files of an image, brighter with higher risk, and its mask."""
    rng = np.random.default_rng(sum(name.encode()))
    image, mask = rng.gamma(2, 100, (24, 20, 8)).astype(np.float32), np.zeros((24, 20, 8), np.uint8)
    mask[5:17, 4:15, 2:7] = rng.random((12, 11, 5)) < 0.6
    mask[5:17, 4:15, 5] = 1  # the widest slice
    paths = [str(folder / f"{name}{suffix}.nii.gz") for suffix in ("", "_mask")]
    for path, data in zip(paths, (image + 300 * label * (rng.random(image.shape) < 0.5), mask), strict=True):
        nib.save(nib.Nifti1Image(data, affine), path)
    return paths


def quick_to_settle(n_classes):
    """A ShuffleNet-V2 whose BatchNorm forgets its start at once, so that two epochs tell cases apart."""
    network = models.shufflenetv2(n_classes)
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm3d):
            module.momentum = 1.0
    return network


@functools.cache  # test_card.py asks for the same
def train_small(folder):
    """The runs' folder and the scans (12 of each of two centers) that they were trained and tested on."""
    rows = []
    folder.mkdir()
    for center in ("NYU", "AHN"):
        for k in range(12):
            name = f"{center}{k:02d}"
            rows.append((name, name, center, "t2", k % 3, *write_scan(folder, name, k % 3)))
    columns = ["case_id", "patient_id", "center", "modality", "label", "image", "mask"]
    scans = pd.DataFrame(rows, columns=columns)
    small = {"three_class_models": ["shufflenetv2"], "arms": ["centralized", "local_only"]}
    p = profile(folder, modalities=["t2"], inner_validation=0.3, **small)
    cubes = load_cubes(scans, p.size, folder / "cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(models.MODELS, "shufflenetv2", quick_to_settle)
        runs.train(p, ["binary", "three_class"], scans, cubes)
    return p.folder / "runs", scans


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """As `train_small`; not to be changed."""
    return train_small(tmp_path_factory.getbasetemp() / "small_runs")


@pytest.fixture
def fold(trained, tmp_path):
    """A copy of one run, to be damaged."""
    return Path(shutil.copytree(trained[0] / "binary" / "t2" / "centralized" / "fold0", tmp_path / "fold0"))


@pytest.fixture
def scan(tmp_path):
    """Image and mask of a case that no run has seen."""
    return write_scan(tmp_path, "EMC_01_002")


def change_settings(folder, **settings):
    record = json.loads((folder / "run.json").read_text())
    record["settings"] |= settings
    (folder / "run.json").write_text(json.dumps(record))
    return folder


@pytest.mark.parametrize(
    "arm", ["binary/t2/centralized", "binary/t2/local_only", "three_class/t2/shufflenetv2"]
)
def test_a_runs_own_test_case_gets_the_probability_that_the_run_stored(trained, arm):
    root, scans = trained
    for k in (0, 1):
        stored = metrics.select(pd.read_parquet(root / arm / f"fold{k}" / "predictions.parquet"))
        assert np.ptp(stored["prob_1"]) > 1e-2  # or any case would do for any other
        for row in stored.groupby("center").head(2).to_dict("records"):
            scan = scans.set_index("case_id").loc[row["case_id"]]
            center = row["center"] if "local" in arm else None
            result = predict.predict(scan["image"], scan["mask"], root / arm / f"fold{k}", center)
            prob = result.folds.drop(columns=["model", "weights"]).to_numpy()[0]
            # the run predicted in batches and channels-last, which round otherwise
            np.testing.assert_allclose(prob, [row[f"prob_{c}"] for c in range(len(prob))], atol=1e-5)


def test_an_arm_gives_a_row_a_fold_then_their_mean_and_deviation(trained, scan):
    root, _ = trained
    arm = root / "three_class" / "t2" / "shufflenetv2"
    result = predict.predict(*scan, arm)
    table = predict.table(result)
    assert list(table["model"]) == ["shufflenetv2 fold 0", "shufflenetv2 fold 1", "mean", "std"]
    assert list(table.columns[1:]) == ["no risk", "low risk", "high risk"]
    one, two, mean, std = table.drop(columns="model").to_numpy(float)
    np.testing.assert_allclose(one.sum(), 1, atol=1e-6)  # softmax in float32
    np.testing.assert_allclose(mean, (one + two) / 2)
    np.testing.assert_allclose(std, abs(one - two) / 2)  # ddof = 0
    assert (std > 0).all()
    assert (result.case, result.modality, result.size) == ("EMC_01_002", "t2", 32)
    again = predict.predict(*scan, [arm / "fold0", str(arm / "fold1" / "model.pt"), arm])
    pd.testing.assert_frame_equal(predict.table(again), table)  # the same bits, each model once


def test_a_prediction_says_what_the_models_used_the_case_for(trained, scan):
    root, scans = trained
    arm = root / "binary" / "t2" / "centralized"
    roles = [pd.read_csv(arm / f"fold{k}" / "splits.csv").set_index("case_id")["role"] for k in (0, 1)]
    said = {
        "train": "was trained on by",
        "validation": "held out of the training of",
        "test": "was a test case",
    }
    for case in ("NYU00", "AHN05", "AHN11"):
        image, mask = scans.set_index("case_id").loc[case, ["image", "mask"]]
        warnings = predict.predict(image, mask, arm).warnings
        expected = {(said[roles[k][case]], f"centralized fold {k}") for k in (0, 1)}
        assert len(warnings) == len({text for text, _ in expected})
        for text, name in expected:
            assert any(w.startswith(f"{case} ") and text in w and name in w for w in warnings)
    assert predict.predict(*scan, arm).warnings == ()
    image, mask = scans.set_index("case_id").loc["NYU00", ["image", "mask"]]
    by_name = predict.predict(*scan, arm, case="nyu00").warnings  # sheets and files differ in case
    assert by_name == tuple(w.replace("NYU00", "nyu00") for w in predict.predict(image, mask, arm).warnings)


def test_a_centers_own_model_was_not_trained_on_another_centers_case(trained):
    root, scans = trained
    arm = root / "binary" / "t2" / "local_only"
    image, mask = scans.set_index("case_id").loc["NYU03", ["image", "mask"]]
    assert predict.predict(image, mask, arm, "NYU").warnings
    assert predict.predict(image, mask, arm, "AHN").warnings == ()


@pytest.mark.parametrize("center", [None, "EMC", "NYU."])
def test_one_model_a_center_needs_a_center_that_it_holds(trained, scan, center):
    arm = trained[0] / "binary" / "t2" / "local_only"
    with pytest.raises(PredictError, match=r"one model a center: choose `center` of NYU, AHN"):
        predict.predict(*scan, arm, center)


def test_a_center_is_refused_where_one_model_is_for_all(trained, scan):
    with pytest.raises(PredictError, match="one model for all centers; leave out center NYU"):
        predict.predict(*scan, trained[0] / "binary" / "t2" / "centralized", "NYU")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"task": "three_class"}, "more than one task: .*fold1.* has binary, .*fold0.* three_class"),
        ({"modality": "t1"}, "more than one modality: .* has t2, .* t1"),
        ({"size": 48}, "more than one size: .* has 32, .* 48"),
    ],
)
def test_models_of_two_kinds_are_not_averaged(trained, fold, scan, change, message):
    other = trained[0] / "binary" / "t2" / "centralized" / "fold1"
    with pytest.raises(PredictError, match=message):
        predict.predict(*scan, [other, change_settings(fold, **change)])


class Malicious:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize(
    ("save", "load"),
    [
        (torch.save, lambda path: torch.load(path, weights_only=False)),
        (lambda x, path: path.write_bytes(pickle.dumps(x, 2)), lambda path: pickle.loads(path.read_bytes())),
    ],
)
def test_code_in_a_file_of_weights_is_refused_and_not_run(fold, scan, tmp_path, save, load):
    harm = tmp_path / "harm"
    state = torch.load(fold / "model.pt", weights_only=True)
    save({**state, "more": Malicious(harm)}, fold / "model.pt")
    with pytest.raises(PredictError, match=r"model.pt is refused: .*nothing in it was run"):
        predict.predict(*scan, fold)
    assert not harm.exists()
    load(fold / "model.pt")
    assert harm.exists()  # the file was one that does harm


FIRST = "0.0.weight"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda s: {k: v for k, v in s.items() if k != FIRST},
            "0.0.weight is missing; no weights of shufflenetv2",
        ),
        (lambda s: {**s, "head.bias": torch.zeros(2)}, "head.bias is not expected"),
        (lambda s: {**s, FIRST: s[FIRST][:3]}, r"0.0.weight has shape \(3, 1, 3, 3, 3\), expected \(24, 1"),
        (lambda s: {**s, FIRST: s[FIRST].int()}, r"0.0.weight is torch.int32, expected torch.float32"),
        (lambda s: {**s, FIRST: s[FIRST] * np.nan}, "0.0.weight holds NaN or infinity"),
        (
            lambda s: {k: v.to_sparse() if k == FIRST else v for k, v in s.items()},
            "0.0.weight is no dense tensor",
        ),
        (lambda s: {**s, FIRST: [1.0]}, "0.0.weight is no dense tensor"),
        (lambda s: list(s.values()), "holds list, no tensors by name"),
        (lambda s: {}, "holds dict, no tensors by name"),
        (lambda s: {f"x.{k}": v for k, v in s.items()}, r"0.0.weight is missing and \d+ more fault"),
    ],
)
def test_weights_that_do_not_fit_are_refused_with_file_and_key(fold, scan, damage, message):
    torch.save(damage(torch.load(fold / "model.pt", weights_only=True)), fold / "model.pt")
    with pytest.raises(PredictError, match=rf"fold0/model\.pt.*{message}"):
        predict.predict(*scan, fold)


@pytest.mark.parametrize("kept", [0, 100, 0.5, 0.99])
def test_a_truncated_file_of_weights_is_refused(fold, scan, kept):
    content = (fold / "model.pt").read_bytes()
    (fold / "model.pt").write_bytes(content[: kept if kept >= 1 else int(kept * len(content))])
    with pytest.raises(PredictError, match=r"model\.pt (cannot be read as weights|is refused)"):
        predict.predict(*scan, fold)


def test_weights_that_overflow_give_no_probabilities(fold, scan):
    state = torch.load(fold / "model.pt", weights_only=True)
    state = {k: v * 0 - 1 if k.endswith("running_var") else v for k, v in state.items()}  # a root of -1
    torch.save(state, fold / "model.pt")
    with pytest.raises(PredictError, match="its probabilities are not numbers"):
        predict.predict(*scan, fold)


def test_weights_may_be_wrapped_as_others_save_them(tmp_path):
    state = models.build("shufflenetv2", 2).state_dict()
    parallel = {f"module.{key}": value for key, value in state.items()}
    for content in (state, parallel, {"epoch": 3, "state_dict": parallel}, {"model": state}):
        torch.save(content, tmp_path / "weights.pt")
        found = trained_models.weights(tmp_path / "weights.pt")
        assert list(found) == list(state) and all(torch.equal(found[key], state[key]) for key in state)


def test_bare_densenet_weights_predict_as_the_network_they_are_of(tmp_path, scan):
    network = DenseNet121(spatial_dims=3, in_channels=1, out_channels=3).eval()
    torch.save({"state_dict": network.state_dict()}, tmp_path / "weights.pt")
    result = predict.predict(*scan, tmp_path / "weights.pt", size=40)
    cube = to_cube(np.asanyarray(load_roi(*scan).dataobj), 40)
    with torch.inference_mode():
        expected = network(torch.from_numpy(cube)[None, None].float()).softmax(1)[0]
    np.testing.assert_allclose(
        result.folds[["no risk", "low risk", "high risk"]].to_numpy()[0], expected, atol=1e-6
    )
    assert result.warnings == (
        "which cases weights.pt was trained on is not known; if EMC_01_002 was one, this is no test",
    )


@pytest.mark.parametrize("n_classes", [1, 4])
def test_bare_weights_of_another_number_of_classes_are_refused(tmp_path, scan, n_classes):
    torch.save({"out.weight": torch.zeros(n_classes, 8)}, tmp_path / "weights.pt")
    with pytest.raises(PredictError, match=f"its last layer has {n_classes} classes"):
        predict.predict(*scan, tmp_path / "weights.pt")


def test_a_clean_roi_without_a_mask_is_predicted_like_the_image_with_its_mask(trained, scan, tmp_path):
    arm = trained[0] / "binary" / "t2" / "centralized"
    nib.save(load_roi(*scan), tmp_path / "roi.nii.gz")
    one, two = predict.predict(*scan, arm), predict.predict(tmp_path / "roi.nii.gz", None, arm)
    pd.testing.assert_frame_equal(one.folds, two.folds)


def test_a_scan_that_cannot_be_used_is_named_as_everywhere(trained, scan):
    image, mask = scan
    nib.save(nib.Nifti1Image(np.zeros((24, 20, 8), np.uint8), AFFINE), mask)
    with pytest.raises(ScanError, match=r"EMC_01_002: mask .* is empty"):
        predict.predict(image, mask, trained[0] / "binary" / "t2" / "centralized")


def test_a_whole_image_taken_for_an_roi_is_pointed_out(trained, tmp_path):
    image, mask = write_scan(tmp_path, "EMC7", affine=np.diag([15.0, 12, 6, 1]))
    arm = trained[0] / "binary" / "t2" / "centralized"
    (said,) = predict.predict(image, None, arm).warnings
    assert said.startswith("the ROI is 360 mm long")
    assert predict.predict(image, mask, arm).warnings == ()  # 12 voxels of 15 mm


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "run.json").unlink(), "fold0 holds no finished run"),
        (lambda f: (f / "run.json").write_text("{"), r"run.json is damaged or of no network"),
        (lambda f: (f / "run.json").write_text('{"settings": {"model": "shufflenetv2"}}'), "damaged.*task"),
        (lambda f: change_settings(f, model="vgg"), "damaged or of no network.*vgg"),
        (lambda f: (f / "model.pt").unlink(), r"model\.pt: no such file"),
        (lambda f: (f / "splits.csv").write_text("role\n"), r"splits\.csv is damaged"),
        (lambda f: (f / "splits.csv").write_text(""), r"splits\.csv is damaged"),
        (shutil.rmtree, "no such folder or file"),
    ],
)
def test_a_run_that_is_not_whole_is_refused_and_named(fold, scan, damage, message):
    damage(fold)
    with pytest.raises(PredictError, match=message):
        predict.predict(*scan, fold)


def test_a_prediction_needs_a_model_and_a_device_that_is_there(trained, scan):
    with pytest.raises(PredictError, match="no trained model was given"):
        predict.predict(*scan, [])
    with pytest.raises(ValueError, match=r"device: cuda:99 was asked for"):
        predict.predict(*scan, trained[0] / "binary" / "t2" / "centralized", device="cuda:99")
    with pytest.raises(ValueError, match=r"size: .*not 8"):
        predict.predict(*scan, trained[0] / "binary" / "t2" / "centralized", size=8)


def test_the_json_of_a_prediction_says_all_in_plain_values(trained, scan):
    result = predict.predict(*scan, trained[0] / "binary" / "t2" / "local_only", "AHN", case="AHN03")
    said = json.loads(predict.to_json(result))
    assert said["notice"].startswith("Not for clinical use") and said["case"] == "AHN03"
    settings = {"task": "binary", "modality": "t2", "size": 32, "center": "AHN", "device": "cpu"}
    assert said["settings"] == {**settings, "precision": "float32"}
    assert [fold["model"] for fold in said["folds"]] == ["local_only fold 0", "local_only fold 1"]
    high = [fold["high risk"] for fold in said["folds"]]
    assert said["mean"]["high risk"] == pytest.approx(np.mean(high))
    assert said["std"]["high risk"] == pytest.approx(np.std(high))
    assert said["warnings"] == list(result.warnings) and said["warnings"]


def test_the_picture_shows_the_roi_upright_and_every_fold(trained, scan, tmp_path, house_style):
    result, roi = (
        predict.predict(*scan, trained[0] / "binary" / "t2" / "centralized"),
        load_roi(*scan),
    )
    figure = predict.picture(result, roi, tmp_path / "picture.png")
    left, right = figure.axes
    # stored from the patient's right to left (first axis -1.4 mm): shown as stored, the right on the left
    np.testing.assert_array_equal(left.images[0].get_array(), np.asanyarray(roi.dataobj)[:, :, 3].T)
    assert left.get_aspect() == pytest.approx(1.2 / 1.4)
    assert [bar.get_width() for bar in right.patches] == pytest.approx(
        list(predict.over_models(result)["mean"].values())
    )
    assert [sorted(line.get_xdata()) for line in right.lines] == [
        sorted(result.folds[name]) for name in ("not high risk", "high risk")
    ]
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")


def test_the_command_prints_a_table_or_json_and_draws(trained, scan, tmp_path, capsys, house_style):
    arm, png = str(trained[0] / "binary" / "t2" / "centralized"), tmp_path / "case.png"
    asked = ["predict", scan[0], "--mask", scan[1], "--models", arm, "--device", "cpu"]
    result = predict.predict(*scan, arm)
    assert cli.main(asked) == 0
    printed = capsys.readouterr().out
    assert predict.table(result).to_markdown(index=False, floatfmt=".3f") in printed
    assert printed.rstrip().endswith(predict.NOTICE)
    assert cli.main([*asked, "--json", "--picture", str(png)]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads(predict.to_json(result))
    assert png.read_bytes().startswith(b"\x89PNG")


def test_the_command_refuses_in_a_sentence(trained, scan, capsys):
    assert cli.main(["predict", scan[0], "--mask", scan[1], "--models", "nowhere"]) == 1
    assert capsys.readouterr().err.startswith("ipmn: nowhere: no such folder or file; give a run")
