"""The four notebooks, in order, through papermill; every executed notebook is checked before it counts."""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
import tempfile
from collections.abc import Collection, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import repeat
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import nbformat
import yaml
from filelock import FileLock, Timeout

from ipmn_core.names import ARMS, TASKS, fusion
from ipmn_core.params import Params, ParamsError, project_root
from ipmn_core.process import end_with

NOTEBOOKS = ("01_data_exploration", "02_three_class_benchmark", "03_federated_binary", "04_analysis")
WIDGET = "application/vnd.jupyter.widget-view+json"
WRITTEN = ("notebooks", "tables", "figures")  # folders of a profile that each `ipmn run` writes anew
MOST_TOLD = 20  # lines about the cohort
START = "spawn"  # not from a fork server: its processes end without joblib's tidying


class NotebookError(RuntimeError):
    """A notebook is missing, cannot start or did not run to its end; the message names it."""


def packaged() -> Path:
    """The folder of the package's own `params/` and `notebooks/`: in it if installed, else the repository."""
    installed = Path(__file__).with_name("project")  # as pyproject.toml maps them
    return installed if installed.is_dir() else Path(__file__).parents[1]


def init(folder: Path) -> list[Path]:
    """Copy the package's own profiles and notebooks to `params/` and `notebooks/` of `folder`.

    Returns the files. Raises FileExistsError, and copies nothing, if one of them is there.
    """
    own = packaged()
    files = [path.relative_to(own) for path in (*own.glob("params/*.yaml"), *own.glob("notebooks/*.ipynb"))]
    for file in files:
        if (folder / file).exists():
            raise FileExistsError(f"{folder / file} exists; move it away, or name another folder")
    for file in files:
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(own / file, folder / file)
    return [folder / file for file in files]


def chapters() -> list[Path]:
    """The four notebooks, of the project if it has any, else the package's own.

    Raises NotebookError for one that is missing or unreadable, ParamsError for one without one cell tagged
    `parameters`.
    """
    folders = (root / "notebooks" for root in (project_root(), packaged()))
    mine, own = ([folder / f"{stem}.ipynb" for stem in NOTEBOOKS] for folder in folders)
    paths = mine if any(path.exists() for path in mine) else own
    for path in paths:
        _check_parameters(path)
    return paths


@contextlib.contextmanager
def locked(p: Params) -> Iterator[None]:
    """A block during which no other process works on this profile. Raises RuntimeError if one does."""
    p.folder.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(p.folder / ".lock", timeout=0):
            yield
    except Timeout as error:
        text = f"another `ipmn run` is at work in {p.folder}; wait for its end, or take another profile name"
        raise RuntimeError(text) from error


def prepare(p: Params, fresh: bool = False) -> None:
    """Check settings, cohort and runs on disk (`fresh` discards these), then train and fit what is missing.

    In a process of its own, whose memory is free again for the notebooks.
    """
    with ProcessPoolExecutor(1, get_context(START), end_with, (os.getpid(),)) as alone:
        try:
            alone.submit(_prepare, p, fresh).result()
        except BrokenProcessPool as error:
            text = "the process that trains was ended from outside (out of memory?); the same command goes on"
            raise RuntimeError(text) from error


def _prepare(p: Params, fresh: bool) -> None:
    from ipmn_core import data, runs
    from ipmn_core.runs import dial, probes, seeds

    try_notebooks(p)
    for task in TASKS:
        for run in runs.grid(p, task)[:1]:
            runs.on_this_machine(p, runs.run_settings(p, run))
    runs.check_folds(p, TASKS, data.subset(data.open_cohort(p), p.max_per_cell))
    _, problems = data.inspect(p.cohort_root, p)  # what was chosen is said here, too; `ipmn check` says all
    print(*data.told(problems)[:MOST_TOLD], sep="\n", file=sys.stderr)
    cohort = data.load_cohort(p)
    if fresh:
        runs.discard(p)
    for task in TASKS:
        probes.unfinished(p, task, cohort)
    runs.train(p, ("binary", "multiclass"), cohort)  # the longer runs first: workers end together
    for task in TASKS:
        probes.fit(p, task, cohort)
    for q in (*seeds.points(p), *dial.points(p)):
        runs.train(q, ("binary",), data.load_cohort(q))


