"""Distribute runs over joblib's worker processes, one GPU each, with one progress bar."""

from __future__ import annotations

import contextlib
import os
import tempfile
import threading
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import joblib
import pandas as pd
import torch
from filelock import FileLock, Timeout
from joblib.externals.loky import get_reusable_executor
from joblib.externals.loky.process_executor import TerminatedWorkerError
from tqdm import tqdm

from ipmn_core import data, federated
from ipmn_core.data import Cohort
from ipmn_core.names import fusion, is_personal
from ipmn_core.params import Params, Preprocessing, validate
from ipmn_core.process import end_with
from ipmn_core.runs import store
from ipmn_core.runs.grid import (
    CENTRALIZED,
    LOCAL_ONLY,
    Run,
    folder_of,
    grid,
    named,
    protocols,
    run_settings,
    scored,
)
from ipmn_core.runs.run import execute, with_roles


class RunsFailedError(RuntimeError):
    """Some runs failed; the message names each with its reason. All other runs are finished."""


def run_grid(p: Params, task: str, cohort: Cohort) -> pd.DataFrame:
    """Train the runs of `task` that are not on disk (`train`); return the predictions of all of them."""
    train(p, [task], cohort)
    if not (grid(p, task) or scored(p, task)):
        raise ValueError(f"{task}: no arm; list some in the profile, or score weights with `ipmn score`")
    return store.predictions(p, task)


def train(p: Params, tasks: Sequence[str], cohort: Cohort) -> None:
    """Train the runs of `tasks` that are not on disk, `p.jobs` at a time.

    `joblib.parallel_config` can choose another backend. With `p.threads` set, results do not depend on the
    number of jobs. Before training, raises StaleRunError if a run on disk, finished or not, has other
    settings or data, CohortError for a center that cannot be split, and ValueError for a fold that cannot be
    used (`check_folds`). Raises RunsFailedError after all other runs are finished.
    """
    check_folds(p, tasks, cohort)
    missing, keys = [], {p.preprocessing: cohort.key}
    for task in tasks:
        missing += store.unfinished(p, protocols(p, task), cohort.key)
        for run, protocol in scored(p, task).items():
            how = Preprocessing(**{name: protocol[name] for name in asdict(p.preprocessing)})
            if how not in keys:  # its cubes were cached when it was scored
                own = validate({**p.model_dump(), **asdict(how)}, "scored weights")
                keys[how] = data.load_cohort(own).key
            store.finished(folder_of(p, run), protocol, keys[how])
    if not missing:
        return
    share = lambda: sum(store.share_done(folder_of(p, run)) for run in missing)  # noqa: E731
    calls = [joblib.delayed(_attempt)(p, run, cohort, os.getpid()) for run in missing]
    with progress_bar(share, len(missing), f"training {', '.join(tasks)}"), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="A worker stopped")  # joblib replaces workers that grew
        try:
            failed = [reason for reason in joblib.Parallel(min(p.jobs, len(calls)))(calls) if reason]
        except TerminatedWorkerError:
            text = "a worker process was ended from outside (out of memory?)"
            lost = [run for run in missing if not (folder_of(p, run) / "run.json").exists()]
            failed = [f"{named(run)}: {text}" for run in lost]
        finally:
            if p.jobs > 1:  # idle workers hold memory and delay the end of this process
                get_reusable_executor().shutdown()
    if failed:
        counts = f"{len(failed)} of {len(missing)} runs failed; the others are finished and kept"
        text = "\n  ".join([f"{counts}. The same command repeats only these:", *failed])
        raise RunsFailedError(text)


def check_folds(p: Params, tasks: Sequence[str], cohort: Cohort) -> None:
    """Raise ValueError for a fold without test cases, or with a center that has too few training cases.

    Also for a federation of one center, and for an arm with one model per center if the tested center never
    trains. Raises CohortError for a center that cannot be split.
    """
    cohort = replace(cohort, cubes=None)  # roles need none
    unseen = p.fold_rule == data.UNSEEN
    if "binary" in tasks and unseen and (personal := [arm for arm in p.arms if is_personal(arm)]):
        text = f"{', '.join(personal)}: one model per center, but the tested center never trains"
        raise ValueError(f"{text}; with `fold_rule: {p.fold_rule}` leave them out of `arms`")
    federated_arms = [arm for arm in p.arms if arm not in (CENTRALIZED, LOCAL_ONLY)]
    for modality in p.modalities if federated_arms and "binary" in tasks else ():
        if len(found := cohort.of(modality).centers) < 2 + unseen:
            needs = "three centers (one is left out)" if unseen else "two centers"
            text = f"{', '.join(federated_arms)} needs {needs}, {modality} has {', '.join(found)}"
            raise ValueError(f"{text}; set `arms: [{CENTRALIZED}]`")
    for task in tasks:
        runs = {(run.modality, run.fold): run for run in grid(p, task)}  # folds are the same for all arms
        for run in runs.values():
            where = f"{task} {run.modality} fold {run.fold}"
            fold = data.assign_folds(cohort, p.folds(task), p.fold_rule, task)
            if fusion(run.modality)[1] and fold.groupby(cohort.scans["patient_id"]).nunique().max() > 1:
                raise ValueError(f"{where}: scans of a patient are in two folds; set `fold_rule: patient`")
            scans = with_roles(cohort, run_settings(p, run)).scans
            if not (scans["role"] == "test").any():
                raise ValueError(f"{where} has no case to test; take fewer folds, or another `fold_rule`")
            if task == "binary" and set(p.arms) != {CENTRALIZED}:
                scans = scans[scans["role"] != "test"] if unseen else scans  # the tested center never trains
                n_train = (scans["role"] == "train").groupby(scans["center"], sort=False).sum()
                federated.check_n_train(n_train.to_dict(), f", {where}")


def _attempt(p: Params, run: Run, cohort: Cohort, parent: int) -> str:
    """Train one run; return "" or, if it failed, its name and the reason."""
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
    """The device of a run: with several GPUs, one that no other worker uses while there are enough."""
    n_gpus = torch.cuda.device_count() if p.device == "auto" and p.jobs > 1 else 0
    if n_gpus < 2:
        yield p.device
        return
    for place in range(p.jobs):
        lock = FileLock(Path(tempfile.gettempdir()) / f"ipmn-{os.getuid()}-worker{place}.lock")
        with contextlib.suppress(Timeout):
            lock.acquire(timeout=0)
            break
    try:
        yield f"cuda:{place % n_gpus}"
    finally:
        lock.release()


@contextlib.contextmanager
def progress_bar(done: Callable[[], float], total: int, title: str) -> Iterator[None]:
    """Show a progress bar over `total` runs during a block, updated every second from `done()`."""
    style = "{desc}: {percentage:3.0f}%|{bar}| {n:.1f}/{total} runs [{elapsed}<{remaining}]"
    ended = threading.Event()
    with tqdm(desc=title, total=total, bar_format=style, initial=done(), smoothing=0) as bar:

        def watch() -> None:
            last = False
            while not last:
                last = ended.wait(1.0)
                bar.n = done()
                bar.refresh()

        thread = threading.Thread(target=watch, daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()
