# SPDX-License-Identifier: GPL-2.0-or-later
"""Who gets in: certificates of the authority, on both protocols; everybody else gets nothing."""

from __future__ import annotations

import contextlib
import os
import socket
import ssl
import stat
import subprocess
from pathlib import Path

import pytest

from tests.rpc.conftest import Peer, Start, wait_for
from vdsm_storage.errors import InvalidConfiguration
from vdsm_storage.rpc import tls
from vdsm_storage.rpc.client import NoResponse


def stranger() -> ssl.SSLContext:
    """Knows no authority and shows no certificate."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context


FIRST = (
    b"CONNECT\naccept-version:1.2\n\n\0",
    b"GET /healthz HTTP/1.1\r\nhost: x\r\n\r\n",
    b"GET /schema HTTP/1.1\r\nhost: x\r\n\r\n",
)


def what_comes(port: int, context: ssl.SSLContext, first: bytes) -> bytes:
    """All application bytes that a peer gets."""
    try:
        with Peer(port, context) as peer:
            peer.send(first)
            return peer.raw(2.0)
    except (ssl.SSLError, ConnectionError):
        return b""


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_with_a_certificate_of_the_authority(start: Start, version: ssl.TLSVersion) -> None:
    wire = start(secure=True)
    assert wire.client_context is not None
    wire.client_context.minimum_version = wire.client_context.maximum_version = version
    with wire.peer() as peer:
        peer.connect()
        assert peer.call("Host.ping2")["result"] is True
    for first in FIRST[1:]:
        assert what_comes(wire.port, wire.client_context, first).startswith(b"HTTP/1.1 200 OK")


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_without_a_certificate_nothing_comes(start: Start, version: ssl.TLSVersion) -> None:
    wire = start(secure=True)
    for first in FIRST:
        context = stranger()
        context.minimum_version = context.maximum_version = version
        assert what_comes(wire.port, context, first) == b""
    assert wire.listener.connections == 0


def test_with_a_certificate_of_another_authority_nothing_comes(
    start: Start, authorities: tuple[str, str]
) -> None:
    wire = start(secure=True)
    other = tls.client_files(authorities[1])
    for first in FIRST:
        context = stranger()
        context.load_cert_chain(other.certificate, other.key)
        assert what_comes(wire.port, context, first) == b""
    assert wire.listener.connections == 0


@pytest.mark.parametrize("first", [*FIRST, b"\n" * 100, b"x" * 5000])
def test_plain_bytes_into_the_tls_port_get_nothing_but_tls(start: Start, first: bytes) -> None:
    wire = start(secure=True)
    with Peer(wire.port) as peer:
        peer.send(first)
        answer = peer.raw(2.0)
    assert answer[:1] in (b"", b"\x15"), "at most a TLS alert"
    assert len(answer) <= 7


def test_old_versions_are_refused(start: Start) -> None:
    wire = start(secure=True)
    program = ["openssl", "s_client", "-connect", f"127.0.0.1:{wire.port}", "-tls1_1"]
    done = subprocess.run(program, capture_output=True, timeout=20, input=b"", check=False)
    assert b"Cipher is (NONE)" in done.stdout or done.returncode


def test_partial_handshakes_time_out(start: Start) -> None:
    wire = start(secure=True, handshake_timeout=0.5)
    with Peer(wire.port) as mute, Peer(wire.port) as half, wire.peer() as good:
        half.send(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03")  # the start of a ClientHello
        good.connect()
        assert mute.closed(5)
        assert half.closed(5)
        assert good.call("Host.ping2")["result"] is True


def test_a_handshake_and_then_silence_times_out(start: Start) -> None:
    wire = start(secure=True, handshake_timeout=0.5)
    with wire.peer() as peer:
        assert peer.closed(5)


def test_the_client_refuses_an_agent_of_another_authority(
    start: Start, authorities: tuple[str, str]
) -> None:
    wire = start(secure=True)
    wire.client_context = tls.client_context(tls.client_files(authorities[1]))
    with pytest.raises(NoResponse, match="certificate verify failed"), wire.client() as client:
        client.call("Host.ping2")


def test_addresses_in_certificates_on_request(start: Start, authorities: tuple[str, str]) -> None:
    """`tls.verify_client_cert`: our certificates name 127.0.0.1, so that we get in."""
    wire = start(secure=True, verify_client_cert=True)
    with wire.peer() as peer:
        peer.connect()
    with socket.create_connection(("127.0.0.1", wire.port), source_address=("127.0.0.7", 0)) as raw:
        assert wire.client_context is not None
        stream = wire.client_context.wrap_socket(raw)
        stream.sendall(FIRST[0])
        stream.settimeout(5)
        with contextlib.suppress(ConnectionError):
            assert stream.recv(100) == b""
    wait_for(lambda: wire.listener.connections <= 1)


@pytest.mark.parametrize(
    ("certificate", "address", "expected"),
    [
        ({"subjectAltName": (("IP Address", "10.0.0.1"),)}, "10.0.0.1", True),
        ({"subjectAltName": (("IP Address", "10.0.0.1"),)}, "::ffff:10.0.0.1", True),
        ({"subject": ((("commonName", "10.0.0.1"),),)}, "10.0.0.1", True),
        ({"subject": ((("organizationName", "10.0.0.1"),),)}, "10.0.0.1", False),
        ({"subjectAltName": (("DNS", "node"),)}, "10.0.0.1", False),
        ({}, "10.0.0.1", False),
        (None, "10.0.0.1", False),
    ],
)
def test_names_of_a_certificate(certificate: object, address: str, expected: bool) -> None:
    assert tls.names_address(certificate, address) is expected


def test_missing_files_say_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(InvalidConfiguration, match=r"cacert.pem.*--dev"):
        tls.server_context(tls.host_files(str(tmp_path)))


def test_unusable_files(tmp_path: Path) -> None:
    for folder, name in (("certs", "cacert"), ("certs", "vdsmcert"), ("keys", "vdsmkey")):
        (tmp_path / folder).mkdir(exist_ok=True)
        (tmp_path / folder / f"{name}.pem").write_text("no certificate\n")
    with pytest.raises(InvalidConfiguration):
        tls.server_context(tls.host_files(str(tmp_path)))


def test_keys_of_the_development_authority_are_private(authorities: tuple[str, str]) -> None:
    keys = Path(authorities[0]) / "keys"
    assert {path.name for path in keys.iterdir()} == {"cakey.pem", "clientkey.pem", "vdsmkey.pem"}
    assert all(stat.S_IMODE(os.stat(path).st_mode) == 0o600 for path in keys.iterdir())


def test_slow_tls_readers_are_disconnected(start: Start) -> None:
    wire = start(secure=True, max_output=1024 * 1024)
    with wire.peer() as deaf:
        deaf.connect(replies="jms.queue.events")
        wait_for(lambda: wire.broker.subscribers("jms.queue.events") == 1)
        for _ in range(5000):
            wire.broker.publish_event("|test|big|1", {"text": "x" * 10_000})
            if _ % 100 == 99 and wire.broker.subscribers("jms.queue.events") == 0:
                break
        wait_for(lambda: wire.broker.subscribers("jms.queue.events") == 0)
    wait_for(lambda: wire.listener.connections == 0)
    assert wire.broker.subscribers("jms.queue.events") == 0
