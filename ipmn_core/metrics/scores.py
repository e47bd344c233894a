"""Accuracy and AUC of predictions, by epoch, center and fold.

Every function is a pure function of the predictions: one row per test case and epoch (round), columns
`case_id, center, modality, task, arm, fold, seed, epoch, y_true, prob_0 ... prob_{K-1}`.
"""

import numpy as np
import pandas as pd
from scipy.stats import rankdata

from ipmn_core.names import CENTERS, LABELS

ARM = ["task", "modality", "arm"]  # what the folds of one arm share
RUN = [*ARM, "fold"]  # what identifies one run
GLOBAL = "global"  # the paper's name for all centers together
PLACES = [*CENTERS, GLOBAL]  # the order of rows
COLUMNS = ["case_id", "center", "modality", "task", "arm", "fold", "seed", "epoch", "y_true"]
REPEAT = "delete the run's folder and repeat the run, or restore the file"
RULES = {
    "best_test": "best on the test fold (paper)",
    "best_inner": "best on the inner split",
    "last": "last epoch or round",
}


class PredictionsError(ValueError):
    """A row of predictions is invalid; the message names the row and the file."""


def check(predictions: pd.DataFrame, not_tested=(), source: str = "the predictions") -> pd.DataFrame:
    """Validate predictions and return them unchanged.

    Raises PredictionsError naming a missing column or the first invalid row; the faults are listed below.
    `not_tested` are the case ids that the same run was trained on.
    """
    needed = [*COLUMNS, "prob_0", "prob_1"]
    if "task" in predictions and (predictions["task"] != "binary").any():
        needed += ["prob_2"]
    missing = [name for name in needed if name not in predictions]
    if missing:
        raise PredictionsError(f"{source}: no column {', '.join(missing)}; {REPEAT}")
    prob = predictions.filter(regex=r"^prob_\d+$").to_numpy(dtype=float)
    n_classes = np.where((predictions["task"] == "binary").to_numpy(), 2, prob.shape[1])
    filled = np.where(np.arange(prob.shape[1]) < n_classes[:, None], prob, 0)
    case = [*ARM, "case_id"]
    first = predictions.groupby(case)[["fold", "y_true"]].transform("first")
    faults = {
        "a cell is empty": predictions[COLUMNS].isna().any(axis=1),
        "its probabilities are not all between 0 and 1": ~((filled >= 0) & (filled <= 1)).all(axis=1),
        # softmax in float32 is off by up to 1e-6
        "its probabilities do not sum to 1": ~(np.abs(filled.sum(axis=1) - 1) < 1e-5),
        "its label is no class": ~predictions["y_true"].isin(range(3)) | (predictions["y_true"] >= n_classes),
        "this case is given twice in the same run and epoch": predictions.duplicated(
            [*case, "fold", "epoch"]
        ),
        "this case is tested in two folds of the arm": predictions["fold"] != first["fold"],
        "this case has another label in an earlier row": predictions["y_true"] != first["y_true"],
        "this case was trained on in the same run": predictions["case_id"].isin(not_tested),
    }
    for fault, where in faults.items():
        if np.any(where):
            i = int(np.argmax(where))
            row = predictions.iloc[i]
            case = f"case {row['case_id']} of {_name(row[RUN])}, epoch {row['epoch']}"
            raise PredictionsError(f"{source}, row {i} ({case}): {fault}; {REPEAT}")
    return predictions


def y_and_prob(frame: pd.DataFrame) -> tuple[np.ndarray, np.ndarray]:
    """Labels (N,) and class probabilities (N, K) of rows of one task.

    K counts the `prob_*` columns that hold any value. Raises ValueError if rows of two tasks are mixed or a
    probability is not finite.
    """
    if frame["task"].nunique() > 1:
        raise ValueError(f"Rows of several tasks {sorted(set(frame['task']))}: pass the rows of one task.")
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


def wins(positive, scores) -> tuple[np.ndarray, np.ndarray]:
    """Negatives below each positive, positives above each negative: (n_pos, A), (n_neg, A); ties count half.

    Mann-Whitney counts of A scores (N, A) of the same cases, or of one (N,), by midranks: O(A N log N) (Sun
    and Xu 2014, IEEE Signal Process. Lett. 21:1389-1393, Algorithm 2). Halves of integers have exact sums, so
    equal AUCs compare equal and the earliest epoch wins: scikit-learn's trapezoids differ in the last bit.
    """
    positive, scores = np.asarray(positive, dtype=bool), np.asarray(scores, dtype=float)
    rank, n_pos = rankdata(scores, axis=0), positive.sum()
    below = rank[positive] - rankdata(scores[positive], axis=0)
    return below, n_pos - (rank[~positive] - rankdata(scores[~positive], axis=0))


