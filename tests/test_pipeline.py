import json
import shutil
import sys
import tempfile
from pathlib import Path

import nbformat
import pytest

from ipmn_core import data, params, pipeline, runs
from ipmn_core.params import ParamsError
from ipmn_core.pipeline import NotebookError
from ipmn_core.runs import probes, store

OLD = "binary/t1/fedavg"  # an arm of an earlier training


@pytest.fixture(autouse=True)
def working_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def notebook(folder, *sources, tags=("parameters",)):
    """A notebook in `folder`: a title, a cell `x = 1` for each of `tags`, then the `sources`."""
    cells = [nbformat.v4.new_markdown_cell("# Title")]
    cells += [nbformat.v4.new_code_cell("x = 1\ny = None", metadata={"tags": [tag]}) for tag in tags]
    cells += [nbformat.v4.new_code_cell(source) for source in sources]
    path = folder / "chapter.ipynb"
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": kernel}), path)
    return path


@pytest.mark.parametrize("end", [slice(0), slice(100), None], ids=["empty", "truncated", "never ran"])
def test_a_notebook_that_did_not_run_to_its_end_is_refused_by_name(tmp_path, end):
    path = notebook(tmp_path, "1 + 1")
    path.write_bytes(path.read_bytes()[end] if end else path.read_bytes())
    with pytest.raises(NotebookError, match=r"chapter\.ipynb: .*; `ipmn run` executes it"):
        pipeline.check_executed(path)


def test_a_notebook_runs_with_the_parameters_and_lands_whole_at_its_target(tmp_path):
    source, target = notebook(tmp_path, "print(x, y)"), tmp_path / "out" / "chapter.ipynb"
    assert pipeline.execute(source, target, {"x": [2, 3], "y": {"a": None}}) == target
    assert [path.name for path in target.parent.iterdir()] == ["chapter.ipynb"]
    pipeline.check_executed(target)
    cells = nbformat.read(target, 4).cells
    assert cells[-1].outputs[0].text == "[2, 3] {'a': None}\n"
    assert not any(cell.get("outputs") for cell in nbformat.read(source, 4).cells)


def test_a_cell_that_raises_is_named_and_nothing_is_at_the_target(tmp_path):
    source = notebook(tmp_path, "1", "raise ValueError('no scans')", "2")
    failed = tmp_path / "done.failed.ipynb"
    with pytest.raises(NotebookError, match=r"^chapter\.ipynb, In \[4\]: ValueError: no scans") as caught:
        pipeline.execute(source, tmp_path / "done.ipynb", {"x": 2})
    assert str(failed) in str(caught.value)
    (named,) = (cell for cell in nbformat.read(failed, 4).cells if cell.get("execution_count") == 4)
    assert named.source.startswith("raise") and named.outputs[0].ename == "ValueError"
    assert {path.name for path in tmp_path.iterdir()} == {"chapter.ipynb", failed.name}


def test_the_kernel_is_this_interpreters_whatever_jupyter_finds_in_any_folder(tmp_path, monkeypatch):
    spec, deep = tmp_path / "jupyter" / "kernels" / "python3", tmp_path / ("x" * 120)
    for folder in (spec, deep):
        folder.mkdir(parents=True)
    other = {"argv": ["/no/python", "{connection_file}"], "display_name": "Other", "language": "python"}
    (spec / "kernel.json").write_text(json.dumps(other))
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path / "jupyter"))
    monkeypatch.setattr(tempfile, "tempdir", str(deep))
    source = notebook(tmp_path, "import sys", "print(sys.executable)")
    target = pipeline.execute(source, tmp_path / "done.ipynb", {"x": 2})
    assert nbformat.read(target, 4).cells[-1].outputs[0].text == f"{sys.executable}\n"
    assert nbformat.read(target, 4).metadata.kernelspec.name == "python3"


@pytest.mark.parametrize("sources", [["1", "import os; os._exit(1)", "2"], ["import os; os._exit(1)"]])
def test_the_death_of_a_kernel_is_a_failure_of_the_notebook(tmp_path, sources):
    with pytest.raises(NotebookError, match=r"^chapter\.ipynb, the kernel died"):
        pipeline.execute(notebook(tmp_path, *sources), tmp_path / "done.ipynb", {"x": 2})
    assert {path.name for path in tmp_path.iterdir()} == {"chapter.ipynb", "done.failed.ipynb"}


def prepared(tmp_path, phantom_root):
    """A profile of the phantom's T1 scans with a training run on disk."""
    (tmp_path / "t" / "runs" / OLD).mkdir(parents=True)
    small = {"profile": "t", "modalities": ["t1"], "size": 32, "device": "cpu"}
    return params.validate({**small, "outputs": str(tmp_path), "data": str(phantom_root)}, "test")


