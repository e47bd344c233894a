"""How much the centers of a federation differ: drift and direction of their updates, gain of each center."""

from itertools import product

import numpy as np
import pandas as pd

from ipmn_core.metrics import inference, scores
from ipmn_core.metrics.scores import GLOBAL, PLACES

ROUND = ["modality", "arm", "fold", "round"]


def drift(updates: pd.DataFrame) -> pd.DataFrame:
    """Client drift ||w_k - w_t||: the distance of each client's weights from the global model's, per round.

    `updates` holds inner products of the clients' updates (`runs.updates`), over all parameters without
    BatchNorm's buffers. Columns modality, arm, fold, round, client, distance. FedProx penalizes just
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
    lengths = pairs["distance"] * pairs["distance_other"]
    pairs["cosine"] = pairs["inner_product"] / lengths.where(lengths > 0)
    keys = ["modality", "arm", "client", "other"]
    mean = pairs.groupby(keys, sort=False, as_index=False)["cosine"].mean()
    clients = pd.CategoricalDtype(PLACES)
    ordered = mean.astype({"client": clients, "other": clients}).sort_values(keys).index
    return mean.loc[ordered].reset_index(drop=True)


def gain(selected: pd.DataFrame, over=("centralized", "local_only")) -> pd.DataFrame:
    """What each center gains by each federated arm over other ways to train: differences of its AUC.

    Columns modality, arm, over, center, n, positives, difference, low, high, undefined: AUC of the arm less
    that of `over`, scores of the center's test cases pooled over folds, with DeLong's paired 95 % interval.
    `selected` holds one epoch per run; its binary rows count. An `over` that was not trained is left out;
    where a number is NaN `undefined` says why. Raises ValueError if a run has several epochs or two arms were
    not tested on the same cases.
    """
    binary = scores.one_epoch(selected[selected["task"] == "binary"])
    rows = []
    for modality, frame in binary.groupby("modality"):
        arms = dict(list(frame.groupby("arm", sort=False)))
        federated = [arm for arm in arms if arm not in ("centralized", "local_only")]
        for reference, arm in product((arm for arm in over if arm in arms), federated):
            pairs = inference.paired(arms[arm], arms[reference])
            parts = dict(list(pairs.groupby("center"))) | {GLOBAL: pairs}
            for center in sorted(parts, key=PLACES.index):
                numbers = _difference(parts[center])
                if reference == "local_only" and center == GLOBAL:
                    numbers |= dict.fromkeys(("difference", "low", "high"), np.nan)
                    numbers["undefined"] = "no common scale: local_only has one model per center"
                rows.append({"modality": modality, "arm": arm, "over": reference, "center": center} | numbers)
    columns = ["n", "positives", "difference", "low", "high", "undefined"]
    return pd.DataFrame(rows, columns=["modality", "arm", "over", "center", *columns])


def _difference(pairs: pd.DataFrame) -> dict:
    """n, positives, difference of AUC, its interval and why one is NaN, of the cases of two arms."""
    y = pairs["y_true"].to_numpy()
    tested = inference.delong_test(y, pairs["prob_1"], pairs["prob_1_reference"])
    undefined = scores.absent_classes(y, 2) or inference.no_delong(y, 2, "interval")
    numbers = dict(zip(("difference", "low", "high"), tested, strict=False))
    return {"n": len(y), "positives": int(y.sum()), **numbers, "undefined": undefined}
