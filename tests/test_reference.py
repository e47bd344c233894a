"""`outputs/reference/`: tables are those of its predictions, README's and the docs' numbers are its own."""

import re
from pathlib import Path
from types import SimpleNamespace

import bs4
import nbformat
import numpy as np
import pandas as pd
import pytest

from ipmn_core import data, metrics, models, params, phantom, runs
from ipmn_core.metrics import centers, inference, tables, truth
from ipmn_core.names import MODALITIES, TASKS, display_name
from ipmn_core.runs import probes, store, sweeps

ROOT = Path(__file__).parents[1]
REFERENCE = ROOT / "outputs" / "reference"


def profile(folder):
    return params.load(folder / "params.yaml").model_copy(update={"outputs": str(REFERENCE)})


def table2(p):
    selected = metrics.select(runs.predictions(p, "multiclass"))
    complexity = {name: models.complexity(name) for name in p.multiclass_models}
    return tables.table2(metrics.over_folds(metrics.by_fold(selected)), complexity)


def table3(p):
    return tables.table3(metrics.over_folds(metrics.by_fold(metrics.select(runs.predictions(p, "binary")))))


def unseen(p):
    table = centers.unseen(runs.predictions(p, "binary"), runs.validation(p, "binary"))
    return table.drop(columns="task").rename(columns={"arm": "method"})


def cross_site(p):
    return centers.cross_site(runs.cross(p), runs.predictions(p, "binary"))


def strategies(p):
    last = metrics.select(runs.predictions(p, "binary"), "last")
    return centers.by_strategy(centers.tuned(last, runs.validation(p, "binary")))


def fusion(p):
    cases = patients(p).patient_id  # a phantom's case has its patient's name
    scans = pd.concat(
        [pd.DataFrame({"modality": m, "case_id": cases, "patient_id": cases}) for m in MODALITIES]
    )
    honest = metrics.select(runs.predictions(p, "binary"), "best_inner", runs.validation(p, "binary"))
    return inference.compare_modalities(honest, scans, p.modalities[-1], p.inner_validation)


def patients(p):
    """The phantom's truth, without its scans."""
    return phantom.patients(p.phantom_seed)


TABLES = {"table2": table2, "table3": table3, "unseen": unseen, "cross_site": cross_site}
TABLES |= {"strategies": strategies, "fusion": fusion, "dial": sweeps.dial_table, "seeds": sweeps.seed_table}
SHIPPED = sorted(
    f"{path.parents[1].name}/{path.stem}"
    for path in REFERENCE.glob("*/tables/*.csv")
    if path.stem != "table1" and path.parents[1].name != "demo"  # the demo is shipped without runs
)


@pytest.mark.parametrize("table", SHIPPED)
def test_a_shipped_table_is_that_of_the_shipped_predictions(table, monkeypatch):
    monkeypatch.setattr(data, "read_truth", patients)  # the dial's oracle needs no scans
    monkeypatch.setattr(data, "open_cohort", lambda p: SimpleNamespace(classes=(0, 1, 2), positive=(2,)))
    name, _, stem = table.partition("/")
    kept = pd.read_csv(REFERENCE / name / "tables" / f"{stem}.csv", keep_default_na=False, na_values="n/a")
    fresh = TABLES[stem](profile(REFERENCE / name)).reset_index(drop=True)
    pd.testing.assert_frame_equal(fresh[list(kept)], kept, check_dtype=False, atol=1e-9, rtol=0)


def test_the_studys_report_shows_the_studys_tables():
    """The page is from the same run as the tables beside it, and no larger than promised."""
    page = (REFERENCE / "study" / "report.html").read_text("utf-8")
    assert len(page.encode()) <= 8 * 2**20
    shown = bs4.BeautifulSoup(page, "html.parser").select("table.beside, .beside table")
    for n, table in zip(tables.KEYS, shown, strict=True):
        ours = [[cell.get_text() for cell in row("td")] for row in table.select("tbody tr")[::2]]
        printed = tables.as_printed(pd.read_csv(REFERENCE / "study" / "tables" / f"table{n}.csv"))
        assert ours == printed.iloc[:, len(tables.KEYS[n]) - 1 :].to_numpy().tolist(), f"table {n}"


