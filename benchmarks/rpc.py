# SPDX-License-Identifier: GPL-2.0-or-later
"""What the wire costs, against a minimal asyncio STOMP echo in the same run.

- server CPU per Host.ping2, over TCP and over TLS
- 99th percentile of the answer's time with 100 connections
- a logged verb (Host.echo) against Host.ping2
- TLS connection set-up, up to CONNECTED, against a bare asyncio TLS server

CPU is what the kernel counted for the server's threads, so that other work on the machine matters
little; rounds of both servers alternate and the median ratio counts.

    benchmarks/rpc.py [--json]
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import selectors
import socket
import ssl
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import orjson

BIN = Path(sys.executable).parent
HELLO = b"CONNECT\naccept-version:1.2\nheart-beat:0,0\n\n\0"
SUBSCRIBE = b"SUBSCRIBE\ndestination:jms.queue.reply.%d\nid:replies\n\n\0"
ROUNDS = 9
# asyncio reads into a new quarter of a megabyte every time, which malloc may map and unmap each
# time, by chance.  Not so here: the echo shall not look worse than it is.
STEADY = {"MALLOC_TRIM_THRESHOLD_": str(2**30), "MALLOC_MMAP_THRESHOLD_": str(2**30)}


# -- the echo that the agent is compared with ---------------------------------------------------


class Echo(asyncio.Protocol):
    """The least that is still STOMP and JSON-RPC: frames out of bytes in any pieces, heart-beats
    skipped, who subscribed to what, `true` as the answer to every request."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport
        self.buffer = b""
        self.subscriptions: dict[str, str] = {}

    def data_received(self, data: bytes) -> None:
        self.buffer = (self.buffer + data).lstrip(b"\n")
        while (end := self.buffer.find(b"\n\n")) >= 0:
            command, *lines = self.buffer[:end].decode().split("\n")
            headers: dict[str, str] = {}
            for line in lines:
                key, _colon, value = line.partition(":")
                headers.setdefault(key, value)
            body_end = end + 2 + int(headers.get("content-length", 0))
            if len(self.buffer) <= body_end:
                return
            assert self.buffer[body_end] == 0
            body = self.buffer[end + 2 : body_end]
            self.buffer = self.buffer[body_end + 1 :].lstrip(b"\n")
            self.frame(command, headers, body)

    def frame(self, command: str, headers: dict[str, str], body: bytes) -> None:
        if command == "SEND":
            request = orjson.loads(body)
            reply = orjson.dumps({"jsonrpc": "2.0", "id": request["id"], "result": True})
            to = headers["reply-to"]
            head = (
                f"MESSAGE\ndestination:{to}\ncontent-type:application/json\n"
                f"subscription:{self.subscriptions[to]}\ncontent-length:{len(reply)}\n\n"
            )
            self.transport.write(head.encode() + reply + b"\0")
        elif command == "SUBSCRIBE":
            self.subscriptions[headers["destination"]] = headers["id"]
        elif command == "CONNECT":
            self.transport.write(b"CONNECTED\nversion:1.2\nheart-beat:0,0\n\n\0")


