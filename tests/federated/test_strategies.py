"""Every strategy at a limit where it must equal something known."""

import copy
from dataclasses import replace

import pytest
import torch
from small import CLIENTS, cases, federation, largest_difference, settings, small_net, split
from torch import nn

from ipmn_core import names
from ipmn_core.federated import (
    STRATEGIES,
    DivergedError,
    Strategy,
    checkpoint_of,
    client,
    fit_federated,
    fit_finetuned,
    fit_local_only,
    strategies,
    strategy,
)

FEDAVG = STRATEGIES["fedavg"]


def plain_net():
    """A network without BatchNorm."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv3d(1, 4, 3, 2), nn.ReLU(), nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(4, 2)
    )


def same(mine, theirs):
    """Whether weights and probabilities are equal, bit for bit."""
    (w, rounds), (v, others) = mine, theirs
    probs = all((a.prob == b.prob).all() for a, b in zip(rounds, others, strict=True))
    return probs and largest_difference(w, v) == 0


@pytest.mark.parametrize("arm", ["fedbn", "fedavg_bn_local", "fedavg_bn_recomputed"])
def test_without_batch_norm_nothing_stays_at_a_client(arm):
    assert same(federation(STRATEGIES[arm], net=plain_net), federation(FEDAVG, net=plain_net))


@pytest.mark.parametrize("arm", ["fedbn", "fedavg_bn_local", "scaffold"])
def test_one_client_alone_is_fedavgs_one_client(arm):
    one = split(33)
    (_, mine), (_, theirs) = federation(STRATEGIES[arm], one), federation(FEDAVG, one)
    # SCAFFOLD's c - c_k is 0 up to the rounding of c + (c_k' - c_k), which AdamW turns into this much
    near = 1e-4 if arm == "scaffold" else 0
    assert all(abs(a.prob - b.prob).max() <= near for a, b in zip(mine, theirs, strict=True))


def test_fedbn_averages_all_but_batch_norm_and_tests_each_client_with_its_own():
    w, (*_, last) = federation(STRATEGIES["fedbn"], epochs=1)
    start, norm = small_net().state_dict(), {key for key in w if key.startswith("1.")}
    assert all(torch.equal(w[key], start[key]) for key in norm)
    assert not torch.equal(w["0.weight"], start["0.weight"])
    weights = [last.own[name]["1.weight"] for name in CLIENTS]
    assert set(last.own["center 0"]) == norm and not torch.equal(weights[0], weights[1])
    model = small_net()
    model.load_state_dict(w | last.own["center 1"])
    assert (client.evaluate(model, CLIENTS["center 1"], cases(), settings()) == last.prob[9:21]).all()
    _, (*_, other) = federation(STRATEGIES["fedavg_bn_local"], epochs=1)
    assert set(other.own["center 0"]) == {f"1.{key}" for key in strategies.STATISTICS}


def test_recomputed_statistics_are_those_of_the_clients_own_cases():
    w, (*_, last) = federation(STRATEGIES["fedavg_bn_recomputed"], epochs=1, batch_size=33)
    assert largest_difference(w, federation(FEDAVG, epochs=1, batch_size=33)[0]) == 0  # they do not travel
    with torch.no_grad():
        x = nn.functional.conv3d(cases().x[CLIENTS["center 2"]].float(), w["0.weight"], stride=2)
    mean = last.own["center 2"]["1.running_mean"]
    torch.testing.assert_close(mean, x.mean((0, 2, 3, 4)), rtol=1e-4, atol=1e-6)  # sums in another order


def test_fedadam_at_rate_0_moves_batch_norms_statistics_alone():
    start, (w, _) = small_net().state_dict(), federation(Strategy(adam=0.0))
    moved = {key for key, value in start.items() if not torch.equal(value, w[key])}
    assert moved == {f"1.{key}" for key in strategies.STATISTICS}


def test_fedadam_is_adam_without_bias_correction_on_the_mean_update():
    """torch's Adam on -d from the same moments, so late that its corrections are 1."""
    (w, _), (average, _) = federation(Strategy(adam=0.02), epochs=1), federation(FEDAVG, epochs=1)
    for name, start in small_net().named_parameters():
        moving = nn.Parameter(start.detach().clone())
        adam = torch.optim.Adam([moving], lr=0.02, betas=(0.9, 0.99), eps=1e-3)
        moving.grad = start.detach() - average[name]
        moments = {"exp_avg": torch.zeros_like(moving), "exp_avg_sq": torch.full_like(moving, 1e-6)}
        adam.state[moving] = {"step": torch.tensor(1e6), **moments}
        adam.step()
        torch.testing.assert_close(w[name], moving.detach(), rtol=1e-5, atol=1e-7)


