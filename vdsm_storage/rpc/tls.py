# SPDX-License-Identifier: GPL-2.0-or-later
"""TLS with certificates on both sides, from the files of an engine-managed host.

    certs/cacert.pem      the authority that signed every host and client
    certs/vdsmcert.pem    this host
    keys/vdsmkey.pem      its key
"""

from __future__ import annotations

import os
import ssl
from dataclasses import dataclass

from vdsm_storage.config import Config
from vdsm_storage.errors import InvalidConfiguration


@dataclass(frozen=True)
class Files:
    """Paths of one side's PEM files."""

    authority: str
    certificate: str
    key: str


def host_files(pki: str) -> Files:
    """The agent's own; any tool of the host uses them as a client, too."""
    return Files(
        os.path.join(pki, "certs", "cacert.pem"),
        os.path.join(pki, "certs", "vdsmcert.pem"),
        os.path.join(pki, "keys", "vdsmkey.pem"),
    )


def client_files(pki: str) -> Files:
    """A client's pair where there is one (`--dev`), else the host's."""
    own = Files(
        os.path.join(pki, "certs", "cacert.pem"),
        os.path.join(pki, "certs", "clientcert.pem"),
        os.path.join(pki, "keys", "clientkey.pem"),
    )
    return own if os.path.exists(own.certificate) else host_files(pki)


def server_context(files: Files) -> ssl.SSLContext:
    """Peers must show a certificate of the authority.  Raises InvalidConfiguration."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.verify_mode = ssl.CERT_REQUIRED
    # Sessions are not resumed: a certificate that was taken back is seen at the next connection.
    context.num_tickets = 0
    context.options |= ssl.OP_NO_TICKET | ssl.OP_NO_RENEGOTIATION
    _load(context, files)
    return context


def client_context(files: Files, insecure: bool = False) -> ssl.SSLContext:
    """For connections to an agent.  Its certificate must be the authority's; its name is not
    looked at, since hosts are reached by any of their addresses.  `insecure` checks nothing."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE if insecure else ssl.CERT_REQUIRED
    _load(context, files)
    return context


def peer_context(config: Config) -> ssl.SSLContext | None:
    """For connections to agents of other hosts; None where this one serves plain text."""
    return client_context(host_files(config.paths.pki)) if config.tls.enabled else None


def names_address(certificate: object, address: str) -> bool:
    """Whether a peer's certificate (SSLObject.getpeercert()) names the address that it calls
    from, or a host name that is the same text."""
    if not isinstance(certificate, dict):
        return False
    plain = address.removeprefix("::ffff:").lower()
    names = {str(value).lower() for _kind, value in certificate.get("subjectAltName", ())}
    for part in certificate.get("subject", ()):
        names.update(str(value).lower() for kind, value in part if kind == "commonName")
    return plain in names


def _load(context: ssl.SSLContext, files: Files) -> None:
    for path in (files.authority, files.certificate, files.key):
        if not os.access(path, os.R_OK):
            raise InvalidConfiguration(
                source=path,
                section="paths",
                option="pki",
                reason="the file is missing or unreadable; enroll this host, or use --dev DIR",
            )
    try:
        context.load_cert_chain(files.certificate, files.key)
        context.load_verify_locations(files.authority)
    except (ssl.SSLError, OSError) as error:
        raise InvalidConfiguration(
            source=files.certificate, section="paths", option="pki", reason=error
        ) from error
