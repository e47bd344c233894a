from pathlib import Path

import pytest
import yaml

from ipmn_core import params
from ipmn_core.names import ARMS, MODELS
from ipmn_core.params import Params, ParamsError

PROFILES = sorted((Path(__file__).parents[1] / "params").glob("*.yaml"))


@pytest.mark.parametrize("path", PROFILES, ids=lambda path: path.stem)
def test_a_profile_is_named_after_its_file_and_lists_only_what_differs_from_the_protocol(path):
    assert params.load(path).profile == path.stem
    for key, value in yaml.safe_load(path.read_text()).items():
        default = Params.model_fields[key].default
        assert key == "profile" or (tuple(value) if isinstance(value, list) else value) != default, key


def test_the_paper_profile_is_the_protocol_and_the_schema_defaults_agree():
    p = params.load(next(path for path in PROFILES if path.stem == "paper"))
    assert (p.size, p.epochs, p.rounds, p.local_epochs, p.batch_size) == (96, 100, 100, 1, 16)
    assert (p.lr, p.weight_decay, p.lr_step, p.lr_gamma, p.augment_prob) == (1e-3, 0.01, 30, 0.1, 0.1)
    assert (p.multiclass_folds, p.binary_folds, p.fold_rule) == (5, 4, "center")
    assert (p.multiclass_models, p.arms) == (MODELS, ARMS)
    assert p.modalities == ("t1", "t2") and p.inner_validation == 0
    assert p.max_per_cell is None and p.batches_per_epoch is None and p.epochs_by_model == {}
    assert p.data != "phantom" and p.precision == "float32"
    assert p.model_dump(exclude={"data"}) == Params().model_dump(exclude={"data"})


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("lr", "1e-3"),
        ("epochs", "4"),
        ("epochs", 4.0),
        ("epochs", True),
        ("epochs", 0),
        ("modalities", ["t1/t3"]),
        ("modalities", "t1"),
        ("modalities", []),
        ("multiclass_models", ["densenet121", "densenet121"]),
        ("dial_shifts", [1.5]),
        ("dial_intensities", ["histogram"]),
        ("profile", "../demo"),
        ("profile", "demo\n"),
        ("profile", "Reference"),  # a folder of the project in outputs
        ("device", "cpu\n"),
        ("data", ""),
        ("device", "gpu"),
        ("augment_prob", float("nan")),
        ("epochs_by_model", {1: 2}),
    ],
)
def test_a_value_of_the_wrong_kind_is_refused_by_its_key(key, value):
    with pytest.raises(ParamsError, match=rf"(?m)^  {key}"):
        params.validate({key: value}, "a.yaml")


def test_the_home_is_meant_by_a_tilde_in_data_and_outputs(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    p = params.validate({"profile": "mine", "data": "~/scans", "outputs": "~/results"}, "test")
    assert (p.cohort_root, p.folder) == (tmp_path / "scans", tmp_path / "results" / "mine")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lr: 1e-3", r"lr: .*'1e-3'.*write 1\.0e-3"),
        ("epochs: x\nepoch: 1", "2 invalid setting.*epochs: .*epoch: unknown setting; `ipmn params`"),
        ("1: 2", "1: unknown setting"),
        ("epochs: 2\nsize: 32\nepochs: 3", "a setting is given twice; keep one"),
        ("", "expected lines"),
        ("a: [1", "not valid YAML"),
        ("data: 2001-99-99", "not valid YAML"),
    ],
)
def test_a_file_that_is_no_profile_is_refused_by_name(tmp_path, text, message):
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(ParamsError, match=rf"(?s)a\.yaml.*{message}"):
        params.load(tmp_path / "a.yaml")


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A project whose profile `small` has two settings, as the working directory."""
    for name in ("params", "notebooks"):
        (tmp_path / name).mkdir()
    (tmp_path / "params" / "small.yaml").write_text("profile: small\nepochs: 3\nmax_per_cell: 2\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_notebook_takes_the_schema_then_the_profile_then_its_cell(project):
    cell = {"profile": "small", "epochs": None, "rounds": 7, "modalities": ["t1"], "np": object(), "x": 1}
    p = params.from_notebook(cell)
    assert (p.profile, p.epochs, p.max_per_cell, p.rounds, p.modalities) == ("small", 3, 2, 7, ("t1",))
    assert p.batch_size == Params().batch_size
    other = params.from_notebook({**cell, "profile": "mine", "epochs": 5})  # no such file: only the schema
    assert (other.profile, other.epochs, other.max_per_cell) == ("mine", 5, None)


def test_a_profile_may_be_the_path_of_a_file(project):
    (project / "whole.yaml").write_text("profile: other\nmax_per_cell: null\nepochs: 4\n")
    p = params.from_notebook({"profile": str(project / "whole.yaml"), "epochs": None})
    assert (p.profile, p.epochs, p.max_per_cell) == ("other", 4, None)
    with pytest.raises(ParamsError, match=r"gone\.yaml: no such file.*ipmn init.*params/"):
        params.from_notebook({"profile": str(project / "gone.yaml")})


@pytest.mark.parametrize(
    ("line", "message"), [("epoch = 3", "epoch: unknown setting"), ('epochs = "3"', "epochs: Input")]
)
def test_what_papermill_injects_is_refused_by_name(project, line, message):
    variables = {"In": ["", "profile = None", f"# Parameters\n{line}"], "profile": "small"}
    exec(line, variables)
    with pytest.raises(ParamsError, match=message):
        params.from_notebook(variables)
