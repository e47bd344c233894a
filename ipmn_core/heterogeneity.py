"""How much the centers of a federation differ: drift and direction of their updates, gain of each center."""

import numpy as np
import pandas as pd

from ipmn_core.cohort import CENTERS
from ipmn_core.inference import delong_test
from ipmn_core.metrics import GLOBAL, absent_classes

ROUND = ["modality", "arm", "fold", "round"]


def drift(updates: pd.DataFrame) -> pd.DataFrame:
    """Client drift ||w_k - w_t||: how far each client's weights left the global model's, in every round.

    `updates` holds inner products of the clients' updates (`runs.updates`), over all parameters without
    BatchNorm's buffers. Columns modality, arm, fold, round, client, distance. FedProx penalises just
    this distance, Eq. (3); a center of few cases makes fewer steps, so compare a client across arms first.
    """
    own = updates[updates["client"] == updates["other"]]
    return own[[*ROUND, "client"]].assign(distance=np.sqrt(own["inner_product"])).reset_index(drop=True)


def cosines(updates: pd.DataFrame) -> pd.DataFrame:
    """Cosine between the updates of two clients, mean over rounds and folds: do they pull the same way?

    Columns modality, arm, client, other, cosine, clients in the order of the centers. 1: the same direction,
    0: nothing in common, below 0: what helps one undoes the other. NaN where a client did not move.
    """
    length = drift(updates)
    pairs = updates.merge(length, on=[*ROUND, "client"]).merge(
        length.rename(columns={"client": "other"}), on=[*ROUND, "other"], suffixes=("", "_other")
    )
    product = pairs["distance"] * pairs["distance_other"]
    pairs["cosine"] = pairs["inner_product"] / product.where(product > 0)
    mean = pairs.groupby(["modality", "arm", "client", "other"], sort=False, as_index=False)["cosine"].mean()
    rank = {center: k for k, center in enumerate(CENTERS)}
    order = mean.assign(a=mean["client"].map(rank), b=mean["other"].map(rank))
    return mean.loc[order.sort_values(["modality", "arm", "a", "b"]).index].reset_index(drop=True)


def gain(selected: pd.DataFrame, over=("centralized", "local_only")) -> pd.DataFrame:
    """What each center gains by each federated arm over other ways to train: differences of its AUC.

    Columns modality, arm, over, center, n, positives, difference, low, high, undefined: AUC of the arm less
    that of `over`, scores of the center's test cases pooled over folds, with DeLong's paired 95 % interval.
    `selected` holds one epoch a run; its binary rows count. An `over` that was not trained is left out; a
    center of one class has no AUC, `undefined` says so. Compare with care: seven centers, wide intervals.
    """
    binary = selected[selected["task"] == "binary"]
    rows = []
    for modality, frame in binary.groupby("modality"):
        arms = dict(list(frame.groupby("arm", sort=False)))
        federated = [arm for arm in arms if arm not in ("centralized", "local_only")]
        for reference in (arm for arm in over if arm in arms):
            for arm in federated:
                for center in [*(c for c in CENTERS if c in set(frame["center"])), GLOBAL]:
                    values = _paired(arms[arm], arms[reference], center)
                    rows.append((modality, arm, reference, center, *values))
    columns = ["n", "positives", "difference", "low", "high", "undefined"]
    return pd.DataFrame(rows, columns=["modality", "arm", "over", "center", *columns])


def _paired(arm: pd.DataFrame, reference: pd.DataFrame, center: str) -> tuple:
    """n, positives, difference of AUC, its interval and why it is undefined, of one center's cases."""
    both = arm.merge(reference, on=["case_id", "fold"], suffixes=("", "_other"), validate="one_to_one")
    mine = both if center == GLOBAL else both[both["center"] == center]
    y, absent = mine["y_true"].to_numpy(), absent_classes(mine["y_true"], 2)
    if absent:
        return len(y), int(y.sum()), np.nan, np.nan, np.nan, absent
    difference, low, high, *_ = delong_test(y, mine["prob_1"].to_numpy(), mine["prob_1_other"].to_numpy())
    return len(y), int(y.sum()), difference, low, high, ""
