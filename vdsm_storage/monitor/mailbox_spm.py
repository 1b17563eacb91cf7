# SPDX-License-Identifier: GPL-2.0-or-later
"""The mailbox of a storage pool manager: extends the volumes that other hosts ask for.

One thread reads and writes; the volumes are extended in lanes, so that one that hangs holds up
neither the thread nor the hosts that ask for volumes elsewhere.
"""

from __future__ import annotations

import collections
import logging
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Final

from vdsm_storage.base.clock import Clock
from vdsm_storage.base.lanes import Lanes
from vdsm_storage.errors import ActionStopped, ResourceExhausted, agent_error
from vdsm_storage.monitor import mailbox_format as fmt
from vdsm_storage.monitor.mailbox_file import Mailboxes
from vdsm_storage.monitor.mailbox_format import BLOCK, CLEAN, EMPTY, EMPTY_BLOCK, HOSTS, MESSAGE
from vdsm_storage.monitor.poller import Poller

log = logging.getLogger("mailbox.spm")

EVENT_INTERVAL: Final = 0.5  # seconds between looks at the block of events
INTERVAL: Final = 2.0  # seconds between looks at all hosts' blocks
TOTAL: Final = 128  # extends at once
PER_DOMAIN: Final = 8  # of them; the others of a domain wait for these
START: Final = 60.0  # seconds that an extend may wait in its lane
# A host clears an answer away within a second.  One that was restarted takes an answer that equals
# an old one for that, and waits on: after so many intervals the answer is taken away, and given
# again as often as this.
MISSED: Final = 5
REPEATS: Final = 3

# extend(domain, volume, size in MiB) -> the size that the volume has now, in MiB
Extender = Callable[[str, str, int], int]
_Place = tuple[int, int]  # host, slot


@dataclass(eq=False)
class _Request:
    place: _Place
    message: bytes
    wanted: fmt.Extend
    repeats: int = 0
    answered: float | None = None  # when


