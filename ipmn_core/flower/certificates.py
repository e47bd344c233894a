"""Who may talk to whom in a federation: its own CA, the server's certificate, a key for each site."""

from __future__ import annotations

import datetime
import ipaddress
import os
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives import serialization as s
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID


def write(folder: Path, host: str) -> None:
    """`ca.crt`, `ca.key`, and the server's `server.pem`, `server.key`, valid for `host` and localhost."""
    now = datetime.datetime.now(datetime.UTC)

    def certificate(subject: str, key, issuer: str, issuer_key, days: int, extensions) -> x509.Certificate:
        named = lambda text: x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])  # noqa: E731
        builder = (
            x509.CertificateBuilder()
            .subject_name(named(subject))
            .issuer_name(named(issuer))
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(hours=1))
            .not_valid_after(now + datetime.timedelta(days=days))
        )
        for extension, critical in extensions:
            builder = builder.add_extension(extension, critical)
        return builder.sign(issuer_key, hashes.SHA256())

    ca_key, server_key = ec.generate_private_key(ec.SECP384R1()), ec.generate_private_key(ec.SECP384R1())
    key_of_ca = x509.SubjectKeyIdentifier.from_public_key(ca_key.public_key())
    signs = x509.KeyUsage(False, False, False, False, False, True, True, False, False)
    of_ca = [(x509.BasicConstraints(ca=True, path_length=0), True), (signs, True), (key_of_ca, False)]
    ca = certificate("ipmn federation CA", ca_key, "ipmn federation CA", ca_key, 3650, of_ca)
    try:
        address = x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        address = x509.DNSName(host)
    local = [x509.DNSName("localhost"), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]
    names = x509.SubjectAlternativeName([address, *(name for name in local if name != address)])
    by_ca = x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(key_of_ca)
    of_server = [(names, False), (by_ca, False), (x509.BasicConstraints(ca=False, path_length=None), True)]
    server = certificate(host, server_key, "ipmn federation CA", ca_key, 825, of_server)
    _write_pem(folder, "ca", ca, ca_key)
    _write_pem(folder, "server", server, server_key)


def _write_pem(folder: Path, name: str, certificate: Any, key: Any) -> None:
    suffix = ".crt" if name == "ca" else ".pem"
    (folder / f"{name}{suffix}").write_bytes(certificate.public_bytes(s.Encoding.PEM))
    private = key.private_bytes(s.Encoding.PEM, s.PrivateFormat.PKCS8, s.NoEncryption())
    _write_private(folder / f"{name}.key", private)


def node_key(folder: Path) -> None:
    """`key` and `key.pub`, by which the server knows a site: ECDSA on P-384, as Flower wants them."""
    key = ec.generate_private_key(ec.SECP384R1())
    _write_private(
        folder / "key", key.private_bytes(s.Encoding.PEM, s.PrivateFormat.OpenSSH, s.NoEncryption())
    )
    public = key.public_key().public_bytes(s.Encoding.OpenSSH, s.PublicFormat.OpenSSH)
    (folder / "key.pub").write_bytes(public + b"\n")


def _write_private(path: Path, content: bytes) -> None:
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(content)
