"""The four notebooks, in order, through papermill; every executed notebook is checked before it counts."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import repeat
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import nbformat
import yaml
from filelock import FileLock, Timeout

from ipmn_core.disk import atomic
from ipmn_core.names import TASKS
from ipmn_core.params import Params, ParamsError, project_root
from ipmn_core.process import end_with

NOTEBOOKS = (
    "01_data_exploration",
    "02_three_class_benchmark",
    "03_federated_binary",
    "04_analysis",
)
REPORT = "report.html"
START = "spawn"  # not from a fork server: its processes end without joblib's tidying


class NotebookError(RuntimeError):
    """A notebook did not run to its end; the message names notebook and cell."""


@contextlib.contextmanager
def locked(p: Params) -> Iterator[None]:
    """A block during which no other `ipmn run` works on this profile; the lock ends with its owner.

    Raises RuntimeError if another one does.
    """
    p.folder.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(p.folder / ".lock", timeout=0):
            yield
    except Timeout as error:
        raise RuntimeError(
            f"another `ipmn run` is at work in {p.folder}; wait for its end, or take another profile name"
        ) from error


def prepare(p: Params, fresh: bool = False) -> None:
    """Check what can be checked before any training, then train and fit what is missing.

    Checks models, arms, device, cohort, folds, every volume, and that runs on disk are of these settings and
    data; `fresh` discards the runs instead. Writes the phantom and the cache of cubes if they are missing.
    Trains here, so that one pool of workers and one display of progress serve all notebooks, in a process of
    its own, whose memory is free again for the notebooks. Raises what these steps raise, in sentences.
    """
    with ProcessPoolExecutor(1, get_context(START), end_with, (os.getpid(),)) as alone:
        try:
            alone.submit(_prepare, p, fresh).result()
        except BrokenProcessPool as error:
            raise RuntimeError(
                "the process that trains was ended from outside (out of memory?); finished runs are kept, "
                "the same command goes on from there"
            ) from error


def _prepare(p: Params, fresh: bool) -> None:
    from ipmn_core import data, runs
    from ipmn_core.runs import probes

    grids = {task: runs.grid(p, task) for task in TASKS}
    for run in (grid[0] for grid in grids.values()):
        runs.on_this_machine(p, runs.run_settings(p, run))
    scans = data.subset(data.open_cohort(p), p.max_per_cell)
    for task in TASKS:
        data.assign_folds(scans, p.folds(task), p.fold_rule, binary=task == "binary")
    cohort = data.load_cohort(p)
    if fresh:
        shutil.rmtree(p.folder / "runs", ignore_errors=True)
    for task in TASKS:
        probes.unfinished(p, task, cohort)
    runs.train(p, ("binary", "three_class"), cohort)  # the longer runs first: workers end together
    for task in TASKS:
        probes.fit(p, task, cohort)


def run(p: Params) -> Iterator[Path]:
    """The executed notebooks of a profile, one path after another, in `<outputs>/<profile>/notebooks/`.

    Report, tables, figures and notebooks of an earlier run are removed first, so that nothing old can pass
    for new; finished training runs stay and are not repeated. Raises NotebookError for the first notebook
    that fails.
    """
    (p.folder / REPORT).unlink(missing_ok=True)
    for name in ("notebooks", "tables", "figures"):
        shutil.rmtree(p.folder / name, ignore_errors=True)
    if p.jobs == 1:
        yield from map(_chapter, NOTEBOOKS, repeat(p))
        return
    # in processes, not threads: papermill changes the working directory of the one it is in
    jobs = min(p.jobs, len(NOTEBOOKS))
    with ProcessPoolExecutor(jobs, get_context(START), end_with, (os.getpid(),)) as lanes:
        yield from lanes.map(_chapter, NOTEBOOKS, repeat(p))


def write_report(p: Params) -> Path:
    """`<outputs>/<profile>/report.html`, written from the executed notebooks and what lies beside them.

    Raises NotebookError for a notebook that is missing or did not run to its end, and what `report.write`
    raises.
    """
    from ipmn_core import report

    paths = [p.folder / "notebooks" / f"{stem}.ipynb" for stem in NOTEBOOKS]
    for path in paths:
        if not path.is_file():
            raise NotebookError(f"{path}: no such notebook; `ipmn run` executes it, then writes the report")
        try:
            check_executed(path)
        except NotebookError as error:
            raise NotebookError(f"{path}: {error}; `ipmn run` executes it again") from error
    return report.write(p, paths, p.folder / REPORT)


def _chapter(stem: str, p: Params) -> Path:
    source, target = (folder / "notebooks" / f"{stem}.ipynb" for folder in (project_root(), p.folder))
    return execute(source, target, {"profile": str(_written(p))})


def _written(p: Params) -> Path:
    """`<outputs>/<profile>/params.yaml` with every setting, which the notebooks read."""
    p.folder.mkdir(parents=True, exist_ok=True)
    path = p.folder / "params.yaml"
    with atomic(path) as tmp:
        tmp.write_text(yaml.safe_dump(p.model_dump(mode="json"), sort_keys=False))
    return path


def execute(source: Path, target: Path, parameters: dict) -> Path:
    """`target`, the notebook at `source` executed with `parameters`, written only if it ran to its end.

    A notebook that failed is kept beside it as `<name>.failed.ipynb`. Raises ParamsError for a notebook
    without one cell tagged `parameters`, NotebookError for one that did not finish.
    """
    import papermill
    from nbclient.exceptions import DeadKernelError
    from papermill.exceptions import PapermillExecutionError

    tagged = [c for c in nbformat.read(source, 4).cells if "parameters" in c.metadata.get("tags", [])]
    if len(tagged) != 1:  # papermill would let the notebook's own values win, without an error
        raise ParamsError(f"{source.name}: {len(tagged)} cells are tagged `parameters`; tag exactly one")
    target.parent.mkdir(parents=True, exist_ok=True)
    running, failed = target.with_suffix(".running.ipynb"), target.with_suffix(".failed.ipynb")
    for old in (target, running, failed):
        old.unlink(missing_ok=True)
    try:
        with _sockets() as config:
            papermill.execute_notebook(
                source,
                running,
                parameters=parameters,
                kernel_name="python3",
                cwd=project_root(),
                progress_bar=False,
                stderr_file=sys.stderr,
                coalesce_streams=True,
                extra_arguments=["--log-level=CRITICAL"],
                config=config,
            )
        check_executed(running)
    except (PapermillExecutionError, DeadKernelError, NotebookError) as error:
        os.replace(running, failed)
        raise NotebookError(f"{source.name}{_reason(error)}\n(as far as it came: {failed})") from error
    os.replace(running, target)
    return target


@contextlib.contextmanager
def _sockets() -> Iterator[Any]:
    """papermill's settings for a kernel that is spoken to through files of its own during the block.

    Two kernels that start at a time may be given the same TCP port. Windows has no such files.
    """
    from traitlets.config import Config

    with tempfile.TemporaryDirectory(prefix="ipmn") as folder:
        files = {"transport": "ipc", "ip": f"{folder}/kernel"}
        yield Config({} if os.name == "nt" else {"KernelManager": files})


def _reason(error: Exception) -> str:
    if hasattr(error, "ename"):  # papermill's; it counts cells with its own among them, people read In [n]
        return f", In [{error.exec_count}]: {error.ename}: {error.evalue}"
    return f": {error}" if isinstance(error, NotebookError) else ": the kernel died (out of memory?)"


def check_executed(path: Path) -> None:
    """Raises NotebookError unless every code cell of the notebook at `path` ran, without error, to the end.

    papermill's own status is not believed: after the death of a kernel it says "completed" of every cell.
    """
    try:
        notebook = json.loads(path.read_text())
    except ValueError as error:
        raise NotebookError("not a whole notebook, its writing was interrupted") from error
    for cell in notebook["cells"]:
        if cell["cell_type"] != "code" or not "".join(cell["source"]).strip():
            continue
        if cell.get("execution_count") is None:
            line = "".join(cell["source"]).splitlines()[0]
            raise NotebookError(f"the cell `{line}` never ran, the kernel died (out of memory?)")
        for output in cell["outputs"]:
            if output["output_type"] == "error":
                where = f"In [{cell['execution_count']}]"
                raise NotebookError(f"{where}: {output['ename']}: {output['evalue']}")
    if not notebook["metadata"].get("papermill", {}).get("end_time"):
        raise NotebookError("it did not run to its end")
