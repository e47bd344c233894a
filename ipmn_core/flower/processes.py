"""The processes of a federation across machines: commands of server and sites, starting and awaiting runs."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

from ipmn_core import metrics, runs
from ipmn_core.disk import atomic
from ipmn_core.flower.deployment import Federation, FederationError
from ipmn_core.metrics import tables
from ipmn_core.params import Params
from ipmn_core.runs import store

NAME = "hospitals"  # of the federation, for Flower's own command
STATUS_SECONDS = 60.0  # between calls of Flower's command, which takes seconds of a core


def server_command(federation: Federation) -> list[str]:
    """The command of the server: Flower's SuperLink with TLS and node keys (`superlink`)."""
    return [
        *(sys.executable, "-m", "ipmn_core.flower.superlink"),
        *("--ssl-ca-certfile", str(federation.server / "ca.crt")),
        *("--ssl-certfile", str(federation.server / "server.pem")),
        *("--ssl-keyfile", str(federation.server / "server.key")),
        "--enable-supernode-auth",
        *("--host", "127.0.0.1" if federation.host in ("localhost", "127.0.0.1") else "0.0.0.0"),
        *("--port", str(federation.port)),
        *("--database", str(federation.server / "state.db")),
        "--disable-runtime-dependency-installation",
    ]


def site_command(folder: Path, data: Path, outputs: Path, share: str) -> list[str]:
    """The command of the site in `folder`: Flower's SuperNode with this site's data and outputs.

    Raises FederationError for missing data or a name with a quote.
    """
    if not data.exists():
        raise FederationError(f"{data}: no such file or folder; --data names this site's own cases")
    about = yaml.safe_load((folder / "site.yaml").read_text())
    values = {"site": about["site"], "data": data.resolve(), "outputs": outputs.resolve(), "share": share}
    if any("'" in str(value) for value in values.values()):
        raise FederationError(f"{data}, {outputs}: names must not contain a quote; rename the folder")
    return [
        "flower-supernode",
        *("--superlink", about["server"]),
        *("--root-certificates", str(folder / "ca.crt")),
        *("--auth-supernode-private-key", str(folder / "key")),
        *("--port", str(free_port())),
        *("--node-config", " ".join(f"{key}='{value}'" for key, value in values.items())),
    ]


def free_port() -> int:
    """A free TCP port of this machine."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return probe.getsockname()[1]


def environment(federation: Federation | None = None) -> dict[str, str]:
    """The environment of Flower's processes: no telemetry, and the server's settings in its own folder."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    env = {**os.environ, "FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1", "PATH": path}
    return env | ({"FLWR_HOME": str(federation.server / "flwr")} if federation else {})


def control(federation: Federation, *arguments: str) -> dict[str, Any]:
    """The answer of Flower's command `flwr`. Raises FederationError with the reason if it fails."""
    address, root = f"127.0.0.1:{federation.port}", federation.server / "ca.crt"
    with atomic(federation.server / "flwr" / "config.toml") as tmp:
        tmp.write_text(f'[superlink.{NAME}]\naddress = "{address}"\nroot-certificates = "{root}"\n')
    command, env = ["flwr", *arguments, "--format", "json"], environment(federation)
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    try:
        answer = json.loads(done.stdout)
    except ValueError:
        answer = {"error-message": f"{done.stdout}{done.stderr}".strip()}
    if not answer.get("success"):
        reason = f"{answer.get('error-message', answer)}; is `ipmn federation server` running here?"
        raise FederationError(f"flwr {' '.join(arguments[:2])}: {reason}")
    return answer


def register(federation: Federation) -> dict[str, int]:
    """The node number of every site, registered by its public key; no other key may join."""
    path = federation.server / "nodes.json"
    nodes = json.loads(path.read_text()) if path.exists() else {}
    known = {int(node["node-id"]) for node in control(federation, "supernode", "ls", NAME)["nodes"]}
    for name in federation.sites:
        if nodes.get(name) not in known:
            key = str(federation.server / f"{name}.pub")
            nodes[name] = int(control(federation, "supernode", "register", key, NAME)["node-id"])
            with atomic(path) as tmp:
                tmp.write_text(json.dumps(nodes))
    return {name: nodes[name] for name in federation.sites}


def run(federation: Federation, only: str = "") -> Iterator[Path]:
    """Train the profile's runs whose name contains `only` at the sites, and yield the folder of each.

    Finished runs are kept. Raises FederationError with the reason for a failed run (the next call resumes
    after its last complete round), StaleRunError for a run with other settings.
    """
    p = federation.profile
    nodes = register(federation)
    for left in control(federation, "ls", NAME)["runs"]:  # stop runs of a command that was killed
        if not left["status"].startswith("finished"):
            control(federation, "stop", left["run-id"], NAME)
    for each in (each for each in runs.grid(p, "binary") if only in runs.named(each)):
        folder = runs.folder_of(p, each)
        if not (folder / "run.json").exists():
            order = {"federation": federation.model_dump(mode="json"), "run": asdict(each), "nodes": nodes}
            with runs.progress_bar(lambda at=folder: store.share_done(at), 1, runs.named(each)):
                _train(federation, folder, order)
        yield store.whole(folder, runs.run_settings(p, each).protocol())


def _train(federation: Federation, folder: Path, order: dict[str, Any]) -> None:
    """Let Flower carry out one run; return when it is finished."""
    path = federation.server / "order.toml"
    path.write_text(f"order = {json.dumps(json.dumps(order))}\n")
    app = str(federation.server / "app")
    number = control(federation, "run", app, NAME, "--run-config", str(path))["run-id"]
    whole, asked = folder / "run.json", time.monotonic()
    try:
        while not whole.exists():
            time.sleep(1.0)
            if time.monotonic() - asked > STATUS_SECONDS:  # Flower's command exits 0 even when a run failed
                asked = time.monotonic()
                status = control(federation, "ls", NAME, "--run-id", number)["runs"][0]
                if status["status"].startswith("finished") and not whole.exists():
                    raise FederationError(
                        f"{folder}: {status['status-details']}; "
                        "the same command resumes after the last complete round"
                    )
    except BaseException:
        with contextlib.suppress(FederationError):
            control(federation, "stop", number, NAME)
        raise


def table3(p: Params) -> str:
    """Write table 3 of a federation's runs; return its text, or why there is none."""
    if any((runs.folder_of(p, each) / "centers.csv").exists() for each in runs.grid(p, "binary")):
        return "no table 3, because a site shares no scores; each run's centers.csv has the sites' metrics"
    table = tables.table3(metrics.over_folds(metrics.by_fold(metrics.select(runs.predictions(p, "binary")))))
    tables.write(table, 3, p.folder / "tables", is_paper=False)
    return f"{(p.folder / 'tables' / 'table3.md').read_text()}\ntables  {p.folder / 'tables'}/"
