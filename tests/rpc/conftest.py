# SPDX-License-Identifier: GPL-2.0-or-later
"""A real listener, broker, dispatcher and lanes, with a small table of verbs and the real schema;
and peers that speak raw bytes to it."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from vdsm_storage.base.clock import SystemClock
from vdsm_storage.base.lanes import Lanes
from vdsm_storage.base.secret import Secret
from vdsm_storage.config import Config
from vdsm_storage.rpc import tls
from vdsm_storage.rpc.broker import Broker
from vdsm_storage.rpc.client import Client
from vdsm_storage.rpc.dispatch import Dispatcher, Settings
from vdsm_storage.rpc.frames import Decoder, Frame, HeartBeat
from vdsm_storage.rpc.http import Services
from vdsm_storage.rpc.listener import Listener
from vdsm_storage.rpc.streams import Streams
from vdsm_storage.schema.loader import Schema
from vdsm_storage.schema.normalise import Checker
from vdsm_storage.verbs.table import Verb

REPLIES = "jms.topic.vdsm_responses"


@dataclass
class Probe:
    """What the verbs below do to the test."""

    gate: threading.Event = field(default_factory=threading.Event)
    calls: list[tuple[str, Any]] = field(default_factory=list)
    ready: bool = True
    jobs: dict[str, dict[str, object]] = field(default_factory=dict)
    vms: list[dict[str, Any]] = field(default_factory=list)
    history: dict[str, list[dict[str, Any]]] = field(default_factory=dict)


def table(probe: Probe) -> Mapping[str, Verb]:
    """Verbs of the real schema, with functions that a test can hold up."""

    def echo(_ctx: object, message: str) -> str:
        probe.calls.append(("echo", message))
        return message

    def fail(_ctx: object, **_params: object) -> None:
        raise ZeroDivisionError("a mistake of ours")

    def hold(ctx: tuple[str, str], **params: Any) -> dict[str, str]:
        """Waits for the gate."""
        probe.calls.append((ctx[1], params))
        assert probe.gate.wait(30)
        return {}

    def connect(_ctx: object, **params: Any) -> list[dict[str, object]]:
        probe.calls.append(("connect", params))
        return [{"id": one["id"], "status": 0} for one in params["connectionParams"]]

    def vm_list(_ctx: object, **_params: object) -> list[dict[str, Any]]:
        return [{key: vm[key] for key in ("vmId", "vmName", "status")} for vm in probe.vms]

    def thin_history(_ctx: object, **params: Any) -> dict[str, list[dict[str, Any]]]:
        probe.calls.append(("history", params))
        return probe.history

    return {
        "Host.ping": Verb(lambda _ctx: None),
        "Host.ping2": Verb(lambda _ctx: None),
        "Host.echo": Verb(echo),
        "Host.getAllVmStats": Verb(lambda _ctx: probe.vms),
        "Host.getVMList": Verb(vm_list),
        "VM.getThinHistory": Verb(thin_history),
        "Host.getJobs": Verb(lambda _ctx, **_params: probe.jobs),
        "Host.getAllTasksInfo": Verb(hold, lane=":tasks"),
        "Host.getAllTasksStatuses": Verb(hold, lane=":other", timeout=0.3),
        "Host.getHardwareInfo": Verb(fail),
        "Task.clear": Verb(fail, lane=":tasks"),
        "StoragePool.connectStorageServer": Verb(connect, lane=":host"),
    }


class Wire:
    """A server on a loop in a thread of its own."""

    def __init__(
        self, config: Config, context: ssl.SSLContext | None, streams: Streams | None = None
    ) -> None:
        self.config = config
        self.probe = Probe()
        self.broker = Broker()
        self.lanes = Lanes(SystemClock())
        self.port = 0
        self.client_context: ssl.SSLContext | None = None
        self._context = context
        self._streams = streams
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)

    @staticmethod
    def local_config() -> Config:
        config = Config()
        config.addresses.management_ip = "127.0.0.1"
        config.addresses.management_port = 0
        config.rpc.check_replies = True
        return config

    def start(self) -> None:
        self._thread.start()
        self.port = self.run(self._start())

    def run(self, work: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(30)

    async def _start(self) -> int:
        rpc = self.config.rpc
        self.dispatcher = Dispatcher(
            Checker(Schema()),
            table(self.probe),
            lambda flow_id, client: (flow_id, client),
            self.lanes,
            Settings(rpc.max_outstanding, rpc.strict, rpc.check_replies, width=4),
            lambda: self.probe.ready,
            {"rpc.discover": lambda: {"openrpc": "1.2.6"}},
        )
        services = Services(
            lambda: b'{"openrpc":"1.2.6"}',
            lambda: (200 if self.probe.ready else 503, {"ready": self.probe.ready}),
            self._streams,
            self.lanes,
        )
        self.listener = await Listener.start(
            self.config, self._context, self.broker, self.dispatcher, services
        )
        return self.listener.port

    def stop(self) -> None:
        self.probe.gate.set()
        self.run(self.listener.stop())
        self.lanes.close()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()

    def peer(self, context: ssl.SSLContext | None = None) -> Peer:
        return Peer(self.port, context or self.client_context)

    def client(self, timeout: float = 30.0) -> Client:
        return Client("127.0.0.1", self.port, self.client_context, timeout)


class Peer:
    """A socket and what came out of it."""

    def __init__(self, port: int, context: ssl.SSLContext | None = None) -> None:
        self.socket: socket.socket = socket.create_connection(("127.0.0.1", port), 10)
        if context is not None:
            self.socket = context.wrap_socket(self.socket)
        self._decoder = Decoder(64 * 1024 * 1024)
        self._frames: list[Frame | HeartBeat] = []

    def __enter__(self) -> Peer:
        return self

    def __exit__(self, *_error: object) -> None:
        self.socket.close()

    def send(self, data: bytes) -> None:
        self.socket.sendall(data)

    def frame(self, timeout: float = 10.0) -> Frame:
        """The next frame; heart-beats before it are dropped."""
        while True:
            item = self.item(timeout)
            if isinstance(item, Frame):
                return item

    def item(self, timeout: float = 10.0) -> Frame | HeartBeat:
        self.socket.settimeout(timeout)
        while not self._frames:
            data = self.socket.recv(65536)
            if not data:
                raise EOFError
            self._frames += self._decoder.feed(data)
        return self._frames.pop(0)

    def silent(self, seconds: float = 0.2) -> bool:
        """True if no frame comes for so long."""
        try:
            self.frame(seconds)
        except TimeoutError:
            return True
        return False

    def closed(self, timeout: float = 10.0) -> bool:
        """True if the server closes; frames before that are dropped."""
        self.socket.settimeout(timeout)
        try:
            while self.socket.recv(65536):
                pass
        except TimeoutError:
            return False
        except OSError:
            return True
        return True

    def raw(self, timeout: float = 0.5) -> bytes:
        """All bytes until nothing comes for `timeout` or the server closes."""
        self.socket.settimeout(timeout)
        out = b""
        while True:
            try:
                data = self.socket.recv(65536)
            except (TimeoutError, OSError):
                return out
            if not data:
                return out
            out += data

    # -- as the python client does it ------------------------------------------------------------

    def connect(self, beats: str = "0,0", replies: str = REPLIES) -> Peer:
        """CONNECT, then SUBSCRIBE to the replies."""
        self.send(f"CONNECT\naccept-version:1.2\nhost:x\nheart-beat:{beats}\n\n\0".encode())
        connected = self.frame()
        assert connected.command == "CONNECTED", connected
        self.send(f"SUBSCRIBE\ndestination:{replies}\nid:replies\nack:auto\n\n\0".encode())
        return self

    def request(self, *bodies: object, reply_to: str = REPLIES, flow: str = "f") -> None:
        """One SEND each."""
        self.send(b"".join(request(body, reply_to, flow) for body in bodies))

    def reply(self, timeout: float = 10.0) -> Any:
        frame = self.frame(timeout)
        assert frame.command == "MESSAGE", frame
        return json.loads(frame.body)

    def call(self, verb: str, params: object = None, number: object = "1") -> Any:
        self.request(rpc(verb, params, number))
        return self.reply()


def rpc(verb: str, params: object = None, number: object = "1") -> dict[str, Any]:
    params = {} if params is None else params
    return {"jsonrpc": "2.0", "method": verb, "params": params, "id": number}


def request(body: object, reply_to: str = REPLIES, flow: str = "f") -> bytes:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    head = (
        f"SEND\ndestination:jms.topic.vdsm_requests\nreply-to:{reply_to}\n"
        f"ovirtCorrelationId:{flow}\ncontent-type:application/json\ncontent-length:{len(data)}\n\n"
    )
    return head.encode() + data + b"\0"


def wait_for(condition: Callable[[], object], timeout: float = 10.0) -> None:
    end = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < end, "it did not come true"
        time.sleep(0.01)


@pytest.fixture(scope="session")
def authorities(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """Two PKI directories of authorities that do not know each other."""
    made = []
    for name in ("ours", "other"):
        directory = str(tmp_path_factory.mktemp("pki") / name)
        program = [sys.executable, "-P", "-m", "vdsm_storage.rpc.authority", directory]
        subprocess.run(program, check=True, timeout=60)
        made.append(directory)
    return made[0], made[1]


Start = Callable[..., Wire]


@pytest.fixture
def start(authorities: tuple[str, str]) -> Iterator[Start]:
    """`start(tls=False, streams=None, **rpc options)` gives a running Wire."""
    running: list[Wire] = []

    def begin(secure: bool = False, streams: Streams | None = None, **options: Any) -> Wire:
        config = Wire.local_config()
        config.tls.handshake_timeout = options.pop("handshake_timeout", 10.0)
        config.tls.verify_client_cert = options.pop("verify_client_cert", False)
        for name, value in options.items():
            assert hasattr(config.rpc, name), name
            setattr(config.rpc, name, value)
        context = tls.server_context(tls.host_files(authorities[0])) if secure else None
        wire = Wire(config, context, streams)
        if secure:
            wire.client_context = tls.client_context(tls.client_files(authorities[0]))
        wire.start()
        running.append(wire)
        return wire

    yield begin
    for wire in running:
        wire.stop()


@pytest.fixture
def wire(start: Start) -> Wire:
    """Over plain text, with the defaults."""
    return start()


def dev_directory(wire: Wire, directory: Path, pki: str | None) -> Path:
    """What `--dev DIR` finds below DIR, for a running Wire."""
    (directory / "run").mkdir(parents=True, exist_ok=True)
    (directory / "run" / "port").write_text(f"{wire.port}\n")
    if pki is None:
        (directory / "run" / "plain").touch()
    else:
        os.symlink(pki, directory / "pki")
    return directory


def is_secret(value: object) -> bool:
    return isinstance(value, Secret)