class SpmMailbox:
    """Serves hosts 1 to `hosts` - 1 from `start` to `stop`.

    `extend` is called from many threads, also for one volume at a time that two hosts ask for; it
    must do no harm when the volume has that size already.  What it raises, or a size below the
    one asked for, is answered as a failure.
    """

    def __init__(
        self,
        boxes: Mailboxes,
        extend: Extender,
        lanes: Lanes,
        clock: Clock,
        hosts: int = HOSTS,
        event_interval: float = EVENT_INTERVAL,
        interval: float = INTERVAL,
    ) -> None:
        self._boxes = boxes
        self._extend = extend
        self._lanes = lanes
        self._clock = clock
        self._hosts = hosts
        self._event_interval = event_interval
        self._interval = interval
        self._poller = Poller("mailbox of the SPM", clock, self._turn)
        self._zeroed = False
        self._event: bytes | None = None
        self._next_all = 0.0
        self._inbox = b""  # as it was read last
        self._seen: dict[int, bytes] = {}  # sound blocks by host, without the empty ones
        self._bad: dict[int, bytes] = {}  # blocks with wrong checksums that were told of
        self._outbox = bytearray(hosts * BLOCK)
        self._dirty: set[int] = set()  # hosts whose block of the outbox must be written
        self._current: dict[_Place, _Request] = {}  # what each slot asks for
        self._queue: collections.deque[_Request] = collections.deque()
        self._again: list[_Request] = []  # to be queued at the next look at all hosts
        self._running: collections.Counter[str] = collections.Counter()  # by domain
        self._done: collections.deque[tuple[_Request, Future[Any]]] = collections.deque()

    def start(self) -> None:
        self._poller.start()

    def stop(self, timeout: float = 10.0) -> bool:
        """Nothing is answered any more when it returns True.  Extends that run are left to end.

        False: the storage hangs, and one write of answers may still reach it.
        """
        return self._poller.stop(timeout)

    # -- the thread ----------------------------------------------------------------------------

    def _turn(self) -> float:
        if not self._zeroed:
            self._boxes.write_outbox(0, bytes(self._outbox))
            self._zeroed = True
        self._take_results()
        self._look()
        self._start_extends()
        self._write()
        return self._event_interval

    def _look(self) -> None:
        """Read the event, and everything when it is new or it is time."""
        now = self._clock.monotonic()
        if now < self._next_all:
            found = fmt.event_of(self._boxes.read_inbox(0, 1))
            if found == self._event:
                return
        self._queue.extend(self._again)  # the empty answer is on the storage by now
        self._again.clear()
        data = self._boxes.read_inbox(0, self._hosts)
        self._event = fmt.event_of(data[:BLOCK])
        self._next_all = now + self._interval
        if data != self._inbox:
            for host in range(1, self._hosts):
                block = data[host * BLOCK : (host + 1) * BLOCK]
                if block != self._seen.get(host, EMPTY_BLOCK):
                    self._take_block(host, block)
            self._inbox = data
        self._repeat_missed(now)

    def _take_block(self, host: int, block: bytes) -> None:
        if not fmt.is_sound(block):
            if self._bad.get(host) != block:
                log.warning("Host %d: the checksum of its mailbox is wrong, it is ignored", host)
                self._bad[host] = block
                self._next_all = 0.0  # it may be half written: look again soon
            return
        self._bad.pop(host, None)
        old = self._seen.get(host, EMPTY_BLOCK)
        if block == EMPTY_BLOCK:
            self._seen.pop(host, None)
        else:
            self._seen[host] = block
        for slot, (before, now) in enumerate(
            zip(fmt.messages(old), fmt.messages(block), strict=True)
        ):
            if before != now:
                self._take_message((host, slot), now)

    def _take_message(self, place: _Place, message: bytes) -> None:
        self._current.pop(place, None)  # an answer to what was there before would be misread
        if message == CLEAN:
            self._put(place, CLEAN)
        elif fmt.is_empty(message):
            if self._answer(place) not in (CLEAN, EMPTY):  # to a host that has started anew
                self._put(place, EMPTY)
        elif (wanted := fmt.decode(message)) is None:
            log.error("Host %d asks for something unknown: %s", place[0], message.hex())
        else:
            request = _Request(place, message, wanted)
            self._current[place] = request
            self._queue.append(request)

    def _repeat_missed(self, now: float) -> None:
        """Ask ourselves again for what was answered, and stands there all the same."""
        for request in self._current.values():
            if request.answered is None or request.repeats >= REPEATS:
                continue
            if now - request.answered >= MISSED * self._interval:
                request.answered = None
                request.repeats += 1
                self._put(request.place, EMPTY)
                self._again.append(request)

    # -- extending -----------------------------------------------------------------------------

    def _start_extends(self) -> None:
        waiting = list(self._queue)
        self._queue.clear()
        total = self._running.total()
        for request in waiting:
            domain = request.wanted.domain
            if self._current.get(request.place) is not request:
                continue  # the host gave it up
            if total >= TOTAL or self._running[domain] >= PER_DOMAIN:
                self._queue.append(request)
                continue
            self._running[domain] += 1
            total += 1
            self._start_extend(request)

    def _start_extend(self, request: _Request) -> None:
        wanted = request.wanted
        log.info(
            "Host %d asks for %d MiB for volume %s of domain %s",
            request.place[0], wanted.size, wanted.volume, wanted.domain,
        )  # fmt: skip

        def work() -> int:
            return self._extend(wanted.domain, wanted.volume, wanted.size)

        def ended(future: Future[Any]) -> None:
            self._done.append((request, future))
            self._poller.wake()

        try:
            future = self._lanes.submit(f"mailbox {wanted.domain}", work, START)
        except ResourceExhausted as error:
            future = Future()
            future.set_exception(error)
        future.add_done_callback(ended)

    def _take_results(self) -> None:
        while self._done:
            request, future = self._done.popleft()
            domain = request.wanted.domain
            self._running[domain] -= 1
            if not self._running[domain]:
                del self._running[domain]
            size = _result(request, future)
            if self._current.get(request.place) is request:
                request.answered = self._clock.monotonic()
                self._put(request.place, fmt.answer(request.message, size))

    # -- answers -------------------------------------------------------------------------------

    def _answer(self, place: _Place) -> bytes:
        start = place[0] * BLOCK + place[1] * MESSAGE
        return bytes(self._outbox[start : start + MESSAGE])

    def _put(self, place: _Place, message: bytes) -> None:
        start = place[0] * BLOCK + place[1] * MESSAGE
        self._outbox[start : start + MESSAGE] = message
        self._dirty.add(place[0])

    def _write(self) -> None:
        for first, last in _runs(self._dirty):
            if self._poller.stopping:
                return
            self._boxes.write_outbox(first, bytes(self._outbox[first * BLOCK : (last + 1) * BLOCK]))
            self._dirty.difference_update(range(first, last + 1))


def _result(request: _Request, future: Future[Any]) -> int:
    """The size to answer: 0 for a failure, whose reason is logged."""
    wanted = request.wanted
    error = ActionStopped() if future.cancelled() else future.exception()
    if error is not None:
        log.error(
            "Volume %s of domain %s was not extended to %d MiB for host %d: %s",
            wanted.volume, wanted.domain, wanted.size, request.place[0], error,
            exc_info=error if agent_error(error) is None else None,
        )  # fmt: skip
        return 0
    size = int(future.result())
    if not wanted.size <= size <= fmt.MAX_SIZE:
        log.error(
            "Volume %s of domain %s has %d MiB, host %d asked for %d",
            wanted.volume, wanted.domain, size, request.place[0], wanted.size,
        )  # fmt: skip
        return 0
    return size


def _runs(hosts: set[int]) -> Iterator[tuple[int, int]]:
    """(first, last) of neighbours: one write each."""
    first = last = -1
    for host in sorted(hosts):
        if first >= 0 and host == last + 1:
            last = host
            continue
        if first >= 0:
            yield first, last
        first = last = host
    if first >= 0:
        yield first, last