def readme(start):
    """Cells of the rows of README's table that begin so, by what follows: study T1 and T2, demo T1 and T2."""
    lines = (ROOT / "README.md").read_text("utf-8").splitlines()
    rows = [line.strip("|").split("|") for line in lines if line.startswith(f"| {start}: ")]
    return {row[0].strip().removeprefix(f"{start}: "): [cell.strip() for cell in row[1:]] for row in rows}


@pytest.mark.parametrize(("name", "first"), [("study", 0), ("demo", 2)])
def test_readmes_table_is_that_of_the_reference(name, first):
    high, three = readme("high risk"), readme("three classes")
    ours = pd.read_csv(REFERENCE / name / "tables" / "table3.csv").query("center == 'global'")
    for method, rows in ours.groupby("method"):
        arm = display_name(method).replace("Centralized", "centralized").replace(" (μ=", ", μ = ").rstrip(")")
        agree(high[f"DenseNet-121, {arm}"][first : first + 2], rows, 1)
    assert set(ours["method"]) == {"centralized", "fedavg", "fedprox_0.1", "fedprox_0.3"}
    for model, rows in pd.read_csv(REFERENCE / name / "tables" / "table2.csv").groupby("model"):
        agree(three[display_name(model)][first : first + 2], rows, 100)


def agree(printed, rows, unit):
    assert list(rows["modality"]) == ["t1", "t2"]
    for text, row in zip(printed, rows.itertuples(), strict=True):
        mean, std = map(float, text.split(" ± "))
        assert abs(mean - row.auc_mean / unit) < 0.00056 and abs(std - row.auc_std / unit) < 0.00056


@pytest.fixture(scope="module")
def study():
    """The study's global numbers by task, rule and (arm, modality), and the AUCs within centers."""
    p, cohort = profile(REFERENCE / "study"), SimpleNamespace(classes=(0, 1, 2), positive=(2,))
    found = {}
    for task in TASKS:
        predictions, inner = runs.predictions(p, task), runs.validation(p, task)
        best = metrics.select(predictions, "best_test")
        of = {"best": best, "inner": metrics.select(predictions, "best_inner", inner)}
        of["last"] = metrics.select(predictions, "last")
        of["known"] = truth.reference_arms(best, patients(p), cohort)
        of["probed"] = probes.predictions(p, task)
        found[task] = {
            name: metrics.over_folds(metrics.by_fold(rows))
            .query("center == 'global'")
            .set_index(["arm", "modality"])
            for name, rows in of.items()
        }
    return found | {"within": centers.decompose(best).set_index(["arm", "modality"])["within"]}


def of_binary(study):
    """What README and chapter 3 say of high risk: T2 and within centers; T1 centralized; T1 federated."""
    binary = study["binary"]
    t1, t2 = (binary["best"]["auc_mean"].unstack()[m].dropna() for m in MODALITIES)
    gap, federated = binary["known"].loc[("oracle", "t2"), "auc_mean"] - t2, t1.drop("centralized")
    within = [study["within"][arm, "t2"] for arm in ("fedavg", "local_only")]
    spread = [t2.max() - t2.min(), gap.min(), gap.max(), *within]
    return spread, t1["centralized"], [federated.min(), federated.max()]


def of_multiclass(study):
    """What README and chapter 2 say of three classes: DenseNet-121, the others, and the histogram."""
    numbers, said = study["multiclass"], []
    best, probed = (numbers[name]["auc_mean"].unstack() for name in ("best", "probed"))
    assert (numbers["best"]["auc_mean"] - 2 * numbers["best"]["auc_std"] > 0.5).all()  # above chance
    for modality in ("t2", "t1"):
        others = best[modality].drop("densenet121")
        said += [best.loc["densenet121", modality], others.min(), others.max()]
        assert best[modality].max() == said[-3] and said[-3] < probed.loc["histogram_only", modality]
    return [*said, probed.loc["histogram_only", "t2"], probed.loc["histogram_only", "t1"]]


