"""Accuracy and AUC of predictions, by epoch, center and fold.

Pure functions of the predictions: one row per test case and epoch (round), columns
`case_id, center, modality, task, arm, fold, seed, epoch, y_true, prob_0 ... prob_{K-1}`.
"""

from collections.abc import Iterable

import numpy as np
import pandas as pd

from ipmn_core.names import is_personal

ARM = ["task", "modality", "arm"]  # columns that identify an arm
RUN = [*ARM, "fold"]  # columns that identify a run
GLOBAL = "global"  # the paper's name for all centers together
COLUMNS = ["case_id", "center", "modality", "task", "arm", "fold", "seed", "epoch", "y_true"]
AS_GIVEN = 0  # the epoch number of weights from elsewhere
REPEAT = "delete the run's folder and repeat the run, or restore the file"
RULES = {
    "best_test": "best on the test fold (paper)",
    "best_inner": "best on the inner split",
    "last": "last epoch or round",
}


class PredictionsError(ValueError):
    """A row of predictions is invalid; the message names the row and the file."""


def none() -> pd.DataFrame:
    """An empty table of predictions."""
    number = {"fold": int, "seed": int, "epoch": int, "y_true": int, "prob_0": float, "prob_1": float}
    return pd.DataFrame(columns=list(dict.fromkeys([*COLUMNS, *number])), dtype=str).astype(number)


def check(predictions: pd.DataFrame, not_tested=(), source: str = "the predictions") -> pd.DataFrame:
    """Validate predictions and return them unchanged.

    Raises PredictionsError naming a missing column or the first invalid row. `not_tested` are the case ids
    that the same run was trained on.
    """
    missing = [name for name in (*COLUMNS, "prob_0", "prob_1") if name not in predictions]
    if missing:
        raise PredictionsError(f"{source}: no column {', '.join(missing)}; {REPEAT}")
    prob = predictions.filter(regex=r"^prob_\d+$").to_numpy(dtype=float)
    n_classes = np.where((predictions["task"] == "binary").to_numpy(), 2, prob.shape[1])
    filled = np.where(np.arange(prob.shape[1]) < n_classes[:, None], prob, 0)
    case = [*ARM, "case_id"]
    first = predictions.groupby(case)[["fold", "y_true"]].transform("first")
    twice = predictions.duplicated([*case, "fold", "epoch"])
    faults = {
        "a cell is empty": predictions[COLUMNS].isna().any(axis=1),
        "its probabilities are not all between 0 and 1": ~((filled >= 0) & (filled <= 1)).all(axis=1),
        # softmax in float32 is off by up to 1e-6
        "its probabilities do not sum to 1": ~(np.abs(filled.sum(axis=1) - 1) < 1e-5),
        "its label is no class": ~predictions["y_true"].isin(range(prob.shape[1]))
        | (predictions["y_true"] >= n_classes),
        "this case is given twice in the same run and epoch": twice,
        "this case is tested in two folds of the arm": predictions["fold"] != first["fold"],
        "this case has another label in an earlier row": predictions["y_true"] != first["y_true"],
        "this case was trained on in the same run": predictions["case_id"].isin(not_tested),
    }
    for fault, where in faults.items():
        if np.any(where):
            i = int(np.argmax(where))
            raise PredictionsError(f"{source}, row {i} ({_case(predictions.iloc[i])}): {fault}; {REPEAT}")
    return predictions


def _name(run) -> str:
    """The folder name of a run."""
    task, modality, arm, fold = run
    return f"{task}/{modality}/{arm}/fold{fold}"


def _case(row: pd.Series) -> str:
    return f"case {row['case_id']} of {_name(row[RUN])}, epoch {row['epoch']}"


def y_and_prob(frame: pd.DataFrame) -> tuple[np.ndarray, np.ndarray]:
    """Labels (N,) and class probabilities (N, K) of rows of one task.

    K counts the `prob_*` columns that are not empty. Raises ValueError if tasks are mixed or a probability is
    not finite.
    """
    if len(tasks := set(frame["task"])) > 1:
        raise ValueError(f"Rows of several tasks {sorted(tasks)}: pass the rows of one task.")
    prob = frame[[name for name in frame if name.startswith("prob_")]].to_numpy(dtype=float)
    prob = prob[:, ~np.isnan(prob).all(axis=0)]
    bad = ~np.isfinite(prob).all(axis=1)
    if bad.any() or not prob.shape[1]:
        raise ValueError(
            f"{_case(frame.iloc[int(bad.argmax())])}: a probability is not finite, so this training "
            "diverged. Lower the learning rate, delete the run's folder and repeat it."
        )
    return frame["y_true"].to_numpy(dtype=int), prob


