import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from ipmn_core import federated
from ipmn_core.federated import STRATEGIES, Strategy, rounds, training


def small_net(seed=0):
    """A network with BatchNorm; its convolution has no bias, whose gradient would be rounding noise alone."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv3d(1, 4, 3, stride=2, bias=False),
        nn.BatchNorm3d(4),
        nn.ReLU(),
        nn.AdaptiveAvgPool3d(1),
        nn.Flatten(),
        nn.Linear(4, 2),
    )


def cases(n, seed=0):
    rng = torch.Generator().manual_seed(seed)
    return training.Cases(torch.rand(n, 1, 8, 8, 8, generator=rng).half(), torch.arange(n) % 2)


def settings(**changes):
    small = {
        "epochs": 3,
        "local_epochs": 1,
        "batch_size": 4,
        "batches_per_epoch": None,
        "lr": 1e-3,
        "weight_decay": 0.01,
        "lr_step": 30,
    }
    small |= {"lr_gamma": 0.1, "augment_prob": 0.1, "bfloat16": False, "channels_last": False, "seed": (0, 0)}
    return training.Settings(**small | changes)


def federation(strategy, clients, n=33, **changes):
    model, data = small_net(), cases(n)
    epochs = list(federated.fit(model, clients, [torch.arange(n)], data, settings(**changes), strategy))
    return model.state_dict(), epochs


def split(*sizes):
    return {f"center {k}": part for k, part in enumerate(torch.arange(sum(sizes)).split(list(sizes)))}


def largest_difference(a, b):
    return max((a[key].double() - b[key].double()).abs().max().item() for key in b)


def test_gradient_of_the_proximal_term_is_mu_times_the_distance():
    w = [nn.Parameter(torch.randn(5, 3)), nn.Parameter(torch.randn(7))]
    w_t = [torch.randn(5, 3), torch.randn(7)]
    squared_norm = sum((a - b).square().sum() for a, b in zip(w, w_t, strict=True))
    by_autograd = torch.autograd.grad(0.3 / 2 * squared_norm, w)  # Eq. (3)'s second term as it is printed
    for parameter in w:
        parameter.grad = torch.ones_like(parameter)
    federated.add_proximal_gradient(w, w_t, 0.3)
    for parameter, start, autograd in zip(w, w_t, by_autograd, strict=True):
        torch.testing.assert_close(parameter.grad - 1, autograd)
        torch.testing.assert_close(parameter.grad - 1, 0.3 * (parameter.detach() - start))


def test_mu_zero_is_fedavg_bit_for_bit():
    fedavg, _ = federation(STRATEGIES["fedavg"], split(9, 12, 12))
    vanishing = Strategy(mu=1e-300)  # goes through the proximal code, and is 0 in float32
    fedprox, _ = federation(vanishing, split(9, 12, 12))
    pulled, _ = federation(STRATEGIES["fedprox_0.3"], split(9, 12, 12))
    assert largest_difference(fedavg, fedprox) == 0
    assert largest_difference(fedavg, pulled) > 0


def test_at_the_global_weights_the_proximal_gradient_is_exactly_zero():
    w = nn.Parameter(torch.randn(1000))
    w.grad = torch.zeros(1000)
    federated.add_proximal_gradient([w], [w.detach().clone()], 0.1)
    assert (w.grad == 0).all()  # AdamW would make full steps of a rounding error


def test_a_small_mu_tends_to_fedavg():
    fedavg, _ = federation(STRATEGIES["fedavg"], split(9, 12, 12), lr=1e-4)
    almost, _ = federation(Strategy(mu=1e-9), split(9, 12, 12), lr=1e-4)
    assert largest_difference(fedavg, almost) < 1e-6  # the gradients differ by 1e-9 times the distance


def test_one_client_is_centralized_training_bit_for_bit():
    model, data = small_net(), cases(33)
    central = list(training.fit(model, torch.arange(20), torch.arange(20, 33), data, settings()))
    federated_model = small_net()
    rounds = list(
        federated.fit(
            federated_model, {"all": torch.arange(20)}, [torch.arange(20, 33)], data, settings(), Strategy()
        )
    )
    assert largest_difference(model.state_dict(), federated_model.state_dict()) == 0
    assert all((a.prob == b.prob).all() and a.loss == b.loss for a, b in zip(central, rounds, strict=True))


def test_weights_are_shares_of_cases_over_batchnorm_buffers_too():
    states = [
        {
            "weight": torch.tensor([1.0]),
            "running_mean": torch.tensor([10.0]),
            "num_batches_tracked": torch.tensor(3),
        },
        {
            "weight": torch.tensor([5.0]),
            "running_mean": torch.tensor([30.0]),
            "num_batches_tracked": torch.tensor(8),
        },
    ]
    average = federated.weighted_average(states, [30, 10])
    assert average["weight"].item() == 2.0
    assert average["running_mean"].item() == 15.0
    assert average["num_batches_tracked"].item() == 4 and average["num_batches_tracked"].dtype == torch.int64


def test_equal_clients_leave_the_weights_as_they_are():
    state = small_net().state_dict()
    assert largest_difference(federated.weighted_average([state] * 4, [5, 5, 5, 5]), state) == 0


def test_aggregation_refuses_no_cases_and_uneven_lists():
    state = small_net().state_dict()
    with pytest.raises(ValueError, match="at least one training case"):
        federated.weighted_average([state], [0])
    with pytest.raises(ValueError):
        federated.weighted_average([state, state], [1])


@pytest.mark.parametrize("mu", [0.0, 0.1, 0.3])
def test_an_independent_loop_of_deep_copies_gives_the_same_weights(mu):
    clients, data = split(9, 13, 11), cases(33)
    ours, _ = federation(Strategy(mu), clients, lr=1e-3, augment_prob=0.0)
    theirs = plain_federation(small_net(), clients, data, mu, rounds=3)
    assert largest_difference(ours, theirs) < 1e-5  # AdamW turns float32 rounding of the sums into this much


def plain_federation(model, clients, data, mu, rounds):
    """FedProx as one writes it at first: a deep copy a client, plain dicts, the penalty through autograd."""
    copies = {name: copy.deepcopy(model) for name in clients}
    optimizers = {
        name: torch.optim.AdamW(m.parameters(), lr=1e-3, weight_decay=0.01) for name, m in copies.items()
    }
    for round_ in range(1, rounds + 1):
        for k, (name, indices) in enumerate(clients.items()):
            local = copies[name]
            local.load_state_dict(model.state_dict())
            frozen = copy.deepcopy(model)
            local.train()
            rng = training.seeded([0, 0, round_, k, 0])
            order = indices[torch.randperm(len(indices), generator=rng)].tolist()
            pieces = [order[i : i + 4] for i in range(0, len(order), 4)]
            if len(pieces[-1]) == 1:
                tail = pieces.pop()
                pieces[-1] += tail
            for piece in pieces:
                loss = F.cross_entropy(local(data.x[piece].float()), data.y[piece])
                for a, b in zip(local.parameters(), frozen.parameters(), strict=True):
                    loss = loss + mu / 2 * (a - b.detach()).pow(2).sum()
                optimizers[name].zero_grad()
                loss.backward()
                optimizers[name].step()
        total = sum(len(indices) for indices in clients.values())
        merged = {
            key: sum(copies[name].state_dict()[key] * (len(clients[name]) / total) for name in clients)
            for key in model.state_dict()
            if key.endswith(("weight", "bias", "running_mean", "running_var"))  # a count has no average
        }
        model.load_state_dict(merged, strict=False)
    return merged


def test_rounds_resumed_from_a_checkpoint_end_bit_identical():
    clients, data = split(9, 12, 12), cases(33)
    whole, _ = federation(STRATEGIES["fedprox_0.1"], clients)
    model = small_net()
    epochs = federated.fit(model, clients, [torch.arange(33)], data, settings(), STRATEGIES["fedprox_0.1"])
    saved = copy.deepcopy(next(epochs).checkpoint())
    resumed = small_net(seed=9)
    rest = list(
        federated.fit(
            resumed, clients, [torch.arange(33)], data, settings(), STRATEGIES["fedprox_0.1"], saved
        )
    )
    assert [epoch.number for epoch in rest] == [2, 3]
    assert largest_difference(whole, resumed.state_dict()) == 0


def test_clients_keep_their_own_optimizer_across_rounds():
    _, epochs = federation(STRATEGIES["fedavg"], split(9, 12, 12))
    steps = {
        name: {float(s["step"]) for s in optimizer["state"].values()}
        for name, (optimizer, _) in epochs[-1].checkpoint()["learners"].items()
    }
    # 9 cases in batches of 4: a tail of one joins, 2 steps a round; 12 cases: 3 steps a round; 3 rounds
    assert steps == {"center 0": {6.0}, "center 1": {9.0}, "center 2": {9.0}}


def test_local_epochs_are_more_steps_a_round_and_schedules_follow():
    _, epochs = federation(STRATEGIES["fedavg"], split(8, 8), n=16, local_epochs=2, lr_step=2)
    learners = epochs[-1].checkpoint()["learners"]
    for optimizer, _ in learners.values():
        assert {float(s["step"]) for s in optimizer["state"].values()} == {
            12.0
        }  # 2 batches, 2 epochs, 3 rounds
        assert optimizer["param_groups"][0]["lr"] == pytest.approx(
            1e-3 * 0.1**3
        )  # 6 local epochs, a cut every 2


def test_a_round_leaves_the_inner_products_of_the_clients_updates():
    clients, data = split(9, 12, 12), cases(33)
    _, epochs = federation(STRATEGIES["fedprox_0.1"], clients, epochs=1)
    w_global = small_net().state_dict()
    updates = []
    for k, indices in enumerate(clients.values()):
        client = small_net()
        learner = training.Learner("c", client, indices, settings())
        federated.local_update(
            client, w_global, learner, data, settings(), STRATEGIES["fedprox_0.1"], [0, 0, 1, k]
        )
        parameters = dict(client.named_parameters())
        updates.append(torch.cat([(parameters[n] - w_global[n]).flatten() for n in parameters]).double())
    expected = torch.stack(updates) @ torch.stack(updates).T
    torch.testing.assert_close(
        torch.from_numpy(epochs[0].inner_products), expected, rtol=2e-3, atol=1e-9
    )  # updates are held in half precision


def failing(monkeypatch, fail, at_round=1):
    """Lets `fail(name of the client, model)` spoil a client's local update in one round, or in all (None)."""
    honest = federated.local_update

    def local_update(model, w_global, client, data, settings, strategy, seed):
        loss = honest(model, w_global, client, data, settings, strategy, seed)
        if at_round in (None, seed[-2]):
            fail(seed[-1], model)
        return loss

    monkeypatch.setattr(rounds, "local_update", local_update)


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
    without = ("center 0", "center 2")
    failing(monkeypatch, fail)
    model, epochs = federation(STRATEGIES["fedprox_0.1"], clients, epochs=1)
    assert epochs[0].left_out == {"center 1": reason}
    w_global, data = small_net().state_dict(), cases(33)
    states, losses = [], []
    for k, (name, indices) in enumerate(clients.items()):
        if name in without:
            client = small_net()
            learner = training.Learner(name, client, indices, settings())
            how = (learner, data, settings(), STRATEGIES["fedprox_0.1"], [0, 0, 1, k])
            losses.append(federated.local_update(client, w_global, *how))
            states.append(client.state_dict())
    assert largest_difference(federated.weighted_average(states, [9, 12]), model) == 0
    assert epochs[0].loss == pytest.approx((9 * losses[0] + 12 * losses[1]) / 21)
    absent = torch.from_numpy(epochs[0].inner_products).isnan()
    assert absent.tolist() == [[False, True, False], [True] * 3, [False, True, False]]


