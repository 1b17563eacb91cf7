# SPDX-License-Identifier: GPL-2.0-or-later
"""One STOMP connection: what each frame does, heart-beats, and the limits of a peer.

The existing clients differ: one connects first, the other subscribes before it connects; one sends
lists of one request, the other bare objects.  Both are served here.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from vdsm_storage.rpc import frames
from vdsm_storage.rpc.broker import Broker, Subscription
from vdsm_storage.rpc.frames import Frame, FrameError, HeartBeat
from vdsm_storage.rpc.output import Output

log = logging.getLogger("rpc.stomp")

DEFAULT_REPLIES = "jms.topic.vdsm_responses"
FLOW_HEADER = "ovirtCorrelationId"
MIN_BEAT = 1000  # milliseconds; what a peer asks for is raised to this
MAX_BEAT = 24 * 3600 * 1000
MAX_SUBSCRIPTIONS = 1000  # of one connection


class Caller(Protocol):
    """The dispatcher's side of one connection."""

    def handle(self, body: bytes, flow_id: str, reply: Callable[[bytes], None]) -> bool:
        """Execute a JSON-RPC request; `reply` gets the answer, now or later.  False if there is
        none to come."""

    def close(self) -> None:
        """The connection is gone."""

    @property
    def full(self) -> bool:
        """True while it holds so many bytes of requests that no more should be read."""

    on_room: Callable[[], None]


@dataclass(frozen=True)
class Limits:
    """Of one connection; bytes and seconds.

    `buffer` is where bytes arrive; they are taken out at once, so all connections of a loop share
    it.  `on_lost` is told when the connection is gone.
    """

    max_frame: int = frames.MAX_FRAME
    max_output: int = 16 * 1024 * 1024
    patience: float = 60.0
    on_lost: Callable[[], None] = lambda: None
    buffer: memoryview = field(default_factory=lambda: memoryview(bytearray(65536)))


