"""Run the four notebooks through papermill and check every executed notebook."""

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
WRITTEN = ("notebooks", "tables", "figures")  # folders of a profile that each `ipmn run` rewrites
MOST_TOLD = 20  # printed lines about the cohort
START = "spawn"  # processes of a fork server end without joblib's cleanup


class NotebookError(RuntimeError):
    """A notebook is missing, cannot start or did not finish; the message names it."""


def packaged() -> Path:
    """The folder with the package's own `params/` and `notebooks/`: in the package, or the repository."""
    installed = Path(__file__).with_name("project")  # see `package-dir` in pyproject.toml
    return installed if installed.is_dir() else Path(__file__).parents[1]


def init(folder: Path) -> list[Path]:
    """Copy the package's own profiles and notebooks to `params/` and `notebooks/` of `folder`.

    Returns the files. Raises FileExistsError, and copies nothing, if one of them exists.
    """
    own = packaged()
    files = [path.relative_to(own) for path in (*own.glob("params/*.yaml"), *own.glob("notebooks/*.ipynb"))]
    for file in files:
        if (folder / file).exists():
            raise FileExistsError(f"{folder / file} exists; move it away, or choose another folder")
    for file in files:
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(own / file, folder / file)
    return [folder / file for file in files]


def chapters() -> list[Path]:
    """The four notebooks of the project, or if it has none, the package's own.

    Raises NotebookError for a missing or unreadable notebook, ParamsError unless exactly one cell is tagged
    `parameters`.
    """
    folders = (root / "notebooks" for root in (project_root(), packaged()))
    mine, own = ([folder / f"{stem}.ipynb" for stem in NOTEBOOKS] for folder in folders)
    paths = mine if any(path.exists() for path in mine) else own
    for path in paths:
        cells = _cells(path, "`ipmn init` writes all four to another folder")
        tagged = [c for c in cells if "parameters" in c.metadata.get("tags", [])]
        if len(tagged) != 1:  # papermill would silently keep the notebook's own values
            raise ParamsError(f"{path.name}: {len(tagged)} cells are tagged `parameters`; tag exactly one")
    return paths


@contextlib.contextmanager
def locked(p: Params) -> Iterator[None]:
    """A block in which no other process may use this profile. Raises RuntimeError if one does."""
    p.folder.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(p.folder / ".lock", timeout=0):
            yield
    except Timeout as error:
        text = f"another `ipmn run` uses {p.folder}; wait until it ends, or choose another profile name"
        raise RuntimeError(text) from error


def prepare(p: Params, fresh: bool = False) -> None:
    """Check settings, cohort and runs on disk (`fresh` discards runs), then train and fit what is missing.

    Runs in a separate process, which frees its memory for the notebooks.
    """
    with ProcessPoolExecutor(1, get_context(START), end_with, (os.getpid(),)) as alone:
        try:
            alone.submit(_prepare, p, fresh).result()
        except BrokenProcessPool as error:
            text = "the training process was ended from outside (out of memory?); the same command resumes it"
            raise RuntimeError(text) from error


def _prepare(p: Params, fresh: bool) -> None:
    from ipmn_core import data, runs
    from ipmn_core.runs import probes, store, sweeps

    try_notebooks(p)
    for task in TASKS:
        for run in runs.grid(p, task)[:1]:
            runs.on_this_machine(p, runs.run_settings(p, run))
    runs.check_folds(p, TASKS, data.subset(data.open_cohort(p), p.max_per_cell))
    _, problems = data.inspect(p.cohort_root, p)  # prints some; `ipmn check` prints all
    print(*data.told(problems)[:MOST_TOLD], sep="\n", file=sys.stderr)
    cohort = data.load_cohort(p)
    if fresh:
        runs.discard(p)
    for task in TASKS:
        store.unfinished(p, probes.protocols(p, task), cohort.key)
    runs.train(p, ("binary", "multiclass"), cohort)  # longer runs first, so that workers end together
    for task in TASKS:
        probes.fit(p, task, cohort)
    for q in (*sweeps.seed_points(p), *sweeps.dial_points(p)):
        runs.train(q, ("binary",), data.load_cohort(q))


