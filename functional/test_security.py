# SPDX-License-Identifier: GPL-2.0-or-later
"""Hostile peers, hostile requests, hostile storage: a running agent under attack."""

from __future__ import annotations

import http.client
import json
import re
import shutil
import socket
import ssl
import subprocess
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from functional.engine.host import POSIXFS, StorageServer, stream_headers
from functional.engine.wire import client_tls
from functional.lab import (
    BLANK,
    COW,
    MIB,
    RAW,
    Lab,
    Volume,
    endpoint,
    local_server,
    make_lab,
    wait_for,
)
from functional.outside import SECRET, Outside
from functional.processes import AgentProcess
from vdsm_storage.rpc.client import RemoteError
from vdsm_storage.schema.loader import Schema
from vdsm_storage.verbs.tables import VERBS

INVALID_PARAMS = -32602
PASSWORD = "Tr0ub4dor-and-3-secrets"


@pytest.fixture(scope="module")
def lab(workdir: Path, start_agent: Callable[..., AgentProcess]) -> Iterator[Lab]:
    """A POSIX domain, the master, and a local one."""
    made = make_lab(
        start_agent("agent", log__level="DEBUG", rpc__check_replies="false",
                    storage__monitor_interval="0.5", storage__lock_timeout="5")
    )  # fmt: skip
    (workdir / "posix").mkdir()
    made.add_domain(bind_server(workdir / "posix"))
    made.add_domain(local_server(workdir / "local"))
    yield made
    made.client.close()


def bind_server(path: Path) -> StorageServer:
    return StorageServer(POSIXFS, str(path), vfs_type="none", options="bind")


@pytest.fixture
def outside(workdir: Path) -> Iterator[Outside]:
    made = Outside(workdir / f"outside-{uuid.uuid4()}")
    yield made
    made.close()


def posix(lab: Lab) -> str:
    return next(iter(lab.servers))


def local(lab: Lab) -> str:
    return list(lab.servers)[1]


# -- peers -----------------------------------------------------------------------------------


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


# -- requests --------------------------------------------------------------------------------

HOSTILE_IDS = [
    "../../../../etc/passwd", "..", "/etc/passwd", "a" * 5000, "", " ", "\0",
    "%s", "$(id)", "-rf", "*",
    "00000000-0000-0000-0000-00000000000g",
    "00000000-0000-0000-0000-000000000001/",
    "00000000-0000-0000-0000-000000000001\n",
    "00000000-0000-0000-0000-000000000001\0",
    "00000000-0000-0000-0000-00000000000\u0661",  # a digit, but not one of ASCII
    "\uff10" * 8 + "-0000-0000-0000-000000000001",
    "{00000000-0000-0000-0000-000000000001}",
    "urn:uuid:00000000-0000-0000-0000-000000000001",
    "00000000000000000000000000000001",
    ["00000000-0000-0000-0000-000000000001"],
    {"a": "b"}, 1, -1, 1.5, True,
]  # fmt: skip


class Samples:
    """Parameters that each verb would take, made from the schema."""

    def __init__(self, lab: Lab) -> None:
        self._schema = Schema()
        self._domain = posix(lab)

    def fields(self, params: Any, namespace: str, depth: int = 0) -> dict[str, Any]:
        return {
            p.name: self.value(p.type, namespace, depth)
            for p in params
            if depth == 0 or not p.optional or p.type == "UUID"
        }

    def value(self, name: str, namespace: str, depth: int) -> Any:
        simple = {
            "UUID": str(uuid.uuid4()), "string": "x", "password": "x", "boolean": False,
            "BoolString": "false", "float": 1.0, "FloatString": "1.0", "IntString": "1",
        }  # fmt: skip
        if name in simple:
            return simple[name]
        if name in ("int", "uint", "long", "ulong"):
            return 1
        if name.startswith("["):
            return [self.value(name[1:-1], namespace, depth + 1)] if depth < 3 else []
        try:
            found = self._schema.type(name, namespace)
        except KeyError:
            return "x"
        if found.kind == "object":
            return self.fields(found.fields, namespace, depth + 1)
        if found.kind == "enum":
            return next(iter(found.values))
        if found.kind == "map":
            return {str(uuid.uuid4()): self.value(found.value, namespace, depth + 1)}
        if found.kind == "union":
            first = next(iter(found.variants.values())) if found.tag else found.of[0]
            return self.value(first, namespace, depth + 1)
        return "x"

    def verb(self, name: str) -> dict[str, Any]:
        found = self._schema.verb(name)
        return self.fields(found.params, found.namespace)


