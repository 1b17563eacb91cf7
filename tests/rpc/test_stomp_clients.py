# SPDX-License-Identifier: GPL-2.0-or-later
"""Raw frames, in the order and form in which the two existing clients send them."""

from __future__ import annotations

import json
import time

import pytest

from tests.rpc.conftest import REPLIES, Peer, Start, Wire, request, rpc, wait_for
from vdsm_storage.rpc.frames import Frame, HeartBeat
from vdsm_storage.rpc.session import parse_heart_beat

# -- the Java client ------------------------------------------------------------------------------

JAVA_SUBSCRIBES = (
    b"SUBSCRIBE\nid:9b1c\ndestination:jms.queue.events\nack:auto\n\n\0"
    b"SUBSCRIBE\nid:7f2e\ndestination:jms.topic.vdsm_responses\nack:auto\n\n\0"
)
JAVA_CONNECT = b"CONNECT\naccept-version:1.2\nhost:node1\nheart-beat:0,15000\n\n\0"


def java(wire: Wire) -> Peer:
    peer = wire.peer()
    peer.send(JAVA_SUBSCRIBES)
    peer.send(JAVA_CONNECT)
    return peer


def test_java_subscribes_before_it_connects(wire: Wire) -> None:
    with java(wire) as peer:
        connected = peer.frame()
        assert connected.command == "CONNECTED"
        assert connected.headers == {"version": "1.2", "heart-beat": "15000,0"}
        assert peer.silent()
        peer.send(request(rpc("Host.ping2", number="5d1c")))
        message = peer.frame()
        assert message.headers == {
            "destination": REPLIES,
            "content-type": "application/json",
            "subscription": "7f2e",
            "content-length": str(len(message.body)),
        }
        assert json.loads(message.body) == {"jsonrpc": "2.0", "id": "5d1c", "result": True}


def test_java_gets_events(wire: Wire) -> None:
    with java(wire) as peer:
        peer.frame()
        before = time.monotonic_ns() // 1_000_000
        wire.broker.publish_event("|jobs|status|5d1c", {"id": "5d1c", "status": "done"})
        message = peer.frame()
        assert message.headers["subscription"] == "9b1c"
        assert message.headers["destination"] == "jms.queue.events"
        event = json.loads(message.body)
        assert "id" not in event
        assert event["method"].split("|") == ["", "jobs", "status", "5d1c"]
        stamp = event["params"].pop("notify_time")
        assert type(stamp) is int
        assert before <= stamp <= time.monotonic_ns() // 1_000_000
        assert event["params"] == {"id": "5d1c", "status": "done"}


def test_java_headers_come_without_escapes(wire: Wire) -> None:
    """It neither escapes nor unescapes: what it sends is taken, what it gets needs none."""
    with java(wire) as peer:
        peer.frame()
        frame = request(rpc("Host.echo", {"message": "x"}), flow="a:b\\c").replace(b"\\\\", b"\\")
        peer.send(frame)
        message = peer.raw()
        assert b"\\" not in message.partition(b"\n\n")[0]
        assert b'"result":"x"' in message


def test_every_frame_to_java_has_three_lines(wire: Wire) -> None:
    """Anything shorter counts as a heart-beat there."""
    with java(wire) as peer:
        peer.send(request(rpc("Host.ping2")))
        peer.send(b"SEND\ndestination:nobody\n\n\0DISCONNECT\nreceipt:1\n\n\0")
        frames = [part for part in peer.raw().split(b"\0") if part]
        assert [frame.split(b"\n")[0] for frame in frames] == [
            b"CONNECTED",
            b"MESSAGE",
            b"ERROR",
            b"RECEIPT",
        ]
        assert all(frame.count(b"\n") >= 3 for frame in frames)


def test_two_engines_share_the_reply_topic(wire: Wire) -> None:
    """Each connection that listens gets every reply; a client picks its own by the id."""
    with java(wire) as one, java(wire) as two:
        one.frame(), two.frame()
        one.send(request(rpc("Host.ping2", number="mine")))
        assert one.reply()["id"] == "mine"
        assert two.reply()["id"] == "mine"


def test_the_second_client_of_an_engine_has_its_own_topics(wire: Wire) -> None:
    with wire.peer() as peer:
        peer.connect(replies="jms.topic.vdsm_irs_responses")
        body = json.dumps(rpc("Host.ping2")).encode()
        peer.send(
            b"SEND\ndestination:jms.topic.vdsm_irs_requests\n"
            b"reply-to:jms.topic.vdsm_irs_responses\n\n" + body + b"\0"
        )
        assert peer.reply()["result"] is True


