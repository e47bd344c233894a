"""A small network, its cases and settings, which the tests of this folder share."""

import torch
from torch import nn

from ipmn_core import federated
from ipmn_core.federated import Cases, Settings


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


def cases(n=33):
    rng = torch.Generator().manual_seed(0)
    return Cases(torch.rand(n, 1, 8, 8, 8, generator=rng).half(), torch.arange(n) % 2)


def settings(**changes):
    few = {"epochs": 3, "local_epochs": 1, "batch_size": 4, "batches_per_epoch": None, "seed": (0, 0)}
    protocol = {"lr": 1e-3, "weight_decay": 0.01, "lr_step": 30, "lr_gamma": 0.1, "augment_prob": 0.1}
    return Settings(**{**few, **protocol, **changes})


def split(*sizes):
    """As many centers, with so many cases each."""
    parts = torch.arange(sum(sizes)).split(list(sizes))
    return {f"center {k}": part for k, part in enumerate(parts)}


CLIENTS = split(9, 12, 12)


def federation(strategy, clients=CLIENTS, net=small_net, fit=federated.fit_federated, **changes):
    """Weights after all rounds, and the rounds; every client is tested on its own cases."""
    model, data = net(), cases(sum(map(len, clients.values())))
    rounds = list(fit(model, clients, clients, data, settings(**changes), strategy))
    return model.state_dict(), rounds


def steps_taken(epoch):
    """How many steps AdamW has made for each learner of an epoch."""
    states = {name: learner.optimizer.state.values() for name, learner in epoch.learners.items()}
    return {name: {float(moments["step"]) for moments in state} for name, state in states.items()}


def largest_difference(a, b):
    """Between two state dicts of the same keys."""
    assert a.keys() == b.keys()
    return max((a[key].double() - b[key].double()).abs().max().item() for key in b)
