# SPDX-License-Identifier: GPL-2.0-or-later
"""Verbs of the namespace VM: running virtual machines.

Each VM has a lane of its own: one whose QEMU or guest agent hangs delays nobody else.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

from vdsm_storage.base.uuids import BLANK, new_uuid
from vdsm_storage.errors import (
    ImageFileNotFound,
    InvalidParams,
    SnapshotFailed,
    ValueOutOfRange,
)
from vdsm_storage.leases.external import LeaseRef
from vdsm_storage.verbs.context import Context
from vdsm_storage.verbs.table import Verb
from vdsm_storage.verbs.thin import with_thin
from vdsm_storage.vms import migrate_request
from vdsm_storage.vms.change_cd import CDROM, FLOPPY
from vdsm_storage.vms.memory import MemoryVolumes
from vdsm_storage.vms.merge_request import MergeRequest
from vdsm_storage.vms.migrate_request import Routes
from vdsm_storage.vms.shutdown import Shutdown
from vdsm_storage.vms.snapshot_request import NewLeaf, SnapshotRequest

VM = "vmID"


def getStats(ctx: Context, vmID: str) -> list[dict[str, Any]]:
    return [with_thin(ctx.services.thin, ctx.services.vms.one_stats(vmID))]


def getThinHistory(
    ctx: Context, vmID: str, drive: str = "", since: float = 0.0
) -> Mapping[str, Sequence[Mapping[str, float | str]]]:
    registry = ctx.services.vms.registry
    registry.state(vmID)
    if drive:
        there = [one.name for one in registry.definition(vmID).drives]
        if drive not in there:
            raise ImageFileNotFound(vm=vmID, disk=f"{drive}; there are {', '.join(there)}")
    return ctx.services.thin.history(vmID, drive, since)


def getInfo(ctx: Context, vmID: str) -> dict[str, Any]:
    return ctx.services.vms.info(vmID)


def pause(ctx: Context, vmID: str) -> dict[str, Any]:
    ctx.services.disks.life.pause(vmID)
    return {"vmList": {}}


def cont(ctx: Context, vmID: str) -> dict[str, Any]:
    ctx.services.disks.life.cont(vmID)
    return {"vmList": {}}


def reset(ctx: Context, vmID: str) -> None:
    ctx.services.disks.life.reset(vmID)


def destroy(ctx: Context, vmID: str, gracefulAttempts: int = 1) -> None:
    ctx.services.disks.life.destroy(vmID, gracefulAttempts)


def create(ctx: Context, vmID: str, vmParams: Mapping[str, Any]) -> dict[str, Any]:
    """The VM is started after the answer."""
    return ctx.services.disks.creation.create(vmID, vmParams)


def migrate(ctx: Context, vmID: str, params: Mapping[str, Any]) -> None:
    """The VM moves after the answer."""
    settings = ctx.services.config.libvirt
    routes = Routes(settings.migration_uri, settings.migration_data)
    ctx.services.disks.outgoing.migrate(migrate_request.parse(vmID, params, routes))


def migrateCancel(ctx: Context, vmID: str) -> None:
    """Also of one that is on its way here: what was made for it is let go."""
    if not ctx.services.disks.incoming.cancel(vmID):
        ctx.services.disks.outgoing.cancel(vmID)


def migrationCreate(
    ctx: Context, vmID: str, params: Mapping[str, Any], incomingLimit: int = 0
) -> dict[str, Any]:
    """libvirt chooses the port."""
    found = ctx.services.disks.incoming.prepare(vmID, params, incomingLimit)
    return {"migrationPort": 0, "params": found}


def getMigrationStatus(ctx: Context, vmID: str) -> dict[str, Any]:
    """Raises why it stays, of one that failed."""
    found = ctx.services.vms.migrations.status(vmID)
    if found.error is not None:
        raise found.error
    if found.going:
        return {"vmId": vmID, "status": "in_progress", "progress": found.percent}
    return {"vmId": vmID, "status": "done", "downtime": found.downtime}


def shutdown(
    ctx: Context,
    vmID: str,
    delay: int | None = None,
    message: str | None = None,
    reboot: bool = False,
    timeout: int | None = None,
    force: bool = False,
) -> None:
    asked = Shutdown(vmID, reboot, force, delay, timeout, message or "")
    ctx.services.disks.shutdowns.begin(asked)


def freeze(ctx: Context, vmID: str) -> None:
    ctx.services.vms.freezing.freeze(vmID)


def thaw(ctx: Context, vmID: str) -> None:
    ctx.services.vms.freezing.thaw(vmID)


def snapshot(
    ctx: Context,
    vmID: str,
    snapDrives: Sequence[Mapping[str, Any]],
    snapMemory: str | None = None,
    frozen: bool = False,
    jobUUID: str | None = None,
    timeout: int = 30,
    freeze_timeout: int = 8,
) -> None:
    """Both times are in minutes."""
    for name, value in (("timeout", timeout), ("freeze_timeout", freeze_timeout)):
        if value <= 0:
            raise ValueOutOfRange(parameter=name, reason="at least one minute", value=value)
    try:
        memory = MemoryVolumes.parse(snapMemory) if snapMemory else None
    except ValueError as error:
        raise InvalidParams(method="VM.snapshot", parameter="snapMemory", reason=error) from error
    try:
        drives = [
            NewLeaf(each["domainID"], each["imageID"], each["baseVolumeID"], each["volumeID"])
            for each in snapDrives
        ]
    except KeyError as error:
        reason = "only disks on volumes of storage domains can be snapshotted"
        raise SnapshotFailed(vm=vmID, reason=reason) from error
    request = SnapshotRequest(vmID, drives, frozen, timeout * 60.0, freeze_timeout * 60.0, memory)
    ctx.services.vms.snapshot(request, jobUUID)


def merge(
    ctx: Context,
    vmID: str,
    drive: Mapping[str, Any],
    baseVolUUID: str,
    topVolUUID: str,
    bandwidth: int = 0,
    jobUUID: str | None = None,
) -> None:
    names = (drive["domainID"], drive["imageID"], drive["volumeID"], baseVolUUID, topVolUUID)
    request = MergeRequest(vmID, *names, int(bandwidth))
    ctx.services.vms.merges.start(request, jobUUID or new_uuid())


def diskReplicateStart(
    ctx: Context,
    vmID: str,
    srcDisk: Mapping[str, Any],
    dstDisk: Mapping[str, Any],
    needExtend: bool = True,
) -> None:
    ctx.services.disks.replicating.start(vmID, srcDisk, dstDisk, extend=needExtend)


def diskReplicateFinish(
    ctx: Context, vmID: str, srcDisk: Mapping[str, Any], dstDisk: Mapping[str, Any]
) -> None:
    ctx.services.disks.replicating.finish(vmID, srcDisk, dstDisk)


def setReplicationBandwidth(
    ctx: Context, vmID: str, srcDisk: Mapping[str, Any], bandwidth: int
) -> None:
    ctx.services.disks.replicating.limit(vmID, srcDisk, bandwidth)


# -- disks and leases --------------------------------------------------------------------------


def hotplugDisk(ctx: Context, vmID: str, params: Mapping[str, Any]) -> dict[str, Any]:
    ctx.services.disks.hotplug.plug(vmID, params.get("xml"), params.get("drive"))
    return _vm(ctx, vmID)


def hotunplugDisk(ctx: Context, vmID: str, params: Mapping[str, Any]) -> dict[str, Any]:
    ctx.services.disks.hotplug.unplug(vmID, params.get("xml"), params.get("drive"))
    return _vm(ctx, vmID)


def hotplugLease(ctx: Context, vmID: str, lease: Mapping[str, Any]) -> dict[str, Any]:
    ctx.services.disks.leases.plug(vmID, LeaseRef(lease["sd_id"], lease["lease_id"]))
    return _vm(ctx, vmID)


def hotunplugLease(ctx: Context, vmID: str, lease: Mapping[str, Any]) -> dict[str, Any]:
    ctx.services.disks.leases.unplug(vmID, LeaseRef(lease["sd_id"], lease["lease_id"]))
    return _vm(ctx, vmID)


def changeCD(ctx: Context, vmID: str, driveSpec: str | Mapping[str, Any]) -> dict[str, Any]:
    ctx.services.disks.media.change(vmID, driveSpec, CDROM)
    return _vm(ctx, vmID)


def changeFloppy(ctx: Context, vmID: str, driveSpec: str | Mapping[str, Any]) -> dict[str, Any]:
    ctx.services.disks.media.change(vmID, driveSpec, FLOPPY)
    return _vm(ctx, vmID)


def updateDevice(ctx: Context, vmID: str, params: Mapping[str, Any]) -> dict[str, Any]:
    """Disks only."""
    ctx.services.disks.media.update(vmID, params)
    return _vm(ctx, vmID)


def diskSizeExtend(
    ctx: Context, vmID: str, driveSpecs: str | Mapping[str, Any], newSize: int
) -> str:
    """The zero UUID stands for no VM: the volume is resized at rest."""
    sizes = ctx.services.disks.sizes
    if vmID == BLANK:
        told = {"path": driveSpecs} if isinstance(driveSpecs, str) else driveSpecs
        return str(sizes.extend_offline(told, newSize))
    return str(sizes.extend(vmID, driveSpecs, newSize))


def refresh_disk(ctx: Context, vmID: str, drive: Mapping[str, Any]) -> dict[str, str]:
    return ctx.services.disks.sizes.refresh(vmID, drive)


def getDiskAlignment(ctx: Context, vmID: str, disk: Mapping[str, Any]) -> dict[str, bool]:
    """Also with the zero UUID, which stands for no VM."""
    if vmID != BLANK:
        ctx.services.vms.registry.state(vmID)
    return ctx.services.volumes.alignment(disk["domainID"], disk["imageID"], disk["volumeID"])


def _vm(ctx: Context, vm: str) -> dict[str, Any]:
    """As little as replies hold of a VM."""
    state = ctx.services.vms.registry.state(vm)
    return {"vmId": vm, "vmName": state.name, "status": state.status}


# -- limits ------------------------------------------------------------------------------------


def setIoTune(ctx: Context, vmID: str, tunables: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Done when it answers; the reply has the form of a task's."""
    ctx.services.disks.io_tune.set(vmID, tunables)
    return {
        "taskID": new_uuid(), "taskState": "finished", "taskResult": "success", "code": 0,
        "message": "The limits are in force",
    }  # fmt: skip


