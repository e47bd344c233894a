import ast
import builtins
import json
import re
from pathlib import Path

import latex2mathml.converter
import matplotlib.pyplot as plt
import nbformat
import pandas as pd
import pytest
import yaml

from ipmn_core import params, pipeline
from ipmn_core.metrics import tables
from ipmn_core.views import live

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
SMOKE = yaml.safe_load((ROOT / "params" / "smoke.yaml").read_text())

THEIRS, TRAINED = {"paper", "phantom"}, {"multiclass-trained", "binary-trained"}  # tags
FURTHER = {"unseen", "strategies", "fusion", "dial"}  # tags of sections that a few profiles have

every_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def cells(path, kind="code"):
    return [cell for cell in nbformat.read(path, 4).cells if cell.cell_type == kind]


@every_notebook
def test_a_notebook_is_stripped_asks_for_kernel_python3_and_begins_with_its_title(path):
    notebook = nbformat.read(path, 4)
    nbformat.validate(notebook)
    assert notebook.metadata.kernelspec.name == "python3"
    assert set(notebook.metadata) <= {"kernelspec", "language_info"}
    for cell in notebook.cells:
        assert set(cell.metadata) <= {"tags"}
        assert cell.cell_type == "markdown" or (not cell.outputs and cell.execution_count is None)
    first = notebook.cells[0]
    assert first.cell_type == "markdown" and first.source.startswith(f"# {int(path.stem[:2])} · ")
    assert "**Question.**" in first.source


@every_notebook
def test_the_parameters_are_a_few_settings_with_the_profile_s_values(path):
    (cell,) = (cell for cell in cells(path) if "parameters" in cell.metadata.get("tags", []))
    assert cell.source == cells(path)[0].source
    assert all("  # " in line for line in cell.source.splitlines())
    values = {node.targets[0].id: ast.literal_eval(node.value) for node in ast.parse(cell.source).body}
    assert values.pop("profile") == "demo"
    assert 5 <= len(values) <= 10 and set(values) <= set(params.Params.model_fields)
    assert set(values.values()) == {None}  # no value of the demo remains in another profile


@every_notebook
def test_code_cells_call_and_define_nothing_and_hold_neither_a_magic_nor_an_absolute_path(path):
    lines = [line.strip() for cell in cells(path) for line in cell.source.splitlines()]
    assert not [line for line in lines if re.match(r"[!%]", line) or "get_ipython" in line]
    nodes = [node for cell in cells(path) for node in ast.walk(ast.parse(cell.source))]
    definitions = ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef
    assert not [node.name for node in nodes if isinstance(node, definitions)]
    constants = [node.value for node in nodes if isinstance(node, ast.Constant)]
    assert not [text for text in constants if isinstance(text, str) and re.match(r"/|~|[A-Za-z]:\\", text)]


@every_notebook
def test_links_point_to_files_that_exist(path):
    links = [link for cell in cells(path, "markdown") for link in re.findall(r"\]\(([^)]+)\)", cell.source)]
    files = [link.split("#")[0] for link in links if not re.match(r"https?:|#", link)]
    assert not [link for link in files if not (path.parent / link).is_file()]
    assert len(files) >= 1  # every chapter leads to another


@every_notebook
def test_every_section_ends_with_something_to_try(path):
    _, *sections = re.split(r"(?m)^## ", "\n".join(told(cell) for cell in nbformat.read(path, 4).cells))
    for section in sections:
        *_, last = section.split("CODE ")
        assert re.match(r"([a-z-]+ )*try-it \w+ = .+  # change me: ", last), section[:60]
        assert re.search(r"\*Try it\.\*.*\?", section, re.DOTALL), section[:60]


def told(cell):
    """The text of a cell; of code after its tag."""
    code = f"CODE {' '.join(cell.metadata.get('tags', []))} {cell.source}"
    return cell.source if cell.cell_type == "markdown" else code


@every_notebook
def test_a_reader_is_told_how_long_it_takes_and_where_to_go_on(path):
    first, *_, last = (cell.source for cell in cells(path, "markdown"))
    minutes = int(re.search(r"\*Reading time\* about (\d+) minutes", first).group(1))
    words = sum(words_of(cell) for cell in cells(path, "markdown") if not tags_of(cell) & FURTHER)
    shown = [cell.source for cell in cells(path)[2:] if not tags_of(cell) & FURTHER]
    pictures = sum(bool(re.search(r"\bviews\.(?!show\()", source)) for source in shown)
    assert minutes == pytest.approx(words / 200 + pictures / 2, rel=0.15)
    assert minutes <= 12
    number = int(path.stem[:2])
    for other in (number - 1, number + 1):
        assert f"](0{other}_" in first or other not in (1, 2, 3, 4), f"no link to chapter {other}"
    assert "**What to take home.**" in last


@every_notebook
@pytest.mark.parametrize("tag", sorted(FURTHER))
def test_a_further_section_takes_two_minutes_to_read(path, tag):
    words = sum(words_of(cell) for cell in cells(path, "markdown") if tag in tags_of(cell))
    assert words / 200 <= 2
    if words:
        assert "about two for each further section that a profile has" in cells(path, "markdown")[0].source


def words_of(cell):
    return len(cell.source.split())


def tags_of(cell):
    return set(cell.metadata.get("tags", []))


