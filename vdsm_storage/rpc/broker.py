# SPDX-License-Identifier: GPL-2.0-or-later
"""Who hears what: subscriptions of all connections, by destination.

Reply topics are shared: an engine's connections all subscribe to the same name, and each of them
gets every reply; a client picks its own by the JSON-RPC id.  Not a message queue: what nobody
listens to is dropped.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Protocol

import orjson

from vdsm_storage.rpc import frames

log = logging.getLogger("rpc.broker")

EVENTS = "jms.queue.events"
MAX_LINEAGES = 100  # destinations that are remembered taken apart


class Peer(Protocol):
    """A connection as the broker sees it."""

    @property
    def send(self) -> Callable[[bytes], None]:
        """Send, bounded: a peer that does not read is disconnected."""


class Subscription:
    """One connection listening to one destination."""

    __slots__ = ("destination", "head", "id", "peer")

    def __init__(self, peer: Peer, sub_id: str, destination: str) -> None:
        self.peer = peer
        self.id = sub_id
        self.destination = destination
        headers = {
            "destination": destination,
            "content-type": "application/json",
            "subscription": sub_id,
        }
        self.head = frames.head(frames.MESSAGE, headers)

    def deliver(self, body: bytes) -> None:
        """Send a JSON body of the agent's own."""
        self.peer.send(frames.with_body(self.head, body))

    def forward(self, frame: frames.Frame) -> None:
        """Pass another client's SEND on."""
        headers = {**frame.headers, "subscription": self.id}
        self.peer.send(frames.encode(frames.Frame(frames.MESSAGE, headers, frame.body)))


class Broker:
    """Lives on the event loop; only `publish_event` may be called from other threads."""

    def __init__(self) -> None:
        self._subscriptions: dict[str, list[Subscription]] = {}
        self._lineages: dict[str, tuple[str, ...]] = {}
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread = 0

    def attach(self, loop: asyncio.AbstractEventLoop) -> None:
        """Called by the listener, on the loop's thread, before connections come."""
        self._loop = loop
        self._thread = threading.get_ident()

    def detach(self) -> None:
        """No loop any more: events are dropped."""
        self._loop = None

    def subscribe(self, subscription: Subscription) -> None:
        self._subscriptions.setdefault(subscription.destination, []).append(subscription)

    def unsubscribe(self, subscription: Subscription) -> None:
        others = self._subscriptions.get(subscription.destination, [])
        if subscription in others:
            others.remove(subscription)
        if not others:
            self._subscriptions.pop(subscription.destination, None)

    def subscribers(self, destination: str) -> int:
        return len(self._subscriptions.get(destination, ()))

    def forward(self, destination: str, frame: frames.Frame) -> bool:
        """Pass a SEND on to who listens to `destination` or to one of its dot-separated parents.
        False if nobody does."""
        found = False
        lineage = self._lineages.get(destination)
        if lineage is None:
            lineage = tuple(_lineage(destination))
            if len(self._lineages) < MAX_LINEAGES:
                self._lineages[destination] = lineage
        for name in lineage:
            if name not in self._subscriptions:
                continue
            for subscription in tuple(self._subscriptions[name]):
                subscription.forward(frame)
                found = True
        return found

    def deliver(self, destination: str, body: bytes) -> bool:
        """Send a JSON body to every subscription on exactly `destination`; False if none is."""
        listening = self._subscriptions.get(destination)
        if not listening:
            return False
        if len(listening) == 1:  # the usual case, without the calls
            only = listening[0]
            only.peer.send(b"%bcontent-length:%d\n\n%b\0" % (only.head, len(body), body))
            return True
        for subscription in tuple(listening):
            subscription.deliver(body)
        return True

    def publish_event(self, method: str, params: Mapping[str, object]) -> None:
        """Tell all who listen to events; from any thread, never blocks.

        `method` is `|component|operation|id`.  `notify_time`, monotonic milliseconds, is added.
        """
        if self._loop is None or EVENTS not in self._subscriptions:
            return
        now = time.monotonic_ns() // 1_000_000
        body = orjson.dumps(
            {"jsonrpc": "2.0", "method": method, "params": {**params, "notify_time": now}},
            default=str,
        )
        if threading.get_ident() == self._thread:
            self.deliver(EVENTS, body)
            return
        try:
            self._loop.call_soon_threadsafe(self.deliver, EVENTS, body)
        except RuntimeError:
            log.debug("event %s dropped: the agent is stopping", method)


def _lineage(destination: str) -> Iterator[str]:
    """`a.b.c` -> a, a.b, a.b.c."""
    dot = destination.find(".")
    while dot >= 0:
        yield destination[:dot]
        dot = destination.find(".", dot + 1)
    yield destination
