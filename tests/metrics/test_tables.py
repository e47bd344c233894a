import itertools

import numpy as np
import pandas as pd
import pytest

from ipmn_core import metrics
from ipmn_core.metrics import tables

MODELS = ["densenet121", "efficientnetb0", "mobilenetv2", "resnet34", "shufflenetv2"]  # not the paper's order
METHODS = ["fedprox_0.3", "fedavg", "centralized", "fedprox_0.1"]
COMPLEXITY = {model: (10.005 + i, 1.3 + i) for i, model in enumerate(MODELS)}


@pytest.fixture(scope="module")
def summary():
    """`metrics.over_folds` of every run of the paper at every center, numbers at random."""
    rng, rows = np.random.default_rng(0), []
    for task, arms in (("multiclass", MODELS), ("binary", METHODS)):
        for arm in arms:
            for modality in ("t2", "t1"):
                for center in tables.paper(3)["center"].unique():
                    for fold in range(4):
                        rows.append((task, modality, arm, fold, center, *rng.random(2), ""))
    return metrics.over_folds(pd.DataFrame(rows, columns=[*metrics.RUN, "center", "acc", "auc", "undefined"]))


def test_table_2_has_the_papers_rows_and_order_in_percent(summary):
    table, paper = tables.table2(summary, COMPLEXITY), tables.paper(2)
    assert list(table.columns) == list(paper.columns)
    assert table[["model", "modality"]].equals(paper[["model", "modality"]])
    row = table[(table["model"] == "densenet121") & (table["modality"] == "t1")].iloc[0]
    keys = ["task", "arm", "modality", "center"]
    source = summary.set_index(keys).loc[("multiclass", "densenet121", "t1", "global")]
    assert [row[c] for c in tables.NUMBERS] == [round(100 * source[c], 2) for c in tables.NUMBERS]
    assert (row["macs_g"], row["params_m"]) == (round(COMPLEXITY["densenet121"][0], 2), 1.3)


def test_table_3_has_the_papers_rows_and_order_in_fractions(summary):
    table, paper = tables.table3(summary), tables.paper(3)
    assert list(table.columns) == list(paper.columns)
    assert table[tables.KEYS[3]].equals(paper[tables.KEYS[3]])
    source = summary.set_index(["arm", "modality", "center"]).loc[("fedavg", "t2", "AHN")]
    row = table.query("method == 'fedavg' and modality == 't2' and center == 'AHN'").iloc[0]
    assert [row[c] for c in tables.NUMBERS] == [round(source[c], 4) for c in tables.NUMBERS]


@pytest.mark.parametrize("n", [1, 2, 3])
def test_the_papers_own_table_beside_the_paper_differs_nowhere(n):
    paper = tables.paper(n).drop(columns="name", errors="ignore")
    beside = tables.beside_paper(paper.sample(frac=1, random_state=0), n)
    numbers = [c for c in paper if c not in tables.KEYS[n]]
    assert beside[tables.KEYS[n]].equals(paper[tables.KEYS[n]])
    ours, theirs = beside[numbers], beside[[f"{c}_paper" for c in numbers]]
    assert (ours.to_numpy(dtype=float) == theirs.to_numpy(dtype=float)).all()


def test_rows_that_one_side_lacks_stay_beside_the_paper_and_print_as_undefined():
    ours = tables.paper(2).query("model == 'densenet121' and modality == 't2'")
    beside = tables.beside_paper(pd.concat([ours, ours.assign(model="swin")]), 2)
    assert len(beside) == 10 + 1 and beside["model"].iloc[-1] == "swin"
    printed = tables.as_printed(beside).set_index("Model")
    assert printed.loc["DenseNet-121"].tolist() == [
        *["18.31", "18.31", "11.25", "11.25"],
        *["n/a", "58.69 ± 4.28", "n/a", "75.59 ± 7.05"],
        *["65.89 ± 4.98", "65.89 ± 4.98", "81.09 ± 4.10", "81.09 ± 4.10"],
    ]
    cells = [("ResNet-34", "MACs (G)"), ("ResNet-34", "MACs (G) (paper)"), ("swin", "T2 AUC (paper)")]
    assert [printed.loc[cell] for cell in cells] == ["n/a", "183.04", "n/a"]


