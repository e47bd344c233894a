import pytest
import torch
from small import federation, largest_difference, small_net, split
from torch import nn

from ipmn_core.federated import (
    STRATEGIES,
    Strategy,
    add_proximal_gradient,
    drawn,
    local_objective,
    weighted_average,
)


def test_the_local_objective_is_the_mean_negative_log_likelihood():
    logits, y = torch.randn(6, 3), torch.tensor([0, 1, 2, 0, 1, 2])
    likelihood = (logits.exp() / logits.exp().sum(1, keepdim=True))[torch.arange(6), y]
    torch.testing.assert_close(local_objective(logits, y), -likelihood.log().mean())


def test_gradient_of_the_proximal_term_is_mu_times_the_distance():
    w = [nn.Parameter(torch.randn(5, 3)), nn.Parameter(torch.randn(7))]
    w_t = [torch.randn(5, 3), torch.randn(7)]
    squared_norm = sum((a - b).square().sum() for a, b in zip(w, w_t, strict=True))
    by_autograd = torch.autograd.grad(0.3 / 2 * squared_norm, w)  # Eq. (3)'s second term as it is printed
    for parameter in w:
        parameter.grad = torch.ones_like(parameter)
    add_proximal_gradient(w, w_t, 0.3)
    for parameter, start, autograd in zip(w, w_t, by_autograd, strict=True):
        torch.testing.assert_close(parameter.grad - 1, autograd)
        torch.testing.assert_close(parameter.grad - 1, 0.3 * (parameter.detach() - start))


def test_at_the_global_weights_the_proximal_gradient_is_exactly_zero():
    w = nn.Parameter(torch.randn(1000))
    w.grad = torch.zeros(1000)
    add_proximal_gradient([w], [w.detach().clone()], 0.1)
    assert (w.grad == 0).all()  # AdamW would make full steps of a rounding error


def test_mu_zero_is_fedavg_bit_for_bit():
    fedavg, _ = federation(STRATEGIES["fedavg"])
    vanishing, _ = federation(Strategy(mu=1e-300))  # the proximal code with 0 in float32
    pulled, _ = federation(STRATEGIES["fedprox_0.3"])
    assert largest_difference(fedavg, vanishing) == 0
    assert largest_difference(fedavg, pulled) > 0


def test_the_average_weighs_by_cases_batchnorm_buffers_included():
    one = {"weight": torch.tensor([1.0]), "running_mean": torch.tensor([10.0]), "n": torch.tensor(3)}
    two = {"weight": torch.tensor([5.0]), "running_mean": torch.tensor([30.0]), "n": torch.tensor(8)}
    average = weighted_average([one, two], [10, 30])
    assert average["weight"].item() == 4.0
    assert average["running_mean"].item() == 25.0
    assert average["n"].item() == 6 and average["n"].dtype == torch.int64


def test_equal_clients_leave_the_weights_as_they_are():
    state = small_net().state_dict()
    assert largest_difference(weighted_average([state] * 4, [5, 5, 5, 5]), state) == 0


def test_aggregation_refuses_no_cases_and_uneven_lists():
    state = small_net().state_dict()
    assert weighted_average([], []) == {}
    with pytest.raises(ValueError, match="at least one training case"):
        weighted_average([state], [0])
    with pytest.raises(ValueError):
        weighted_average([state, state], [1])


def test_all_clients_take_part_or_as_many_as_are_drawn_from_the_seed():
    clients = list("abcdefg")
    assert drawn(clients, Strategy(), [0]) == drawn(clients, Strategy(clients_per_round=9), [0]) == clients
    rounds = [drawn(clients, Strategy(clients_per_round=3), [0, k]) for k in range(60)]
    assert rounds == [drawn(clients, Strategy(clients_per_round=3), [0, k]) for k in range(60)]
    assert all(sorted(set(names)) == names and len(names) == 3 for names in rounds)
    assert set().union(*rounds) == set(clients)


def test_clients_that_are_not_drawn_do_not_train():
    _, rounds = federation(Strategy(clients_per_round=1), split(8, 8, 8), epochs=1)
    absent = torch.from_numpy(rounds[0].inner_products).isnan().diagonal()
    assert absent.sum() == 2 and rounds[0].left_out == {}
