"""T1 and T2 together: networks, paired patients, folds, refusals, and runs compared by patient."""

import json

import numpy as np
import pandas as pd
import pytest
import torch
from made_up import paper_cohort
from small_profile import profile

from ipmn_core import federated, metrics, models, names, runs
from ipmn_core.data import CohortError, assign_folds, paired
from ipmn_core.metrics import inference
from ipmn_core.runs import trained
from ipmn_core.runs.run import with_roles

FUSED = ("t1+t2_channels", "t1+t2_siamese")
CHANGES = {
    **{"modalities": [*FUSED, "t1", "t2"], "paired": True, "fold_rule": "patient", "multiclass_models": []},
    **{"binary_model": "densenet121", "arms": ["centralized", "fedavg"], "epochs": 1, "rounds": 1},
}


def cohort():
    """Patients 0-5 of two centers with both scans under two names, T2 in the other order; others in need."""
    rows = []
    for center in ("NYU", "AHN"):
        patients = [(f"{center}{k}", 2 * (k % 2)) for k in range(6)]
        t1 = [(f"{name}-a", name, center, "t1", label) for name, label in patients]
        t2 = [(f"{name}-b", name, center, "t2", label) for name, label in patients[::-1]]
        rows += t1 + t2
    rows += [("only", "only", "NYU", "t1", 0), ("NYU0-again", "NYU0", "NYU", "t2", 0)]
    rows += [("odd-a", "odd", "NYU", "t1", 0), ("odd-b", "odd", "NYU", "t2", 2)]
    scans = pd.DataFrame(rows, columns=["case_id", "patient_id", "center", "modality", "label"])
    return paper_cohort(scans.sort_values("modality", kind="stable", ignore_index=True))


def with_cubes(found):
    """A cohort whose cubes are drawn: those of a patient's modalities differ."""
    cubes = np.random.default_rng(0).random((len(found), 32, 32, 32)).astype(np.float16)
    return paper_cohort(found.scans, cubes, "data-1")


@pytest.mark.parametrize("how", ["channels", "siamese"])
def test_both_inputs_reach_the_logits(how):
    model = models.build("densenet121", 2, 0, how).eval()
    x = torch.rand(2, 2, 32, 32, 32, requires_grad=True)
    logits = model(x)
    assert logits.shape == (2, 2)
    logits[0].sum().backward()
    assert (x.grad[0].abs().amax(dim=(1, 2, 3)) > 0).all()
    assert (x.grad[1] == 0).all()  # the scans of another patient do not


def test_siamese_has_one_encoder():
    model = models.build("densenet121", 2, 0, "siamese").eval()
    one = models.build("densenet121", 2)
    size = [sum(w.numel() for w in m.parameters()) for m in (model, one)]
    assert size[0] - size[1] == 2 * 1024  # only the last layer has twice the inputs
    x = torch.rand(1, 2, 32, 32, 32)
    with torch.inference_mode():
        features = model.encoder(x[0].unsqueeze(1)).flatten()
        torch.testing.assert_close(model(x)[0], model.classifier(features))


def test_augmentation_turns_both_channels_alike():
    x = torch.rand(1, 1, 4, 4, 4).repeat(1, 2, 1, 1, 1)
    turned = federated.client.augmented(x.clone(), [2], [1])
    assert not torch.equal(turned, x)
    assert torch.equal(turned[:, 0], turned[:, 1])


def test_a_name_says_what_is_fused():
    assert names.fusion("t2") == (("t2",), "") and names.fusion("t1+t2") == (("t1+t2",), "")
    assert names.fusion("ct+late_siamese") == (("ct", "late"), "siamese")
    assert names.fusion("t1+t2_channels") == (("t1", "t2"), "channels")


