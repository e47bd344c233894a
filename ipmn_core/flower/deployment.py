"""A federation across machines as files and processes: keys and settings, server and sites, runs awaited.

A federation's folder holds `federation.yaml`, `server/` (the server's own) and `sites/<center>/` (for that
hospital alone: the CA's certificate, its key, where the server is).
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import yaml

from ipmn_core import disk, params
from ipmn_core.names import CENTERS
from ipmn_core.params import Params

NAME = "hospitals"  # of the federation, to Flower's own command
STARTUP_SECONDS = 120.0
ANSWER_SECONDS = 180.0  # Flower's command takes ten on a slow, busy machine
REFUSED_SECONDS = 300.0  # the server refuses a killed site for a minute, for it still counts it as online
STATUS_SECONDS = 60.0  # between questions to Flower, whose command takes seconds of a core
ENVIRONMENT = {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1"}
APP = """[project]
name = "ipmn-federation"
version = "1.0.0"
description = "Federated training of ipmn"
license = "MIT"
dependencies = []

[tool.flwr.app]
publisher = "ipmn"

[tool.flwr.app.components]
serverapp = "ipmn_core.flower.app:server_app"
clientapp = "ipmn_core.flower.app:client_app"

[tool.flwr.app.config]
order = ""
"""


class FederationError(RuntimeError):
    """A federation that cannot be started or went wrong; the message says where and what to do."""


@dataclass(frozen=True)
class Federation:
    """`federation.yaml`: where the server listens, who takes part, and the policy (`flower.Policy`)."""

    folder: Path
    host: str
    port: int
    profile: Params
    sites: tuple[str, ...]
    away: str = "wait"
    min_sites: int = 2
    round_seconds: float = 600.0
    wait_seconds: float = 3600.0

    @property
    def address(self) -> str:
        """Where sites find the server."""
        return f"{self.host}:{self.port}"


def write(
    folder: Path, profile: Path, sites: Sequence[str], host: str, port: int, **policy: Any
) -> Federation:
    """A new federation's folder: certificates, keys and configuration of the server and of every site.

    Raises FileExistsError if it exists, FederationError for fewer than two sites or ones that are no centers.
    """
    _flower("flwr")
    _check_sites(sites)
    p = params.load(profile)
    _check(p)
    if folder.exists():
        raise FileExistsError(f"{folder} exists: choose another folder, its keys may be in use")
    made = folder.with_name(f".{folder.name}.{os.getpid()}.partial")
    try:
        _write(made, p, sites, host, port, policy)
        made.rename(folder)
    finally:
        shutil.rmtree(made, ignore_errors=True)
    return read(folder)


def _check(p: Params) -> None:
    """Raises FederationError for what a federation across machines cannot do."""
    from ipmn_core import federated
    from ipmn_core.federated import privacy

    privacy.note(p)
    alone = [arm for arm in p.arms if arm not in federated.STRATEGIES]
    if alone:
        raise FederationError(
            f"arms: {', '.join(alone)} need all images in one place or no federation; keep some of "
            f"{', '.join(federated.STRATEGIES)}"
        )
    if p.inner_validation:
        raise FederationError("inner_validation: sites draw no inner split yet, set it to 0.0")


def _write(folder: Path, p: Params, sites: Sequence[str], host: str, port: int, policy: dict) -> None:
    from ipmn_core.flower import certificates  # an extra's

    server = folder / "server"
    (server / "app").mkdir(parents=True)
    (server / "flwr").mkdir()
    certificates.write(server, host)
    about = {"host": host, "port": port, "sites": list(sites), **policy}
    (folder / "federation.yaml").write_text(yaml.safe_dump(about, sort_keys=False))
    own = p.model_copy(update={"outputs": str((params.project_root() / p.outputs).resolve())})
    (folder / "profile.yaml").write_text(yaml.safe_dump(own.model_dump(mode="json"), sort_keys=False))
    (server / "app" / "pyproject.toml").write_text(APP)
    for name in sites:
        place = folder / "sites" / name
        place.mkdir(parents=True)
        shutil.copy(server / "ca.crt", place)
        certificates.node_key(place)
        shutil.copy(place / "key.pub", server / f"{name}.pub")
        (place / "site.yaml").write_text(yaml.safe_dump({"site": name, "server": f"{host}:{port}"}))


def read(folder: Path) -> Federation:
    """The federation in `folder`. Raises FederationError naming the file and what is wrong with it."""
    path = folder / "federation.yaml"
    if not path.is_file():
        raise FederationError(f"{path}: no such file; `ipmn federation init` writes it")
    try:
        values = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise FederationError(f"{path}: not valid YAML: {error}") from error
    kinds = {"host": str, "port": int, "sites": list, "away": str, "min_sites": int}
    kinds |= dict.fromkeys(("round_seconds", "wait_seconds"), (int, float))
    needed = {"host", "port", "sites"}
    if not isinstance(values, dict) or not needed <= values.keys() <= kinds.keys():
        raise FederationError(f"{path} must hold {', '.join(sorted(needed))}; known are {', '.join(kinds)}")
    for key, value in values.items():
        if not isinstance(value, kinds[key]):
            raise FederationError(f"{path}: {key} cannot be {value!r}")
    if values.get("away", "wait") not in ("wait", "continue"):
        raise FederationError(f"{path}: away is {values['away']!r}; it is wait or continue")
    _check_sites(values["sites"], f"{path}: sites")
    p = params.load(folder / "profile.yaml")
    _check(p)
    return Federation(folder=folder.resolve(), profile=p, **{**values, "sites": tuple(values["sites"])})


def _check_sites(sites: Sequence[str], where: str = "sites") -> None:
    """Raises FederationError unless they are two or more different centers."""
    unknown = [name for name in sites if name not in CENTERS]
    if unknown or len(set(sites)) < 2 or len(set(sites)) < len(sites):
        names = ", ".join(map(str, sites))
        raise FederationError(f"{where} {names}: name two or more of {', '.join(CENTERS)}, once each")


def server_command(federation: Federation) -> list[str]:
    """What `ipmn federation server` becomes: Flower's SuperLink with TLS and node keys (`superlink`)."""
    _flower("flower-superlink")
    server = federation.folder / "server"
    return [
        *(sys.executable, "-m", "ipmn_core.flower.superlink"),
        *("--ssl-ca-certfile", str(server / "ca.crt")),
        *("--ssl-certfile", str(server / "server.pem")),
        *("--ssl-keyfile", str(server / "server.key")),
        "--enable-supernode-auth",
        *("--host", "127.0.0.1" if federation.host in ("localhost", "127.0.0.1") else "0.0.0.0"),
        *("--port", str(federation.port)),
        *("--database", str(server / "state.db")),
        "--disable-runtime-dependency-installation",
    ]


