"""The files of a federation across machines: sites, keys, certificates, settings.

A federation's folder holds `federation.yaml`, `profile.yaml`, `server/` (only for the server) and
`sites/<site>/` (only for that hospital: the CA's certificate, its key, the server's address).
"""

from __future__ import annotations

import datetime
import ipaddress
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import yaml
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat
from cryptography.x509.oid import NameOID
from pydantic import BaseModel, ConfigDict, PositiveFloat, PositiveInt, model_validator

from ipmn_core import data, federated, params
from ipmn_core.data.manifest import SUFFIXES
from ipmn_core.data.sheets import NA
from ipmn_core.names import fusion
from ipmn_core.params import Params

CA = "ipmn federation CA"
SITE = r"[A-Za-z0-9_][A-Za-z0-9._-]{0,63}"  # sites' names are also names of folders and keys
APP = """[project]
name = "ipmn-federation"
version = "1.0.0"
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
    """A federation cannot start or failed; the message says where and what to do."""


def federates(arm: str) -> bool:
    """Whether an arm can be trained across machines: its clients train no models only for themselves."""
    try:
        return not federated.strategy(arm).trains_alone
    except ValueError:
        return False


class Federation(BaseModel):
    """The server's address, the sites, what they train, and what a round does if a site is away.

    "wait" asks again until every site has answered. "continue" needs only `min_sites` of them after
    `round_seconds`. Both give up after `wait_seconds`.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    folder: Path
    profile: Params
    sites: tuple[str, ...]
    host: str
    port: int
    away: Literal["wait", "continue"] = "wait"
    min_sites: PositiveInt = 2
    round_seconds: PositiveFloat = 600.0
    wait_seconds: PositiveFloat = 3600.0

    @property
    def server(self) -> Path:
        """The folder that only the server may have."""
        return self.folder / "server"

    @model_validator(mode="after")
    def _can_federate(self) -> Federation:
        p, names = self.profile, [name.casefold() for name in self.sites]
        wrong = [n for n in self.sites if not re.fullmatch(SITE, n) or n.casefold() in ("global", *NA)]
        if wrong:
            rule = "use up to 64 of a-z, A-Z, 0-9, '.', '_', '-', not starting with '.' or '-'"
            raise FederationError(f"sites: {', '.join(map(repr, wrong))} cannot be a site's name; {rule}")
        if len(names) < 2 or len(set(names)) < len(names):
            raise FederationError("sites: give two or more names that differ in more than case")
        known = ", ".join(arm for arm, how in federated.STRATEGIES.items() if not how.trains_alone)
        alone = [arm for arm in p.arms if not federates(arm)]
        if alone or not p.arms:
            raise FederationError(f"arms: {', '.join(alone) or 'none'} cannot be federated; use {known}")
        if fused := [name for name in p.modalities if fusion(name)[1]]:
            text = f"modalities: sites support no fused ones yet; leave out {', '.join(fused)}"
            raise FederationError(text)
        if p.inner_validation:
            raise FederationError("inner_validation: sites have no inner split yet; set it to 0.0")
        if p.classes is None and Path(p.data).suffix.lower() in SUFFIXES:
            remedy = "list them in order, `classes: [benign, malignant]`, and which are `positive`"
            raise FederationError(f"classes: the profile must list them for all sites; {remedy}")
        try:
            data.classes_of(p, data.PAPER)
        except data.CohortError as error:
            raise FederationError(str(error)) from error
        return self


