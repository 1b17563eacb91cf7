# SPDX-License-Identifier: GPL-2.0-or-later
"""Freezing and thawing the file systems of guests, and a guard that lets none stay frozen.

A guest that cannot be told from a frozen one (its agent did not answer in time, libvirt went away,
this agent died) is thawed until that succeeds or the guest has ended.  One that its caller leaves
frozen is thawed after a limit, and whoever listens is told.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any, Final

from vdsm_storage.base.clock import Clock
from vdsm_storage.base.lanes import Lanes
from vdsm_storage.base.locks import Lock, Locks
from vdsm_storage.errors import (
    AgentError,
    FreezeGuestFSFailed,
    LibvirtLost,
    LibvirtTimeout,
    LibvirtUnavailable,
    NonResponsiveGuestAgent,
    NoSuchVM,
    ThawGuestFSFailed,
    UnsupportedGuestOperation,
    VMIsDown,
)
from vdsm_storage.host.libvirt_model import Change, VmError, VmEvent, Why
from vdsm_storage.host.libvirt_vms import LibvirtVms
from vdsm_storage.vms import frozen
from vdsm_storage.vms.frozen import FrozenVms, Record
from vdsm_storage.vms.registry import Registry

LOOK: Final = 1.0  # seconds between two looks of the guard at what is due
LATER: Final = 30.0  # seconds at most between two attempts to thaw a guest
ATTEMPT: Final = 60.0  # seconds that an attempt may wait for its thread
# libvirt did not even try: the agent's channel is closed, or the VM has none.
UNSENT: Final = ("agent is not connected", "agent is not configured")

log = logging.getLogger("vms.freeze")

Tell = Callable[[str, dict[str, Any]], None]


@dataclass(frozen=True)
class Limits:
    """Seconds: for the guest's agent to answer, and that a guest may stay frozen."""

    answer: float
    stay: float


class Freezing:
    """`tell(vm, facts)` is called when a guest thawed that its caller believes to be frozen."""

    def __init__(
        self,
        registry: Registry,
        vms: LibvirtVms,
        records: FrozenVms,
        limits: Limits,
        clock: Clock,
        tell: Tell,
    ) -> None:
        self._registry = registry
        self._vms = vms
        self._records = records
        self._limits = limits
        self._clock = clock
        self._tell = tell
        self._locks = Locks(clock)

    # -- what callers ask --------------------------------------------------------------------

    def freeze(self, vm: str, by: str = frozen.FREEZE) -> int:
        """Returns how many file systems were frozen.  Answers in bounded time.

        Raises NoSuchVM (1), VMIsDown (6), NonResponsiveGuestAgent (19), 75, 76, 59.
        """
        with self._turn(vm):
            self._registry.must_run(vm)
            before = self._records.get(vm)
            if before is None or before.state != frozen.FROZEN:
                self._records.put(Record(vm, by, self._clock.monotonic()))
            try:
                count = self._vms.freeze(vm, self._limits.answer)
            except (VmError, LibvirtUnavailable, LibvirtTimeout) as error:
                self._not_frozen(vm, before, error)
                if isinstance(error, VmError):
                    raise self._translate(vm, "freeze", error) from error
                raise
            self._records.set_state(vm, frozen.FROZEN, count)
        log.info("VM %s: %s file systems frozen", vm, count)
        return count

    def _not_frozen(self, vm: str, before: Record | None, error: Exception) -> None:
        """A freeze failed: does anything have to be thawed?"""
        if before is not None and before.state == frozen.FROZEN:
            return  # it was frozen before, and its caller will thaw it
        if _is_certain(error):
            if before is None or (isinstance(error, VmError) and error.why is Why.NO_VM):
                self._records.drop(vm)
            else:  # what had to be thawed before still has to be
                self._records.put(before)
            return
        log.warning("VM %s may be frozen now or later, and will be thawed: %s", vm, error)
        self._records.set_state(vm, frozen.THAWING)

    def thaw(self, vm: str) -> bool:
        """False for a guest that had been frozen, and thawed by itself before now.

        One that fails is tried again by the guard.  Raises 1, 6, 19, 75, 77, 59.
        """
        with self._turn(vm):
            record = self._records.get(vm)
            if record is not None:
                self._records.set_state(vm, frozen.THAWING)
            if not self._registry.enabled:
                raise NoSuchVM(vm=vm)
            try:  # at once: the guest stands still, and its state is looked at when this fails
                count = self._vms.thaw(vm, self._limits.answer)
            except VmError as error:
                raise self._translate(vm, "thaw", error) from error
            self._records.drop(vm)
        log.info("VM %s: %s file systems thawed", vm, count)
        if record is not None and record.state == frozen.FROZEN and record.count and not count:
            # Windows does that after ten seconds.
            self._thawed_early(vm, record, "the guest thawed by itself")
            return False
        return True

    def is_frozen(self, vm: str) -> bool:
        record = self._records.get(vm)
        return record is not None and record.state == frozen.FROZEN

    def was_thawed_early(self, vm: str) -> bool:
        """Whether the guard thawed a guest that its caller may still take for frozen.

        For as long again as a guest may be frozen: engines leave some frozen for ever, and in a
        live migration of disks call guests frozen that nobody froze.
        """
        record = self._records.get(vm)
        if record is None or record.state != frozen.THAWED:
            return False
        return self._clock.monotonic() - record.since < 2 * self._limits.stay

    def age(self, vm: str) -> float | None:
        """Seconds since a guest was told to freeze, while it is, or may be, frozen."""
        record = self._records.get(vm)
        if record is None or record.state == frozen.THAWED:
            return None
        return max(0.0, self._clock.monotonic() - record.since)

    @contextlib.contextmanager
    def _turn(self, vm: str) -> Any:
        """One after the other, on one VM."""
        patience = 2 * (self._limits.answer + LOOK) + ATTEMPT
        with self._locks.held([Lock("vm", vm)], patience):
            yield

    def _translate(self, vm: str, what: str, error: VmError) -> Exception:
        if error.why is Why.NO_VM:
            return self._registry.gone(vm, error)
        if error.why is Why.NOT_RUNNING:
            try:
                self._registry.state(vm)
            except AgentError as down:
                return down
        if error.why is Why.AGENT:
            return NonResponsiveGuestAgent(vm=vm, reason=error.text)
        if error.why is Why.UNSUPPORTED:
            return UnsupportedGuestOperation(vm=vm, operation=what, reason=error.text)
        failure = FreezeGuestFSFailed if what == "freeze" else ThawGuestFSFailed
        return failure(vm=vm, reason=error.text)

    def _thawed_early(self, vm: str, record: Record, reason: str) -> None:
        age = self._clock.monotonic() - record.since
        log.warning("VM %s was frozen for %.1f s and is not any more: %s", vm, age, reason)
        self._tell(vm, {"reason": reason, "frozenFor": f"{age:.1f}"})

    # -- what the guard does -----------------------------------------------------------------

    def due(self, record: Record) -> bool:
        """Whether the guard has to thaw it."""
        if record.state == frozen.THAWING:
            return True
        age = self._clock.monotonic() - record.since
        return record.state == frozen.FROZEN and age >= self._limits.stay

    def rescue(self, vm: str) -> bool:
        """Thaw a guest that is due, if it still is; False when it has to be tried again."""
        with self._turn(vm):
            record = self._records.get(vm)
            if record is None or not self.due(record):
                return True
            try:
                self._registry.state(vm)
                self._vms.thaw(vm, self._limits.answer)
            except VmError as error:
                if error.why is not Why.NO_VM:
                    log.warning("VM %s could not be thawed, tried again: %s", vm, error)
                    return False
                self._records.drop(vm)
                return True
            except (NoSuchVM, VMIsDown):
                self._records.drop(vm)
                return True
            except AgentError as error:
                log.warning("VM %s could not be thawed, tried again: %s", vm, error)
                return False
            if record.state == frozen.FROZEN:
                self._records.set_state(vm, frozen.THAWED)
            else:
                self._records.drop(vm)
        limit = f"nobody thawed it within {self._limits.stay:g} s"
        reason = limit if record.state == frozen.FROZEN else "its freeze or thaw had failed"
        self._thawed_early(vm, record, reason)
        return True

    def records(self) -> Collection[Record]:
        return self._records.all()

    def forget(self, vm: str) -> None:
        """It has ended."""
        self._records.drop(vm)