def uuid_places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where a UUID stands in parameters; not the keys of maps."""
    items: Any = ()
    if isinstance(value, dict):
        items = value.items()
    elif isinstance(value, list):
        items = enumerate(value)
    elif isinstance(value, str) and len(value) == 36 and value.count("-") == 4:
        yield path
    for key, item in items:
        yield from uuid_places(item, (*path, key))


def replaced(value: Any, path: tuple[Any, ...], new: Any) -> Any:
    if not path:
        return new
    copy: Any = dict(value) if isinstance(value, dict) else list(value)
    copy[path[0]] = replaced(value[path[0]], path[1:], new)
    return copy


def snapshot(*roots: Path) -> list[tuple[str, int, int]]:
    """Names, sizes and times of change of all files; what sanlock writes is left out."""
    found = []
    for root in roots:
        for path in (root, *root.rglob("*")):
            if path.name not in ("ids", "leases"):
                status = path.lstat()
                found.append((str(path), status.st_size, status.st_mtime_ns))
    return sorted(found)


def test_ids_that_are_none_reach_nothing(lab: Lab, workdir: Path) -> None:
    samples = Samples(lab)
    storage = (workdir / "posix", workdir / "local", lab.agent.dir / "data-center")
    before = snapshot(*storage)
    wrong, tried = [], 0
    for name in sorted(VERBS):
        params = samples.verb(name)
        for place in uuid_places(params):
            pending = [
                (bad, lab.client.submit(name, replaced(params, place, bad)))
                for bad in HOSTILE_IDS
            ]
            for bad, one in pending:
                tried += 1
                try:
                    one.result(60)
                    code = 0
                except RemoteError as error:
                    code = error.code
                optional = bad == ""  # engines send "" for what they do not mean
                if code != INVALID_PARAMS and not optional:
                    wrong.append((name, place, bad if isinstance(bad, str) else type(bad), code))
    assert wrong == []
    assert tried > 1000
    assert snapshot(*storage) == before


def test_capital_letters_name_the_same_object(lab: Lab) -> None:
    where = lab.create(local(lab))
    capital = {key: value.upper() for key, value in lab.ids(where).items()}
    assert lab.call("Volume.getInfo", **capital)["image"] == where.image
    assert set(lab.directory(where).iterdir()) == {
        lab.directory(where) / where.volume, lab.directory(where) / f"{where.volume}.meta",
    }  # fmt: skip


@pytest.mark.parametrize("header", ["Storage-Domain-Id", "Image-Id", "Volume-Id"])
def test_streams_take_no_other_ids(lab: Lab, header: str) -> None:
    where = lab.create(posix(lab), fmt=RAW)
    for bad in ("../../etc", "/etc/passwd", "..%2f..", ":facts", "x" * 3000, "\xe4"):
        headers = {**stream_headers(lab.ids(where)), header: bad}
        for method in ("PUT", "GET"):
            status, _body = stream(lab, method, headers)
            assert status in (400, 500), (method, bad)


def stream(
    lab: Lab, method: str, headers: dict[str, str], data: bytes = b"x" * 4096
) -> tuple[int, bytes]:
    context = client_tls(lab.agent.dir / "pki")
    connection = http.client.HTTPSConnection(
        "127.0.0.1", lab.agent.port, timeout=60, context=context
    )
    if method == "GET":
        headers = {**headers, "Range": "bytes=0-4095"}
    try:
        connection.request(method, "/", data if method == "PUT" else None, headers)
        response = connection.getresponse()
        return response.status, response.read()
    finally:
        connection.close()


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


# -- passwords -------------------------------------------------------------------------------


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


# -- storage with links in it ----------------------------------------------------------------


def attacks(lab: Lab, where: Volume) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Every verb that goes to a volume, the one that deletes it last."""
    ids = lab.ids(where)
    image = {key: ids[key] for key in ("storagepoolID", "storagedomainID", "imageID")}
    other = lab.create(where.domain)
    info = {key: value for key, value in endpoint(where).items() if key != "endpoint_type"}
    elsewhere = local(lab) if where.domain == posix(lab) else posix(lab)
    new = {"dstImgUUID": str(uuid.uuid4()), "dstVolUUID": str(uuid.uuid4())}
    for verb, more in (
        ("Image.prepare", {}), ("Volume.getInfo", {}), ("Volume.getSize", {}),
        ("Volume.getQemuImageInfo", {}), ("Volume.verify_untrusted", {}), ("Volume.refresh", {}),
        ("Volume.measure", {"dstVolFormat": 5}), ("Volume.setDescription", {"description": "x"}),
        ("Volume.setLegality", {"legality": "LEGAL"}),
    ):  # fmt: skip
        yield verb, lambda verb=verb, more=more: lab.call(verb, **ids, **more)  # type: ignore[misc]
    domain, leaf = where.domain, where.volume
    yield "Image.getVolumes", lambda: lab.call("Image.getVolumes", **image)
    yield "dump", lambda: lab.call("StorageDomain.dump", sd_id=domain, full=True)
    yield "reconcile", lambda: lab.call("Image.reconcileVolumeChain", **image, leafVolID=leaf)
    yield "extend", lambda: lab.task("Volume.extendSize", **ids, newSize=8 * MIB)
    yield "copy from", lambda: lab.copy(where, other)
    yield "copy to", lambda: lab.copy(other, where)
    yield "snapshot", lambda: lab.snapshot(where, size=16 * MIB)
    yield "add_bitmap", lambda: lab.job("SDM.add_bitmap", vol_info=info, bitmap="b")
    for name, more in (
        ("update_volume", {"vol_attr": {"description": "y"}}),
        ("amend_volume", {"qcow2_attr": {"compat": "1.1"}}),
    ):
        yield name, lambda name=name, more=more: lab.job(f"SDM.{name}", vol_info=info, **more)  # type: ignore[misc]
    yield "sparsify", lambda: lab.job("SDM.sparsify_volume", vol_info=info)
    yield "reduce", lambda: lab.task("StoragePool.reduceVolume", **ids)
    yield "PUT", lambda: stream(lab, "PUT", stream_headers(ids))
    yield "GET", lambda: stream(lab, "GET", stream_headers(ids))
    yield "move", lambda: lab.task(
        "Image.move", **image, dstSdUUID=elsewhere, operation=1, postZero=False, force=False
    )
    yield "Volume.copy", lambda: lab.task(
        "Volume.copy", **ids, dstSdUUID=where.domain, **new, desc="", volType="LEAF",
        volFormat=COW, preallocate=2, postZero=False, force=False,
    )  # fmt: skip
    yield "Image.teardown", lambda: lab.call("Image.teardown", **ids)
    yield "delete", lambda: lab.task("Volume.delete", **ids, postZero=False, force=True)
    yield "delete image", lambda: lab.task("Image.delete", **image, postZero=False, force=True)