def try_notebooks(p: Params) -> None:
    """Raise unless the notebooks are there, their kernel answers and their folders can be written.

    NotebookError, ParamsError (`chapters`) or OSError; all of it would otherwise fail after all training.
    """
    from nbclient import NotebookClient

    chapters()
    for folder in filter(Path.exists, (p.folder / name for name in WRITTEN)):
        tempfile.TemporaryFile(dir=folder).close()
    trial = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("import ipmn_core")])
    try:
        with _own_kernel() as options:
            client = NotebookClient(trial, **options)
            with client.setup_kernel(
                cwd=str(project_root())
            ):  # `execute` would leave its own signal handlers
                client.execute_cell(trial.cells[0], 0)
    except Exception as error:
        remedy = f"see that `{sys.executable} -m ipykernel_launcher` starts and TMPDIR is a local folder"
        raise NotebookError(
            f"no kernel for the notebooks: {type(error).__name__}: {error}; {remedy}"
        ) from error


@contextlib.contextmanager
def _own_kernel() -> Iterator[dict[str, Any]]:
    """nbclient's options for a kernel of this interpreter, whatever `python3` is on JUPYTER_PATH."""
    from jupyter_client.kernelspec import KernelSpecManager
    from jupyter_client.manager import AsyncKernelManager
    from traitlets import default
    from traitlets.config import Config

    class OwnKernel(AsyncKernelManager):
        @default("kernel_spec_manager")
        def _searches_nowhere(self) -> KernelSpecManager:  # so that it makes the interpreter's own
            return KernelSpecManager(kernel_dirs=[])

    place = tempfile.gettempdir()
    if os.name != "nt" and len(os.fsencode(place)) > 80:  # the path of a Unix socket has at most 103 bytes
        place = "/tmp"
    with tempfile.TemporaryDirectory(prefix="ipmn", dir=place) as folder:
        # with TCP, two kernels that start at a time may be given one port; Windows has no Unix sockets
        how = {} if os.name == "nt" else {"transport": "ipc", "ip": f"{folder}/kernel"}
        yield {
            "kernel_name": "python3",
            "kernel_manager_class": OwnKernel,
            "config": Config(KernelManager=how),
            "extra_arguments": ["--log-level=CRITICAL"],
        }


def run(p: Params) -> Iterator[Path]:
    """The executed notebooks of a profile, one path after another, in `<outputs>/<profile>/notebooks/`.

    Removes report, tables, figures and notebooks of an earlier run first, so that nothing old can pass for
    new. Raises NotebookError for the first notebook that fails.
    """
    (p.folder / "report.html").unlink(missing_ok=True)
    for name in WRITTEN:
        shutil.rmtree(p.folder / name, ignore_errors=True)
    p.folder.mkdir(parents=True, exist_ok=True)
    (p.folder / "params.yaml").write_text(yaml.safe_dump(p.model_dump(mode="json"), sort_keys=False))
    every = chapters(), repeat(p), repeat(_foreign(p))
    if p.jobs == 1:
        yield from map(_chapter, *every)
        return
    # in processes, not threads: papermill changes the working directory of the one it is in
    jobs = min(p.jobs, len(NOTEBOOKS))
    with ProcessPoolExecutor(jobs, get_context(START), end_with, (os.getpid(),)) as lanes:
        yield from lanes.map(_chapter, *every)


def _foreign(p: Params) -> set[str]:
    """Tags of the cells that are not about this profile.

    `paper` (its own numbers), `phantom` (its truth), `strategies` (that the paper has not), `unseen`
    (`fold_rule: leave_one_center_out`), `cross` (the arm `local_only`), `fusion` (of modalities), `dial`,
    `seeds` (`more_seeds`); `multiclass` and `binary` where the task has no arm, `multiclass-trained` and
    `binary-trained` where none was trained here (`ipmn score`).
    """
    from ipmn_core import data, runs

    applies = {"paper": data.open_cohort(p).is_paper, "phantom": not data.read_truth(p).empty}
    applies |= {"unseen": p.fold_rule == data.UNSEEN and bool(p.arms), "cross": runs.LOCAL_ONLY in p.arms}
    applies["strategies"] = any(run.arm not in ARMS for run in runs.grid(p, "binary"))
    applies |= {"dial": bool(p.dial_shifts), "seeds": bool(p.more_seeds and p.arms)}
    applies["fusion"] = any(fusion(modality)[1] for modality in p.modalities) and bool(p.arms)
    for task in TASKS:
        trained, scored = bool(runs.grid(p, task)), bool(runs.scored(p, task))
        applies |= {task: trained or scored, f"{task}-trained": trained}
    return {tag for tag, yes in applies.items() if not yes}


