import datetime
import ipaddress
import stat
import sys

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.x509 import verification
from hospitals import HOST, SITES, written_to

from ipmn_core import params
from ipmn_core.flower import deployment
from ipmn_core.flower.deployment import FederationError


def certificate(path):
    return x509.load_pem_x509_certificate(path.read_bytes())


def private_keys(folder):
    return [path for path in folder.rglob("*") if path.name == "key" or path.suffix == ".key"]


# -- certificates and keys


@pytest.mark.parametrize("host", [HOST, "10.1.2.3", "localhost", "127.0.0.1"])
def test_a_site_can_verify_the_server_by_name_and_by_the_authority(tmp_path, federation, host):
    made = written_to(tmp_path, host)
    server = certificate(made.server / "server.pem")
    store = verification.Store([certificate(made.folder / "sites" / "NYU" / "ca.crt")])

    def verified(name, served=server, days=0):
        numeric = name[0].isdigit()
        subject = x509.IPAddress(ipaddress.ip_address(name)) if numeric else x509.DNSName(name)
        time = datetime.datetime.now(datetime.UTC) + datetime.timedelta(days=days)
        verifier = verification.PolicyBuilder().store(store).time(time).build_server_verifier(subject)
        return verifier.verify(served, [])[0] == served

    assert all(verified(name, days=days) for name in {host, "localhost", "127.0.0.1"} for days in (0, 800))
    for wrong in ({"name": "other.example.org"}, {"name": host, "days": 830}):
        with pytest.raises(verification.VerificationError):
            verified(**wrong)
    with pytest.raises(verification.VerificationError):  # another federation's
        verified("localhost", certificate(federation.server / "server.pem"))


def test_the_server_certificate_can_sign_no_other(federation):
    ca, server = (certificate(federation.server / name) for name in ("ca.crt", "server.pem"))
    basic = [c.extensions.get_extension_for_class(x509.BasicConstraints).value for c in (ca, server)]
    assert [constraint.ca for constraint in basic] == [True, False] and basic[0].path_length == 0
    server.verify_directly_issued_by(ca)


def test_every_key_is_another_and_its_owners_alone(federation, written):
    keys = [path for made in (federation, written) for path in private_keys(made.folder)]
    assert len({path.read_bytes() for path in keys}) == len(keys) == 2 * (2 + len(SITES))
    assert {stat.S_IMODE(path.stat().st_mode) for path in keys} == {0o600}


def test_a_site_gets_no_secret_of_others_and_the_server_only_the_public_half_of_its_key(federation):
    for name in SITES:
        place = federation.folder / "sites" / name
        assert {path.name for path in place.iterdir()} == {"ca.crt", "key", "key.pub", "site.yaml"}
        private = serialization.load_ssh_private_key((place / "key").read_bytes(), None)
        form = serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH
        public = private.public_key().public_bytes(*form).strip()
        assert (federation.server / f"{name}.pub").read_bytes().strip() == public
        assert (place / "key.pub").read_bytes().strip() == public
        assert private.curve.name == "secp384r1"
    assert not list(federation.server.rglob("key"))


# -- settings


def test_what_was_written_is_read(federation):
    again = deployment.read(federation.folder)
    assert again == federation and again.sites == tuple(SITES) and again.port == 39800
    assert (again.away, again.min_sites, again.wait_seconds) == ("continue", 2, 3600.0)
    assert again.profile.outputs == str(params.project_root() / "results")


WRONG = [
    "host: [",
    "just words",
    "",
    "- host",
    "host: h\nport: 1\n",
    "host: h\nport: many\nsites: [NYU, NU]\n",
]
WRONG += [f"host: h\nport: 1\nsites: {sites}\n" for sites in ("NYU", "[NYU]", "[NYU, Mayo]")]
WRONG += [
    f"host: h\nport: 1\nsites: [NYU, NU]\n{more}\n"
    for more in ("surprise: 1", "away: maybe", "min_sites: some", "round_seconds: -1")
]


@pytest.mark.parametrize("text", WRONG)
def test_a_file_that_cannot_be_right_is_refused_by_name(federation, tmp_path, text):
    (tmp_path / "profile.yaml").write_text((federation.folder / "profile.yaml").read_text())
    (tmp_path / "federation.yaml").write_text(text)
    with pytest.raises(FederationError, match=r"federation\.yaml"):
        deployment.read(tmp_path)


def test_a_file_that_is_missing_or_spoiled_is_named(tmp_path, written):
    with pytest.raises(FederationError, match=r"federation\.yaml: no such file; `ipmn federation init`"):
        deployment.read(tmp_path)
    (written.folder / "profile.yaml").write_text("rounds: none\n")
    with pytest.raises(params.ParamsError, match=r"profile\.yaml"):
        deployment.read(written.folder)


def test_an_existing_folder_keeps_its_keys(written, tmp_path):
    before = {path: path.read_bytes() for path in private_keys(written.folder)}
    with pytest.raises(FileExistsError, match="its keys may be in use"):
        written_to(tmp_path)
    assert {path: path.read_bytes() for path in private_keys(written.folder)} == before


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sites": ("NYU", "Mayo")}, r"sites: .*name two or more of NYU, MCF, .* once each, not NYU, Mayo"),
        ({"sites": ("NYU", "NYU")}, r"sites: .*name two or more of NYU, MCF, .* once each"),
        ({"changes": {"arms": ["fedavg", "centralized"]}}, "arms: centralized do not federate"),
        ({"changes": {"arms": ["local_only"]}}, "arms: local_only do not federate; use fedavg, fedprox_0.1"),
        ({"changes": {"inner_validation": 0.2}}, "inner_validation: .* set it to 0.0"),
    ],
)
def test_what_cannot_be_federated_is_refused_and_nothing_is_written(tmp_path, changes, message):
    with pytest.raises(FederationError, match=message):
        written_to(tmp_path, **changes)
    assert [path.name for path in tmp_path.iterdir()] == ["profile.yaml"]


def test_flower_that_is_not_installed_is_named_with_the_remedy(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    with pytest.raises(FederationError, match=r"pip install 'ipmn\[flower\]'"):
        written_to(tmp_path)
