# SPDX-License-Identifier: GPL-2.0-or-later
"""Watches storage domains.

One scheduler thread starts each domain's check when it is due; the check runs in a lane of its
own.  While a check hangs, no second one is started for that domain: its last answer just grows
older, which is what engines look at.  Host ids are acquired and released here too, because a
domain that is watched is a domain that is in use.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from typing import Any, Final

from vdsm_storage.base.clock import Clock
from vdsm_storage.base.lanes import Lanes
from vdsm_storage.domains.domain import Capacity, Domain
from vdsm_storage.domains.hostid import leave
from vdsm_storage.domains.registry import Registry
from vdsm_storage.errors import (
    AgentError,
    ResourceExhausted,
    StorageDomainDoesNotExist,
)

log = logging.getLogger("monitor")

IO_ERROR: Final = 379  # the code of a domain that cannot be read for a reason without a number
BUSY_INTERVAL: Final = 1.0  # seconds between looks at a host id that is being acquired
RECOVERY: Final = 3600.0  # seconds that a recovery may wait for its turn
ROUND: Final = 300.0  # a check may hang this long before its lane forgets that it wanted to run


@dataclass(frozen=True)
class Status:
    """What the last check found.  `checked` is monotonic seconds, None before the first."""

    code: int = 0
    valid: bool = True
    acquired: bool = False
    version: int = -1
    delay: float = 0.0  # seconds to read the metadata from the storage
    checked: float | None = None
    capacity: Capacity | None = None
    message: str = ""

    @property
    def usable(self) -> bool:
        return self.checked is not None and self.valid and self.acquired


@dataclass
class _Watch:
    host_id: int | None
    since: float
    due: float
    status: Status = field(default_factory=Status)
    running: Future[Any] | None = None
    stopping: bool = False


class Health:
    """`on_change(sd_id, record)` is told when a domain turns valid, invalid or gets its host id;
    `on_usable(sd_id)` when work on it can begin or be recovered, in a lane of its own.
    """

    def __init__(
        self,
        registry: Registry,
        lanes: Lanes,
        clock: Clock,
        interval: float,
        on_change: Callable[[str, dict[str, Any]], None],
        on_usable: Callable[[str], None],
    ) -> None:
        self._registry = registry
        self._lanes = lanes
        self._clock = clock
        self._interval = interval
        self._on_change = on_change
        self._on_usable = on_usable
        self._changed = threading.Condition()
        self._watches: dict[str, _Watch] = {}
        self._closed = False
        self._thread: threading.Thread | None = None

    # -- domains.pool.Watcher ----------------------------------------------------------------

    def start(self, sd_id: str, host_id: int | None) -> None:
        """Watch; the first check begins at once.  A domain that is watched stays as it is."""
        now = self._clock.monotonic()
        with self._changed:
            watch = self._watches.get(sd_id)
            if watch is not None and not watch.stopping and watch.host_id == host_id:
                return
            running = watch.running if watch is not None else None
            self._watches[sd_id] = _Watch(host_id, since=now, due=now, running=running)
            self._run_scheduler()
            self._changed.notify_all()

    def _run_scheduler(self) -> None:
        if self._thread is None and not self._closed:
            self._thread = threading.Thread(target=self._loop, name="monitor", daemon=True)
            self._thread.start()

    def stop(self, sd_id: str) -> None:
        with self._changed:
            watch = self._watches.get(sd_id)
            if watch is None and self._has_host_id(sd_id):
                watch = self._watches[sd_id] = _Watch(None, since=0.0, due=0.0)
                self._run_scheduler()
            if watch is not None:
                watch.stopping = True
                watch.due = self._clock.monotonic()
                self._changed.notify_all()

    def _has_host_id(self, sd_id: str) -> bool:
        """Whether one was asked for, by an operation on a domain that is not watched."""
        domain = self._registry.peek(sd_id)
        lockspace = domain.lockspace if domain is not None else None
        return lockspace is not None and lockspace.host_id is not None

    def capacity(self, sd_id: str) -> Capacity | None:
        with self._changed:
            watch = self._watches.get(sd_id)
        return watch.status.capacity if watch is not None and watch.status.valid else None

    def busy(self, sd_id: str) -> bool:
        with self._changed:
            return sd_id in self._watches

    def watched(self) -> list[str]:
        with self._changed:
            return sorted(sd for sd, watch in self._watches.items() if not watch.stopping)

    def usable(self, sd_id: str) -> bool:
        with self._changed:
            watch = self._watches.get(sd_id)
        return watch is not None and not watch.stopping and watch.status.usable

    # -- what engines read -------------------------------------------------------------------

    def storage_domains(self, wanted: Sequence[str] = ()) -> dict[str, dict[str, Any]]:
        """getStats.storageDomains: {uuid: record}; all watched domains, or the `wanted` ones.

        `lastCheck` is the age of the last answer in seconds, `delay` the time of its read, both
        as strings; `actual` is false until there is an answer.
        """
        now = self._clock.monotonic()
        with self._changed:
            found = {sd: w for sd, w in self._watches.items() if not w.stopping}
            return {
                sd: _record(watch.status, now, watch.since)
                for sd, watch in found.items()
                if not wanted or sd in wanted
            }

    # -- the scheduler -----------------------------------------------------------------------

    def _loop(self) -> None:
        while True:
            with self._changed:
                if self._closed:
                    return
                now = self._clock.monotonic()
                for sd_id, watch in self._watches.items():
                    if watch.due <= now and (watch.running is None or watch.running.done()):
                        self._begin(sd_id, watch, now)
                waiting = [w.due for w in self._watches.values() if _is_idle(w)]
                self._changed.wait(max(0.01, min(waiting, default=now + 60.0) - now))

    def _begin(self, sd_id: str, watch: _Watch, now: float) -> None:
        watch.due = now + self._interval
        work = self._leave if watch.stopping else self._check
        try:
            watch.running = self._lanes.submit(
                f"monitor {sd_id}", lambda: work(sd_id, watch), ROUND
            )
        except ResourceExhausted as error:
            log.warning("Domain %s is not checked now: %s", sd_id, error)
            return
        watch.running.add_done_callback(self._ended)

    def _ended(self, future: Future[Any]) -> None:
        if not future.cancelled() and (error := future.exception()) is not None:
            log.error("A domain's check failed", exc_info=error)
        with self._changed:
            self._changed.notify_all()

    # -- one check, in its lane --------------------------------------------------------------

    def _check(self, sd_id: str, watch: _Watch) -> None:
        try:
            status = self._look(self._registry.get(sd_id), watch)
        except (StorageDomainDoesNotExist, FileNotFoundError) as error:
            self._registry.forget(sd_id)  # the next check looks for it on every connection
            status = _failed(watch.status, StorageDomainDoesNotExist.code, str(error))
        except AgentError as error:
            status = _failed(watch.status, error.code, str(error))
        except OSError as error:
            status = _failed(watch.status, IO_ERROR, str(error))
        status = replace(status, checked=self._clock.monotonic())
        with self._changed:
            old, watch.status = watch.status, status
            if watch.host_id is not None and status.valid and not status.acquired:
                watch.due = min(watch.due, self._clock.monotonic() + BUSY_INTERVAL)
            current = self._watches.get(sd_id) is watch and not watch.stopping
        if current:
            self._tell(sd_id, old, status)

    def _look(self, domain: Domain, watch: _Watch) -> Status:
        started = self._clock.monotonic()
        found = domain.metadata()  # read from the storage itself
        delay = self._clock.monotonic() - started
        domain.self_test()
        return Status(
            acquired=self._host_id(domain, watch),
            version=found.version,
            delay=delay,
            capacity=domain.capacity(),
        )

    @staticmethod
    def _host_id(domain: Domain, watch: _Watch) -> bool:
        """Whether the host id is held; asks for it if not."""
        lockspace = domain.lockspace
        if lockspace is None:
            return True
        if lockspace.is_held():
            return True
        if watch.host_id is None or watch.stopping:
            return False
        try:
            lockspace.start_acquire(watch.host_id)
        except AgentError as error:
            log.warning("%s", error)
        return lockspace.is_held()

    def _leave(self, sd_id: str, watch: _Watch) -> None:
        """The end of watching: give the host id back; tried again until it works."""
        domain = self._registry.peek(sd_id)
        if domain is not None and domain.lockspace is not None:
            try:
                leave(domain)
            except AgentError as error:
                log.warning("Domain %s keeps its host id for now: %s", sd_id, error)
                with self._changed:
                    watch.due = self._clock.monotonic() + BUSY_INTERVAL
                return
        with self._changed:
            if self._watches.get(sd_id) is watch:
                del self._watches[sd_id]

    def _tell(self, sd_id: str, old: Status, new: Status) -> None:
        changed = old.checked is None or (old.code, old.valid) != (new.code, new.valid)
        if changed or old.acquired != new.acquired:
            now = self._clock.monotonic()
            level = logging.INFO if new.valid else logging.WARNING
            log.log(level, "Domain %s: valid %s, host id %s %s", sd_id, new.valid, new.acquired,
                    new.message)  # fmt: skip
            self._on_change(sd_id, _record(new, now, now))
        if new.usable and not old.usable:
            # Recovery may take long; the next check must not wait for it.
            self._lanes.submit(f"recover {sd_id}", lambda: self._on_usable(sd_id), RECOVERY)

    def close(self, timeout: float) -> None:
        """Stop watching; wait at most `timeout` seconds for host ids to be given back."""
        for sd_id in self.watched():
            self.stop(sd_id)
        deadline = self._clock.monotonic() + timeout
        with self._changed:
            while self._watches and (left := deadline - self._clock.monotonic()) > 0:
                self._changed.wait(left)
            self._closed = True
            self._changed.notify_all()


def _is_idle(watch: _Watch) -> bool:
    return watch.running is None or watch.running.done()


def _failed(old: Status, code: int, message: str) -> Status:
    return replace(old, code=code, valid=False, message=message)


def _record(status: Status, now: float, since: float) -> dict[str, Any]:
    checked = since if status.checked is None else status.checked
    return {
        "code": status.code,
        "lastCheck": f"{max(0.0, now - checked):.1f}",
        "delay": f"{status.delay:.6f}",
        "valid": status.valid,
        "acquired": status.acquired,
        "actual": status.checked is not None,
        "version": status.version,
    }
