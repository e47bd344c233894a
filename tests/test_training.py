import copy

import numpy as np
import pytest
import torch
from monai.transforms import Flip, Rotate90
from test_federated import cases, largest_difference, settings, small_net
from torch import nn

from ipmn_core import training


def trained(**changes):
    model = small_net()
    epochs = list(training.fit(model, torch.arange(20), torch.arange(20, 33), cases(33), settings(**changes)))
    return model.state_dict(), epochs


@pytest.mark.parametrize("seed", [0, 7])
def test_two_runs_of_one_seed_agree_bit_for_bit(seed):
    (a, epochs_a), (b, epochs_b) = trained(seed=(seed,)), trained(seed=(seed,))
    assert largest_difference(a, b) == 0
    assert all((x.prob == y.prob).all() for x, y in zip(epochs_a, epochs_b, strict=True))


def test_every_seed_counts_zero_included():
    states = [trained(seed=(seed, fold))[0] for seed, fold in ((0, 0), (1, 0), (0, 1))]
    assert largest_difference(states[0], states[1]) > 0
    assert largest_difference(states[0], states[2]) > 0


def test_a_tail_of_one_joins_the_batch_before_it():
    assert [len(b) for b in training.batches(torch.arange(33), 16)] == [16, 17]
    assert [len(b) for b in training.batches(torch.arange(34), 16)] == [16, 16, 2]
    assert torch.cat(training.batches(torch.arange(33), 16)).tolist() == list(range(33))


def test_one_training_case_is_refused_with_its_reason():
    with pytest.raises(ValueError, match=r"AHN: 1 training case.*at least 2"):
        training.Learner("AHN", small_net(), torch.arange(1), settings())


def test_protocol_reaches_the_optimizer():
    learner = training.Learner("AHN", small_net(), torch.arange(4), settings())
    group = learner.optimizer.param_groups[0]
    assert isinstance(learner.optimizer, torch.optim.AdamW)
    assert (group["lr"], group["weight_decay"]) == (1e-3, 0.01)
    assert (learner.schedule.step_size, learner.schedule.gamma) == (30, 0.1)


def test_learning_rate_falls_tenfold_every_step_epochs():
    _, epochs = trained(lr_step=2, epochs=4)
    rate = epochs[-1].checkpoint()["learners"]["all"][0]["param_groups"][0]["lr"]
    assert rate == pytest.approx(1e-5)


def test_augmentation_is_a_flip_and_a_quarter_turn_of_monai():
    x = torch.rand(64, 1, 4, 4, 4)
    augmented = training.augment(x.clone(), 1.0, torch.Generator().manual_seed(3))
    choices = [
        Rotate90(k, spatial_axes=(0, 1))(Flip(axis)(cube))
        for cube in x
        for axis in range(3)
        for k in (1, 2, 3)
    ]
    for i, cube in enumerate(augmented):
        mine = choices[9 * i : 9 * i + 9]
        assert any(torch.equal(cube, torch.as_tensor(np.asarray(choice))) for choice in mine)


def test_augmentation_touches_each_case_with_its_probability():
    x = torch.rand(20_000, 1, 2, 2, 2)
    augmented = training.augment(x.clone(), 0.1, torch.Generator().manual_seed(0))
    changed = (augmented != x).flatten(1).any(1).double().mean().item()
    # 4 standard errors, and 0.003 for a flip and a half turn that undo each other
    assert changed == pytest.approx(1 - 0.9**2, abs=4 * (0.19 * 0.81 / 20_000) ** 0.5 + 0.003)
    assert torch.equal(training.augment(x.clone(), 0.0, torch.Generator().manual_seed(0)), x)


def test_probabilities_sum_to_one_and_are_those_of_the_model():
    model, data = small_net().eval(), cases(9)
    prob = training.evaluate(model, torch.arange(9), data, settings())
    with torch.no_grad():
        expected = torch.softmax(model(data.x.float()), 1).double().numpy()
    np.testing.assert_allclose(prob, expected, atol=1e-6)  # float32 sums in batches of another size
    np.testing.assert_allclose(prob.sum(1), 1, atol=1e-6)


def test_training_lowers_the_loss_of_a_task_that_can_be_learnt():
    data = cases(32)
    data.x[data.y == 1] += 1
    epochs = list(
        training.fit(small_net(), torch.arange(24), torch.arange(24, 32), data, settings(epochs=30, lr=1e-2))
    )
    assert epochs[-1].loss < 0.5 * epochs[0].loss
    assert (epochs[-1].prob.argmax(1) == data.y[24:].numpy()).all()


def test_training_resumed_from_a_checkpoint_ends_bit_identical():
    model, data = small_net(), cases(33)
    model[4] = nn.Sequential(nn.Flatten(), nn.Dropout(0.5))  # dropout draws from the global generator
    start = copy.deepcopy(model)
    arguments = (torch.arange(20), torch.arange(20, 33), data, settings())
    saved = []
    for epoch in training.fit(model, *arguments):
        saved.append(copy.deepcopy(epoch.checkpoint()))
    torch.rand(5)
    rest = list(training.fit(start, *arguments, saved[0]))
    assert [epoch.number for epoch in rest] == [2, 3]
    assert largest_difference(model.state_dict(), start.state_dict()) == 0


def test_bfloat16_stays_close_to_float32():
    exact, rough = trained(epochs=1)[1][-1].prob, trained(epochs=1, bfloat16=True)[1][-1].prob
    assert 0 < np.abs(exact - rough).max() < 0.05  # 8 bits of mantissa: a few per cent


def test_a_loss_that_is_no_number_stops_the_training_with_a_remedy():
    data = cases(8)
    data.x[3] = torch.nan
    with pytest.raises(training.DivergedError, match=r"nan.*lower `lr`"):
        list(training.fit(small_net(), torch.arange(6), torch.arange(6, 8), data, settings()))


def test_an_epoch_may_end_after_a_number_of_batches():
    _, epochs = trained(batches_per_epoch=2)
    steps = {float(s["step"]) for s in epochs[-1].checkpoint()["learners"]["all"][0]["state"].values()}
    assert steps == {6.0}  # 20 cases in batches of 4 would be 5 steps an epoch; 3 epochs
