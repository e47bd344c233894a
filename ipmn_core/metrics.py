"""From predictions to numbers: accuracy and AUC by epoch, center and fold.

Every function is a pure function of the predictions: one row a test case and epoch (round), columns
`case_id, center, modality, task, arm, fold, seed, epoch, y_true, prob_0 ... prob_{K-1}`.
"""

import numpy as np
import pandas as pd
from scipy.stats import rankdata

RUN = ["task", "modality", "arm", "fold"]  # what identifies one run
GLOBAL = "global"  # the paper's name for all centers together


def scores(frame: pd.DataFrame) -> tuple[np.ndarray, np.ndarray]:
    """Labels (N,) and class probabilities (N, K) of rows of one task.

    K counts the `prob_*` columns that hold any value. Raises ValueError if rows of two tasks are mixed or a
    probability is not finite.
    """
    if frame["task"].nunique() > 1:
        raise ValueError(
            f"Rows of several tasks {sorted(frame['task'].unique())}: pass the rows of one task."
        )
    columns = [name for name in frame if name.startswith("prob_") and frame[name].notna().any()]
    prob = frame[columns].to_numpy(dtype=float)
    bad = ~np.isfinite(prob).all(axis=1)
    if bad.any() or not columns:
        row = frame.iloc[int(bad.argmax())]
        raise ValueError(
            f"Case {row['case_id']} of {_name(row[RUN])}, epoch {row['epoch']}: a probability is not finite, "
            "so this training diverged. Lower the learning rate, delete the run's folder and repeat it."
        )
    return frame["y_true"].to_numpy(dtype=int), prob


def _name(run) -> str:
    """A run as its folder is called."""
    task, modality, arm, fold = run
    return f"{task}/{modality}/{arm}/fold{fold}"


def accuracy(y, prob) -> float:
    """Share of cases whose most probable class (N, K) is their label (N,); a tie goes to the lower class."""
    return float(np.mean(np.argmax(prob, axis=1) == y))


def auc(y, prob) -> float:
    """Area under the ROC curve for labels (N,) and probabilities (N, K): of class 1 for K = 2, else macro
    one-vs-rest. NaN where a class has no case.
    """
    y, prob = np.asarray(y), np.asarray(prob)
    classes = [1] if prob.shape[1] == 2 else range(prob.shape[1])
    return float(np.mean([_rank_auc(y == k, prob[:, k]) for k in classes]))


def _rank_auc(positive: np.ndarray, score: np.ndarray) -> float:
    """AUC of a score (N,) in the Mann-Whitney form, ties counted half (Hanley and McNeil 1982).

    Preferred to the trapezoid of a ROC curve: sums of ranks are exact, so equal AUCs compare equal.
    """
    n_pos = int(positive.sum())
    n_neg = len(positive) - n_pos
    if n_pos == 0 or n_neg == 0:
        return np.nan
    return float((rankdata(score)[positive].sum() - n_pos * (n_pos + 1) / 2) / (n_pos * n_neg))


def global_accuracy(fold_frame: pd.DataFrame) -> float:
    """Accuracy over centers, each weighted by its number of test images; the rows are one fold's test cases.

    The weights make it the pooled accuracy of the fold.
    """
    centers = [(accuracy(*scores(rows)), len(rows)) for _, rows in fold_frame.groupby("center")]
    accuracies, n_images = zip(*centers, strict=True)
    return float(np.average(accuracies, weights=n_images))


def global_auc(fold_frame: pd.DataFrame) -> float:
    """AUC of one fold's test cases, scores pooled over centers; NaN if a class is absent."""
    return auc(*scores(fold_frame))


def per_epoch(predictions: pd.DataFrame) -> pd.DataFrame:
    """Global accuracy and AUC of every epoch: columns task, modality, arm, fold, epoch, acc, auc, n."""
    keys, rows = [*RUN, "epoch"], []
    for _, frame in predictions.groupby("task"):
        y, prob = scores(frame)
        for key, index in frame.groupby(keys).indices.items():
            # size-weighted center accuracies are the pooled accuracy (see `global_accuracy`)
            rows.append((*key, accuracy(y[index], prob[index]), auc(y[index], prob[index]), len(index)))
    return pd.DataFrame(rows, columns=[*keys, "acc", "auc", "n"]).sort_values(keys, ignore_index=True)


def _last(epochs: pd.DataFrame) -> int:
    """Last epoch of one run's `per_epoch` rows."""
    return epochs["epoch"].max()


def _best_test(epochs: pd.DataFrame) -> int:
    """Epoch with the highest global AUC, the earliest of equals; the last if no AUC is defined."""
    return _last(epochs) if epochs["auc"].isna().all() else epochs.loc[epochs["auc"].idxmax(), "epoch"]


RULES = {"best_test": _best_test, "last": _last}


def select(predictions: pd.DataFrame, rule: str = "best_test") -> pd.DataFrame:
    """Predictions of one epoch a run, chosen by `rule`.

    "best_test" is the paper's rule: the epoch (round) with the highest global AUC on the test fold, the
    earliest of equals. It is optimistic, for the cases that choose the epoch are those it is reported on; the
    paper's text does not name the set (section of disagreements), its released code uses the test fold.
    "last" is the last epoch and knows nothing of the test fold. Raises ValueError for another rule.
    """
    if rule not in RULES:
        raise ValueError(f"Unknown selection rule {rule!r}: choose one of {', '.join(RULES)}.")
    chosen = [(*run, RULES[rule](epochs)) for run, epochs in per_epoch(predictions).groupby(RUN)]
    return predictions.merge(pd.DataFrame(chosen, columns=[*RUN, "epoch"]), how="inner")


