# SPDX-License-Identifier: GPL-2.0-or-later
"""Peers that must get nothing, mounts that must not be, passwords that must not be seen."""

from __future__ import annotations

import json
import socket
import ssl
import subprocess
import threading
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from functional.attacks import (
    hostile_lab,
)
from functional.engine.host import POSIXFS, StorageServer
from functional.engine.wire import client_tls
from functional.pool_lab import (
    BLANK,
    Lab,
)
from functional.processes import AgentProcess
from vdsm_storage.rpc.client import RemoteError

PASSWORD = "Tr0ub4dor-and-3-secrets"


@pytest.fixture(scope="module")
def lab(workdir: Path, start_agent: Callable[..., AgentProcess]) -> Iterator[Lab]:
    with hostile_lab(workdir, start_agent) as made:
        yield made

# -- peers ------------------------------------------------------------------------------------



def shut_out(port: int, context: ssl.SSLContext | None, data: bytes) -> bytes:
    """What a peer gets that sends `data`; for TLS, what comes inside."""
    with socket.create_connection(("127.0.0.1", port), 20) as plain:
        plain.settimeout(30)
        got = b""
        try:
            stream = context.wrap_socket(plain) if context is not None else plain
            stream.sendall(data)
            while piece := stream.recv(4096):
                got += piece
        except (ssl.SSLError, ConnectionError):
            pass
        return got


STOMP = b"CONNECT\naccept-version:1.2\n\n\0"
HTTP = b"GET /schema HTTP/1.1\r\nhost: a\r\n\r\n"


@pytest.mark.parametrize("data", [STOMP, HTTP, b"", b"\0" * 100], ids=["stomp", "http", "", "nul"])
def test_no_certificate_of_the_authority_no_answer(lab: Lab, workdir: Path, data: bytes) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    if data:
        assert shut_out(lab.agent.port, context, data) == b""
    context.load_cert_chain(*stranger(workdir))
    if data:
        assert shut_out(lab.agent.port, context, data) == b""
    plain = shut_out(lab.agent.port, None, data or b"x")
    assert plain == b"" or plain[0] == 0x15  # an alert of TLS itself, nothing of ours
    assert b"CONNECTED" not in plain
    assert b"HTTP" not in plain


def stranger(workdir: Path) -> tuple[str, str]:
    """A pair that signed itself, under the name of a real client."""
    key, cert = workdir / "stranger.key", workdir / "stranger.pem"
    if not cert.exists():
        subprocess.run(
            ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1",
             "-subj", "/O=vdsm/CN=localhost", "-keyout", key, "-out", cert],
            check=True, capture_output=True, timeout=60,
        )  # fmt: skip
    return str(cert), str(key)


def test_old_tls_is_refused(lab: Lab) -> None:
    context = client_tls(lab.agent.dir / "pki")
    context.maximum_version = ssl.TLSVersion.TLSv1_1
    assert shut_out(lab.agent.port, context, STOMP) == b""


# -- mounts -----------------------------------------------------------------------------------


SMUGGLED = [
    "suid", "dev", "rw,suid", "rw,dev,nosuid", "SUID", " suid", "suid=1", "remount", "bind,suid",
    "user", "owner", "x-mount.mkdir", "helper=/bin/sh", "uhelper=x", "context=a b", "rw\nsuid",
    "rw\0suid", "rw,\u202esuid", "-o,suid", "loop,dev", "rw,,suid", "'suid'",
    "\"suid\"", "a\\054suid",
    "exec suid", "bind,shared", "move", "rbind",
]  # fmt: skip


@pytest.mark.parametrize("options", SMUGGLED)
def test_mount_options_that_smuggle(lab: Lab, workdir: Path, options: str) -> None:
    (workdir / "smuggle").mkdir(exist_ok=True)
    server = StorageServer(POSIXFS, str(workdir / "smuggle"), vfs_type="none", options=options)
    assert lab.connect(server)[0] != 0
    assert str(workdir / "smuggle") not in Path("/proc/self/mountinfo").read_text()


def test_mounts_are_nosuid_and_nodev(lab: Lab) -> None:
    lines = Path("/proc/self/mountinfo").read_text().splitlines()
    ours = [line for line in lines if f"{lab.agent.dir}/data-center/mnt/" in line]
    assert ours
    for line in ours:
        options = line.split()[5].split(",")
        assert {"nosuid", "nodev"} <= set(options)