def getIoTune(ctx: Context, vmID: str) -> list[dict[str, Any]]:
    return ctx.services.disks.io_tune.in_force(vmID)


def getIoTunePolicy(ctx: Context, vmID: str) -> list[dict[str, Any]]:
    return ctx.services.disks.io_tune.policy(vmID)


def updateVmPolicy(ctx: Context, vmID: str, params: Mapping[str, Any]) -> None:
    ctx.services.disks.io_tune.update_policy(vmID, params)


def _staying(function: Callable[..., object]) -> Callable[..., object]:
    """Not of a VM that is on its way to another host, or from one."""

    @functools.wraps(function)
    def verb(ctx: Context, vmID: str, **params: Any) -> object:
        ctx.services.vms.must_stay(vmID)
        return function(ctx, vmID, **params)

    return verb


VERBS: Final[Mapping[str, Verb]] = {
    "VM.getStats": Verb(getStats, lane=VM),
    "VM.getThinHistory": Verb(getThinHistory, lane=VM),
    "VM.getInfo": Verb(getInfo, lane=VM),
    "VM.pause": Verb(pause, lane=VM),
    "VM.cont": Verb(cont, lane=VM),
    "VM.reset": Verb(reset, lane=VM),
    "VM.destroy": Verb(destroy, lane=VM),
    "VM.create": Verb(create, lane=VM),
    "VM.migrate": Verb(migrate, lane=VM),
    "VM.migrateCancel": Verb(migrateCancel, lane=VM),
    "VM.migrationCreate": Verb(migrationCreate, lane=VM),
    "VM.getMigrationStatus": Verb(getMigrationStatus),
    "VM.shutdown": Verb(shutdown, lane=VM),
    "VM.freeze": Verb(_staying(freeze), lane=VM),
    "VM.thaw": Verb(thaw, lane=VM),
    "VM.snapshot": Verb(_staying(snapshot), lane=VM),
    "VM.merge": Verb(_staying(merge), lane=VM),
    "VM.diskReplicateStart": Verb(_staying(diskReplicateStart), lane=VM),
    "VM.diskReplicateFinish": Verb(diskReplicateFinish, lane=VM),
    "VM.setReplicationBandwidth": Verb(setReplicationBandwidth, lane=VM),
    "VM.hotplugDisk": Verb(_staying(hotplugDisk), lane=VM),
    "VM.hotunplugDisk": Verb(_staying(hotunplugDisk), lane=VM),
    "VM.hotplugLease": Verb(_staying(hotplugLease), lane=VM),
    "VM.hotunplugLease": Verb(_staying(hotunplugLease), lane=VM),
    "VM.changeCD": Verb(_staying(changeCD), lane=VM),
    "VM.changeFloppy": Verb(_staying(changeFloppy), lane=VM),
    "VM.updateDevice": Verb(_staying(updateDevice), lane=VM),
    "VM.diskSizeExtend": Verb(_staying(diskSizeExtend), lane=VM),
    "VM.refresh_disk": Verb(refresh_disk, lane=VM),
    "VM.getDiskAlignment": Verb(getDiskAlignment, lane="disk.domainID"),
    "VM.setIoTune": Verb(setIoTune, lane=VM),
    "VM.getIoTune": Verb(getIoTune, lane=VM),
    "VM.getIoTunePolicy": Verb(getIoTunePolicy, lane=VM),
    "VM.updateVmPolicy": Verb(updateVmPolicy, lane=VM),
}
