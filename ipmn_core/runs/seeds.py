"""Other training seeds: how much an AUC changes when only the random numbers of training change."""

from __future__ import annotations

import pandas as pd

from ipmn_core import metrics
from ipmn_core.metrics import centers
from ipmn_core.metrics.scores import RUN
from ipmn_core.names import is_personal
from ipmn_core.params import Params
from ipmn_core.runs import store


def points(p: Params) -> list[Params]:
    """One profile per seed of `more_seeds`, with the binary arms and the last modality.

    They are called `<profile>_seed1` and so on, and keep no weights.
    """
    same = {"modalities": p.modalities[-1:], "multiclass_models": (), "keep_models": ()}
    return [p.model_copy(update={**same, "seed": s, "profile": f"{p.profile}_seed{s}"}) for s in p.more_seeds]


def table(p: Params) -> pd.DataFrame:
    """AUC of each arm on the last modality, averaged over folds and seeds, and its two spreads.

    The epoch is chosen on inner validation; without it, the last epoch is used. Columns modality, arm, seeds,
    folds, and

    - auc: over all pairs, or within centers for a personal arm
    - over_seeds: standard deviation (ddof 1) between seeds in the same fold, root mean square over folds
    - over_folds: standard deviation (ddof 1) between folds with the same seed, root mean square over seeds

    Raises FileNotFoundError naming an unfinished run.
    """
    rule, rows = "best_inner" if p.inner_validation else "last", []
    for q in (p, *points(p)):
        predictions, inner = store.predictions(q, "binary"), store.validation(q, "binary")
        mine = predictions[predictions["modality"] == p.modalities[-1]]
        for (*_, fold), run in metrics.select(mine, rule, inner).groupby(RUN, sort=False):
            found = centers.decompose(run).iloc[0]
            value = found["within" if is_personal(found["arm"]) else "pooled"]
            rows.append((found["modality"], found["arm"], q.seed, fold, value))
    frame = pd.DataFrame(rows, columns=["modality", "arm", "seed", "fold", "auc"])
    groups = frame.groupby(["modality", "arm"], sort=False)
    spread = {f"over_{by}s": _spread(frame, other) for by, other in (("seed", "fold"), ("fold", "seed"))}
    counts = groups[["seed", "fold"]].nunique().rename(columns="{}s".format)
    return counts.assign(auc=groups["auc"].mean(), **spread).reset_index()


def _spread(frame: pd.DataFrame, same: str) -> pd.Series:
    """Root mean square of the standard deviations of `auc` between rows of one arm that share `same`."""
    variance = frame.groupby(["modality", "arm", same])["auc"].var()
    return variance.groupby(["modality", "arm"]).mean() ** 0.5
