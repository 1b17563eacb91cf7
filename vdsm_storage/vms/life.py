# SPDX-License-Identifier: GPL-2.0-or-later
"""The life of a VM that runs: paused, continued, reset, ended."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from typing import Final

from vdsm_storage.errors import AgentError, LibvirtFailure, ResetFailed, VMDestroyFailed, VMIsDown
from vdsm_storage.host.libvirt_model import VmError, Why
from vdsm_storage.host.libvirt_vms import LibvirtVms
from vdsm_storage.vms.drives import Drive
from vdsm_storage.vms.registry import Registry

ENDED: Final = 10.0  # seconds for libvirt to tell of an end that it has brought about

log = logging.getLogger("vms.life")

Teardown = Callable[[str, str], None]


class Life:
    """`teardown(domain, image)` gives an image up on this host."""

    def __init__(self, vms: LibvirtVms, registry: Registry, teardown: Teardown) -> None:
        self._vms = vms
        self._registry = registry
        self._teardown = teardown

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
        """End it, `attempts` times gracefully, then by force; its images are given up.

        One that has ended is forgotten.  Raises NoSuchVM (1), VMDestroyFailed (42), 59.
        """
        try:
            self._registry.state(vm)
            drives = self._registry.definition(vm, fresh=True).drives
        except VMIsDown:
            self._give_up(self._registry.forget(vm))
            return
        self._end(vm, attempts)
        self._wait_ended(vm)
        self._give_up(drives)
        self._registry.forget(vm)

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

    def _give_up(self, drives: Sequence[Drive]) -> None:
        """The images of its disks, unless another VM has them too."""
        volumes = [drive.volume for drive in drives]
        images = {(each.domain, each.image) for each in volumes if each is not None}
        for state in self._registry.running():
            for other in self._registry.definition(state.id).drives:
                if other.volume is not None:
                    images.discard((other.volume.domain, other.volume.image))
        for domain, image in images:
            try:
                self._teardown(domain, image)
            except AgentError as error:
                log.warning("Image %s of domain %s is not torn down: %s", image, domain, error)
