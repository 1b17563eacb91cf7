# SPDX-License-Identifier: GPL-2.0-or-later
"""A small synchronous client: STOMP over TLS or plain text.

    with Client.dev("/tmp/agent") as client:
        client.call("Host.ping2")

Calls may come from several threads and many may be outstanding.  A thread of the client's own
reads, matches replies by id and keeps heart-beats going.  A lost connection fails the calls that
wait for it; the next call connects anew.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import select
import socket
import ssl
import threading
import time
import uuid
from collections.abc import Iterator, Mapping
from types import TracebackType
from typing import Any

from vdsm_storage.rpc import frames, tls
from vdsm_storage.rpc.frames import Frame, HeartBeat

REQUESTS = "jms.topic.vdsm_requests"
EVENTS = "jms.queue.events"
NO_RESPONSE = -32605
BEAT = 15.0  # seconds; asked of the agent, and given to it
MAX_FRAME = 256 * 1024 * 1024  # of a reply: the agent is trusted


class RemoteError(Exception):
    """A verb failed.  `code` and `message` are the agent's, or -32605 when none came from it."""

    def __init__(self, code: int, message: str) -> None:
        super().__init__(f"{message} (code {code})")
        self.code = code
        self.message = message


class NoResponse(RemoteError):  # noqa: N818 - what it is, not that it is one
    """The agent was not reached, the connection broke, or no answer came in time."""

    def __init__(self, message: str) -> None:
        super().__init__(NO_RESPONSE, message)


class Pending:
    """A call on its way."""

    def __init__(self, verb: str) -> None:
        self._verb = verb
        self._done = threading.Event()
        self._reply: Mapping[str, Any] | None = None
        self._error: NoResponse | None = None

    def result(self, timeout: float) -> Any:
        """The verb's result; RemoteError if it failed, or within `timeout` seconds none came."""
        if not self._done.wait(timeout):
            raise NoResponse(f"{self._verb}: no answer within {timeout:g} seconds")
        if self._error is not None:
            raise self._error
        assert self._reply is not None
        if "error" in self._reply:
            error = self._reply["error"]
            raise RemoteError(int(error["code"]), str(error["message"]))
        return self._reply.get("result")

    def answered(self, reply: Mapping[str, Any]) -> None:
        self._reply = reply
        self._done.set()

    def failed(self, error: NoResponse) -> None:
        self._error = error
        self._done.set()


