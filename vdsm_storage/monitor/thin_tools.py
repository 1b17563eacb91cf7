# SPDX-License-Identifier: GPL-2.0-or-later
"""What the parts of thin provisioning work with, and what they share."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from vdsm_storage.base.clock import Clock
from vdsm_storage.base.lanes import Lanes
from vdsm_storage.base.units import round_up
from vdsm_storage.config import Thin as Settings
from vdsm_storage.domains.block import BlockDomain
from vdsm_storage.domains.registry import Registry as Domains
from vdsm_storage.errors import UnsupportedOnFileDomain
from vdsm_storage.host.libvirt_thresholds import LibvirtThresholds
from vdsm_storage.images import metadata as md
from vdsm_storage.images.qcow2_empty import full_size
from vdsm_storage.images.sizing import OVERHEAD
from vdsm_storage.monitor.alarms import Alarms
from vdsm_storage.monitor.extend import Extender
from vdsm_storage.monitor.thin_drive import Board, Watched
from vdsm_storage.monitor.thin_history import History, Point
from vdsm_storage.monitor.watermark import Latencies, Policy
from vdsm_storage.vms.drives import VolumePath
from vdsm_storage.vms.registry import Registry
from vdsm_storage.vms.throttle import Throttles


@dataclass(frozen=True)
class ThinTools:
    """`publish(method, params)` sends an event; `reach(point)` is where tests kill the agent;
    `before_resume(vm, drive, volume)` is told that a volume has grown, before its guest is;
    `sending(vm)` whether a VM is being sent to another host."""

    registry: Registry
    libvirt: LibvirtThresholds
    domains: Domains
    extender: Extender
    throttles: Throttles
    history: History
    policy: Policy
    settings: Settings
    lanes: Lanes
    clock: Clock
    publish: Callable[[str, Mapping[str, object]], None]
    reach: Callable[[str], None]
    before_resume: Callable[[str, str, VolumePath], None] = lambda vm, drive, volume: None
    sending: Callable[[str], bool] = lambda vm: False
    board: Board = field(default_factory=Board)
    latencies: defaultdict[str, Latencies] = field(init=False)  # by domain
    alarms: Alarms = field(init=False)

    def __post_init__(self) -> None:
        first = self.policy.first_latency
        object.__setattr__(self, "latencies", defaultdict(lambda: Latencies(first)))
        object.__setattr__(self, "alarms", Alarms(self.clock))

    def domain(self, sd_id: str) -> BlockDomain:
        """Raises 358, UnsupportedOnFileDomain."""
        domain = self.domains.get(sd_id)
        if not isinstance(domain, BlockDomain):
            raise UnsupportedOnFileDomain(
                what="Extending storage", domain=sd_id, remedy="files grow by themselves"
            )
        return domain

    def free(self, sd_id: str) -> int:
        """Bytes of the domain's volume group that no volume has; as it is now."""
        return self.domain(sd_id).group.read().free

    def limit(self, volume: VolumePath) -> int:
        """The most bytes that a qcow2 volume of its capacity may need; 0 for one that does not
        grow.  Raises 201, 358, UnsupportedOnFileDomain.

        A full one has its tables beside the data; what bitmaps take is within the tenth that
        upstream allows.
        """
        metadata = self.domain(volume.domain).store.load(volume.image, volume.volume)
        if metadata.format != md.COW:
            return 0
        more, of = OVERHEAD
        most = max(full_size(metadata.capacity), metadata.capacity * more // of)
        return round_up(most, self.policy.extent)

    def tail(self, sd_id: str) -> float:
        """Seconds that extending a volume of this domain takes, at worst."""
        return self.latencies[sd_id].tail()

    def note(self, each: Watched, what: str) -> None:
        self.history.note(
            each.vm,
            each.name,
            Point(self.clock.time(), each.allocation, each.size, each.threshold, what),
        )
