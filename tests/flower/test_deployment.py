import dataclasses
import datetime
import ipaddress
import json
import ssl
import stat
import subprocess
import sys

import pytest
import yaml
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.x509 import verification
from flwr.common.config import parse_config_args
from test_site import profile

from ipmn_core import params, runs
from ipmn_core.flower import app, certificates, deployment
from ipmn_core.flower.deployment import FederationError

SITES = ("NYU", "MCF", "NU")
HOST = "fl.example.org"


def write_profile(folder, **changes):
    """A profile file that a federation can take."""
    p = profile(folder / "outputs", binary_model="shufflenetv2", **changes)
    path = folder / "profile.yaml"
    path.write_text(yaml.safe_dump(p.model_dump(mode="json")))
    return path


@pytest.fixture(scope="module")
def federation(tmp_path_factory):
    folder = tmp_path_factory.mktemp("federation")
    return deployment.write(folder / "f", write_profile(folder), SITES, HOST, 39800, away="continue")


@pytest.fixture
def written(tmp_path):
    """A federation whose files a test may spoil."""
    return deployment.write(tmp_path / "f", write_profile(tmp_path), SITES, HOST, 39800)


def certificate(path):
    return x509.load_pem_x509_certificate(path.read_bytes())


def private_keys(folder):
    return [path for path in folder.rglob("*") if path.name == "key" or path.suffix == ".key"]


# -- certificates and keys


@pytest.mark.parametrize("host", [HOST, "10.1.2.3", "localhost", "127.0.0.1"])
def test_a_site_can_verify_the_server_by_name_and_by_the_authority(tmp_path, host):
    made = deployment.write(tmp_path / "f", write_profile(tmp_path), SITES, host, 39800)
    server = certificate(made.folder / "server" / "server.pem")
    store = verification.Store([certificate(made.folder / "sites" / "NYU" / "ca.crt")])
    now = datetime.datetime.now(datetime.UTC)
    for name in {host, "localhost", "127.0.0.1"}:
        numeric = name[0].isdigit()
        subject = x509.IPAddress(ipaddress.ip_address(name)) if numeric else x509.DNSName(name)
        builder = verification.PolicyBuilder().store(store)
        for days in (0, 800):
            verifier = builder.time(now + datetime.timedelta(days=days)).build_server_verifier(subject)
            assert verifier.verify(server, [])[0] == server
    other = verification.PolicyBuilder().store(store).build_server_verifier(x509.DNSName("other.example.org"))
    with pytest.raises(verification.VerificationError):
        other.verify(server, [])


def test_another_federations_authority_does_not_vouch_for_the_server(federation, written):
    store = verification.Store([certificate(written.folder / "server" / "ca.crt")])
    verifier = verification.PolicyBuilder().store(store).build_server_verifier(x509.DNSName(HOST))
    with pytest.raises(verification.VerificationError):
        verifier.verify(certificate(federation.folder / "server" / "server.pem"), [])


def test_a_tls_handshake_succeeds_with_what_both_sides_hold(federation):
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(*(federation.folder / "server" / name for name in ("server.pem", "server.key")))
    site = ssl.create_default_context(cafile=str(federation.folder / "sites" / "NU" / "ca.crt"))
    to_server, to_site = ssl.MemoryBIO(), ssl.MemoryBIO()
    here = site.wrap_bio(to_site, to_server, server_hostname=HOST)
    there = server.wrap_bio(to_server, to_site, server_side=True)
    done = set()
    for _ in range(10):
        for end in (here, there):
            try:
                end.do_handshake()
                done.add(end)
            except ssl.SSLWantReadError:
                continue
    assert done == {here, there}
    assert ("DNS", HOST) in here.getpeercert()["subjectAltName"]


def test_the_server_certificate_can_sign_no_other(federation):
    ca, server = (certificate(federation.folder / "server" / name) for name in ("ca.crt", "server.pem"))
    basic = [c.extensions.get_extension_for_class(x509.BasicConstraints).value for c in (ca, server)]
    assert [constraint.ca for constraint in basic] == [True, False] and basic[0].path_length == 0
    server.verify_directly_issued_by(ca)


def test_private_keys_are_their_owners_alone(federation):
    keys = private_keys(federation.folder)
    assert len(keys) == 2 + len(SITES)
    assert {stat.S_IMODE(path.stat().st_mode) for path in keys} == {0o600}


