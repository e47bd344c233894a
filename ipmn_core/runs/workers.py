"""Runs spread over worker processes by joblib, one GPU each, with one display of progress."""

from __future__ import annotations

import contextlib
import os
import tempfile
import threading
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import joblib
import pandas as pd
import torch
from filelock import FileLock, Timeout
from joblib.externals.loky import get_reusable_executor
from joblib.externals.loky.process_executor import TerminatedWorkerError
from tqdm import tqdm

from ipmn_core import data
from ipmn_core.data import Cohort
from ipmn_core.params import Params
from ipmn_core.process import end_with
from ipmn_core.runs import store
from ipmn_core.runs.grid import Run, folder_of, grid, named, run_settings
from ipmn_core.runs.results import predictions
from ipmn_core.runs.run import execute


class RunsFailedError(RuntimeError):
    """Some runs failed; the message names each with its reason. All others were finished."""


def run_grid(p: Params, task: str, cohort: Cohort) -> pd.DataFrame:
    """Train the runs of `task` that are not on disk yet (`train`); return the predictions of all of them."""
    train(p, [task], cohort)
    return predictions(p, task)


def train(p: Params, tasks: Sequence[str], cohort: Cohort) -> None:
    """Train the runs of `tasks` that are not on disk yet, `p.jobs` at a time.

    Workers are joblib's, so that `joblib.parallel_config` chooses another backend. With `p.threads` set the
    result does not depend on the number of jobs. Raises StaleRunError before any training if a run on disk,
    finished or not, was made with other settings or data, and RunsFailedError after all others.
    """
    missing = unfinished(p, tasks, cohort)
    if not missing:
        return
    share = lambda: sum(store.share_done(folder_of(p, run)) for run in missing)  # noqa: E731
    with progress(share, len(missing), f"training {', '.join(tasks)}"):
        if p.jobs == 1:
            failed = [reason for reason in (_attempt(p, run, cohort) for run in missing) if reason]
        else:
            failed = _in_workers(p, missing, cohort)
    if failed:
        raise RunsFailedError(
            f"{len(failed)} of {len(missing)} runs failed; the others are finished and kept, "
            "the same command repeats only these:\n  " + "\n  ".join(failed)
        )


def unfinished(p: Params, tasks: Sequence[str], cohort: Cohort) -> list[Run]:
    """The runs of `tasks` that are not on disk yet, once all can be split into their folds.

    Raises StaleRunError for a run on disk that was made with other settings or data, CohortError for a
    center that cannot be split.
    """
    for task in tasks:
        data.assign_folds(cohort.scans, p.folds(task), p.fold_rule, binary=task == "binary")
    runs = [run for task in tasks for run in grid(p, task)]
    protocols = {run: run_settings(p, run).protocol() for run in runs}
    return [run for run in runs if not store.finished(folder_of(p, run), protocols[run], cohort.key)]


def _in_workers(p: Params, missing: list[Run], cohort: Cohort) -> list[str]:
    """The names of failed runs with the reason of each."""
    calls = [joblib.delayed(_attempt)(p, run, cohort, os.getpid()) for run in missing]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="A worker stopped")  # joblib renews one that has grown
        try:
            return [reason for reason in joblib.Parallel(n_jobs=min(p.jobs, len(calls)))(calls) if reason]
        except TerminatedWorkerError:
            lost = [run for run in missing if not (folder_of(p, run) / "run.json").exists()]
            return [f"{named(run)}: a worker process was ended from outside (out of memory?)" for run in lost]
        finally:
            get_reusable_executor().shutdown()  # idle workers would hold memory, and this process at its end


def _attempt(p: Params, run: Run, cohort: Cohort, parent: int | None = None) -> str:
    """Train one run; return "" or, if it failed, its name and the reason."""
    if parent is not None:
        end_with(parent)
    try:
        with own_gpu(p) as device:
            execute(p.model_copy(update={"device": device}), run, cohort)
    except Exception as error:
        if os.environ.get("IPMN_DEBUG"):
            traceback.print_exc()
        return f"{named(run)}: {type(error).__name__}: {error}"
    return ""


@contextlib.contextmanager
def own_gpu(p: Params) -> Iterator[str]:
    """The device of a run: of several GPUs one that no other worker on this machine uses during the block.

    If all are in use, they are shared.
    """
    n_gpus = torch.cuda.device_count() if p.device == "auto" and p.jobs > 1 else 0
    with contextlib.ExitStack() as stack:
        for gpu in range(n_gpus) if n_gpus > 1 else ():
            lock = FileLock(Path(tempfile.gettempdir()) / f"ipmn-{os.getuid()}-gpu{gpu}.lock", timeout=0)
            try:
                stack.enter_context(lock)
            except Timeout:
                continue
            yield f"cuda:{gpu}"
            return
        yield f"cuda:{os.getpid() % n_gpus}" if n_gpus > 1 else p.device


@contextlib.contextmanager
def progress(done: Callable[[], float], total: int, title: str) -> Iterator[None]:
    """Show a bar over `total` runs during a block, renewed every second from `done()`, with the time left."""
    style = "{desc}: {percentage:3.0f}%|{bar}| {n:.1f}/{total} runs [{elapsed}<{remaining}]"
    ended = threading.Event()
    with tqdm(desc=title, total=total, bar_format=style, initial=done(), smoothing=0) as bar:

        def show() -> None:
            bar.n = done()
            bar.refresh()

        def watch() -> None:
            while not ended.wait(1.0):
                show()

        thread = threading.Thread(target=watch, daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()
            show()