def in_chapter(stem):
    """The text of the cell that says what the study found."""
    notebook = nbformat.read(ROOT / "notebooks" / f"{stem}.ipynb", 4)
    (text,) = [c.source for c in notebook.cells if c.source.startswith("**What the study found")]
    return text


def assert_says(text, numbers):
    printed = re.findall(r"0\.\d+", text)
    assert [f"{x:.{len(y) - 2}f}" for x, y in zip(numbers, printed, strict=True)] == printed


def test_readme_says_what_the_study_found(study):
    for task, of in (("binary", "high risk"), ("multiclass", "three classes")):
        printed, histogram = readme(of), study[task]["probed"].loc["histogram_only"]
        oracle = study[task]["known"].loc["oracle"]
        agree(printed["oracle, the best possible answer"][:2], oracle.reset_index(), 1)
        agree(printed["a forest on the histogram of gray values"][:2], histogram.reset_index(), 1)
    binary, histogram = study["binary"], study["binary"]["probed"].loc["histogram_only"]
    auc, acc = (binary["best"][name].unstack() for name in ("auc_mean", "acc_mean"))
    usual = binary["probed"].loc[("center_only", "t1"), "acc_mean"]
    assert auc["t2"].min() > histogram.loc["t2", "auc_mean"] and (acc["t1"] < usual).all()
    assert auc["t1"].max() < histogram.loc["t1", "auc_mean"]
    spread, centralized, federated = of_binary(study)
    inner = binary["inner"]["auc_mean"]
    honest = [inner[arm, m] for m in ("t2", "t1") for arm in ("centralized", "fedavg")]
    text = (ROOT / "README.md").read_text("utf-8").partition("*The study.*")[2].partition("\n")[0]
    assert_says(text, [*spread, centralized, *federated, usual, *honest, *of_multiclass(study)])


def test_chapters_say_what_the_study_found(study):
    spread, centralized, federated = of_binary(study)
    binary = study["binary"]
    histogram = binary["probed"].loc[("histogram_only", "t1"), "auc_mean"]
    last = study["multiclass"]["last"]["auc_mean"].unstack()["t1"].sort_values().iloc[:3]
    assert_says(in_chapter("02_three_class_benchmark"), [*of_multiclass(study), last.iloc[0], last.iloc[-1]])
    assert_says(in_chapter("03_federated_binary"), [*spread, *federated, centralized, histogram])
    keys = [(arm, m) for arm in ("centralized", "fedavg") for m in ("t2", "t1")]
    chosen = [binary[rule].loc[key, "auc_mean"] for key in keys for rule in ("inner", "best")]
    assert_says(in_chapter("04_analysis"), chosen)


def test_chapter_4_says_how_much_another_seed_changes():
    table = pd.read_csv(REFERENCE / "study" / "tables" / "seeds.csv").query("arm != 'local_only'")
    assert set(table["seeds"]) == {3} and set(table["folds"]) == {4}
    assert np.ptp(table["auc"]) < table["over_seeds"].min()  # so that "may be luck" is true
    cells = nbformat.read(ROOT / "notebooks" / "04_analysis.ipynb", 4).cells
    (text,) = [c.source for c in cells if "**In the study**" in c.source]
    numbers = [table[name].agg(of) for name in ("auc", "over_seeds", "over_folds") for of in ("min", "max")]
    assert_says(text.partition("**In the study**")[2], numbers)


