# SPDX-License-Identifier: GPL-2.0-or-later
"""What the agent asks of libvirt about VMs that move to other hosts; errors as in libvirt_vms.py.

The two libvirt daemons do it between themselves ("peer to peer"): a migration goes on when whoever
asked for it dies.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import libvirt

from vdsm_storage.host.libvirt_life import LibvirtLife

LONGEST: Final = 7 * 24 * 3600.0  # seconds of a migration; VM.migrateCancel ends it before
# VIR_DOMAIN_PAUSED_MIGRATION, _STARTING_UP: a VM of which libvirt has not received all yet.
ARRIVING: Final = (2, 11)
GONE: Final = 3  # VIR_DOMAIN_EVENT_STOPPED_MIGRATED


@dataclass(frozen=True)
class Way:
    """How a VM moves.  `uri` is the other host's libvirt, `data` where its QEMU listens.

    `bandwidth` is in MiB a second, 0 for no limit of ours; `parallel` are the connections.
    """

    uri: str
    data: str
    bandwidth: int = 0
    parallel: int = 0
    tunneled: bool = False
    encrypted: bool = False
    compressed: bool = False
    converge: bool = False
    abort_on_error: bool = False

    @property
    def flags(self) -> int:
        found = (
            libvirt.VIR_MIGRATE_PEER2PEER
            | libvirt.VIR_MIGRATE_LIVE
            # libvirt cannot know that a file system is shared; the other agent has the volumes.
            | libvirt.VIR_MIGRATE_UNSAFE
        )
        for wanted, flag in (
            (self.tunneled, libvirt.VIR_MIGRATE_TUNNELLED),
            (self.encrypted, libvirt.VIR_MIGRATE_TLS),
            (self.compressed, libvirt.VIR_MIGRATE_COMPRESSED),
            (self.converge, libvirt.VIR_MIGRATE_AUTO_CONVERGE),
            (self.abort_on_error, libvirt.VIR_MIGRATE_ABORT_ON_ERROR),
            (self.parallel > 0, libvirt.VIR_MIGRATE_PARALLEL),
        ):
            found |= flag if wanted else 0
        return int(found)

    def params(self, xml: str) -> dict[str, Any]:
        found: dict[str, Any] = {libvirt.VIR_MIGRATE_PARAM_DEST_XML: xml}
        if not self.tunneled:
            found[libvirt.VIR_MIGRATE_PARAM_URI] = self.data
        if self.bandwidth:
            found[libvirt.VIR_MIGRATE_PARAM_BANDWIDTH] = self.bandwidth
        if self.parallel:
            found[libvirt.VIR_MIGRATE_PARAM_PARALLEL_CONNECTIONS] = self.parallel
        return found


@dataclass(frozen=True)
class Progress:
    """Bytes; `rounds` are the times that QEMU has begun to send what the guest changed."""

    total: int
    remaining: int
    rounds: int

    @property
    def percent(self) -> int:
        return 100 - 100 * self.remaining // self.total if self.total else 0


class LibvirtMigration(LibvirtLife):
    def own_xml(self, vm: str) -> str:
        """What another libvirt may start it by, with its passwords: never keep or show it."""
        flags = libvirt.VIR_DOMAIN_XML_MIGRATABLE | libvirt.VIR_DOMAIN_XML_SECURE
        return self._on(vm, "definition of a VM", lambda domain: str(domain.XMLDesc(flags)))

    def migrate(self, vm: str, xml: str, way: Way) -> None:
        """Returns when the VM is on the other host; `xml` is what it is there."""

        def call(domain: Any) -> None:
            domain.migrateToURI3(way.uri, way.params(xml), way.flags)

        self._on(vm, "move a VM", call, LONGEST)

    def migration(self, vm: str) -> Progress | None:
        """None while libvirt is not moving it."""

        def call(domain: Any) -> Progress | None:
            stats = domain.jobStats(0)
            if stats.get("operation") != libvirt.VIR_DOMAIN_JOB_OPERATION_MIGRATION_OUT:
                return None
            if stats.get("type", libvirt.VIR_DOMAIN_JOB_NONE) == libvirt.VIR_DOMAIN_JOB_NONE:
                return None
            return Progress(
                int(stats.get("data_total", 0)),
                int(stats.get("data_remaining", 0)),
                int(stats.get("memory_iteration", 0)),
            )

        return self._on(vm, "progress of a migration", call)

    def allow_downtime(self, vm: str, milliseconds: int) -> None:
        """How long it may stand still when what is left is sent."""
        self._on(vm, "downtime", lambda domain: domain.migrateSetMaxDowntime(milliseconds, 0))

    def watch_downtimes(self, callback: Callable[[str, int], None]) -> None:
        """Before start: `callback(vm, milliseconds)` when a VM has moved."""

        def ended(domain: Any, stats: Any, *_opaque: Any) -> None:
            if isinstance(stats, dict) and "downtime" in stats:
                callback(domain.UUIDString(), int(stats["downtime"]))

        self._libvirt.on_event(libvirt.VIR_DOMAIN_EVENT_ID_JOB_COMPLETED, ended)
