"""The dial: a profile's binary arms on phantoms whose scanners differ less or more, per intensity setting."""

from __future__ import annotations

from itertools import product

import pandas as pd

from ipmn_core import data, metrics
from ipmn_core.metrics import centers, truth
from ipmn_core.params import Params
from ipmn_core.runs import store


def points(p: Params) -> list[Params]:
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


def table(p: Params) -> pd.DataFrame:
    """AUC within centers of every arm and of the oracle at each point of the dial, last epoch.

    Columns intensity, shift, modality, arm, fold, within, undefined. Raises FileNotFoundError naming an
    unfinished run.
    """
    tables = []
    for q in points(p):
        last = metrics.select(store.predictions(q, "binary"), "last")
        known = truth.reference_arms(last, data.read_truth(q), data.open_cohort(q))
        every = pd.concat([last, known[known["arm"] == "oracle"]])
        for fold, rows in every.groupby("fold"):
            numbers = centers.decompose(rows)[["modality", "arm", "within", "undefined"]]
            tables.append(numbers.assign(intensity=q.intensity, shift=q.phantom_shift, fold=fold))
    columns = ["intensity", "shift", "modality", "arm", "fold", "within", "undefined"]
    return pd.concat(tables, ignore_index=True)[columns]
