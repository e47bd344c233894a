"""An audit of the paper from its own numbers: do tables 1-3 and the text agree?

Every function reads only `paper/*.csv`. Table 2 and the text's AUCs are in percent, the rest in fractions.
"""

import numpy as np
import pandas as pd

from ipmn_core.metrics import scores, tables
from ipmn_core.metrics.inference import hanley_mcneil

CELL = ["center", "modality"]
N_FOLDS = 4  # of the binary task, table 3
HALF_DIGIT = 0.5e-4  # table 3 is printed to 4 decimals


def ledger() -> pd.DataFrame:
    """Where text, tables and code of the paper disagree: columns where, text, tables_or_code, here."""
    return pd.read_csv(tables.FOLDER / "ledger.csv")


def _in_folds(counts) -> np.ndarray:
    """How many of each center's scans are in each fold (centers, 4); StratifiedKFold assigns them in turn."""
    return np.array([[len(range(k, count, N_FOLDS)) for k in range(N_FOLDS)] for count in counts])


def global_accuracy() -> pd.DataFrame:
    """Global ACC of table 3 against the centers' mean, weighted by the scans of table 1.

    Columns modality, method, printed, from_centers, difference, bound. The difference need not be zero,
    because folds differ by one case at each center and numbers are rounded. `bound` is the most that this
    explains, given the printed standard deviations (Cauchy-Schwarz inequality over folds).
    """
    table3, rows = tables.paper(3), []
    printed = table3[table3["center"] == scores.GLOBAL].set_index(["modality", "method"])["acc_mean"]
    cells = table3.merge(tables.paper(1), on=CELL)  # table 1 has no global row
    for run, centers in cells.groupby(["modality", "method"]):
        n, mean, std = (centers[name].to_numpy() for name in ("total", "acc_mean", "acc_std"))
        sizes = _in_folds(n)
        weights, share = sizes / sizes.sum(axis=0), n / n.sum()  # (centers, folds), (centers,)
        bound = abs((weights.mean(axis=1) - share) @ mean) + weights.std(axis=1) @ std + 2 * HALF_DIGIT
        rows.append((*run, printed[run], share @ mean, printed[run] - share @ mean, bound))
    columns = ["modality", "method", "printed", "from_centers", "difference", "bound"]
    return pd.DataFrame(rows, columns=columns)


def _counts() -> pd.DataFrame:
    """Scans (n) and high-risk scans of table 1 by center and modality, all centers together last."""
    counts = tables.paper(1)[[*CELL, "total", "high_risk"]].rename(columns={"total": "n"})
    pooled = counts.groupby("modality", as_index=False)[["n", "high_risk"]].sum()
    return pd.concat([counts, pooled.assign(center=scores.GLOBAL)], ignore_index=True)


def majority_class() -> pd.DataFrame:
    """ACC of always answering the larger class, next to table 3's ACC, at each center and globally.

    Columns center, modality, n, high_risk, majority (mean over the four folds), one per method, beaten_by
    (number of methods above the majority), all to the 4 printed decimals. The global row answers "not high
    risk" everywhere.
    """
    counts, table3 = _counts(), tables.paper(3)
    larger = np.maximum(counts["high_risk"], counts["n"] - counts["high_risk"])
    shares = _in_folds(larger) / _in_folds(counts["n"])
    methods = list(table3["method"].unique())
    printed = table3.pivot(index=CELL, columns="method", values="acc_mean")[methods].reset_index()
    table = counts.assign(majority=shares.mean(axis=1).round(4))
    table = table.merge(printed, on=CELL, validate="one_to_one")
    return table.assign(beaten_by=table[methods].gt(table["majority"], axis=0).sum(axis=1))


def prevalence_auc() -> pd.DataFrame:
    """AUC of scoring each scan by its center's share of high risk in table 1: columns modality, auc.

    Pooled over all scans, with each prevalence known exactly; the paper pools within a fold.
    """
    rows = []
    for modality, counts in tables.paper(1).groupby("modality"):
        prevalence = np.repeat(counts["high_risk"] / counts["total"], counts["total"])
        y = np.concatenate([np.arange(c.total) < c.high_risk for c in counts.itertuples()]).astype(int)
        rows.append((modality, scores.auc(y, np.stack([1 - prevalence, prevalence], axis=1))))
    return pd.DataFrame(rows, columns=["modality", "auc"])


def intervals() -> pd.DataFrame:
    """95 % intervals of AUC: columns center, method, modality, auc, positives, negatives, low, high.

    `hanley_mcneil` on table 3 with table 1's counts. A printed AUC is a mean over folds, while the counts
    cover all folds together. No interval covers the choice of the epoch on the test fold.
    """
    table = tables.paper(3)[["center", "method", "modality", "auc_mean"]].rename(columns={"auc_mean": "auc"})
    table = table.merge(_counts(), on=CELL, how="left", validate="many_to_one")
    table = table.assign(positives=table["high_risk"], negatives=table["n"] - table["high_risk"])
    low, high = hanley_mcneil(table["auc"], table["positives"], table["negatives"])
    return table.drop(columns=["n", "high_risk"]).assign(low=low, high=high)
