# SPDX-License-Identifier: GPL-2.0-or-later
"""What goes out on one connection, with a bound.

Bytes that a peer does not take pile up in the transport.  A peer that lets more than `limit` bytes
pile up, or takes nothing for `patience` seconds, is disconnected.
"""

from __future__ import annotations

import asyncio
import logging

log = logging.getLogger("rpc.output")


class Output:
    def __init__(
        self, transport: asyncio.Transport, name: str, limit: int, patience: float = 60.0
    ) -> None:
        self._transport = transport
        self._name = name
        self._limit = limit
        self._patience = patience
        self._held: list[bytes] | None = None
        self._held_size = 0
        self._timer: asyncio.TimerHandle | None = None
        self._closed = False
        self._paused = False  # the transport has told that it is full
        self._bytes = 0  # that were sent so far
        self._taken = 0  # of these, how many the peer had taken when we last looked
        self.sent = 0  # writes so far; heart-beats look at whether it moves

    @property
    def pending(self) -> int:
        """Bytes that the peer has not taken yet."""
        return self._held_size + int(self._transport.get_write_buffer_size())

    def hold(self) -> None:
        """Collect what is sent until `release`, to write it in one go."""
        if self._held is None:
            self._held = []

    def release(self) -> None:
        held, self._held, self._held_size = self._held, None, 0
        if held and not self._closed:
            self._transport.write(held[0] if len(held) == 1 else b"".join(held))
            if self._paused:
                self._check()

    def send(self, data: bytes) -> None:
        if self._closed:
            return
        self.sent += 1
        self._bytes += len(data)
        if self._held is None:
            self._transport.write(data)
            if self._paused:
                self._check()
            return
        self._held.append(data)
        self._held_size += len(data)
        if self._held_size > 65536:
            self.release()
            self.hold()

    def close(self) -> None:
        """Send what is left and close; a peer that does not take it is cut off."""
        if not self._closed:
            self.release()
            self._closed = True
            self._watch()
            self._transport.close()

    def abort(self, why: str) -> None:
        if not self._closed:
            self._closed = True
            log.warning("%s: disconnected: %s", self._name, why)
        self._transport.abort()

    def pause(self) -> None:
        """The transport is full (asyncio's pause_writing)."""
        self._paused = True
        self._watch()

    def resume(self) -> None:
        """The transport has drained (asyncio's resume_writing)."""
        self._paused = False
        if self._timer is not None and not self._closed:
            self._timer.cancel()
            self._timer = None

    def lost(self) -> None:
        """The connection is gone."""
        self._closed = True
        self._held = None
        self._held_size = 0
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _check(self) -> None:
        if self._transport.get_write_buffer_size() > self._limit:
            self.abort(f"it leaves more than {self._limit} bytes unread")

    def _watch(self) -> None:
        if self._timer is None:
            self._taken = self._bytes - self.pending
            loop = asyncio.get_running_loop()
            self._timer = loop.call_later(self._patience, self._look)

    def _look(self) -> None:
        """Patience is over, unless the peer has taken something since."""
        self._timer = None
        if self._bytes - self.pending > self._taken:
            self._watch()
        else:
            self.abort(f"it has read nothing for {self._patience:g} seconds")
