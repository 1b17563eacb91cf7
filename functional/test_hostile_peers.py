# SPDX-License-Identifier: GPL-2.0-or-later
"""Peers with a certificate that behave badly: they do not read, do not speak, or vanish."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import ssl
import struct
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from functional.engine.wire import client_tls
from functional.pool_lab import BLANK, COW, MIB, Lab, Volume, local_server, make_lab, wait_for
from functional.processes import AgentProcess

REPLIES = "jms.topic.vdsm_responses"
CONNECT = b"CONNECT\naccept-version:1.2\nheart-beat:0,0\n\n\0"
LIMIT = 500  # connections
HANDSHAKE = 3.0  # seconds that the agent gives a newcomer here


@pytest.fixture(scope="module")
def lab(workdir: Path, start_agent: Callable[..., AgentProcess]) -> Iterator[Lab]:
    made = make_lab(start_agent("agent", tls__handshake_timeout=str(HANDSHAKE),
                                rpc__max_connections=str(LIMIT)))
    made.add_domain(local_server(workdir / "local"))
    made.call("Host.getCapabilities")
    yield made
    made.client.close()


@pytest.fixture(scope="module")
def context(lab: Lab) -> ssl.SSLContext:
    return client_tls(lab.agent.dir / "pki")


def subscribe() -> bytes:
    return f"SUBSCRIBE\nid:1\ndestination:{REPLIES}\nack:auto\n\n\0".encode()


def send(method: str, params: dict[str, Any]) -> bytes:
    request = {"jsonrpc": "2.0", "method": method, "params": params, "id": str(uuid.uuid4())}
    body = json.dumps(request).encode()
    head = (
        f"SEND\ndestination:jms.topic.vdsm_requests\nreply-to:{REPLIES}\n"
        f"content-length:{len(body)}\n\n"
    )
    return head.encode() + body + b"\0"


def dial(lab: Lab, receive: int | None = None) -> socket.socket:
    plain = socket.socket(socket.AF_INET)
    if receive is not None:
        plain.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive)
    plain.settimeout(30)
    plain.connect(("127.0.0.1", lab.agent.port))
    return plain


def open_stomp(lab: Lab, context: ssl.SSLContext, receive: int | None = None) -> ssl.SSLSocket:
    stream = context.wrap_socket(dial(lab, receive))
    stream.sendall(CONNECT + subscribe())
    got = b""
    while b"CONNECTED" not in got:
        got += stream.recv(4096)
    return stream


def works(lab: Lab) -> None:
    assert lab.call("Host.ping2") is True
    assert lab.call("Host.getStats")["storageDomains"]


@pytest.mark.parametrize("size", [100, 30_000])
def test_a_peer_that_does_not_read(lab: Lab, context: ssl.SSLContext, size: int) -> None:
    """2000 replies are due; what it leaves unread is bounded, and then it is disconnected."""
    before, peak = lab.memory(), 0
    stream = open_stomp(lab, context, receive=4096)
    frame = send("Host.echo", {"message": "x" * size})
    stream.settimeout(5)
    with contextlib.suppress(OSError, ssl.SSLError):  # a reset: it was disconnected
        for _ in range(2000):
            stream.sendall(frame)
            peak = max(peak, lab.memory())
    works(lab)
    peak = max(peak, lab.memory())
    assert peak - before < 80 * MIB
    if size > 1000:
        wait_for(lambda: "leaves more than" in log(lab), "the disconnection")
        assert is_closed(stream)
    stream.close()


def log(lab: Lab) -> str:
    return (lab.agent.dir / "agent.log").read_text(errors="replace")


def test_slow_storage_verbs_for_a_peer_that_does_not_read(
    lab: Lab, context: ssl.SSLContext
) -> None:
    """Replies that come later, from lanes."""
    before = lab.memory()
    stream = open_stomp(lab, context, receive=4096)
    stream.settimeout(5)
    frame = send("Host.getCapabilities", {})
    with contextlib.suppress(OSError, ssl.SSLError):
        for _ in range(500):
            stream.sendall(frame)
    works(lab)
    time.sleep(1)
    works(lab)
    assert lab.memory() - before < 100 * MIB
    stream.close()


def test_idle_peers_and_newcomers_that_never_arrive(lab: Lab, context: ssl.SSLContext) -> None:
    """Hundreds of idle connections, and hundreds that never finish their handshake."""
    before, descriptors = lab.memory(), lab.descriptors()
    hello = client_hello(context)
    with contextlib.ExitStack() as stack:
        idle = [stack.enter_context(open_stomp(lab, context)) for _ in range(470)]
        silent = [stack.enter_context(dial(lab)) for _ in range(150)]
        partial = [stack.enter_context(dial(lab)) for _ in range(150)]
        for number, each in enumerate(partial):
            with contextlib.suppress(OSError):  # the oldest go when there are too many
                each.sendall(hello[: 1 + number % len(hello)])
        # TLS is done, and then nothing is said
        secured = [stack.enter_context(context.wrap_socket(dial(lab))) for _ in range(30)]
        works(lab)
        with open_stomp(lab, context) as newcomer:
            newcomer.sendall(send("Host.ping2", {}))
            assert b'"result":true' in newcomer.recv(4096)
        assert lab.memory() - before < 300 * MIB
        for each in (*silent, *partial, *secured):
            assert is_closed(each)
        assert some_are_turned_away(lab, context, stack)
        works(lab)
        for each in idle[:: len(idle) // 10]:
            each.sendall(send("Host.ping2", {}))
            each.settimeout(30)
            got = b""
            while b'"result":true' not in got:
                got += each.recv(4096)
    wait_for(lambda: lab.descriptors() <= descriptors + 2, "the descriptors")
    with open_stomp(lab, context):
        works(lab)


def some_are_turned_away(
    lab: Lab, context: ssl.SSLContext, stack: contextlib.ExitStack
) -> bool:
    """Beyond the limit of connections; those that are there go on."""
    for _ in range(LIMIT):
        try:
            stack.enter_context(open_stomp(lab, context))
        except (OSError, ssl.SSLError):
            return True
    return False


def client_hello(context: ssl.SSLContext) -> bytes:
    outgoing = ssl.MemoryBIO()
    handshake = context.wrap_bio(ssl.MemoryBIO(), outgoing)
    with contextlib.suppress(ssl.SSLWantReadError):
        handshake.do_handshake()
    return outgoing.read()[:-1]


def is_closed(stream: socket.socket) -> bool:
    stream.settimeout(60)
    try:
        while stream.recv(4096):
            pass
    except TimeoutError:
        return False
    except OSError:
        return True
    return True


def vanish(stream: ssl.SSLSocket) -> None:
    """As a machine that loses its power and comes back: a reset, no good-bye."""
    stream.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    os.close(stream.detach())


def test_a_peer_that_asks_and_vanishes(lab: Lab, context: ssl.SSLContext) -> None:
    """What it asked for is done; nothing is left of it.

    A reset may overtake a request that was not read yet: then there is no task and no volume.
    """
    descriptors, threads = lab.descriptors(), lab.threads()
    domain = next(iter(lab.servers))
    wanted = [Volume(domain, str(uuid.uuid4()), str(uuid.uuid4())) for _ in range(60)]
    for where in wanted:
        stream = open_stomp(lab, context)
        request = {
            **lab.ids(where), "size": MIB, "volFormat": COW, "preallocate": 2, "diskType": "DATA",
            "desc": "", "srcImgUUID": BLANK, "srcVolUUID": BLANK,
        }  # fmt: skip
        stream.sendall(send("Volume.create", request))
        vanish(stream)

    def finished() -> bool:
        tasks = lab.call("Host.getAllTasksStatuses")
        made = [lab.code("Volume.getInfo", **lab.ids(where)) for where in wanted].count(0)
        ended = all(t["taskState"] == "finished" for t in tasks.values())
        return ended and 30 < made == len(tasks) == len(lab.call("Host.getAllTasksStatuses"))

    wait_for(finished, "the tasks")
    for task in lab.call("Host.getAllTasksStatuses"):
        lab.call("Task.clear", taskID=task)
    wait_for(lambda: lab.descriptors() <= descriptors + 2, "the descriptors")
    assert lab.threads() <= threads + 24
    works(lab)


def test_half_a_frame_and_gone(lab: Lab, context: ssl.SSLContext) -> None:
    descriptors = lab.descriptors()
    frame = send("Host.echo", {"message": "x" * 10_000})
    for end in (1, 10, 100, 5000, len(frame) - 1):
        stream = open_stomp(lab, context)
        stream.sendall(frame[:end])
        vanish(stream)
        upload = context.wrap_socket(dial(lab))
        upload.sendall(b"PUT / HTTP/1.1\r\nhost: x\r\ncontent-length: 1000000\r\n"[: end + 10])
        vanish(upload)
    wait_for(lambda: lab.descriptors() <= descriptors + 2, "the descriptors")
    works(lab)
    assert lab.descriptors() <= descriptors + 2
