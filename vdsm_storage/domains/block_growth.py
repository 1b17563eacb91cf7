# SPDX-License-Identifier: GPL-2.0-or-later
"""LUNs of block domains that come, grow, are emptied and go.

The domain's metadata names its devices; it is rewritten after every change, and after a crash in
the middle of one, from what the volume group says.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final

from vdsm_storage.base.locks import Lock, Locks
from vdsm_storage.domains.block import BlockDomain, guid, metadata_pv, pv_changes
from vdsm_storage.domains.domain import Domain
from vdsm_storage.domains.hostid import TEMPORARY, host_id
from vdsm_storage.domains.masters import FOUND
from vdsm_storage.domains.pool import Pools
from vdsm_storage.domains.storage_network import StorageNetwork
from vdsm_storage.errors import (
    ForbiddenPhysicalVolumeOperation,
    NoSuchDestinationPhysicalVolumes,
    NoSuchPhysicalVolume,
    StorageDomainActive,
    UnsupportedOnFileDomain,
)
from vdsm_storage.jobs.operation import Kind, Operation
from vdsm_storage.jobs.runner import Request, Runner
from vdsm_storage.lvm.activation import Activation
from vdsm_storage.lvm.groups import Groups

log = logging.getLogger("domain.block")

EXTEND: Final = "block.extend"
RESIZE: Final = "block.resize"
MOVE: Final = "block.move_device"
REDUCE: Final = "block.reduce"
EXCLUSIVE_TIMEOUT: Final = 3600.0  # seconds that work on the domain's images may take before
FILES_GROW: Final = "enlarge the file system instead"


@dataclass(frozen=True)
class BlockTools:
    """What agent.py builds for block domains."""

    groups: Groups
    activation: Activation
    network: StorageNetwork


class BlockGrowth:
    """Times in seconds."""

    def __init__(
        self,
        pools: Pools,
        tools: BlockTools,
        locks: Locks,
        runner: Runner,
        lock_timeout: float,
        host_id_timeout: float,
    ) -> None:
        self._pools = pools
        self._registry = pools.registry
        self._groups = tools.groups
        self._find_device = tools.network.candidates.find
        self._locks = locks
        self._runner = runner
        self._lock_timeout = lock_timeout
        self._host_id_timeout = host_id_timeout

    def kinds(self) -> Sequence[Kind]:
        return (
            Kind(EXTEND, ("extended",), self._extend, self._recover),
            Kind(RESIZE, ("resized",), self._resize, self._recover),
            Kind(MOVE, ("locked", "moved"), self._move, self._recover_move),
            Kind(REDUCE, ("locked", "reduced"), self._reduce, self._recover_reduce),
        )

    def _domain(self, sd_id: str, what: str) -> BlockDomain:
        domain: Domain = self._registry.get(sd_id)
        if not isinstance(domain, BlockDomain):
            raise UnsupportedOnFileDomain(what=what, domain=sd_id, remedy=FILES_GROW)
        return domain

    # -- more and larger devices ---------------------------------------------------------------

    def extend(self, sd_id: str, guids: Sequence[str], force: bool) -> None:
        """Give the domain's group more devices.  Raises 389, 503, 517, 518, 601, 606, 607, 654."""
        self._domain(sd_id, "StorageDomain.extend")
        devices = [self._find_device(name) for name in guids]
        params = {"id": sd_id, "devices": devices, "force": force}
        self._runner.run(Request(EXTEND, params, [sd_id], "StorageDomain.extend"))

    def _extend(self, op: Operation) -> None:
        domain = self._domain(op.params["id"], "StorageDomain.extend")
        with self._writing(domain):
            self._groups.extend(domain.id, op.params["devices"], op.params["force"])
            op.step("extended", abortable=False)
            self._record_devices(domain)

    def resize(self, sd_id: str, name: str) -> str:
        """Let the group have all of a device that grew; its size in bytes.  Raises 615, 619."""
        domain = self._domain(sd_id, "StorageDomain.resizePV")
        params = {"id": sd_id, "device": self._device(domain, name)}
        size: int = self._runner.run(
            Request(RESIZE, params, [sd_id], "StorageDomain.resizePV")
        )
        return str(size)

    def _resize(self, op: Operation) -> int:
        domain = self._domain(op.params["id"], "StorageDomain.resizePV")
        with self._writing(domain):
            size = self._groups.resize(domain.id, op.params["device"])
            op.step("resized", abortable=False)
            self._record_devices(domain)
        return size

    @contextmanager
    def _writing(self, domain: Domain) -> Iterator[None]:
        pool = self._pools.connected()
        number = pool.host_id if pool is not None else TEMPORARY
        with (
            host_id(domain, number, self._host_id_timeout),
            domain.lock.held(self._lock_timeout),
        ):
            yield

    def _record_devices(self, domain: BlockDomain) -> None:
        domain.group.forget()
        values = domain.metadata().values
        domain.update_metadata(pv_changes(domain.group, values))

    def _recover(self, op: Operation) -> bool:
        """What the group has is what the metadata shall name; whether all was done, is open."""
        domain = self._domain(op.params["id"], "StorageDomain.extend")
        with self._writing(domain):
            self._record_devices(domain)
        return False

    # -- fewer ---------------------------------------------------------------------------------

    def start_move(
        self, job_id: str, sd_id: str, source: str, targets: Sequence[str] | None
    ) -> None:
        """Start the job that empties the device `source` into `targets`, or any others.

        Raises 69, 382, 617, 619, 620.
        """
        domain = self._inactive(sd_id, "moving data")
        params = {
            "id": sd_id,
            "source": self._device(domain, source),
            "targets": self._targets(domain, source, targets),
        }
        request = Request(
            MOVE, params, [FOUND + sd_id], "SDM.move_domain_device", sd_id,
            f"Move the data of domain {sd_id} off {source}",
        )  # fmt: skip
        self._runner.start_job(job_id, request)

    def start_reduce(self, job_id: str, sd_id: str, name: str) -> None:
        """Start the job that takes an empty device out of the group.  Raises 69, 382, 617, 619."""
        domain = self._inactive(sd_id, "taking a device away")
        device = self._device(domain, name)
        request = Request(
            REDUCE, {"id": sd_id, "device": device, "guid": name}, [FOUND + sd_id],
            "SDM.reduce_domain", sd_id, f"Take {name} out of domain {sd_id}",
        )  # fmt: skip
        self._runner.start_job(job_id, request)

    def _inactive(self, sd_id: str, what: str) -> BlockDomain:
        domain = self._domain(sd_id, what)
        pool = self._pools.user_of(sd_id)
        if pool is not None:
            raise StorageDomainActive(domain=sd_id, pool=pool)
        return domain

    def _device(self, domain: BlockDomain, name: str) -> str:
        known = {guid(device): device for device in domain.group.devices().values()}
        if name not in known:
            raise NoSuchPhysicalVolume(
                vg=domain.id, device=name, devices=", ".join(sorted(known))
            )
        return known[name]

    def _targets(
        self, domain: BlockDomain, source: str, targets: Sequence[str] | None
    ) -> list[str]:
        known = {guid(device): device for device in domain.group.devices().values()}
        if not targets:
            return []
        if source in targets:
            reason = "data cannot be moved to the device that it comes from"
            raise ForbiddenPhysicalVolumeOperation(device=source, reason=reason)
        missing = sorted(set(targets) - set(known))
        if missing:
            raise NoSuchDestinationPhysicalVolumes(
                vg=domain.id, missing=", ".join(missing), devices=", ".join(sorted(known))
            )
        return [known[name] for name in targets]

    @contextmanager
    def _alone(self, domain: BlockDomain) -> Iterator[None]:
        """Nobody works on the domain, on any host, while its devices are exchanged."""
        with (
            self._locks.held([Lock("00_storage", domain.id)], EXCLUSIVE_TIMEOUT),
            host_id(domain, TEMPORARY, self._host_id_timeout),
            domain.own_lock.held(self._lock_timeout),
        ):
            yield

    def _move(self, op: Operation) -> None:
        domain = self._inactive(op.params["id"], "moving data")
        with self._alone(domain):
            op.step("locked")
            source, targets = op.params["source"], op.params["targets"]
            self._groups.move(
                domain.id, source, targets, lambda percent: op.progress(percent / 100), op.cancel
            )
            op.step("moved", abortable=False)
            self._record_devices(domain)

    def _recover_move(self, op: Operation) -> bool:
        """A move that was cut off is ended by lvm: what moved stays where it is now."""
        domain = self._domain(op.params["id"], "moving data")
        with self._alone(domain):
            moved = self._groups.abort_move(domain.id, op.params["source"])
            self._record_devices(domain)
        return moved

    def _reduce(self, op: Operation) -> None:
        domain = self._inactive(op.params["id"], "taking a device away")
        with self._alone(domain):
            op.step("locked")
            if guid(metadata_pv(domain.group.read()).device) == op.params["guid"]:
                reason = "it has the domain's metadata, which stays where it is"
                raise ForbiddenPhysicalVolumeOperation(
                    device=op.params["guid"], reason=reason
                )
            self._groups.reduce(domain.id, op.params["device"])
            op.step("reduced", abortable=False)
            self._record_devices(domain)

    def _recover_reduce(self, op: Operation) -> bool:
        domain = self._domain(op.params["id"], "taking a device away")
        with self._alone(domain):
            self._record_devices(domain)
        return op.params["device"] not in domain.group.devices().values()
