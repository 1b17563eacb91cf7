# SPDX-License-Identifier: GPL-2.0-or-later
"""What a verb function gets as its first argument."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from vdsm_storage.config import Config
    from vdsm_storage.domains.services import DomainServices
    from vdsm_storage.host.facts import HostFacts
    from vdsm_storage.host.imageio import ImageTickets
    from vdsm_storage.images.data import Data
    from vdsm_storage.images.images import Images
    from vdsm_storage.images.volumes import Volumes
    from vdsm_storage.jobs.hostjobs import Jobs
    from vdsm_storage.jobs.tasks import Tasks
    from vdsm_storage.leases.external import ExternalLeases
    from vdsm_storage.monitor.extend import Extender
    from vdsm_storage.monitor.health import Health
    from vdsm_storage.secrets.registry import Registry
    from vdsm_storage.vms.disks import VmDisks
    from vdsm_storage.vms.services import VmServices


class Thin(Protocol):
    """What is known of disks that grow (schema: ThinHistory, VmDiskThin), by drive.

    What it does not know it leaves out: it raises nothing, and waits for nobody.
    """

    def history(
        self, vm: str, drive: str, since: float
    ) -> Mapping[str, Sequence[Mapping[str, float | str]]]:
        """Of the drive, or of all if it is ""; since then, in seconds since the epoch."""

    def stats(self, vm: str) -> Mapping[str, Mapping[str, str]]:
        """Of those that are watched."""


@dataclass(frozen=True)
class Services:
    """The long-lived objects, built and wired by agent.py."""

    config: Config
    facts: HostFacts
    health: Health
    storage: DomainServices
    tickets: ImageTickets
    volumes: Volumes
    data: Data
    images: Images
    leases: ExternalLeases
    tasks: Tasks
    jobs: Jobs
    secrets: Registry
    vms: VmServices
    disks: VmDisks
    thin: Thin
    extender: Extender


@dataclass(slots=True)  # not frozen: one is made for every request
class Context:
    """One request: the services, whose flow it belongs to, and who asks."""

    services: Services
    flow_id: str = "-"
    client: str = "-"
