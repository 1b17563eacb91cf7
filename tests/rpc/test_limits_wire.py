# SPDX-License-Identifier: GPL-2.0-or-later
"""Bounds: slow and dead peers, large frames, many requests, fairness, connections."""

from __future__ import annotations

import contextlib
import functools
import resource
import socket
import time

import pytest

from tests.rpc.conftest import REPLIES, Peer, Start, Wire, request, rpc, wait_for
from vdsm_storage.rpc import listener
from vdsm_storage.rpc.client import Client
from vdsm_storage.rpc.session import Limits


def test_a_thousand_outstanding_requests_are_all_answered(wire: Wire) -> None:
    with wire.peer() as peer:
        peer.connect()
        peer.request(*[rpc("Host.getAllTasksInfo", number=n) for n in range(1500)])
        assert peer.call("Host.ping2", number="ping")["id"] == "ping"
        wire.probe.gate.set()
        replies = [peer.reply() for _ in range(1500)]
        assert {reply["id"] for reply in replies} == set(range(1500))
        assert all("result" in reply for reply in replies)


def test_beyond_the_bound_the_answer_is_1100(start: Start) -> None:
    wire = start(max_outstanding=1000)
    with wire.peer() as peer, wire.peer() as other:
        peer.connect(), other.connect(replies="other")
        peer.request(*[rpc("Host.getAllTasksInfo", number=n) for n in range(1003)])
        refused = [peer.reply() for _ in range(3)]
        assert [reply["id"] for reply in refused] == [1000, 1001, 1002]
        assert all(reply["error"]["code"] == 1100 for reply in refused)
        other.request(rpc("Host.getAllTasksInfo", number="other"), reply_to="other")
        wire.probe.gate.set()
        assert other.reply()["result"] == {}, "the bound is each connection's own"
        assert all("result" in peer.reply() for _ in range(1000))
        assert peer.call("Host.getAllTasksInfo")["result"] == {}, "there is room again"


def test_clients_of_a_lane_take_turns(wire: Wire) -> None:
    """One that asks for a thousand things does not keep another waiting for all of them."""
    with wire.peer() as greedy, wire.peer() as modest:
        greedy.connect(replies="greedy"), modest.connect(replies="modest")
        many = [rpc("Host.getAllTasksInfo", number=n) for n in range(1000)]
        greedy.request(*many, reply_to="greedy")
        wait_for(lambda: len(wire.probe.calls) == 4)  # as many as the lane runs at a time
        few = [rpc("Host.getAllTasksInfo", number=n) for n in range(5)]
        modest.request(*few, reply_to="modest")
        assert modest.silent(0.1)
        wire.probe.gate.set()
        for _ in range(5):
            assert modest.reply()["result"] == {}
        names = [name for name, _params in wire.probe.calls]
        others = [index for index, name in enumerate(names) if name != names[0]]
        assert len(others) == 5
        assert others[-1] < 30, "they were served among the first"
        for _ in range(1000):
            greedy.reply()


def test_a_flood_on_one_connection_leaves_others_alive(wire: Wire) -> None:
    with wire.peer() as flood, wire.peer() as other:
        flood.connect(replies="flood"), other.connect(replies="other")
        frames = request(rpc("Host.ping2"), "flood") * 20
        flood.socket.settimeout(0.0)
        answered = 0
        for _ in range(50):
            with contextlib.suppress(BlockingIOError):
                flood.socket.send(frames)
            other.request(rpc("Host.ping2", number="x"), reply_to="other")
            answered += other.reply()["result"]
        assert answered == 50


def rss() -> int:
    """Kilobytes that this process, the server included, has now."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize() // 1024


def never_reads(wire: Wire, topic: str) -> Peer:
    peer = Peer.__new__(Peer)
    peer.socket = socket.socket()
    peer.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    peer.socket.connect(("127.0.0.1", wire.port))
    peer.send(b"CONNECT\naccept-version:1.2\n\n\0")
    peer.send(f"SUBSCRIBE\ndestination:{topic}\nid:1\n\n\0".encode())
    wait_for(lambda: wire.broker.subscribers(topic) == 1)
    return peer


def test_a_peer_that_does_not_read_is_disconnected(start: Start) -> None:
    wire = start(max_output=1024 * 1024)
    with never_reads(wire, "deaf"), wire.peer() as peer:
        peer.connect()
        before = rss()
        message = "x" * 60_000
        for _ in range(2000):
            if wire.broker.subscribers("deaf") == 0:
                break
            peer.request(rpc("Host.echo", {"message": message}), reply_to="deaf")
        wait_for(lambda: wire.broker.subscribers("deaf") == 0)
        assert peer.call("Host.ping2")["result"] is True
        assert rss() - before < 32 * 1024


def test_a_peer_that_does_not_read_events_is_disconnected(start: Start) -> None:
    wire = start(max_output=1024 * 1024)
    with never_reads(wire, "jms.queue.events"):
        for _ in range(2000):
            wire.broker.publish_event("|test|big|1", {"text": "x" * 10_000})
            if wire.broker.subscribers("jms.queue.events") == 0:
                break
            time.sleep(0.0005)
        wait_for(lambda: wire.broker.subscribers("jms.queue.events") == 0)
    wait_for(lambda: wire.listener.connections == 0)
    assert wire.broker.subscribers("jms.queue.events") == 0


@pytest.mark.parametrize("secure", [False, True])
def test_a_peer_that_reads_nothing_for_long_is_disconnected(
    start: Start, secure: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even when little waits for it; one that reads slowly is not."""
    monkeypatch.setattr(listener, "Limits", functools.partial(Limits, patience=0.5))
    wire = start(secure=secure)
    message = "x" * 2_000_000
    with wire.peer() as deaf, wire.peer() as slow:
        for peer, topic in ((deaf, "deaf"), (slow, "slow")):
            peer.connect(replies=topic)
            peer.request(*[rpc("Host.echo", {"message": message})] * 5, reply_to=topic)
        slow.socket.settimeout(10)
        got = 0
        while got < 10_000_000:
            got += len(slow.socket.recv(16_384))
            time.sleep(0.002)
        wait_for(lambda: wire.broker.subscribers("deaf") == 0)
        assert wire.broker.subscribers("slow") == 1


