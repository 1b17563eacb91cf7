# SPDX-License-Identifier: GPL-2.0-or-later
"""Lets go of volumes whose disks are gone from VMs while nobody waited for that.

A guest may give a disk back long after it was asked to, and a VM that ends gives all of them back.
An event of libvirt's makes this look at the VM, and so does every new connection.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import Final

from vdsm_storage.base.clock import Clock
from vdsm_storage.base.lanes import Lanes
from vdsm_storage.errors import AgentError, NoSuchVM, VMIsDown
from vdsm_storage.host.libvirt_model import Change, VmError, VmEvent
from vdsm_storage.vms import records
from vdsm_storage.vms.keeping import Keeping
from vdsm_storage.vms.registry import Registry
from vdsm_storage.vms.vm_secrets import VmSecrets

SOON: Final = 1.0  # seconds in which an operation of ours may have done it
LATER: Final = 30.0  # seconds to the next attempt
ATTEMPT: Final = 120.0  # seconds that one may wait for its thread

log = logging.getLogger("vms.sweeper")


class Sweeper:
    """One VM after the other, in a thread of its own each."""

    def __init__(
        self,
        registry: Registry,
        keeping: Keeping,
        secrets: VmSecrets,
        lanes: Lanes,
        clock: Clock,
        coming: Callable[[str], bool],
    ) -> None:
        """`coming(vm)`: it is on its way from another host, and will be let go by whoever waits for
        it if it does not come."""
        self._registry = registry
        self._coming = coming
        self._secrets = secrets
        self._keeping = keeping
        self._lanes = lanes
        self._clock = clock
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._woken = threading.Event()
        self._due: dict[str, float] = {}  # monotonic seconds

    def start(self) -> None:
        threading.Thread(target=self._run, name="swept disks", daemon=True).start()

    def close(self) -> None:
        self._closed.set()
        self._woken.set()

    # -- from the registry -------------------------------------------------------------------

    def event(self, event: VmEvent) -> None:
        if event.change is Change.DEVICES:
            self._later(event.vm, SOON)
        elif event.change is Change.STOPPED:
            self._later(event.vm, 0.0)

    def connected(self) -> None:
        """What happened meanwhile is not known."""
        running = [state.id for state in self._registry.running()]
        for vm in {*running, *self._keeping.kept()}:
            self._later(vm, SOON)
        self._lanes.submit("sweep secrets", self._secrets.clean, ATTEMPT)

    def _later(self, vm: str, seconds: float) -> None:
        when = self._clock.monotonic() + seconds
        with self._lock:
            self._due[vm] = min(when, self._due.get(vm, when))
        self._woken.set()

    # -- the thread --------------------------------------------------------------------------

    def _run(self) -> None:
        while not self._closed.is_set():
            self._woken.clear()
            now = self._clock.monotonic()
            with self._lock:
                ready = [vm for vm, when in self._due.items() if when <= now]
                for vm in ready:
                    del self._due[vm]
                pause = min((when - now for when in self._due.values()), default=LATER)
            for vm in ready:
                self._start(vm)
            if not ready:
                self._clock.wait(self._woken, pause)

    def _start(self, vm: str) -> None:
        try:
            if self._has_work(vm):
                self._lanes.submit(f"sweep {vm}", lambda: self._sweep(vm), ATTEMPT)
        except AgentError as error:
            log.info("VM %s is looked at later: %s", vm, error)
            self._later(vm, LATER)

    def _has_work(self, vm: str) -> bool:
        """Whether the VM has records of disks that it has not, or of copies that failed, or has
        ended and left something."""
        if self._coming(vm):
            return False
        try:
            self._registry.state(vm)
            definition = self._registry.definition(vm)
        except (NoSuchVM, VMIsDown):
            return self._keeping.has(vm)
        there = {drive.name for drive in definition.drives}
        return not records.records(definition.xml).keys() <= there or bool(
            self._keeping.dead_replicas(vm, definition)
        )

    def _sweep(self, vm: str) -> None:
        try:
            with self._keeping.turn(vm):
                if self._coming(vm):
                    return
                try:
                    self._keeping.sweep(vm)
                    self._keeping.sweep_replicas(vm)
                except (NoSuchVM, VMIsDown):
                    self._keeping.release_all(vm)
        except (AgentError, VmError) as error:
            log.warning("VM %s: what it gave back is let go later: %s", vm, error)
            self._later(vm, LATER)
