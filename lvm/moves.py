# SPDX-License-Identifier: GPL-2.0-or-later
"""Moving a device's data to other devices of its group, by pvmove.

Needs device-mapper: the data is mirrored segment by segment, and each segment that is done is
committed.  pvmove itself waits for the end (no lvmpolld), so that it ends with the agent; the
mirror in the kernel goes on until someone ends it, which `abort` does.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from vdsm_storage.base.cancel import Cancel
from vdsm_storage.errors import (
    ActionStopped,
    CommandTimeout,
    CouldNotMovePVData,
    ForbiddenPhysicalVolumeOperation,
    LvmCommandError,
    NoSuchDestinationPhysicalVolumes,
    NoSuchPhysicalVolume,
    VolumeGroupSizeError,
)
from vdsm_storage.lvm.activation import DeviceMapper
from vdsm_storage.lvm.allocation import free_areas
from vdsm_storage.lvm.checks import forbid_metadata_pv
from vdsm_storage.lvm.command import Lvm, Watch
from vdsm_storage.lvm.devices import same
from vdsm_storage.lvm.group import Group
from vdsm_storage.lvm.model import PhysicalVolume, VolumeGroup

LONGEST: Final = 14 * 86400.0  # seconds; a move of many terabytes
INTERVAL: Final = "1"  # seconds between two lines of progress
_MOVED: Final = re.compile(rb"Moved:\s*(\d+(?:[.,]\d+)?)%")

log = logging.getLogger("lvm.moves")


@dataclass(frozen=True)
class Request:
    source: str
    destinations: Sequence[str]
    progress: Callable[[float], None]


def move(lvm: Lvm, group: Group, request: Request, cancel: Cancel | None) -> None:
    """The caller has the group for itself.  Groups.move says what is raised."""
    if unfinished(group.read()):
        abort(lvm, group, request.source)
    model = group.read()
    source, destinations = _volumes(group, model, request)
    forbid_metadata_pv(model, source, request.source)
    _check_space(model, source, destinations)
    if used(model, source):
        argv = ["pvmove", "--autobackup", "n", "--interval", INTERVAL, request.source]
        argv += request.destinations
        _run(lvm, group, argv, request, cancel)
    left = used(group.read(), source)
    if left or unfinished(group.read()):
        raise CouldNotMovePVData(
            device=request.source, vg=group.name, reason=f"{left} extents are still there"
        )
    request.progress(100.0)


def _run(
    lvm: Lvm, group: Group, argv: Sequence[str], request: Request, cancel: Cancel | None
) -> None:
    devices = sorted(group.all_devices(group.read()).values())
    watch = Watch(cancel, Progress(request.progress))
    try:
        lvm.run(
            *(argv, devices),
            vg=group.name,
            driver=True,
            timeout=LONGEST,
            watch=watch,
            fence=group.fence,
        )
    except (ActionStopped, CommandTimeout):
        abort(lvm, group, request.source)
        raise
    except LvmCommandError as error:
        if unfinished(group.read()):
            abort(lvm, group, request.source)
        reason = error.facts["reason"]
        raise CouldNotMovePVData(device=request.source, vg=group.name, reason=reason) from error


def abort(lvm: Lvm, group: Group, source: str) -> None:
    """End a move that is under way or was interrupted; what is moved stays moved.

    Raises CouldNotMovePVData (618).
    """
    if not unfinished(group.read()):
        return
    log.warning("volume group %s: the move of data is aborted", group.name)
    reason = _abort(lvm, group)
    standing = [] if reason else _standing(group.read())
    if standing:
        # It died before its mirror was there: lvm aborts only what is active, and says nothing.
        mapper = DeviceMapper(lvm)
        before = mapper.active(group.name)
        mapper.activate(group, standing)
        reason = _abort(lvm, group)
        mapper.deactivate(group, [lv for lv in standing if lv not in before])
    if unfinished(group.read()):
        reason = f"the move cannot be aborted: {reason or 'lvm does not say why'}"
        raise CouldNotMovePVData(device=source, vg=group.name, reason=reason)


def _abort(lvm: Lvm, group: Group) -> str:
    """What lvm says when it fails."""
    devices = sorted(group.all_devices(group.read()).values())
    try:
        lvm.run(["pvmove", "--abort"], devices, vg=group.name, driver=True, fence=group.fence)
    except (LvmCommandError, CommandTimeout) as error:
        return str(error)
    return ""


def _standing(model: VolumeGroup) -> list[str]:
    """Volumes that stand on the helper volume of a move."""
    return [
        name
        for name, lv in model.lvs.items()
        if lv.visible and any(segment.pv not in model.pvs for segment in lv.segments)
    ]


def unfinished(model: VolumeGroup) -> bool:
    """Whether lvm's helper volume of a move is there (pvmove0), or volumes that stand on it."""
    return any(
        not lv.visible or any(segment.pv not in model.pvs for segment in lv.segments)
        for lv in model.lvs.values()
    )


def used(model: VolumeGroup, pv: PhysicalVolume) -> int:
    """Extents of a physical volume that logical volumes have."""
    segments = (segment for lv in model.lvs.values() for segment in lv.segments)
    return sum(segment.count for segment in segments if segment.pv == pv.name)


class Progress:
    """Called with pieces of pvmove's output, calls `tell` with percents.

    The output: `  /dev/mapper/a: Moved: 12.50%`, a line every interval.
    """

    def __init__(self, tell: Callable[[float], None]) -> None:
        self._tell = tell
        self._rest = b""

    def __call__(self, piece: bytes) -> None:
        self._rest += piece
        found = list(_MOVED.finditer(self._rest))
        if found:
            self._tell(float(found[-1][1].replace(b",", b".")))
        self._rest = self._rest[found[-1].end() if found else 0 :][-100:]


def _volumes(
    group: Group, model: VolumeGroup, request: Request
) -> tuple[PhysicalVolume, list[PhysicalVolume]]:
    devices = group.devices()

    def find(device: str) -> PhysicalVolume | None:
        for pv in model.pvs.values():
            if pv.uuid in devices and same(devices[pv.uuid], device):
                return pv
        return None

    there = ", ".join(sorted(devices.values()))
    source = find(request.source)
    if source is None:
        raise NoSuchPhysicalVolume(vg=group.name, device=request.source, devices=there)
    found = {device: find(device) for device in request.destinations}
    missing = ", ".join(device for device, pv in found.items() if pv is None)
    if missing:
        raise NoSuchDestinationPhysicalVolumes(vg=group.name, missing=missing, devices=there)
    destinations = [pv for pv in found.values() if pv is not None]
    if source in destinations:
        reason = "its data cannot be moved to itself"
        raise ForbiddenPhysicalVolumeOperation(device=request.source, reason=reason)
    return source, destinations


def _check_space(
    model: VolumeGroup, source: PhysicalVolume, destinations: Sequence[PhysicalVolume]
) -> None:
    free = free_areas(model)
    if free is None:
        return
    names = [pv.name for pv in destinations] or [name for name in model.pvs if name != source.name]
    room = sum(count for name in names for _, count in free.areas.get(name, ()))
    needed = used(model, source)
    if needed > room:
        size = model.extent_size
        raise VolumeGroupSizeError(vg=model.name, free=room * size, size=needed * size)
