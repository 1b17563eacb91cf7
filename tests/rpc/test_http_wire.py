# SPDX-License-Identifier: GPL-2.0-or-later
"""HTTP on the agent's port: JSON-RPC, the schema, health, image streams, and bad requests."""

from __future__ import annotations

import http.client
import json
import threading
from collections.abc import Mapping
from typing import Any

import pytest

from tests.rpc.conftest import Peer, Start, Wire, rpc, wait_for
from vdsm_storage.errors import InvalidParameter
from vdsm_storage.rpc import streams


def ask(
    wire: Wire,
    method: str,
    path: str,
    body: bytes | None = None,
    headers: Mapping[str, str] | None = None,
) -> tuple[int, Mapping[str, str], bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", wire.port, timeout=20)
    if wire.client_context is not None:
        connection = http.client.HTTPSConnection(
            "127.0.0.1", wire.port, timeout=20, context=wire.client_context
        )
    connection.request(method, path, body, dict(headers or {}))
    response = connection.getresponse()
    out = response.status, {k.lower(): v for k, v in response.getheaders()}, response.read()
    connection.close()
    return out


def post(wire: Wire, body: object, headers: Mapping[str, str] | None = None) -> Any:
    status, _headers, data = ask(wire, "POST", "/jsonrpc", json.dumps(body).encode(), headers)
    assert status == 200
    return json.loads(data)


@pytest.mark.parametrize("secure", [False, True])
def test_jsonrpc(start: Start, secure: bool) -> None:
    wire = start(secure=secure)
    wire.probe.gate.set()
    assert post(wire, rpc("Host.echo", {"message": "x"}))["result"] == "x"
    assert post(wire, rpc("Host.getAllTasksInfo"))["result"] == {}
    assert post(wire, rpc("Host.noSuchVerb"))["error"]["code"] == -32601
    batch = [rpc("Host.ping2", number=number) for number in (1, 2)]
    assert [reply["id"] for reply in post(wire, batch)] == [1, 2]


def test_the_flow_id_header(wire: Wire) -> None:
    error = post(wire, rpc("Host.getHardwareInfo"), {"Flow-Id": "flow-5"})["error"]
    assert "flow-5" in error["message"]


def test_notifications_have_no_content(wire: Wire) -> None:
    body = json.dumps(rpc("Host.echo", {"message": "x"}, None)).encode()
    status, _headers, data = ask(wire, "POST", "/jsonrpc", body)
    assert (status, data) == (204, b"")
    assert wire.probe.calls == [("echo", "x")]


def test_schema_and_health(wire: Wire) -> None:
    status, headers, body = ask(wire, "GET", "/schema")
    assert (status, headers["content-type"]) == (200, "application/json")
    assert json.loads(body) == {"openrpc": "1.2.6"}
    assert ask(wire, "GET", "/healthz")[0] == 200
    wire.probe.ready = False
    status, _headers, body = ask(wire, "GET", "/healthz")
    assert (status, json.loads(body)) == (503, {"ready": False})


def test_head_has_no_body(wire: Wire) -> None:
    status, headers, body = ask(wire, "HEAD", "/healthz")
    assert (status, body) == (200, b"")
    assert int(headers["content-length"]) > 0


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/nothing", 404),
        ("GET", "/../etc/passwd", 404),
        ("GET", "/jsonrpc", 405),
        ("POST", "/schema", 405),
        ("DELETE", "/", 405),
        ("PUT", "/", 501),
        ("GET", "/", 501),
    ],
)
def test_what_is_not_served(wire: Wire, method: str, path: str, status: int) -> None:
    body = b"x" if method in ("PUT", "POST") else None
    found, headers, data = ask(wire, method, path, body)
    assert found == status
    assert set(json.loads(data)["status"]) == {"code", "message"}
    assert ("allow" in headers) == (status == 405)


def test_keep_alive_and_pipelining(wire: Wire) -> None:
    get = b"GET /healthz HTTP/1.1\r\nhost: x\r\n\r\n"
    with wire.peer() as peer:
        peer.send(get)
        assert peer.raw(0.2).count(b"HTTP/1.1 200") == 1
        peer.send(get * 3)
        assert peer.raw(0.3).count(b"HTTP/1.1 200") == 3
        peer.send(get.replace(b"host: x", b"host: x\r\nconnection: close"))
        assert peer.raw(5).count(b"HTTP/1.1 200") == 1
        assert peer.closed()


def test_one_request_at_a_time(wire: Wire) -> None:
    """What is pipelined behind a slow one waits for it."""
    body = json.dumps(rpc("Host.getAllTasksInfo")).encode()
    head = b"POST /jsonrpc HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % len(body)
    with wire.peer() as peer:
        peer.send(head + body + b"GET /healthz HTTP/1.1\r\nhost: x\r\n\r\n")
        assert peer.raw(0.2) == b""
        wire.probe.gate.set()
        answer = peer.raw(1.0)
        assert answer.index(b'"result":{}') < answer.index(b'"ready"')


