from pathlib import Path

import pytest
import yaml

from ipmn_core import params
from ipmn_core.params import Params, ParamsError

PROFILES = sorted((Path(__file__).parents[1] / "params").glob("*.yaml"))


@pytest.mark.parametrize("path", PROFILES, ids=lambda path: path.stem)
def test_every_profile_is_whole_and_named_after_its_file(path):
    p = params.load(path)
    assert p.profile == path.stem
    assert set(yaml.safe_load(path.read_text())) == set(Params.model_fields)


def test_the_paper_profile_is_the_protocol_and_the_schema_defaults_agree():
    p = params.load(next(path for path in PROFILES if path.stem == "paper"))
    assert (p.size, p.epochs, p.rounds, p.local_epochs, p.batch_size) == (96, 100, 100, 1, 16)
    assert (p.lr, p.weight_decay, p.lr_step, p.lr_gamma, p.augment_prob) == (1e-3, 0.01, 30, 0.1, 0.1)
    assert (p.three_class_folds, p.binary_folds, p.fold_rule) == (5, 4, "center")
    assert len(p.three_class_models) == 5 and p.arms[:4] == (
        "centralized",
        "fedavg",
        "fedprox_0.1",
        "fedprox_0.3",
    )
    assert p.modalities == ("t1", "t2") and p.inner_validation == 0
    assert p.max_per_cell is None and p.batches_per_epoch is None and p.epochs_by_model == {}
    assert p.data != "phantom" and p.precision == "float32"
    assert p.model_dump(exclude={"data"}) == Params().model_dump(exclude={"data"})


def test_an_unknown_setting_is_named_with_the_known_ones():
    with pytest.raises(ParamsError, match=r"epoch: unknown setting; known are profile.*epochs"):
        params.validate({"epoch": 3}, "a.yaml")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("lr", "1e-3"),
        ("epochs", "4"),
        ("epochs", 4.0),
        ("epochs", True),
        ("epochs", 0),
        ("size", 16),
        ("batch_size", 1),
        ("modalities", ["t3"]),
        ("modalities", "t1"),
        ("modalities", []),
        ("three_class_models", ["densenet121", "densenet121"]),
        ("profile", "../demo"),
        ("profile", "demo\n"),
        ("profile", "x" * 101),
        ("outputs", "out\0puts"),
        ("data", ""),
        ("profile", 7),
        ("seed", -1),
        ("seed", 2**32),
        ("device", "gpu"),
        ("fold_rule", "random"),
        ("lr_gamma", 1.5),
        ("checkpoint_seconds", "false"),
        ("checkpoint_seconds", float("inf")),
        ("augment_prob", float("nan")),
        ("epochs_by_model", {1: 2}),
    ],
)
def test_a_value_of_the_wrong_kind_is_refused_by_its_key(key, value):
    with pytest.raises(ParamsError, match=rf"(?m)^  {key}"):
        params.validate({key: value}, "a.yaml")


def test_exponents_that_yaml_reads_as_text_get_a_hint(tmp_path):
    (tmp_path / "a.yaml").write_text("lr: 1e-3\n")
    with pytest.raises(ParamsError, match=r"lr: .*1\.0e-3"):
        params.load(tmp_path / "a.yaml")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- 1\n", "expected lines"),
        ("a: [1\n", "not valid YAML"),
        ("", "expected lines"),
        ("data: 2001-99-99", "not valid YAML"),
        ("data: !!timestamp x", "not valid YAML"),
        (f"seed: {'9' * 5000}", "not valid YAML"),
        (f"arms: {'[' * 1000}", "not valid YAML"),
        ("epochs: 2\nsize: 32\nepochs: 3", "epochs stands there twice; keep one"),
        ("1: 2", "1: unknown setting; known are"),
        ("? [a]\n: 2", "not valid YAML"),
    ],
)
def test_a_file_that_is_no_profile_is_refused_by_name(tmp_path, text, message):
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(ParamsError, match=rf"(?s)a\.yaml.*{message}"):
        params.load(tmp_path / "a.yaml")


def test_a_missing_file_says_where_profiles_lie(tmp_path):
    with pytest.raises(ParamsError, match=r"no such file.*params/"):
        params.load(tmp_path / "none.yaml")


def test_every_fault_is_listed_at_once():
    with pytest.raises(ParamsError, match=r"(?s)2 setting.*epochs.*wrong"):
        params.validate({"epochs": "x", "wrong": 1}, "a.yaml")


def test_a_notebook_gives_its_variables_and_hears_what_is_missing():
    variables = {**Params().model_dump(), "modalities": ["t1"], "np": object()}
    assert params.from_notebook(variables).modalities == ("t1",)
    del variables["epochs"]
    with pytest.raises(ParamsError, match="epochs"):
        params.from_notebook(variables)


@pytest.mark.parametrize("name", ["phantom", "cache", "reference", "Cache"])
def test_a_profile_may_not_take_a_folder_that_is_there(name):
    with pytest.raises(ParamsError, match=f"profile: {name} is a folder"):
        params.validate({"profile": name}, "a.yaml")
