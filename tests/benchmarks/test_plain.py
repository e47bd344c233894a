import copy

import plain
import pytest
import torch
from test_federated import largest_difference, settings

from ipmn_core import federated, models, phantom
from ipmn_core.data import load_cubes, read
from ipmn_core.federated import Strategy, training

pytestmark = pytest.mark.usefixtures("one_thread")
SIZE = 32


@pytest.fixture(scope="module")
def rois(tmp_path_factory):
    """Scans of a phantom in the first release's layout, T1 and T2, whose files are clean ROIs."""
    root = tmp_path_factory.mktemp("plain") / "cohort"
    scans = read(phantom.write(root, layout="first", max_per_cell=1, progress=False))
    return scans.assign(target=(scans["label"] == 2).astype(int))


@pytest.fixture(scope="module")
def data(rois):
    """The cubes that the plain loader reads, in float32: the cache's half precision is left out.

    How much that leaves out is what `test_the_cache_holds_the_plain_cubes_to_half_precision` shows.
    """
    x, y = next(iter(batches(rois, range(len(rois)), len(rois))))
    return training.Cases(x.as_tensor(), y)


def batches(rois, order, batch_size):
    rows = rois.iloc[list(order)]
    places = range(len(rows))
    return plain.loader(rows["image"], rows["target"], SIZE, batch_size, augment_prob=0.0, order=places)


def drawn(indices, seed):
    """The order in which `training.train_epoch` takes the cases."""
    return indices[torch.randperm(len(indices), generator=training.seeded(seed))].tolist()


def protocol(**changes):
    return settings(augment_prob=0.0, **changes)


def network():
    return models.build("densenet121", 2)


def fused(model):
    """The plain AdamW in the kernel that ours has, whose last bit differs from that of the default one.

    It matters: at this size, with batch norm over few voxels, a DenseNet's gradients answer a difference
    of 1e-7 in the weights with one of 1e-3, and the next step's with one of 0.2.
    """
    optimizer = plain.optimizer_of(model)
    optimizer.param_groups[0]["fused"] = True
    return optimizer


def floats(model):
    """Parameters and running statistics. Not the counts of batches, whose average plain cuts off and we
    round: nothing reads them.
    """
    return {key: value for key, value in model.state_dict().items() if value.is_floating_point()}


def test_two_centralized_epochs_end_with_the_same_weights_bit_for_bit(rois, data):
    ours, theirs, everyone = network(), network(), torch.arange(0, 40, 5)
    optimizer = fused(theirs)
    for epoch in training.fit(ours, everyone, everyone[:1], data, protocol(epochs=2)):
        order = drawn(everyone, [0, 0, epoch.number, 0, 0])
        plain.train_epoch(theirs, optimizer, batches(rois, order, 4))
        assert largest_difference(theirs.state_dict(), ours.state_dict()) == 0
    assert largest_difference(ours.state_dict(), network().state_dict()) > 1e-3  # a step of AdamW


def test_a_step_of_the_plain_adamw_is_ours_to_the_last_bit_but_one(rois, data):
    ours, theirs, four = network(), network(), torch.arange(0, 40, 10)
    list(training.fit(ours, four, four[:1], data, protocol(epochs=1)))
    plain.train_epoch(theirs, plain.optimizer_of(theirs), batches(rois, drawn(four, [0, 0, 1, 0, 0]), 4))
    assert largest_difference(theirs.state_dict(), ours.state_dict()) <= 2**-23  # float32's step above 1


# The proximal term is added by a fused multiply-add here and rounded twice by autograd. With mu = 1/8 the
# product is exact, and both are the same; with mu = 0.1 they are until the second round's second step.
@pytest.mark.parametrize(("mu", "rounds"), [(0.0, 2), (1 / 8, 2), (0.1, 1)])
def test_every_federated_round_ends_with_the_same_weights(rois, data, mu, rounds):
    of_centers = rois.groupby("center", sort=False).indices
    clients = {c: torch.tensor(of_centers[c][:n]) for c, n in (("NYU", 4), ("MCF", 2), ("NU", 2))}
    ours, theirs = network(), network()
    copies = [copy.deepcopy(theirs) for _ in clients]
    optimizers = [fused(model) for model in copies]
    two_steps = protocol(epochs=rounds, batch_size=2)  # a round, for NYU: the second feels mu
    for round_ in federated.fit(ours, clients, [torch.arange(1)], data, two_steps, Strategy(mu)):
        orders = [drawn(own, [0, 0, round_.number, k, 0]) for k, own in enumerate(clients.values())]
        of_clients = [batches(rois, order, 2) for order in orders]
        plain.federated_round(theirs, copies, optimizers, of_clients, [4, 2, 2], mu)
        # plain sums in float32, ours in float64: each of its two sums rounds by up to 2**-24
        torch.testing.assert_close(floats(theirs), floats(ours), rtol=2**-22, atol=2**-24)
        theirs.load_state_dict(ours.state_dict())  # or those bits would be 1e-3 after the next round


def test_channels_last_gives_the_loss_and_probabilities_of_contiguous_cubes(data):
    losses, probs = [], []
    for channels_last in (False, True):
        model, how = network(), protocol(epochs=1, channels_last=channels_last)
        if channels_last:
            model = model.to(memory_format=torch.channels_last_3d)
        probs.append(training.evaluate(model, torch.arange(4), data, how))
        learner = training.Learner("all", model, torch.arange(4), how)
        losses.append(training.train_epoch(model, learner, data, how, [0]))
    assert abs(probs[0] - probs[1]).max() < 1e-5  # sums in another order, through 121 layers
    assert losses[0] == pytest.approx(losses[1], abs=2e-3)  # batch norm over few voxels magnifies them


def test_the_cache_holds_the_plain_cubes_to_half_precision(rois, data, tmp_path):
    stored = torch.tensor(load_cubes(rois, SIZE, tmp_path).array)[:, None]
    apart = (stored.float() - data.x).abs().max().item()
    assert 0 < apart < 2**-12 + 1e-6  # half a step of float16 below 1, and float32's rounding before it


def test_a_scan_and_its_mask_become_the_same_cube(phantom_scans, tmp_path):
    few = phantom_scans.iloc[::8].reset_index(drop=True)
    stored = torch.tensor(load_cubes(few, SIZE, tmp_path).array)
    for scan, ours in zip(few.itertuples(), stored, strict=True):
        theirs = plain.cube(scan.image, scan.mask, SIZE)[0].as_tensor()
        assert (ours.float() - theirs).abs().max() < 2**-12 + 1e-6, scan.case_id