def test_chunked_bodies_and_continue(wire: Wire) -> None:
    body = json.dumps(rpc("Host.ping2")).encode()
    with wire.peer() as peer:
        peer.send(b"POST /jsonrpc HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n")
        peer.send(b"5\r\n%b\r\n%x\r\n%b\r\n0\r\n\r\n" % (body[:5], len(body) - 5, body[5:]))
        assert b'"result":true' in peer.raw(1.0)
        peer.send(b"POST /jsonrpc HTTP/1.1\r\nhost: x\r\nexpect: 100-continue\r\n")
        peer.send(b"content-length: %d\r\n\r\n" % len(body))
        assert peer.raw(0.3).startswith(b"HTTP/1.1 100")
        peer.send(body)
        assert b'"result":true' in peer.raw(1.0)


@pytest.mark.parametrize(
    ("data", "status"),
    [
        (b"GET /healthz HTTP/1.1\r\n\r\n", b"400"),  # no host
        (b"GET / nonsense\r\n\r\n", b"400"),
        (b"GET /healthz HTTP/1.1\r\nhost: x\r\nbad header\r\n\r\n", b"400"),
        (b"POST /jsonrpc HTTP/1.1\r\nhost: x\r\ncontent-length: -1\r\n\r\n", b"400"),
        (b"POST /jsonrpc HTTP/1.1\r\nhost: x\r\ncontent-length: 99999999\r\n\r\n", b"413"),
        (b"GET /healthz HTTP/1.1\r\nhost: x\r\nlong: " + b"x" * 70_000, b"431"),
    ],
)
def test_bad_requests(wire: Wire, data: bytes, status: bytes) -> None:
    with wire.peer() as peer:
        peer.send(data)
        assert peer.raw(5.0).startswith(b"HTTP/1.1 " + status)
        assert peer.closed()


def test_a_chunked_body_that_is_too_large(start: Start) -> None:
    wire = start(max_frame=10_000)
    with wire.peer() as peer:
        peer.send(b"POST /jsonrpc HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n")
        peer.send((b"1000\r\n" + b"x" * 4096 + b"\r\n") * 3)
        assert peer.raw(5.0).startswith(b"HTTP/1.1 413")


def test_a_peer_that_leaves_in_the_middle(wire: Wire) -> None:
    with wire.peer() as peer:
        peer.send(b"POST /jsonrpc HTTP/1.1\r\nhost: x\r\ncontent-length: 10\r\n\r\nabc")
        wait_for(lambda: wire.listener.connections == 1)
    wait_for(lambda: wire.listener.connections == 0)
    with wire.peer() as another:
        another.send(b"GET /healthz HTTP/1.1\r\nhost: x\r\n\r\n")
        assert another.raw(5.0).startswith(b"HTTP/1.1 200")


# -- image streams --------------------------------------------------------------------------------


class Memory:
    """An image kept in memory, in the place of a volume."""

    def __init__(self) -> None:
        self.data = bytearray()
        self.headers: Mapping[str, str] = {}
        self.events: list[str] = []
        self.fail = ""
        self.gate = threading.Event()
        self.gate.set()
        self.task_id = "6f0c"
        self.length = 0
        self._at = 0

    def open_upload(self, headers: Mapping[str, str], length: int) -> streams.Upload:
        self.headers = headers
        if self.fail == "open":
            raise InvalidParameter(name="Image-Id", value="x", reason="there is none")
        return self

    def open_download(self, headers: Mapping[str, str], length: int) -> streams.Download:
        self.headers = headers
        self.length, self._at = min(length, len(self.data)), 0
        return self

    def write(self, data: bytes) -> None:
        assert self.gate.wait(20)
        if self.fail == "write":
            raise OSError("the disk is gone")
        self.data += data

    def finish(self) -> None:
        self.events.append("finish")

    def abort(self) -> None:
        self.events.append("abort")

    def read(self, size: int) -> bytes:
        if self.fail == "read":
            raise OSError("the disk is gone")
        self._at += size
        return bytes(self.data[self._at - size : self._at])

    def close(self) -> None:
        self.events.append("close")


IMAGE = {"Storage-Pool-Id": "p", "Storage-Domain-Id": "d", "Image-Id": "i", "Volume-Id": "v"}


@pytest.mark.parametrize("secure", [False, True])
def test_upload_and_download(start: Start, secure: bool) -> None:
    memory = Memory()
    wire = start(secure=secure, streams=memory)
    data = bytes(range(256)) * 20_000
    status, headers, _body = ask(wire, "PUT", "/", data, IMAGE)
    assert (status, headers["task-id"]) == (200, "6f0c")
    assert memory.data == data
    assert memory.headers["image-id"] == "i"
    assert memory.events == ["finish"]
    status, headers, body = ask(wire, "GET", "/", None, {**IMAGE, "Range": "bytes=0-999999"})
    assert (status, headers["task-id"]) == (206, "6f0c")
    assert headers["content-range"].startswith("bytes 0-999999/")
    assert body == data[:1_000_000]
    wait_for(lambda: memory.events == ["finish", "close"])


