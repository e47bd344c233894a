import json

import nbformat
import pytest

from ipmn_core import data, params, pipeline, runs
from ipmn_core.params import ParamsError
from ipmn_core.pipeline import NotebookError
from ipmn_core.runs import probes


def notebook(folder, *sources, tags=("parameters",)):
    """A notebook in `folder`: a title, a cell `x = 1` for each of `tags`, then the `sources`."""
    cells = [nbformat.v4.new_markdown_cell("# Title")]
    cells += [nbformat.v4.new_code_cell("x = 1\ny = None", metadata={"tags": [tag]}) for tag in tags]
    cells += [nbformat.v4.new_code_cell(source) for source in sources]
    path = folder / "chapter.ipynb"
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": kernel}), path)
    return path


def executed(folder, change=lambda notebook: None):
    """A notebook as papermill leaves it after a good run, then changed."""
    cell = {
        "cell_type": "code",
        "id": "a",
        "metadata": {},
        "source": ["1 + 1"],
        "execution_count": 1,
        "outputs": [{"output_type": "execute_result", "execution_count": 1, "metadata": {}, "data": {}}],
    }
    text = {"cell_type": "markdown", "id": "b", "metadata": {}, "source": ["# Title"]}
    empty = {**cell, "id": "c", "source": ["  \n"], "execution_count": None, "outputs": []}
    metadata = {"papermill": {"end_time": "2025-01-01T00:00:00", "exception": None}}
    whole = {"cells": [text, cell, empty], "metadata": metadata, "nbformat": 4, "nbformat_minor": 5}
    change(whole)
    path = folder / "done.ipynb"
    path.write_text(json.dumps(whole))
    return path


def test_a_notebook_must_have_one_parameters_cell(tmp_path):
    for tags, count in ((), 0), (("parameters", "parameters"), 2), (("other",), 0):
        with pytest.raises(ParamsError, match=rf"chapter\.ipynb: {count} cells are tagged `parameters`"):
            pipeline.execute(notebook(tmp_path, "x", tags=tags), tmp_path / "done.ipynb", {"x": 2})


def test_a_notebook_that_ran_to_its_end_is_accepted(tmp_path):
    pipeline.check_executed(executed(tmp_path))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda n: n["cells"][1].update(execution_count=None), r"`1 \+ 1` never ran, the kernel died"),
        (
            lambda n: n["cells"][1]["outputs"].append(
                {"output_type": "error", "ename": "KeyError", "evalue": "'x'", "traceback": []}
            ),
            r"In \[1\]: KeyError: 'x'",
        ),
        (lambda n: n["metadata"]["papermill"].update(end_time=None), "did not run to its end"),
        (lambda n: n["metadata"].pop("papermill"), "did not run to its end"),
    ],
    ids=["a cell that never ran", "an error", "no end", "no papermill"],
)
def test_a_notebook_that_did_not_run_to_its_end_is_rejected(tmp_path, change, message):
    with pytest.raises(NotebookError, match=message):
        pipeline.check_executed(executed(tmp_path, change))


@pytest.mark.parametrize("size", [0, 100])
def test_an_empty_or_truncated_notebook_is_rejected(tmp_path, size):
    path = executed(tmp_path)
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(NotebookError, match="not a whole notebook"):
        pipeline.check_executed(path)


