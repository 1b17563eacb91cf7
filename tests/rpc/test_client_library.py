# SPDX-License-Identifier: GPL-2.0-or-later
"""The client library against the real server."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest

from tests.rpc.conftest import Start, Wire, dev_directory, wait_for
from vdsm_storage.rpc import client as library
from vdsm_storage.rpc.client import Client, NoResponse, RemoteError


@pytest.mark.parametrize("secure", [False, True])
def test_call(start: Start, secure: bool) -> None:
    wire = start(secure=secure)
    with wire.client() as client:
        assert client.call("Host.ping2") is True
        message = "ä" * 500_000
        assert client.call("Host.echo", {"message": message}) == message
    wait_for(lambda: wire.listener.connections == 0)


def test_errors_carry_code_and_message(wire: Wire) -> None:
    with wire.client() as client, pytest.raises(RemoteError, match="noSuchVerb") as caught:
        client.call("Host.noSuchVerb")
    assert caught.value.code == -32601


def test_flow_id(wire: Wire) -> None:
    with wire.client() as client, pytest.raises(RemoteError, match="flow-9"):
        client.call("Host.getHardwareInfo", flow_id="flow-9")


def test_time_out(wire: Wire) -> None:
    with wire.client() as client:
        with pytest.raises(NoResponse, match=r"getAllTasksInfo.* 0\.1 seconds") as caught:
            client.call("Host.getAllTasksInfo", timeout=0.1)
        assert caught.value.code == -32605
        assert client.call("Host.ping2") is True


@pytest.mark.parametrize("secure", [False, True])
def test_many_outstanding_from_many_threads(start: Start, secure: bool) -> None:
    wire = start(secure=secure)
    wire.probe.gate.set()
    found: list[object] = []
    with wire.client() as client:

        def work(name: str) -> None:
            calls = [client.submit("Host.echo", {"message": f"{name}{n}"}) for n in range(200)]
            slow = [client.submit("Host.getAllTasksInfo") for _ in range(20)]
            found.append([call.result(30) for call in calls] == [f"{name}{n}" for n in range(200)])
            found.append([call.result(30) for call in slow] == [{}] * 20)

        threads = [threading.Thread(target=work, args=(name,)) for name in "abcd"]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert found == [True] * 8


def test_large_requests_while_large_replies_come(start: Start) -> None:
    """Neither side waits for the other to read first."""
    wire = start()
    message = "x" * 500_000
    with wire.client() as client:
        calls = [client.submit("Host.echo", {"message": message}) for _ in range(40)]
        assert all(call.result(30) == message for call in calls)


def test_notify(wire: Wire) -> None:
    with wire.client() as client:
        client.notify("Host.echo", {"message": "unanswered"})
        client.call("Host.ping2")
    assert wire.probe.calls == [("echo", "unanswered")]


def test_events(wire: Wire) -> None:
    with wire.client() as client:
        client.subscribe()
        wait_for(lambda: wire.broker.subscribers("jms.queue.events") == 1)
        for number in range(3):
            wire.broker.publish_event(f"|jobs|status|{number}", {"n": number})
        events = list(client.events(timeout=0.3))
        assert [name for name, _ in events] == [f"|jobs|status|{n}" for n in range(3)]
        assert [params["n"] for _, params in events] == [0, 1, 2]
        assert client.call("Host.ping2") is True


def test_nobody_there() -> None:
    with pytest.raises(NoResponse, match=r"127.0.0.1:1:.*refused"):
        Client("127.0.0.1", 1).call("Host.ping2")


def test_a_lost_connection_fails_its_calls_and_the_next_call_connects_anew(start: Start) -> None:
    wire = start()
    with wire.client() as client:
        client.subscribe()
        assert client.call("Host.ping2") is True
        hanging = client.submit("Host.getAllTasksInfo")
        wait_for(lambda: wire.probe.calls)
        port = wire.port
        wire.run(wire.listener.stop())
        with pytest.raises(NoResponse):
            hanging.result(10)
        with pytest.raises(NoResponse):
            next(client.events(5))
        with pytest.raises(NoResponse):
            client.call("Host.ping2")
        wire.config.addresses.management_port = port
        wire.run(wire._start())
        assert client.call("Host.ping2") is True
        wait_for(lambda: wire.broker.subscribers("jms.queue.events") == 1)


@pytest.mark.slow
def test_heart_beats_keep_an_idle_connection(
    wire: Wire, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(library, "BEAT", 1.0)
    with wire.client() as client:
        assert client.call("Host.ping2") is True
        time.sleep(3.5)
        assert wire.listener.connections == 1
        assert client.call("Host.ping2") is True
        assert wire.listener.connections == 1


@pytest.mark.parametrize("secure", [False, True])
def test_a_dev_instance_is_found(
    start: Start, secure: bool, tmp_path: Path, authorities: tuple[str, str]
) -> None:
    wire = start(secure=secure)
    directory = dev_directory(wire, tmp_path, authorities[0] if secure else None)
    with Client.dev(str(directory)) as client:
        assert client.call("Host.ping2") is True


def test_a_dev_instance_that_does_not_run(tmp_path: Path) -> None:
    with pytest.raises(NoResponse, match=str(tmp_path)):
        Client.dev(str(tmp_path))
