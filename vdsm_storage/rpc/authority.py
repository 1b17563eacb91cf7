# SPDX-License-Identifier: GPL-2.0-or-later
"""A TLS authority of one's own, for `--dev` instances, tests and the demo.

Run as a program (`python -m vdsm_storage.rpc.authority DIR`): the agent itself never imports this,
since the cryptography library would stay in its memory.
"""

from __future__ import annotations

import argparse
import datetime
import ipaddress
import os
import sys

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

VALID_DAYS = 3650


def create(directory: str, names: list[str]) -> None:
    """Write `directory`/certs and /keys: an authority, a host certificate for `names` (host names
    and addresses) and a client certificate.  What is there already is kept."""
    certs, keys = os.path.join(directory, "certs"), os.path.join(directory, "keys")
    os.makedirs(certs, exist_ok=True)
    os.makedirs(keys, mode=0o700, exist_ok=True)
    if os.path.exists(os.path.join(certs, "clientcert.pem")):
        return
    ca_key = ec.generate_private_key(ec.SECP256R1())
    ca_name = _name("vdsm-storage development authority")
    authority = _sign(_builder(ca_name, ca_name, ca_key).add_extension(
        x509.BasicConstraints(ca=True, path_length=0), critical=True
    ).add_extension(_usage(authority=True), critical=True), ca_key)
    _write(os.path.join(keys, "cakey.pem"), _private(ca_key))
    _write(os.path.join(certs, "cacert.pem"), _public(authority))
    for stem, title in (("vdsm", names[0]), ("client", "vdsm-client")):
        key = ec.generate_private_key(ec.SECP256R1())
        builder = _builder(_name(title), ca_name, key)
        builder = builder.add_extension(
            x509.SubjectAlternativeName([_alternative(name) for name in names]), critical=False
        ).add_extension(
            # The host's pair serves its own tools as a client certificate, too.
            x509.ExtendedKeyUsage(
                [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]
            ),
            critical=False,
        ).add_extension(_usage(authority=False), critical=True)
        _write(os.path.join(keys, f"{stem}key.pem"), _private(key))
        _write(os.path.join(certs, f"{stem}cert.pem"), _public(_sign(builder, ca_key)))


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePrivateKey
) -> x509.CertificateBuilder:
    now = datetime.datetime.now(datetime.UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=VALID_DAYS))
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
    )


def _sign(builder: x509.CertificateBuilder, key: ec.EllipticCurvePrivateKey) -> x509.Certificate:
    issuer = x509.AuthorityKeyIdentifier.from_issuer_public_key(key.public_key())
    return builder.add_extension(issuer, critical=False).sign(key, hashes.SHA256())


def _usage(authority: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=True,
        key_cert_sign=authority,
        crl_sign=authority,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _name(common: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common)])


def _alternative(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        return x509.DNSName(name)


def _private(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )


def _public(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.PEM)


def _write(path: str, data: bytes) -> None:
    mode = 0o600 if "key" in os.path.basename(path) else 0o644
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, mode)
    with os.fdopen(fd, "wb") as file:
        file.write(data)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Make a TLS authority and two certificates.")
    parser.add_argument("directory", help="gets certs/ and keys/")
    parser.add_argument("names", nargs="*", default=["localhost", "127.0.0.1", "::1"])
    arguments = parser.parse_args(argv)
    create(arguments.directory, arguments.names)
    return 0


if __name__ == "__main__":
    sys.exit(main())
