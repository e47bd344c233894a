import ast
import importlib
import json
import re
import subprocess
import sys
from pathlib import Path

import latex2mathml.converter
import matplotlib.pyplot as plt
import nbformat
import pandas as pd
import pytest
import yaml

from ipmn_core import params, pipeline
from ipmn_core.metrics import tables

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
REVIEW = {"forest_beside_paper", "majority", "optimism", "auc_intervals", "within_and_between", "reliability"}
REVIEW |= {"decision_curves", "drift", "cosines", "gain"}  # the figures of notebook 4

every_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def cells(path, kind="code"):
    return [cell for cell in nbformat.read(path, 4).cells if cell.cell_type == kind]


def nodes(path):
    """The syntax of all code cells; a shell command or magic is no Python and raises SyntaxError."""
    return [node for cell in cells(path) for node in ast.walk(ast.parse(cell.source))]


def test_the_pipeline_runs_every_notebook_in_the_order_of_their_numbers():
    assert [path.stem for path in NOTEBOOKS] == list(pipeline.NOTEBOOKS)


@every_notebook
def test_a_notebook_is_stripped_and_asks_for_kernel_python3(path):
    notebook = nbformat.read(path, 4)
    nbformat.validate(notebook)
    assert notebook.metadata.kernelspec.name == "python3"
    assert set(notebook.metadata) <= {"kernelspec", "language_info"}
    for cell in notebook.cells:
        assert set(cell.metadata) <= {"tags"}
        assert cell.cell_type == "markdown" or (not cell.outputs and cell.execution_count is None)


@every_notebook
def test_a_notebook_begins_with_its_title(path):
    first = nbformat.read(path, 4).cells[0]
    number = int(path.stem[:2])
    assert first.cell_type == "markdown" and first.source.startswith(f"# {number} · ")
    assert "**Question.**" in first.source


@every_notebook
def test_the_parameters_are_all_settings_in_order_with_the_demos_values(path):
    (cell,) = (cell for cell in cells(path) if "parameters" in cell.metadata.get("tags", []))
    assignments = ast.parse(cell.source).body
    assert all(isinstance(node, ast.Assign) for node in assignments)
    values = {node.targets[0].id: ast.literal_eval(node.value) for node in assignments}
    assert list(values) == list(params.Params.model_fields)
    assert values == yaml.safe_load((ROOT / "params" / "demo.yaml").read_text())
    assert cell is cells(path)[0] or cell.source == cells(path)[0].source
    params.from_notebook(values)


@every_notebook
def test_code_cells_call_and_define_nothing(path):
    definitions = ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef
    assert not [node.name for node in nodes(path) if isinstance(node, definitions)]


@every_notebook
def test_no_code_cell_holds_a_magic_or_an_absolute_path(path):
    lines = [line.strip() for cell in cells(path) for line in cell.source.splitlines()]
    assert not [line for line in lines if re.match(r"[!%]", line) or "get_ipython" in line]
    strings = [
        node.value for node in nodes(path) if isinstance(node, ast.Constant) and isinstance(node.value, str)
    ]
    assert not [text for text in strings if re.match(r"/|~|[A-Za-z]:\\", text)]


@every_notebook
def test_links_point_to_files_that_exist(path):
    links = [link for cell in cells(path, "markdown") for link in re.findall(r"\]\(([^)]+)\)", cell.source)]
    files = [link.split("#")[0] for link in links if not re.match(r"https?:|#", link)]
    assert not [link for link in files if not (path.parent / link).is_file()]
    assert len(files) >= 1  # every chapter leads to another


@every_notebook
def test_a_notebook_uses_only_what_the_package_has(path):
    tree = nodes(path)
    imported = [
        name.name
        for n in tree
        if isinstance(n, ast.ImportFrom) and n.module == "ipmn_core"
        for name in n.names
    ]
    modules = {name: importlib.import_module(f"ipmn_core.{name}") for name in imported}
    for node in tree:
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in modules:
            assert hasattr(modules[node.value.id], node.attr), f"{node.value.id}.{node.attr}"
    names = {node.id for node in tree if isinstance(node, ast.Name)}
    assert set(modules) <= names, "imported, but not used"


def sections(path):
    """The cells of every `##` section, by its heading."""
    found = {}
    for cell in nbformat.read(path, 4).cells:
        if cell.cell_type == "markdown" and cell.source.startswith("## "):
            heading = cell.source.splitlines()[0]
            found[heading] = []
        if found:
            found[heading].append(cell)
    return found


@every_notebook
def test_every_section_ends_with_something_to_try(path):
    for heading, inside in sections(path).items():
        code = [cell for cell in inside if cell.cell_type == "code"]
        tried = [k for k, cell in enumerate(code) if "try-it" in cell.metadata.get("tags", [])]
        assert tried and tried[-1] == len(code) - 1, f"{heading}: no cell to try at its end"
        for cell in (code[k] for k in tried):
            assert re.match(r"\w+ = .+  # change me: ", cell.source), f"{heading}: {cell.source[:60]}"
        questions = [c.source for c in inside if c.cell_type == "markdown" and "*Try it.*" in c.source]
        assert questions and all("?" in text.split("*Try it.*")[1] for text in questions), heading


