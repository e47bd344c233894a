"""The tables in `outputs/reference/` are functions of the predictions that are shipped beside them."""

from pathlib import Path

import pandas as pd
import pytest

from ipmn_core import data, metrics, models, params, runs
from ipmn_core.metrics import centers, tables
from ipmn_core.names import display_name
from ipmn_core.runs import dial, seeds, store
from ipmn_core.runs.grid import protocols

ROOT = Path(__file__).parents[1]
REFERENCE = ROOT / "outputs" / "reference"
SHIPPED = sorted(path.parent for path in REFERENCE.glob("*/params.yaml") if (path.parent / "runs").is_dir())


def profile(folder):
    return params.load(folder / "params.yaml").model_copy(update={"outputs": str(REFERENCE)})


def table2(p):
    selected = metrics.select(runs.predictions(p, "multiclass"))
    counted = {name: models.complexity(name) for name in p.multiclass_models}
    return tables.table2(metrics.over_folds(metrics.by_fold(selected)), counted)


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


TABLES = {
    **{"table2": table2, "table3": table3, "unseen": unseen, "cross_site": cross_site},
    **{"strategies": strategies, "seeds": seeds.table},
}


def test_every_shipped_table_is_that_of_the_shipped_predictions():
    found = [(f, n) for f in SHIPPED for n in TABLES if (f / "tables" / f"{n}.csv").exists()]
    for folder, name in found:
        kept = pd.read_csv(folder / "tables" / f"{name}.csv", keep_default_na=False, na_values="n/a")
        fresh = TABLES[name](profile(folder))
        pd.testing.assert_frame_equal(fresh[list(kept)], kept, check_dtype=False, atol=1e-9, rtol=0)
    assert {folder.name for folder in SHIPPED} >= {"dial"}


def test_the_dial_in_the_docs_is_that_of_the_shipped_predictions():
    """The first fold; the oracle needs the phantom itself."""
    section = (ROOT / "docs" / "strategies.md").read_text("utf-8").partition("## The dial, measured")[2]
    lines = [line.strip("| ").split(" | ") for line in section.splitlines() if line.startswith("| ")]
    printed = {row[0]: row[1:] for row in lines[1:]}
    points = {(q.intensity, q.phantom_shift): q for q in dial.points(profile(REFERENCE / "dial"))}
    columns = [("minmax", 0), ("minmax", 0.5), ("minmax", 1), ("zscore", 0.5), ("zscore", 1)]
    for k, q in enumerate(points[at] for at in columns):
        wanted = {run: how for run, how in protocols(q, "binary").items() if run.fold == 0}
        numbers = centers.decompose(metrics.select(store.read_all(q, wanted), "last"))
        for arm, within in numbers[["arm", "within"]].itertuples(index=False):
            assert printed[display_name(arm).replace(" (μ=0.3)", ", μ = 0.3")][k] == f"{within:.3f}", (
                q.profile,
                arm,
            )


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
