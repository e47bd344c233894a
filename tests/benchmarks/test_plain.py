import copy

import plain
import pytest
import torch
from small import largest_difference, settings

from ipmn_core import federated, models
from ipmn_core.data import load_cubes, read
from ipmn_core.federated import client
from ipmn_core.params import Preprocessing

pytestmark = pytest.mark.usefixtures("one_thread")
SIZE = 32


@pytest.fixture(scope="module")
def rois(first_root):
    """Scans of a phantom in the first release's layout, T1 and T2, whose files are clean ROIs."""
    scans = read(first_root).scans
    return scans.assign(target=(scans["label"] == 2).astype(int))


@pytest.fixture(scope="module")
def cases(rois):
    """The cubes that the plain loader reads, in float32: without the cache's half precision.

    `test_the_cache_holds_the_plain_cubes_to_half_precision` bounds what that leaves out.
    """
    x, y = next(iter(batches(rois, range(len(rois)), len(rois))))
    return federated.Cases(x.as_tensor(), y)


def batches(rois, order, batch_size):
    rows = rois.iloc[list(order)]
    places = range(len(rows))
    return plain.loader(rows["image"], rows["target"], SIZE, batch_size, augment_prob=0.0, order=places)


def drawn(indices, seed):
    """The order in which `federated.train_epoch` takes the cases."""
    return indices[torch.randperm(len(indices), generator=client.seeded(seed))].tolist()


def network():
    return models.build("densenet121", 2)


def fused(model):
    """The plain AdamW in the kernel that ours has, whose last bit differs from that of the default one.

    It matters: at this size, with batch norm over few voxels, a difference of 1e-7 in a DenseNet's weights
    becomes one of 1e-3 in its gradients, and of 0.2 after the next step.
    """
    optimizer = plain.optimizer_of(model)
    optimizer.param_groups[0]["fused"] = True
    return optimizer


def floats(model):
    """Parameters and running statistics, without the counts of batches, which nothing reads."""
    return {key: value for key, value in model.state_dict().items() if value.is_floating_point()}


def test_two_centralized_epochs_end_with_the_same_weights_bit_for_bit(rois, cases):
    ours, theirs, everyone = network(), network(), torch.arange(0, 40, 5)
    optimizer, by_center = fused(theirs), {"all": everyone}
    one = {"one": everyone[:1]}
    for epoch in federated.fit_centralized(ours, by_center, one, cases, settings(epochs=2, augment_prob=0.0)):
        order = drawn(everyone, [0, 0, epoch.number, 0, 0])
        plain.train_epoch(theirs, optimizer, batches(rois, order, 4))
        assert largest_difference(theirs.state_dict(), ours.state_dict()) == 0
    assert largest_difference(ours.state_dict(), network().state_dict()) > 1e-3  # a step of AdamW


# The proximal term is added by a fused multiply-add here and rounded twice by autograd. With mu = 1/8 the
# product is exact, and both are the same; with mu = 0.1 they are until the second round's second step.
@pytest.mark.parametrize(("mu", "rounds"), [(0.0, 2), (1 / 8, 2), (0.1, 1)])
def test_every_federated_round_ends_with_the_same_weights(rois, cases, mu, rounds):
    of_centers = rois.groupby("center", sort=False).indices
    clients = {c: torch.tensor(of_centers[c][:n]) for c, n in (("NYU", 4), ("MCF", 2), ("NU", 2))}
    ours, theirs, one = network(), network(), {"one": torch.arange(1)}
    copies = [copy.deepcopy(theirs) for _ in clients]
    optimizers = [fused(model) for model in copies]
    # two steps per round, for NYU: the second feels mu
    two_steps = settings(epochs=rounds, batch_size=2, augment_prob=0.0)
    strategy = federated.Strategy(mu)
    for round_ in federated.fit_federated(ours, clients, one, cases, two_steps, strategy):
        orders = [drawn(own, [0, 0, round_.number, k, 0]) for k, own in enumerate(clients.values())]
        of_clients = [batches(rois, order, 2) for order in orders]
        plain.federated_round(theirs, copies, optimizers, of_clients, [4, 2, 2], mu)
        # plain sums in float32, ours in float64: each of its two sums rounds by up to 2**-24
        torch.testing.assert_close(floats(theirs), floats(ours), rtol=2**-22, atol=2**-24)
        theirs.load_state_dict(ours.state_dict())  # or those bits would be 1e-3 after the next round


def test_the_cache_holds_the_plain_cubes_to_half_precision(rois, cases, phantom_scans, tmp_path):
    stored = torch.tensor(load_cubes(rois, Preprocessing(SIZE), tmp_path)[0])[:, None]
    apart = (stored.float() - cases.x).abs().max().item()
    assert 0 < apart < 2**-12 + 1e-6  # half a step of float16 below 1, and float32's rounding before it
    few = phantom_scans.iloc[::8].reset_index(drop=True)  # image and mask instead of a clean ROI
    stored = torch.tensor(load_cubes(few, Preprocessing(SIZE), tmp_path)[0])
    for scan, ours in zip(few.itertuples(), stored, strict=True):
        theirs = plain.cube(scan.image, scan.mask, SIZE)[0].as_tensor()
        assert (ours.float() - theirs).abs().max() < 2**-12 + 1e-6, scan.case_id