def try_notebooks(p: Params) -> None:
    """Raise before training if notebooks are missing, their kernel does not start, or folders are read-only.

    Raises NotebookError, ParamsError (see `chapters`) or OSError.
    """
    from nbclient import NotebookClient

    chapters()
    for folder in filter(Path.exists, (p.folder / name for name in WRITTEN)):
        tempfile.TemporaryFile(dir=folder).close()
    trial = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("import ipmn_core")])
    try:
        with _own_kernel() as options:
            client = NotebookClient(trial, **options)
            with client.setup_kernel(cwd=str(project_root())):  # `execute` leaves its own signal handlers
                client.execute_cell(trial.cells[0], 0)
    except Exception as error:
        text = f"no kernel for the notebooks: {type(error).__name__}: {error}"
        remedy = f"check that `{sys.executable} -m ipykernel_launcher` starts and TMPDIR is a local folder"
        raise NotebookError(f"{text}; {remedy}") from error


@contextlib.contextmanager
def _own_kernel() -> Iterator[dict[str, Any]]:
    """nbclient's options for a kernel of this interpreter; `python3` on JUPYTER_PATH may be another."""
    from jupyter_client.kernelspec import KernelSpecManager
    from jupyter_client.manager import AsyncKernelManager
    from traitlets import default
    from traitlets.config import Config

    class OwnKernel(AsyncKernelManager):
        @default("kernel_spec_manager")
        def _searches_nowhere(self) -> KernelSpecManager:  # without folders, it uses this interpreter
            return KernelSpecManager(kernel_dirs=[])

    place = tempfile.gettempdir()
    if os.name != "nt" and len(os.fsencode(place)) > 80:  # a Unix socket's path has at most 103 bytes
        place = "/tmp"
    with tempfile.TemporaryDirectory(prefix="ipmn", dir=place) as folder:
        # with TCP, two kernels that start together may get the same port; Windows has no Unix sockets
        how = {} if os.name == "nt" else {"transport": "ipc", "ip": f"{folder}/kernel"}
        yield {
            "kernel_name": "python3",
            "kernel_manager_class": OwnKernel,
            "config": Config(KernelManager=how),
            "extra_arguments": ["--log-level=CRITICAL"],
        }


def run(p: Params) -> Iterator[Path]:
    """Execute the notebooks of a profile and yield their paths in `<outputs>/<profile>/notebooks/`.

    With one job in order, else the last chapter first. Before that, removes report, tables, figures and
    notebooks of an earlier run. Raises NotebookError for the first notebook that fails.
    """
    (p.folder / "report.html").unlink(missing_ok=True)
    for name in WRITTEN:
        shutil.rmtree(p.folder / name, ignore_errors=True)
    (p.folder / "params.yaml").write_text(yaml.safe_dump(p.model_dump(mode="json"), sort_keys=False))
    sources, same = chapters(), (repeat(p), repeat(_foreign(p)))
    if p.jobs == 1:
        yield from map(_chapter, sources, *same)
        return
    # in processes, not threads, because papermill changes the working directory of its process
    jobs = min(p.jobs, len(NOTEBOOKS))
    with ProcessPoolExecutor(jobs, get_context(START), end_with, (os.getpid(),)) as lanes:
        yield from lanes.map(_chapter, sources[::-1], *same)  # chapters 3 and 4 take longest


def _foreign(p: Params) -> set[str]:
    """Tags of the cells that do not apply to this profile.

    `paper`: its numbers; `phantom`: its truth; `strategies`: those that the paper lacks; `weights`: of the
    networks that chapter 3 shows, or `no-weights`; `unseen`, `cross`, `fusion`, `dial`, `seeds`: sections of
    other profiles; `<task>` if it has no arm; `<task>-trained` if no arm was trained here.
    """
    from ipmn_core import data, runs

    applies = {"paper": data.open_cohort(p).is_paper, "phantom": not data.read_truth(p).empty}
    applies |= {"unseen": p.fold_rule == data.UNSEEN and bool(p.arms), "cross": runs.LOCAL_ONLY in p.arms}
    applies["strategies"] = any(run.arm not in ARMS for run in runs.grid(p, "binary"))
    applies |= {"dial": bool(p.dial_shifts), "seeds": bool(p.more_seeds and p.arms)}
    applies["fusion"] = any(fusion(modality)[1] for modality in p.modalities) and bool(p.arms)
    weights = all((runs.folder_of(p, run) / "model.pt").exists() for run in runs.shown(p))
    applies |= {"weights": weights, "no-weights": not weights}
    for task in TASKS:
        trained, scored = bool(runs.grid(p, task)), bool(runs.scored(p, task))
        applies |= {task: trained or scored, f"{task}-trained": trained}
    return {tag for tag, yes in applies.items() if not yes}