def arms(selected: pd.DataFrame):
    """(task, modality, arm) and rows of each arm, in order of appearance.

    Raises ValueError naming a run that has several epochs.
    """
    epochs = selected.groupby(RUN)["epoch"].nunique()
    if (epochs > 1).any():
        raise ValueError(f"{_name(epochs.idxmax())} has several epochs: apply `metrics.select` first.")
    return selected.groupby(ARM, sort=False)


def places(rows: pd.DataFrame):
    """Name and rows of each center, in order of appearance, and of all together ("global")."""
    parts = dict(list(rows.groupby("center", sort=False)))
    return list((parts | {GLOBAL: rows}).items())


def accuracy(y, prob) -> float:
    """Share of cases whose most probable class (N, K) is their label (N,); ties go to the lower class."""
    return float(np.mean(np.argmax(prob, axis=1) == y))


def ordered(positive, score) -> np.ndarray:
    """For each pair, 1 if the positive scores above the negative, 1/2 if equal, else 0: (n_pos, n_neg)."""
    positive, score = np.asarray(positive, dtype=bool), np.asarray(score, dtype=float)
    return (np.sign(np.subtract.outer(score[positive], score[~positive])) + 1) / 2


def scored_classes(prob: np.ndarray) -> list[int]:
    """Classes whose AUCs against the rest are averaged: all, or the second of two."""
    return [1] if prob.shape[1] == 2 else list(range(prob.shape[1]))


def auc(y, prob) -> float:
    """Area under the ROC curve for labels (N,) and probabilities (N, K).

    Of class 1 for K = 2, else macro one-vs-rest. NaN if a class has no case.
    """
    return float(weighted_auc(np.asarray(y), np.asarray(prob), np.ones((1, len(y))))[0])


def weighted_auc(y, prob, weights) -> np.ndarray:
    """`auc` (B,) of B resamples given as weights (B, N), the number of times each case is drawn."""
    aucs = []
    for k in scored_classes(prob):
        pos, neg = weights[:, y == k], weights[:, y != k]
        n_pairs = pos.sum(axis=1, dtype=float) * neg.sum(axis=1, dtype=float)
        # halves have exact sums, so equal AUCs compare equal; scikit-learn's trapezoids do not
        right = (pos @ ordered(y == k, prob[:, k]).astype(np.result_type(pos, np.float32)) * neg).sum(
            axis=1, dtype=float
        )
        aucs.append(right / np.where(n_pairs > 0, n_pairs, np.nan))
    return np.mean(aucs, axis=0)


def per_epoch(predictions: pd.DataFrame) -> pd.DataFrame:
    """Global ACC and AUC of every epoch: columns task, modality, arm, fold, epoch, acc, auc."""
    keys, rows = [*RUN, "epoch"], []
    for _, frame in predictions.groupby("task"):
        y, prob = y_and_prob(frame)
        for key, i in frame.groupby(keys).indices.items():
            rows.append((*key, accuracy(y[i], prob[i]), auc(y[i], prob[i])))
    return pd.DataFrame(rows, columns=[*keys, "acc", "auc"]).sort_values(keys, ignore_index=True)


def best_epoch(epochs: Iterable[tuple[int, float, float]]) -> int:
    """The epoch that the released code keeps, of (epoch, ACC, AUC) in order: the one with the highest AUC.

    Of equal AUCs the later, if no epoch before it has a higher ACC; the last epoch if no AUC is defined.
    """
    best, top_acc, top_auc = 0, -1.0, -1.0
    for epoch, acc, auc_ in epochs:
        if not auc_ < top_auc and (auc_ != top_auc or acc >= top_acc):
            best, top_auc = epoch, auc_
        top_acc = max(top_acc, acc)
    return best


def select(
    predictions: pd.DataFrame, rule: str = "best_test", validation: pd.DataFrame | None = None
) -> pd.DataFrame:
    """Predictions of one epoch per run, chosen by `rule`.

    "best_test" is the paper's rule: the epoch (round) with the highest global AUC on the test fold
    (`best_epoch`). The paper's text does not name the set; its released code uses the test fold. The rule is
    optimistic, because the same cases choose the epoch and give the result. Departs from the paper:
    "best_inner" takes the AUC from `validation`, predictions of cases held out of the training fold; "last"
    is the last epoch. Weights from elsewhere have one epoch, AS_GIVEN. Raises ValueError for another rule,
    and for "best_inner" if a run has no inner validation.
    """
    if rule not in RULES:
        raise ValueError(f"Unknown selection rule {rule!r}: choose one of {', '.join(RULES)}.")
    if predictions.empty:
        return predictions
    judged = predictions
    if rule == "best_inner":
        judged = pd.concat([validation, predictions[predictions["epoch"] == AS_GIVEN]])
    chosen = {}
    for run, of in per_epoch(judged).groupby(RUN):
        epochs = of[["epoch", "acc", "auc"]].itertuples(index=False)
        chosen[run] = of["epoch"].max() if rule == "last" else best_epoch(epochs)
    for run in predictions[RUN].drop_duplicates().itertuples(index=False, name=None):
        if run not in chosen:
            raise ValueError(f"{_name(run)} has no inner validation: train it with `inner_validation` > 0.")
    return predictions.merge(pd.Series(chosen, name="epoch").rename_axis(RUN).reset_index())


