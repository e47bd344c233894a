"""The AUC within and between centers, and the tables of the per-center explorer.

An AUC is the share of (positive, negative) pairs in the right order; ties count one half. The centers'
prevalences can order pairs of two centers, but no pair within a center. Pairs are counted within a fold,
because models of two folds share no scale (van Klaveren et al., BMC Medical Research Methodology 14:5, 2014).
"""

import numpy as np
import pandas as pd

from ipmn_core.metrics import inference, scores
from ipmn_core.metrics.scores import ARM, GLOBAL, RULES, RUN, y_and_prob
from ipmn_core.names import family, is_personal


def decompose(selected: pd.DataFrame) -> pd.DataFrame:
    """AUC of every arm over all pairs, pairs within a center and pairs between centers; one epoch per run.

    Columns task, modality, arm, pooled, within, between, share_within, pairs, undefined. `share_within` is
    the share of pairs within a center: pooled = share_within * within + (1 - share_within) * between. With
    three classes a value is the mean over classes, each against the rest (`pairs`: their sum), and the
    identity holds for each class. A personal arm has one model per center, so only `within` is meaningful. A
    value without pairs is NaN, and `undefined` says why. Raises ValueError if a run has several epochs.
    """
    rows = []
    for arm, frame in scores.arms(selected):
        won, pairs = _count(frame, ["fold"])
        won_here, pairs_here = _count(frame, ["fold", "center"])
        shares = {
            "pairs": _mean(won, pairs),
            "pairs within a center": _mean(won_here, pairs_here),
            "pairs between centers": _mean(won - won_here, pairs - pairs_here),
        }
        undefined = _absent(frame) or "; ".join(f"no {kind}" for kind in shares if np.isnan(shares[kind]))
        rows.append((*arm, *shares.values(), _mean(pairs_here, pairs), int(pairs.sum()), undefined))
    numbers = ["pooled", "within", "between", "share_within", "pairs", "undefined"]
    return pd.DataFrame(rows, columns=[*ARM, *numbers])


def within_by_center(selected: pd.DataFrame) -> pd.DataFrame:
    """AUC of every arm over the pairs of each center, one epoch per run; centers in order of appearance.

    Columns task, modality, arm, center, within, pairs, undefined, as in `decompose`.
    """
    rows = []
    for arm, frame in scores.arms(selected):
        for center, part in scores.places(frame)[:-1]:
            won, pairs = _count(part, ["fold"])
            undefined = "" if pairs.all() else _absent(part) or "no pairs"
            rows.append((*arm, center, _mean(won, pairs), int(pairs.sum()), undefined))
    return pd.DataFrame(rows, columns=[*ARM, "center", "within", "pairs", "undefined"])


def tuned(selected: pd.DataFrame, validation: pd.DataFrame) -> pd.DataFrame:
    """`selected` with one arm per strategy, in each fold with the value that inner validation chose.

    Arms that differ only in a value (`fedprox_0.1`, `fedprox_0.3`) become one arm with the strategy's name;
    the column `chosen` has the original arm. The criterion is the AUC within centers on the `validation`
    cases at the selected epoch, which suits personal arms, too; ties go to the first arm. Raises ValueError
    naming an arm without inner validation.
    """
    families = selected["arm"].map(family)
    several = selected.assign(arm=families, own=selected["arm"]).groupby(ARM)["own"].transform("nunique") > 1
    judged = validation.merge(selected[[*RUN, "epoch"]].drop_duplicates())
    within = {run: _mean(*_count(rows, ["center"])) for run, rows in judged.groupby(RUN)}
    parts = [selected[~several].assign(chosen=selected["arm"])]
    for (*of, fold), rows in selected[several].groupby([*ARM[:2], families, "fold"], sort=False):
        arms = rows["arm"].unique()
        if lacking := [arm for arm in arms if (*of[:2], arm, fold) not in within]:
            raise ValueError(f"{lacking[0]} has no inner validation: set inner_validation")
        best = max(arms, key=lambda arm: within[(*of[:2], arm, fold)])
        parts.append(rows[rows["arm"] == best].assign(arm=of[2], chosen=best))
    return pd.concat(parts, ignore_index=True)


def by_strategy(tuned: pd.DataFrame) -> pd.DataFrame:
    """ACC and AUC of each strategy of `tuned`, over folds, and its AUC within centers.

    Columns modality, arm, chosen (the values, fold by fold), acc_mean, acc_std, auc_mean, auc_std, within.
    A personal arm has no global AUC (NaN), because its models share no scale.
    """
    table = scores.over_folds(scores.by_fold(tuned))
    table = table[table["center"] == GLOBAL].merge(decompose(tuned)[[*ARM, "within"]])
    several = tuned.loc[tuned["arm"] != tuned["chosen"], "arm"].unique()
    values = tuned.groupby([*ARM, "fold"])["chosen"].first().map(lambda arm: arm.rpartition("_")[2])
    table = table.join(values.groupby(ARM).agg(", ".join), on=ARM)
    table["chosen"] = table["chosen"].where(table["arm"].isin(several), "")
    return table[["modality", "arm", "chosen", "acc_mean", "acc_std", "auc_mean", "auc_std", "within"]]


