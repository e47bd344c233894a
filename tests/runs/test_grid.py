import pytest
from small_profile import profile

from ipmn_core import params, runs
from ipmn_core.federated import Strategy, device
from ipmn_core.runs import Run

FEDERATED = Run("binary", "t1", "fedprox_0.1", 1)


def test_the_papers_grid_is_complete():
    p = params.Params()
    multiclass, binary = runs.grid(p, "multiclass"), runs.grid(p, "binary")
    assert len(set(multiclass)) == len(multiclass) == 5 * 2 * 5
    assert len(set(binary)) == len(binary) == 5 * 2 * 4
    assert len({runs.folder_of(p, run) for run in multiclass + binary}) == 90
    assert runs.folder_of(p, FEDERATED).parts[-5:] == ("runs", "binary", "t1", "fedprox_0.1", "fold1")


@pytest.mark.parametrize(
    ("task", "changes", "message"),
    [
        ("binary", {"multiclass_models": ["vgg"]}, "unknown model 'vgg': choose one of resnet34"),
        ("binary", {"epochs_by_model": {"vgg": 3}}, "unknown model 'vgg'"),
        ("binary", {"binary_model": "vit"}, "unknown model 'vit'"),
        ("multiclass", {"arms": ["fedsgd"]}, "fedsgd: unknown federated arm"),
        ("four_class", {}, "four_class: unknown task; known are multiclass, binary"),
    ],
)
def test_an_unknown_task_model_or_arm_is_named(tmp_path, task, changes, message):
    with pytest.raises(ValueError, match=message):
        runs.grid(profile(tmp_path, **changes), task)


CHANGES = {
    **{"binary_model": "shufflenetv2", "binary_folds": 3, "fold_rule": "patient", "inner_validation": 0.2},
    **{"spacing": 1.0, "intensity": "zscore", "orientation": "canonical"},
    **{"max_per_cell": 9, "size": 48, "rounds": 8, "local_epochs": 2, "clients_per_round": 2},
    **{"batch_size": 5, "batches_per_epoch": 3, "lr": 0.2, "weight_decay": 0.3, "lr_step": 9},
    **{"lr_gamma": 0.4, "augment_prob": 0.5, "seed": 11, "threads": 2, "batch_norm_momentum": 0.5},
}
NO_CHANGE = {
    **{"profile": "u", "outputs": "elsewhere", "data": "a folder"},  # the data's key
    **{"classes": ["a", "b"], "positive": ["a"], "center_names": ["NU"], "cohort": "histology"},
    **{
        "paired": True,
        "phantom_max_per_cell": 2,
        "phantom_shortcut": 0.5,
        "phantom_seed": 5,
        "phantom_shift": 1.0,
    },
    **{"modalities": ["t1", "t2"], "arms": ["fedprox_0.1"], "multiclass_models": ["resnet34"]},
    **{"epochs": 9, "epochs_by_model": {"resnet34": 2}, "multiclass_folds": 3, "keep_models": ["none"]},
    **{"finetune_epochs": 9, "dial_shifts": [0.1], "more_seeds": [5], "dial_intensities": ["none"]},
    **{"device": "cuda:3", "precision": "bfloat16", "jobs": 4, "checkpoint_seconds": 7.0},
}


def test_a_federated_run_depends_on_the_settings_that_reach_it_and_on_no_other(tmp_path):
    assert CHANGES.keys() | NO_CHANGE.keys() == params.Params.model_fields.keys()
    before, root = runs.run_settings(profile(tmp_path), FEDERATED), profile(tmp_path).phantom_root
    for key, value in CHANGES.items():
        p = profile(tmp_path, **{key: value})
        assert runs.run_settings(p, FEDERATED) != before and p.phantom_root == root, key
    for key, value in NO_CHANGE.items():
        assert runs.run_settings(profile(tmp_path, **{key: value}), FEDERATED) == before, key


def test_settings_arrive_under_their_names(tmp_path):
    p = profile(tmp_path, **CHANGES, epochs=7, epochs_by_model={"tiny": 5})
    settings = runs.run_settings(p, FEDERATED)
    assert (settings.model, settings.folds, settings.epochs) == ("shufflenetv2", 3, 8)
    assert (settings.lr, settings.size, settings.seed) == (0.2, 48, (11, 1))
    assert settings.strategy == Strategy(mu=0.1, clients_per_round=2)
    assert settings.protocol()["seed"] == [11, 1]
    centralized = runs.run_settings(p, Run("binary", "t1", "centralized", 0))
    assert (centralized.epochs, centralized.local_epochs, centralized.strategy) == (7, 1, None)
    local = runs.run_settings(p, Run("binary", "t1", "local_only", 0))
    assert (local.epochs, local.local_epochs) == (8 * 2, 1)  # as many as the federation's local epochs
    tuned = runs.run_settings(p, Run("binary", "t1", "finetune_0.3", 0))
    assert (tuned.epochs, tuned.finetune_epochs) == (8 + 5, 5)
    multiclass = runs.run_settings(p, Run("multiclass", "t1", "tiny", 0))
    assert (multiclass.epochs, multiclass.model) == (5, "tiny")


def test_the_machine_decides_precision_and_layout_which_are_recorded_not_compared(tmp_path, monkeypatch):
    monkeypatch.setattr(device, "has_bfloat16", lambda device: True)
    p = profile(tmp_path, precision="auto", binary_model="shufflenetv2")  # which bfloat16 slows down
    for run, used in ((Run("multiclass", "t1", "densenet121", 0), True), (FEDERATED, False)):
        settings = runs.run_settings(p, run)
        here = runs.on_this_machine(p, settings)
        assert (here.device, here.bfloat16, here.channels_last) == ("cpu", used, True)
        assert here == settings and here.protocol() == settings.protocol()
        assert here.record()["bfloat16"] == used
