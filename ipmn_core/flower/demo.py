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
import yaml

from ipmn_core import params, phantom, runs
from ipmn_core.data import load_cohort, open_cohort
from ipmn_core.flower import deployment, processes
from ipmn_core.flower.deployment import Federation
from ipmn_core.params import Params


def run(profile: Path, sites: Sequence[str], folder: Path | None = None) -> tuple[float, float]:
    """Train the first run of `profile` at `sites`, each a process, then in this process, and `compare`.

    Uses `folder`, or a temporary one; no process is left running. Results are under the profile's name and
    `_demo`; those of an earlier demo are replaced.
    """
    with contextlib.ExitStack() as stack:
        if folder is None:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="ipmn-federation")))
        with started(profile, sites, folder) as local:
            p = local.federation.profile
            there = runs.folder_of(p, runs.grid(p, "binary")[0])
            shutil.rmtree(there, ignore_errors=True)  # of an earlier demo
            print("training at the sites", flush=True)
            next(processes.run(local.federation))
        print("training in one process", flush=True)
        return compare(there, in_process(p, sites), folder / "sites")


class Local:
    """The server and the sites of a federation as processes on this machine, by name."""

    def __init__(self, federation: Federation, data: dict[str, Path], folder: Path):
        self.federation, self.data, self.folder = federation, data, folder
        self.processes: dict[str, subprocess.Popen] = {}

    def start(self, name: str, place: Path | None = None) -> None:
        """Start "server" or the site in `place`; what it prints goes to `<folder>/<name>.log`."""
        if name == "server":
            command, env = processes.server_command(self.federation), processes.environment(self.federation)
        else:
            place, outputs = place or self.federation.folder / "sites" / name, self.folder / "sites" / name
            command = processes.site_command(place, self.data[name], outputs, "scores")
            env = processes.environment()
        with open(self.folder / f"{name}.log", "ab") as log:
            options = {"start_new_session": True, "preexec_fn": _end_with_parent}
            self.processes[name] = subprocess.Popen(command, env=env, stdout=log, stderr=log, **options)

    def stop(self) -> None:
        """End all of them, the sites first, with all that they started."""
        for process in reversed(self.processes.values()):
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.terminate()
                process.wait(30)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _end_with_parent() -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


@contextlib.contextmanager
def started(profile: Path, sites: Sequence[str], folder: Path, **policy) -> Iterator[Local]:
    """A federation on this machine for a block: a server, and `sites` with their own cases of the phantom."""
    p = params.load(profile)
    p = p.model_copy(update={"profile": f"{p.profile}_demo"})  # results of a real federation stay
    folder.mkdir(parents=True, exist_ok=True)
    of_demo = folder / "profile.yaml"
    of_demo.write_text(yaml.safe_dump(p.model_dump(mode="json"), sort_keys=False))
    port = processes.free_port()
    federation = deployment.write(folder / "federation", of_demo, sites, "127.0.0.1", port, **policy)
    open_cohort(p)
    local = Local(federation, phantom.split(p.cohort_root, folder / "data", sites), folder)
    try:
        local.start("server")
        processes.await_server(federation)
        processes.register(federation)
        for name in sites:
            local.start(name)
        yield local
    finally:
        local.stop()


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
    keys = ["epoch", "case_id"]
    kept = pd.concat([pd.read_parquet(path) for path in sites.glob("*/*/predictions.parquet")])
    alone = pd.read_parquet(here / "predictions.parquet").set_index(keys)
    columns = [name for name in alone if name.startswith("prob_")]
    difference = kept.set_index(keys).loc[alone.index, columns] - alone[columns]
    return weights, float(np.abs(difference).to_numpy().max())