def test_a_client_that_was_left_out_is_back_in_the_next_round_with_new_moments(monkeypatch):
    failing(monkeypatch, spoil)
    _, epochs = federation(STRATEGIES["fedavg"], split(9, 12, 12), lr_step=2)
    assert [list(epoch.left_out) for epoch in epochs] == [["center 1"], [], []]
    learners = epochs[-1].checkpoint()["learners"]
    steps = [{float(s["step"]) for s in o["state"].values()} for o, _ in learners.values()]
    assert steps == [{6.0}, {6.0}, {9.0}]  # the second has lost those of its first round
    assert len({o["param_groups"][0]["lr"] for o, _ in learners.values()}) == 1  # but follows the schedule


def test_a_round_without_any_client_keeps_the_weights_and_says_so(monkeypatch):
    failing(monkeypatch, lambda k, model: crash(1, model))
    model, data = small_net(), cases(33)
    rounds = federated.fit(model, split(9, 12), [torch.arange(33)], data, settings(), Strategy())
    first = next(rounds)
    assert set(first.left_out) == {"center 0", "center 1"} and first.loss != first.loss
    assert largest_difference(model.state_dict(), small_net().state_dict()) == 0
    assert [epoch.left_out for epoch in rounds] == [{}, {}]
    assert largest_difference(model.state_dict(), small_net().state_dict()) > 0