def run(calls: Iterator[tuple[str, Callable[[], Any]]], outside: Outside) -> dict[str, Any]:
    """What each call answered; none may have touched what is outside, or told of it."""
    answers: dict[str, Any] = {}
    for name, call in calls:
        try:
            answers[name] = call()
        except (RemoteError, AssertionError) as error:
            answers[name] = repr(error)
        assert outside.touched() == [], name
        assert SECRET not in repr(answers[name]), name
    return answers


def plant(path: Path, outside: Outside) -> None:
    """A link to a faithful copy outside, which would do if it were followed."""
    target = outside.path / "copy"
    if path.is_dir():
        shutil.copytree(path, target)
        path.rename(path.with_name(f"{path.name}.away"))
    else:
        shutil.copy(path, target)
        path.unlink()
    path.symlink_to(target)
    outside.file("secret")
    outside.watch()


@pytest.mark.parametrize("kind", ["posix", "local"])
@pytest.mark.parametrize("what", ["image", "meta", "data", "lease"])
def test_links_in_an_image_are_not_followed(
    lab: Lab, outside: Outside, kind: str, what: str
) -> None:
    where = lab.create(posix(lab) if kind == "posix" else local(lab))
    directory = lab.directory(where)
    path = {
        "image": directory,
        "meta": directory / f"{where.volume}.meta",
        "data": directory / where.volume,
        "lease": directory / f"{where.volume}.lease",
    }[what]
    if not path.exists():
        pytest.skip("local domains have no leases")
    plant(path, outside)
    answers = run(attacks(lab, where), outside)
    assert "209" in answers["Image.prepare"] or what == "lease"
    assert (outside.path / "copy").exists()
    assert lab.health(where.domain)["valid"]


