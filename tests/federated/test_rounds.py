import copy

import plain
import pytest
import torch
from monai.data import MetaTensor
from small import cases, federation, largest_difference, settings, small_net, split, steps_taken
from torch import nn

from ipmn_core.federated import (
    STRATEGIES,
    DivergedError,
    Learner,
    Strategy,
    checkpoint_of,
    client,
    fit_centralized,
    fit_federated,
    fit_local_only,
    rounds,
    weighted_average,
)

PROX = STRATEGIES["fedprox_0.1"]


def first_updates(clients, strategy):
    """Each client's model and loss after its first local update, from the same weights."""
    found, data = {}, cases()
    for k, (name, own) in enumerate(clients.items()):
        model = small_net()
        learner = Learner(name, model, own, settings())
        start = small_net().state_dict()
        loss, _ = client.local_update(model, start, learner, data, settings(), strategy, [0, 0, 1, k])
        found[name] = model, loss
    return found


def test_one_client_is_centralized_training_bit_for_bit():
    one, other = small_net(), small_net()
    train, test = {"all": torch.arange(20)}, {"all": torch.arange(20, 33)}
    central = list(fit_centralized(one, train, test, cases(), settings()))
    federal = list(fit_federated(other, train, test, cases(), settings(), Strategy()))
    assert largest_difference(one.state_dict(), other.state_dict()) == 0
    assert all((a.prob == b.prob).all() and a.loss == b.loss for a, b in zip(central, federal, strict=True))


@pytest.mark.parametrize("mu", [0.0, 0.1, 0.3])
def test_an_independent_loop_of_deep_copies_gives_the_same_weights(mu):
    clients, data, theirs = split(9, 13, 11), cases(), small_net()
    ours, _ = federation(Strategy(mu), clients, augment_prob=0.0)
    copies = [copy.deepcopy(theirs) for _ in clients]
    optimizers = [plain.optimizer_of(model) for model in copies]
    for round_ in (1, 2, 3):
        of_clients = []
        for k, own in enumerate(clients.values()):
            order = own[torch.randperm(len(own), generator=client.seeded([0, 0, round_, k, 0]))]
            pieces = order.split(4)  # the last ones have one case
            of_clients.append([(MetaTensor(data.x[piece].float()), data.y[piece]) for piece in pieces])
        plain.federated_round(theirs, copies, optimizers, of_clients, [9, 13, 11], mu)
    # AdamW turns float32 rounding of the sums into this much; the counts of batches are whole numbers
    assert largest_difference(ours, theirs.state_dict()) < 1e-5


FITS = {
    "centralized": fit_centralized,
    "local_only": fit_local_only,
    "fedprox": lambda *given, **more: fit_federated(*given[:5], PROX, *given[5:]),
}


@pytest.mark.parametrize("name", FITS)
def test_training_resumed_from_a_checkpoint_ends_bit_identical(name):
    fit, data, parts = FITS[name], cases(), {"a": torch.arange(9), "b": torch.arange(9, 20)}

    def network(seed=0):
        net = small_net(seed)
        net[4] = nn.Sequential(nn.Flatten(), nn.Dropout(0.5))  # dropout draws from the global generator
        return net

    def networks(seed=0):
        return nn.ModuleList([network(seed) for _ in parts])

    make = networks if name == "local_only" else network
    whole, broken, resumed = make(), make(), make(9)
    expected = list(fit(whole, parts, parts, data, settings()))
    first = next(iter(fit(broken, parts, parts, data, settings())))
    saved = copy.deepcopy(checkpoint_of(broken, first))
    torch.rand(5)
    rest = list(fit(resumed, parts, parts, data, settings(), saved))
    assert [epoch.number for epoch in rest] == [2, 3]
    assert all((a.prob == b.prob).all() for a, b in zip(rest, expected[1:], strict=True))
    assert largest_difference(whole.state_dict(), resumed.state_dict()) == 0


def test_clients_keep_their_own_optimizer_and_schedule_across_rounds():
    _, epochs = federation(STRATEGIES["fedavg"], split(9, 12), local_epochs=2, lr_step=2)
    # 3 steps an epoch, for 9 cases the last on one of them; 3 rounds of 2 epochs
    assert steps_taken(epochs[-1]) == {"center 0": {18.0}, "center 1": {18.0}}
    for learner in epochs[-1].learners.values():
        assert learner.optimizer.param_groups[0]["lr"] == pytest.approx(1e-3 * 0.1**3)


def test_a_round_leaves_the_inner_products_of_the_clients_updates():
    clients, start = split(9, 12, 12), dict(small_net().named_parameters())
    _, epochs = federation(PROX, clients, epochs=1)
    models = [dict(model.named_parameters()) for model, _ in first_updates(clients, PROX).values()]
    updates = [torch.cat([(model[n] - start[n]).detach().flatten() for n in start]) for model in models]
    updates = torch.stack(updates).double()
    measured = torch.from_numpy(epochs[0].inner_products)
    torch.testing.assert_close(measured, updates @ updates.T, rtol=2e-3, atol=1e-9)  # kept in half precision


def failing(monkeypatch, fail, at_round=1):
    """Let `fail(k, model)` spoil the local update of client k in one round, or in all (None)."""
    honest = client.local_update

    def local_update(model, *given):
        loss = honest(model, *given)
        *_, round_, k = given[-1]  # the seed
        if at_round in (None, round_):
            fail(k, model)
        return loss

    monkeypatch.setattr(client, "local_update", local_update)


