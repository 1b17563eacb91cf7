# SPDX-License-Identifier: GPL-2.0-or-later
"""How far guests have written into their disks, and being told when they write beyond a point.

QEMU watches one offset a layer, `block-set-write-threshold`, and forgets it when it has told.
libvirt names the layer `vda[1]`: the target, and the number in <source index='1'>.  For a disk's
top layer it tells twice, as `vda[1]` and as `vda`; the second one is left out here.

Methods that ask libvirt raise LibvirtUnavailable or LibvirtTimeout (59), and VmError.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import libvirt

from vdsm_storage.host.libvirt_disks import LibvirtDisks
from vdsm_storage.host.libvirt_model import ENOSPC, VmError, Why

SCAN: Final = 30.0  # seconds for the disks of all VMs
_FLAGS: Final = (
    libvirt.VIR_CONNECT_GET_ALL_DOMAINS_STATS_RUNNING
    | libvirt.VIR_CONNECT_GET_ALL_DOMAINS_STATS_PAUSED
    | libvirt.VIR_CONNECT_GET_ALL_DOMAINS_STATS_NOWAIT
    | libvirt.VIR_CONNECT_GET_ALL_DOMAINS_STATS_BACKING
)


@dataclass(frozen=True, slots=True)
class Extent:
    """A layer of a disk: `allocation` is the highest byte ever written, `physical` what its device
    has, `threshold` where it is watched, 0 for nowhere."""

    path: str
    allocation: int
    physical: int
    threshold: int


@dataclass(frozen=True, slots=True)
class Crossed:
    """A guest wrote to `offset` of the layer that libvirt calls `node`."""

    vm: str
    node: str
    offset: int


class LibvirtThresholds(LibvirtDisks):
    """Disks are named by their targets, layers as said above."""

    def arm(self, vm: str, node: str, offset: int, timeout: float) -> None:
        """Tell, once, when the guest writes at or beyond `offset`; 0 for never."""
        self._on(
            vm, "watch a disk", lambda domain: domain.setBlockThreshold(node, offset, 0), timeout
        )

    def written(self, vm: str, layer: str) -> tuple[int, int]:
        """Highest byte written, and bytes of the device: of a disk's top layer by its target, of
        another one by its own name."""
        if layer.endswith("]"):
            found = self.extents((vm,)).get(vm, {}).get(layer)
            if found is None:
                raise VmError(Why.OTHER, f"VM {vm} has no layer {layer}")
            return found.allocation, found.physical

        def call(domain: Any) -> tuple[int, int]:
            _capacity, allocation, physical = domain.blockInfo(layer, 0)
            return allocation, physical

        return self._on(vm, "how full a disk is", call)

    def extents(self, vms: Sequence[str] = ()) -> Mapping[str, Mapping[str, Extent]]:
        """By VM and layer: a disk's top layer has the name of its target, the ones below it theirs,
        and so have those that a job writes to (a replica, what a backup keeps).  Of all VMs that
        run, or of some.  Of a VM whose QEMU hangs, nothing."""

        def call(connection: Any) -> dict[str, dict[str, Extent]]:
            kinds = libvirt.VIR_DOMAIN_STATS_BLOCK
            if vms:
                domains = [connection.lookupByUUIDString(vm) for vm in vms]
                found = connection.domainListGetStats(domains, kinds, _FLAGS)
            else:
                found = connection.getAllDomainStats(kinds, _FLAGS)
            return {domain.UUIDString(): _extents(values) for domain, values in found}

        return self._call("how full disks are", call, SCAN)

    def watch_writes(
        self, crossed: Callable[[Crossed], None], full: Callable[[str, str], None]
    ) -> None:
        """Wiring: called from the event loop, so they must neither wait nor ask libvirt.

        `full(vm, alias)`: a guest pauses, because the disk with this alias has no space left.
        """

        def threshold(domain: Any, node: str, _path: str, offset: int, excess: int) -> None:
            if node.endswith("]"):
                crossed(Crossed(domain.UUIDString(), node, offset + excess))

        def io_error(domain: Any, _path: str, alias: str, _action: int, reason: str) -> None:
            if reason.upper() == ENOSPC:
                full(domain.UUIDString(), alias)

        on = self._libvirt.on_event
        on(libvirt.VIR_DOMAIN_EVENT_ID_BLOCK_THRESHOLD, threshold, urgent=True)
        on(libvirt.VIR_DOMAIN_EVENT_ID_IO_ERROR_REASON, io_error, urgent=True)


def _extents(values: Mapping[str, Any]) -> dict[str, Extent]:
    """libvirt's keys: block.count, block.<n>.name, .backingIndex, .path, .allocation, .physical,
    .threshold.  Of a disk's layers the top one comes first."""
    found: dict[str, Extent] = {}
    for number in range(int(values.get("block.count", 0))):
        key = f"block.{number}"
        if f"{key}.allocation" not in values:
            continue
        name = values[f"{key}.name"]
        if name in found:
            name = f"{name}[{values.get(f'{key}.backingIndex', '')}]"
        found[name] = Extent(
            path=values.get(f"{key}.path", ""),
            allocation=int(values[f"{key}.allocation"]),
            physical=int(values.get(f"{key}.physical", 0)),
            threshold=int(values.get(f"{key}.threshold", 0)),
        )
    return found