def test_a_volume_that_leads_to_a_file_of_the_system(lab: Lab, outside: Outside) -> None:
    secret = outside.file("shadow", (SECRET + "\n").encode() * 1000)
    outside.watch()
    for fmt in (RAW, COW):
        where = lab.create(posix(lab), fmt=fmt)
        data = lab.directory(where) / where.volume
        data.unlink()
        data.symlink_to(secret)
        run(attacks(lab, where), outside)
    assert secret.read_bytes() == (SECRET + "\n").encode() * 1000


def domain_attacks(lab: Lab, domain: str) -> Iterator[tuple[str, Callable[[], Any]]]:
    lease = {"sd_id": domain, "lease_id": str(uuid.uuid4())}
    one = {"storagedomainID": domain}
    yield "monitoring", lambda: time.sleep(1.5)
    yield "create", lambda: lab.create(domain)
    yield "getInfo", lambda: lab.call("StorageDomain.getInfo", **one)
    yield "validate", lambda: lab.call("StorageDomain.validate", **one)
    yield "getImages", lambda: lab.call("StorageDomain.getImages", **one)
    yield "setDescription", lambda: lab.call(
        "StorageDomain.setDescription", **one, description="z"
    )
    yield "dump", lambda: lab.call("StorageDomain.dump", sd_id=domain, full=True)
    yield "Lease.create", lambda: lab.task("Lease.create", lease=lease)
    yield "Lease.status", lambda: lab.call("Lease.status", lease=lease)
    yield "rebuild", lambda: lab.task("Lease.rebuild_leases", sd_id=domain)
    yield "getStorageDomains", lambda: lab.call("Host.getStorageDomains")
    pool = {**one, "storagepoolID": lab.pool}
    yield "deactivate", lambda: lab.call(
        "StorageDomain.deactivate", **pool, masterSdUUID=BLANK, masterVersion=0
    )
    yield "activate", lambda: lab.call("StorageDomain.activate", **pool)
    yield "detach", lambda: lab.call("StorageDomain.detach", **pool, force=True)
    yield "format", lambda: lab.call("StorageDomain.format", **one, autoDetach=True)


@pytest.mark.parametrize("kind", ["posix", "local"])
def test_links_in_a_domain_are_not_followed(
    lab: Lab, workdir: Path, outside: Outside, kind: str
) -> None:
    """One domain, each of its parts in turn; it is put back, and works, after each."""
    path = workdir / f"victim-{kind}"
    path.mkdir()
    domain = lab.add_domain(bind_server(path) if kind == "posix" else local_server(path))
    root = lab.root(domain)
    parts = ["dom_md/metadata", "dom_md/ids", "dom_md/leases", "dom_md/xleases", "dom_md",
             "images", "."]  # fmt: skip
    for number, part in enumerate(parts):
        victim = root / part if part != "." else root
        if not victim.exists():
            continue
        here = Outside(outside.path / str(number))
        away = root.parent / "away"
        (shutil.copytree if victim.is_dir() else shutil.copy)(victim, here.path / "copy")
        victim.rename(away)
        victim.symlink_to(here.path / "copy")
        here.watch()
        calls = (c for c in domain_attacks(lab, domain) if c[0] not in (
            "deactivate", "activate", "detach", "format"))  # fmt: skip
        answers = run(calls, here)
        assert not lab.health(domain)["valid"], (part, answers)
        victim.unlink()
        away.rename(victim)
        here.close()
        wait_for(lambda: lab.health(domain)["valid"], "recovery")
    lab.create(domain)
    here = Outside(outside.path / "last")
    plant(root / "dom_md" / "ids", here)
    run(domain_attacks(lab, domain), here)
    here.close()
    lab.code("StorageDomain.detach", storagedomainID=domain, storagepoolID=lab.pool, force=True)
    del lab.servers[domain]