class Session(asyncio.Protocol):
    """A connection that turned out to speak STOMP."""

    def __init__(
        self,
        name: str,
        broker: Broker,
        caller: Caller,
        queues: Sequence[str],
        limits: Limits,
    ) -> None:
        self.name = name
        self.send: Callable[[bytes], None]  # the output's, once there is a connection
        self._broker = broker
        self._caller = caller
        self._queues = tuple(queues)
        self._queue_prefixes = tuple(queue + "." for queue in queues)
        self._limits = limits
        self._decoder = frames.Decoder(limits.max_frame)
        self._subscriptions: dict[str, Subscription] = {}
        self._beats: Beats | None = None
        self._done = False
        self._errors = 0
        self._replies: dict[str, Callable[[bytes], None]] = {}
        self._handlers: dict[str, Callable[[Frame], None]] = {
            frames.SEND: self._on_send,
            frames.CONNECT: self._on_connect,
            frames.STOMP: self._on_connect,
            frames.SUBSCRIBE: self._on_subscribe,
            frames.UNSUBSCRIBE: self._on_unsubscribe,
            frames.DISCONNECT: self._on_disconnect,
            frames.ACK: self._on_ack,
            frames.NACK: self._on_ack,
        }
        caller.on_room = self._read_on

    # -- asyncio ---------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        self._output = Output(
            transport, self.name, self._limits.max_output, self._limits.patience
        )
        self.send = self._output.send

    def data_received(self, data: bytes) -> None:
        if self._done:
            return
        if self._beats is not None:
            self._beats.received = True
        try:
            items = self._decoder.feed(data)
        except FrameError as error:
            self._fail(str(error))
            return
        if len(items) == 1:
            if items[0] is not HeartBeat.BEAT:
                self._handle(items[0])
        else:
            self._handle_all(items)
        if self._decoder.failed is not None and not self._done:
            self._fail(str(self._decoder.failed))
            return
        if self._caller.full:
            self._transport.pause_reading()
            if self._beats is not None:
                self._beats.paused = True

    def _handle_all(self, items: Sequence[Frame | HeartBeat]) -> None:
        """Several frames that came in one piece are answered in one."""
        self._output.hold()
        for item in items:
            if item is not HeartBeat.BEAT and not self._done:
                self._handle(item)
        self._output.release()

    def eof_received(self) -> bool:
        return False  # close

    def connection_lost(self, exc: Exception | None) -> None:
        self._done = True
        self._output.lost()
        if self._beats is not None:
            self._beats.stop()
        for subscription in self._subscriptions.values():
            self._broker.unsubscribe(subscription)
        self._subscriptions.clear()
        self._replies.clear()
        self._caller.close()
        self._limits.on_lost()

    def pause_writing(self) -> None:
        self._output.pause()

    def resume_writing(self) -> None:
        self._output.resume()

    # -- frames ----------------------------------------------------------------------------------

    def _handle(self, frame: Frame) -> None:
        if frame.command == frames.SEND and "receipt" not in frame.headers:
            self._on_send(frame)
            return
        handler = self._handlers.get(frame.command)
        if handler is None:
            self._fail(f"{frame.command} is not served")
            return
        errors = self._errors
        handler(frame)
        receipt = frame.headers.get("receipt")
        if receipt is not None and errors == self._errors and not self._done:
            self.send(frames.encode(Frame(frames.RECEIPT, {"receipt-id": receipt})))
            if frame.command == frames.DISCONNECT:
                self._end()

    def _on_connect(self, frame: Frame) -> None:
        accepted = frame.headers.get("accept-version", "")
        if "1.2" not in accepted.split(","):
            self._error("Version unsupported")
            return
        wants, gives = parse_heart_beat(frame.headers.get("heart-beat", "0,0"))
        answer = {"version": "1.2", "heart-beat": f"{gives},{wants}"}
        self.send(frames.encode(Frame(frames.CONNECTED, answer)))
        if self._beats is not None:
            self._beats.stop()
        self._beats = Beats(self, self._output, gives / 1000, wants / 1000)

    def _on_subscribe(self, frame: Frame) -> None:
        destination = frame.headers.get("destination")
        sub_id = frame.headers.get("id")
        if not destination or not sub_id:
            self._error("Missing destination or subscription id header")
            return
        if sub_id in self._subscriptions:
            self._error("Subscription id already exists")
            return
        if len(self._subscriptions) >= MAX_SUBSCRIPTIONS:
            self._fail(f"more than {MAX_SUBSCRIPTIONS} subscriptions")
            return
        subscription = Subscription(self, sub_id, destination)
        self._subscriptions[sub_id] = subscription
        self._broker.subscribe(subscription)

    def _on_unsubscribe(self, frame: Frame) -> None:
        sub_id = frame.headers.get("id")
        if not sub_id:
            self._error("Missing id header")
            return
        subscription = self._subscriptions.pop(sub_id, None)
        if subscription is not None:
            self._broker.unsubscribe(subscription)

    def _on_send(self, frame: Frame) -> None:
        headers = frame.headers
        destination = headers.get("destination")
        if not destination:
            self._error("Missing destination header")
            return
        forwarded = self._broker.forward(destination, frame)
        if destination in self._queues or destination.startswith(self._queue_prefixes):
            reply_to = headers.get("reply-to", DEFAULT_REPLIES)
            flow_id = headers.get(FLOW_HEADER, "")
            self._caller.handle(frame.body, flow_id, self._reply_to(reply_to))
        elif not forwarded:
            self._error("Subscription not available")

    def _on_disconnect(self, frame: Frame) -> None:
        if "receipt" not in frame.headers:
            self._end()

    def _on_ack(self, frame: Frame) -> None:
        """Messages are never sent again, so acknowledging them changes nothing."""

    def _reply_to(self, destination: str) -> Callable[[bytes], None]:
        reply = self._replies.get(destination)
        if reply is None:
            broker, name = self._broker, self.name

            def reply(body: bytes) -> None:
                if not broker.deliver(destination, body):
                    log.info("%s: nobody listens to %s, a reply is dropped", name, destination)

            if len(self._replies) < MAX_SUBSCRIPTIONS and len(destination) < 256:
                self._replies[destination] = reply
        return reply

    # -- ends ------------------------------------------------------------------------------------

    def _error(self, text: str) -> None:
        """Tell the peer; the connection goes on."""
        self._errors += 1
        log.info("%s: ERROR frame: %s", self.name, text)
        self.send(frames.encode(Frame(frames.ERROR, {}, text.encode())))

    def _fail(self, text: str) -> None:
        """Tell the peer; the connection ends."""
        log.warning("%s: disconnected: %s", self.name, text)
        self.send(frames.encode(Frame(frames.ERROR, {}, text.encode())))
        self._end()

    def _end(self) -> None:
        self._done = True
        self._output.close()

    def silent(self, seconds: float) -> None:
        """The peer missed its heart-beats."""
        self._done = True
        self._output.abort(f"nothing came from it for {seconds:.1f} seconds")

    def _read_on(self) -> None:
        if self._done or self._transport.is_closing():
            return
        if self._beats is not None:
            self._beats.paused = False
            self._beats.received = True
        self._transport.resume_reading()


