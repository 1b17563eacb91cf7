# SPDX-License-Identifier: GPL-2.0-or-later
"""What the agent asks libvirt about the beginning and the end of VMs; errors as in libvirt_vms.py.
"""

from __future__ import annotations

from typing import Any, Final

import libvirt

from vdsm_storage.host.libvirt_vms import LibvirtVms

START: Final = 120.0  # seconds for a QEMU with many disks to open them on slow storage
NONE: Final = -1  # libvirt's number of a VM that does not run


class LibvirtLife(LibvirtVms):
    """VMs started here are gone from libvirt when they end: nobody has to undefine them."""

    def create(self, xml: str) -> None:
        """Start a VM with its processors stopped; returns when its QEMU has opened its disks.

        An error may come although it starts later: when libvirt did not answer in time.
        """

        def call(connection: Any) -> None:
            connection.createXML(xml, libvirt.VIR_DOMAIN_START_PAUSED)

        self._call("start a VM", call, START)

    def instance(self, vm: str) -> int:
        """A number that a VM has from its start to its end, NONE when it does not run."""
        return self._on(vm, "look at a VM", lambda domain: int(domain.ID()))

    def ask_agent_to_end(self, vm: str, timeout: float, *, reboot: bool) -> None:
        """Tell the guest agent to shut down or to reboot.

        It does not answer when it obeys: a LibvirtTimeout after it took the command is no failure.
        """
        if reboot:
            flags = libvirt.VIR_DOMAIN_REBOOT_GUEST_AGENT
        else:
            flags = libvirt.VIR_DOMAIN_SHUTDOWN_GUEST_AGENT

        def call(domain: Any) -> None:
            domain.agentSetResponseTimeout(max(1, round(timeout)), 0)
            if reboot:
                domain.reboot(flags)
            else:
                domain.shutdownFlags(flags)

        self._on(vm, "ask the guest agent to end", call, timeout)

    def press_button(self, vm: str, *, reboot: bool) -> None:
        """Press the power button, by ACPI; what the guest makes of that is not told."""

        def call(domain: Any) -> None:
            if reboot:  # libvirt starts it again when it has shut down
                domain.reboot(libvirt.VIR_DOMAIN_REBOOT_ACPI_POWER_BTN)
            else:
                domain.shutdownFlags(libvirt.VIR_DOMAIN_SHUTDOWN_ACPI_POWER_BTN)

        self._on(vm, "press the power button", call)