def auc(y, prob) -> float:
    """Area under the ROC curve for labels (N,) and probabilities (N, K): of class 1 for K = 2, else macro
    one-vs-rest. NaN where a class has no case.
    """
    y, prob = np.asarray(y), np.asarray(prob)
    found = []
    for k in scored_classes(prob):
        below, above = wins(y == k, prob[:, k])
        n_pairs = len(below) * len(above)
        found.append(below.sum() / n_pairs if n_pairs else np.nan)
    return float(np.mean(found))


def scored_classes(prob: np.ndarray) -> list[int]:
    """Classes whose AUCs against the rest are averaged: the second of two, else all."""
    return [1] if prob.shape[1] == 2 else list(range(prob.shape[1]))


def per_epoch(predictions: pd.DataFrame) -> pd.DataFrame:
    """Global accuracy and AUC of every epoch: columns task, modality, arm, fold, epoch, acc, auc, n."""
    keys, rows = [*RUN, "epoch"], []
    for _, frame in predictions.groupby("task"):
        y, prob = y_and_prob(frame)
        for key, index in frame.groupby(keys).indices.items():
            rows.append((*key, accuracy(y[index], prob[index]), auc(y[index], prob[index]), len(index)))
    return pd.DataFrame(rows, columns=[*keys, "acc", "auc", "n"]).sort_values(keys, ignore_index=True)


def select(
    predictions: pd.DataFrame, rule: str = "best_test", validation: pd.DataFrame | None = None
) -> pd.DataFrame:
    """Predictions of one epoch per run, chosen by `rule`.

    "best_test" is the paper's rule: the epoch (round) with the highest global AUC on the test fold, the
    earliest of equals, the last if no AUC is defined. It is optimistic: it reports on the cases that choose.
    The paper's text does not name the set (see the ledger), its released code uses the test fold.
    Departs from the paper: "best_inner" takes that AUC from `validation`, predictions of cases held out of
    the training fold; "last" is the last epoch. Neither uses the test fold. Raises ValueError for another
    rule, and for "best_inner" naming a run that has no inner validation.
    """
    if rule not in RULES:
        raise ValueError(f"Unknown selection rule {rule!r}: choose one of {', '.join(RULES)}.")
    judged = _validation_of(predictions, validation) if rule == "best_inner" else predictions
    return predictions.merge(_chosen(per_epoch(judged), rule))


def _chosen(scored: pd.DataFrame, rule: str) -> pd.DataFrame:
    """The epoch of each run that `rule` chooses by rows of `per_epoch`: columns of RUN, epoch."""
    epochs = []
    for run, rows in scored.groupby(RUN):
        last = rule == "last" or rows["auc"].isna().all()
        epochs.append((*run, rows["epoch"].max() if last else rows.loc[rows["auc"].idxmax(), "epoch"]))
    return pd.DataFrame(epochs, columns=[*RUN, "epoch"])


def _validation_of(predictions: pd.DataFrame, validation: pd.DataFrame | None) -> pd.DataFrame:
    """`validation`, if it has rows of every run of the predictions."""
    known = set() if validation is None else set(validation[RUN].itertuples(index=False, name=None))
    for run in predictions[RUN].drop_duplicates().itertuples(index=False, name=None):
        if run not in known:
            raise ValueError(f"{_name(run)} has no inner validation: train it with `inner_validation` > 0.")
    return validation


def by_fold(selected: pd.DataFrame) -> pd.DataFrame:
    """Accuracy and AUC of every run at each center and globally, from one epoch per run (see `select`).

    Columns task, modality, arm, fold, center, n, positives, acc, auc, undefined: `positives` counts the
    highest class (high risk), `center` includes "global", AUC is NaN where a class is absent and `undefined`
    then names the class. Raises ValueError if a run has several epochs.
    """
    rows = []
    for _, frame in one_epoch(selected).groupby("task", sort=False):
        frame = frame.reset_index(drop=True)
        labels, probabilities = y_and_prob(frame)
        for run, part in frame.groupby(RUN, sort=False):
            # the paper's global ACC, centers weighted by their test images, is the pooled accuracy
            for center, i in {**part.groupby("center", sort=False).groups, GLOBAL: part.index}.items():
                y, prob = labels[i], probabilities[i]
                n, n_classes = prob.shape
                numbers = n, int((y == n_classes - 1).sum()), accuracy(y, prob), auc(y, prob)
                rows.append((*run, center, *numbers, absent_classes(y, n_classes)))
    return pd.DataFrame(rows, columns=[*RUN, "center", "n", "positives", "acc", "auc", "undefined"])


