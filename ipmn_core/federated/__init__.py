"""How weights are learned: equations, strategies, one client, rounds of all clients."""

from ipmn_core.federated.client import (
    Cases,
    DivergedError,
    Learner,
    Settings,
    check_n_train,
    evaluate,
    local_update,
    personalize,
    snapshot,
    train_epoch,
)
from ipmn_core.federated.device import device_of, one_thread, prepare, release_memory, uses_bfloat16
from ipmn_core.federated.equations import State, add_proximal_gradient, local_objective, weighted_average
from ipmn_core.federated.rounds import (
    Epoch,
    Update,
    aggregate,
    checkpoint_of,
    fit_centralized,
    fit_federated,
    fit_finetuned,
    fit_local_only,
    restore,
    without_any_client,
)
from ipmn_core.federated.strategies import STRATEGIES, Server, Strategy, drawn, strategy