def test_the_strategies_in_the_docs_are_the_shipped_ones():
    kept = pd.read_csv(REFERENCE / "strategies" / "tables" / "strategies.csv", na_values="n/a").fillna(
        {"chosen": ""}
    )
    pooled = [f"{row.auc_mean:.3f} ± {row.auc_std:.3f}" for row in kept.itertuples()]
    numbers = kept.assign(pooled=pd.Series(pooled).str.replace("nan ± nan", "n/a"))
    rows = numbers[["arm", "chosen", "acc_mean", "pooled", "within"]].itertuples(index=False)
    printed = [
        [display_name(arm), chosen, f"{acc:.3f}", auc, f"{within:.3f}"]
        for arm, chosen, acc, auc, within in rows
    ]
    assert documented("Measured") == printed


def test_the_fusion_in_the_docs_is_the_shipped_one():
    kept = pd.read_csv(REFERENCE / "fusion" / "tables" / "fusion.csv")
    rows = kept.assign(
        pooled=[f"{row.difference:.3f} ({row.low:.3f} to {row.high:.3f})" for row in kept.itertuples()]
    )
    rows = rows[["arm", "modality", "fold_difference", "pooled"]].itertuples(index=False)
    printed = [[display_name(arm), display_name(m), f"{mean:.3f}", pooled] for arm, m, mean, pooled in rows]
    assert documented("T1 and T2 together, measured") == printed


def test_the_unseen_centers_in_the_docs_are_the_shipped_ones():
    kept = pd.read_csv(REFERENCE / "unseen" / "tables" / "unseen.csv")
    cells = kept.assign(
        cell=[f"{row.auc:.3f} ({row.auc_low:.3f} to {row.auc_high:.3f})" for row in kept.itertuples()]
    )
    printed = {
        row[0].replace("All centers", metrics.GLOBAL): row[2:]
        for row in documented("A hospital never seen, measured")
    }
    assert printed == {center: [*rows["cell"]] for center, rows in cells.groupby("center")}


def documented(section):
    """Rows of the first table of a section of docs/strategies.md, without its header."""
    text = (
        (ROOT / "docs" / "strategies.md")
        .read_text("utf-8")
        .partition(f"## {section}\n")[2]
        .partition("\n## ")[0]
    )
    lines = [line.strip("|") for line in text.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line.split("|")] for line in lines[1:]]


def test_the_dial_in_the_docs_is_the_shipped_one():
    kept = pd.read_csv(REFERENCE / "dial" / "tables" / "dial.csv")
    means = kept.pivot_table("within", "arm", ["intensity", "shift"])
    assert list(means) == [(how, shift) for how in ("minmax", "zscore") for shift in (0, 0.5, 1)]
    printed = {row[0].replace(", μ = 0.3", " (μ=0.3)"): row[1:] for row in documented("The dial, measured")}
    assert printed == {display_name(arm): [f"{x:.3f}" for x in row] for arm, *row in means.itertuples()}


@pytest.mark.slow
def test_a_shipped_run_counts_here_and_a_repeat_is_close(tmp_path):
    """Another processor rounds differently, and after some hundred steps that is another network: 0.1."""
    p = profile(REFERENCE / "dial")
    (run, *_) = [run for run in runs.grid(p, "binary") if (run.arm, run.fold) == ("centralized", 0)]
    shipped, protocol = runs.folder_of(p, run), runs.run_settings(p, run).protocol()
    q = p.model_copy(update={"outputs": str(tmp_path)})
    cohort = data.load_cohort(q)
    assert store.finished(shipped, protocol, cohort.key)
    repeated = runs.execute(q, run, cohort)
    auc = [pd.read_csv(folder / "history.csv")["test_auc"].iloc[-1] for folder in (shipped, repeated)]
    print("shipped {:.3f}, here {:.3f}".format(*auc))
    assert abs(auc[0] - auc[1]) <= 0.1


def test_what_is_shipped_is_small_and_has_no_weights():
    files = [path for path in REFERENCE.rglob("*") if path.is_file()]
    assert not [path for path in files if path.suffix == ".pt"]
    assert sum(path.stat().st_size for path in files) <= 20 * 2**20
    for path in REFERENCE.glob("*/runs/*/*/*/fold*"):
        assert (path / "run.json").exists(), path