def test_a_planted_domain_is_not_found(lab: Lab, outside: Outside) -> None:
    """A directory of the storage that is a link to a whole, sound domain elsewhere."""
    stranger_id = str(uuid.uuid4())
    shutil.copytree(lab.root(local(lab)), outside.path / stranger_id)
    metadata = outside.path / stranger_id / "dom_md" / "metadata"
    metadata.write_bytes(metadata.read_bytes().replace(local(lab).encode(), stranger_id.encode()))
    link = lab.root(local(lab)).parent / stranger_id
    link.symlink_to(outside.path / stranger_id)
    outside.watch()
    try:
        lab.code("Host.getStorageDomains")
        for verb in ("getInfo", "getStats", "getImages", "validate"):
            assert lab.code(f"StorageDomain.{verb}", storagedomainID=stranger_id) != 0
        assert outside.touched() == []
    finally:
        link.unlink()


# -- bytes -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def post(lab: Lab) -> Iterator[Callable[[bytes], tuple[int, bytes]]]:
    """POST /jsonrpc over one connection after the other."""
    kept: list[http.client.HTTPSConnection] = []
    context = client_tls(lab.agent.dir / "pki")

    def send(body: bytes) -> tuple[int, bytes]:
        if not kept:
            kept.append(
                http.client.HTTPSConnection(
                    "127.0.0.1", lab.agent.port, timeout=60, context=context
                )
            )
        kept[0].request("POST", "/jsonrpc", body)
        response = kept[0].getresponse()
        answer = response.read()
        if response.will_close:
            kept.pop().close()
        return response.status, answer

    yield send
    for connection in kept:
        connection.close()


PING = b'{"jsonrpc":"2.0","method":"Host.ping2","params":{},"id":1}'
DEEP = 100_000
ODD_BODIES = {
    "deep lists": b"[" * DEEP,
    "deep closed lists": b"[" * DEEP + b"]" * DEEP,
    "deep objects": b'{"a":' * DEEP + b"1" + b"}" * DEEP,
    "deep params": PING.replace(b"{}", b'{"a":' * DEEP + b"1" + b"}" * DEEP),
    "deep id": PING.replace(b'"id":1', b'"id":' + b"[" * 900 + b"]" * 900),
    "huge number": PING.replace(b'"id":1', b'"id":' + b"9" * 100_000),
    "huge exponent": PING.replace(b'"id":1', b'"id":1e999999999'),
    "minus zero": PING.replace(b'"id":1', b'"id":-0.0'),
    "NaN": PING.replace(b'"id":1', b'"id":NaN'),
    "infinity": PING.replace(b"{}", b'{"a":Infinity}'),
    "twice": b'{"jsonrpc":"2.0","method":"Host.nothing","method":"Host.ping2","id":1,"id":2}',
    "not UTF-8": b'{"jsonrpc":"2.0","method":"\xff\xfe","id":1}',
    "half a surrogate": b'{"jsonrpc":"2.0","method":"\\ud800","id":"\\ud800"}',
    "NUL": b'{"jsonrpc":"2.0","method":"Host.ping2\\u0000","id":1}',
    "big batch": b"[" + b",".join([PING] * 20_000) + b"]",
    "batch of nothing": b"[" + b",".join([b"{}"] * 20_000) + b"]",
    "batch of lists": b"[" + b",".join([b"[]"] * 20_000) + b"]",
    "BOM": b"\xef\xbb\xbf" + PING,
    "UTF-16": PING.decode().encode("utf-16"),
    "empty": b"",
    "long method": b'{"jsonrpc":"2.0","method":"%s","id":1}' % (b"x" * 1_000_000),
    "inner verb": b'{"jsonrpc":"2.0","method":"rpc.invalid","params":{"reason":"x"},"id":1}',
    "dunder": b'{"jsonrpc":"2.0","method":"__class__","id":1}',
    "many keys": b'{"jsonrpc":"2.0","method":"Host.ping2","params":{%s},"id":1}'
    % b",".join(b'"k%d":0' % n for n in range(100_000)),
    "self": b'{"jsonrpc":"2.0","method":"Host.ping2","params":{"self":1,"call":2,"ctx":3},"id":1}',
}


