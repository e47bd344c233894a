import json
import os
import shutil
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
import torch
from huggingface_hub import ModelCard
from monai.bundle import ConfigParser
from small_runs import AFFINE, change_settings, quick, train_small, write_scan

from ipmn_core import bundle, cli, metrics, models, predict
from ipmn_core.data import load_roi, to_cube
from ipmn_core.metrics import inference
from ipmn_core.params import Preprocessing
from ipmn_core.runs.trained import METADATA, PredictError, Trained, find, load, probabilities

OTHER = Preprocessing(32, 3.0, "zscore", "canonical")  # of the scan's slices of 6 mm every second is a tie
RUN = ["-m", "monai.bundle", "run", "--config_file", "configs/inference.json", "--bundle_root", "."]
REQUIRED = {"schema", "version", "monai_version", "pytorch_version", "numpy_version", "task", "description"}
REQUIRED |= {"required_packages_version", "authors", "copyright", "network_data_format"}  # by MONAI's schema


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """As `train_small`, with its network registered; not to be changed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(models.MODELS, "quick", quick)
        yield train_small(tmp_path_factory.getbasetemp() / "small_runs")


def exported(trained, folder, network, how):
    """The bundle of an arm whose two folds have random weights of another network."""
    arm = Path(shutil.copytree(trained[0] / "binary" / "t2" / "centralized", folder / "centralized"))
    for k in (0, 1):
        change_settings(arm / f"fold{k}", model=network, **asdict(how))
        torch.save(models.build(network, 2, seed=k).state_dict(), arm / f"fold{k}" / "model.pt")
    return bundle.export(arm, folder / "bundle")


def parsed(config, **given):
    parser = ConfigParser(config | given)
    parser.parse()
    return parser.get_parsed_content


def assert_same_of_the_same_cube(target):
    config = json.loads((target / "configs" / "inference.json").read_text())
    x = torch.rand(1, 32, 32, 32, generator=torch.Generator().manual_seed(0))
    ours = [probabilities(load(one), x[None], one.weights)[0] for one in find(target)]
    found = parsed(config, bundle_root=str(target), device="cpu")("predict")(x)
    np.testing.assert_allclose(found, ours, atol=1e-6)
    assert np.ptp(ours, axis=0).max() > 1e-3  # the folds differ


@pytest.mark.parametrize("how", [OTHER, pytest.param(Preprocessing(32), marks=pytest.mark.slow)])
def test_monai_alone_gives_the_probabilities_of_predict(trained, tmp_path, how):
    (tmp_path / "ipmn_core.py").write_text("raise ImportError('nothing of this package is here')")
    scan, other = write_scan(tmp_path, "EMC77"), write_scan(tmp_path, "EMC78", 2)
    target = exported(trained, tmp_path, "densenet121", how)
    command = [sys.executable, *RUN, "--image", scan[0], "--mask", scan[1]]
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    said = subprocess.check_output(command, cwd=target, env=environment, text=True)
    found = (target / "eval" / "probabilities.json").read_text()
    assert found in said
    found = pd.DataFrame(json.loads(found)).T
    tables = [predict.table(predict.predict(*s, target)) for s in (scan, other)]
    ours, of_other = (table.set_index("model")[:3] for table in tables)
    assert list(found.index) == ["fold0", "fold1", "mean"] and list(found) == list(ours)
    apart = np.abs(found.to_numpy() - ours).to_numpy().max()
    assert apart < 1e-3 and apart < np.abs(ours - of_other).to_numpy().max() / 20  # not one answer for all
    assert_same_of_the_same_cube(target)


@pytest.mark.parametrize("network", ["quick", pytest.param("shufflenetv2", marks=pytest.mark.slow)])
def test_a_network_that_monai_lacks_is_torchscript(trained, tmp_path, network):
    assert_same_of_the_same_cube(exported(trained, tmp_path, network, OTHER))


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("spacing", [None, 1.0, 2.9, 3.0, 3.1])
@pytest.mark.parametrize("rest", [("minmax", "stored"), ("zscore", "canonical"), ("none", "stored")])
def test_its_transforms_make_the_cubes_of_this_package(tmp_path, whole, spacing, rest):
    how = Preprocessing(32, spacing, *rest)
    affine = np.diag([-2.8998, 2.8998, 2.8998, 1]) if spacing == 2.9 else AFFINE  # as good as 2.9 mm
    image, mask = write_scan(tmp_path, "EMC77", affine=affine)
    for path in (image, mask):  # the mask touches the last slices
        stored = nib.load(path).slicer[:17, :15, :7]
        values = 253 * stored.get_fdata() + 1 if path == mask else stored.get_fdata()  # a mask of 1 and 254
        nib.save(nib.Nifti1Image(values.astype(np.float32), stored.affine), path)
    given = {"image": image, "mask": mask} if whole else {"image": str(tmp_path / "roi.nii.gz")}
    nib.save(load_roi(image, mask), tmp_path / "roi.nii.gz")
    ours = to_cube(np.asanyarray(load_roi(*given.values(), how=how).dataobj), 32, how.intensity)
    config = bundle.inference_config(Trained(Path(), "densenet121", "binary", ("no", "yes"), how), [0])
    found = parsed(config, device="cpu", **given)("dataset")[0]["image"]
    np.testing.assert_allclose(found[0], ours.astype(np.float32), rtol=2**-10, atol=2**-11)  # float16


def test_names_that_monai_would_read_as_ids_or_run():
    of = Trained(Path(), "quick", "binary", ("grade #2", "it's @home"), OTHER)
    assert parsed(bundle.inference_config(of, [0]))("classes") == ["grade #2", "it's @home"]
    with pytest.raises(PredictError, match=r"would run the name '\$x'"):
        bundle.inference_config(Trained(Path(), "quick", "binary", ("$x", "y"), OTHER), [0])


@pytest.mark.parametrize("name", ["densenet121", "resnet34", "resnet50", "efficientnetb0"])
def test_monai_builds_the_networks_of_this_package(name):
    config = bundle.inference_config(Trained(Path(), name, "binary", ("a", "b", "c"), OTHER), [0])
    with torch.device("meta"):
        theirs, ours = parsed(config)("network_def").state_dict(), models.MODELS[name](3).state_dict()
    assert {key: v.shape for key, v in theirs.items()} == {key: v.shape for key, v in ours.items()}


@pytest.mark.parametrize(("arm", "center"), [("centralized", None), ("local_only", "AHN")])
def test_a_bundle_predicts_and_warns_as_the_runs_do_and_names_no_case(trained, tmp_path, arm, center):
    root, scans = trained
    runs, target = root / "binary" / "t2" / arm, tmp_path / "bundle"
    with pytest.raises(PredictError, match=r"one model (per center: choose `center` of NYU, AHN|for all)"):
        bundle.export(runs, target, None if center else "AHN")
    assert not list(tmp_path.iterdir())  # a failed export leaves nothing
    asked = ["export", str(runs), str(target), *(["--center", center] if center else [])]
    assert cli.main(asked) == 0 and cli.main(asked) == 1
    scan = scans.set_index("case_id").loc["AHN04", ["image", "mask"]]
    of_runs, of_bundle = predict.predict(*scan, runs, center), predict.predict(*scan, target)
    pd.testing.assert_frame_equal(predict.table(of_runs), predict.table(of_bundle))
    assert of_runs.warnings == of_bundle.warnings != ()
    one = predict.predict(*scan, target / "models" / "fold1.pt").folds  # a file of a bundle is of the bundle
    pd.testing.assert_frame_equal(one, of_bundle.folds[1:].reset_index(drop=True))
    assert predict.predict(*write_scan(tmp_path, "EMC77"), target).warnings == ()
    files = {str(p.relative_to(target)): p.read_bytes() for p in target.rglob("*") if p.is_file()}
    weights = {f"models/fold{k}.{kind}" for k in (0, 1) for kind in ("pt", "ts")}
    configs = {"configs/metadata.json", "configs/inference.json"}
    assert set(files) == weights | configs | {"docs/README.md", "docs/splits.csv"}
    assert not any(case.encode() in content for case in scans["case_id"] for content in files.values())
    splits = pd.read_csv(target / "docs" / "splits.csv")
    assert len(splits) == 2 * (12 if center else 24)
    assert all(part["case_sha256"].is_monotonic_increasing for _, part in splits.groupby("fold"))


def edit(bundle, name, old, new):
    text = (bundle / name).read_text()
    assert old in text
    (bundle / name).write_text(text.replace(old, new))


DAMAGES = {
    r"fold1\.pt.* `ipmn\.sha256\.mod": lambda b: shutil.copy(b / "models/fold0.pt", b / "models/fold1.pt"),
    r"`ipmn\.sha256\.configs/infer": lambda b: edit(b, "configs/inference.json", '"minmax"', '"none"'),
    r"models/fold0\.ts is not the file of": lambda b: (b / "models/fold0.ts").unlink(),
    r"cannot be read .*models/fold1\.pt": lambda b: edit(b, METADATA, '"models/fold1.pt"', '"x"'),
    r"`ipmn` in .* was changed": lambda b: edit(b, METADATA, '"size": 32', '"size": 40'),
    r"give its files: .*fold0\.pt": lambda b: edit(b, METADATA, '"ipmn": {', '"other": {'),
}


@pytest.mark.parametrize("message", DAMAGES)
def test_a_bundle_that_was_changed_is_refused_with_file_and_key(trained, tmp_path, message):
    target = bundle.export(trained[0] / "binary" / "t2" / "centralized", tmp_path / "bundle")
    DAMAGES[message](target)
    with pytest.raises(PredictError, match=message):
        find(target)


def test_folds_that_do_not_make_an_arm_are_not_exported(trained, tmp_path):
    arm = Path(shutil.copytree(trained[0] / "binary" / "t2" / "centralized", tmp_path / "arm"))
    with pytest.raises(PredictError, match="holds no run; an export needs"):
        bundle.export(bundle.export(arm, tmp_path / "bundle"), tmp_path / "again")
    change_settings(arm / "fold1", lr=0.5)
    with pytest.raises(PredictError, match=r"fold0 and .*fold1 differ in lr"):
        bundle.export(arm, tmp_path / "again")


def rows(text, first):
    """The cells of the table rows whose first cell is `first`."""
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if "|" in line]
    return [row for row in cells if row[0] == first]


def test_the_card_and_the_metadata_say_what_the_runs_say(trained, tmp_path):
    arm = Path(shutil.copytree(trained[0] / "binary" / "t2" / "centralized", tmp_path / "arm"))
    target = bundle.export(arm, tmp_path / "bundle")
    text = (target / "docs" / "README.md").read_text()
    assert ModelCard(text).data.license == "cc-by-nc-4.0" and "phy710/Cyst-X" in text
    assert predict.NOTICE in text and "optimistic" in text and "`size` 32 (paper: 96)" in text
    selected = metrics.select(pd.concat(pd.read_parquet(p) for p in arm.glob("fold*/predictions.parquet")))
    for row in inference.intervals(selected).itertuples():
        auc = f"{row.auc:.3f} ({row.auc_low:.3f} to {row.auc_high:.3f})"
        acc = f"{row.acc:.3f} ({row.acc_low:.3f} to {row.acc_high:.3f})"
        assert [row.center, str(row.n), str(row.positives), auc, acc, row.undefined] in rows(text, row.center)
    for k, part in selected.groupby("fold"):
        acc = ((part["prob_1"] > 0.5) == part["y_true"]).mean()
        (row,) = rows(text, f"fold {k} (epoch {part['epoch'].iloc[0]})")
        assert row[1:3] == ["12", "4"] and row[4].startswith(f"{acc:.3f} (")
    roles = [pd.read_csv(arm / f"fold{k}" / "splits.csv").query("center == 'NYU'")["role"] for k in (0, 1)]
    counted = [" / ".join(str((of == x).sum()) for x in ("train", "validation", "test")) for of in roles]
    assert ["NYU", *counted] in rows(text, "NYU")
    metadata = json.loads((target / METADATA).read_text())
    assert all(metadata[key] for key in REQUIRED)
    assert metadata["network_data_format"]["outputs"]["pred"]["channel_def"]["1"] == "high risk"
    for name, of in metadata["ipmn"]["sha256"].items():
        assert [name, of] in rows(text, name)
    record = json.loads((arm / "fold0" / "run.json").read_text())
    (arm / "fold0" / "run.json").write_text(json.dumps(record | {"cohort": "phantom"}))
    shutil.rmtree(arm / "fold1")
    text = (bundle.export(arm, tmp_path / "one") / "docs" / "README.md").read_text()
    assert ModelCard(text).data.license == "mit"
    assert "1 of 2 folds are here" in text and "results say nothing" in text
