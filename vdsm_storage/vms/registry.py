# SPDX-License-Identifier: GPL-2.0-or-later
"""The VMs of this host: whatever libvirt runs, whoever started it.

libvirt is asked what there is each time.  What is kept here is what changes seldom and costs a call
a VM: its XML with its drives, until an event (or an operation of ours) says that it changed.
"""

from __future__ import annotations

import threading
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from vdsm_storage.errors import LibvirtFailure, NoSuchVM, VMIsDown
from vdsm_storage.host.libvirt_model import Change, VmError, VmEvent, VmState, Why
from vdsm_storage.host.libvirt_vms import LibvirtVms
from vdsm_storage.vms import drives
from vdsm_storage.vms.drives import Drive

ENDED = 1000  # VMs that ended are remembered, so that "down" is told from "unknown"


@dataclass(frozen=True)
class Definition:
    """A VM's XML and what was read from it.  `hash` changes with the XML."""

    xml: str
    hash: str
    drives: Sequence[Drive]
    has_agent: bool

    @classmethod
    def of(cls, xml: str) -> Definition:
        root = drives.parse(xml)
        return cls(
            xml=xml,
            hash=str(zlib.crc32(xml.encode())),
            drives=tuple(drives.drives(root)),
            has_agent=drives.agent_channel(root) is not None,
        )


class Registry:
    """`watch` is part of the wiring."""

    def __init__(self, vms: LibvirtVms) -> None:
        self._vms = vms
        self._lock = threading.Lock()
        self._definitions: dict[str, Definition] = {}
        self._changes: dict[str, int] = {}  # events of a VM, so that no old XML is kept
        # In their order, with what they were as far as it is known.
        self._ended: dict[str, Definition | None] = {}
        self._active: dict[str, bool] = {}  # VMs that run, with whether they are not paused
        self._listeners: list[Callable[[VmEvent], None]] = []
        self._connected: list[Callable[[], None]] = []
        self._followers: list[Callable[[str], None]] = []
        vms.watch(self._event, self._new_connection)

    @property
    def enabled(self) -> bool:
        return self._vms.enabled

    def watch(self, event: Callable[[VmEvent], None], connected: Callable[[], None]) -> None:
        """Wiring: who wants to know, after the registry does."""
        self._listeners.append(event)
        self._connected.append(connected)

    def when_changed(self, callback: Callable[[str], None]) -> None:
        """Wiring: told of a VM that an operation of ours has changed; must not wait."""
        self._followers.append(callback)

    # -- looking -----------------------------------------------------------------------------

    def counts(self) -> tuple[int, int]:
        """VMs that run, and those of them that are not paused; as far as is known, at once."""
        with self._lock:
            return len(self._active), sum(self._active.values())

    def running(self) -> list[VmState]:
        """Raises LibvirtUnavailable, LibvirtTimeout (59)."""
        if not self.enabled:
            return []
        return [state for state in self._all() if state.running]

    def _all(self) -> list[VmState]:
        try:
            return self._vms.all()
        except VmError as error:
            raise LibvirtFailure(call="list VMs", reason=error.text) from error

    def state(self, vm: str) -> VmState:
        """Of a VM that runs.  Raises NoSuchVM (1), VMIsDown (6), 59."""
        if not self.enabled:
            raise NoSuchVM(vm=vm)
        try:
            state = self._vms.state(vm)
        except VmError as error:
            raise self.gone(vm, error) from error
        if not state.running:
            raise VMIsDown(vm=vm)
        return state

    def must_run(self, vm: str) -> None:
        """As far as is known, or else by libvirt: who calls libvirt next hears if it has ended.

        Raises NoSuchVM (1), VMIsDown (6), 59.
        """
        with self._lock:
            known = vm in self._active
        if not known:
            self.state(vm)

    def gone(self, vm: str, error: VmError) -> Exception:
        """What to raise for a VM that cannot be found, or another failure of libvirt's."""
        if error.why is Why.NO_VM:
            with self._lock:  # of an end the event may come later
                ran = vm in self._ended or vm in self._active
            return VMIsDown(vm=vm) if ran else NoSuchVM(vm=vm)
        return LibvirtFailure(call=f"VM {vm}", reason=error.text)

    def has_ended(self, vm: str) -> bool:
        """Whether a VM ran here, and does not any more."""
        with self._lock:
            return vm in self._ended

    def forget(self, vm: str) -> Sequence[Drive]:
        """A VM that has ended is unknown from now on; returns the drives that it had."""
        with self._lock:
            known = self._ended.pop(vm, None)
        return known.drives if known is not None else ()

    def definition(self, vm: str, *, fresh: bool = False) -> Definition:
        """Of a VM that exists.  Raises NoSuchVM (1), VMIsDown (6), 59."""
        with self._lock:
            known = self._definitions.get(vm)
            changes = self._changes.get(vm, 0)
        if known is not None and not fresh:
            return known
        if not self.enabled:
            raise NoSuchVM(vm=vm)
        try:
            found = Definition.of(self._vms.xml(vm))
        except VmError as error:
            raise self.gone(vm, error) from error
        with self._lock:
            if self._changes.get(vm, 0) == changes:
                self._definitions[vm] = found
        return found

    def changed(self, vm: str) -> None:
        """Its XML is not what it was."""
        with self._lock:
            self._forget(vm)
        for follower in self._followers:
            follower(vm)

    def _forget(self, vm: str) -> None:
        self._definitions.pop(vm, None)
        self._changes[vm] = self._changes.get(vm, 0) + 1

    # -- what libvirt tells ------------------------------------------------------------------

    def _event(self, event: VmEvent) -> None:
        with self._lock:
            known = self._definitions.get(event.vm)
            self._forget(event.vm)
            if event.change in (Change.STARTED, Change.RESUMED, Change.PAUSED):
                self._active[event.vm] = event.change is not Change.PAUSED
            if event.change is Change.STOPPED:
                self._changes.pop(event.vm, None)
                self._active.pop(event.vm, None)
                self._ended[event.vm] = known
                if len(self._ended) > ENDED:
                    del self._ended[next(iter(self._ended))]
            elif event.change is Change.STARTED:
                self._ended.pop(event.vm, None)
        for listener in self._listeners:
            listener(event)

    def _new_connection(self) -> None:
        """What happened meanwhile is not known."""
        running = {state.id: state.status != "Paused" for state in self.running()}
        with self._lock:
            self._active = running
            for vm in list(self._definitions):
                self._forget(vm)
        for callback in self._connected:
            callback()