@every_notebook
def test_a_reader_is_told_how_long_it_takes_and_where_to_go_on(path):
    first, *_, last = (cell.source for cell in cells(path, "markdown"))
    minutes = int(re.search(r"\*Reading time\* about (\d+) minutes", first).group(1))
    words = sum(len(cell.source.split()) for cell in cells(path, "markdown"))
    pictures = sum(bool(re.search(r"figures\w*\.|widgets\.", cell.source)) for cell in cells(path)[2:])
    assert minutes == pytest.approx(words / 180 + pictures, rel=0.3)
    number = int(path.stem[:2])
    for other in (number - 1, number + 1):
        assert f"](0{other}_" in first or other not in (1, 2, 3, 4), f"no link to chapter {other}"
    assert "**What to take home.**" in last


@every_notebook
def test_equations_can_be_shown_without_javascript(path):
    text = "\n\n".join(cell.source for cell in cells(path, "markdown"))
    shown = re.findall(r"\$\$(.+?)\$\$", text, re.DOTALL)
    inline = re.findall(r"(?<!\$)\$([^$\n]+)\$(?!\$)", re.sub(r"\$\$.+?\$\$", "", text, flags=re.DOTALL))
    assert shown, "a chapter without an equation"
    for formula in shown + inline:
        assert "merror" not in latex2mathml.converter.convert(formula)


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    """The smoke profile, run once through the command line as a user would."""
    folder = tmp_path_factory.mktemp("smoke")
    text = (ROOT / "params" / "smoke.yaml").read_text().replace("outputs: outputs ", f"outputs: {folder} ")
    (folder / "smoke.yaml").write_text(text)
    return folder, ipmn_run(folder)


def ipmn_run(folder):
    command = [sys.executable, "-m", "ipmn_core.cli", "run", str(folder / "smoke.yaml")]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def test_all_notebooks_run_and_say_where_their_results_lie(smoke):
    folder, done = smoke
    assert done.returncode == 0, done.stderr[-2000:]
    for what in ("tables", "figures", "notebooks"):
        assert f"{folder}/smoke/{what}/" in done.stdout
    assert sorted(path.stem for path in (folder / "smoke" / "notebooks").iterdir()) == list(
        pipeline.NOTEBOOKS
    )
    for path in (folder / "smoke" / "notebooks").iterdir():
        pipeline.check_executed(path)
    assert f"report  {folder}/smoke/report.html" in done.stdout


def test_no_live_view_waits_for_an_answer_of_the_client(smoke):
    """A headless client answers an Output widget, and may then miss the kernel's reply: it would hang."""
    folder, _ = smoke
    models = []
    for path in (folder / "smoke" / "notebooks").iterdir():
        widgets = json.loads(path.read_text())["metadata"].get("widgets", {})
        for state in widgets.get("application/vnd.jupyter.widget-state+json", {}).get("state", {}).values():
            models.append(state["model_name"])
    assert "ImageModel" in models and "OutputModel" not in models


def test_the_tables_are_complete(smoke):
    folder, _ = smoke
    table1, table2, table3 = (pd.read_csv(folder / "smoke" / "tables" / f"table{n}.csv") for n in (1, 2, 3))
    assert list(table1.columns) == ["center", "modality", "no_risk", "low_risk", "high_risk", "total"]
    for ours, n, keys in ((table2, 2, ["model", "modality"]), (table3, 3, ["center", "method", "modality"])):
        theirs = tables.paper(n).query("modality == 't2'").reset_index(drop=True)
        assert list(ours.columns) == list(theirs.columns)
        assert ours[keys].equals(theirs[keys])
    macs = tables.paper(2).query("modality == 't2'")[["macs_g", "params_m"]].reset_index(drop=True)
    assert table2[["macs_g", "params_m"]].equals(macs)
    for stem in ("table1", "table2", "table3"):
        for suffix in ("csv", "md", "tex"):
            for name in (f"{stem}.{suffix}", f"{stem}_beside_paper.{suffix}"):
                text = (folder / "smoke" / "tables" / name).read_text()
                assert text and "nan" not in text.lower().replace("name", "")


def test_figure_1_and_the_others_are_pictures(smoke):
    folder, _ = smoke
    pictures = {path.stem: plt.imread(path) for path in (folder / "smoke" / "figures").iterdir()}
    assert {"figure1", "table2", "forest", "roc_by_center", *REVIEW} <= set(pictures)
    assert all(picture.std() > 0.02 for picture in pictures.values())  # not blank


def test_a_second_run_repeats_no_training(smoke):
    folder, _ = smoke
    before = {path: path.stat().st_mtime_ns for path in (folder / "smoke" / "runs").rglob("*")}
    tables_before = {p.name: p.read_bytes() for p in (folder / "smoke" / "tables").iterdir()}
    again = ipmn_run(folder)
    assert again.returncode == 0, again.stderr[-2000:]
    assert {path: path.stat().st_mtime_ns for path in (folder / "smoke" / "runs").rglob("*")} == before
    assert {p.name: p.read_bytes() for p in (folder / "smoke" / "tables").iterdir()} == tables_before


def test_other_settings_under_the_same_name_are_refused_before_any_notebook(smoke):
    folder, _ = smoke
    (folder / "smoke.yaml").write_text(
        (folder / "smoke.yaml").read_text().replace("lr: 1.0e-3", "lr: 1.0e-2")
    )
    refused = ipmn_run(folder)
    assert refused.returncode == 1
    assert "lr: 0.001 on disk, 0.01 now" in refused.stderr and "Traceback" not in refused.stderr