def one_epoch(selected: pd.DataFrame) -> pd.DataFrame:
    """`selected` unchanged, if every run has one epoch. Raises ValueError naming one that has several."""
    epochs = selected.groupby(RUN)["epoch"].nunique()
    if (epochs > 1).any():
        raise ValueError(f"{_name(epochs.idxmax())} has several epochs: apply `metrics.select` first.")
    return selected


def kinds(n_classes: int) -> list[str]:
    """What cases of each class are called in a reason: "high-risk" and, of two classes, "other"."""
    risks = [label.replace(" ", "-") for label in LABELS]
    return risks if n_classes == len(LABELS) else ["other", risks[-1]]


def absent_classes(y, n_classes: int) -> str:
    """Why labels (N,) have no AUC, for a reader: "no high-risk case"; "" if every class has a case."""
    absent = [name for k, name in enumerate(kinds(n_classes)) if not (np.asarray(y) == k).any()]
    return f"no {' and no '.join(absent)} case" if absent else ""


def over_folds(folds: pd.DataFrame) -> pd.DataFrame:
    """Mean and standard deviation over folds of the rows of `by_fold`, as in tables 2 and 3 of the paper.

    Columns task, modality, arm, center, acc_mean, acc_std, auc_mean, auc_std, folds, auc_folds, undefined.
    Standard deviations divide by the number of folds (ddof = 0): only this gives the paper's AHN
    0.8750 +/- 0.1250 over 4 folds of 4 cases. A fold with an undefined AUC is left out of the AUC:
    `auc_folds` counts the others, `undefined` says which and why; mean and deviation of none are NaN.
    """
    groups = folds.groupby([*ARM, "center"], sort=False)
    mean, std = groups[["acc", "auc"]].mean(), groups[["acc", "auc"]].std(ddof=0)
    columns = {f"{m}_{name}": of[m] for m in ("acc", "auc") for name, of in (("mean", mean), ("std", std))}
    columns |= {"folds": groups.size(), "auc_folds": groups["auc"].count()}
    columns["undefined"] = pd.Series([in_folds(rows) for _, rows in groups], groups.size().index)
    return pd.DataFrame(columns).reset_index()


def in_folds(rows: pd.DataFrame) -> str:
    """Why and in which folds an AUC is undefined: "no high-risk case in fold 0, 2"; "" if in none."""
    reasons = rows[rows["undefined"] != ""].groupby("undefined", sort=False)["fold"]
    return "; ".join(f"{reason} in fold {', '.join(map(str, sorted(folds)))}" for reason, folds in reasons)


def optimism(predictions: pd.DataFrame, validation: pd.DataFrame | None = None) -> pd.DataFrame:
    """Global AUC, mean over folds, at the epoch chosen by each of the RULES: what choosing on the test adds.

    Columns task, modality, arm, epochs (to choose from), best_test, best_inner, last, peak_minus_inner,
    peak_minus_last, undefined. No difference is negative; more epochs make them larger, so compare arms of
    one length. Without an inner validation split `best_inner` is NaN and `undefined` says so.
    Departs from the paper, which reports the first alone.
    """
    tested = per_epoch(predictions)
    chosen = {rule: _chosen(tested, rule) for rule in ("best_test", "last")}
    if validation is not None and not validation.empty:
        chosen["best_inner"] = _chosen(per_epoch(_validation_of(predictions, validation)), "best_inner")
    columns = {rule: tested.merge(epochs).groupby(ARM)["auc"].mean() for rule, epochs in chosen.items()}
    table = pd.DataFrame(columns, index=columns["best_test"].index, columns=list(RULES))
    table = table.reindex(pd.MultiIndex.from_frame(predictions[ARM].drop_duplicates()))
    table.insert(0, "epochs", predictions.groupby(ARM)["epoch"].nunique())
    inner, last = (table["best_test"] - table[rule] for rule in ("best_inner", "last"))
    undefined = "" if "best_inner" in columns else "no inner validation split"
    return table.assign(peak_minus_inner=inner, peak_minus_last=last, undefined=undefined).reset_index()