def spoil(k, model):
    if k == 1:
        model[0].weight.data[0] = float("nan")


def crash(k, model):
    if k == 1:
        raise OSError("the scanner's disk is gone")


@pytest.mark.parametrize(
    ("fail", "reason"),
    [
        (spoil, "0.weight holds values that are NaN or infinite"),
        (crash, "OSError: the scanner's disk is gone"),
    ],
)
def test_a_client_that_fails_is_left_out_and_the_shares_of_the_others_grow(monkeypatch, fail, reason):
    clients = split(9, 12, 12)
    (one, loss_one), _, (three, loss_three) = first_updates(clients, PROX).values()
    failing(monkeypatch, fail)
    model, epochs = federation(PROX, clients, epochs=1)
    assert epochs[0].left_out == {"center 1": reason}
    assert largest_difference(weighted_average([one.state_dict(), three.state_dict()], [9, 12]), model) == 0
    assert epochs[0].loss == pytest.approx((9 * loss_one + 12 * loss_three) / 21)
    absent = torch.from_numpy(epochs[0].inner_products).isnan()
    assert absent.tolist() == [[False, True, False], [True] * 3, [False, True, False]]


def test_a_client_that_was_left_out_is_back_in_the_next_round_with_new_moments(monkeypatch):
    failing(monkeypatch, spoil)
    _, epochs = federation(STRATEGIES["fedavg"], split(9, 12, 12), lr_step=2)
    assert [list(epoch.left_out) for epoch in epochs] == [["center 1"], [], []]
    # the second has lost the steps of its first round, but follows the schedule
    assert steps_taken(epochs[-1]) == {"center 0": {9.0}, "center 1": {6.0}, "center 2": {9.0}}
    learners = epochs[-1].learners.values()
    assert len({learner.optimizer.param_groups[0]["lr"] for learner in learners}) == 1


def test_a_round_without_any_client_keeps_the_weights_and_says_so(monkeypatch):
    failing(monkeypatch, lambda k, model: crash(1, model))
    model, clients = small_net(), split(9, 12)
    epochs = fit_federated(model, clients, clients, cases(), settings(), Strategy())
    first = next(epochs)
    assert set(first.left_out) == {"center 0", "center 1"} and first.loss != first.loss
    assert largest_difference(model.state_dict(), small_net().state_dict()) == 0
    assert [epoch.left_out for epoch in epochs] == [{}, {}]
    assert largest_difference(model.state_dict(), small_net().state_dict()) > 0


def test_a_federation_that_never_had_a_client_is_an_error_that_names_one(monkeypatch):
    failing(monkeypatch, lambda k, model: crash(1, model), at_round=None)
    with pytest.raises(DivergedError, match=r"left out of every round; center 0: OSError: the scan"):
        federation(STRATEGIES["fedavg"], split(9, 12))


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({}, ""),
        ({"5.bias": torch.zeros(3)}, "5.bias has another shape or type than the global weights"),
        ({"5.bias": torch.zeros(2).double()}, "5.bias has another shape or type than the global weights"),
        ({"5.bias": torch.tensor([0.0, torch.inf])}, "5.bias holds values that are NaN or infinite"),
        ({"5.bias": None}, "its update lacks 5.bias"),
        ({"6.bias": torch.zeros(2)}, "its update has an unknown 6.bias"),
    ],
)
def test_an_update_that_cannot_be_right_is_told_from_one_that_can(change, fault):
    state = {k: v for k, v in {**small_net(1).state_dict(), **change}.items() if v is not None}
    assert rounds.fault_of(state, small_net().state_dict()) == fault


def test_local_only_starts_as_fedavgs_first_local_updates_and_shares_nothing():
    clients = {f"center_{k}": own for k, own in enumerate(split(9, 12, 12).values())}
    models = {name: small_net() for name in clients}
    first = next(fit_local_only(nn.ModuleList(models.values()), clients, clients, cases(), settings()))
    updates = first_updates(clients, Strategy())
    for name, own in clients.items():
        assert largest_difference(models[name].state_dict(), updates[name][0].state_dict()) == 0
        alone = client.evaluate(updates[name][0], own, cases(), settings())
        assert (first.prob[own] == alone).all()  # the cases of the clients are numbered one after another
    assert first.loss == pytest.approx(sum(len(clients[n]) * loss for n, (_, loss) in updates.items()) / 33)
    assert first.inner_products is None
    assert largest_difference(models["center_0"].state_dict(), models["center_1"].state_dict()) > 0


def test_a_center_without_a_test_case_trains_in_every_arm_and_the_others_are_tested():
    train = split(9, 12)
    test = {"center 1": torch.arange(21, 26)}
    models = {name: small_net() for name in train}
    *_, last = fit_local_only(nn.ModuleList(models.values()), train, test, cases(), settings())
    alone = client.evaluate(models["center 1"], test["center 1"], cases(), settings())
    assert (last.prob == alone).all() and list(last.learners) == ["center 0", "center 1"]
    *_, last = fit_federated(small_net(), train, test, cases(), settings(), Strategy())
    assert last.prob.shape == (5, 2)