class Client:
    """`context` None means plain text."""

    def __init__(
        self,
        host: str,
        port: int,
        context: ssl.SSLContext | None = None,
        timeout: float = 60.0,
    ) -> None:
        """`timeout`: seconds for a connection, and for a call that names none.  Connects at the
        first call."""
        self._host = host
        self._port = port
        self._context = context
        self._timeout = timeout
        self._lock = threading.RLock()
        self._link: Link | None = None
        self._wants_events = False
        self._events: queue.SimpleQueue[tuple[str, dict[str, Any]] | None] = queue.SimpleQueue()

    @classmethod
    def dev(cls, directory: str, timeout: float = 60.0) -> Client:
        """For the instance that `vdsm-storaged --dev DIRECTORY` runs.  NoResponse if none does."""
        run = os.path.join(directory, "run")
        try:
            with open(os.path.join(run, "port"), encoding="ascii") as file:
                port = int(file.read())
        except (OSError, ValueError) as error:
            raise NoResponse(f"no instance runs in {directory}: {error}") from error
        context = None
        if not os.path.exists(os.path.join(run, "plain")):
            context = tls.client_context(tls.client_files(os.path.join(directory, "pki")))
        return cls("127.0.0.1", port, context, timeout)

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def call(
        self,
        verb: str,
        params: Mapping[str, Any] | None = None,
        timeout: float | None = None,
        flow_id: str = "",
    ) -> Any:
        """The verb's result; RemoteError if it failed, NoResponse if none came in time."""
        seconds = self._timeout if timeout is None else timeout
        return self.submit(verb, params, flow_id).result(seconds)

    def submit(
        self, verb: str, params: Mapping[str, Any] | None = None, flow_id: str = ""
    ) -> Pending:
        """Send a request and do not wait."""
        pending = Pending(verb)
        self._connected().request(verb, params or {}, pending, flow_id)
        return pending

    def notify(self, verb: str, params: Mapping[str, Any] | None = None, flow_id: str = "") -> None:
        """Send a request that is never answered."""
        self._connected().request(verb, params or {}, None, flow_id)

    def subscribe(self) -> None:
        """Ask for events; `events` gives them."""
        with self._lock:
            self._wants_events = True
            self._connected().subscribe_events()

    def events(self, timeout: float | None = None) -> Iterator[tuple[str, dict[str, Any]]]:
        """(`|component|operation|id`, params) as they come; ends after `timeout` seconds without
        one.  NoResponse when the connection is lost; asking again connects anew."""
        self.subscribe()
        while True:
            try:
                event = self._events.get(timeout=timeout)
            except queue.Empty:
                return
            if event is None:
                raise NoResponse(f"the connection to {self._host}:{self._port} was lost")
            yield event

    def close(self) -> None:
        with self._lock:
            link, self._link = self._link, None
        if link is not None:
            link.close("closed by the client", polite=True)

    def _connected(self) -> Link:
        with self._lock:
            if self._link is None or self._link.broken:
                try:
                    stream = self._connect()
                except (OSError, ssl.SSLError) as error:
                    where = f"{self._host}:{self._port}"
                    raise NoResponse(f"cannot reach the agent at {where}: {error}") from error
                self._link = Link(stream, self._events)
                if self._wants_events:
                    self._link.subscribe_events()
            return self._link

    def _connect(self) -> socket.socket:
        stream = socket.create_connection((self._host, self._port), self._timeout)
        try:
            stream.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if self._context is not None:
                stream = self._context.wrap_socket(stream, server_hostname=self._host)
        except BaseException:
            stream.close()
            raise
        stream.setblocking(False)
        return stream