def test_paired_modalities_have_the_same_patients_in_the_same_order_and_folds(tmp_path):
    told = []
    found = paired(cohort(), "here", told)
    t1, t2 = (found.of(modality).scans for modality in ("t1", "t2"))
    assert t1["patient_id"].tolist() == t2["patient_id"].tolist()
    assert len(t1) == 12
    assert "NYU0-again" not in {*t2["case_id"]}
    said = [(severity, text.rsplit(": ")[-1]) for severity, _, text, _ in told]
    assert said == [("warning", "odd"), ("note", "NYU0-again")]
    fold = assign_folds(found, 2, "patient", "binary")
    assert fold.groupby(found.scans["patient_id"]).nunique().max() == 1
    p, found = profile(tmp_path, **CHANGES), with_cubes(found)
    roles = {}
    for modality in p.modalities:
        cases = with_roles(found, runs.run_settings(p, runs.Run("binary", modality, "fedavg", 1)))
        roles[modality] = list(zip(cases.scans["patient_id"], cases.scans["role"], strict=True))
    assert all(mine == roles["t2"] for mine in roles.values())
    np.testing.assert_array_equal(found.of(FUSED[0]).cubes[:, 0], found.of("t1").cubes)
    np.testing.assert_array_equal(found.of(FUSED[0]).cubes[:, 1], found.of("t2").cubes)


def test_no_patient_with_both_is_named_with_a_remedy():
    lone = cohort()
    lone = lone.where(lone.scans["modality"].eq("t1") ^ lone.scans["center"].eq("NYU"))
    with pytest.raises(CohortError, match=r"here.*no patient with a scan of t1 and t2.*paired: false"):
        paired(lone, "here")


@pytest.mark.parametrize(
    ("change", "remedy"),
    [
        ({"paired": False}, "paired: true"),
        ({"fold_rule": "center"}, "fold_rule: patient"),
        ({"binary_model": "resnet34"}, "densenet121, not resnet34"),
        ({"modalities": ["t1", "t2", FUSED[0]]}, "chapters show the last"),
    ],
)
def test_what_cannot_be_fused_is_refused_before_training(tmp_path, change, remedy):
    with pytest.raises(ValueError, match=remedy):
        runs.grid(profile(tmp_path, **CHANGES | change), "binary")


def test_given_folds_that_part_a_patient_are_refused(tmp_path):
    found = paired(cohort())
    place = found.scans.groupby("modality").cumcount() // 2 + (found.scans["modality"] == "t2")
    found.scans["fold_binary"] = (place % 2).astype(str)
    p = profile(tmp_path, **CHANGES | {"fold_rule": "given"})
    with pytest.raises(ValueError, match=r"t1\+t2_channels fold 0: scans of a patient are in two folds"):
        runs.check_folds(p, ["binary"], found)


def test_fused_runs_train_and_are_compared_by_patient(tmp_path, monkeypatch):
    tiny = models.MODELS["tiny"]  # the protocol is tested here, the networks above
    for fusion in models.FUSIONS:
        both = lambda n: torch.nn.Sequential(torch.nn.Conv3d(2, 1, 1), tiny(n))  # noqa: E731
        monkeypatch.setitem(models.FUSIONS, fusion, both)
    monkeypatch.setitem(models.MODELS, "densenet121", tiny)
    p = profile(tmp_path, **CHANGES | {"modalities": [*FUSED, "t2"]})
    found = with_cubes(paired(cohort()))
    predictions = runs.run_grid(p, "binary", found)
    assert {*predictions["modality"]} == {*FUSED, "t2"}
    folder = runs.folder_of(p, runs.Run("binary", FUSED[1], "fedavg", 0))
    assert json.loads((folder / "run.json").read_text())["settings"]["modality"] == FUSED[1]
    with pytest.raises(trained.PredictError, match="needs two scans of a patient"):
        trained.find(folder)
    # as if T1 alone had been trained: its cases have other names
    t1 = predictions[predictions["modality"] == "t2"].assign(modality="t1")
    t1["case_id"] = t1["case_id"].str.replace("-b", "-a")
    selected = metrics.select(pd.concat([predictions, t1]), "last")
    table = inference.compare_modalities(selected, found.scans, "t2")
    found = table.set_index(["modality", "arm"])["difference"]
    assert {*found.index} == {(modality, arm) for modality in (*FUSED, "t1") for arm in p.arms}
    assert (found["t1"] == 0).all()
    frames = [selected.query("modality == @m and arm == 'fedavg'") for m in (FUSED[0], "t2")]
    pooled = [metrics.auc(*metrics.y_and_prob(frame)) for frame in frames]
    assert found[FUSED[0], "fedavg"] == pytest.approx(pooled[0] - pooled[1], abs=1e-12)