def by_fold(selected: pd.DataFrame) -> pd.DataFrame:
    """Accuracy and AUC of every run at each center and globally, from one epoch a run (see `select`).

    Columns task, modality, arm, fold, center, n, positives, acc, auc: `positives` counts the highest class
    (high risk), `center` includes "global", AUC is NaN where a class is absent. Raises ValueError if a run
    has several epochs.
    """
    rows = []
    for run, frame in selected.groupby(RUN, sort=False):
        if frame["epoch"].nunique() > 1:
            raise ValueError(f"{_name(run)} has several epochs: apply `select` first.")
        high = scores(frame)[1].shape[1] - 1
        for center, part in frame.groupby("center", sort=False):
            y, prob = scores(part)
            rows.append((*run, center, len(y), int((y == high).sum()), accuracy(y, prob), auc(y, prob)))
        n_high = int((frame["y_true"] == high).sum())
        rows.append((*run, GLOBAL, len(frame), n_high, global_accuracy(frame), global_auc(frame)))
    return pd.DataFrame(rows, columns=[*RUN, "center", "n", "positives", "acc", "auc"])


def over_folds(folds: pd.DataFrame) -> pd.DataFrame:
    """Mean and standard deviation over folds of the rows of `by_fold`, as in tables 2 and 3 of the paper.

    Columns task, modality, arm, center, acc_mean, acc_std, auc_mean, auc_std, folds, auc_folds. Standard
    deviations divide by the number of folds (ddof = 0): the paper's AHN 0.8750 +/- 0.1250 over 4 folds of
    4 cases can be nothing else. A fold with an undefined AUC is left out of the AUC, `auc_folds` counts the
    others; mean and deviation are NaN if there are none.
    """
    groups = folds.groupby(["task", "modality", "arm", "center"], sort=False)
    columns = {}
    for metric in ("acc", "auc"):
        columns[f"{metric}_mean"], columns[f"{metric}_std"] = (
            groups[metric].mean(),
            groups[metric].std(ddof=0),
        )
    return pd.DataFrame({**columns, "folds": groups.size(), "auc_folds": groups["auc"].count()}).reset_index()


def optimism(predictions: pd.DataFrame) -> pd.DataFrame:
    """Global AUC, mean over folds, at the epoch chosen on the test fold and at the last.

    Columns task, modality, arm, best_test, last, difference: what choosing on the test fold adds.
    Departs from the paper: it reports the first alone.
    """
    rules = {}
    for rule in RULES:
        summary = over_folds(by_fold(select(predictions, rule)))
        rules[rule] = summary[summary["center"] == GLOBAL].set_index(["task", "modality", "arm"])["auc_mean"]
    table = pd.DataFrame(rules)
    return table.assign(difference=table["best_test"] - table["last"]).reset_index()


def ceiling(scans: pd.DataFrame, truth: pd.DataFrame) -> pd.DataFrame:
    """Pooled AUC of the phantom's true model: columns task, modality, oracle_auc, guideline_auc.

    `scans` has case_id, patient_id, modality, label; `truth` has one row a patient: patient_id, the true
    class probabilities prob_0, prob_1, prob_2 given the findings, and `guideline`, a rule's score for high
    risk (binary task only). Upper and lower case of a patient_id do not matter. Empty if `truth` is, as for
    real data. Raises ValueError naming scans whose patient is not in `truth`.
    """
    columns = ["task", "modality", "oracle_auc", "guideline_auc"]
    if truth.empty:
        return pd.DataFrame(columns=columns)
    known = scans.assign(patient=scans["patient_id"].str.casefold()).merge(
        truth.assign(patient=truth["patient_id"].str.casefold()).drop(columns="patient_id"),
        on="patient",
        how="left",
        validate="many_to_one",
        suffixes=("", "_truth"),
    )
    missing = known.loc[known["prob_0"].isna(), "case_id"]
    if len(missing):
        raise ValueError(
            f"{len(missing)} scans have no patient in the phantom's truth, such as {', '.join(missing[:5])}: "
            "pass the truth.csv that was written with this cohort."
        )
    rows = []
    for modality, frame in known.groupby("modality"):
        label, prob = frame["label"].to_numpy(), frame[["prob_0", "prob_1", "prob_2"]].to_numpy()
        guideline = _rank_auc(label == 2, frame["guideline"].to_numpy())
        rows.append(("binary", modality, _rank_auc(label == 2, prob[:, 2]), guideline))
        rows.append(("three_class", modality, auc(label, prob), np.nan))
    return pd.DataFrame(rows, columns=columns)


def beside_ceiling(summary: pd.DataFrame, ceiling: pd.DataFrame) -> pd.DataFrame:
    """Global AUC of every arm (`over_folds`) beside the oracle's and the guideline's (`ceiling`)."""
    rows = summary.loc[summary["center"] == GLOBAL, ["task", "modality", "arm", "auc_mean", "auc_std"]]
    return rows.merge(ceiling, on=["task", "modality"], how="left")
