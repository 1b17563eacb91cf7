# SPDX-License-Identifier: GPL-2.0-or-later
"""Everything about running VMs that verbs use, put together."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from vdsm_storage.base.clock import Clock
from vdsm_storage.base.lanes import Lanes
from vdsm_storage.config import Config
from vdsm_storage.errors import AgentError, MigrationInProgress, NoSuchVM, VMIsDown
from vdsm_storage.host.libvirt_blockjobs import LibvirtBlockJobs
from vdsm_storage.host.libvirt_model import DOWN, Change, VmEvent
from vdsm_storage.images.workshop import Workshop
from vdsm_storage.jobs.operation import Kind
from vdsm_storage.jobs.runner import Runner
from vdsm_storage.vms import merge
from vdsm_storage.vms.freeze import Freezing, Guard, Limits
from vdsm_storage.vms.frozen import FrozenVms
from vdsm_storage.vms.launches import COMING, UP, WAITING, Launches, why_stopped
from vdsm_storage.vms.merge_storage import MergeStorage
from vdsm_storage.vms.migrations import LEAVING, Ask, Migrations
from vdsm_storage.vms.registry import Registry
from vdsm_storage.vms.snapshot import Snapshots, Tools
from vdsm_storage.vms.snapshot_request import SnapshotRequest
from vdsm_storage.vms.stats import Statistics

log = logging.getLogger("vms")

Publish = Callable[[str, Mapping[str, object]], None]

SHOWN: Final = (Change.STARTED, Change.STOPPED, Change.PAUSED, Change.RESUMED)


@dataclass(frozen=True)
class VmBase:
    """What lies below: agent.py builds it.  `publish(method, params)` sends an event."""

    config: Config
    clock: Clock
    lanes: Lanes
    libvirt: LibvirtBlockJobs
    publish: Publish
    runner: Runner
    ask: Ask  # an agent of another host


class VmServices:
    """Order in agent.py: build, then start libvirt, then `start`.

    `shop` is what volumes are changed with; `prepare(domain, image, volume)` makes one usable on
    this host and returns its path.
    """

    def __init__(
        self,
        base: VmBase,
        shop: Workshop,
        prepare: Callable[[str, str, str], str],
        merging: MergeStorage,
    ) -> None:
        config = base.config
        self.publish = base.publish
        self._vms = base.libvirt
        self.registry = Registry(base.libvirt)
        self.launches = Launches(os.path.join(config.paths.run, "launches"), self.announce)
        self.migrations = Migrations(base.ask)
        self.freezing = Freezing(
            self.registry,
            base.libvirt,
            FrozenVms(os.path.join(config.paths.run, "frozen")),
            Limits(config.vms.freeze_timeout, config.vms.freeze_limit),
            base.clock,
            self._thawed,
        )
        self._guard = Guard(self.freezing, base.lanes, base.clock)
        tools = Tools(
            base.libvirt, self.registry, self.freezing, shop.find_store, prepare, base.clock
        )
        self._snapshots = Snapshots(tools, config.vms, shop.locks)
        self._runner = base.runner
        self.merges = merge.Merges(
            merge.Tools(
                base.libvirt, self.registry, merging, base.runner, shop.locks, base.clock
            )
        )
        self.stats = Statistics(
            base.libvirt, self.registry, base.clock, self.freezing.age, self.merges.jobs.of
        )
        self.registry.watch(self._event, self._guard.hurry)

    def kinds(self) -> Sequence[Kind]:
        return (*self._snapshots.kinds(), *self.merges.kinds())

    def start(self) -> None:
        if self.registry.enabled:
            self._guard.start()

    def close(self) -> None:
        self._guard.close()

    # -- operations --------------------------------------------------------------------------

    def snapshot(self, request: SnapshotRequest, job: str | None) -> None:
        """Start a job under this id; without one, return at its end.

        Raises NoSuchVM (1), VMIsDown (6), 59, JobExists (69).
        """
        self.registry.state(request.vm)
        if job is None:
            self._runner.run(request.as_request())
        else:
            self._runner.start_job(job, request.as_request())

    # -- lists -------------------------------------------------------------------------------

    def short_list(self, vms: Sequence[str] = ()) -> list[dict[str, Any]]:
        """vmId, vmName and status of those that run, are being started, or did not start; all, or
        those asked for.  Raises 59."""
        up = self.launches.of_status(UP)
        running = self.registry.running()
        found = [
            {"vmId": state.id, "vmName": state.name, "status": self._shown(state.id, state.status)}
            for state in running
        ]
        found += [
            {key: row[key] for key in ("vmId", "vmName", "status")}
            for row in self._rows(up, {state.id for state in running})
        ]
        return [row for row in found if not vms or row["vmId"] in vms]

    def _shown(self, vm: str, status: str) -> str:
        """libvirt has it paused, or not yet, while it is being started or received."""
        if self.migrations.leaving(vm):
            return LEAVING
        return self.launches.not_yet(vm) or status

    def all_stats(self) -> list[dict[str, Any]]:
        """Of those that short_list() has.  Raises 59."""
        up = self.launches.of_status(UP)
        found = self.stats.all()
        for row in found:
            self._add_state(row)
        return [*found, *self._rows(up, {row["vmId"] for row in found})]

    def _rows(self, up: Collection[str], running: Collection[str]) -> list[dict[str, Any]]:
        """Of VMs that libvirt does not run; of one that has just gone it is not told yet where."""
        rows = self.launches.rows(up, running)
        return [
            {**row, "status": LEAVING} if self.migrations.leaving(row["vmId"]) else row
            for row in rows
        ]

    def one_stats(self, vm: str) -> dict[str, Any]:
        """Raises NoSuchVM (1), VMIsDown (6), 59."""
        up = self.launches.of_status(UP)
        try:
            found = self.stats.one(vm)
        except (NoSuchVM, VMIsDown):
            rows = [row for row in self._rows(up, ()) if row["vmId"] == vm]
            if not rows:
                raise
            return rows[0]
        self._add_state(found)
        return found

    def _add_state(self, row: dict[str, Any]) -> None:
        row["status"] = self._shown(row["vmId"], row["status"])
        percent = self.migrations.percent(row["vmId"])
        if percent is not None:
            row["migrationProgress"] = percent

    def must_stay(self, vm: str) -> None:
        """What would not be there on the other host must not be done now.

        Raises MigrationInProgress (51).
        """
        if self.migrations.leaving(vm):
            raise MigrationInProgress(vm=vm, peer=self.migrations.status(vm).peer)
        if self.launches.coming(vm):
            raise MigrationInProgress(vm=vm, peer="this one")

    def coming(self) -> list[str]:
        """VMs that are on their way here."""
        return self.launches.of_status(COMING)

    def counts(self) -> dict[str, int]:
        """VMs of this host, as Host.getStats has them; at once."""
        running, active = self.registry.counts()
        leaving, coming = self.migrations.count(), len(self.coming())
        return {
            "vmCount": running,
            "vmActive": active,
            "vmMigrating": leaving + coming,
            "incomingVmMigrations": coming,
            "outgoingVmMigrations": leaving,
        }

    def full_list(self, vms: Sequence[str] = ()) -> list[dict[str, Any]]:
        """With their XML, and their disks on managed volumes.  Raises 59."""
        found = []
        for vm in self._with_xml(vms):
            xml = self._xml(vm["vmId"])
            if xml is not None:
                found.append({**vm, "xml": xml})
        return found

    def _with_xml(self, vms: Sequence[str]) -> list[dict[str, Any]]:
        return [vm for vm in self.short_list(vms) if vm["status"] not in (WAITING, COMING, DOWN)]

    def info(self, vm: str) -> dict[str, Any]:
        """One of them.  Raises NoSuchVM (1), VMIsDown (6), 59."""
        state = self.registry.state(vm)
        return {
            "vmId": state.id,
            "vmName": state.name,
            "status": state.status,
            "xml": self.registry.definition(vm, fresh=True).xml,
        }

    def xmls(self, vms: Sequence[str] = ()) -> dict[str, str]:
        """XML by VM, as it is now; one that ends meanwhile is left out.  Raises 59."""
        found = {vm["vmId"]: self._xml(vm["vmId"]) for vm in self._with_xml(vms)}
        return {vm: xml for vm, xml in found.items() if xml is not None}

    def _xml(self, vm: str) -> str | None:
        try:
            return self.registry.definition(vm, fresh=True).xml
        except AgentError as error:
            if error.code == 59:
                raise
            log.info("VM %s is left out: %s", vm, error)
            return None

    # -- what is told ------------------------------------------------------------------------

    def _event(self, event: VmEvent) -> None:
        self._guard.event(event)
        if self.launches.not_yet(event.vm):  # what comes of that is told at its end
            return
        if event.change is Change.STOPPED and self.migrations.leaving(event.vm):
            return  # told by whoever moves it, when it is known where it is
        if event.change is Change.STOPPED:
            self.launches.down(event.vm, *why_stopped(event.facts))
        if event.change in SHOWN and self.launches.row(event.vm) is None:
            self.publish(f"|virt|VM_status|{event.vm}", {event.vm: self._status(event)})

    def _status(self, event: VmEvent) -> dict[str, Any]:
        if event.change is Change.STOPPED:
            return {"vmId": event.vm, "status": DOWN}
        try:
            state = self.registry.state(event.vm)
            return {
                "vmId": event.vm,
                "status": self._shown(event.vm, state.status),
                "hash": self.registry.definition(event.vm).hash,
                "pauseCode": self.stats.pause_code(event.vm, state.state, state.reason),
            }
        except AgentError as error:  # it ended, or libvirt went away; both have events to come
            log.info("State of VM %s: %s", event.vm, error)
            return {"vmId": event.vm, "status": "Up" if event.change != Change.PAUSED else "Paused"}

    def announce(self, vm: str) -> None:
        """A VM that was asked for came up or went down, or began to move, or stays after all."""
        told = self.launches.row(vm) or self._status(VmEvent(vm, Change.RESUMED))
        self.publish(f"|virt|VM_status|{vm}", {vm: told})

    def _thawed(self, vm: str, facts: dict[str, Any]) -> None:
        self.publish(f"|virt|VM_thawed|{vm}", {vm: facts})
