"""A federation of real processes on this machine, over TLS, set beside the same rounds in one process."""

from __future__ import annotations

import contextlib
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import yaml

from ipmn_core import params, phantom, runs
from ipmn_core.data import assign_folds, load_cubes, open_cohort, subset
from ipmn_core.flower import deployment
from ipmn_core.flower.deployment import Federation
from ipmn_core.params import Params

SITES = ("NYU", "MCF", "NU")


@dataclass(frozen=True)
class Difference:
    """The largest absolute differences of a federation's results from those of one process; and its cost."""

    weights: float
    predictions: float
    rounds: pd.DataFrame


def run(profile: Path, sites: Sequence[str] = SITES, folder: Path | None = None) -> Difference:
    """The first run of `profile` trained at `sites`, each a process with a folder of its own, then in this
    process; in `folder`, or in a temporary one. Nothing is left running.

    Results lie under the profile's name and `_demo`, those of an earlier demo are replaced.
    """
    with contextlib.ExitStack() as stack:
        if folder is None:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="ipmn-federation")))
        with started(profile, sites, folder) as local:
            p = local.federation.profile
            folder_there = runs.folder_of(p, runs.grid(p, "binary")[0])
            shutil.rmtree(folder_there, ignore_errors=True)  # of an earlier demo
            print("training at the sites", flush=True)
            next(deployment.run(local.federation))
        print("training in one process", flush=True)
        return compare(folder_there, in_process(p, sites), folder / "sites")


class Local:
    """A federation on this machine: its server and its sites as processes, started and stopped by name."""

    def __init__(self, federation: Federation, data: dict[str, Path], folder: Path):
        self.federation, self.data, self.folder = federation, data, folder
        self.processes: dict[str, subprocess.Popen] = {}

    def start(self, name: str, share: str = "scores") -> None:
        """Starts the process `name`, "server" or a site; what it prints goes to `<folder>/<name>.log`."""
        environment = deployment.environment(self.federation if name == "server" else None)
        if name == "server":
            command = deployment.server_command(self.federation)
        else:
            command = site_command(
                self.federation.folder / "sites" / name, self.data[name], self.folder, share
            )
        self.processes[name] = deployment.start(command, environment, self.folder / f"{name}.log")
        if name == "server":
            deployment.await_server(self.federation)

    def stop(self) -> None:
        """Ends all of them, the sites first, and whatever they started."""
        for process in reversed(self.processes.values()):
            deployment.stop(process, 30)  # a site first ends what it started


def site_command(place: Path, data: Path, folder: Path, share: str = "scores") -> list[str]:
    """`ipmn federation site` for the site in `place`, its own files below `folder`."""
    command = [sys.executable, "-m", "ipmn_core.cli", "federation", "site", str(place)]
    outputs = folder / "sites" / place.name
    return [*command, "--data", str(data), "--outputs", str(outputs), "--share", share]


@contextlib.contextmanager
def started(profile: Path, sites: Sequence[str], folder: Path, **policy) -> Iterator[Local]:
    """A federation on this machine for a block: a server, and `sites` with their own cases of the phantom."""
    p = params.load(profile)
    p = p.model_copy(update={"profile": f"{p.profile}_demo"})  # results of a real federation stay
    folder.mkdir(parents=True, exist_ok=True)
    of_demo = folder / "profile.yaml"
    of_demo.write_text(yaml.safe_dump(p.model_dump(mode="json"), sort_keys=False))
    port = deployment.free_port()
    federation = deployment.write(folder / "federation", of_demo, sites, "127.0.0.1", port, **policy)
    open_cohort(p)
    local = Local(federation, phantom.split(p.cohort_root, folder / "data", sites), folder)
    try:
        local.start("server")
        deployment.register(federation)
        for name in sites:
            local.start(name)
        yield local
    finally:
        local.stop()


def in_process(p: Params, sites: Sequence[str]) -> Path:
    """The folder of the first run of `p` trained in this process on the cases of `sites`."""
    p = p.model_copy(update={"profile": f"{p.profile}_in_process"})
    scans = open_cohort(p)
    scans = subset(scans[scans["center"].isin(sites)].reset_index(drop=True), p.max_per_cell)
    cubes = load_cubes(scans, p.size, p.folder.parent / "cache", p.jobs)
    each = runs.grid(p, "binary")[0]
    folder = runs.folder_of(p, each)
    shutil.rmtree(folder, ignore_errors=True)
    folds = assign_folds(scans, p.binary_folds, p.fold_rule, binary=True)
    return runs.execute(p, each, scans, folds, cubes)


def compare(there: Path, here: Path, sites: Path) -> Difference:
    """How far the run in `there`, trained at the sites whose work lies in `sites`, is from that in `here`."""
    ours, theirs = (torch.load(folder / "model.pt", weights_only=True) for folder in (there, here))
    weights = max((ours[key].double() - theirs[key].double()).abs().max().item() for key in theirs)
    keys = ["epoch", "case_id"]
    kept = pd.concat([pd.read_parquet(path) for path in sites.glob("*/*/predictions.parquet")])
    alone = pd.read_parquet(here / "predictions.parquet").set_index(keys)
    kept = kept.set_index(keys).loc[alone.index]
    columns = [name for name in alone if name.startswith("prob_")]
    predictions = float(np.abs(kept[columns] - alone[columns]).to_numpy().max())
    return Difference(weights, predictions, pd.read_csv(there / "rounds.csv"))