@pytest.mark.parametrize("name", ODD_BODIES)
def test_odd_bodies(lab: Lab, post: Callable[[bytes], tuple[int, bytes]], name: str) -> None:
    before = lab.memory()
    status, answer = post(ODD_BODIES[name])
    assert status in (200, 204, 400, 413)
    if status == 200:
        json.loads(answer)
    assert json.loads(post(PING)[1])["result"] is True
    assert lab.memory() - before < 100 * MIB


SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=20),
    st.sampled_from(["Host.ping2", "Volume.getInfo", "Host.echo", "2.0", "params", "id"]),
)  # fmt: skip
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=12,
)
REQUESTS = st.fixed_dictionaries(
    {},
    optional={
        "jsonrpc": st.just("2.0") | VALUES,
        "method": st.sampled_from(sorted(set(VERBS) - {"Host.setLogLevel"})) | VALUES,
        "params": VALUES,
        "id": VALUES,
    },
)


def kept_alive(lab: Lab, post: Callable[[bytes], tuple[int, bytes]], body: bytes) -> None:
    status, answer = post(body)
    assert status in (200, 204, 400, 413)
    replies = json.loads(answer or b"[]")
    for reply in replies if isinstance(replies, list) else [replies]:
        assert ("error" in reply) != ("result" in reply)
        if "error" in reply:
            assert reply["error"]["code"] != -32603, reply  # something of ours broke
            assert "Traceback" not in reply["error"]["message"]


FUZZ = settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@FUZZ
@given(body=st.binary(max_size=400))
def test_fuzz_bytes(lab: Lab, post: Callable[[bytes], tuple[int, bytes]], body: bytes) -> None:
    kept_alive(lab, post, body)


@FUZZ
@given(value=REQUESTS | st.lists(REQUESTS, max_size=4) | VALUES)
def test_fuzz_requests(lab: Lab, post: Callable[[bytes], tuple[int, bytes]], value: Any) -> None:
    kept_alive(lab, post, json.dumps(value).encode())


@FUZZ
@given(data=st.binary(max_size=300), start=st.sampled_from([b"", STOMP, b"SEND\n", HTTP, b"\n"]))
def test_fuzz_port(lab: Lab, data: bytes, start: bytes) -> None:
    """Past TLS, anything at all: a connection ends or waits, the agent goes on."""
    context = client_tls(lab.agent.dir / "pki")
    with (
        socket.create_connection(("127.0.0.1", lab.agent.port), 20) as plain,
        context.wrap_socket(plain) as inner,
    ):
        inner.sendall(start + data)


def test_the_agent_is_well(lab: Lab) -> None:
    """After all that."""
    assert lab.memory() < 200 * MIB
    assert lab.client.call("Host.ping2") is True
    log = (lab.agent.dir / "agent.log").read_text(errors="replace")
    assert re.findall(r"Task exception was never retrieved|Fatal error|MemoryError", log) == []
    assert lab.code("StorageDomain.validate", storagedomainID=posix(lab)) == 0
    assert f"{lab.agent.dir}/data-center/mnt/" in Path("/proc/self/mountinfo").read_text()
