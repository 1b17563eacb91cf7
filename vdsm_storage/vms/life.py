# SPDX-License-Identifier: GPL-2.0-or-later
"""The life of a VM that runs: paused, continued, reset, ended."""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Callable, Sequence
from typing import Final

from vdsm_storage.errors import (
    AgentError,
    LibvirtFailure,
    NoSuchVM,
    ResetFailed,
    VMDestroyFailed,
    VMIsDown,
)
from vdsm_storage.host.libvirt_model import VmError, Why
from vdsm_storage.host.libvirt_vms import LibvirtVms
from vdsm_storage.vms.choose import shown
from vdsm_storage.vms.drives import Drive
from vdsm_storage.vms.keeping import Keeping
from vdsm_storage.vms.launches import Launches
from vdsm_storage.vms.registry import Registry

ENDED: Final = 10.0  # seconds for libvirt to tell of an end that it has brought about

log = logging.getLogger("vms.life")


class Life:
    """VMs whoever started them."""

    def __init__(
        self,
        vms: LibvirtVms,
        registry: Registry,
        keeping: Keeping,
        stops: Sequence[Callable[[str], object]],
        launches: Launches,
    ) -> None:
        """`stops` give up what begins a VM; they return when that has come to an end."""
        self._vms = vms
        self._registry = registry
        self._keeping = keeping
        self._stops = stops
        self._launches = launches

    def pause(self, vm: str) -> None:
        """Raises NoSuchVM (1), VMIsDown (6), 59."""
        self._change(vm, "pause", self._vms.suspend)

    def cont(self, vm: str) -> None:
        """Raises NoSuchVM (1), VMIsDown (6), 59."""
        self._change(vm, "continue", self._vms.resume)

    def _change(self, vm: str, what: str, change: Callable[[str], None]) -> None:
        self._registry.state(vm)
        try:
            change(vm)
        except VmError as error:
            if error.why is Why.NO_VM:
                raise self._registry.gone(vm, error) from error
            raise LibvirtFailure(call=f"{what} VM {vm}", reason=error.text) from error

    def reset(self, vm: str) -> None:
        """Raises NoSuchVM (1), VMIsDown (6), ResetFailed (90), 59."""
        self._registry.state(vm)
        try:
            self._vms.reset(vm)
        except VmError as error:
            raise ResetFailed(vm=vm, reason=error.text) from error

    def destroy(self, vm: str, attempts: int) -> None:
        """End it, `attempts` times gracefully, then by force; its images are let go.

        One that is being started is not, and one that has ended is forgotten.
        Raises NoSuchVM (1), VMDestroyFailed (42), 59.
        """
        known = self._launches.not_yet(vm) != ""
        for stop in self._stops:
            stop(vm)
        drives: Sequence[Drive] = ()
        try:
            self._registry.state(vm)
            drives = self._registry.definition(vm, fresh=True).drives
            self._end(vm, attempts)
            self._wait_ended(vm)
        except VMIsDown:
            log.info("VM %s has ended already", vm)
        except NoSuchVM:
            if not self._launches.drop(vm) and not known:
                raise
        self._let_go(vm, drives or self._registry.forget(vm))
        self._registry.forget(vm)
        self._launches.drop(vm)

    def _end(self, vm: str, attempts: int) -> None:
        for left in reversed(range(attempts + 1)):
            try:
                self._vms.destroy(vm, gracefully=left > 0)
                return
            except VmError as error:
                if error.why is Why.NO_VM:  # it ended by itself meanwhile
                    return
                if left == 0:
                    raise VMDestroyFailed(vm=vm, reason=error.text) from error
                log.warning("VM %s does not end gracefully: %s", vm, error)

    def _wait_ended(self, vm: str) -> None:
        """Until its end was told as an event, so that nobody counts it any more."""
        end = time.monotonic() + ENDED
        while not self._registry.has_ended(vm) and time.monotonic() < end:
            time.sleep(0.02)

    def _let_go(self, vm: str, drives: Sequence[Drive]) -> None:
        """What was kept for it, and what its disks were, unless another VM has that too.

        What cannot be let go now is later, if it was kept for the VM (sweeper.py).
        """
        volumes = {volume for drive in drives if (volume := shown(drive)) is not None}
        try:
            with self._keeping.turn(vm):
                for volume in volumes:
                    self._attempt(vm, functools.partial(self._keeping.release, vm, volume))
                self._attempt(vm, functools.partial(self._keeping.release_all, vm))
        except AgentError as error:
            log.warning("VM %s: its images are let go later: %s", vm, error)

    @staticmethod
    def _attempt(vm: str, work: Callable[[], None]) -> None:
        try:
            work()
        except AgentError as error:
            log.warning("VM %s: not all of its images are let go: %s", vm, error)
