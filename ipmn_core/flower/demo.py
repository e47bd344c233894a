"""A federation of real processes on this machine, over TLS, compared with the same rounds in one process."""

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

from ipmn_core import params, runs
from ipmn_core.data import load_cohort, open_cohort
from ipmn_core.flower import deployment, processes
from ipmn_core.flower.deployment import Federation, FederationError
from ipmn_core.params import Params

N_SITES = 3
COLUMNS = ["image", "mask", "center", "modality", "case_id", "patient_id"]  # of a site's manifest


def run(profile: Path, folder: Path | None = None) -> tuple[float, float]:
    """Train the first run of `profile` at its first centers, one process each, then here, and `compare`.

    Uses `folder`, or a temporary one. Results go to the profile's name with `_demo` and replace those of an
    earlier demo.
    """
    p = params.load(profile)
    p = p.model_copy(update={"profile": f"{p.profile}_demo"})  # keeps results of a real federation
    sites = open_cohort(p).centers[:N_SITES]
    with tempfile.TemporaryDirectory(prefix="ipmn-federation") as temporary:
        folder = folder or Path(temporary)
        with started(p, sites, folder) as (federation, _):
            shutil.rmtree(runs.folder_of(p, runs.grid(p, "binary")[0]), ignore_errors=True)
            print(f"training at the sites {', '.join(sites)}", flush=True)
            there = next(processes.run(federation))
        print("training in one process", flush=True)
        return compare(there, in_process(p, sites), folder / "sites")


@contextlib.contextmanager
def started(
    p: Params, sites: Sequence[str], folder: Path, **away
) -> Iterator[tuple[Federation, dict[str, subprocess.Popen]]]:
    """A federation in `folder` for a block, and its processes by name: "server" and the sites.

    Each site is a center of the profile's cohort with its own manifest, `<folder>/data/<site>.csv`.
    """
    cohort = open_cohort(p)
    agreed = {"classes": {name: name for name in cohort.classes}, "positive": cohort.positive}
    agreed["center_names"] = None  # the manifests have the new names
    where = folder / "federation", p.model_copy(update=agreed), sites, "127.0.0.1", processes.free_port()
    federation = deployment.write(*where, **away)
    (folder / "data").mkdir()
    scans = cohort.scans[COLUMNS].assign(label=cohort.scans["class"], fold=cohort.scans["fold_binary"])
    for name in sites:
        scans[scans["center"] == name].to_csv(folder / "data" / f"{name}.csv", index=False)
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
                process.terminate()  # Flower then ends its own processes
                process.wait(30)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def start(federation: Federation, name: str) -> subprocess.Popen:
    """Start "server" or a site of a federation from `started`; its output goes to `<name>.log`."""
    made, folder = federation.folder, federation.folder.parent
    what = ["server", made]
    if name != "server":
        what = ["site", made / "sites" / name, "--data", folder / "data" / f"{name}.csv"]
        what += ["--outputs", folder / "sites" / name]
    command = [sys.executable, "-m", "ipmn_core.cli", "federation", *map(str, what)]
    how = {"start_new_session": True, "preexec_fn": _end_with_parent}
    with open(folder / f"{name}.log", "ab") as log:
        return subprocess.Popen(command, stdout=log, stderr=log, **how)


def _end_with_parent() -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


def in_process(p: Params, sites: Sequence[str]) -> Path:
    """Train the first run of `p` in this process on the cases of `sites`; return its folder."""
    p = p.model_copy(update={"profile": f"{p.profile}_in_process"})
    cohort, first = load_cohort(p), runs.grid(p, "binary")[0]
    shutil.rmtree(runs.folder_of(p, first), ignore_errors=True)
    return runs.execute(p, first, cohort.where(cohort.scans["center"].isin(sites)))


def compare(there: Path, here: Path, sites: Path) -> tuple[float, float]:
    """The largest absolute differences of weights and predictions between the runs in `there` and `here`.

    `sites` has the files of the sites that trained `there`. The weights are the server's; NaN for a personal
    strategy, whose tested models stay at the sites.
    """
    weights = float("nan")
    if (there / "model.pt").exists():
        ours, theirs = (torch.load(folder / "model.pt", weights_only=True) for folder in (there, here))
        weights = max((ours[key].double() - theirs[key].double()).abs().max().item() for key in theirs)
    ours = pd.concat([pd.read_parquet(path) for path in sites.glob("*/*/predictions.parquet")])
    alone = pd.read_parquet(here / "predictions.parquet")
    ours, alone = (table.set_index(["epoch", "case_id"]).filter(like="prob_") for table in (ours, alone))
    return weights, float(np.abs(ours.loc[alone.index] - alone).to_numpy().max())
