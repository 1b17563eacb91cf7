# SPDX-License-Identifier: GPL-2.0-or-later
"""JSON-RPC through the whole stack: shapes, codes, batches, notifications, secrets."""

from __future__ import annotations

import logging
import time
from typing import Any

import pytest

from tests.rpc.conftest import Start, Wire, is_secret, rpc, wait_for

ID = "00000000-0000-0000-0000-000000000001"


def test_result_alone(wire: Wire) -> None:
    with wire.peer() as peer:
        peer.connect()
        assert peer.call("Host.echo", {"message": "ä"}) == {
            "jsonrpc": "2.0",
            "id": "1",
            "result": "ä",
        }


@pytest.mark.parametrize("number", ["uuid", "", 0, 1, -5, 1.5, True])
def test_any_id_comes_back(wire: Wire, number: object) -> None:
    with wire.peer() as peer:
        peer.connect()
        assert peer.call("Host.ping2", number=number)["id"] == number


def test_a_verb_without_result_answers_true(wire: Wire) -> None:
    with wire.peer() as peer:
        peer.connect()
        assert peer.call("Host.ping") == {"jsonrpc": "2.0", "id": "1", "result": True}


def test_positional_parameters(wire: Wire) -> None:
    with wire.peer() as peer:
        peer.connect()
        assert peer.call("Host.echo", ["hello"])["result"] == "hello"


def test_absent_params(wire: Wire) -> None:
    with wire.peer() as peer:
        peer.connect()
        peer.request({"jsonrpc": "2.0", "method": "Host.ping2", "id": 1})
        assert peer.reply()["result"] is True
        peer.request({"jsonrpc": "2.0", "method": "Host.ping2", "params": None, "id": 1})
        assert peer.reply()["result"] is True


@pytest.mark.parametrize(
    ("body", "code", "number", "text"),
    [
        (b"{", -32700, None, "not JSON"),
        (b"", -32700, None, "not JSON"),
        (b"\xff\xfe", -32700, None, "not JSON"),
        (b"[" * 10000, -32700, None, "not JSON"),
        ([], -32600, None, "empty list"),
        (17, -32600, None, "not an object"),
        ("text", -32600, None, "not an object"),
        ({"method": "Host.ping2", "id": 1}, -32600, 1, "2.0"),
        ({"jsonrpc": "1.0", "method": "Host.ping2", "id": 1}, -32600, 1, "2.0"),
        ({"jsonrpc": "2.0", "id": 1}, -32600, 1, "method"),
        ({"jsonrpc": "2.0", "method": 5, "id": 1}, -32600, 1, "method"),
        ({"jsonrpc": "2.0", "method": "Host.ping2", "params": 5, "id": 1}, -32600, 1, "params"),
        ({"jsonrpc": "2.0", "method": "Host.ping2", "id": {}}, -32600, None, "id"),
        (rpc("Host.noSuchVerb"), -32601, "1", "Host.noSuchVerb"),
        (rpc("nothing"), -32601, "1", "nothing"),
        (rpc("rpc.invalid", {"reason": "x"}), -32600, "1", "method"),
        (rpc("Host.echo"), -32602, "1", "message"),
        (rpc("Host.echo", {"message": {}}), -32602, "1", "message"),
        (rpc("Host.echo", ["a", "b"]), -32602, "1", "Host.echo"),
        (rpc("Host.getHardwareInfo"), -32603, "1", "flow f"),
        (rpc("Task.clear", {"taskID": ID}), -32603, "1", "flow f"),
        (rpc("Host.getCapabilities"), 44, "1", "Host.getCapabilities"),
    ],
)
def test_errors(wire: Wire, body: Any, code: int, number: object, text: str) -> None:
    """Exactly code and message, an integer and a string; no `result` beside it, not even null."""
    with wire.peer() as peer:
        peer.connect()
        peer.request(body)
        reply = peer.reply()
        assert set(reply) == {"jsonrpc", "id", "error"}
        assert reply["id"] == number
        assert set(reply["error"]) == {"code", "message"}
        assert reply["error"]["code"] == code
        assert text in reply["error"]["message"]
        assert peer.call("Host.ping2")["result"] is True


def test_a_mistake_of_ours_is_logged_with_its_flow(
    wire: Wire, caplog: pytest.LogCaptureFixture
) -> None:
    with wire.peer() as peer:
        peer.connect()
        peer.request(rpc("Host.getHardwareInfo"), flow="flow-77")
        assert "flow-77" in peer.reply()["error"]["message"]
    assert "ZeroDivisionError" in caplog.text


# -- batches and notifications --------------------------------------------------------------------


def test_batches(wire: Wire) -> None:
    wire.probe.gate.set()
    with wire.peer() as peer:
        peer.connect()
        batch: list[Any] = [
            rpc("Host.ping2", number="a"),
            rpc("Host.getAllTasksInfo", number="b"),
            rpc("Host.noSuchVerb", number="c"),
            rpc("Host.ping2", number=None),
            17,
        ]
        peer.request(batch)
        replies = peer.reply()
        assert [reply["id"] for reply in replies] == ["a", "b", "c", None]
        assert replies[0]["result"] is True
        assert replies[1]["result"] == {}
        assert replies[2]["error"]["code"] == -32601
        assert replies[3]["error"]["code"] == -32600


def test_a_batch_of_one_is_answered_by_an_object(wire: Wire) -> None:
    wire.probe.gate.set()
    with wire.peer() as peer:
        peer.connect()
        for verb in ("Host.ping2", "Host.getAllTasksInfo"):
            peer.request([rpc(verb)])
            assert peer.reply()["id"] == "1"


