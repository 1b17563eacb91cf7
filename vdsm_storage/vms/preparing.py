# SPDX-License-Identifier: GPL-2.0-or-later
"""The storage of a VM that starts here, or comes in from another host: looked at, then made usable.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

from vdsm_storage.errors import (
    AgentError,
    CannotCreateVM,
    CannotPrepareImage,
    NoSuchVM,
    VMExists,
    VMIsDown,
)
from vdsm_storage.images import metadata as md
from vdsm_storage.jobs.operation import Operation
from vdsm_storage.leases.external import LeaseRef
from vdsm_storage.leases.model import LeaseSpec
from vdsm_storage.vms import start_xml
from vdsm_storage.vms.drives import VolumePath
from vdsm_storage.vms.keeping import DiskTools, Keeping
from vdsm_storage.vms.start_xml import DiskOrder, Order

Found = Sequence[tuple[Any, LeaseSpec]]


class Preparing:
    """`lease` tells where a lease is; raises NoSuchLease (936)."""

    def __init__(
        self, tools: DiskTools, keeping: Keeping, lease: Callable[[LeaseRef], LeaseSpec]
    ) -> None:
        self._tools = tools
        self._keeping = keeping
        self._lease = lease

    def check_free(self, vm: str) -> None:
        """Raises VMExists (4)."""
        if self.runs(vm):
            raise VMExists(vm=vm)

    def runs(self, vm: str) -> bool:
        """Whether libvirt has it.  Raises 59."""
        with contextlib.suppress(NoSuchVM, VMIsDown):
            self._tools.registry.state(vm)
            return True
        return False

    def make_ready(self, op: Operation, order: Order) -> None:
        """All that a VM needs before libvirt is told of it, in the operation's steps "begun" and
        "secrets".  Raises 4, 1630, 936, 9, 73."""
        self.check_free(order.vm)
        leases = self._check(order)
        op.record(begun=True)
        op.step("begun")
        self._tools.secrets.give(order.vm, order.secrets)
        op.step("secrets")
        self._prepare(order, leases)

    def let_go(self, vm: str, volumes: Sequence[VolumePath]) -> None:
        """What make_ready has done, as far as it came."""
        held = self._tools.holdings.of(vm)
        for volume in volumes:
            if volume in held:
                self._keeping.release_held(vm, volume)
        if not self.runs(vm):  # not another one of that UUID
            self._tools.secrets.release(vm)

    def _check(self, order: Order) -> Found:
        """Every volume and lease is there; nothing is touched.  Raises 1630, 936, 9."""
        for disk in order.disks:
            volume = disk.volume
            if volume is None:
                continue
            try:
                metadata = self._tools.find_store(volume.domain).load(volume.image, volume.volume)
            except (AgentError, OSError) as error:
                raise CannotPrepareImage(
                    volume=volume.volume, image=volume.image, reason=error
                ) from error
            if metadata.voltype != md.LEAF and not disk.readonly and not disk.transient:
                reason = (
                    f"other volumes are based on {volume.volume}: disk {disk.name} must be "
                    "read-only"
                )
                raise CannotCreateVM(vm=order.vm, reason=reason)
        return [(lease, self._lease(ref)) for lease, ref in order.leases]

    def _prepare(self, order: Order, leases: Found) -> None:
        """Make its volumes usable for it, and say in its XML where everything is."""
        for disk in order.disks:
            if disk.volume is not None:
                self._prepare_disk(order, disk, disk.volume)
        for lease, spec in leases:
            start_xml.put_lease(lease, spec)

    def _prepare_disk(self, order: Order, disk: DiskOrder, volume: VolumePath) -> None:
        usable = self._keeping.prepare(
            order.vm, volume, transient=disk.transient, key=disk.key is not None
        )
        start_xml.put_volume(disk, usable)
        if disk.exclusive:
            spec = self._tools.find_store(volume.domain).lease(volume.image, volume.volume)
            if spec is None:
                reason = f"volumes of domain {volume.domain} have no leases; disk {disk.name} wants"
                raise CannotCreateVM(vm=order.vm, reason=f"{reason} its own")
            start_xml.put_volume_lease(order, volume, spec)
