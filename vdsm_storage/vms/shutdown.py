# SPDX-License-Identifier: GPL-2.0-or-later
"""VM.shutdown: the guest is asked to end, or to reboot, in one way after the other.

First by its agent, if that is connected; then by the power button; then, if the caller said so, the
VM is ended (or reset) by force.  Each way has the caller's time-out.  Callers do not wait: it goes
on in a thread, until the VM has ended, or another request for it comes.  It is forgotten when the
agent ends.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from vdsm_storage.base.clock import Clock, Deadline
from vdsm_storage.base.lanes import Lanes
from vdsm_storage.errors import AgentError, LibvirtTimeout, NonResponsiveGuestAgent
from vdsm_storage.host.libvirt_life import LibvirtLife
from vdsm_storage.host.libvirt_model import Change, VmError, VmEvent, Why
from vdsm_storage.vms.drives import agent_channel, parse
from vdsm_storage.vms.registry import Registry

DELAY: Final = 0.0  # seconds, when the caller does not say
TIMEOUT: Final = 30.0  # seconds for each way
LEAST: Final = 1.0  # seconds; the guest must have a moment
LONGEST: Final = 3600.0  # seconds of each of the caller's times
BEGIN: Final = 30.0  # seconds to wait for a thread
LOOK: Final = 0.25  # seconds between two looks at whether it has ended
CONNECTED: Final = "connected"

log = logging.getLogger("vms.shutdown")


@dataclass(frozen=True)
class Shutdown:
    """What is asked for.  Times are in seconds; None is the default."""

    vm: str
    reboot: bool = False
    force: bool = False
    delay: float | None = None
    timeout: float | None = None
    message: str = ""  # guests' agents take none: it is in the log

    @property
    def patience(self) -> float:
        return min(LONGEST, max(LEAST, TIMEOUT if self.timeout is None else self.timeout))

    @property
    def pause(self) -> float:
        return min(LONGEST, max(0.0, DELAY if self.delay is None else self.delay))


class Shutdowns:
    """`event` is the registry's to call."""

    def __init__(
        self, libvirt: LibvirtLife, registry: Registry, lanes: Lanes, clock: Clock
    ) -> None:
        self._libvirt = libvirt
        self._registry = registry
        self._lanes = lanes
        self._clock = clock
        self._lock = threading.Lock()
        self._current: dict[str, _Attempt] = {}

    def begin(self, asked: Shutdown) -> None:
        """Returns when it is under way; one that was, is given up for this.

        Raises NoSuchVM (1), VMIsDown (6), NonResponsiveGuestAgent (19) when there is no way to ask,
        59.
        """
        vm = asked.vm
        self._registry.state(vm)
        root = parse(self._registry.definition(vm, fresh=True).xml)
        ways: list[Callable[[_Attempt], None]] = []
        if agent_channel(root) == CONNECTED:
            ways.append(self._ask_agent)
        if root.find("./features/acpi") is not None:
            ways.append(self._press_button)
        if asked.force:
            ways.append(self._force)
        if not ways:
            reason = "it is not connected, and the VM has no power button; use force, or VM.destroy"
            raise NonResponsiveGuestAgent(vm=vm, reason=reason)
        attempt = _Attempt(asked, self._instance(vm))
        with self._lock:
            before = self._current.get(vm)
            self._current[vm] = attempt
        if before is not None:
            before.over.set()
        self._lanes.submit(f"shutdown {vm}", lambda: self._run(attempt, ways), BEGIN)

    def _instance(self, vm: str) -> int:
        try:
            return self._libvirt.instance(vm)
        except VmError as error:
            raise self._registry.gone(vm, error) from error

    # -- the thread --------------------------------------------------------------------------

    def _run(self, attempt: _Attempt, ways: list[Callable[[_Attempt], None]]) -> None:
        asked = attempt.asked
        what = "reboot" if asked.reboot else "shut down"
        log.info("VM %s shall %s (%s)", asked.vm, what, asked.message or "no message")
        try:
            self._clock.wait(attempt.over, asked.pause)
            for way in ways:
                if attempt.over.is_set() or self._ended(attempt):
                    return
                self._try(attempt, way)
            if not attempt.over.is_set() and not self._ended(attempt):
                log.warning("The guest of VM %s does not %s", asked.vm, what)
        finally:
            with self._lock:
                if self._current.get(asked.vm) is attempt:
                    del self._current[asked.vm]

    def _try(self, attempt: _Attempt, way: Callable[[_Attempt], None]) -> None:
        vm, end = attempt.asked.vm, Deadline(self._clock, attempt.asked.patience)
        try:
            way(attempt)
        except LibvirtTimeout as error:  # an agent that obeys does not answer
            log.info("VM %s: %s", vm, error)
        except VmError as error:
            if error.why is not Why.NO_VM:
                log.info("VM %s cannot be asked: %s", vm, error.text)
            return
        except AgentError as error:
            log.info("VM %s cannot be asked: %s", vm, error)
            return
        while not end.passed() and not self._ended(attempt):
            if self._clock.wait(attempt.over, min(LOOK, end.left())):
                return

    def _ended(self, attempt: _Attempt) -> bool:
        """Whether it is not the VM that it was, or has rebooted."""
        if attempt.rebooted.is_set():
            return True
        try:
            return self._libvirt.instance(attempt.asked.vm) != attempt.instance
        except VmError as error:
            return error.why is Why.NO_VM
        except AgentError:  # libvirt is away: nothing is known
            return False

    # -- ways; each raises VmError, 59 -------------------------------------------------------

    def _ask_agent(self, attempt: _Attempt) -> None:
        asked = attempt.asked
        log.info("VM %s: its guest agent is asked", asked.vm)
        self._libvirt.ask_agent_to_end(asked.vm, asked.patience, reboot=asked.reboot)

    def _press_button(self, attempt: _Attempt) -> None:
        log.info("VM %s: its power button is pressed", attempt.asked.vm)
        self._libvirt.press_button(attempt.asked.vm, reboot=attempt.asked.reboot)

    def _force(self, attempt: _Attempt) -> None:
        vm = attempt.asked.vm
        log.warning("VM %s: its guest does not obey, and is not asked any more", vm)
        if attempt.asked.reboot:
            self._libvirt.reset(vm)
        else:
            self._libvirt.destroy(vm, gracefully=False)

    # -- what libvirt tells ------------------------------------------------------------------

    def event(self, event: VmEvent) -> None:
        with self._lock:
            attempt = self._current.get(event.vm)
        if attempt is None:
            return
        if event.change is Change.REBOOTED and attempt.asked.reboot:
            attempt.rebooted.set()
            attempt.over.set()
        elif event.change is Change.STOPPED:
            attempt.over.set()


class _Attempt:
    """One request under way; `over` when nothing more is to be done for it."""

    def __init__(self, asked: Shutdown, instance: int) -> None:
        self.asked = asked
        self.instance = instance
        self.over = threading.Event()
        self.rebooted = threading.Event()
