# SPDX-License-Identifier: GPL-2.0-or-later
"""What the agent asks libvirt to change on the disks of VMs; errors as in libvirt_vms.py."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import libvirt

from vdsm_storage.host.libvirt_vms import LibvirtVms

_LIVE: Final = libvirt.VIR_DOMAIN_AFFECT_LIVE


class LibvirtDisks(LibvirtVms):
    """Changes are of the VM as it runs, never of a definition that would outlive it."""

    def attach(self, vm: str, xml: str) -> None:
        """Give it a device: <disk> or <lease>."""
        self._on(vm, "attach a device", lambda domain: domain.attachDeviceFlags(xml, _LIVE))

    def detach(self, vm: str, xml: str) -> None:
        """Ask for a device back.  Of a disk it is the guest that gives it back, maybe later."""
        self._on(vm, "detach a device", lambda domain: domain.detachDeviceFlags(xml, _LIVE))

    def update(self, vm: str, xml: str, *, force: bool = False) -> None:
        """Change a device to this XML; `force` opens the tray of a drive that its guest locked."""
        flags = _LIVE | (libvirt.VIR_DOMAIN_DEVICE_MODIFY_FORCE if force else 0)
        self._on(vm, "update a device", lambda domain: domain.updateDeviceFlags(xml, flags))

    def resize(self, vm: str, target: str, size: int) -> None:
        """Tell the VM that a disk has `size` bytes; a qcow2 file is changed by that."""
        flags = libvirt.VIR_DOMAIN_BLOCK_RESIZE_BYTES
        self._on(vm, "resize a disk", lambda domain: domain.blockResize(target, size, flags))

    def capacity(self, vm: str, target: str) -> int:
        """Bytes that the guest sees."""
        return self._on(vm, "size of a disk", lambda domain: int(domain.blockInfo(target)[0]))

    def set_io_tune(self, vm: str, target: str, limits: Mapping[str, int]) -> None:
        """Limits by libvirt's names (total_bytes_sec and the like); 0 is none."""

        def call(domain: Any) -> None:
            domain.setBlockIoTune(target, dict(limits), _LIVE)

        self._on(vm, "limit a disk", call)

    def io_tune(self, vm: str, target: str) -> dict[str, int]:
        """Limits in force."""

        def call(domain: Any) -> dict[str, int]:
            found = domain.blockIoTune(target, _LIVE)
            return {name: value for name, value in found.items() if isinstance(value, int)}

        return self._on(vm, "limits of a disk", call)