class PlainSession(Session, asyncio.BufferedProtocol):
    """Over plain TCP, where reading into one buffer saves an allocation of a quarter megabyte for
    every piece that comes.  (Over TLS asyncio is quicker without.)"""

    def get_buffer(self, sizehint: int) -> memoryview:
        return self._limits.buffer

    def buffer_updated(self, nbytes: int) -> None:
        self.data_received(self._limits.buffer[:nbytes].tobytes())


class Beats:
    """Heart-beats of one connection, both ways.

    One timer a direction, not touched by traffic: it looks whether there was any since the last
    time.  Something goes out at least every `send_every` seconds; a peer from which nothing came
    for twice `receive_every` is gone.  0 switches a direction off.
    """

    def __init__(
        self, session: Session, output: Output, send_every: float, receive_every: float
    ) -> None:
        self._session = session
        self._output = output
        self._loop = asyncio.get_running_loop()
        self._send_every = send_every
        self._receive_every = receive_every
        self._sent = output.sent
        self.received = True
        self.paused = False  # we do not read, so the peer cannot be blamed
        self._timers: dict[str, asyncio.TimerHandle] = {}
        if send_every:
            self._later("send", send_every * 0.45, self._check_sent)
        if receive_every:
            self._later("receive", receive_every * 2, self._check_received)

    def stop(self) -> None:
        for timer in self._timers.values():
            timer.cancel()
        self._timers.clear()

    def _later(self, name: str, delay: float, call: Callable[[], None]) -> None:
        self._timers[name] = self._loop.call_later(delay, call)

    def _check_sent(self) -> None:
        if self._output.sent == self._sent:
            self._output.send(b"\n")
        self._sent = self._output.sent
        self._later("send", self._send_every * 0.45, self._check_sent)

    def _check_received(self) -> None:
        if not self.received and not self.paused:
            self._session.silent(self._receive_every * 2)
            return
        self.received = False
        self._later("receive", self._receive_every, self._check_received)


def parse_heart_beat(text: str) -> tuple[int, int]:
    """`cx,cy` in milliseconds: what the client sends and what it wants.  A bad value is 0,0."""
    first, comma, second = text.partition(",")
    if not comma or not (first.strip().isdecimal() and second.strip().isdecimal()):
        return 0, 0
    sends, wants = (min(int(part[:12]), MAX_BEAT) for part in (first.strip(), second.strip()))
    return (max(sends, MIN_BEAT) if sends else 0), (max(wants, MIN_BEAT) if wants else 0)
