import ast
import re
from pathlib import Path

import nbformat
import pytest
import yaml

from ipmn_core import params, pipeline

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))

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
    import importlib

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
