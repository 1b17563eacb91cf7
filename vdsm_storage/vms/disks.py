# SPDX-License-Identifier: GPL-2.0-or-later
"""Everything that changes VMs and their disks, put together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from vdsm_storage.base.lanes import Lanes
from vdsm_storage.config import Vms
from vdsm_storage.host.libvirt_migration import LibvirtMigration
from vdsm_storage.jobs.operation import Kind
from vdsm_storage.leases.external import LeaseRef
from vdsm_storage.leases.model import LeaseSpec
from vdsm_storage.vms import iotune
from vdsm_storage.vms.change_cd import Media
from vdsm_storage.vms.create import Creation, Starting
from vdsm_storage.vms.hotplug import HotPlug
from vdsm_storage.vms.hotplug_lease import LeasePlug
from vdsm_storage.vms.incoming import Coming, Incoming
from vdsm_storage.vms.iotune import IoTune
from vdsm_storage.vms.keeping import DiskTools, Keeping
from vdsm_storage.vms.life import Life
from vdsm_storage.vms.outgoing import Leaving, Outgoing
from vdsm_storage.vms.preparing import Preparing
from vdsm_storage.vms.replicate import CopyTools, Replicating
from vdsm_storage.vms.resize import Looking, Resizing, Writing
from vdsm_storage.vms.services import VmServices
from vdsm_storage.vms.shutdown import Shutdowns
from vdsm_storage.vms.sweeper import Sweeper


@dataclass(frozen=True)
class DiskBase:
    """What lies below: agent.py builds it.  `lease` tells where a lease is."""

    tools: DiskTools
    lanes: Lanes
    guard: Writing
    looking: Looking
    life: LibvirtMigration
    vms: VmServices
    lease: Callable[[LeaseRef], LeaseSpec]
    settings: Vms
    copying: CopyTools


class VmDisks:
    """Order in agent.py: build, `load`, then start libvirt, then `start`."""

    def __init__(self, base: DiskBase) -> None:
        tools = self._tools = base.tools
        self._registry = tools.registry
        self.throttles = tools.throttles
        keeping = Keeping(tools)
        self.hotplug = HotPlug(tools, keeping, iotune.maximum, base.settings.unplug_timeout)
        self.leases = LeasePlug(tools, keeping, base.lease)
        self.media = Media(tools, keeping)
        vms, launches = base.vms, base.vms.launches
        self.sizes = Resizing(tools, keeping, base.guard, base.looking, launches.coming)
        self.io_tune = IoTune(tools, keeping)
        preparing = Preparing(tools, keeping, base.lease)
        moving = vms.migrations.leaving
        starting = Starting(base.life, launches, base.lanes, preparing, moving)
        self.creation = Creation(tools, keeping, starting)
        coming = Coming(base.life, launches, base.lanes, preparing, base.settings.arrival_timeout)
        self.incoming = Incoming(tools, keeping, coming)
        leaving = Leaving(
            base.life, vms.migrations, launches, base.lanes, vms.publish, vms.announce,
            vms.freezing.age,
        )  # fmt: skip
        self.outgoing = Outgoing(tools, keeping, leaving)
        stops = (self.creation.stop, self.incoming.stop)
        self.life = Life(base.life, tools.registry, keeping, stops, launches)
        self.shutdowns = Shutdowns(base.life, tools.registry, base.lanes, tools.clock)
        self.replicating = Replicating(tools, keeping, base.copying)
        self._sweeper = Sweeper(
            tools.registry, keeping, tools.secrets, base.lanes, tools.clock, launches.coming
        )
        # First: where a VM went is known before others see that it is gone.
        tools.registry.watch(self.outgoing.event, _nothing)
        tools.registry.watch(self.incoming.event, _nothing)
        tools.registry.watch(self.creation.event, self.creation.connected)
        tools.registry.watch(self._sweeper.event, self._sweeper.connected)
        tools.registry.watch(self.shutdowns.event, _nothing)

    def kinds(self) -> Sequence[Kind]:
        parts = (
            self.hotplug, self.media, self.sizes, self.creation, self.replicating,
            self.incoming, self.outgoing,
        )  # fmt: skip
        return [kind for part in parts for kind in part.kinds()]

    def load(self) -> None:
        """When the journal was read, before libvirt is connected."""
        self.incoming.load()
        self.outgoing.load()

    def start(self) -> None:
        self._tools.transients.clean(self._tools.holdings.vms())
        self.creation.start()
        if self._registry.enabled:
            self._sweeper.start()

    def close(self) -> None:
        self._sweeper.close()


def _nothing() -> None:
    """A new connection changes nothing there."""
