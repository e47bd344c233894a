import pytest
import torch
from small import CLIENTS, cases, federation, largest_difference, settings, small_net, split, steps_taken
from torch import nn

from ipmn_core.federated import (
    STRATEGIES,
    Learner,
    Strategy,
    client,
    fit_centralized,
    fit_federated,
    fit_local_only,
    rounds,
    weighted_average,
)

PROX = STRATEGIES["fedprox_0.1"]


def first_updates(strategy):
    """Each client's model and loss after its first local update, from the same weights."""
    found, data = {}, cases()
    for k, (name, own) in enumerate(CLIENTS.items()):
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


def test_a_round_leaves_the_inner_products_of_the_clients_updates():
    start = dict(small_net().named_parameters())
    _, epochs = federation(PROX, epochs=1)
    models = [dict(model.named_parameters()) for model, _ in first_updates(PROX).values()]
    updates = [torch.cat([(model[n] - start[n]).detach().flatten() for n in start]) for model in models]
    updates = torch.stack(updates).double()
    measured = torch.from_numpy(epochs[0].inner_products)
    torch.testing.assert_close(measured, updates @ updates.T, rtol=2e-3, atol=1e-9)  # kept in half precision


def failing(monkeypatch, fail):
    """Let `fail(k, model)` spoil the local update of client k in the first round."""
    honest = client.local_update

    def local_update(model, *given):
        loss = honest(model, *given)
        *_, round_, k = given[-1]  # the seed
        if round_ == 1:
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
    (one, loss_one), _, (three, loss_three) = first_updates(PROX).values()
    failing(monkeypatch, fail)
    model, epochs = federation(PROX, epochs=1)
    assert epochs[0].left_out == {"center 1": reason}
    assert largest_difference(weighted_average([one.state_dict(), three.state_dict()], [9, 12]), model) == 0
    assert epochs[0].loss == pytest.approx((9 * loss_one + 12 * loss_three) / 21)
    absent = torch.from_numpy(epochs[0].inner_products).isnan()
    assert absent.tolist() == [[False, True, False], [True] * 3, [False, True, False]]


def test_clients_keep_moments_and_schedule_and_one_that_was_left_out_is_back_with_new_moments(monkeypatch):
    failing(monkeypatch, spoil)
    _, epochs = federation(STRATEGIES["fedavg"], local_epochs=2, lr_step=2)
    assert [list(epoch.left_out) for epoch in epochs] == [["center 1"], [], []]
    # 3 rounds of 2 epochs of 3 steps; the second has lost those of its first round, but follows the schedule
    assert steps_taken(epochs[-1]) == {"center 0": {18.0}, "center 1": {12.0}, "center 2": {18.0}}
    for learner in epochs[-1].learners.values():
        assert learner.optimizer.param_groups[0]["lr"] == pytest.approx(1e-3 * 0.1**3)


def test_a_round_without_any_client_keeps_the_weights_and_says_so(monkeypatch):
    failing(monkeypatch, lambda k, model: crash(1, model))
    model, clients = small_net(), split(9, 12)
    epochs = fit_federated(model, clients, clients, cases(), settings(), Strategy())
    first = next(epochs)
    assert set(first.left_out) == {"center 0", "center 1"} and first.loss != first.loss
    assert largest_difference(model.state_dict(), small_net().state_dict()) == 0
    assert [epoch.left_out for epoch in epochs] == [{}, {}]
    assert largest_difference(model.state_dict(), small_net().state_dict()) > 0


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"5.bias": torch.zeros(3)}, "5.bias has another shape or type than the global weights"),
        ({"5.bias": torch.zeros(2).double()}, "5.bias has another shape or type than the global weights"),
        ({"6.bias": torch.zeros(2)}, "its update has an unknown 6.bias"),
    ],
)
def test_an_update_that_cannot_be_right_is_refused(change, fault):
    assert rounds.fault_of(small_net(1).state_dict() | change, small_net().state_dict()) == fault


def test_local_only_starts_as_fedavgs_first_local_updates_and_shares_nothing():
    models = {name: small_net() for name in CLIENTS}
    first = next(fit_local_only(nn.ModuleList(models.values()), CLIENTS, CLIENTS, cases(), settings()))
    updates = first_updates(Strategy())
    for name, own in CLIENTS.items():
        assert largest_difference(models[name].state_dict(), updates[name][0].state_dict()) == 0
        alone = client.evaluate(updates[name][0], own, cases(), settings())
        assert (first.prob[own] == alone).all()  # the cases of the clients are numbered one after another
    assert first.loss == pytest.approx(sum(len(CLIENTS[n]) * loss for n, (_, loss) in updates.items()) / 33)
    assert first.inner_products is None
    assert largest_difference(models["center 0"].state_dict(), models["center 1"].state_dict()) > 0
