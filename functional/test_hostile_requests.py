# SPDX-License-Identifier: GPL-2.0-or-later
"""Requests that name what they must not, and bytes that are no requests."""

from __future__ import annotations

import http.client
import json
import re
import socket
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from functional.attacks import (
    hostile_lab,
    local,
    posix,
    stream,
)
from functional.engine.host import stream_headers
from functional.engine.wire import client_tls
from functional.pool_lab import (
    BLANK,
    COW,
    MIB,
    RAW,
    Lab,
    Volume,
    endpoint,
)
from functional.processes import AgentProcess
from vdsm_storage.rpc.client import RemoteError
from vdsm_storage.schema.loader import Schema
from vdsm_storage.verbs.tables import VERBS

INVALID_PARAMS = -32602
STOMP = b"CONNECT\naccept-version:1.2\n\n\0"
HTTP = b"GET /schema HTTP/1.1\r\nhost: a\r\n\r\n"


@pytest.fixture(scope="module")
def lab(workdir: Path, start_agent: Callable[..., AgentProcess]) -> Iterator[Lab]:
    with hostile_lab(workdir, start_agent) as made:
        yield made

# -- ids --------------------------------------------------------------------------------------


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


# Verbs that have an error of their own for it.
REFUSED = {"Host.registerSecrets": 72, "Host.unregisterSecrets": 72}


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
                if code != REFUSED.get(name, INVALID_PARAMS) and not optional:
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


INJECTED = [
    "a\nLEGALITY=ILLEGAL\nCAP=1\nEOF\n", "\rGEN=9\r\n", "\x0bGEN=9\x0cx", "\x1cGEN=9", "\x85GEN=9",
    "\u2028GEN=9\u2029", "\0GEN=9", "EOF", "=" * 300, "\u202e", "\U0001f4a3" * 300,
]  # fmt: skip


@pytest.mark.parametrize("text", INJECTED)
def test_texts_stay_in_their_line(lab: Lab, text: str) -> None:
    """A description becomes no key of the metadata, of a volume or of a domain."""
    for domain in (posix(lab), local(lab)):
        plain = lab.create(domain)
        where = Volume(domain, str(uuid.uuid4()), str(uuid.uuid4()))
        made = {**lab.ids(where), "size": 4 * MIB, "volFormat": COW, "preallocate": 2,
                "diskType": "DATA", "srcImgUUID": BLANK, "srcVolUUID": BLANK}  # fmt: skip
        if lab.task("Volume.create", **made, desc=text) != 0:
            where = plain
        lab.code("Volume.setDescription", **lab.ids(where), description=text)
        info = {key: value for key, value in endpoint(where).items() if key != "endpoint_type"}
        lab.job("SDM.update_volume", vol_info=info, vol_attr={"description": text})
        told = lab.call("Volume.getInfo", **lab.ids(where))
        usual = lab.call("Volume.getInfo", **lab.ids(plain))
        for key in ("legality", "capacity", "status", "voltype", "disktype"):
            assert told[key] == usual[key]
        assert told["generation"] <= 1
        bad = {**made, **lab.ids(Volume(domain, where.image, str(uuid.uuid4())))}
        assert lab.task("Volume.create", **{**bad, "diskType": "DATA" + text}, desc="") != 0
        lab.code("StorageDomain.setDescription", storagedomainID=domain, description=text)
        lab.code("StoragePool.setDescription", storagepoolID=lab.pool, description=text)
        assert lab.code("StorageDomain.validate", storagedomainID=domain) == 0
        assert lab.call("StorageDomain.getInfo", storagedomainID=domain)["pool"] == [lab.pool]


# -- bytes ------------------------------------------------------------------------------------



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


def faults(post: Callable[[bytes], tuple[int, bytes]], body: bytes) -> list[object]:
    """What no answer to any request may be."""
    status, answer = post(body)
    found: list[object] = [] if status in (200, 204, 400, 413) else [status]
    replies = json.loads(answer or b"[]")
    for reply in replies if isinstance(replies, list) else [replies]:
        error = reply.get("error", {"code": 0, "message": ""})
        # -32603: something of ours broke
        broken = error["code"] == -32603 or "Traceback" in error["message"]
        if broken or ("error" in reply) == ("result" in reply):
            found.append(reply)
    return found


FUZZ = settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@FUZZ
@given(body=st.binary(max_size=400))
def test_fuzz_bytes(post: Callable[[bytes], tuple[int, bytes]], body: bytes) -> None:
    assert faults(post, body) == []


@FUZZ
@given(value=REQUESTS | st.lists(REQUESTS, max_size=4) | VALUES)
def test_fuzz_requests(post: Callable[[bytes], tuple[int, bytes]], value: Any) -> None:
    assert faults(post, json.dumps(value).encode()) == []


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
    assert lab.agent.alive()


def test_the_agent_is_well(lab: Lab) -> None:
    """After all that."""
    assert lab.memory() < 200 * MIB
    assert lab.client.call("Host.ping2") is True
    log = (lab.agent.dir / "agent.log").read_text(errors="replace")
    assert re.findall(r"Task exception was never retrieved|Fatal error|MemoryError", log) == []
    assert lab.code("StorageDomain.validate", storagedomainID=posix(lab)) == 0
    assert f"{lab.agent.dir}/data-center/mnt/" in Path("/proc/self/mountinfo").read_text()