@every_notebook
@pytest.mark.parametrize(
    "without",
    [THEIRS | {"seeds"}, TRAINED, {"weights"}, {"multiclass"} | TRAINED, {"binary"} | TRAINED | THEIRS],
)
def test_what_remains_without_the_cells_of_some_tags_stands_on_its_own(path, without):
    own = [cell for cell in cells(path) if not without & set(cell.metadata.get("tags", []))]
    nodes = [node for cell in own for node in ast.walk(ast.parse(cell.source))]
    names = [node for node in nodes if isinstance(node, ast.Name)]
    imports = [node.names for node in nodes if isinstance(node, (ast.Import, ast.ImportFrom))]
    imported = {alias.asname or alias.name for aliases in imports for alias in aliases}
    stored = {name.id for name in names if isinstance(name.ctx, ast.Store)}
    known = imported | stored | {*dir(builtins), "display"}
    assert {name.id for name in names} <= known
    every = nbformat.read(path, 4).cells
    text = "".join(
        cell.source for cell in every if not {*THEIRS, "try-it"} & set(cell.metadata.get("tags", []))
    )
    theirs = r"\b(?:NYU|MCF|NU|AHN|MCA|EMC|seven|IPMN)\b|high.risk cases"
    assert not re.findall(theirs, text.partition("\n## ")[2])


def test_cells_about_another_cohort_are_left_out_of_what_is_executed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tagged = {"parameters": "x = 1", "paper": "x = 2", "phantom": "x = 3", "try-it": "print(x)"}
    new = [nbformat.v4.new_code_cell(text, metadata={"tags": [tag]}) for tag, text in tagged.items()]
    nbformat.write(nbformat.v4.new_notebook(cells=new), tmp_path / "all.ipynb")
    done = pipeline.execute(tmp_path / "all.ipynb", tmp_path / "done.ipynb", {}, {"paper", "phantom"})
    assert cells(done)[-1].outputs[0].text == "1\n"
    assert len(cells(tmp_path / "all.ipynb")) == 4


@every_notebook
def test_equations_can_be_shown_without_javascript(path):
    text = "\n\n".join(cell.source for cell in cells(path, "markdown"))
    formulas = re.findall(r"\$\$.+?\$\$|\$[^$\n]+\$", text, re.DOTALL)
    assert formulas, "a chapter without an equation"
    for formula in formulas:
        assert "merror" not in latex2mathml.converter.convert(formula.strip("$"))


def test_a_run_executes_all_notebooks_and_says_where_its_results_are(smoke):
    assert f"are in {smoke.folder}/, the report is {smoke.folder}/report.html" in smoke.said
    assert all(f"{stem} done" in smoke.said for stem in pipeline.NOTEBOOKS) and "| Center" in smoke.said
    executed = sorted((smoke.folder / "notebooks").iterdir())
    assert [path.stem for path in executed] == [path.stem for path in NOTEBOOKS] == list(pipeline.NOTEBOOKS)
    for path in executed:
        pipeline.check_executed(path)


def test_every_figure_that_is_saved_is_also_in_the_executed_notebook(smoke):
    for path in (smoke.folder / "notebooks").iterdir():
        drawn = [
            cell
            for cell in cells(path)
            if "views.save(" in cell.source and "\n    views.save" not in cell.source
        ]
        assert drawn, path
        for cell in drawn:
            assert any("image/png" in out.get("data", {}) for out in cell.outputs), (path.stem, cell.source)


def test_an_executed_notebook_holds_stills_and_states_of_live_views_and_no_widget(smoke):
    shown = []
    for path in (smoke.folder / "notebooks").iterdir():
        text = path.read_text()
        assert "widget-view+json" not in text and "widget-state+json" not in text
        outputs = [out for cell in json.loads(text)["cells"] for out in cell.get("outputs", [])]
        data = [out.get("data", {}) for out in outputs]
        shown += [one[live.MIME]["view"] for one in data if live.MIME in one and "image/png" in one]
    assert sorted(shown) == ["by_hand", "explorer", "viewer", "viewer"]


def test_the_tables_hold_a_row_for_each_model_and_arm_that_ran(smoke):
    folder = smoke.folder / "tables"
    table1, table2, table3 = (pd.read_csv(folder / f"table{n}.csv") for n in (1, 2, 3))
    assert list(table1.columns) == ["center", "modality", "no_risk", "low_risk", "high_risk", "total"]
    ran = {"model": SMOKE["multiclass_models"], "method": SMOKE["arms"], "modality": SMOKE["modalities"]}
    for ours, n, keys in ((table2, 2, ["model", "modality"]), (table3, 3, ["center", "method", "modality"])):
        theirs = tables.paper(n)
        for key in set(keys) & set(ran):
            theirs = theirs[theirs[key].isin(ran[key])]
        assert list(ours.columns) == list(theirs.columns)
        assert ours[keys].equals(theirs[keys].reset_index(drop=True))
    counted = tables.paper(2).query("model == 'shufflenetv2'")[["macs_g", "params_m"]].iloc[0]
    assert (table2[["macs_g", "params_m"]] == counted).all(axis=None)
    written = [path.read_text() for path in folder.iterdir()]
    assert len(written) == 19 and all(written)
    assert not any("nan" in text.lower().replace("name", "") for text in written)


def test_figure_1_and_the_others_are_pictures(smoke):
    pictures = {path.stem: plt.imread(path) for path in (smoke.folder / "figures").iterdir()}
    assert {"figure1", "table2", "forest", "roc_by_center"} <= set(pictures)
    assert all(picture.std() > 0.02 for picture in pictures.values())  # not blank