def unseen(predictions: pd.DataFrame, validation: pd.DataFrame | None = None) -> pd.DataFrame:
    """Every arm at each center that its training left out (`fold_rule: leave_one_center_out`), binary task.

    Columns task, modality, arm, center, n, positives, acc and auc with limits (`inference.intervals`; global:
    the mean AUC of the centers), auc_best_test, gained, undefined. The epoch is chosen on inner `validation`;
    without it, the last epoch is used. Departs from the authors' newer code, which chooses the epoch on the
    left-out center: `auc_best_test` is what that code would print, `gained` the difference.
    """
    binary = predictions[predictions["task"] == "binary"]
    rule = "last" if validation is None or validation.empty else "best_inner"
    table = inference.intervals(scores.select(binary, rule, validation))
    peak = scores.over_folds(scores.by_fold(scores.select(binary)))
    peak = peak.rename(columns={"auc_mean": "auc_best_test"})[[*ARM, "center", "auc_best_test"]]
    table = table.drop(columns=["pooled_auc", "pooled_low", "pooled_high"]).merge(peak, how="left")
    table["gained"] = table["auc_best_test"] - table["auc"]
    return table[[*(name for name in table if name != "undefined"), "undefined"]]


def cross_site(cross: pd.DataFrame, predictions: pd.DataFrame) -> pd.DataFrame:
    """AUC of each center's own model at each center, and of the common models trained here, last epoch.

    Columns modality, arm, trained_at (a center; "global" for a common model), center (tested at), n,
    positives, auc (over pairs of a fold and center, as `within_by_center`), pairs, over_own (AUC minus that
    of the tested center's own model), undefined. `cross` is `runs.cross`; `predictions` has all epochs.
    """
    last = scores.select(predictions[predictions["epoch"] != scores.AS_GIVEN], "last")
    common = within_by_center(last[~last["arm"].map(is_personal)]).assign(trained_at=GLOBAL)
    own = within_by_center(cross.assign(arm=cross["model_center"])).rename(columns={"arm": "trained_at"})
    table = pd.concat([own.assign(arm="local_only"), common], ignore_index=True)
    table = table.rename(columns={"within": "auc"})
    keys, cases = ["modality", "center"], cross.drop_duplicates(["modality", "fold", "case_id"])
    counts = cases.groupby(keys)["y_true"].agg(n="size", positives="sum")
    diagonal = own[own["trained_at"] == own["center"]].set_index(keys)["within"].rename("own")
    table = table.join(counts, on=keys).join(diagonal, on=keys)
    table["over_own"] = table["auc"] - table["own"]
    numbers = ["n", "positives", "auc", "pairs", "over_own", "undefined"]
    return table[["modality", "arm", "trained_at", "center", *numbers]]


def _count(frame: pd.DataFrame, keys: list[str]) -> np.ndarray:
    """(2, K): pairs in the right order, and all pairs, of each class against the rest; grouped by `keys`."""
    y, prob = y_and_prob(frame)
    counts = []
    for k in scores.scored_classes(prob):
        rights = [scores.ordered(y[i] == k, prob[i, k]) for i in frame.groupby(keys).indices.values()]
        counts.append([(right.sum(), right.size) for right in rights])
    return np.sum(counts, axis=1).T


def _mean(part: np.ndarray, whole: np.ndarray) -> float:
    """Mean over classes of part / whole; NaN if a whole is 0."""
    return float(np.mean(part / np.where(whole > 0, whole, np.nan)))


def _absent(frame: pd.DataFrame) -> str:
    y, prob = y_and_prob(frame)
    return scores.absent_classes(y, prob.shape[1])


def by_rules(predictions: pd.DataFrame, validation: pd.DataFrame | None = None) -> pd.DataFrame:
    """`metrics.select` for every rule, with a column `rule`; no "best_inner" without `validation`."""
    inner = validation is not None and not validation.empty
    rules = [rule for rule in RULES if rule != "best_inner" or inner]
    chosen = [scores.select(predictions, rule, validation).assign(rule=rule) for rule in rules]
    return pd.concat(chosen, ignore_index=True)


def summary(selected: pd.DataFrame, n_resamples: int = 2000, seed: int = 0) -> pd.DataFrame:
    """`inference.intervals` of each rule of `by_rules`, one row per metric.

    Columns task, modality, arm, rule, center, metric ("acc", "auc"), mean, low, high, undefined.
    """
    tables = []
    for (rule, _), rows in selected.groupby(["rule", "task"], sort=False):
        numbers = inference.intervals(rows, n_resamples, seed).assign(rule=rule)
        for metric in ("acc", "auc"):
            names = {metric: "mean", f"{metric}_low": "low", f"{metric}_high": "high"}
            tables.append(numbers.rename(columns=names).assign(metric=metric))
    columns = [*ARM, "rule", "center", "metric", "mean", "low", "high", "undefined"]
    return pd.concat(tables, ignore_index=True)[columns]