def test_a_notebook_runs_with_the_parameters_and_lands_whole_at_its_target(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    source, target = notebook(tmp_path, "print(x, y)"), tmp_path / "out" / "chapter.ipynb"
    assert pipeline.execute(source, target, {"x": [2, 3], "y": {"a": None}}) == target
    assert [path.name for path in target.parent.iterdir()] == ["chapter.ipynb"]
    cells = nbformat.read(target, 4).cells
    assert cells[-1].outputs[0].text == "[2, 3] {'a': None}\n"
    assert not any(cell.get("outputs") for cell in nbformat.read(source, 4).cells)


def test_a_cell_that_raises_is_named_and_nothing_lies_at_the_target(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    source = notebook(tmp_path, "1", "raise ValueError('no scans')", "2")
    target, failed = tmp_path / "done.ipynb", tmp_path / "done.failed.ipynb"
    target.write_text("an older result")
    with pytest.raises(NotebookError, match=r"^chapter\.ipynb, In \[4\]: ValueError: no scans") as caught:
        pipeline.execute(source, target, {"x": 2})
    assert str(failed) in str(caught.value)
    (named,) = (cell for cell in nbformat.read(failed, 4).cells if cell.get("execution_count") == 4)
    assert named.source.startswith("raise") and named.outputs[0].ename == "ValueError"
    assert not target.exists() and not list(tmp_path.glob("*running*"))


@pytest.mark.parametrize("sources", [["1", "import os; os._exit(1)", "2"], ["import os; os._exit(1)"]])
def test_the_death_of_a_kernel_is_a_failure_of_the_notebook(tmp_path, monkeypatch, sources):
    monkeypatch.chdir(tmp_path)
    source, target = notebook(tmp_path, *sources), tmp_path / "done.ipynb"
    target.write_text("an older result")
    with pytest.raises(NotebookError, match=r"^chapter\.ipynb.*the kernel died"):
        pipeline.execute(source, target, {"x": 2})
    assert not target.exists() and not list(tmp_path.glob("*running*"))
    assert (tmp_path / "done.failed.ipynb").exists()


def test_a_run_removes_what_an_earlier_one_left_and_keeps_its_training(tmp_path, monkeypatch):
    for name in ("notebooks", "tables", "figures", "runs"):
        (tmp_path / "t" / name).mkdir(parents=True)
        (tmp_path / "t" / name / "old").write_text("old")
    (tmp_path / "t" / "report.html").write_text("old")
    p, calls = params.validate({"profile": "t", "outputs": str(tmp_path)}, "test"), []

    def execute(source, target, parameters):
        assert {path.name for path in (tmp_path / "t").iterdir()} == {"runs", "params.yaml"}
        calls.append((source, target, parameters))
        return target

    monkeypatch.setattr(pipeline, "execute", execute)
    paths = list(pipeline.run(p))
    assert paths == [tmp_path / "t" / "notebooks" / f"{stem}.ipynb" for stem in pipeline.NOTEBOOKS]
    assert all(source.is_file() for source, _, _ in calls)
    assert all(params.from_notebook(parameters) == p for _, _, parameters in calls)
    assert (tmp_path / "t" / "runs" / "old").exists()


def prepared(tmp_path, phantom_root):
    """A profile of the phantom's T1 scans with a training run on disk."""
    (tmp_path / "t" / "runs" / "old").mkdir(parents=True)
    small = {"profile": "t", "modalities": ["t1"], "size": 32, "device": "cpu"}
    return params.validate({**small, "outputs": str(tmp_path), "data": str(phantom_root)}, "test")


@pytest.mark.parametrize("fresh", [True, False])
def test_training_runs_are_discarded_on_request_only(tmp_path, phantom_root, monkeypatch, fresh):
    monkeypatch.setattr(data, "assign_folds", lambda *_, **__: None)  # one case a class cannot be split
    for module, name in ((runs, "train"), (probes, "unfinished"), (probes, "fit")):
        monkeypatch.setattr(module, name, lambda *_: [])
    pipeline._prepare(prepared(tmp_path, phantom_root), fresh=fresh)  # in this process, where the patch is
    assert (tmp_path / "t" / "runs" / "old").exists() == (not fresh)


def test_training_runs_are_not_discarded_for_a_profile_that_cannot_run(tmp_path, phantom_root):
    with pytest.raises(data.CohortError, match="NYU t1: cannot be split into 5 folds"):
        pipeline.prepare(prepared(tmp_path, phantom_root), fresh=True)
    assert (tmp_path / "t" / "runs" / "old").exists()


def test_the_first_notebook_that_fails_ends_the_run(tmp_path, monkeypatch):
    def execute(source, target, parameters):
        raise NotebookError(source.name)

    monkeypatch.setattr(pipeline, "execute", execute)
    with pytest.raises(NotebookError, match="01_data_exploration"):
        list(pipeline.run(params.validate({"profile": "t", "outputs": str(tmp_path)}, "test")))


def test_of_notebooks_side_by_side_the_one_that_fails_is_named_and_no_old_table_stays(tmp_path, monkeypatch):
    p = params.validate({"profile": "t", "outputs": "out", "jobs": 2}, "test")
    for name in ("params", "notebooks", "out/t/tables"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "out" / "t" / "tables" / "table2.csv").write_text("of an earlier run")
    for stem in pipeline.NOTEBOOKS:
        source = "raise ValueError('no scans')" if stem.startswith("02") else "print(profile)"
        notebook(tmp_path, source).rename(tmp_path / "notebooks" / f"{stem}.ipynb")
    monkeypatch.chdir(tmp_path)
    done = []
    with pytest.raises(NotebookError, match=r"^02_three_class_.*\.ipynb, In \[3\]: ValueError: no scans"):
        done.extend(path.stem for path in pipeline.run(p))
    assert not (tmp_path / "out" / "t" / "tables").exists()
    names = {path.name for path in (tmp_path / "out" / "t" / "notebooks").iterdir()}
    assert "02_three_class_benchmark.failed.ipynb" in names and "02_three_class_benchmark.ipynb" not in names
    assert "01_data_exploration.ipynb" in names
