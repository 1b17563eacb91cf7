# SPDX-License-Identifier: GPL-2.0-or-later
"""VM.hotplugLease and VM.hotunplugLease: libvirt's lock manager holds a lease for a running VM.

One call of libvirt's each; its XML of the VM tells what became of one that it did not answer.
"""

from __future__ import annotations

from collections.abc import Callable
from xml.sax.saxutils import escape, quoteattr

from vdsm_storage.errors import (
    AgentError,
    HotplugLeaseFailed,
    HotunplugLeaseFailed,
    LibvirtTimeout,
    LibvirtUnavailable,
)
from vdsm_storage.host.libvirt_model import VmError, Why
from vdsm_storage.leases.external import LeaseRef
from vdsm_storage.leases.model import LeaseSpec
from vdsm_storage.vms.disk_xml import text
from vdsm_storage.vms.drives import parse
from vdsm_storage.vms.keeping import DiskTools, Keeping
from vdsm_storage.vms.registry import Definition


class LeasePlug:
    """`find(ref)` tells where a lease is; raises NoSuchLease (936)."""

    def __init__(
        self, tools: DiskTools, keeping: Keeping, find: Callable[[LeaseRef], LeaseSpec]
    ) -> None:
        self._tools = tools
        self._keeping = keeping
        self._find = find

    def plug(self, vm: str, ref: LeaseRef) -> None:
        """Raises 1, 6, 59, NoSuchLease (936), HotplugLeaseFailed (86)."""
        with self._keeping.turn(vm):
            if lease_xml(self._keeping.running(vm), ref) is not None:
                raise HotplugLeaseFailed(vm=vm, lease=ref.lease_id, reason="it has it already")
            spec = self._find(ref)
            xml = (
                f"<lease><lockspace>{escape(ref.sd_id)}</lockspace><key>{escape(ref.lease_id)}</key>"
                f"<target path={quoteattr(spec.path)} offset='{spec.offset}'/></lease>"
            )
            try:
                self._change(vm, lambda: self._tools.libvirt.attach(vm, xml))
            except VmError as error:
                raise self._error(vm, ref, error, HotplugLeaseFailed) from error
            if lease_xml(self._keeping.running(vm), ref) is None:
                raise HotplugLeaseFailed(vm=vm, lease=ref.lease_id, reason="libvirt did not do it")

    def unplug(self, vm: str, ref: LeaseRef) -> None:
        """Raises 1, 6, 59, HotunplugLeaseFailed (87)."""
        with self._keeping.turn(vm):
            xml = lease_xml(self._keeping.running(vm), ref)
            if xml is None:
                raise HotunplugLeaseFailed(vm=vm, lease=ref.lease_id, reason="it has none such")
            try:
                self._change(vm, lambda: self._tools.libvirt.detach(vm, xml))
            except VmError as error:
                raise self._error(vm, ref, error, HotunplugLeaseFailed) from error
            if lease_xml(self._keeping.running(vm), ref) is not None:
                reason = "libvirt did not do it"
                raise HotunplugLeaseFailed(vm=vm, lease=ref.lease_id, reason=reason)

    def _change(self, vm: str, change: Callable[[], None]) -> None:
        try:
            change()
        except (LibvirtTimeout, LibvirtUnavailable):
            self._keeping.settled(vm)
        finally:
            self._tools.registry.changed(vm)

    def _error(
        self, vm: str, ref: LeaseRef, error: VmError, failure: type[AgentError]
    ) -> Exception:
        if error.why is Why.NO_VM:
            return self._tools.registry.gone(vm, error)
        return failure(vm=vm, lease=ref.lease_id, reason=error.text)


def lease_xml(definition: Definition, ref: LeaseRef) -> str | None:
    """libvirt's <lease> of a VM."""
    for lease in parse(definition.xml).iterfind("./devices/lease"):
        if (lease.findtext("lockspace"), lease.findtext("key")) == (ref.sd_id, ref.lease_id):
            return text(lease)
    return None
