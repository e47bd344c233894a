"""Profiles made from one: the dial (scanners that differ less or more) and other training seeds."""

from __future__ import annotations

from itertools import product

import pandas as pd

from ipmn_core import data, metrics
from ipmn_core.metrics import centers, truth
from ipmn_core.metrics.scores import RUN
from ipmn_core.names import is_personal
from ipmn_core.params import Params
from ipmn_core.runs import store


def dial_points(p: Params) -> list[Params]:
    """One profile per point of the dial, `phantom_shift` x `intensity`; empty without a dial.

    A point is a separate profile with its own folder, called for instance `<profile>_shift0.75_zscore`. The
    point with the profile's own settings is the profile itself.
    """
    found = []
    for shift, how in product(p.dial_shifts, p.dial_intensities or (p.intensity,)):
        at = {"phantom_shift": shift, "intensity": how, "profile": f"{p.profile}_shift{shift:g}_{how}"}
        here = (shift, how) == (p.phantom_shift, p.intensity)
        found.append(p if here else p.model_copy(update=at))
    return found


def dial_table(p: Params) -> pd.DataFrame:
    """AUC within centers of every arm and of the oracle at each point of the dial, last epoch.

    Columns intensity, shift, modality, arm, fold, within, undefined. Raises FileNotFoundError naming an
    unfinished run.
    """
    tables = []
    for q in dial_points(p):
        last = metrics.select(store.predictions(q, "binary"), "last")
        known = truth.reference_arms(last, data.read_truth(q), data.open_cohort(q))
        every = pd.concat([last, known[known["arm"] == "oracle"]])
        for fold, rows in every.groupby("fold"):
            numbers = centers.decompose(rows)[["modality", "arm", "within", "undefined"]]
            tables.append(numbers.assign(intensity=q.intensity, shift=q.phantom_shift, fold=fold))
    columns = ["intensity", "shift", "modality", "arm", "fold", "within", "undefined"]
    return pd.concat(tables, ignore_index=True)[columns]


def seed_points(p: Params) -> list[Params]:
    """Other training seeds: one profile per seed of `more_seeds`, with the binary arms and the last modality.

    They are called `<profile>_seed1` and so on, and keep no weights.
    """
    same = {"modalities": p.modalities[-1:], "multiclass_models": (), "keep_models": ()}
    return [p.model_copy(update={**same, "seed": s, "profile": f"{p.profile}_seed{s}"}) for s in p.more_seeds]


def seed_table(p: Params) -> pd.DataFrame:
    """AUC of each arm on the last modality, averaged over folds and seeds, and its two spreads.

    The epoch is chosen on inner validation; without it, the last epoch is used. Columns modality, arm, seeds,
    folds, and

    - auc: over all pairs, or within centers for a personal arm
    - over_seeds: standard deviation (ddof 1) between seeds in the same fold, root mean square over folds
    - over_folds: standard deviation (ddof 1) between folds with the same seed, root mean square over seeds

    Raises FileNotFoundError naming an unfinished run.
    """
    rule, rows = "best_inner" if p.inner_validation else "last", []
    for q in (p, *seed_points(p)):
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