def test_a_cohort_without_a_center_keeps_whole_counts_beside_the_paper(tmp_path):
    tables.write(tables.paper(1).query("center != 'EMC'").drop(columns="name"), 1, tmp_path, is_paper=True)
    csv = tmp_path / "table1_beside_paper.csv"
    assert csv.read_text().splitlines()[-1] == "EMC,t2,n/a,n/a,n/a,n/a,38,30,15,83"


def test_table_3_prints_as_in_the_paper():
    printed = tables.as_printed(tables.paper(3))
    assert list(printed.columns) == ["Center", "Method", "T1 ACC", "T1 AUC", "T2 ACC", "T2 AUC"]
    t1, t2 = ["0.8195 ± 0.0531", "0.6892 ± 0.1456"], ["0.8540 ± 0.0311", "0.8898 ± 0.0536"]
    assert printed.iloc[2].tolist() == ["NYU", "FedProx (μ=0.1)", *t1, *t2]
    assert len(printed) == 8 * 4 and printed["Center"].iloc[-1] == "Global"


def test_an_undefined_auc_is_na_in_every_format_and_never_nan(summary, tmp_path):
    auc = summary[["auc_mean", "auc_std"]].mask(summary["center"] == "AHN")
    undefined = tables.table3(summary.assign(**auc))
    printed = tables.write(undefined, 3, tmp_path / "tables", is_paper=True)
    assert printed.equals(tables.as_printed(tables.beside_paper(undefined, 3)))
    assert len(list((tmp_path / "tables").iterdir())) == 6
    for stem in ("table3", "table3_beside_paper"):
        for path in [tmp_path / "tables" / f"{stem}.{suffix}" for suffix in ("csv", "md", "tex")]:
            text = path.read_text(encoding="utf-8")
            # 4 methods x 2 modalities; mean and deviation have a column each in the CSV
            assert text.count("n/a") == (16 if path.suffix == ".csv" else 8)
            assert "nan" not in text.lower()


def test_the_csv_reads_back_as_the_table(summary, tmp_path):
    table = tables.table3(summary)
    tables.write(table, 3, tmp_path, is_paper=False)
    pd.testing.assert_frame_equal(pd.read_csv(tmp_path / "table3.csv"), table)
    assert {path.stem for path in tmp_path.iterdir()} == {"table3"}  # nothing beside the paper


def test_table_3_of_another_cohort_goes_center_by_center_in_its_order(summary):
    mine = summary.replace({"center": {"NYU": "Zürich", "MCF": "Aarhus"}})
    order = ["global", "Zürich", "NU", "Aarhus"]  # one is called as one of the paper's
    mine = mine[mine["center"].isin(order)].sort_values("center", key=lambda c: c.map(order.index))
    table = tables.table3(mine)
    methods = tables.paper(3)["method"].unique()
    keys = list(itertools.product(("Zürich", "NU", "Aarhus", "global"), methods, ("t1", "t2")))
    assert list(table[tables.KEYS[3]].itertuples(index=False, name=None)) == keys


def test_markdown_keeps_the_printed_digits(tmp_path):
    tables.write(tables.paper(2), 2, tmp_path, is_paper=False)
    text = (tmp_path / "table2.md").read_text(encoding="utf-8")
    row = next(line for line in text.splitlines() if "ShuffleNet-V2" in line)
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[:4] == ["ShuffleNet-V2", "0.57", "1.30", "46.65 ± 9.03"]


@pytest.mark.parametrize("n", [1, 2, 3])
def test_latex_is_a_rectangular_booktabs_tabular_in_ascii(n, tmp_path):
    tables.write(tables.paper(n).drop(columns="name", errors="ignore"), n, tmp_path, is_paper=True)
    text = (tmp_path / f"table{n}_beside_paper.tex").read_text("utf-8")
    assert text.isascii()  # plain pdflatex needs no input encoding
    comment, begin, top, *rows, bottom, end = text.strip().splitlines()
    assert comment == r"% needs \usepackage{booktabs}"
    assert (top, bottom, end) == (r"\toprule", r"\bottomrule", r"\end{tabular}")
    rows.remove(r"\midrule")
    n_columns = len(begin.removeprefix(r"\begin{tabular}{").removesuffix("}"))
    assert all(row.count("&") == n_columns - 1 and row.endswith(r"\\") for row in rows)
    assert all(row.count("$") % 2 == 0 and "_" not in row and "%" not in row for row in rows)
    if n == 3:
        assert r"FedProx ($\mu$=0.1) & 0.8195 $\pm$ 0.0531" in text