def _chapter(source: Path, p: Params, without: set[str]) -> Path:
    target = p.folder / "notebooks" / source.name
    return execute(source, target, {"profile": str(p.folder / "params.yaml")}, without)


def execute(source: Path, target: Path, parameters: dict, without: Collection[str] = ()) -> Path:
    """`target`, the notebook at `source` executed with `parameters`, written only if it ran to its end.

    Cells with one of the tags in `without` are left out.
    A notebook that failed is kept beside it as `<name>.failed.ipynb`. Raises ParamsError for a notebook
    without one cell tagged `parameters`, NotebookError for one that did not finish.
    """
    import papermill
    from nbclient.exceptions import DeadKernelError
    from papermill.exceptions import PapermillExecutionError

    _check_parameters(source)
    notebook = nbformat.read(source, 4)
    notebook.cells = [c for c in notebook.cells if not {*without} & {*c.metadata.get("tags", [])}]
    target.parent.mkdir(parents=True, exist_ok=True)
    running, failed = target.with_suffix(".running.ipynb"), target.with_suffix(".failed.ipynb")
    try:
        with _own_kernel() as options:
            papermill.execute_notebook(
                notebook,
                running,
                parameters=parameters,
                cwd=project_root(),
                progress_bar=False,
                stderr_file=sys.stderr,
                coalesce_streams=True,
                **options,
            )
        check_executed(running)
        _keep_stills(running)
    except (PapermillExecutionError, DeadKernelError, NotebookError) as error:
        os.replace(running, failed)
        reason = "the kernel died (out of memory?)"
        if isinstance(error, PapermillExecutionError):
            reason = f"In [{error.exec_count}]: {error.ename}: {error.evalue}"
        raise NotebookError(f"{source.name}, {reason}\n(as far as it came: {failed})") from error
    os.replace(running, target)
    return target


def _keep_stills(path: Path) -> None:
    """Remove the widgets of an executed notebook, which only a kernel can show; live views leave stills."""
    notebook = nbformat.read(path, 4)
    notebook.metadata.pop("widgets", None)
    for cell in (cell for cell in notebook.cells if cell.cell_type == "code"):
        live = [output for output in cell.outputs if output.get("data", {}).pop(WIDGET, None)]
        cell.outputs = [output for output in cell.outputs if output not in live or "image/png" in output.data]
    nbformat.write(notebook, path)


def check_executed(path: Path) -> None:
    """Raise NotebookError unless every code cell of the notebook at `path` ran.

    papermill's own status is not believed: after the death of a kernel it says "completed" of every cell.
    """
    cells = _cells(path, "`ipmn run` executes it")
    if any(c.cell_type == "code" and c.source.strip() and not c.execution_count for c in cells):
        raise NotebookError(f"{path}: did not run to its end; `ipmn run` executes it again")


def _check_parameters(path: Path) -> None:
    cells = _cells(path, "`ipmn init` writes all four to another folder")
    tagged = [c for c in cells if "parameters" in c.metadata.get("tags", [])]
    if len(tagged) != 1:  # papermill would let the notebook's own values win, without an error
        raise ParamsError(f"{path.name}: {len(tagged)} cells are tagged `parameters`; tag exactly one")


def _cells(path: Path, remedy: str) -> list[nbformat.NotebookNode]:
    if not path.is_file():
        raise NotebookError(f"{path}: no such notebook; {remedy}")
    try:
        return nbformat.read(path, 4).cells
    except Exception as error:  # what nbformat raises depends on what is wrong
        raise NotebookError(f"{path}: not a whole notebook; {remedy}") from error


def write_report(p: Params) -> Path:
    """`<outputs>/<profile>/report.html`, written from the executed notebooks and what is beside them."""
    from ipmn_core import report

    paths = [p.folder / "notebooks" / f"{stem}.ipynb" for stem in NOTEBOOKS]
    for path in paths:
        check_executed(path)
    return report.write(p, paths, p.folder / "report.html")