def site_command(folder: Path, data: Path, outputs: Path, share: str) -> list[str]:
    """What `ipmn federation site` becomes: Flower's SuperNode, with this site's own folders.

    Raises FederationError for files that are missing.
    """
    missing = [name for name in ("site.yaml", "ca.crt", "key", "key.pub") if not (folder / name).is_file()]
    if missing:
        raise FederationError(
            f"{folder} lacks {', '.join(missing)}; it is the folder that `init` wrote for this site"
        )
    if not data.is_dir():
        raise FederationError(f"{data}: no such folder; --data names this site's own copy of its cases")
    about = yaml.safe_load((folder / "site.yaml").read_text())
    values = {"site": about["site"], "data": data.resolve(), "outputs": outputs.resolve(), "share": share}
    quoted = {key: str(value) for key, value in values.items()}
    for key, value in quoted.items():
        if "'" in value:
            raise FederationError(f"{key} {value}: a quote in its name cannot be passed on, rename it")
    return [
        _flower("flower-supernode"),
        *("--superlink", about["server"]),
        *("--root-certificates", str(folder / "ca.crt")),
        *("--auth-supernode-private-key", str(folder / "key")),
        *("--port", str(free_port())),
        *("--node-config", " ".join(f"{key}='{value}'" for key, value in quoted.items())),
    ]


def _flower(name: str) -> str:
    path = Path(sys.executable).with_name(name)
    if not path.exists():
        raise FederationError("Flower is not installed; `pip install 'ipmn[flower]'`")
    return str(path)