@pytest.mark.parametrize(
    ("method", "drop", "extra", "status"),
    [
        ("PUT", "Image-Id", {}, 400),
        ("GET", "Storage-Domain-Id", {"Range": "bytes=0-1"}, 400),
        ("GET", "", {}, 400),
        ("GET", "", {"Range": "bytes=5-9"}, 416),
        ("GET", "", {"Range": "lines=0-9"}, 416),
    ],
)
def test_headers_of_a_stream(
    start: Start, method: str, drop: str, extra: Mapping[str, str], status: int
) -> None:
    wire = start(streams=Memory())
    headers = {**{key: value for key, value in IMAGE.items() if key != drop}, **extra}
    assert ask(wire, method, "/", b"x" if method == "PUT" else None, headers)[0] == status


def test_a_length_is_required(start: Start) -> None:
    wire = start(streams=Memory())
    head = "".join(f"{key}: {value}\r\n" for key, value in IMAGE.items())
    for extra in ("", "transfer-encoding: chunked\r\n"):
        with wire.peer() as peer:
            peer.send(f"PUT / HTTP/1.1\r\nhost: x\r\n{head}{extra}\r\n".encode())
            assert peer.raw(5.0).startswith(b"HTTP/1.1 411")


@pytest.mark.parametrize("where", ["open", "write"])
def test_a_failed_upload(start: Start, where: str) -> None:
    memory = Memory()
    memory.fail = where
    wire = start(streams=memory)
    status, _headers, body = ask(wire, "PUT", "/", b"x" * 1000, IMAGE)
    assert status == 500
    assert set(json.loads(body)["status"]) == {"code", "message"}
    wait_for(lambda: memory.events == (["abort"] if where == "write" else []))


def test_a_failed_download_is_cut_off(start: Start) -> None:
    memory = Memory()
    memory.data += b"x" * 1000
    memory.fail = "read"
    wire = start(streams=memory)
    with pytest.raises((http.client.IncompleteRead, ConnectionError)):
        ask(wire, "GET", "/", None, {**IMAGE, "Range": "bytes=0-999"})
    wait_for(lambda: memory.events == ["close"])


def test_a_peer_that_leaves_in_the_middle_of_an_upload(start: Start) -> None:
    memory = Memory()
    wire = start(streams=memory)
    head = "".join(f"{key}: {value}\r\n" for key, value in IMAGE.items())
    with wire.peer() as peer:
        peer.send(f"PUT / HTTP/1.1\r\nhost: x\r\n{head}content-length: 1000\r\n\r\nxxx".encode())
        wait_for(lambda: memory.data)
    wait_for(lambda: memory.events == ["abort"])
    assert bytes(memory.data) == b"xxx"


def test_a_slow_disk_stops_the_reading(start: Start) -> None:
    """Bytes that came and are not written are bounded."""
    memory = Memory()
    memory.gate.clear()
    wire = start(streams=memory)
    size = 40 * 1024 * 1024
    head = "".join(f"{key}: {value}\r\n" for key, value in IMAGE.items())
    with wire.peer() as peer:
        peer.send(f"PUT / HTTP/1.1\r\nhost: x\r\n{head}content-length: {size}\r\n\r\n".encode())
        sent = fill(peer, size)
        assert sent < size
        memory.gate.set()
        peer.socket.settimeout(20)
        peer.send(b"x" * (size - sent))
        assert peer.raw(5.0).startswith(b"HTTP/1.1 200")
    assert len(memory.data) == size


def fill(peer: Peer, size: int) -> int:
    """Send until nothing goes any more."""
    peer.socket.settimeout(0.5)
    sent = 0
    try:
        while sent < size:
            sent += peer.socket.send(b"x" * min(65536, size - sent))
    except TimeoutError:
        pass
    return sent


def test_a_slow_reader_of_a_download(start: Start) -> None:
    memory = Memory()
    size = 30 * 1024 * 1024
    memory.data += b"y" * size
    wire = start(streams=memory)
    head = "".join(f"{key}: {value}\r\n" for key, value in IMAGE.items())
    with wire.peer() as peer:
        request = f"GET / HTTP/1.1\r\nhost: x\r\n{head}range: bytes=0-{size}\r\n\r\n"
        peer.send(request.encode())
        peer.socket.settimeout(5)
        got = len(peer.socket.recv(100))
        wait_for(lambda: memory._at > 0)
        threading.Event().wait(0.3)
        assert memory._at < size, "no more is read than the peer takes"
        while got < size:
            got += len(peer.socket.recv(1 << 20))
    wait_for(lambda: memory.events == ["close"])