def _chapter(source: Path, p: Params, without: set[str]) -> Path:
    target = p.folder / "notebooks" / source.name
    return execute(source, target, {"profile": str(p.folder / "params.yaml")}, without)


def execute(source: Path, target: Path, parameters: dict, without: Collection[str] = ()) -> Path:
    """Execute the notebook `source` with `parameters`, write it to `target` if it finished; return `target`.

    Leaves out cells with a tag in `without`. Keeps a failed notebook next to it as `<name>.failed.ipynb`.
    Raises NotebookError for a notebook that did not finish.
    """
    import papermill
    from nbclient.exceptions import DeadKernelError
    from papermill.exceptions import PapermillExecutionError

    notebook = nbformat.read(source, 4)
    notebook.cells = [c for c in notebook.cells if not {*without} & {*c.metadata.get("tags", [])}]
    target.parent.mkdir(parents=True, exist_ok=True)
    running, failed = target.with_suffix(".running.ipynb"), target.with_suffix(".failed.ipynb")
    try:
        with _own_kernel() as options:
            options |= {"progress_bar": False, "stderr_file": sys.stderr, "coalesce_streams": True}
            papermill.execute_notebook(notebook, running, parameters, cwd=project_root(), **options)
        check_executed(running)
        _keep_stills(running)
    except (PapermillExecutionError, DeadKernelError, NotebookError) as error:
        os.replace(running, failed)
        reason = "the kernel died (out of memory?)"
        if isinstance(error, PapermillExecutionError):
            reason = f"In [{error.exec_count}]: {error.ename}: {error.evalue}"
        raise NotebookError(f"{source.name}, {reason}\n(the failed notebook: {failed})") from error
    os.replace(running, target)
    return target


def _keep_stills(path: Path) -> None:
    """Remove the widgets of an executed notebook, which need a kernel; live views keep their pictures."""
    notebook = nbformat.read(path, 4)
    notebook.metadata.pop("widgets", None)
    for cell in (cell for cell in notebook.cells if cell.cell_type == "code"):
        live = [output for output in cell.outputs if output.get("data", {}).pop(WIDGET, None)]
        cell.outputs = [output for output in cell.outputs if output not in live or "image/png" in output.data]
    nbformat.write(notebook, path)


def check_executed(path: Path) -> None:
    """Raise NotebookError unless every code cell of the notebook at `path` ran.

    papermill's own status is unreliable: after a kernel died it is "completed" for every cell.
    """
    cells = _cells(path, "`ipmn run` executes it")
    if any(c.cell_type == "code" and c.source.strip() and not c.execution_count for c in cells):
        raise NotebookError(f"{path}: did not finish; `ipmn run` executes it again")


def _cells(path: Path, remedy: str) -> list[nbformat.NotebookNode]:
    if not path.is_file():
        raise NotebookError(f"{path}: no such notebook; {remedy}")
    try:
        return nbformat.read(path, 4).cells
    except Exception as error:  # nbformat raises many kinds
        raise NotebookError(f"{path}: not a complete notebook; {remedy}") from error


def write_report(p: Params) -> Path:
    """Write `<outputs>/<profile>/report.html` from executed notebooks, tables and runs; return its path."""
    from ipmn_core import report

    paths = [p.folder / "notebooks" / f"{stem}.ipynb" for stem in NOTEBOOKS]
    for path in paths:
        check_executed(path)
    return report.write(p, paths, p.folder / "report.html")