def test_notifications_are_done_and_never_answered(wire: Wire) -> None:
    with wire.peer() as peer:
        peer.connect()
        silent: list[Any] = [
            {"jsonrpc": "2.0", "method": "Host.echo", "params": {"message": "one"}},
            rpc("Host.echo", {"message": "two"}, None),
            [rpc("Host.echo", {"message": "three"}, None)],
            rpc("Host.noSuchVerb", number=None),
            rpc("Host.getHardwareInfo", number=None),
        ]
        peer.request(*silent)
        assert peer.call("Host.ping2", number="last")["id"] == "last"
        assert peer.silent()
    assert [call for call in wire.probe.calls if call[0] == "echo"] == [
        ("echo", "one"),
        ("echo", "two"),
        ("echo", "three"),
    ]


def test_replies_may_come_out_of_order(wire: Wire) -> None:
    with wire.peer() as peer:
        peer.connect()
        peer.request(rpc("Host.getAllTasksInfo", number="slow"), rpc("Host.ping2", number="quick"))
        assert peer.reply()["id"] == "quick"
        wire.probe.gate.set()
        assert peer.reply()["id"] == "slow"


# -- state of the agent ---------------------------------------------------------------------------


def test_recovering(wire: Wire) -> None:
    wire.probe.ready = False
    with wire.peer() as peer:
        peer.connect()
        assert peer.call("Host.ping2")["error"]["code"] == 99
        assert peer.call("Host.getAllTasksInfo")["error"]["code"] == 99
        assert peer.call("rpc.discover")["result"] == {"openrpc": "1.2.6"}
        wire.probe.ready = True
        assert peer.call("Host.ping2")["result"] is True


def test_unknown_parameters(start: Start, caplog: pytest.LogCaptureFixture) -> None:
    """Accepted with one warning; refused when the configuration says so."""
    params = {"message": "x", "extra": 1}
    lenient, strict = start(), start(strict=True)
    with lenient.peer() as peer:
        peer.connect()
        for _ in range(3):
            assert peer.call("Host.echo", params)["result"] == "x"
    assert sum("extra" in record.getMessage() for record in caplog.records) == 1
    with strict.peer() as peer:
        peer.connect()
        error = peer.call("Host.echo", params)["error"]
        assert error["code"] == -32602
        assert "extra" in error["message"]


def test_a_lane_that_does_not_answer_in_time(wire: Wire) -> None:
    """The caller gets error 3 naming the lane; other lanes go on."""
    with wire.peer() as peer:
        peer.connect()
        peer.request(rpc("Host.getAllTasksStatuses", number="hangs"))
        assert peer.call("Host.ping2")["result"] is True
        error = peer.reply()["error"]
        assert error["code"] == 3
        assert ":other" in error["message"]


def test_a_reply_that_breaks_the_schema(start: Start) -> None:
    """An error in tests; in production, where the check is off, it goes through."""
    bad = {ID: {"id": ID, "status": 5}}
    for check in (True, False):
        wire = start(check_replies=check)
        wire.probe.jobs = bad
        with wire.peer() as peer:
            peer.connect()
            reply = peer.call("Host.getJobs")
            if check:
                assert reply["error"]["code"] == -32603
                assert "status" in reply["error"]["message"]
            else:
                assert reply["result"] == bad


# -- secrets --------------------------------------------------------------------------------------


def test_passwords_are_wrapped_before_anything_logs_them(
    wire: Wire, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    connection = {
        "id": ID,
        "connection": "10.0.0.5",
        "port": "3260",
        "iqn": "iqn.2026-01.com.example:t",
        "user": "chap",
        "password": "hunter2",
    }
    with wire.peer() as peer:
        peer.connect()
        params = {"domainType": 3, "storagepoolID": ID, "connectionParams": [connection]}
        reply = peer.call("StoragePool.connectStorageServer", params)
        assert "error" not in reply, reply
        bad = {**params, "connectionParams": [{**connection, "password": ["hunter2"]}]}
        peer.call("StoragePool.connectStorageServer", bad)
    (given,) = [call[1] for call in wire.probe.calls if call[0] == "connect"][:1]
    assert is_secret(given["connectionParams"][0]["password"])
    assert "hunter2" not in repr(given)
    assert "hunter2" not in caplog.text


# -- the log --------------------------------------------------------------------------------------


def test_one_line_a_verb(wire: Wire, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    wire.probe.gate.set()
    with wire.peer() as peer:
        peer.connect()
        for verb, params in (("Host.echo", {"message": "x"}), ("Host.getAllTasksInfo", {})):
            peer.call(verb, params)
        peer.call("Host.ping2")
        peer.call("Host.getHardwareInfo")
    wait_for(lambda: "Host.getHardwareInfo" in caplog.text)
    records = [record for record in caplog.records if record.name == "rpc.dispatch"]
    lines = [line for record in records if " -> " in (line := record.getMessage())]
    assert [line.split()[1:4] for line in lines] == [
        ["Host.echo", "->", "0"],
        ["Host.getAllTasksInfo", "->", "0"],
        ["Host.getHardwareInfo", "->", "-32603"],
    ], "pings are not logged"
    assert all(line.endswith(" ms)") for line in lines)


def test_a_dead_client_s_requests_are_still_done(wire: Wire) -> None:
    """They were taken; the answer goes to whoever listens."""
    with wire.peer() as peer, wire.peer() as other:
        other.connect()
        peer.connect()
        peer.request(rpc("Host.getAllTasksInfo", number="orphan"))
        wait_for(lambda: wire.probe.calls)
    time.sleep(0.05)
    with wire.peer() as other:
        other.connect()
        other.request(rpc("No.such", number="first"))
        assert other.reply()["id"] == "first"  # it listens
        wire.probe.gate.set()
        assert other.reply()["id"] == "orphan"