def free_port() -> int:
    """A TCP port of this machine that no one listens at."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def environment(federation: Federation | None = None) -> dict[str, str]:
    """The environment for Flower's processes: no telemetry, and the server's settings in its own folder."""
    home = {"FLWR_HOME": str(federation.folder / "server" / "flwr")} if federation else {}
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    return {**os.environ, **ENVIRONMENT, **home, "PATH": path}


def start(command: Sequence[str], env: dict[str, str], log: Path | None = None) -> subprocess.Popen:
    """A process, for `stop` with all that it starts; its output goes to the end of `log`, or where ours goes.

    On Linux it also ends when this one is killed.
    """
    options = {"env": env, "start_new_session": True, "preexec_fn": _end_with_parent}
    if log is None:
        return subprocess.Popen(command, **options)
    with open(log, "ab") as file:
        return subprocess.Popen(command, stdout=file, stderr=file, **options)


def _end_with_parent() -> None:
    if sys.platform == "linux":
        set_parent_death_signal = 1  # prctl's PR_SET_PDEATHSIG
        ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGTERM)


def stay(command: Sequence[str], env: dict[str, str]) -> None:
    """Keeps a site's process running until this one is ended; started again where the server refuses it.

    Raises FederationError once it was refused for five minutes.
    """
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    last_joined = time.monotonic()
    while True:
        started = time.monotonic()
        child = start(command, env)
        try:
            child.wait()
        finally:
            stop(child)  # Flower leaves a helper behind
        if time.monotonic() - started > 60:
            last_joined = time.monotonic()
        if time.monotonic() - last_joined > REFUSED_SECONDS:
            raise FederationError(
                "the server refuses this site: its key is not registered there, or another process uses it"
            )
        print("the site's process ended; it is started again in 10 s", file=sys.stderr, flush=True)
        time.sleep(10)


def stop(child: subprocess.Popen, seconds: float = 10.0) -> None:
    """Ends a process of `start`, and its group: SIGTERM, after `seconds` SIGKILL."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGTERM)
    with contextlib.suppress(subprocess.TimeoutExpired):
        child.wait(seconds)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()


def control(federation: Federation, *arguments: str) -> dict[str, Any]:
    """The answer of Flower's command, `flwr ... --format json`. Raises FederationError with its reason."""
    config = federation.folder / "server" / "flwr" / "config.toml"
    root = federation.folder / "server" / "ca.crt"
    text = f'[superlink.{NAME}]\naddress = "127.0.0.1:{federation.port}"\nroot-certificates = "{root}"\n'
    disk.write(config, lambda tmp: tmp.write_text(text))
    command = [_flower("flwr"), *arguments, "--format", "json"]
    try:
        done = subprocess.run(
            command, env=environment(federation), capture_output=True, text=True, timeout=ANSWER_SECONDS
        )
        answer = json.loads(done.stdout)
    except subprocess.TimeoutExpired as error:
        raise FederationError(
            f"the server at {federation.address} did not answer in {ANSWER_SECONDS:.0f} s"
        ) from error
    except ValueError as error:
        raise FederationError(f"{' '.join(command[1:3])}: {done.stdout}{done.stderr}".strip()) from error
    if not answer.get("success"):
        raise FederationError(f"{' '.join(command[1:3])}: {answer.get('error-message', answer)}".strip())
    return answer


def await_server(federation: Federation) -> None:
    """Returns once the server answers. Raises FederationError if it does not within two minutes."""
    deadline = time.monotonic() + STARTUP_SECONDS
    while not _answers(federation):
        if time.monotonic() > deadline:
            raise FederationError(
                f"no server at 127.0.0.1:{federation.port}; start `ipmn federation server` here first"
            )
        time.sleep(0.5)


def register(federation: Federation) -> dict[str, int]:
    """The node of every site, by name, each registered by its public key; no other key may join."""
    path = federation.folder / "server" / "nodes.json"
    nodes = json.loads(path.read_text()) if path.exists() else {}
    known = {int(node["node-id"]) for node in control(federation, "supernode", "ls", NAME)["nodes"]}
    for name in federation.sites:
        if nodes.get(name) not in known:
            key = federation.folder / "server" / f"{name}.pub"
            nodes[name] = int(control(federation, "supernode", "register", str(key), NAME)["node-id"])
            disk.write(path, lambda tmp: tmp.write_text(json.dumps(nodes)))
    return {name: nodes[name] for name in federation.sites}


def run(federation: Federation, only: str = "") -> Iterator[Path]:
    """The folders of the profile's runs whose name holds `only`, one after another, each trained at the
    sites; whole ones are kept.

    Raises FederationError with the server app's own reason for one that failed, the next call goes on;
    StaleRunError for one that was made with other settings.
    """
    from ipmn_core import runs
    from ipmn_core.runs import records

    await_server(federation)
    nodes = register(federation)
    for left in control(federation, "ls", NAME)["runs"]:  # of a command that was killed
        if not left["status"].startswith("finished"):
            control(federation, "stop", left["run-id"], NAME)
    for each in (each for each in runs.grid(federation.profile, "binary") if only in runs.named(each)):
        folder = runs.folder_of(federation.profile, each)
        if not (folder / "run.json").exists():
            _run(federation, each, folder, nodes)
        yield records.whole(folder, runs.protocol_of(federation.profile, each))


