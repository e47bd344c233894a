from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from sklearn.model_selection import StratifiedKFold

from ipmn_core.metrics import audit, tables
from ipmn_core.metrics.inference import hanley_mcneil
from ipmn_core.names import CENTERS, MODALITIES

ROOT = Path(__file__).parents[2]
HEADING = "## Where text, tables and code of the paper disagree"


@pytest.fixture(scope="module")
def counts():
    """(n, high risk) of table 1 by (center, modality)."""
    return {(c.center, c.modality): (c.total, c.high_risk) for c in tables.paper(1).itertuples()}


@pytest.fixture(scope="module")
def printed():
    """Rows of table 3 by (center, modality, method)."""
    return {(c.center, c.modality, c.method): c for c in tables.paper(3).itertuples()}


def test_the_pages_disagreements_are_the_ledger_row_by_row():
    section = (ROOT / "docs" / "paper.md").read_text(encoding="utf-8").split(HEADING)[1].split("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("|")]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]
    ledger = audit.ledger()
    assert list(ledger) == ["where", "text", "tables_or_code", "here"]
    assert rows == ledger.to_numpy().tolist() and len(rows) == 10


def test_the_texts_aucs_are_those_that_the_ledger_quotes():
    stated = pd.read_csv(tables.FOLDER / "text.csv").rename(columns={"auc": "text"})
    table = stated.merge(tables.paper(2), on=["model", "modality"], validate="one_to_one")
    table = table.rename(columns={"auc_mean": "table"}).set_index(["model", "modality"])
    row = audit.ledger().iloc[0]
    for model in ("densenet121", "resnet34", "shufflenetv2"):
        for column, quoted in (("text", row["text"]), ("table", row["tables_or_code"])):
            t1, t2 = (f"{table.loc[(model, m), column] / 100:.4f}" for m in MODALITIES)
            assert f"{t1}/{t2}" in quoted


def test_only_ddof_0_fits_the_printed_deviations_of_the_centers(counts, printed):
    # all ways to get some of a fold's cases right, in folds of known size, that round to the printed mean
    possible = {0: 0, 1: 0}
    for (center, modality, _), row in printed.items():
        if center != "global":
            n, _ = counts[center, modality]
            shares = [np.arange(size + 1) / size for size in (n // 4 + (k < n % 4) for k in range(4))]
            a, b, c, d = np.ix_(*shares)
            mean = (a + b + c + d) / 4
            at = np.nonzero(np.abs(mean - row.acc_mean) <= 0.5e-4 + 1e-9)
            ways = np.stack([share[i] for share, i in zip(shares, at, strict=True)])
            for ddof in possible:
                near = np.abs(ways.std(axis=0, ddof=ddof) - row.acc_std) <= 0.5e-4 + 1e-9
                possible[ddof] += bool(near.any())
    assert possible == {0: 56, 1: 1}
    assert "all 56 ±" in audit.ledger().iloc[-1]["tables_or_code"]


def test_global_accuracies_are_the_size_weighted_centers(counts, printed):
    table = audit.global_accuracy()
    assert len(table) == 8 and (table["difference"].abs() <= table["bound"]).all()
    assert table["difference"].abs().max() < 0.00025  # a sixth of one case of 652
    for row in table.itertuples():
        accuracies = [printed[center, row.modality, row.method].acc_mean for center in CENTERS]
        expected = np.average(accuracies, weights=[counts[center, row.modality][0] for center in CENTERS])
        assert row.from_centers == pytest.approx(expected, abs=1e-12)
        assert row.printed == printed["global", row.modality, row.method].acc_mean
        assert row.difference == pytest.approx(row.printed - expected, abs=1e-12)


def test_the_bound_holds_for_any_right_answers_and_is_not_lax(counts, monkeypatch):
    rng, table1, used = np.random.default_rng(0), tables.paper(1), []
    n = np.array([[counts[center, "t1"][0]] for center in CENTERS])
    sizes = n // 4 + (np.arange(4) < n % 4)  # (centers, folds)
    of = {"center": [*CENTERS, "global"], "method": "fedavg", "modality": "t1"}
    for _ in range(160):
        right = rng.binomial(sizes, rng.uniform(0.4, 0.95, size=(7, 1)))
        acc = np.vstack([right / sizes, right.sum(axis=0) / sizes.sum(axis=0)])  # (centers and global, folds)
        numbers = {"acc_mean": acc.mean(axis=1).round(4), "acc_std": acc.std(axis=1).round(4)}
        monkeypatch.setattr(tables, "paper", {1: table1, 3: pd.DataFrame(of | numbers)}.get)
        audited = audit.global_accuracy().iloc[0]
        used.append(abs(audited["difference"]) / audited["bound"])
        assert audited["bound"] < 0.003  # two cases of 652
    assert 0.3 < max(used) <= 1


def test_the_majoritys_accuracy_is_its_mean_over_scikit_learns_folds_beside_the_methods(counts, printed):
    majority = audit.majority_class().set_index(["center", "modality"])
    methods = ["centralized", "fedavg", "fedprox_0.1", "fedprox_0.3"]
    assert list(majority.columns) == ["n", "high_risk", "majority", *methods, "beaten_by"]
    for (center, modality), row in majority.iterrows():
        accuracies = [printed[center, modality, method].acc_mean for method in methods]
        assert row[methods].tolist() == accuracies
        assert row["beaten_by"] == sum(acc > row["majority"] for acc in accuracies)
        if center != "global":
            assert (row["n"], row["high_risk"]) == counts[center, modality]
            y = np.arange(row["n"]) < row["high_risk"]
            larger = 2 * row["high_risk"] > row["n"]
            by_fold = [(y[test] == larger).mean() for _, test in StratifiedKFold(4).split(y, y)]
            assert row["majority"] == round(np.mean(by_fold), 4)
    for modality, one_answer in (("t1", 0.7715), ("t2", 0.7679)):
        total, high = np.sum([counts[center, modality] for center in CENTERS], axis=0)
        row = majority.loc[("global", modality)]
        assert (row["n"], row["high_risk"]) == (total, high)
        assert row["majority"] == one_answer == round((total - high) / total, 4)


def test_intervals_are_those_of_hanley_and_mcneil_of_table_3_with_table_1s_counts(counts, printed):
    table = audit.intervals()
    assert table[["center", "method", "modality"]].equals(tables.paper(3)[["center", "method", "modality"]])
    for row in table.itertuples():
        cells = [counts[c, row.modality] for c in CENTERS if row.center in (c, "global")]
        total, n_pos = np.sum(cells, axis=0)
        assert (row.positives, row.negatives) == (n_pos, total - n_pos)
        limits = hanley_mcneil(printed[row.center, row.modality, row.method].auc_mean, n_pos, total - n_pos)
        assert (row.low, row.high) == limits