async def serve_echo(pki: str) -> None:
    context = None
    if pki:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.verify_mode = ssl.CERT_REQUIRED
        context.load_cert_chain(f"{pki}/certs/vdsmcert.pem", f"{pki}/keys/vdsmkey.pem")
        context.load_verify_locations(f"{pki}/certs/cacert.pem")
    loop = asyncio.get_running_loop()
    server = await loop.create_server(Echo, "127.0.0.1", 0, ssl=context, backlog=512)
    print("ready", server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


# -- servers as processes -------------------------------------------------------------------------


class Server:
    def __init__(self, arguments: list[str], context: ssl.SSLContext | None = None) -> None:
        environment = {**os.environ, **STEADY}
        self.process = subprocess.Popen(
            arguments, stdout=subprocess.PIPE, text=True, env=environment
        )
        self.context = context
        line = self.process.stdout.readline().split()
        if line[:1] != ["ready"]:
            raise SystemExit(f"{arguments[0]} did not start")
        self.port = int(line[1])

    def cpu(self) -> float:
        """Seconds that all threads have run."""
        total = 0
        for task in Path(f"/proc/{self.process.pid}/task").iterdir():
            with contextlib.suppress(FileNotFoundError):
                total += int((task / "schedstat").read_text().split()[0])
        return total / 1e9

    def connect(self) -> socket.socket:
        stream = socket.create_connection(("127.0.0.1", self.port), 30)
        stream.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return self.context.wrap_socket(stream) if self.context else stream

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait(60)


@contextlib.contextmanager
def servers() -> Iterator[dict[str, Server]]:
    """Agent and echo, each over TCP and over TLS."""
    made: dict[str, Server] = {}
    with tempfile.TemporaryDirectory(prefix="bench-rpc.") as directory:
        try:
            daemon = str(BIN / "vdsm-storaged")
            made["agent"] = Server([daemon, "--dev", f"{directory}/plain", "--no-tls"])
            made["agent tls"] = Server([daemon, "--dev", f"{directory}/tls"])
            pki = f"{directory}/tls/pki"
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
            context.check_hostname = False
            context.load_cert_chain(f"{pki}/certs/clientcert.pem", f"{pki}/keys/clientkey.pem")
            context.load_verify_locations(f"{pki}/certs/cacert.pem")
            made["agent tls"].context = context
            echo = [sys.executable, "-P", __file__, "--echo"]
            made["echo"] = Server([*echo, ""])
            made["echo tls"] = Server([*echo, pki], context)
            yield made
        finally:
            for server in made.values():
                server.stop()


# -- load -----------------------------------------------------------------------------------------


def request(number: int, verb: str, params: dict[str, str]) -> bytes:
    """A request as the Java client frames it."""
    body = orjson.dumps(
        {
            "jsonrpc": "2.0",
            "method": verb,
            "params": params,
            "id": "6d6a4dd8-4b4f-4b9e-9a5e-0f1a2b3c4d5e",
        }
    )
    return (
        b"SEND\ndestination:jms.topic.vdsm_requests\nreply-to:jms.queue.reply.%d\n"
        b"content-type:application/json\novirtCorrelationId:4f2b7a10\ncontent-length:%d\n\n%b\0"
        % (number, len(body), body)
    )


class Load:
    """Connections that each have one request outstanding."""

    def __init__(self, server: Server, connections: int) -> None:
        self.server = server
        self.streams = [server.connect() for _ in range(connections)]
        for number, stream in enumerate(self.streams):
            stream.sendall(HELLO + SUBSCRIBE % number)
            assert stream.recv(4096).startswith(b"CONNECTED")

    def cpu(self, verb: str, params: dict[str, str], rounds: int) -> float:
        """Server CPU seconds a request.

        All connections send one, then nobody waits on a socket until the server has answered: so
        the server is never charged for waking the client up, however fast either of them is.
        """
        frames = [request(n, verb, params) for n in range(len(self.streams))]
        before = self.server.cpu()
        for _ in range(rounds):
            for stream, frame in zip(self.streams, frames, strict=True):
                stream.sendall(frame)
            time.sleep(len(frames) * 200e-6)
            for stream in self.streams:
                check(stream.recv(65536))
        return (self.server.cpu() - before) / (rounds * len(frames))

    def p99(self, verb: str, requests: int) -> float:
        """Seconds within which 99 of 100 answers come; each connection has one outstanding."""
        selector = selectors.EpollSelector()
        frames = [request(n, verb, {}) for n in range(len(self.streams))]
        sent = [0.0] * len(self.streams)
        times: list[float] = []
        for number, stream in enumerate(self.streams):
            selector.register(stream, selectors.EVENT_READ, number)
            sent[number] = time.perf_counter()
            stream.sendall(frames[number])
        while len(times) < requests:
            for key, _events in selector.select():
                number = key.data
                check(key.fileobj.recv(65536))
                now = time.perf_counter()
                times.append(now - sent[number])
                sent[number] = now
                key.fileobj.sendall(frames[number])
        for stream in self.streams:
            check(stream.recv(65536))
        selector.close()
        return sorted(times)[int(len(times) * 0.99)]

    def close(self) -> None:
        for stream in self.streams:
            stream.close()


def check(data: bytes) -> None:
    assert data.endswith(b"\0"), data
    assert b'"result":' in data, data


def set_up(server: Server, count: int) -> float:
    """Server CPU seconds for one connection until it is CONNECTED."""
    before = server.cpu()
    for _ in range(count):
        with server.connect() as stream:
            stream.sendall(HELLO)
            assert stream.recv(4096).startswith(b"CONNECTED")
    return (server.cpu() - before) / count


# -- measures -------------------------------------------------------------------------------------


def ratio(mine: Callable[[], float], base: Callable[[], float]) -> tuple[float, float]:
    """Medians over alternating rounds: (mine / base, mine)."""
    pairs = [(mine(), base()) for _ in range(ROUNDS)]
    if "-v" in sys.argv:
        print([f"{a * 1e6:.1f}/{b * 1e6:.1f}" for a, b in pairs], file=sys.stderr)
    return statistics.median(a / b for a, b in pairs), statistics.median(a for a, _ in pairs)


def measure(name: str, value: float, unit: str, limit: float) -> dict[str, object]:
    return {
        "name": name,
        "value": round(value, 3),
        "unit": unit,
        "limit": limit,
        "ok": value <= limit,
    }


def ping2(made: dict[str, Server], kind: str, limit: float) -> list[dict[str, object]]:
    """CPU of ping2 over TCP or TLS; over TCP that of a logged verb, too."""
    agent, echo = Load(made["agent" + kind], 20), Load(made["echo" + kind], 20)
    text = {"message": "hello"}
    for load in (agent, echo):
        load.cpu("Host.ping2", {}, 50)  # warm
    times, cost = ratio(
        lambda: agent.cpu("Host.ping2", {}, 150), lambda: echo.cpu("Host.ping2", {}, 150)
    )
    over = "TLS" if kind else "TCP"
    print(f"ping2 over {over}: {cost * 1e6:.1f} us of server CPU", file=sys.stderr)
    measures = [measure(f"server CPU of Host.ping2 over {over}", times, "x echo", limit)]
    if not kind:
        agent.cpu("Host.echo", text, 50)
        times, cost = ratio(
            lambda: agent.cpu("Host.echo", text, 150), lambda: agent.cpu("Host.ping2", {}, 150)
        )
        print(f"a logged verb: {cost * 1e6:.1f} us of server CPU", file=sys.stderr)
        measures.append(measure("server CPU of a logged verb", times, "x ping2", 1.5))
    agent.close()
    echo.close()
    return measures


def run(made: dict[str, Server]) -> list[dict[str, object]]:
    measures = ping2(made, "", 3.0) + ping2(made, " tls", 2.0)
    agent, echo = Load(made["agent"], 100), Load(made["echo"], 100)
    times, cost = ratio(lambda: agent.p99("Host.ping2", 5000), lambda: echo.p99("Host.ping2", 5000))
    print(f"p99 with 100 connections: {cost * 1e3:.2f} ms", file=sys.stderr)
    measures.append(measure("p99 with 100 connections", times, "x echo", 4.0))
    agent.close()
    echo.close()
    times, cost = ratio(
        lambda: set_up(made["agent tls"], 40), lambda: set_up(made["echo tls"], 40)
    )
    print(f"TLS set-up: {cost * 1e3:.2f} ms of server CPU", file=sys.stderr)
    measures.append(measure("TLS connection set-up", times, "x bare TLS", 3.0))
    return measures


def main() -> int:
    if sys.argv[1:2] == ["--echo"]:
        with contextlib.suppress(KeyboardInterrupt):
            asyncio.run(serve_echo(sys.argv[2]))
        return 0
    with servers() as made:
        measures = run(made)
    if "--json" in sys.argv[1:]:
        print(json.dumps({"measures": measures}, indent=4))
    else:
        for row in measures:
            mark = "ok" if row["ok"] else "NOT OK"
            value = f"{row['value']:8.2f} {row['unit']:11} <= {row['limit']}"
            print(f"{row['name']:36} {value}  {mark}")
    return 0 if all(row["ok"] for row in measures) else 1


if __name__ == "__main__":
    sys.exit(main())
