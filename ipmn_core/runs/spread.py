"""Runs spread over workers: each in a process of its own, one GPU each, one progress display for all."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import multiprocessing
import os
import signal
import sys
import tempfile
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import joblib
from joblib.externals.loky import get_reusable_executor
from tqdm import tqdm

ON_LINUX = sys.platform == "linux"
FORK = "fork" if ON_LINUX else "spawn"  # quick, but only of a process that has not computed with threads
CLEAN = "forkserver" if ON_LINUX else "spawn"  # from any process: forks of a server that does nothing else
PRELOAD = "monai.networks.nets"  # seconds to import: once in a worker or server, not in each of its forks


class RunsFailedError(RuntimeError):
    """Some runs failed; the message names each with its reason. All others were finished."""


def over_workers(
    calls: Sequence[tuple[str, Callable, tuple]],
    jobs: int,
    backend: str,
    done: Callable[[], float],
    title: str,
) -> None:
    """Calls (name, function, arguments), `jobs` at a time on joblib's `backend`: "loky", "ray" or "dask".

    Each runs in a process of its own, so that one that dies takes no other along; with one job all run here.
    `done()` says how many are done, fractions included, and is shown with the time left.
    Raises RunsFailedError after all others have ended, or at once for a backend that is not installed.
    """
    with progress(done, len(calls), title):
        if jobs < 2 or not calls:
            for _, function, arguments in calls:
                function(*arguments)
            return
        with _backend(backend, jobs), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="A worker stopped")  # joblib renews one that has grown
            workers = joblib.Parallel(n_jobs=min(jobs, len(calls)))
            start = FORK if backend == "loky" else CLEAN  # the others' workers have threads
            reasons = workers(joblib.delayed(_in_worker)(*call, start) for _, *call in calls)
    failed = [f"{name}: {reason}" for (name, *_), reason in zip(calls, reasons, strict=True) if reason]
    if failed:
        raise RunsFailedError(
            f"{len(failed)} of {len(calls)} runs failed; the others are finished and kept, "
            "the same command repeats only these:\n  " + "\n  ".join(failed)
        )


def _in_worker(function: Callable, arguments: tuple, start: str) -> str | None:
    end_with_parent()
    return alone(function, arguments, start)


def alone(function: Callable, arguments: tuple, start: str = CLEAN) -> str | None:
    """None once `function(*arguments)` has returned in a process of its own, else why it did not.

    `start` is multiprocessing's method, `CLEAN` or `FORK`. It ends with this one.
    """
    if start == "fork":
        importlib.import_module(PRELOAD)
    elif start == "forkserver":
        multiprocessing.set_forkserver_preload([PRELOAD, function.__module__])
    context = multiprocessing.get_context(start)
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_report, args=(sender, function, arguments))
    process.start()
    sender.close()
    try:
        reason = receiver.recv()
    except EOFError:
        reason = "died"
    process.join()
    if reason != "died":
        return reason
    if process.exitcode < 0:
        return f"its process was ended by {signal.Signals(-process.exitcode).name} (out of memory?)"
    return f"its process ended with status {process.exitcode}"


def end_with_parent() -> None:
    """From now on this process ends with the one that started it, even one that is killed."""
    if any(thread.name == end_with_parent.__name__ for thread in threading.enumerate()):
        return
    parent, number = multiprocessing.parent_process(), os.getppid()

    def watch() -> None:
        try:
            parent.join()  # who asked for this process, whoever forked it
        except (AttributeError, ValueError):  # loky's workers do not know
            while os.getppid() == number:
                time.sleep(0.2)
        os._exit(1)

    threading.Thread(target=watch, name=end_with_parent.__name__, daemon=True).start()


def _report(sender: Any, function: Callable, arguments: tuple) -> None:
    end_with_parent()
    try:
        function(*arguments)
        sender.send(None)
    except Exception as error:
        if os.environ.get("IPMN_DEBUG"):
            traceback.print_exc()
        sender.send(f"{type(error).__name__}: {error}")


def require(backend: str) -> None:
    """Raises RunsFailedError with the remedy for a backend that is not installed."""
    wanted = {"loky": "joblib", "dask": "distributed", "ray": "ray"}[backend]
    if importlib.util.find_spec(wanted) is None:
        raise RunsFailedError(
            f"backend: {backend} is not installed; `pip install 'ipmn[{backend}]'`, or set `backend: loky`"
        )


@contextlib.contextmanager
def _backend(name: str, jobs: int) -> Iterator[None]:
    """joblib's backend for a block, on the Ray or Dask cluster in use, or on one of `jobs` local workers."""
    require(name)
    with contextlib.ExitStack() as stack:
        if name == "ray":
            import ray
            from ray.util.joblib import register_ray

            os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # or runs would see no GPU
            if not ray.is_initialized():
                if "RAY_ADDRESS" in os.environ:
                    ray.init(log_to_driver=False)
                else:  # "local", or it would look for, and wait for, what earlier clusters left behind
                    ray.init("local", num_cpus=jobs, include_dashboard=False, log_to_driver=False)
                stack.callback(ray.shutdown)
            register_ray()
        elif name == "dask":
            import dask
            from distributed import Client, get_client

            try:
                get_client()
            except ValueError:
                with dask.config.set({"distributed.worker.daemon": False}):  # a daemon may have no children
                    stack.enter_context(Client(n_workers=jobs, threads_per_worker=1, dashboard_address=None))
        else:  # idle workers would hold memory, and at its end this process, for minutes
            stack.callback(lambda: get_reusable_executor().shutdown())
        with joblib.parallel_config(name, n_jobs=jobs):
            yield


@contextlib.contextmanager
def progress(done: Callable[[], float], total: int, title: str) -> Iterator[None]:
    """A bar over `total` runs during a block, renewed every second from `done()`, with the time left."""
    if not total:
        yield
        return
    style = "{desc}: {percentage:3.0f}%|{bar}| {n:.1f}/{total} runs [{elapsed}<{remaining}]"
    ended = threading.Event()
    bar = tqdm(desc=title, total=total, bar_format=style, initial=done(), smoothing=0)

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
        bar.close()


@contextlib.contextmanager
def own_gpu(count: int) -> Iterator[int]:
    """The number of a GPU, of `count`, that no other process on this machine holds during the block.

    If all are held, they are shared.
    """
    import fcntl

    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    with contextlib.ExitStack() as stack:
        for gpu in range(count):
            name = visible[gpu] if len(visible) == count else gpu
            path = os.path.join(tempfile.gettempdir(), f"ipmn-{os.getuid()}-gpu{name}.lock")
            lock = stack.enter_context(open(path, "a"))
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                continue
            yield gpu
            return
        yield os.getpid() % count
