import asyncio
import json
import subprocess
import sys
from pathlib import Path

import httpx
import pytest
from flwr.common.config import parse_config_args
from hospitals import HOST, SITES
from starlette.responses import PlainTextResponse

from ipmn_core.flower import processes, superlink
from ipmn_core.flower.deployment import FederationError


def value_of(command, flag):
    return command[command.index(flag) + 1]


def test_the_server_takes_tls_and_registered_keys_only(federation):
    command = processes.server_command(federation)
    for flag, name in (("ca-certfile", "ca.crt"), ("certfile", "server.pem"), ("keyfile", "server.key")):
        path = Path(value_of(command, f"--ssl-{flag}"))
        assert path == federation.server / name and path.is_file()
    assert "--enable-supernode-auth" in command and "--insecure" not in command
    assert (value_of(command, "--host"), value_of(command, "--port")) == ("0.0.0.0", "39800")
    assert "--disable-runtime-dependency-installation" in command
    here = federation.model_copy(update={"host": "localhost"})
    assert value_of(processes.server_command(here), "--host") == "127.0.0.1"  # not open to others


@pytest.mark.parametrize("path", ["/v1/fleet/pull-messages", "/v1/control/start-run", "/v1/x", "/docs"])
def test_other_machines_are_answered_only_what_sites_ask(path):
    async def status(address):
        app = superlink.from_here_only(PlainTextResponse("an answer"))
        transport = httpx.ASGITransport(app, client=(address, 1234))
        async with httpx.AsyncClient(transport=transport) as client:
            return (await client.post(f"https://server{path}")).status_code

    assert asyncio.run(status("127.0.0.1")) == 200
    assert asyncio.run(status("10.0.0.7")) == (200 if path.startswith("/v1/fleet/") else 403)


def test_a_site_verifies_the_server_and_shows_its_key(federation, tmp_path):
    data, place = tmp_path / 'my "own" cases', federation.folder / "sites" / "NU"
    data.mkdir()
    command = processes.site_command(place, data, tmp_path / "work", "metrics")
    assert value_of(command, "--superlink") == f"{HOST}:39800" and "--insecure" not in command
    assert value_of(command, "--root-certificates") == str(place / "ca.crt")
    assert value_of(command, "--auth-supernode-private-key") == str(place / "key")
    told = {"site": "NU", "data": str(data), "outputs": str(tmp_path / "work"), "share": "metrics"}
    assert parse_config_args([value_of(command, "--node-config")]) == told
    with pytest.raises(FederationError, match="must not contain a quote"):
        processes.site_command(place, data, tmp_path / "a' site='MCF", "scores")
    with pytest.raises(FederationError, match=r"nowhere: no such file or folder; --data names"):
        processes.site_command(place, tmp_path / "nowhere", tmp_path, "scores")


def test_flowers_processes_send_no_telemetry_and_keep_to_the_federations_folder(federation, monkeypatch):
    monkeypatch.setenv("KEPT", "yes")
    env = processes.environment(federation)
    assert env["FLWR_TELEMETRY_ENABLED"] == "0" and env["FLWR_DISABLE_UPDATE_CHECK"] == "1"
    assert env["FLWR_HOME"] == str(federation.server / "flwr") and env["KEPT"] == "yes"
    assert env["PATH"].split(":")[0] == str(Path(sys.executable).parent)


def test_a_command_is_asked_over_tls_and_its_failure_is_an_error_with_its_reason(written):
    """Flower's own command, with no server there."""
    told = r"(?s)^flwr ls hospitals: .*unavailable.*`ipmn federation server`"
    with pytest.raises(FederationError, match=told):
        processes.control(written, "ls", "hospitals")
    config = (written.server / "flwr" / "config.toml").read_text()
    assert f'root-certificates = "{written.server / "ca.crt"}"' in config
    assert 'address = "127.0.0.1:39800"' in config and "insecure" not in config


def test_every_site_is_registered_once_by_its_public_key(written, monkeypatch):
    keys = {}  # of Flower's nodes, by number

    def run(command, **how):
        answer = {"success": True, "nodes": [{"node-id": number} for number in keys]}
        if command[2] == "register":
            answer["node-id"] = str(17 + len(keys))
            keys[answer["node-id"]] = command[3]
        return subprocess.CompletedProcess(command, 0, json.dumps(answer), "")

    monkeypatch.setattr(processes.subprocess, "run", run)
    nodes = processes.register(written)
    assert nodes == processes.register(written) and set(nodes) == set(SITES)
    assert keys == {str(nodes[n]): str(written.server / f"{n}.pub") for n in SITES}
    keys.clear()  # a server that has lost its list
    assert set(map(str, processes.register(written).values())) == set(keys) and len(keys) == 3


def test_the_reason_for_which_a_run_failed_is_raised_and_the_run_is_stopped(written, monkeypatch, tmp_path):
    called = []

    def control(federation, *arguments):
        called.append(arguments[0])
        failed = {"status": "finished:failed", "status-details": "NU did not answer"}
        return {"run-id": "7", "runs": [failed]}

    monkeypatch.setattr(processes, "control", control)
    monkeypatch.setattr(processes, "STATUS_SECONDS", -1.0)
    with pytest.raises(FederationError, match="NU did not answer"):
        processes._train(written, tmp_path, {})
    assert called == ["run", "ls", "stop"]