def test_a_frame_that_is_too_large(start: Start) -> None:
    """ERROR as soon as the length is known, and the end; nothing of it is kept."""
    wire = start(max_frame=100_000)
    with wire.peer() as peer:
        peer.connect()
        peer.send(request(rpc("Host.echo", {"message": "x" * 90_000})))
        assert len(peer.reply()["result"]) == 90_000
        peer.send(b"SEND\ndestination:a\ncontent-length:100001\n\n")
        assert b"100000" in peer.frame().body
        assert peer.closed()
    with wire.peer() as peer:
        peer.connect()
        with contextlib.suppress(OSError):
            for _ in range(100):
                peer.send(b"SEND\n\n" if _ == 0 else b"x" * 10_000)
        assert peer.closed()


def test_large_frames_in_bounded_memory(wire: Wire) -> None:
    with wire.peer() as peer:
        peer.connect()
        message = "x" * (3 * 1024 * 1024)
        assert peer.call("Host.echo", {"message": message})["result"] == message


def test_no_more_is_read_while_too_many_bytes_are_outstanding(wire: Wire) -> None:
    """Requests of megabytes that wait in a lane stop the reading, not the agent."""
    big = rpc("Host.getAllTasksInfo", {"extra": "x" * 3_900_000})
    with wire.peer() as peer, wire.peer() as other:
        peer.connect(replies="big"), other.connect(replies="other")
        data = request(big, "big")
        peer.socket.settimeout(1.0)
        sent = 0
        with contextlib.suppress(TimeoutError):
            for _ in range(40):
                peer.send(data)
                sent += 1
        assert 5 <= sent < 30
        other.request(rpc("Host.ping2"), reply_to="other")
        assert other.reply()["result"] is True
        wire.probe.gate.set()
        for _ in range(sent):
            assert peer.frame().command == "MESSAGE"


def test_connections_are_bounded(start: Start) -> None:
    wire = start(max_connections=5)
    peers = [wire.peer() for _ in range(5)]
    for peer in peers:
        peer.connect()
    with wire.peer() as late:
        assert late.closed()
    peers.pop().socket.close()
    wait_for(lambda: wire.listener.connections == 4)
    with wire.peer() as peer:
        peer.connect()
    for peer in peers:
        peer.socket.close()


def test_undecided_connections_end(start: Start) -> None:
    wire = start(handshake_timeout=0.5)
    with wire.peer() as mute, wire.peer() as slow, wire.peer() as good:
        slow.send(b"CONN")
        good.connect()
        assert mute.closed(5)
        assert slow.closed(5)
        assert good.call("Host.ping2")["result"] is True


def test_newcomers_cannot_keep_others_out(start: Start) -> None:
    """The oldest of those that say nothing goes when there are too many."""
    wire = start()
    mute = [wire.peer() for _ in range(250)]
    with wire.peer() as peer:
        peer.connect()
        assert peer.call("Host.ping2")["result"] is True
    assert mute[0].closed()
    for one in mute:
        one.socket.close()


def test_neither_stomp_nor_http(wire: Wire) -> None:
    for first in (b"HELLO WORLD\n", b"\x16\x03\x01\x02\0\x01", b"\0\0\0\0", b"SENDX\n", b"get /"):
        with wire.peer() as peer:
            peer.send(first)
            assert peer.raw(2.0) == b""
            assert peer.closed()


def test_subscriptions_of_a_lost_connection_go(wire: Wire) -> None:
    with wire.peer() as peer:
        peer.connect()
        wait_for(lambda: wire.broker.subscribers(REPLIES) == 1)
    wait_for(lambda: wire.broker.subscribers(REPLIES) == 0)
    wait_for(lambda: wire.listener.connections == 0)
    assert wire.broker.subscribers(REPLIES) == 0


def test_events_cost_nothing_when_nobody_listens(wire: Wire) -> None:
    """Not even the words are put together."""
    asked = []

    class Word:
        def __str__(self) -> str:
            asked.append(self)
            return "word"

    wire.broker.publish_event("|a|b|c", {"x": Word()})
    assert asked == []
    with wire.peer() as peer:
        peer.connect(replies="jms.queue.events")
        wait_for(lambda: wire.broker.subscribers("jms.queue.events") == 1)
        wire.broker.publish_event("|a|b|c", {"x": Word()})
        assert len(asked) == 1


@pytest.mark.parametrize("address", ["::", "0.0.0.0", "127.0.0.1", "::1"])
def test_addresses(address: str) -> None:
    """`::`, the default, takes IPv4 and IPv6."""
    config = Wire.local_config()
    config.addresses.management_ip = address
    wire = Wire(config, None)
    try:
        wire.start()
    except OSError:
        pytest.skip(f"{address} cannot be bound here")
    try:
        for peer in {"::": ["127.0.0.1", "::1"], "0.0.0.0": ["127.0.0.1"]}.get(address, [address]):
            if peer == "::1" and not socket.has_ipv6:
                continue
            client = Client(peer, wire.port)
            assert client.call("Host.ping2") is True
            client.close()
    finally:
        wire.stop()
