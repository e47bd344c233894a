"""A federation of real processes on this machine, over TLS: a site and the server are killed."""

import contextlib
import json
import os
import shutil
import ssl
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pandas as pd
import psutil
import pytest

from ipmn_core import runs
from ipmn_core.flower import certificates, demo, deployment

ROOT = Path(__file__).resolve().parents[2]
SITES = ("NYU", "MCF", "NU")
pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="the processes are looked for in /proc"),
    pytest.mark.timeout(2700),  # some 40 processes import torch: ten minutes on a slow, busy machine
]


@pytest.fixture(scope="module")
def profile(tmp_path_factory):
    """params/federation.yaml with fewer cases and a smaller network, and its outputs elsewhere."""
    folder = tmp_path_factory.mktemp("federation")
    text = (ROOT / "params" / "federation.yaml").read_text()
    for old, new in (
        ("outputs: outputs ", f"outputs: {folder} "),
        ("phantom_max_per_cell: 8 ", "phantom_max_per_cell: 4 "),
        ("binary_model: densenet121", "binary_model: shufflenetv2"),
        ("batches_per_epoch: null", "batches_per_epoch: 1   "),
    ):
        assert old in text
        text = text.replace(old, new)
    (folder / "profile.yaml").write_text(text)
    return folder / "profile.yaml"


def wait_until(what, seconds=900):
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline, "it never happened"
        time.sleep(0.2)


def kill(process):
    """SIGKILL for a process and all that it started, as when the power fails."""
    for each in [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]:
        with contextlib.suppress(psutil.NoSuchProcess):
            each.kill()
    process.wait()


def running(text):
    """Command lines of processes that hold `text`."""
    lines = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            lines.append(path.read_bytes().replace(b"\0", b" ").decode())
        except OSError:  # it has ended meanwhile
            continue
    return [line for line in lines if text in line and str(os.getpid()) not in line]


def federation_run(federation):
    command = [sys.executable, "-m", "ipmn_core.cli", "federation", "run", str(federation.folder)]
    command += ["--only", "fold 0"]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def rounds_of(folder):
    return len(pd.read_csv(folder / "rounds.csv")) if (folder / "rounds.csv").exists() else 0


def nodes_of(local):
    return json.loads((local.federation.folder / "server" / "nodes.json").read_text())


def intruder(local, folder):
    """A process that knows where the server is and has the CA's certificate, but a key of its own."""
    place = folder / "intruder"
    shutil.copytree(local.federation.folder / "sites" / "NYU", place)
    for name in ("key", "key.pub"):
        (place / name).unlink()
    certificates.node_key(place)
    command = demo.site_command(place, local.data["NYU"], folder)
    return deployment.start(command, deployment.environment(), folder / "intruder.log")


def status_of(local, path, source):
    """The HTTP status of a request without credentials that comes from the address `source`."""
    context = ssl.create_default_context(cafile=local.federation.folder / "server" / "ca.crt")
    with httpx.Client(transport=httpx.HTTPTransport(verify=context, local_address=source)) as client:
        return client.post(f"https://127.0.0.1:{local.federation.port}{path}", content=b"").status_code


def test_site_and_server_are_killed_and_all_ends_as_in_one_process(profile, tmp_path):
    """In round 2 a site, in round 3 the server: both come back, and every bit is that of one process.

    A site with a key that was never registered stays outside all the time.
    """
    policy = {"round_seconds": 60.0, "wait_seconds": 600.0}
    with demo.started(profile, SITES, tmp_path, **policy) as local:
        outside = intruder(local, tmp_path)
        for path in ("/v1/control/list-nodes", "/v1/control/start-run", "/v1/runtime/acquire-task", "/docs"):
            assert status_of(local, path, "127.0.0.5") == 403
            assert status_of(local, path, "127.0.0.1") != 403
        assert status_of(local, "/v1/fleet/register-node", "127.0.0.5") != 403
        first = runs.grid(local.federation.profile, "binary")[0]
        folder = runs.folder_of(local.federation.profile, first)
        run = federation_run(local.federation)
        wait_until(lambda: rounds_of(folder) == 1)
        kill(local.processes["NYU"])
        local.start("NYU")
        nodes = deployment.control(local.federation, "supernode", "ls", deployment.NAME)["nodes"]
        assert {node["node-id"] for node in nodes} == {str(n) for n in nodes_of(local).values()}
        wait_until(lambda: rounds_of(folder) == 2)
        kill(local.processes["server"])
        _, err = run.communicate(timeout=900)
        assert run.returncode == 1 and "ipmn: " in err and "Traceback" not in err
        assert not (folder / "run.json").exists()

        local.start("server")
        run = federation_run(local.federation)
        out, err = run.communicate(timeout=1200)
        assert run.returncode == 0, err[-2000:]
        assert str(folder) in out
        online = {site["site"]: site["status"] for site in deployment.status(local.federation)}
        assert online == dict.fromkeys(SITES, "online")
        deployment.stop(outside, 30)
        assert not (tmp_path / "sites" / "intruder").exists()

        here = demo.in_process(local.federation.profile, SITES)
        difference = demo.compare(folder, here, tmp_path / "sites")
        assert difference.weights == 0.0 and difference.predictions == 0.0
        for name in ("updates.csv", "history.csv"):
            assert (folder / name).read_bytes() == (here / name).read_bytes()
        assert not (folder / "left_out.csv").exists()
    assert not running(str(tmp_path))
