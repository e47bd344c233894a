"""Certificates and keys of a federation: its own CA, the server's certificate, a key for each site."""

from __future__ import annotations

import datetime
import ipaddress
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat
from cryptography.x509.oid import NameOID

CA = "ipmn federation CA"


def write(folder: Path, host: str) -> None:
    """Write `ca.crt`, `ca.key`, `server.pem` and `server.key`, the last two for `host` and localhost."""
    ca_key, server_key = (ec.generate_private_key(ec.SECP384R1()) for _ in range(2))
    ca_id = x509.SubjectKeyIdentifier.from_public_key(ca_key.public_key())
    by_ca = x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(ca_id)
    signs = x509.KeyUsage(False, False, False, False, False, True, True, False, False)
    names = dict.fromkeys(map(_general_name, (host, "localhost", "127.0.0.1")))
    of_ca = [x509.BasicConstraints(True, 0), signs, ca_id]
    of_server = [x509.BasicConstraints(False, None), x509.SubjectAlternativeName(names), by_ca]
    (folder / "ca.crt").write_bytes(_certificate(CA, ca_key, ca_key, 3650, of_ca))
    (folder / "server.pem").write_bytes(_certificate(host, server_key, ca_key, 825, of_server))
    for name, key in (("ca", ca_key), ("server", server_key)):
        _write_private(folder / f"{name}.key", key, PrivateFormat.PKCS8)


def node_key(folder: Path) -> None:
    """Write `key` and `key.pub`, by which the server knows a site: ECDSA on P-384, as Flower needs it."""
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
    named = [x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)]) for text in (subject, CA)]
    start = datetime.datetime.now(datetime.UTC) - datetime.timedelta(hours=1)
    end, number = start + datetime.timedelta(days=days), x509.random_serial_number()
    builder = x509.CertificateBuilder(named[1], named[0], key.public_key(), number, start, end)
    for extension in extensions:
        critical = isinstance(extension, (x509.BasicConstraints, x509.KeyUsage))
        builder = builder.add_extension(extension, critical)
    return builder.sign(ca_key, hashes.SHA256()).public_bytes(Encoding.PEM)


def _write_private(path: Path, key, form: PrivateFormat) -> None:
    path.touch(mode=0o600, exist_ok=False)  # before its content is there
    path.write_bytes(key.private_bytes(Encoding.PEM, form, NoEncryption()))
