# SPDX-License-Identifier: GPL-2.0-or-later
"""A STOMP connection as the engine's Java client makes it, frame by frame.

It subscribes before it connects, sends bare JSON objects, splits what comes by content-length,
does not unescape headers, beats in both directions, and matches replies by id among those that
other connections asked for.
"""

from __future__ import annotations

import contextlib
import json
import queue
import select
import socket
import ssl
import threading
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

READ = 1024  # bytes at a time, as the Java client's buffer
BEAT = 15.0  # seconds; the engine halves its 30
CONNECT_TIMEOUT = 20.0
CALL_TIMEOUT = 180.0


class VdsError(Exception):
    """An error reply; the engine decides by `code`."""

    def __init__(self, method: str, code: int, message: str) -> None:
        super().__init__(f"{method}: {code} {message}")
        self.code = code
        self.message = message


class NetworkError(Exception):
    """No reply: the engine counts it and sets the host to Connecting."""


@dataclass(frozen=True)
class Queues:
    """Destinations of one client: where requests go, and where replies and events come."""

    requests: str
    replies: str
    events: str | None


VDS = Queues("jms.topic.vdsm_requests", "jms.topic.vdsm_responses", "jms.queue.events")
IRS = Queues("jms.topic.vdsm_irs_requests", "jms.topic.vdsm_irs_responses", None)