def test_scaffold_begins_as_fedavg_since_control_variates_begin_at_0():
    assert same(federation(STRATEGIES["scaffold"], epochs=1), federation(FEDAVG, epochs=1))
    half, start = federation(Strategy(scaffold=0.5), epochs=1)[0], small_net().state_dict()
    whole = federation(FEDAVG, epochs=1)[0]
    torch.testing.assert_close(half["0.weight"], (start["0.weight"] + whole["0.weight"]) / 2)


def test_scaffold_on_sgd_is_algorithm_1_of_its_reference(monkeypatch):
    """Option II, c_k' = c_k - c + (w_t - w_k) / (K lr), in a separate loop; clients weighted by cases."""
    sgd = lambda parameters, lr, **_: torch.optim.SGD(parameters, lr)  # noqa: E731
    monkeypatch.setattr(torch.optim, "AdamW", sgd)
    how, data, lr = {"epochs": 4, "lr": 0.05, "augment_prob": 0.0}, cases(), 0.05
    ours, _ = federation(STRATEGIES["scaffold"], net=plain_net, **how)
    w = {name: p.detach().double() for name, p in plain_net().named_parameters()}
    zero = lambda: {name: torch.zeros_like(value) for name, value in w.items()}  # noqa: E731
    c, c_k, model = zero(), [zero() for _ in CLIENTS], plain_net().double()
    for round_ in range(1, 5):
        delta_w, delta_c = zero(), zero()
        for k, own in enumerate(CLIENTS.values()):
            model.load_state_dict(w)
            order = own[torch.randperm(len(own), generator=client.seeded([0, 0, round_, k, 0]))]
            pieces = order.split(4)
            for piece in pieces:
                loss = nn.functional.cross_entropy(model(data.x[piece].double()), data.y[piece])
                gradients = torch.autograd.grad(loss, list(model.parameters()))
                with torch.no_grad():
                    for (name, p), g in zip(model.named_parameters(), gradients, strict=True):
                        p -= lr * (g - c_k[k][name] + c[name])
            for name, p in model.named_parameters():
                new = c_k[k][name] - c[name] + (w[name] - p.detach()) / (len(pieces) * lr)
                delta_w[name] += len(own) / 33 * (p.detach() - w[name])
                delta_c[name] += len(own) / 33 * (new - c_k[k][name])
                c_k[k][name] = new
        w = {name: value + delta_w[name] for name, value in w.items()}
        c = {name: value + delta_c[name] for name, value in c.items()}
    assert largest_difference(ours, w) < 1e-6


def test_ditto_without_pull_is_local_only_beside_fedavg():
    w, mine = federation(Strategy(ditto=0.0))
    average, _ = federation(FEDAVG)
    assert largest_difference(w, average) == 0
    alone = nn.ModuleList([small_net() for _ in CLIENTS])
    theirs = list(fit_local_only(alone, CLIENTS, CLIENTS, cases(), settings()))
    assert all((a.prob == b.prob).all() for a, b in zip(mine, theirs, strict=True))


def test_dittos_personal_model_is_pulled_to_the_global_weights_it_was_sent():
    near, far = (federation(Strategy(ditto=pull), epochs=2)[1][-1].own["center 0"] for pull in (10.0, 0.0))
    sent = federation(FEDAVG, epochs=1)[0]
    distance = [(own["5.weight"] - sent["5.weight"]).norm() for own in (near, far)]
    assert distance[0] < distance[1]