def test_a_run_removes_what_an_earlier_one_left_and_keeps_its_training(tmp_path, phantom_root, monkeypatch):
    p, calls = prepared(tmp_path, phantom_root), []
    for path in ("notebooks/old", "tables/old", "figures/old", "report.html"):
        (p.folder / path).parent.mkdir(exist_ok=True)
        (p.folder / path).write_text("old")

    def execute(source, target, parameters, without):
        assert {path.name for path in p.folder.iterdir()} == {"runs", "params.yaml"}
        calls.append((source, target, parameters))
        return target

    monkeypatch.setattr(pipeline, "execute", execute)
    paths = list(pipeline.run(p))
    assert paths == [p.folder / "notebooks" / f"{stem}.ipynb" for stem in pipeline.NOTEBOOKS]
    assert all(source.is_file() for source, _, _ in calls)
    assert all(params.from_notebook(parameters) == p for _, _, parameters in calls)
    assert (p.folder / "runs" / OLD).exists()


@pytest.mark.parametrize("fresh", [True, False])
def test_training_runs_are_discarded_on_request_only(tmp_path, phantom_root, monkeypatch, fresh):
    monkeypatch.setattr(data, "assign_folds", lambda *_, **__: None)  # one case a class cannot be split
    for module, name in ((runs, "check_folds"), (runs, "train"), (store, "unfinished"), (probes, "fit")):
        monkeypatch.setattr(module, name, lambda *_: [])
    pipeline._prepare(prepared(tmp_path, phantom_root), fresh=fresh)  # in this process, where the patch is
    assert (tmp_path / "t" / "runs" / OLD).exists() == (not fresh)


def test_training_runs_are_not_discarded_for_a_profile_that_cannot_run(tmp_path, phantom_root):
    with pytest.raises(data.CohortError, match="NYU t1: cannot be split into 5 folds"):
        pipeline.prepare(prepared(tmp_path, phantom_root), fresh=True)
    assert (tmp_path / "t" / "runs" / OLD).exists()


def chapters(folder, *stems):
    (folder / "notebooks").mkdir(exist_ok=True)
    (folder / "params").mkdir(exist_ok=True)
    for stem in stems:
        notebook(folder, "1").rename(folder / "notebooks" / f"{stem}.ipynb")


def test_the_chapters_are_those_of_the_project_or_else_the_packages_own(tmp_path):
    chapters(tmp_path)
    assert [path.stem for path in pipeline.chapters()] == list(pipeline.NOTEBOOKS)
    assert {path.parent for path in pipeline.chapters()} == {Path(__file__).parents[1] / "notebooks"}
    chapters(tmp_path, *pipeline.NOTEBOOKS[:3])
    with pytest.raises(NotebookError, match=r"04_analysis\.ipynb: no such notebook; `ipmn init`"):
        pipeline.chapters()
    chapters(tmp_path, *pipeline.NOTEBOOKS)
    assert {path.parent for path in pipeline.chapters()} == {tmp_path / "notebooks"}


def test_what_would_stop_the_notebooks_is_found_before_anything_is_done(tmp_path, phantom_root, monkeypatch):
    p = prepared(tmp_path, phantom_root)
    (p.folder / "tables").touch()
    with pytest.raises(NotADirectoryError, match="tables"):
        pipeline._prepare(p, fresh=True)
    (p.folder / "tables").unlink()
    with monkeypatch.context() as patch, pytest.raises(NotebookError, match="no kernel for the notebooks: "):
        patch.setattr(sys, "executable", shutil.which("false"))
        pipeline._prepare(p, fresh=True)
    chapters(tmp_path, *pipeline.NOTEBOOKS)
    for broken in ("{}", "[]", ""):
        (tmp_path / "notebooks" / "04_analysis.ipynb").write_text(broken)
        with pytest.raises(NotebookError, match=r"04_analysis\.ipynb: not a complete"):
            pipeline._prepare(p, fresh=True)
    for tags, count in ((), 0), (("parameters", "parameters"), 2), (("other",), 0):
        notebook(tmp_path, "1", tags=tags).rename(tmp_path / "notebooks" / "04_analysis.ipynb")
        with pytest.raises(ParamsError, match=rf"04_analysis\.ipynb: {count} cells are tagged `parameters`"):
            pipeline._prepare(p, fresh=True)
    assert (p.folder / "runs" / OLD).exists()


def test_of_parallel_notebooks_the_failed_one_is_named_and_no_old_table_stays(tmp_path, phantom_root):
    p = prepared(tmp_path, phantom_root).model_copy(update={"jobs": 2})
    (p.folder / "tables").mkdir()
    (p.folder / "tables" / "table2.csv").write_text("of an earlier run")
    chapters(tmp_path, *pipeline.NOTEBOOKS)
    notebook(tmp_path, "raise ValueError('no scans')").rename("notebooks/02_three_class_benchmark.ipynb")
    with pytest.raises(NotebookError, match=r"^02_three_class_.*\.ipynb, In \[3\]: ValueError: no scans"):
        list(pipeline.run(p))
    assert not (p.folder / "tables").exists()
    names = {path.name for path in (p.folder / "notebooks").iterdir()}
    assert "02_three_class_benchmark.failed.ipynb" in names and "02_three_class_benchmark.ipynb" not in names
    assert "01_data_exploration.ipynb" in names