SPECS = [
    "", "relative", "./x", "../x", "/a/../../etc", "/a/..", "/..", "/", "//", "-t", "--bind",
    "/a\nb", "/a\0b", "/a\x1b[31m", "host:", ":/", "host:/../x", "/" + "x" * 5000, "\u202e/x",
]


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("kind", [4, 6])
def test_connections_to_nowhere(lab: Lab, spec: str, kind: int) -> None:
    server = StorageServer(kind, spec, vfs_type="none" if kind == POSIXFS else "", options="bind")
    before = sorted((lab.agent.dir / "data-center" / "mnt").iterdir())
    assert lab.connect(server)[0] != 0
    assert sorted((lab.agent.dir / "data-center" / "mnt").iterdir()) == before


# -- passwords --------------------------------------------------------------------------------



def requests_with_passwords(lab: Lab) -> Iterator[tuple[str, dict[str, Any]]]:
    """The password in every place, form and mistake."""
    flat = {"id": str(uuid.uuid4()), "connection": "/nowhere", "iqn": "iqn.2026-01.x:y",
            "portal": "1", "port": "3260", "user": "u", "password": PASSWORD}  # fmt: skip
    for kind in (3, 4, 6, "ISCSI", "NFS", 99):
        for wrong in (
            {}, {"password": [PASSWORD]}, {"password": {"a": PASSWORD}}, {"PASSWORD": PASSWORD},
            {"passWord": PASSWORD}, {"mnt_options": f"password={PASSWORD}"},
            {"mnt_options": f"a b,password={PASSWORD}"},
            {"mnt_options": f"rw,suid,password={PASSWORD}"},
            {"mnt_options": f"rw,pass={PASSWORD} x"}, {"mnt_options": f"PASSWORD={PASSWORD}"},
            {"vfs_type": "cifs", "mnt_options": f"username=a,password2={PASSWORD},x"},
            {"vfs_type": "cifs", "mnt_options": f"username=a%{PASSWORD}"},
        ):  # fmt: skip
            connection = {**flat, **wrong}
            yield "StoragePool.connectStorageServer", {
                "storagepoolID": BLANK, "domainType": kind, "connectionParams": [connection],
            }  # fmt: skip
            yield "StoragePool.disconnectStorageServer", {
                "storagepoolID": BLANK, "domainType": kind, "connectionParams": [connection],
            }  # fmt: skip
            yield "ISCSIConnection.discoverSendTargets", {
                "host": "127.0.0.1", "port": "1", "user": "u", "password": PASSWORD,
                "options": connection,
            }  # fmt: skip
    for extra in ({}, {"url": f"https://u:{PASSWORD}@host/x"}, {"password": PASSWORD}):
        ticket = {
            "uuid": str(uuid.uuid4()), "size": 1, "url": "file:///x", "timeout": 1,
            "ops": ["read"], **extra,
        }  # fmt: skip
        yield "Host.add_image_ticket", {"ticket": ticket}
        yield "Host.add_image_ticket", {"ticket": {**ticket, "size": "none"}}
    for verb in ("Host.fenceNode", "Host.registerSecrets"):
        yield verb, {"addr": "x", "password": PASSWORD, "secrets": [{"password": PASSWORD}]}


def test_passwords_stay_where_they_are(lab: Lab) -> None:
    """Neither replies, nor anything that the agent writes, nor command lines show them."""
    lines: set[str] = set()
    ended = threading.Event()

    def watch() -> None:
        while not ended.is_set():
            for path in Path("/proc").glob("[0-9]*/cmdline"):
                try:
                    lines.add(path.read_text(errors="replace"))
                except OSError:
                    continue

    watcher = threading.Thread(target=watch)
    watcher.start()
    replies = []
    try:
        for verb, params in requests_with_passwords(lab):
            try:
                replies.append(json.dumps(lab.call(verb, **params)))
            except RemoteError as error:
                replies.append(error.message)
    finally:
        ended.set()
        watcher.join()
    assert [reply for reply in replies if PASSWORD in reply] == []
    assert [line for line in lines if PASSWORD in line] == []
    for path in lab.agent.dir.rglob("*"):
        if path.is_file() and "data-center" not in path.parts:
            lines_ = path.read_bytes().splitlines()
            assert [line for line in lines_ if PASSWORD.encode() in line] == [], path