# -- the python client ----------------------------------------------------------------------------


def test_python_sends_lists_of_one(wire: Wire) -> None:
    """And reads a bare object."""
    with wire.peer() as peer:
        peer.send(b"CONNECT\naccept-version:1.2\nheart-beat:0,24000\n\n\0")
        assert peer.frame().headers["heart-beat"] == "24000,0"
        peer.send(b"SUBSCRIBE\nack:auto\ndestination:6b9f\nid:8a44\n\n\0")
        peer.request([rpc("Host.ping2", number="77aa")], reply_to="6b9f")
        assert peer.reply() == {"jsonrpc": "2.0", "id": "77aa", "result": True}


def test_python_escapes_headers(wire: Wire) -> None:
    with wire.peer() as peer:
        peer.connect()
        peer.send(b"SUBSCRIBE\ndestination:my\\cqueue\nid:s\\\\1\n\n\0")
        peer.request(rpc("Host.ping2"), reply_to="my\\cqueue")
        message = peer.frame()
        assert message.headers["destination"] == "my:queue"
        assert message.headers["subscription"] == "s\\1"


def test_disconnect_with_a_receipt(wire: Wire) -> None:
    with wire.peer() as peer:
        peer.connect()
        peer.send(b"DISCONNECT\nreceipt:77\n\n\0")
        assert peer.frame() == Frame("RECEIPT", {"receipt-id": "77"})
        assert peer.closed()
    wait_for(lambda: wire.broker.subscribers(REPLIES) == 0)


# -- both -----------------------------------------------------------------------------------------


def test_a_reply_topic_that_is_not_named_is_the_default(wire: Wire) -> None:
    with wire.peer() as peer:
        peer.connect()
        body = json.dumps(rpc("Host.ping2")).encode()
        peer.send(b"SEND\ndestination:jms.topic.vdsm_requests\n\n" + body + b"\0")
        assert peer.reply()["result"] is True


def test_a_destination_below_the_request_queue_counts(wire: Wire) -> None:
    with wire.peer() as peer:
        peer.connect()
        body = json.dumps(rpc("Host.ping2")).encode()
        peer.send(b"SEND\ndestination:jms.topic.vdsm_requests.node1\n\n" + body + b"\0")
        assert peer.reply()["result"] is True


def test_nobody_listens_to_the_reply(wire: Wire) -> None:
    with wire.peer() as peer:
        peer.connect()
        peer.request(rpc("Host.echo", {"message": "unheard"}), reply_to="nobody")
        assert peer.call("Host.ping2")["result"] is True
    assert ("echo", "unheard") in wire.probe.calls


def test_two_subscriptions_of_one_connection_both_get_it(wire: Wire) -> None:
    with wire.peer() as peer:
        peer.connect()
        peer.send(f"SUBSCRIBE\ndestination:{REPLIES}\nid:second\n\n\0".encode())
        peer.request(rpc("Host.ping2"))
        assert {peer.frame().headers["subscription"] for _ in range(2)} == {"replies", "second"}


def test_sends_are_forwarded_to_the_destination_and_its_parents(wire: Wire) -> None:
    with wire.peer() as sender, wire.peer() as listener:
        sender.connect(), listener.connect()
        for number, name in enumerate(["a", "a.b", "a.b.c", "a.bc", "b"]):
            listener.send(f"SUBSCRIBE\ndestination:{name}\nid:{number}\n\n\0".encode())
        wait_for(lambda: wire.broker.subscribers("b") == 1)
        sender.send(b"SEND\ndestination:a.b.c\nkey:value\n\nhello\0")
        found = [listener.frame() for _ in range(3)]
        assert {frame.headers["subscription"] for frame in found} == {"0", "1", "2"}
        for frame in found:
            assert frame.command == "MESSAGE"
            assert frame.headers["destination"] == "a.b.c"
            assert frame.headers["key"] == "value"
            assert frame.headers["content-length"] == "5"
            assert frame.body == b"hello"
        assert listener.silent()
        assert sender.silent(), "no reply, no ERROR"