def test_a_federation_that_never_had_a_client_is_an_error_that_names_one(monkeypatch):
    failing(monkeypatch, lambda k, model: crash(1, model), at_round=None)
    with pytest.raises(training.DivergedError, match=r"left out of every round; center 0: OSError: the scan"):
        federation(STRATEGIES["fedavg"], split(9, 12), n=21)


def broken(**changes):
    return small_net().state_dict() | changes


@pytest.mark.parametrize(
    ("state", "fault"),
    [
        (small_net(1).state_dict(), ""),
        (broken(**{"5.bias": torch.zeros(3)}), r"5.bias has shape (3,), not (2,)"),
        (
            broken(**{"5.bias": torch.tensor([0.0, torch.inf])}),
            "5.bias holds values that are NaN or infinite",
        ),
        ({k: v for k, v in small_net().state_dict().items() if k != "5.bias"}, "its update lacks 5.bias"),
        (broken(**{"6.bias": torch.zeros(2)}), "its update has an unknown 6.bias"),
    ],
)
def test_an_update_that_cannot_be_right_is_told_from_one_that_can(state, fault):
    assert federated.fault_of(state, small_net().state_dict()) == fault


def test_local_only_starts_as_fedavgs_first_local_updates_and_shares_nothing():
    clients, data = split(9, 12, 12), cases(33)
    models = nn.ModuleDict({name.replace(" ", "_"): small_net() for name in clients})
    own = dict(zip(models, clients.values(), strict=True))
    epochs = federated.fit_local_only(models, own, own, data, settings())
    first = next(epochs)
    for k, (name, indices) in enumerate(own.items()):
        client = small_net()
        learner = training.Learner("c", client, indices, settings())
        federated.local_update(
            client, small_net().state_dict(), learner, data, settings(), Strategy(), [0, 0, 1, k]
        )
        assert largest_difference(models[name].state_dict(), client.state_dict()) == 0
        alone = training.evaluate(client, indices, data, settings())
        assert (first.prob[indices] == alone).all()  # the cases of the clients are numbered one after another
    assert first.inner_products is None
    states = [model.state_dict() for model in models.values()]
    assert largest_difference(states[0], states[1]) > 0


def test_local_only_resumed_from_a_checkpoint_ends_bit_identical():
    clients, data = {"a": torch.arange(9), "b": torch.arange(9, 20)}, cases(33)
    whole, broken, resumed = (nn.ModuleDict({name: small_net(k) for name in clients}) for k in (0, 0, 9))
    fit = lambda models, saved=None: federated.fit_local_only(  # noqa: E731
        models, clients, clients, data, settings(), saved
    )
    list(fit(whole))
    saved = copy.deepcopy(next(fit(broken)).checkpoint())
    assert [epoch.number for epoch in fit(resumed, saved)] == [2, 3]
    assert largest_difference(whole.state_dict(), resumed.state_dict()) == 0


def test_an_unknown_arm_is_named_with_the_known_ones():
    with pytest.raises(ValueError, match=r"fedsgd.*fedavg, fedprox_0\.1, fedprox_0\.3"):
        federated.strategy("fedsgd")
