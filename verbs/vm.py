# SPDX-License-Identifier: GPL-2.0-or-later
"""Verbs of the namespace VM: running virtual machines.

Each VM has a lane of its own: one whose QEMU or guest agent hangs delays nobody else.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from vdsm_storage.base.uuids import new_uuid
from vdsm_storage.errors import InvalidParams, SnapshotFailed, ValueOutOfRange
from vdsm_storage.verbs.context import Context
from vdsm_storage.verbs.table import Verb
from vdsm_storage.vms.memory import MemoryVolumes
from vdsm_storage.vms.merge_request import MergeRequest
from vdsm_storage.vms.snapshot_request import NewLeaf, SnapshotRequest

VM = "vmID"


def getStats(ctx: Context, vmID: str) -> list[dict[str, Any]]:
    return [ctx.services.vms.stats.one(vmID)]


def getInfo(ctx: Context, vmID: str) -> dict[str, Any]:
    return ctx.services.vms.info(vmID)


def pause(ctx: Context, vmID: str) -> dict[str, Any]:
    ctx.services.vms.life.pause(vmID)
    return {"vmList": {}}


def cont(ctx: Context, vmID: str) -> dict[str, Any]:
    ctx.services.vms.life.cont(vmID)
    return {"vmList": {}}


def reset(ctx: Context, vmID: str) -> None:
    ctx.services.vms.life.reset(vmID)


def destroy(ctx: Context, vmID: str, gracefulAttempts: int = 1) -> None:
    ctx.services.vms.life.destroy(vmID, gracefulAttempts)


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


VERBS: Final[Mapping[str, Verb]] = {
    "VM.getStats": Verb(getStats, lane=VM),
    "VM.getInfo": Verb(getInfo, lane=VM),
    "VM.pause": Verb(pause, lane=VM),
    "VM.cont": Verb(cont, lane=VM),
    "VM.reset": Verb(reset, lane=VM),
    "VM.destroy": Verb(destroy, lane=VM),
    "VM.freeze": Verb(freeze, lane=VM),
    "VM.thaw": Verb(thaw, lane=VM),
    "VM.snapshot": Verb(snapshot, lane=VM),
    "VM.merge": Verb(merge, lane=VM),
}
