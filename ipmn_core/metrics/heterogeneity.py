"""How the centers of a federation differ: drift and direction of their updates, gain of each center."""

from itertools import product

import numpy as np
import pandas as pd

from ipmn_core.metrics import inference, scores
from ipmn_core.names import is_personal

ROUND = ["modality", "arm", "fold", "round"]
OTHERS = ("centralized", "local_only")  # arms that are not federated


def drift(updates: pd.DataFrame) -> pd.DataFrame:
    """Client drift ||w_k - w_t||: columns modality, arm, fold, round, client, distance.

    From `runs.updates`, the inner products of the clients' updates. FedProx penalizes this distance, Eq. (3).
    """
    own = updates[updates["client"] == updates["other"]]
    return own[[*ROUND, "client"]].assign(distance=np.sqrt(own["inner_product"])).reset_index(drop=True)


def cosines(updates: pd.DataFrame) -> pd.DataFrame:
    """Cosine between the updates of two clients, mean over rounds and folds; 1 is the same direction.

    Columns modality, arm, client, other, cosine, in order of appearance. NaN where a client did not move.
    """
    length = drift(updates).set_index([*ROUND, "client"])["distance"]
    pairs = updates.join(length, on=[*ROUND, "client"])
    pairs = pairs.join(length.rename("other_distance"), on=[*ROUND, "other"])
    lengths = pairs["distance"] * pairs["other_distance"]
    pairs["cosine"] = pairs["inner_product"] / lengths.where(lengths > 0)
    keys = ["modality", "arm", "client", "other"]
    return pairs.groupby(keys, as_index=False, sort=False)["cosine"].mean()


def gain(selected: pd.DataFrame) -> pd.DataFrame:
    """AUC that each center gains with each federated arm over the trained arms of `OTHERS`.

    Columns modality, arm, over, center, n, positives, difference, low, high, undefined. `difference` is the
    AUC of the arm minus that of `over`, binary task, scores pooled over folds, with DeLong's paired 95 %
    interval. Weights from elsewhere are left out, because their training is unknown. Raises ValueError if a
    run has several epochs or two arms were not tested on the same cases.
    """
    rows = []
    mine = selected[(selected["task"] == "binary") & (selected["epoch"] != scores.AS_GIVEN)]
    for modality, frame in mine.groupby("modality"):
        trained = {arm: rows for (_, _, arm), rows in scores.arms(frame)}
        federated = [arm for arm in trained if arm not in OTHERS]
        for reference, arm in product((arm for arm in OTHERS if arm in trained), federated):
            pairs = inference.paired(trained[arm], trained[reference])
            parts = dict(scores.places(pairs))  # sorted by case
            for center in (*trained[arm]["center"].unique(), scores.GLOBAL):
                part, y = parts[center], parts[center]["y_true"].to_numpy()
                tested = inference.delong_test(y, part["prob_1"], part["prob_1_reference"])[:3]
                undefined = scores.absent_classes(y, 2) or inference.no_delong(y, 2)
                personal = [name for name in (reference, arm) if is_personal(name)]
                if personal and center == scores.GLOBAL:
                    tested = (np.nan,) * 3
                    undefined = f"no common scale: {personal[0]} has one model per center"
                rows.append((modality, arm, reference, center, len(y), y.sum(), *tested, undefined))
    columns = ["modality", "arm", "over", "center", "n", "positives", "difference", "low", "high"]
    return pd.DataFrame(rows, columns=[*columns, "undefined"])
