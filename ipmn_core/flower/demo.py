"""A federation of real processes on this machine, over TLS, beside the same rounds in one process."""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from ipmn_core import params, phantom, runs
from ipmn_core.data import load_cohort, open_cohort
from ipmn_core.flower import deployment, processes
from ipmn_core.flower.deployment import Federation, FederationError
from ipmn_core.params import Params

SITES = ("NYU", "MCF", "NU")


def run(profile: Path, folder: Path | None = None) -> tuple[float, float]:
    """Train the first run of `profile` at `SITES`, each a process, then in this process, and `compare`.

    Uses `folder`, or a temporary one. Results are under the profile's name and `_demo`; those of an earlier
    demo are replaced.
    """
    with contextlib.ExitStack() as stack:
        folder = folder or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="ipmn-federation")))
        with started(params.load(profile), SITES, folder) as (federation, _):
            p = federation.profile
            shutil.rmtree(runs.folder_of(p, runs.grid(p, "binary")[0]), ignore_errors=True)
            print("training at the sites", flush=True)
            there = next(processes.run(federation))
        print("training in one process", flush=True)
        return compare(there, in_process(p, SITES), folder / "sites")


@contextlib.contextmanager
def started(
    p: Params, sites: Sequence[str], folder: Path, **away
) -> Iterator[tuple[Federation, dict[str, subprocess.Popen]]]:
    """A federation in `folder` for a block, and its processes by name: "server" and the sites.

    Each site has its own cases of the phantom, in `<folder>/data/<site>`.
    """
    p = p.model_copy(update={"profile": f"{p.profile}_demo"})  # results of a real federation stay
    port = processes.free_port()
    federation = deployment.write(folder / "federation", p, sites, "127.0.0.1", port, **away)
    open_cohort(p)
    phantom.split(p.cohort_root, folder / "data", sites)
    running = {"server": start(federation, "server")}
    try:
        while running["server"].poll() is None:  # until it answers
            with contextlib.suppress(FederationError):
                processes.register(federation)
                break
        for name in sites:
            running[name] = start(federation, name)
        yield federation, running
    finally:
        for process in reversed(running.values()):
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.terminate()  # Flower then ends its processes in sessions of their own
                process.wait(30)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def start(federation: Federation, name: str) -> subprocess.Popen:
    """Start "server" or a site of a federation of `started`; what it prints goes to `<name>.log`."""
    made, folder = federation.folder, federation.folder.parent
    what = ["server", made]
    if name != "server":
        what = ["site", made / "sites" / name, "--data", folder / "data" / name]
        what += ["--outputs", folder / "sites" / name]
    command = [sys.executable, "-m", "ipmn_core.cli", "federation", *map(str, what)]
    how = {"start_new_session": True, "preexec_fn": _end_with_parent}
    with open(folder / f"{name}.log", "ab") as log:
        return subprocess.Popen(command, stdout=log, stderr=log, **how)


def _end_with_parent() -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


def in_process(p: Params, sites: Sequence[str]) -> Path:
    """Train the first run of `p` in this process on the cases of `sites`; its folder."""
    p = p.model_copy(update={"profile": f"{p.profile}_in_process"})
    cohort, first = load_cohort(p), runs.grid(p, "binary")[0]
    shutil.rmtree(runs.folder_of(p, first), ignore_errors=True)
    return runs.execute(p, first, cohort.where(cohort.scans["center"].isin(sites)))


def compare(there: Path, here: Path, sites: Path) -> tuple[float, float]:
    """The largest absolute differences of weights and predictions of the run in `there` from that in `here`.

    `sites` holds the files of the sites at which the first was trained.
    """
    ours, theirs = (torch.load(folder / "model.pt", weights_only=True) for folder in (there, here))
    weights = max((ours[key].double() - theirs[key].double()).abs().max().item() for key in theirs)
    ours = pd.concat([pd.read_parquet(path) for path in sites.glob("*/*/predictions.parquet")])
    alone = pd.read_parquet(here / "predictions.parquet")
    ours, alone = (table.set_index(["epoch", "case_id"]).filter(like="prob_") for table in (ours, alone))
    return weights, float(np.abs(ours.loc[alone.index] - alone).to_numpy().max())