def _is_certain(error: Exception) -> bool:
    """Whether the guest's agent was not even asked, or obeys no such command."""
    if isinstance(error, VmError):
        unasked = error.why in (Why.NO_VM, Why.NOT_RUNNING, Why.UNSUPPORTED)
        return unasked or any(words in error.text for words in UNSENT)
    return isinstance(error, LibvirtUnavailable) and not isinstance(error, LibvirtLost)


class Guard:
    """Looks at what is frozen, and thaws what is due: each guest in a thread of its own."""

    def __init__(self, freezing: Freezing, lanes: Lanes, clock: Clock) -> None:
        self._freezing = freezing
        self._lanes = lanes
        self._clock = clock
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._at_work: set[str] = set()
        self._next: dict[str, tuple[float, float]] = {}  # when to try again, and the pause then

    def start(self) -> None:
        threading.Thread(target=self._run, name="frozen guests", daemon=True).start()

    def close(self) -> None:
        self._closed.set()

    def hurry(self) -> None:
        """libvirt is there again: what waits is tried at once."""
        with self._lock:
            self._next.clear()

    def event(self, event: VmEvent) -> None:
        if event.change is Change.STOPPED:
            self._freezing.forget(event.vm)
        elif event.change is Change.AGENT:
            with self._lock:
                self._next.pop(event.vm, None)

    def _run(self) -> None:
        while not self._clock.wait(self._closed, LOOK):
            for record in self._freezing.records():
                if self._freezing.due(record):
                    self._begin(record.vm)

    def _begin(self, vm: str) -> None:
        now = self._clock.monotonic()
        with self._lock:
            when, _ = self._next.get(vm, (0.0, 0.0))
            if vm in self._at_work or when > now:
                return
            self._at_work.add(vm)
        try:
            self._lanes.submit(f"thaw {vm}", lambda: self._rescue(vm), ATTEMPT)
        except AgentError as error:
            log.warning("VM %s cannot be thawed yet: %s", vm, error)
            self._done(vm, thawed=False)

    def _rescue(self, vm: str) -> None:
        thawed = False
        try:
            thawed = self._freezing.rescue(vm)
        finally:
            self._done(vm, thawed=thawed)

    def _done(self, vm: str, *, thawed: bool) -> None:
        with self._lock:
            self._at_work.discard(vm)
            if thawed:
                self._next.pop(vm, None)
            else:
                _, pause = self._next.get(vm, (0.0, LOOK / 2))
                pause = min(2 * pause, LATER)
                self._next[vm] = (self._clock.monotonic() + pause, pause)
