"""A federation of real processes on this machine, over TLS: one site is killed."""

import contextlib
import itertools
import shutil
import ssl
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import psutil
import pytest
from hospitals import assert_same_bits, profile

from ipmn_core import runs
from ipmn_core.flower import demo, deployment, processes

SITES = ("NYU", "NU")


@pytest.fixture(scope="module", autouse=True)
def clock():
    """Processes have clocks of their own."""


def kill(process):
    """SIGKILL for a process and all that it started, as when the power fails."""
    for each in [*psutil.Process(process.pid).children(recursive=True), process]:
        with contextlib.suppress(psutil.NoSuchProcess):
            each.kill()
    process.wait()


def intruder(federation):
    """A process that knows where the server is and has the CA's certificate, but another key."""
    sites, data = federation.folder / "sites", federation.folder.parent / "data"
    shutil.copytree(sites / "NYU", sites / "intruder")
    shutil.copy(data / "NYU.csv", data / "intruder.csv")
    deployment.write_key(federation.folder / "sites" / "intruder")
    return demo.start(federation, "intruder")


def status_of(federation, path, source):
    """The HTTP status of a request without credentials that comes from the address `source`."""
    context = ssl.create_default_context(cafile=federation.server / "ca.crt")
    with httpx.Client(transport=httpx.HTTPTransport(verify=context, local_address=source)) as client:
        return client.post(f"https://127.0.0.1:{federation.port}{path}", content=b"").status_code


@pytest.mark.slow
@pytest.mark.timeout(1200)  # some 20 processes import torch
@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere 127.0.0.5 is not this machine")
def test_a_site_is_killed_and_all_ends_as_in_one_process(tmp_path):
    """The site comes back, and every bit is that of one process; one with another key stays outside."""
    p = profile(tmp_path / "outputs", binary_model="shufflenetv2", phantom_max_per_cell=2)
    with demo.started(p, SITES, tmp_path / "f", round_seconds=30.0) as (federation, started):
        started["intruder"] = intruder(federation)
        assert status_of(federation, "/v1/control/list-nodes", "127.0.0.5") == 403
        assert status_of(federation, "/v1/control/list-nodes", "127.0.0.1") != 403
        assert status_of(federation, "/v1/fleet/register-node", "127.0.0.5") != 403
        there = runs.folder_of(p, runs.grid(p, "binary")[0])
        with ThreadPoolExecutor() as pool:
            trained = pool.submit(lambda: next(processes.run(federation)))
            while not (there / "checkpoint.pt").exists():
                assert not trained.done(), trained.exception()
                time.sleep(0.2)
            kill(started["NYU"])
            assert not (there / "run.json").exists()
            while not trained.done():
                if started["NYU"].poll() is not None:
                    started["NYU"] = demo.start(federation, "NYU")  # the killed one still counts as online
                time.sleep(1.0)
            assert trained.result() == there
        assert not (tmp_path / "f" / "sites" / "intruder").exists()
    assert_same_bits(there, demo.in_process(p, SITES), tmp_path / "f" / "sites")
    lines = [" ".join(process.info["cmdline"] or []) for process in psutil.process_iter(["cmdline"])]
    assert not [line for line in lines if str(tmp_path) in line]


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_strategies_with_something_to_keep_have_the_bits_of_one_process(tmp_path):
    """BatchNorm at the sites, moments at the server, control variates at both; one after another."""
    arms = ["fedbn", "fedadam", "scaffold"]
    p = profile(tmp_path / "outputs", binary_model="shufflenetv2", phantom_max_per_cell=2, arms=arms)
    with demo.started(p, SITES, tmp_path / "f") as (federation, _):
        folders = list(itertools.islice(processes.run(federation), len(arms)))  # those of the first fold
    by_arm = {folder.parent.name: folder for folder in folders}
    assert list(by_arm) == arms
    for arm, there in by_arm.items():
        here = demo.in_process(p.model_copy(update={"arms": (arm,)}), SITES)
        sites = tmp_path / "of" / arm
        for path in (tmp_path / "f" / "sites").glob(f"*/binary_t2_{arm}_fold_0-*"):
            shutil.copytree(path, sites / path.parent.name / path.name)
        assert_same_bits(there, here, sites)
