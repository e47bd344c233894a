import copy

import numpy as np
import pytest
import torch
from monai.transforms import Flip, Rotate90
from test_federated import cases, largest_difference, settings, small_net
from torch import nn

from ipmn_core.federated import training


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


@pytest.mark.parametrize(
    ("n", "sizes"), [(2, [2]), (16, [16]), (17, [17]), (32, [16, 16]), (33, [16, 17]), (34, [16, 16, 2])]
)
def test_a_tail_of_one_joins_the_batch_before_it(n, sizes):
    pieces = [torch.arange(n)[batch] for batch in training.batches(n, 16)]
    assert [len(piece) for piece in pieces] == sizes
    assert torch.cat(pieces).tolist() == list(range(n))


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


@pytest.mark.parametrize("quarters", range(4))
@pytest.mark.parametrize("flip", range(4))
def test_an_orientation_is_a_flip_and_quarter_turns_of_monai(flip, quarters):
    x = torch.rand(2, 1, 5, 5, 5).half()
    flipped = [Flip(flip - 1)(cube) if flip else cube for cube in x]
    rotate = Rotate90(quarters, spatial_axes=(0, 1))
    turned = torch.stack([torch.as_tensor(np.asarray(rotate(cube))) for cube in flipped])
    orientation = training.orientations(5)[flip, quarters]
    assert torch.equal(training.oriented(x, orientation.expand(2, 4)), turned)


def test_every_cube_is_read_in_its_own_orientation():
    x, table = torch.rand(16, 1, 4, 4, 4), training.orientations(4).view(16, 4)
    together = training.oriented(x, table)
    assert all(torch.equal(together[i : i + 1], training.oriented(x[[i]], table[[i]])) for i in range(16))


@pytest.mark.parametrize("prob", [0.0, 0.1, 1.0])
def test_each_case_is_flipped_and_turned_with_its_probability(prob):
    n, table = 20_000, training.orientations(4).view(16, 4)
    drawn = training.draw_orientations(n, 4, prob, torch.Generator().manual_seed(0))
    each = torch.tensor([1 - prob, prob / 3, prob / 3, prob / 3])  # no flip or one of 3, no turn or one of 3
    expected = each.outer(each).flatten()
    for orientation in table.unique(dim=0):  # a flip and a half turn may be another flip
        share = (drawn == orientation).all(1).double().mean().item()
        wanted = expected[(table == orientation).all(1)].sum().item()
        assert share == pytest.approx(wanted, abs=4 * (wanted * (1 - wanted) / n) ** 0.5)  # 4 standard errors


@pytest.mark.parametrize("prob", [0.0, 1.0])
def test_an_epoch_shows_each_case_once_augmented_and_with_its_label(monkeypatch, prob):
    data = training.Cases(torch.rand(9, 1, 4, 4, 4), torch.arange(9))
    cubes, labels = [], []
    monkeypatch.setattr(training, "forward", lambda model, x, settings: cubes.append(x) or x.mean().view(1))
    loss = lambda logits, y: labels.append(y) or logits.sum().requires_grad_()  # noqa: E731
    monkeypatch.setattr(training, "local_objective", loss)
    model = small_net()
    learner = training.Learner("all", model, torch.arange(9), settings())
    training.train_epoch(model, learner, data, settings(augment_prob=prob), (0,))
    cubes, labels = torch.cat(cubes), torch.cat(labels)
    assert labels.tolist() != list(range(9)) and sorted(labels.tolist()) == list(range(9))
    voxels = [x.flatten(1).sort().values for x in (cubes, data.x[labels])]
    assert torch.equal(*voxels)  # a turned cube keeps its voxels
    unchanged = (cubes == data.x[labels]).flatten(1).all(1)
    assert unchanged.all() if prob == 0 else not unchanged.any()


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


def test_a_step_reads_nothing_back_from_the_device():
    # a tensor on the meta device has no values: whatever the host would wait for on a GPU raises here
    model, steps = small_net().to("meta"), []
    data = training.Cases(torch.empty(12, 1, 8, 8, 8, device="meta"), torch.empty(12, device="meta").long())
    learner = training.Learner("AHN", small_net(), torch.arange(12), settings())
    learner.optimizer = torch.optim.AdamW(model.parameters())
    with pytest.raises(RuntimeError, match="item"):  # the mean loss, once, at the end of the epoch
        training.train_epoch(model, learner, data, settings(augment_prob=0.5), (0,), lambda: steps.append(1))
    assert len(steps) == 3  # batches of 4


def test_a_loss_that_is_no_number_stops_the_training_with_a_remedy():
    data = cases(8)
    data.x[3] = torch.nan
    with pytest.raises(training.DivergedError, match=r"nan.*lower `lr`"):
        list(training.fit(small_net(), torch.arange(6), torch.arange(6, 8), data, settings()))


def test_an_epoch_may_end_after_a_number_of_batches():
    _, epochs = trained(batches_per_epoch=2)
    steps = {float(s["step"]) for s in epochs[-1].checkpoint()["learners"]["all"][0]["state"].values()}
    assert steps == {6.0}  # 20 cases in batches of 4 would be 5 steps an epoch; 3 epochs
