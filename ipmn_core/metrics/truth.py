"""Compare arms with the truth, which only the phantom has: the oracle and a guideline's rule as arms."""

import numpy as np
import pandas as pd

from ipmn_core.data import Cohort, targets
from ipmn_core.metrics.scores import ARM, GLOBAL, by_fold
from ipmn_core.names import TASKS


def reference_arms(selected: pd.DataFrame, truth: pd.DataFrame, cohort: Cohort) -> pd.DataFrame:
    """The arms `oracle` and `guideline`: predictions for the same test cases in the same folds.

    The oracle predicts each patient's true class probabilities. The guideline predicts the binary task, with
    0, 1/2, 1 for its classes 0, 1, 2. `truth` has one row per patient (`data.read_truth`). The result is
    empty if `truth` lacks the cohort's classes, as for real data. Raises ValueError naming cases that `truth`
    lacks.
    """
    columns = [f"prob_{k}" for k in range(len(cohort.classes))]
    if list(truth.filter(regex=r"^prob_\d+$")) != columns:
        return selected.iloc[:0]
    cases = selected.drop_duplicates(["task", "modality", "case_id"]).reset_index(drop=True)
    patients = truth.set_index(truth["patient_id"].str.casefold())
    known = patients.reindex(cases["case_id"].str.casefold()).reset_index(drop=True)
    missing = cases.loc[known["prob_0"].isna(), "case_id"].unique()
    if len(missing):
        raise ValueError(
            f"{len(missing)} cases have no patient in the phantom's truth, such as {', '.join(missing[:5])}: "
            "pass the truth.csv that was written with this cohort."
        )
    binary = cases["task"] == "binary"
    several = cases.assign(arm="oracle", **known[columns])[~binary]
    positive = [name for name, of in zip(columns, cohort.classes, strict=True) if of in cohort.positive]
    of_two = {"oracle": known[positive].sum(axis="columns"), "guideline": known["guideline"] / 2}
    two = [cases.assign(arm=arm, prob_0=1 - high, prob_1=high)[binary] for arm, high in of_two.items()]
    return pd.concat([several, *two], ignore_index=True).assign(epoch=1)


def ceiling(cohort: Cohort, truth: pd.DataFrame) -> pd.DataFrame:
    """AUC of the oracle and the guideline over all scans: columns task, modality, arm, auc."""
    cases = cohort.scans.assign(arm="", fold=0, seed=0, epoch=1)
    both = pd.concat([cases.assign(task=task, y_true=targets(cases, task)) for task in TASKS])
    known = by_fold(reference_arms(both, truth, cohort))
    return known.loc[known["center"] == GLOBAL, ["task", "modality", "arm", "auc"]].reset_index(drop=True)


def gap_closed(decomposed: pd.DataFrame) -> pd.DataFrame:
    """The share of the gap from chance to the oracle that each arm closes: (AUC - 0.5) / (oracle - 0.5).

    `decomposed` is `centers.decompose` of the arms and the oracle. Columns task, modality, arm, undefined,
    pooled, within, pooled_closed, within_closed.
    """
    keys = ["task", "modality"]
    table = decomposed[[*ARM, "undefined", "pooled", "within"]]
    oracle = table[table["arm"] == "oracle"].drop(columns=["arm", "undefined"])
    table = table.merge(oracle, on=keys, how="left", suffixes=("", "_oracle"), indicator=True)
    for scope in ("pooled", "within"):
        table[f"{scope}_closed"] = (table[scope] - 0.5) / (table.pop(f"{scope}_oracle") - 0.5)
    table["undefined"] = np.where(table.pop("_merge") == "both", table["undefined"], "no oracle")
    return table.sort_values(keys, kind="stable", ignore_index=True)