def test_no_two_keys_are_alike(federation, written):
    keys = [path.read_bytes() for made in (federation, written) for path in private_keys(made.folder)]
    assert len(set(keys)) == 2 * (2 + len(SITES))


def test_the_server_knows_each_site_by_the_public_half_of_its_key_alone(federation):
    for name in SITES:
        place = federation.folder / "sites" / name
        private = serialization.load_ssh_private_key((place / "key").read_bytes(), None)
        form = serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH
        public = private.public_key().public_bytes(*form).strip()
        assert (federation.folder / "server" / f"{name}.pub").read_bytes().strip() == public
        assert (place / "key.pub").read_bytes().strip() == public
        assert private.curve.name == "secp384r1"
    assert not list((federation.folder / "server").rglob("key"))


def test_a_site_gets_no_secret_of_the_server_or_of_another_site(federation):
    for name in SITES:
        files = {path.name for path in (federation.folder / "sites" / name).iterdir()}
        assert files == {"ca.crt", "key", "key.pub", "site.yaml"}


# -- configuration


def test_what_was_written_is_read(federation):
    again = deployment.read(federation.folder)
    assert again == federation and again.sites == SITES and again.address == f"{HOST}:39800"
    assert (again.away, again.min_sites, again.wait_seconds) == ("continue", 2, 3600.0)
    assert again.profile.binary_model == "shufflenetv2"
    assert runs.grid(again.profile, "binary")


def test_the_policy_in_the_file_is_the_one_the_server_app_knows():
    names = deployment.Federation.__dataclass_fields__.keys()
    assert app.Policy.__dataclass_fields__.keys() <= names
    for name, field in app.Policy.__dataclass_fields__.items():
        assert field.default == deployment.Federation.__dataclass_fields__[name].default


def test_relative_outputs_are_settled_when_the_federation_is_written(tmp_path, monkeypatch):
    path = write_profile(tmp_path)
    values = yaml.safe_load(path.read_text()) | {"outputs": "results"}
    path.write_text(yaml.safe_dump(values))
    monkeypatch.chdir(tmp_path)
    made = deployment.write(tmp_path / "f", path, SITES, HOST, 39800)
    assert made.profile.outputs == str(tmp_path / "results")


@pytest.mark.parametrize(
    "text",
    [
        "host: [",
        "just words",
        "",
        "- host",
        "host: h\nport: 1\n",
        "host: h\nport: 1\nsites: [NYU, NU]\nsurprise: 1\n",
        "host: h\nport: 1\nsites: [NYU, NU]\naway: maybe\n",
        "host: h\nport: many\nsites: [NYU, NU]\n",
        "host: h\nport: 1\nsites: NYU\n",
        "host: h\nport: 1\nsites: [NYU, Mayo]\n",
        "host: h\nport: 1\nsites: [NYU, NU]\nmin_sites: some\n",
        "host: h\nport: 1\nsites: [NYU, NU]\nround_seconds: soon\n",
    ],
)
def test_a_file_that_cannot_be_right_is_refused_by_name(written, text):
    (written.folder / "federation.yaml").write_text(text)
    with pytest.raises(FederationError, match=r"federation\.yaml"):
        deployment.read(written.folder)


def test_a_folder_without_a_federation_is_named_with_the_remedy(tmp_path):
    with pytest.raises(FederationError, match=r"federation\.yaml: no such file; `ipmn federation init`"):
        deployment.read(tmp_path)


def test_a_profile_that_was_spoilt_is_named(written):
    (written.folder / "profile.yaml").write_text("rounds: none\n")
    with pytest.raises(params.ParamsError, match=r"profile\.yaml"):
        deployment.read(written.folder)


def test_an_existing_folder_keeps_its_keys(written, tmp_path):
    before = {path: path.read_bytes() for path in private_keys(written.folder)}
    with pytest.raises(FileExistsError, match="its keys may be in use"):
        deployment.write(written.folder, tmp_path / "profile.yaml", SITES, HOST, 39800)
    assert {path: path.read_bytes() for path in private_keys(written.folder)} == before


