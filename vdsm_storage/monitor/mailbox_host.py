# SPDX-License-Identifier: GPL-2.0-or-later
"""The mailbox of a host that asks a storage pool manager to extend volumes."""

from __future__ import annotations

import logging
import threading
from dataclasses import dataclass, field
from typing import Final

from vdsm_storage.base.clock import Clock
from vdsm_storage.base.units import MIB
from vdsm_storage.errors import (
    AgentError,
    ExtendNotAnswered,
    ExtendRefused,
    MailboxFull,
    VolumeExtendingError,
)
from vdsm_storage.monitor import mailbox_format as fmt
from vdsm_storage.monitor.mailbox_file import Mailboxes
from vdsm_storage.monitor.mailbox_format import EMPTY_BLOCK, HOSTS, SLOTS, Extend
from vdsm_storage.monitor.mailbox_slots import HostSlots
from vdsm_storage.monitor.poller import Poller

log = logging.getLogger("mailbox.host")

INTERVAL: Final = 0.5  # seconds between looks for answers, while any are waited for
SLOW_INTERVAL: Final = 2.0  # the same while slots are only being cleaned
REPEAT: Final = 10.0  # seconds until a request is written again; it may have been overwritten
WAITING: Final = 1000  # requests that may wait for a slot

_Key = tuple[str, str]  # domain, volume


@dataclass(eq=False)
class _Waiter:
    size: int  # MiB
    done: threading.Event = field(default_factory=threading.Event)
    new_size: int = 0  # MiB
    error: AgentError | None = None


@dataclass(eq=False)
class _Ask:
    """One message: `size` MiB is the largest that its waiters want."""

    key: _Key
    size: int
    waiters: list[_Waiter] = field(default_factory=list)
    slot: int | None = None
    crowded: bool = False  # no slot was free for it

    def tell(self, new_size: int) -> None:
        for waiter in self.waiters:
            waiter.new_size = new_size
            waiter.done.set()