def client_tls(pki: Path) -> ssl.SSLContext:
    """The engine's certificate below a development agent's authority."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.load_verify_locations(pki / "certs" / "cacert.pem")
    context.load_cert_chain(pki / "certs" / "clientcert.pem", pki / "keys" / "clientkey.pem")
    return context


class Connection:
    """`on_event` gets each notification's method and params."""

    def __init__(
        self,
        address: tuple[str, int],
        tls: ssl.SSLContext | None,
        queues: Queues,
        on_event: Callable[[str, Any], None] = lambda method, params: None,
    ) -> None:
        self._queues = queues
        self._on_event = on_event
        self._waiting: dict[str, queue.Queue[dict[str, Any] | None]] = {}
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._connected = threading.Event()
        self.errors: list[str] = []
        plain = socket.create_connection(address, CONNECT_TIMEOUT)
        self._socket = tls.wrap_socket(plain) if tls is not None else plain
        self._socket.settimeout(None)
        if queues.events:
            self._frame("SUBSCRIBE", self._subscription(queues.events))
        self._frame("SUBSCRIBE", self._subscription(queues.replies))
        beat = f"0,{int(BEAT * 1000)}"
        self._frame("CONNECT", {"accept-version": "1.2", "heart-beat": beat})
        self._threads = [threading.Thread(target=self._read, daemon=True)]
        self._threads[0].start()
        if not self._connected.wait(CONNECT_TIMEOUT):
            self.close()
            raise NetworkError(f"no CONNECTED within {CONNECT_TIMEOUT} s: {self.errors}")

    def call(self, method: str, params: dict[str, Any], timeout: float = CALL_TIMEOUT) -> Any:
        """The result.  Raises VdsError or NetworkError."""
        request_id = str(uuid.uuid4())
        request = {"jsonrpc": "2.0", "method": method, "params": params, "id": request_id}
        inbox: queue.Queue[dict[str, Any] | None] = queue.Queue()
        with self._lock:
            self._waiting[request_id] = inbox
        body = json.dumps(request).encode()
        headers = {
            "destination": self._queues.requests,
            "reply-to": self._queues.replies,
            "content-length": str(len(body)),
            "ovirtCorrelationId": request_id[:8],
        }
        try:
            if self._closed.is_set():  # after registering: the reader tells who waits by then
                raise NetworkError(f"{method}: the connection is lost")
            self._frame("SEND", headers, body)
            reply = inbox.get(timeout=timeout)
        except (queue.Empty, OSError) as error:
            raise NetworkError(f"{method}: {error or 'time-out'}") from error
        finally:
            with self._lock:
                self._waiting.pop(request_id, None)
        if reply is None:
            raise NetworkError(f"{method}: the connection was lost")
        return result_of(method, reply)

    def close(self) -> None:
        self._closed.set()
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
        for thread in getattr(self, "_threads", []):
            if thread is not threading.current_thread():
                thread.join(5)

    # -- frames ------------------------------------------------------------------------------

    def _subscription(self, destination: str) -> dict[str, str]:
        return {"id": str(uuid.uuid4()), "destination": destination, "ack": "auto"}

    def _frame(self, command: str, headers: dict[str, str], body: bytes = b"") -> None:
        lines = [command, *(f"{name}:{value}" for name, value in headers.items())]
        data = "\n".join(lines).encode() + b"\n\n" + body + b"\0"
        with self._lock:
            self._socket.sendall(data)

    def _read(self) -> None:
        data = b""
        try:
            while piece := self._receive():
                data = self._split(data + piece)
        except (OSError, ValueError) as error:
            self.errors.append(str(error))
        self._closed.set()
        with self._lock:
            waiting = list(self._waiting.values())
        for inbox in waiting:
            inbox.put(None)

    def _receive(self) -> bytes:
        """What came; b"" at the end.  OpenSSL wants reads and writes one at a time."""
        while not self._closed.is_set():
            pending = isinstance(self._socket, ssl.SSLSocket) and self._socket.pending()
            if not pending and not select.select([self._socket], [], [], 0.5)[0]:
                continue
            with self._lock:
                return self._socket.recv(READ)
        return b""

    def _split(self, data: bytes) -> bytes:
        """Handle every whole frame in `data`; returns the rest."""
        while True:
            data = data.lstrip(b"\n")  # heart-beats
            head, blank, rest = data.partition(b"\n\n")
            if not blank:
                return data
            command, headers = parse_head(head)
            if "content-length" in headers:
                length = int(headers["content-length"])
                if len(rest) <= length:
                    return data
                body, data = rest[:length], rest[length + 1 :]
            else:
                if command == "MESSAGE":
                    raise ValueError("a MESSAGE without content-length")
                body, nul, after = rest.partition(b"\0")
                if not nul:
                    return head + blank + rest
                data = after
            self._handle(command, headers, body)

    def _handle(self, command: str, headers: dict[str, str], body: bytes) -> None:
        if command == "CONNECTED":
            if "heart-beat" not in headers:
                raise ValueError("CONNECTED without heart-beat sets no timers")
            self._connected.set()
        elif command == "MESSAGE":
            message = json.loads(body)
            for one in message if isinstance(message, list) else [message]:
                self._deliver(one)
        else:
            self.errors.append(f"{command} {headers} {body[:200]!r}")

    def _deliver(self, message: dict[str, Any]) -> None:
        if "method" in message:
            if message["method"].count("|") != 3 or "id" in message:
                self.errors.append(f"an event with the method {message['method']!r}")
            self._on_event(message["method"], message.get("params"))
            return
        with self._lock:
            inbox = self._waiting.get(str(message.get("id")))
        if inbox is not None:  # others' replies come here, too: one topic for all
            inbox.put(message)


def parse_head(head: bytes) -> tuple[str, dict[str, str]]:
    """Command and headers; the first of repeated headers counts, nothing is unescaped."""
    command, *lines = head.decode().split("\n")
    headers: dict[str, str] = {}
    for line in lines:
        name, _, value = line.partition(":")
        headers.setdefault(name, value)
    return command, headers


def result_of(method: str, reply: dict[str, Any]) -> Any:
    """The bare value of `result`.  A null error beside it, or both, would crash the engine."""
    if ("result" in reply) == ("error" in reply):
        raise AssertionError(f"{method}: exactly one of result and error, not {sorted(reply)}")
    if "error" in reply:
        error = reply["error"]
        if type(error.get("code")) is not int or "message" not in error:
            raise AssertionError(f"{method}: error {error} has no int code with a message")
        raise VdsError(method, error["code"], str(error["message"]))
    if reply["result"] is None:
        raise AssertionError(f"{method}: a null result breaks the engine's call")
    return reply["result"]
