# SPDX-License-Identifier: GPL-2.0-or-later
"""Everything that changes VMs and their disks, put together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from vdsm_storage.base.lanes import Lanes
from vdsm_storage.host.libvirt_life import LibvirtLife
from vdsm_storage.jobs.operation import Kind
from vdsm_storage.leases.external import LeaseRef
from vdsm_storage.leases.model import LeaseSpec
from vdsm_storage.vms import iotune
from vdsm_storage.vms.change_cd import Media
from vdsm_storage.vms.create import Creation, Starting
from vdsm_storage.vms.hotplug import HotPlug
from vdsm_storage.vms.hotplug_lease import LeasePlug
from vdsm_storage.vms.iotune import IoTune
from vdsm_storage.vms.keeping import DiskTools, Keeping
from vdsm_storage.vms.launches import Launches
from vdsm_storage.vms.life import Life
from vdsm_storage.vms.replicate import CopyTools, Replicating
from vdsm_storage.vms.resize import Looking, Resizing, Writing
from vdsm_storage.vms.shutdown import Shutdowns
from vdsm_storage.vms.sweeper import Sweeper


@dataclass(frozen=True)
class DiskBase:
    """What lies below: agent.py builds it.  `lease` tells where a lease is; `unplug_timeout` are
    the seconds that a guest has to give a disk back."""

    tools: DiskTools
    lanes: Lanes
    guard: Writing
    looking: Looking
    life: LibvirtLife
    launches: Launches
    lease: Callable[[LeaseRef], LeaseSpec]
    unplug_timeout: float
    copying: CopyTools


class VmDisks:
    """Order in agent.py: build, then start libvirt, then `start`."""

    def __init__(self, base: DiskBase) -> None:
        tools = self._tools = base.tools
        self._registry = tools.registry
        self.throttles = tools.throttles
        keeping = Keeping(tools)
        self.hotplug = HotPlug(tools, keeping, iotune.maximum, base.unplug_timeout)
        self.leases = LeasePlug(tools, keeping, base.lease)
        self.media = Media(tools, keeping)
        self.sizes = Resizing(tools, keeping, base.guard, base.looking)
        self.io_tune = IoTune(tools, keeping)
        starting = Starting(base.life, base.launches, base.lanes, base.lease)
        self.creation = Creation(tools, keeping, starting)
        self.life = Life(base.life, tools.registry, keeping, self.creation, base.launches)
        self.shutdowns = Shutdowns(base.life, tools.registry, base.lanes, tools.clock)
        self.replicating = Replicating(tools, keeping, base.copying)
        self._sweeper = Sweeper(tools.registry, keeping, tools.secrets, base.lanes, tools.clock)
        tools.registry.watch(self.creation.event, self.creation.connected)
        tools.registry.watch(self._sweeper.event, self._sweeper.connected)
        tools.registry.watch(self.shutdowns.event, _nothing)

    def kinds(self) -> Sequence[Kind]:
        parts = (self.hotplug, self.media, self.sizes, self.creation, self.replicating)
        return [kind for part in parts for kind in part.kinds()]

    def start(self) -> None:
        self._tools.transients.clean(self._tools.holdings.vms())
        self.creation.start()
        if self._registry.enabled:
            self._sweeper.start()

    def close(self) -> None:
        self._sweeper.close()


def _nothing() -> None:
    """A new connection changes nothing there."""