class HostMailbox:
    """Asks for host `host_id`, from `start` to `stop`; `request` may be called by many threads.

    A volume has one message on its way at most; what is asked for it meanwhile is joined with
    that, or, when it is more, waits and goes as one message after it.
    """

    def __init__(
        self,
        boxes: Mailboxes,
        host_id: int,
        clock: Clock,
        interval: float = INTERVAL,
        repeat: float = REPEAT,
    ) -> None:
        self._boxes = boxes
        self._host = host_id
        self._clock = clock
        self._interval = interval
        self._repeat = repeat
        self._poller = Poller("mailbox of this host", clock, self._turn, self._finish)
        self._slots = HostSlots()  # the thread's
        self._ready = False  # the thread's: our block is empty, old answers are known
        self._event_due = False  # the thread's
        self._written = 0.0  # the thread's: when the block was written last
        self._nudged = clock.monotonic()  # the thread's
        self._lock = threading.Lock()
        self._asked: dict[_Key, _Ask] = {}  # in a slot, or waiting for one
        self._later: dict[_Key, _Ask] = {}  # waiting for the answer to the one in `_asked`
        self._given_up: list[_Ask] = []
        self._closed = False

    def start(self) -> None:
        if not 0 < self._host < HOSTS:
            log.warning("No storage pool manager serves host %d: use one below %d",
                        self._host, HOSTS)  # fmt: skip
        self._poller.start()

    def stop(self, timeout: float = 10.0) -> bool:
        """Fail what waits and empty our block; False when the storage hangs."""
        with self._lock:
            self._closed = True
            asks = [*self._asked.values(), *self._later.values()]
            self._asked.clear()
            self._later.clear()
            for ask in asks:
                for waiter in ask.waiters:
                    waiter.error = self._not_answered(ask.key, waiter.size, 0, "the mailbox stops")
                    waiter.done.set()
        return self._poller.stop(timeout)

    def request(self, domain: str, volume: str, size: int, timeout: float) -> int:
        """Have a volume extended to `size` bytes; returns the bytes that it has now.

        Takes `timeout` seconds at most.  Raises MailboxFull, ExtendNotAnswered (try again),
        ExtendRefused (the manager failed), VolumeExtendingError (no message can ask for that).
        """
        key = (domain, volume)
        waiter = _Waiter(max(1, -(-size // MIB)))
        try:
            Extend(domain, volume, waiter.size).encode()
        except ValueError as error:
            raise VolumeExtendingError(volume=volume, size=size, reason=str(error)) from error
        with self._lock:
            if self._closed:
                raise self._not_answered(key, waiter.size, 0, "the mailbox stops")
            ask = self._join(key, waiter)
        self._poller.wake()
        if not self._clock.wait(waiter.done, timeout):
            self._leave(ask, waiter, timeout)
        if waiter.error is not None:
            raise waiter.error
        if waiter.new_size == 0:
            raise ExtendRefused(volume=volume, domain=domain, size=size)
        return waiter.new_size * MIB

    def _join(self, key: _Key, waiter: _Waiter) -> _Ask:
        """The message that the waiter waits for, an old one if one will do."""
        ask = self._asked.get(key)
        if ask is not None and ask.slot is not None and waiter.size > ask.size:
            ask = self._later.setdefault(key, _Ask(key, waiter.size))
        elif ask is None:
            if len(self._asked) >= WAITING + SLOTS:
                raise MailboxFull(volume=key[1], limit=SLOTS)
            ask = self._asked[key] = _Ask(key, waiter.size)
        if ask.slot is None:
            ask.size = max(ask.size, waiter.size)
        ask.waiters.append(waiter)
        return ask

    def _leave(self, ask: _Ask, waiter: _Waiter, seconds: float) -> None:
        """The waiter's time is over; a message that nobody waits for is taken back."""
        with self._lock:
            if waiter.done.is_set():
                return
            ask.waiters.remove(waiter)
            if ask.crowded:
                waiter.error = MailboxFull(volume=ask.key[1], limit=SLOTS)
            else:
                reason = self._poller.trouble or "it does not answer"
                waiter.error = self._not_answered(ask.key, waiter.size, seconds, reason)
            if ask.waiters:
                return
            if self._later.get(ask.key) is ask:
                del self._later[ask.key]
            elif self._asked.get(ask.key) is ask:
                self._next(ask.key)
                self._given_up.append(ask)
        self._poller.wake()

    def _next(self, key: _Key) -> None:
        """The message of a volume is done: the turn of the one that waited for it."""
        del self._asked[key]
        later = self._later.pop(key, None)
        if later is not None:
            self._asked[key] = later

    def _not_answered(self, key: _Key, size: int, seconds: float, reason: str) -> AgentError:
        return ExtendNotAnswered(
            domain=key[0], volume=key[1], size=size * MIB, seconds=seconds, reason=reason,
            mailbox=self._boxes.inbox,
        )  # fmt: skip

    # -- the thread ----------------------------------------------------------------------------

    def _turn(self) -> float | None:
        if not self._ready:
            self._boxes.write_inbox(self._host, EMPTY_BLOCK)
            self._slots.adopt(self._boxes.read_outbox(self._host))
            self._ready = True
        self._place()
        self._write()
        if self._slots.asking or self._slots.cleaning:
            self._receive()
            self._nudge()
            self._place()
            self._write()
        if self._slots.asking:
            return self._interval
        return SLOW_INTERVAL if self._slots.cleaning else None

    def _place(self) -> None:
        """Requests into slots, and those out that were given up."""
        with self._lock:
            for ask in self._given_up:
                if ask.slot is not None:
                    self._slots.give_up(ask.slot)
            self._given_up.clear()
            for ask in self._asked.values():
                if ask.slot is None:
                    domain, volume = ask.key
                    ask.slot = self._slots.ask(Extend(domain, volume, ask.size))
                    ask.crowded = ask.slot is None

    def _write(self) -> None:
        """Our block, when it has changed or stood unanswered for long; then the event."""
        now = self._clock.monotonic()
        repeated = self._slots.asking and now - self._written >= self._repeat
        if self._slots.unwritten or repeated:
            news = self._slots.news or repeated
            self._boxes.write_inbox(self._host, self._slots.block())
            self._slots.written()
            self._written = now
            self._event_due = self._event_due or news
        if self._event_due:
            self._boxes.write_inbox(0, fmt.new_event())
            self._event_due = False

    def _receive(self) -> None:
        answers = self._slots.receive(self._boxes.read_outbox(self._host))
        if not answers:
            return
        with self._lock:
            by_slot = {ask.slot: ask for ask in self._asked.values() if ask.slot is not None}
            for slot, new_size in answers.items():
                ask = by_slot.get(slot)
                if ask is not None:
                    ask.tell(new_size)
                    self._next(ask.key)

    def _nudge(self) -> None:
        now = self._clock.monotonic()
        if now - self._nudged >= self._repeat:
            self._nudged = now
            self._slots.nudge()

    def _finish(self) -> None:
        self._boxes.write_inbox(self._host, EMPTY_BLOCK)