def by_fold(selected: pd.DataFrame) -> pd.DataFrame:
    """Accuracy and AUC of every run at each center and globally, from one epoch per run (see `select`).

    Columns task, modality, arm, fold, center, n, positives, acc, auc, undefined. `positives` counts the last
    class (binary: the positive one); `center` includes "global". The AUC is NaN if a class is absent;
    `undefined` names that class. Raises ValueError if a run has several epochs.
    """
    rows = []
    for arm, frame in arms(selected):
        for fold, tested in frame.groupby("fold", sort=False):
            # the paper's global ACC weights centers by their test images: the pooled accuracy
            for center, part in places(tested):
                y, prob = y_and_prob(part)
                n, n_classes = prob.shape
                numbers = n, int((y == n_classes - 1).sum()), accuracy(y, prob), auc(y, prob)
                rows.append((*arm, fold, center, *numbers, absent_classes(y, n_classes)))
    return pd.DataFrame(rows, columns=[*RUN, "center", "n", "positives", "acc", "auc", "undefined"])


def absent_classes(y, n_classes: int) -> str:
    """Why labels (N,) have no AUC, such as "no positive case"; "" if every class has a case."""
    two = {0: "negative case", 1: "positive case"} if n_classes == 2 else {}
    absent = [two.get(k, f"case of class {k}") for k in range(n_classes) if k not in y]
    return f"no {' and no '.join(absent)}" if absent else ""


def over_folds(folds: pd.DataFrame) -> pd.DataFrame:
    """Mean and standard deviation over folds of the rows of `by_fold`, as in tables 2 and 3 of the paper.

    Columns task, modality, arm, center, acc_mean, acc_std, auc_mean, auc_std, folds, auc_folds, undefined.
    Standard deviations divide by the number of folds (ddof = 0): only this gives the paper's AHN
    0.8750 +/- 0.1250 over 4 folds of 4 cases. The AUC leaves out folds in which it is undefined: `auc_folds`
    counts the others, `undefined` says which and why. A personal arm has no global AUC (NaN), because its
    models share no scale.
    """
    groups = folds.groupby([*ARM, "center"], sort=False)
    mean, std = groups[["acc", "auc"]].mean(), groups[["acc", "auc"]].std(ddof=0)
    columns = {f"{m}_{name}": of[m] for m in ("acc", "auc") for name, of in (("mean", mean), ("std", std))}
    columns |= {"folds": groups.size(), "auc_folds": groups["auc"].count()}
    columns["undefined"] = pd.Series([in_folds(rows) for _, rows in groups], groups.size().index)
    table = pd.DataFrame(columns).reset_index()
    pooled = table["arm"].map(is_personal) & (table["center"] == GLOBAL)
    table.loc[pooled, ["auc_mean", "auc_std", "undefined"]] = np.nan, np.nan, "one model per center"
    return table


def in_folds(rows: pd.DataFrame) -> str:
    """Why and in which folds an AUC is undefined: "no positive case in fold 0, 2"; "" if in none."""
    reasons = rows[rows["undefined"] != ""].groupby("undefined", sort=False)["fold"]
    return "; ".join(f"{reason} in fold {', '.join(map(str, sorted(folds)))}" for reason, folds in reasons)


def optimism(predictions: pd.DataFrame, validation: pd.DataFrame | None = None) -> pd.DataFrame:
    """Global AUC, mean over folds, at the epoch that each of the RULES chooses.

    Columns task, modality, arm, epochs (to choose from), best_test, best_inner, last, peak_minus_inner,
    peak_minus_last, undefined. `best_inner` is NaN without an inner validation split; all AUCs are NaN for
    weights from elsewhere. Departs from the paper, which reports only best_test.
    """
    inner, groups = validation is not None and len(validation), predictions.groupby(ARM, sort=False)
    table = pd.DataFrame({"epochs": groups["epoch"].nunique()})
    for rule in RULES:
        if rule != "best_inner" or inner:
            table[rule] = per_epoch(select(predictions, rule, validation)).groupby(ARM)["auc"].mean()
        else:
            table[rule] = np.nan
    table["peak_minus_inner"] = table["best_test"] - table["best_inner"]
    table["peak_minus_last"] = table["best_test"] - table["last"]
    given, why = groups["epoch"].max() == AS_GIVEN, "weights from elsewhere: their epoch was chosen before"
    table.loc[given, table.columns[1:]] = np.nan
    table["undefined"] = np.where(given, why, "" if inner else "no inner validation split")
    return table.reset_index()