def test_fine_tuning_starts_from_fedavgs_last_round_whatever_its_tests_say():
    tuned, tests = federation(STRATEGIES["finetune"], fit=fit_finetuned, epochs=5, finetune_epochs=2)
    average, _ = federation(FEDAVG, epochs=3)
    assert largest_difference(tuned, average) == 0
    assert [epoch.prob is None for epoch in tests] == [True] * 3 + [False] * 2
    still = replace(STRATEGIES["finetune"], finetune=1e-30)
    *_, last = federation(still, fit=fit_finetuned, epochs=5, finetune_epochs=2)[1]
    own = last.own["center 0"]
    assert all(torch.equal(own[name], average[name]) for name, _ in small_net().named_parameters())


@pytest.mark.parametrize("at", [1, 2, 3])
@pytest.mark.parametrize("arm", ["fedprox_0.1", "fedbn", "fedadam", "scaffold", "ditto_0.1", "finetune"])
def test_a_strategy_resumed_from_a_checkpoint_ends_bit_identical(arm, at):
    fit, how = fit_federated, settings(epochs=4)
    if arm == "finetune":
        fit, how = fit_finetuned, replace(how, finetune_epochs=2)
    given = CLIENTS, CLIENTS, cases(), how, replace(STRATEGIES[arm], clients_per_round=2)
    # dropout draws from the global generator
    whole, broken, resumed = (small_net(seed).insert(5, nn.Dropout(0.5)) for seed in (0, 0, 9))
    expected = list(fit(whole, *given))
    epochs = fit(broken, *given)
    saved = copy.deepcopy([checkpoint_of(broken, next(epochs)) for _ in range(at)][-1])
    torch.rand(5)
    rest = list(fit(resumed, *given, saved))
    assert [epoch.number for epoch in rest] == list(range(at + 1, 5))
    assert rest[-1].prob.tobytes() == expected[-1].prob.tobytes()
    assert largest_difference(whole.state_dict(), resumed.state_dict()) == 0


def test_what_a_client_keeps_is_never_spoiled(monkeypatch):
    def spoiled(model, *given):
        model[1].running_mean[0] = float("nan")
        return 0.5

    monkeypatch.setattr(client, "train_epoch", spoiled)
    with pytest.raises(DivergedError, match=r"left out of every round; center 0: .*1.running_mean holds"):
        federation(STRATEGIES["fedbn"])


@pytest.mark.parametrize(
    ("arm", "field", "value"),
    [
        *[("fedprox_0.05", "mu", 0.05), ("fedprox_0", "mu", 0), ("fedadam_1e-3", "adam", 1e-3)],
        *[("scaffold_0.5", "scaffold", 0.5), ("ditto_1", "ditto", 1), ("finetune_0.3", "finetune", 0.3)],
    ],
)
def test_a_value_in_the_name_of_an_arm_is_the_strategys_own(arm, field, value):
    assert strategy(arm) == Strategy(**{field: value})
    assert arm.partition("_")[2] in names.display_name(arm)


RANGE = "choose a value above 0 and at most 100"
UNKNOWN = r"unknown federated arm; known are fedavg, .*, ditto_<value>"


@pytest.mark.parametrize(
    ("arms", "message"),
    [
        (["fedprox_101", "fedadam_0", "ditto_0", "scaffold_1e9"], RANGE),
        (["fedsgd", "fedprox", "fedprox_", "fedprox_-1", "fedprox_nan", "fedbn_1", "ditto_x"], UNKNOWN),
    ],
)
def test_an_arm_that_is_no_strategy_is_refused_with_a_remedy(arms, message):
    for arm in arms:
        with pytest.raises(ValueError, match=f"{arm}: {message}"):
            strategy(arm)


def test_personal_arms_are_known_by_their_names():
    more = ["ditto_1", "finetune_0.3", "fedprox_1", "scaffold_2"]
    assert all(names.is_personal(arm) == strategy(arm).personal for arm in [*STRATEGIES, *more])
    assert all(names.display_name(arm) != arm for arm in [*STRATEGIES, *more])