@pytest.mark.parametrize(
    ("frame", "text"),
    [
        (b"CONNECT\naccept-version:1.0\n\n\0", b"Version unsupported"),
        (b"CONNECT\n\n\0", b"Version unsupported"),
        (b"SUBSCRIBE\nid:1\n\n\0", b"Missing destination or subscription id header"),
        (b"SUBSCRIBE\ndestination:a\n\n\0", b"Missing destination or subscription id header"),
        (b"SUBSCRIBE\ndestination:a\nid:replies\n\n\0", b"Subscription id already exists"),
        (b"UNSUBSCRIBE\n\n\0", b"Missing id header"),
        (b"SEND\ndestination:nobody.there\n\nx\0", b"Subscription not available"),
    ],
)
def test_errors_that_leave_the_connection_open(wire: Wire, frame: bytes, text: bytes) -> None:
    with wire.peer() as peer:
        peer.connect()
        peer.send(frame)
        error = peer.frame()
        assert error == Frame("ERROR", {"content-length": str(len(text))}, text)
        assert peer.call("Host.ping2")["result"] is True


@pytest.mark.parametrize(
    "frame", [b"BEGIN\ntransaction:1\n\n\0", b"GARBAGE\n\n\0", b"SEND\ncontent-length:x\n\n\0"]
)
def test_errors_that_end_the_connection(wire: Wire, frame: bytes) -> None:
    with wire.peer() as peer:
        peer.connect()
        peer.send(frame)
        assert peer.frame().command == "ERROR"
        assert peer.closed()


def test_unsubscribe_is_silent(wire: Wire) -> None:
    with wire.peer() as peer:
        peer.connect()
        peer.send(b"UNSUBSCRIBE\nid:unknown\n\n\0")
        peer.send(f"SUBSCRIBE\ndestination:{REPLIES}\nid:second\n\n\0".encode())
        peer.send(b"UNSUBSCRIBE\nid:second\n\n\0")
        peer.request(rpc("Host.ping2"))
        assert peer.frame().headers["subscription"] == "replies"
        assert peer.silent()


def test_ack_changes_nothing(wire: Wire) -> None:
    with wire.peer() as peer:
        peer.connect()
        peer.send(b"ACK\nid:1\n\n\0NACK\nid:1\n\n\0")
        assert peer.call("Host.ping2")["result"] is True


def test_a_receipt_for_any_frame(wire: Wire) -> None:
    with wire.peer() as peer:
        peer.connect()
        peer.send(b"SUBSCRIBE\ndestination:a\nid:1\nreceipt:r1\n\n\0")
        assert peer.frame() == Frame("RECEIPT", {"receipt-id": "r1"})
        peer.send(b"SUBSCRIBE\ndestination:a\nid:1\nreceipt:r2\n\n\0")
        assert peer.frame().command == "ERROR"
        assert peer.silent(), "a frame that failed has no receipt"


def test_pieces_and_pipelines(wire: Wire) -> None:
    """One byte at a time, then many frames at once with heart-beats between them."""
    with wire.peer() as peer:
        peer.connect()
        for byte in request(rpc("Host.ping2", number="slow")):
            peer.send(bytes([byte]))
        assert peer.reply()["id"] == "slow"
        frames = [request(rpc("Host.ping2", number=str(n))) for n in range(200)]
        peer.send(b"\n".join(frames) + b"\n")
        assert [peer.reply()["id"] for _ in range(200)] == [str(n) for n in range(200)]


def test_leading_heart_beats_before_the_first_frame(wire: Wire) -> None:
    with wire.peer() as peer:
        peer.send(b"\n")
        peer.send(b"\r\n")
        peer.connect()
        assert peer.call("Host.ping2")["result"] is True


# -- heart-beats ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("0,0", (0, 0)),
        ("0,15000", (0, 15000)),
        ("1,999", (1000, 1000)),
        (" 5000 , 6000 ", (5000, 6000)),
        ("", (0, 0)),
        ("5000", (0, 0)),
        ("a,b", (0, 0)),
        ("-1,5000", (0, 0)),
        ("1,2,3", (0, 0)),
        ("999999999999999999,1000", (86_400_000, 1000)),
    ],
)
def test_heart_beat_header(text: str, expected: tuple[int, int]) -> None:
    assert parse_heart_beat(text) == expected


@pytest.mark.slow
def test_heart_beats_both_ways(wire: Wire) -> None:
    """The server sends within the interval; a peer that promised and is silent is dropped."""
    with wire.peer() as quiet, wire.peer() as alive:
        quiet.connect("1000,1000"), alive.connect("1000,1000")
        assert quiet.item(1.5) is HeartBeat.BEAT
        for _ in range(8):
            alive.send(b"\n")
            time.sleep(0.4)
        assert alive.call("Host.ping2")["result"] is True
        assert quiet.closed(1), "silent for 3 seconds, although it promised one beat a second"
    wait_for(lambda: wire.broker.subscribers(REPLIES) == 0)


def test_check_of_replies_is_on_in_tests(start: Start) -> None:
    assert start().config.rpc.check_replies