@pytest.mark.parametrize("sites", [("NYU", "Mayo"), ("NYU",), (), ("NYU", "NYU"), ("nyu", "mcf")])
def test_sites_that_are_no_federation_are_refused(tmp_path, sites):
    with pytest.raises(FederationError, match=r"name two or more of NYU, MCF, .* once each"):
        deployment.write(tmp_path / "f", write_profile(tmp_path), sites, HOST, 39800)
    assert not (tmp_path / "f").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"arms": ["fedavg", "centralized"]}, "arms: centralized need all images in one place"),
        ({"arms": ["local_only"]}, "arms: local_only need .*keep some of fedavg, fedprox_0.1"),
        ({"inner_validation": 0.2}, "inner_validation: .* set it to 0.0"),
    ],
)
def test_what_cannot_be_federated_is_refused_and_nothing_is_written(tmp_path, changes, message):
    path = write_profile(tmp_path, **changes)
    with pytest.raises(FederationError, match=message):
        deployment.write(tmp_path / "f", path, SITES, HOST, 39800)
    assert [p.name for p in tmp_path.iterdir()] == ["profile.yaml"]


def test_a_folder_is_whole_or_absent(tmp_path, monkeypatch):
    def full(folder):
        raise OSError("no room on the disk")

    monkeypatch.setattr(certificates, "node_key", full)
    with pytest.raises(OSError, match="no room"):
        deployment.write(tmp_path / "f", write_profile(tmp_path), SITES, HOST, 39800)
    assert [p.name for p in tmp_path.iterdir()] == ["profile.yaml"]


# -- commands


def value_of(command, flag):
    return command[command.index(flag) + 1]


def test_the_server_takes_tls_and_registered_keys_only(federation):
    command = deployment.server_command(federation)
    server = federation.folder / "server"
    for flag, name in (("ca-certfile", "ca.crt"), ("certfile", "server.pem"), ("keyfile", "server.key")):
        assert value_of(command, f"--ssl-{flag}") == str(server / name) and (server / name).is_file()
    assert "--enable-supernode-auth" in command and "--insecure" not in command
    assert value_of(command, "--port") == "39800"
    assert value_of(command, "--database") == str(server / "state.db")
    assert "--disable-runtime-dependency-installation" in command


@pytest.mark.parametrize(("host", "listens"), [("localhost", "127.0.0.1"), ("127.0.0.1", "127.0.0.1")])
def test_a_server_of_this_machine_alone_is_not_open_to_others(tmp_path, host, listens):
    made = deployment.write(tmp_path / "f", write_profile(tmp_path), SITES, host, 39800)
    assert value_of(deployment.server_command(made), "--host") == listens


def test_a_site_verifies_the_server_and_shows_its_key(federation, tmp_path):
    place = federation.folder / "sites" / "NU"
    data = tmp_path / "my cases"
    data.mkdir()
    command = deployment.site_command(place, data, tmp_path / "work", "metrics")
    assert value_of(command, "--superlink") == f"{HOST}:39800" and "--insecure" not in command
    assert value_of(command, "--root-certificates") == str(place / "ca.crt")
    assert value_of(command, "--auth-supernode-private-key") == str(place / "key")
    told = {"site": "NU", "data": str(data), "outputs": str(tmp_path / "work"), "share": "metrics"}
    assert parse_config_args([value_of(command, "--node-config")]) == told


@pytest.mark.parametrize("which", ["data", "outputs"])
@pytest.mark.parametrize("quote", ["'", '"', "\\"])
def test_a_folders_name_is_passed_on_as_it_is_or_refused(federation, tmp_path, which, quote):
    folders = {"data": tmp_path / "data", "outputs": tmp_path / "outputs"}
    folders[which] = tmp_path / f"a{quote} site={quote}MCF"
    folders["data"].mkdir()
    place = federation.folder / "sites" / "NU"
    try:
        command = deployment.site_command(place, folders["data"], folders["outputs"], "scores")
    except FederationError as error:
        assert "cannot be passed on" in str(error)
    else:
        told = parse_config_args([value_of(command, "--node-config")])
        assert quote != "'" and told[which] == str(folders[which]) and told["site"] == "NU"


@pytest.mark.parametrize("name", ["site.yaml", "ca.crt", "key", "key.pub"])
def test_a_site_without_one_of_its_files_is_told_which(written, tmp_path, name):
    place = written.folder / "sites" / "NYU"
    (place / name).unlink()
    with pytest.raises(FederationError, match=f"lacks {name}; it is the folder that `init` wrote"):
        deployment.site_command(place, tmp_path, tmp_path / "work", "scores")