class Link:
    """One connection.  The socket is used by one thread at a time, under `_io`; `_writing` keeps
    a frame's bytes together."""

    def __init__(
        self,
        stream: socket.socket,
        events: queue.SimpleQueue[tuple[str, dict[str, Any]] | None],
    ) -> None:
        self.broken = False
        self._stream = stream
        self._events = events
        self._has_events = False
        self._io = threading.Lock()
        self._writing = threading.Lock()
        self._calls: dict[str, Pending] = {}
        self._decoder = frames.Decoder(MAX_FRAME)
        self._replies = f"jms.queue.reply.{uuid.uuid4()}"
        self._last_in = self._last_out = time.monotonic()
        self._wake, self._woken = socket.socketpair()
        beat = str(int(BEAT * 1000))
        hello = {"accept-version": "1.2", "host": "vdsm-storage", "heart-beat": f"{beat},{beat}"}
        subscribe = {"destination": self._replies, "id": "replies", "ack": "auto"}
        self._send(
            frames.encode(Frame(frames.CONNECT, hello))
            + frames.encode(Frame(frames.SUBSCRIBE, subscribe))
        )
        self._thread = threading.Thread(target=self._read, name="rpc client", daemon=True)
        self._thread.start()

    def subscribe_events(self) -> None:
        if not self._has_events:
            self._has_events = True
            headers = {"destination": EVENTS, "id": "events", "ack": "auto"}
            self._send(frames.encode(Frame(frames.SUBSCRIBE, headers)))

    def request(
        self, verb: str, params: Mapping[str, Any], pending: Pending | None, flow_id: str
    ) -> None:
        message: dict[str, Any] = {"jsonrpc": "2.0", "method": verb, "params": params}
        if pending is not None:
            message["id"] = str(uuid.uuid4())
            self._calls[message["id"]] = pending
        headers = {
            "destination": REQUESTS,
            "reply-to": self._replies,
            "content-type": "application/json",
        }
        if flow_id:
            headers["ovirtCorrelationId"] = flow_id
        self._send(frames.encode(Frame(frames.SEND, headers, json.dumps(message).encode())))
        if self.broken:
            self._fail_all("the connection was lost")

    def close(self, why: str, polite: bool = False) -> None:
        if polite and not self.broken:
            self._send(frames.encode(Frame(frames.DISCONNECT, {"receipt": "bye"})), seconds=1.0)
        self.broken = True
        with contextlib.suppress(OSError):  # the reader has ended and closed it
            self._wake.send(b".")
        if threading.current_thread() is not self._thread:
            self._thread.join(5)
        self._fail_all(why)

    # -- sending ---------------------------------------------------------------------------------

    def _send(self, data: bytes, seconds: float = 60.0) -> None:
        """Send all of it; a link that cannot is broken, and its calls fail."""
        view = memoryview(data)
        deadline = time.monotonic() + seconds
        with self._writing:
            while view and not self.broken:
                try:
                    with self._io:
                        view = view[self._stream.send(view) :]
                except (BlockingIOError, ssl.SSLWantWriteError, ssl.SSLWantReadError):
                    # Meanwhile the reading thread takes what the agent answers.
                    self._wait_for_room(deadline - time.monotonic())
                    if time.monotonic() > deadline:
                        self.broken = True
                except OSError:
                    self.broken = True
            self._last_out = time.monotonic()

    def _beat(self) -> None:
        """A heart-beat if nothing was sent for long; never waits for a writer."""
        if time.monotonic() - self._last_out < BEAT * 0.45:
            return
        if self._writing.acquire(blocking=False):
            self._writing.release()
            self._send(b"\n")

    def _wait_for_room(self, seconds: float) -> None:
        poll = select.poll()
        poll.register(self._stream, select.POLLOUT)
        poll.poll(max(0, min(seconds, 0.2)) * 1000)

    # -- reading ---------------------------------------------------------------------------------

    def _read(self) -> None:
        why = "the agent closed the connection"
        poll = select.poll()
        poll.register(self._stream, select.POLLIN)
        poll.register(self._woken, select.POLLIN)
        try:
            while not self.broken and self._receive():
                self._beat()
                if time.monotonic() - self._last_in > BEAT * 2:
                    why = f"nothing came from the agent for {BEAT * 2:g} seconds"
                    break
                poll.poll(BEAT * 200)
        except (OSError, ValueError, frames.FrameError) as error:
            why = f"the connection was lost: {error}"
        self.broken = True
        self._fail_all(why)
        for end in (self._stream, self._wake, self._woken):
            end.close()
        if self._has_events:
            self._events.put(None)

    def _receive(self) -> bool:
        """Take what has come; False at the end of the stream."""
        while True:
            with self._io:
                try:
                    data = self._stream.recv(262144)
                except (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError):
                    return True
            if not data:
                return False
            self._last_in = time.monotonic()
            for item in self._decoder.feed(data):
                if not isinstance(item, HeartBeat):
                    self._take(item)

    def _take(self, frame: Frame) -> None:
        if frame.command == frames.ERROR:
            raise frames.FrameError(f"the agent says: {frame.body.decode(errors='replace')}")
        if frame.command != frames.MESSAGE:
            return
        message = json.loads(frame.body)
        if frame.headers.get("subscription") == "events":
            self._events.put((str(message["method"]), message["params"]))
            return
        for reply in message if isinstance(message, list) else [message]:
            pending = self._calls.pop(str(reply.get("id")), None)
            if pending is not None:
                pending.answered(reply)

    def _fail_all(self, why: str) -> None:
        while self._calls:
            try:
                _id, pending = self._calls.popitem()
            except KeyError:
                return
            pending.failed(NoResponse(why))