def _run(federation: Federation, each: Any, folder: Path, nodes: dict[str, int]) -> None:
    from ipmn_core import runs
    from ipmn_core.flower import app
    from ipmn_core.runs import records, spread

    folder.mkdir(parents=True, exist_ok=True)
    (folder / app.FAILURE).unlink(missing_ok=True)
    policy = {field.name: getattr(federation, field.name) for field in fields(app.Policy)}
    profile = federation.profile.model_dump_json()
    order = {"profile": profile, "run": asdict(each), "nodes": nodes, "policy": policy}
    path = federation.folder / "server" / "order.toml"
    disk.write(path, lambda tmp: tmp.write_text(f"order = {json.dumps(json.dumps(order))}\n"))
    code = str(federation.folder / "server" / "app")
    number = control(federation, "run", code, NAME, "--run-config", str(path))["run-id"]
    with spread.progress(lambda: records.share_done(folder), 1, runs.named(each)):
        try:
            _await(federation, folder, number)
        except BaseException:
            with contextlib.suppress(FederationError):
                control(federation, "stop", number, NAME)
            raise


def _await(federation: Federation, folder: Path, number: str) -> None:
    """Returns once a run is whole. Flower's command says 0 of a run that failed, so its files are asked."""
    from ipmn_core.flower import app

    asked = time.monotonic()
    while not (folder / "run.json").exists():
        if (folder / app.FAILURE).exists():
            raise FederationError((folder / app.FAILURE).read_text())
        if not _answers(federation):
            raise FederationError(
                f"{folder}: the server at port {federation.port} is gone; start it, then the same command "
                "goes on from the last whole round"
            )
        if time.monotonic() - asked > STATUS_SECONDS:
            asked = time.monotonic()
            status = control(federation, "ls", NAME, "--run-id", number)["runs"][0]
            if status["status"].startswith("finished") and not (folder / "run.json").exists():
                raise FederationError(
                    f"{folder}: the server app ended as {status['status']} ({status['status-details']}); "
                    "`flwr log` has its output, the same command goes on from the last whole round"
                )
        time.sleep(1.0)


def _answers(federation: Federation) -> bool:
    """Whether anyone listens at the server's port."""
    try:
        with socket.create_connection(("127.0.0.1", federation.port), timeout=10):
            return True
    except OSError:
        return False


def tables(federation: Federation) -> Path:
    """Table 3 of the federation's runs as CSV, Markdown and LaTeX; the path of the Markdown.

    From the predictions as in one process. Where a site shares no scores, from the sites' own metrics: the
    epoch is then the last, the global ACC their mean over cases, and the global AUC not available.
    """
    from ipmn_core import metrics, runs
    from ipmn_core.metrics import tables as printed
    from ipmn_core.runs import records

    p, folds = federation.profile, []
    for each in runs.grid(p, "binary"):
        folder, settings = runs.folder_of(p, each), runs.protocol_of(p, each)
        if (records.whole(folder, settings) / "predictions.parquet").exists():
            selected = metrics.select(records.read_predictions(folder, settings), "best_test")
            folds.append(metrics.by_fold(selected))
        else:
            folds.append(_of_centers(each, pd.read_csv(folder / "centers.csv")))
    table = printed.table3(metrics.over_folds(pd.concat(folds, ignore_index=True)))
    printed.write(table, "table3", p.folder / "tables")
    return p.folder / "tables" / "table3.md"


def _of_centers(each: Any, centers: pd.DataFrame) -> pd.DataFrame:
    """Rows as of `metrics.by_fold` from the metrics that sites shared after the last round."""
    from ipmn_core import metrics

    last = centers[centers["round"] == centers["round"].max()].drop(columns="round")
    everywhere = {"center": metrics.GLOBAL, "n": last["n"].sum(), "auc": float("nan")}
    everywhere["acc"] = np.average(last["acc"], weights=last["n"])
    rows = pd.concat([last, pd.DataFrame([everywhere])], ignore_index=True)
    undefined = np.where(rows["center"] == metrics.GLOBAL, "no scores shared", "not told")
    rows["undefined"] = np.where(rows["auc"].isna(), undefined, "")
    about = {key: getattr(each, key) for key in ("task", "modality", "arm", "fold")}
    return rows.assign(**about, positives=pd.NA)[[*metrics.RUN, *rows.columns[:4], "positives", "undefined"]]


def status(federation: Federation) -> list[dict[str, Any]]:
    """A row a site: name, whether it is online, since when."""
    nodes = register(federation)
    listed = {node["node-id"]: node for node in control(federation, "supernode", "ls", NAME)["nodes"]}
    rows = []
    for name, node in nodes.items():
        about = listed.get(str(node), {})
        rows.append(
            {"site": name, "status": about.get("status", "unknown"), "since": about.get("online-at", "")}
        )
    return rows
