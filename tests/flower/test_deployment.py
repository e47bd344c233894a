import datetime
import ipaddress
import re
import stat

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.x509 import verification
from flwr.common.config import parse_config_args
from hospitals import HOST, SITES, federation_in

from ipmn_core import cli, params
from ipmn_core.flower import deployment, processes
from ipmn_core.flower.deployment import FederationError


def certificate(path):
    return x509.load_pem_x509_certificate(path.read_bytes())


def private_keys(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.name.endswith("key")}


@pytest.mark.parametrize("host", [HOST, "10.1.2.3", "localhost"])
def test_a_site_can_verify_the_server_by_name_and_by_the_authority(tmp_path, federation, host):
    made = federation_in(tmp_path / "f", host)
    server = certificate(made.server / "server.pem")
    store = verification.Store([certificate(made.folder / "sites" / "NYU" / "ca.crt")])

    def verified(name, served=server, days=0):
        numeric = name[0].isdigit()
        subject = x509.IPAddress(ipaddress.ip_address(name)) if numeric else x509.DNSName(name)
        time = datetime.datetime.now(datetime.UTC) + datetime.timedelta(days=days)
        verifier = verification.PolicyBuilder().store(store).time(time).build_server_verifier(subject)
        return verifier.verify(served, [])[0] == served

    assert all(verified(name, days=days) for name in {host, "localhost", "127.0.0.1"} for days in (0, 800))
    others = certificate(federation.server / "server.pem")
    for wrong in (("other.example.org",), (host, server, 830), ("localhost", others)):
        with pytest.raises(verification.VerificationError):
            verified(*wrong)
    assert not server.extensions.get_extension_for_class(x509.BasicConstraints).value.ca  # can sign no other


def test_every_key_is_another_and_its_owners_alone(federation, written):
    keys = private_keys(federation.folder) | private_keys(written.folder)
    assert len(set(keys.values())) == len(keys) == 2 * (2 + len(SITES))
    assert {stat.S_IMODE(path.stat().st_mode) for path in keys} == {0o600}
    for name in SITES:
        place = federation.folder / "sites" / name
        assert {path.name for path in place.iterdir()} == {"ca.crt", "key", "key.pub", "site.yaml"}
        key = serialization.load_ssh_private_key((place / "key").read_bytes(), None)
        public = serialization.load_ssh_public_key((federation.server / f"{name}.pub").read_bytes())
        assert key.public_key() == public and key.curve.name == "secp384r1"
        assert (place / "key.pub").read_bytes() == (federation.server / f"{name}.pub").read_bytes()
    assert not list(federation.server.rglob("key"))


def test_what_was_written_is_read(tmp_path):
    names = ("radiology.north", "42_hospital", "042", "_x-Y")
    made = federation_in(tmp_path / "f", sites=names, away="continue")
    again = deployment.read(made.folder)
    assert again == made and again.sites == names and again.port == 39800
    assert (again.away, again.min_sites, again.wait_seconds) == ("continue", 2, 3600.0)
    assert again.profile.outputs == str(params.project_root() / "results")
    for name in names:
        command = processes.site_command(made.folder / "sites" / name, tmp_path, tmp_path, "scores")
        assert parse_config_args([command[-1]])["site"] == name


WRONG = ["host: [", "just words", "", "host: h\nport: 1\n", "host: h\nport: 1\nsites: [NYU, ..]\n"]
WRONG += [f"host: h\nport: 1\nsites: [NYU, NU]\n{more}\n" for more in ("surprise: 1", "away: maybe")]


@pytest.mark.parametrize("text", WRONG)
def test_a_file_that_cannot_be_right_is_refused_by_name(written, text):
    (written.folder / "federation.yaml").write_text(text)
    with pytest.raises(FederationError, match=r"federation\.yaml"):
        deployment.read(written.folder)


def test_an_existing_folder_keeps_its_keys(written):
    before = private_keys(written.folder)
    with pytest.raises(FileExistsError):
        federation_in(written.folder)
    assert private_keys(written.folder) == before


NAMES = ["", ".", "..", ".hidden", "-x", "a b", "a/b", "Köln", "a\n", "a'b", "global", "NA", "a" * 65]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sites": ("NYU",)}, "sites: give two or more names"),
        ({"sites": ("NYU", "nyu")}, "sites: give two or more names that differ in more than case"),
        ({"changes": {"arms": ["fedavg", "local_only"]}}, "arms: local_only cannot be federated; use fedavg"),
        ({"changes": {"inner_validation": 0.2}}, "inner_validation: .* set it to 0.0"),
        ({"changes": {"modalities": ["t1+t2_siamese", "t2"]}}, r"yet; leave out t1\+t2_siamese"),
        ({"changes": {"data": "own/Scans.CSV"}}, "classes: .* list them in order"),
        ({"changes": {"classes": ["a", "b"], "positive": ["c"]}}, "positive c of the classes a, b"),
        *(({"sites": ("NYU", n)}, re.escape(f"sites: {n!r} cannot be a site's name; ")) for n in NAMES),
    ],
)
def test_what_cannot_be_federated_is_refused_and_nothing_is_written(tmp_path, changes, message):
    with pytest.raises(FederationError, match=message):
        federation_in(tmp_path / "f", **changes)
    assert not list(tmp_path.iterdir())


def test_flower_that_is_not_installed_is_named_with_the_remedy(monkeypatch, capsys):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert cli.main(["federation", "server", "f"]) == 1
    assert "pip install 'ipmn[flower]'" in capsys.readouterr().err