def test_a_site_without_its_cases_is_told_so(federation, tmp_path):
    with pytest.raises(FederationError, match=r"nowhere: no such folder; --data names"):
        deployment.site_command(federation.folder / "sites" / "NU", tmp_path / "nowhere", tmp_path, "scores")


def test_flower_that_is_not_installed_is_named_with_the_remedy(federation, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    with pytest.raises(FederationError, match=r"pip install 'ipmn\[flower\]'"):
        deployment.control(federation, "ls")


def test_flowers_processes_tell_no_one_and_keep_to_the_federations_folder(federation, monkeypatch):
    monkeypatch.setenv("KEPT", "yes")
    env = deployment.environment(federation)
    assert env["FLWR_TELEMETRY_ENABLED"] == "0" and env["FLWR_DISABLE_UPDATE_CHECK"] == "1"
    assert env["FLWR_HOME"] == str(federation.folder / "server" / "flwr") and env["KEPT"] == "yes"
    assert env["PATH"].split(":")[0] == str(deployment.Path(sys.executable).parent)


# -- Flower's own command


def answering(monkeypatch, stdout="", stderr="", hangs=False):
    """Lets Flower's command say so; the commands that were called."""
    called = []

    def run(command, **how):
        called.append((command, how))
        if hangs:
            raise subprocess.TimeoutExpired(command, how["timeout"])
        return subprocess.CompletedProcess(command, 0, stdout, stderr)

    monkeypatch.setattr(deployment.subprocess, "run", run)
    return called


def test_a_command_is_asked_over_tls_and_within_a_time(written, monkeypatch):
    called = answering(monkeypatch, '{"success": true, "runs": []}')
    assert deployment.control(written, "ls", "hospitals")["runs"] == []
    command, how = called[0]
    assert (
        command[1:] == ["ls", "hospitals", "--format", "json"] and how["timeout"] == deployment.ANSWER_SECONDS
    )
    config = (written.folder / "server" / "flwr" / "config.toml").read_text()
    assert f'root-certificates = "{written.folder / "server" / "ca.crt"}"' in config
    assert 'address = "127.0.0.1:39800"' in config and "insecure" not in config


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"stdout": '{"success": false, "error-message": "no such run"}'}, "ls hospitals: no such run"),
        ({"stdout": "", "stderr": "connection refused"}, "ls hospitals: connection refused"),
        ({"hangs": True}, f"the server at {HOST}:39800 did not answer in 180 s"),
    ],
)
def test_a_command_that_failed_is_an_error_with_its_reason(written, monkeypatch, said, message):
    answering(monkeypatch, **said)
    with pytest.raises(FederationError, match=message):
        deployment.control(written, "ls", "hospitals")


@pytest.fixture
def superlink(monkeypatch):
    """Flower's list of registered nodes, by number, as its command answers."""
    keys = {}

    def run(command, **how):
        if command[2] == "register":
            keys[str(17 + len(keys))] = command[3]
            return subprocess.CompletedProcess(
                command, 0, json.dumps({"success": True, "node-id": list(keys)[-1]}), ""
            )
        listed = {"success": True, "nodes": [{"node-id": number} for number in keys]}
        return subprocess.CompletedProcess(command, 0, json.dumps(listed), "")

    monkeypatch.setattr(deployment.subprocess, "run", run)
    return keys


def test_every_site_is_registered_once_by_its_public_key(written, superlink):
    nodes = deployment.register(written)
    assert nodes == deployment.register(written) and set(nodes) == set(SITES)
    assert superlink == {str(nodes[n]): str(written.folder / "server" / f"{n}.pub") for n in SITES}


def test_sites_are_registered_anew_with_a_server_that_has_lost_its_list(written, superlink):
    deployment.register(written)
    superlink.clear()
    assert set(map(str, deployment.register(written).values())) == set(superlink) and len(superlink) == 3


def test_a_server_that_is_not_there_is_not_waited_for_without_end(written, monkeypatch):
    port = deployment.free_port()
    monkeypatch.setattr(deployment, "STARTUP_SECONDS", -1.0)
    made = dataclasses.replace(written, port=port)
    with pytest.raises(
        FederationError, match=f"no server at 127.0.0.1:{port}; start `ipmn federation server"
    ):
        deployment.await_server(made)