def write(folder: Path, p: Params, sites: Sequence[str], host: str, port: int, **away: Any) -> Federation:
    """Write a new federation's folder: certificates, keys and settings of the server and of every site.

    Raises FileExistsError if it exists, FederationError for sites or a profile that cannot be federated.
    """
    p = p.model_copy(update={"outputs": str((params.project_root() / p.outputs).resolve())})
    where = {"folder": folder.resolve(), "profile": p, "sites": sites, "host": host, "port": port}
    made = Federation(**where, **away)
    folder.mkdir(parents=True)  # never an existing one: its keys may be in use
    for place in ("app", "flwr"):
        (made.server / place).mkdir(parents=True)
    (made.server / "app" / "pyproject.toml").write_text(APP)
    write_certificates(made.server, host)
    for name in sites:
        place = folder / "sites" / name
        place.mkdir(parents=True)
        write_key(place)
        shutil.copy(made.server / "ca.crt", place)
        shutil.copy(place / "key.pub", made.server / f"{name}.pub")
        (place / "site.yaml").write_text(yaml.safe_dump({"site": name, "server": f"{host}:{port}"}))
    (folder / "profile.yaml").write_text(yaml.safe_dump(p.model_dump(mode="json"), sort_keys=False))
    about = made.model_dump(mode="json", exclude={"folder", "profile"})
    (folder / "federation.yaml").write_text(yaml.safe_dump(about, sort_keys=False))  # last: marks the end
    return made


def read(folder: Path) -> Federation:
    """Read the federation in `folder`. Raises FederationError or OSError naming the file."""
    path = folder / "federation.yaml"
    try:
        values = dict(yaml.safe_load(path.read_text()))
        return Federation(folder=folder.resolve(), profile=params.load(folder / "profile.yaml"), **values)
    except (yaml.YAMLError, TypeError, ValueError, FederationError) as error:
        raise FederationError(f"{path}: {error}; `ipmn federation init` writes a valid one") from error


def write_certificates(folder: Path, host: str) -> None:
    """Write `ca.crt` and `ca.key`, and for `host` and localhost `server.pem` and `server.key`."""
    ca_key, server_key = (ec.generate_private_key(ec.SECP384R1()) for _ in range(2))
    ca_id = x509.SubjectKeyIdentifier.from_public_key(ca_key.public_key())
    by_ca = x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(ca_id)
    signs = x509.KeyUsage(False, False, False, False, False, True, True, False, False)
    names = dict.fromkeys(map(_general_name, (host, "localhost", "127.0.0.1")))
    of_ca = [(x509.BasicConstraints(True, 0), True), (signs, True), (ca_id, False)]
    of_server = [(x509.BasicConstraints(False, None), True), (by_ca, False)]
    of_server += [(x509.SubjectAlternativeName(names), False)]
    (folder / "ca.crt").write_bytes(_certificate(CA, ca_key, ca_key, 3650, of_ca))
    (folder / "server.pem").write_bytes(_certificate(host, server_key, ca_key, 825, of_server))
    _write_private(folder / "ca.key", ca_key, PrivateFormat.PKCS8)
    _write_private(folder / "server.key", server_key, PrivateFormat.PKCS8)


def write_key(folder: Path) -> None:
    """Write `key` and `key.pub`, which identify a site to the server: ECDSA on P-384, as Flower needs."""
    key = ec.generate_private_key(ec.SECP384R1())
    _write_private(folder / "key", key, PrivateFormat.OpenSSH)
    public = key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH)
    (folder / "key.pub").write_bytes(public + b"\n")


def _general_name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _certificate(subject: str, key, ca_key, days: int, extensions: list) -> bytes:
    """A certificate in PEM, signed by the CA, with `extensions`, pairs of extension and `critical`."""
    of, by = (x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)]) for text in (subject, CA))
    start = datetime.datetime.now(datetime.UTC) - datetime.timedelta(hours=1)
    end, number = start + datetime.timedelta(days=days), x509.random_serial_number()
    builder = x509.CertificateBuilder(by, of, key.public_key(), number, start, end)
    for extension in extensions:
        builder = builder.add_extension(*extension)
    return builder.sign(ca_key, hashes.SHA256()).public_bytes(Encoding.PEM)


def _write_private(path: Path, key, form: PrivateFormat) -> None:
    path.touch(mode=0o600)  # before writing the content
    path.write_bytes(key.private_bytes(Encoding.PEM, form, NoEncryption()))
