import numpy as np
import pytest
import torch
from monai.transforms import Flip, Rotate90
from small import cases, largest_difference, settings, small_net, steps_taken

from ipmn_core import models
from ipmn_core.federated import Cases, DivergedError, Learner, client, fit_centralized

TRAIN, TEST = {"a": torch.arange(20)}, {"a": torch.arange(20, 33)}


def trained(**changes):
    model = small_net()
    epochs = list(fit_centralized(model, TRAIN, TEST, cases(), settings(**changes)))
    return model.state_dict(), epochs


def test_one_seed_gives_the_same_bits_and_every_seed_counts():
    (a, epochs_a), (b, epochs_b) = trained(), trained()
    assert largest_difference(a, b) == 0
    assert all((x.prob == y.prob).all() for x, y in zip(epochs_a, epochs_b, strict=True))
    for other in ((1, 0), (0, 1)):
        assert largest_difference(a, trained(seed=other)[0]) > 0


@pytest.mark.parametrize(
    ("n", "sizes", "joined"),
    [
        (2, [2], [2]),
        (17, [16, 1], [17]),
        (33, [16, 16, 1], [16, 17]),
        (34, [16, 16, 2], [16, 16, 2]),
    ],
)
def test_a_batch_of_one_joins_the_one_before_it_where_it_must(n, sizes, joined):
    for size, expected in ((8, sizes), (4, joined)):  # 4^3 leaves one voxel of the feature map
        data = Cases(torch.zeros(n, 1, size, size, size), torch.arange(n))
        pieces = [torch.arange(n)[batch] for batch in client.batches(small_net(), data, n, 16)]
        assert [len(piece) for piece in pieces] == expected
        assert torch.cat(pieces).tolist() == list(range(n))


def test_a_batch_of_one_is_trained_on_where_batch_norm_can():
    network = models.build("densenet121", 2).eval()
    assert [client.trains_on_one(network, torch.zeros(3, 1, s, s, s)) for s in (32, 64)] == [False, True]
    assert not network.training and {value.device.type for value in network.state_dict().values()} == {"cpu"}
    steps = {}
    for size in (4, 8):  # the feature map has one voxel, or 27
        net, x = small_net(), torch.randn(5, 1, size, size, size)
        learner = Learner("NYU", net, torch.arange(5), settings(batch_size=4))
        client.train_epoch(net, learner, Cases(x, torch.arange(5) % 2), settings(batch_size=4), [0])
        steps[size] = int(net[1].num_batches_tracked)
    assert steps == {4: 1, 8: 2}


def test_nobody_to_test_is_no_fault():
    net = small_net()
    net.register_forward_pre_hook(lambda _, x: 1 / len(x[0]) and None)  # fails on an empty batch, as a ResNet
    assert client.evaluate(net, torch.arange(0), cases(), settings()).shape == (0, 2)


def test_the_protocol_reaches_optimizer_and_schedule():
    _, epochs = trained(lr_step=2, epochs=4, batches_per_epoch=2)
    optimizer = epochs[-1].learners["all"].optimizer
    group = optimizer.param_groups[0]
    assert isinstance(optimizer, torch.optim.AdamW) and group["weight_decay"] == 0.01
    assert group["lr"] == pytest.approx(1e-5)  # 1e-3, a tenth of it after every second epoch
    assert steps_taken(epochs[-1]) == {"all": {8.0}}  # 20 cases in batches of 4 would be 5 steps an epoch


@pytest.mark.parametrize("quarters", range(4))
@pytest.mark.parametrize("axis", range(4))
def test_augmentation_is_monais_flip_and_quarter_turns_of_every_cube(axis, quarters):
    x = torch.rand(3, 1, 5, 5, 5).half()
    flipped = [Flip(axis - 1)(cube) if axis else cube for cube in x]
    rotate = Rotate90(quarters, spatial_axes=(0, 1))
    expected = torch.stack([torch.as_tensor(np.asarray(rotate(cube))) for cube in flipped])
    expected[1] = x[1]  # the middle cube stays as it is
    assert torch.equal(client.augmented(x.clone(), [axis, 0, axis], [quarters, 0, quarters]), expected)


@pytest.mark.parametrize("prob", [0.0, 0.1, 1.0])
def test_each_case_is_flipped_and_turned_with_its_probability(prob):
    n = 20_000
    drawn = client.draw_augmentations(n, prob, torch.Generator().manual_seed(0))
    each = torch.tensor([1 - prob, prob / 3, prob / 3, prob / 3])  # none, or one of 3 axes, of 3 turns
    axes, quarters = map(torch.tensor, drawn)
    share = torch.bincount(4 * axes + quarters, minlength=16).double() / n
    wanted = each.outer(each).flatten().double()
    assert ((share - wanted).abs() <= 4 * (wanted * (1 - wanted) / n).sqrt()).all()  # 4 standard errors


def test_an_epoch_shows_each_case_once_and_augments_a_copy():
    data, net, cubes = cases(8), small_net(), []
    before = data.x.clone()
    net.register_forward_pre_hook(lambda _, x: cubes.append(x[0]))
    learner = Learner("all", net, torch.arange(8), settings())
    client.train_epoch(net, learner, data, settings(augment_prob=1.0), (0,))
    shown, mine = torch.cat(cubes).flatten(1)[:, None], before.float().flatten(1)
    assert not (shown == mine).all(2).any()  # each is flipped and turned, which keeps its voxels
    same = (shown.sort(2).values == mine.sort(1).values).all(2)
    assert (same.sum(0) == 1).all() and (same.sum(1) == 1).all()
    assert torch.equal(data.x, before)


def test_probabilities_sum_to_one_and_are_those_of_the_model():
    model, data = small_net().eval(), cases(9)
    prob = client.evaluate(model, torch.arange(9), data, settings())
    with torch.no_grad():
        expected = torch.softmax(model(data.x.float()), 1).double().numpy()
    np.testing.assert_allclose(prob, expected, atol=1e-6)  # float32 sums in batches of another size
    np.testing.assert_allclose(prob.sum(1), 1, atol=1e-6)


def test_the_setting_bfloat16_reaches_the_forward_pass():
    exact, rough = trained(epochs=1)[1][-1].prob, trained(epochs=1, bfloat16=True)[1][-1].prob
    assert 0 < np.abs(exact - rough).max() < 0.05  # 8 bits of mantissa: a few per cent


def test_a_step_reads_nothing_back_from_the_device():
    # a tensor on the meta device has no values: each read that waits for a GPU raises here
    model, steps = small_net().to("meta"), []
    data = Cases(torch.empty(12, 1, 8, 8, 8, device="meta"), torch.empty(12, device="meta").long())
    learner = Learner("AHN", small_net(), torch.arange(12), settings())
    learner.optimizer = torch.optim.AdamW(model.parameters())
    with pytest.raises(RuntimeError, match="item"):  # the mean loss, once, at the end of the epoch
        client.train_epoch(model, learner, data, settings(augment_prob=0.5), (0,), lambda: steps.append(1))
    assert len(steps) == 3  # batches of 4


def test_a_loss_that_is_no_number_stops_the_training_with_a_remedy():
    data = cases(8)
    data.x[3] = torch.nan
    with pytest.raises(DivergedError, match=r"nan.*lower `lr`"):
        next(fit_centralized(small_net(), {"a": torch.arange(6)}, TEST, data, settings()))
