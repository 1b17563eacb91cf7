# SPDX-License-Identifier: GPL-2.0-or-later
"""The devices that block domains are made of: LUNs, what occupies them, and volume groups on them.

A LUN that does not answer is listed all the same, with status unknown.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass, replace
from typing import Any, Final

from vdsm_storage.base.lanes import Lanes
from vdsm_storage.domains import block_tags
from vdsm_storage.domains.luns import TYPE_NUMBERS, Lun, Luns
from vdsm_storage.domains.rescan import Rescan
from vdsm_storage.errors import (
    AgentError,
    InaccessiblePhysDev,
    VolumeGroupHasDomainTag,
)
from vdsm_storage.host.scsi import FC, ISCSI
from vdsm_storage.lvm import devices as block
from vdsm_storage.lvm.group import Group
from vdsm_storage.lvm.groups import Groups
from vdsm_storage.lvm.model import PhysicalVolume, VolumeGroup
from vdsm_storage.lvm.scan import Found, Scanner, Seen, groups_of

FREE: Final = "free"
USED: Final = "used"
UNUSABLE: Final = "unusable"
UNKNOWN: Final = "unknown"
SECTOR: Final = 512  # bytes; the format of block domains has no other
PROBE: Final = 60.0  # seconds for all devices to tell what is on them

log = logging.getLogger("domains.devices")


@dataclass(frozen=True)
class DeviceBase:
    """What lies below.  `scan_timeout` seconds are what a device may take to answer."""

    luns: Luns
    rescan: Rescan
    groups: Groups
    lanes: Lanes
    scan_timeout: float = 10.0


@dataclass(frozen=True)
class _Volume:
    """The physical volume on a device: bytes that it has, and the group that it is in."""

    uuid: str = ""
    size: int | None = None
    group: str = ""


@dataclass(frozen=True)
class _State:
    """Whether a device could take a new domain."""

    status: str
    partitioned: bool = False


class Devices:
    def __init__(self, base: DeviceBase) -> None:
        self._luns = base.luns
        self._candidates = base.luns.candidates
        self._rescan = base.rescan
        self._groups = base.groups
        self._lanes = base.lanes
        self._timeout = base.scan_timeout
        self._scanner = Scanner(base.lanes.submit, base.scan_timeout)

    # -- devices -----------------------------------------------------------------------------

    def listing(
        self,
        kind: str | None = None,
        guids: Sequence[str] = (),
        check: bool = True,
        refresh: bool = True,
    ) -> list[dict[str, Any]]:
        """As Host.getDeviceList answers: the devices of a kind (iSCSI, FCP) or of all.

        `check`: test whether each could take a new domain.  `refresh`: look for new ones first.
        """
        if refresh:
            self._look_again(guids)
        luns = [lun for lun in self._luns.all(guids) if lun.is_of(kind)]
        seen = self._scanner.look(self._candidates.candidates()) if luns else {}
        volumes = _volumes(seen)
        states = self._states(luns, seen, volumes) if check else {}
        return [
            _device(lun, volumes.get(lun.candidate.path), states.get(lun.guid)) for lun in luns
        ]

    def see_size(self, guid: str) -> None:
        """This host sees the present size of a LUN."""
        self._rescan.sizes([guid])

    def visibility(self, guids: Sequence[str]) -> dict[str, bool]:
        """Whether this host sees each device; it looks for new ones when one is missing."""
        there = {one.guid for one in self._candidates.all()}
        if not there.issuperset(guids):
            self._look_again((), sizes=False)
            there = {one.guid for one in self._candidates.all()}
        return {guid: guid in there for guid in guids}

    def find(self, guid: str) -> str:
        """The path of a device.  Raises InaccessiblePhysDev (606)."""
        return self._candidates.find(guid)

    def _look_again(self, guids: Sequence[str], sizes: bool = True) -> None:
        try:
            if sizes:
                self._rescan.everything(guids)
            else:
                self._rescan.hosts()
        except AgentError as error:  # what is there already can be listed
            log.warning("%s", error)

    # -- what is on them ---------------------------------------------------------------------

    def _states(
        self, luns: Sequence[Lun], seen: Mapping[str, Seen], volumes: Mapping[str, _Volume]
    ) -> dict[str, _State]:
        """By GUID.  Each device is asked in a lane of its own."""
        found: dict[str, _State] = {}
        running: dict[str, Future[_State]] = {}
        for lun in luns:
            path = lun.candidate.path
            if lun.is_dead or path not in seen:
                found[lun.guid] = _State(UNKNOWN)
            elif path in volumes and volumes[path].group:
                found[lun.guid] = _State(USED)
            elif lun.limits.logical != SECTOR:
                found[lun.guid] = _State(UNUSABLE)
            else:
                running[lun.guid] = self._ask(path)
        wait(running.values(), PROBE)
        for guid, future in running.items():
            found[guid] = _answer(guid, future)
        return found

    def _ask(self, path: str) -> Future[_State]:
        return self._lanes.submit(f"probe {path}", lambda: self._probe(path), PROBE)

    def _probe(self, path: str) -> _State:
        if block.partition_table(path, self._timeout):
            return _State(USED, partitioned=True)
        reason = self._groups.can_create(path)
        if reason is not None:
            log.info("Device %s is not free: %s", path, reason)
        return _State(FREE if reason is None else USED)

    # -- volume groups -----------------------------------------------------------------------

    def create_group(self, name: str, guids: Sequence[str], force: bool) -> str:
        """Make a volume group for a new domain; its id.  Raises 389, 502, 505, 517, 518, 601, 606,
        607."""
        if missing := self._missing(guids):
            self._look_again((), sizes=False)
            missing = self._missing(guids)
        if missing:
            raise InaccessiblePhysDev(devices=", ".join(missing))
        devices = [self._candidates.find(guid) for guid in guids]
        return self._groups.create(name, devices, (block_tags.UNREADY,), force)

    def remove_group(self, uuid: str) -> None:
        """Raises VolumeGroupHasDomainTag (515) for a whole domain, 506, 508."""
        group = self._groups.find_uuid(uuid).read()
        if block_tags.is_domain(group.tags):
            raise VolumeGroupHasDomainTag(vg=group.name)
        self._groups.remove(group.name)

    def group_info(self, uuid: str) -> dict[str, Any]:
        """As LVMVolumeGroup.getInfo answers.  Raises VolumeGroupDoesNotExist (506)."""
        group = self._groups.find_uuid(uuid)
        found = self._group(group.read(), group.devices())
        return {**found, "pvlist": self._volumes_of(group)}

    def list_groups(self, kind: str | None = None) -> list[dict[str, Any]]:
        """As Host.getLVMVolumeGroups answers."""
        rows = []
        for found in self._groups.scan().values():
            try:
                group = self._groups.find(found.name)
                row = self._group(group.read(), group.devices())
            except AgentError as error:
                log.warning("Volume group %s is not listed: %s", found.name, error)
                continue
            if row["vgUUID"] == found.uuid and kind in (None, _kind(row["type"])):
                rows.append(row)
        return rows

    def _missing(self, guids: Sequence[str]) -> list[str]:
        there = {one.guid for one in self._candidates.all()}
        return [guid for guid in guids if guid not in there]

    def _group(self, group: VolumeGroup, devices: Mapping[str, str]) -> dict[str, Any]:
        luns = self._by_path(devices.values()).values()
        partial = group.partial or any(pv.uuid not in devices for pv in group.pvs.values())
        return {
            "name": group.name,
            "vgUUID": group.uuid,
            "vgsize": str(group.size),
            "vgfree": str(group.free),
            "type": max((TYPE_NUMBERS[lun.type] for lun in luns), default=TYPE_NUMBERS[FC]),
            "state": "PARTIAL" if partial else "OK",
            # The six letters that lvm shows; what the format of domains fixes is not read.
            "attr": {
                "permission": "w",
                "resizeable": "z",
                "exported": "x" if group.exported else "-",
                "partial": "p" if partial else "-",
                "allocation": "n",
                "clustered": "-",
            },
        }

    def _volumes_of(self, group: Group) -> list[dict[str, Any]]:
        model, devices = group.read(), group.devices()
        luns = self._by_path(devices.values())
        used: dict[str, int] = {}
        for lv in model.lvs.values():
            for segment in lv.segments:
                used[segment.pv] = used.get(segment.pv, 0) + segment.count
        return [
            {
                **_described(pv, luns.get(devices.get(pv.uuid, ""))),
                "capacity": str(pv.pe_count * model.extent_size),
                "vgUUID": model.uuid,
                "pvUUID": pv.uuid,
                "pe_count": str(pv.pe_count),
                "pe_alloc_count": str(used.get(pv.name, 0)),
            }
            for pv in model.pvs.values()
        ]

    def _by_path(self, paths: Iterable[str]) -> dict[str, Lun]:
        wanted = set(paths)
        luns = self._luns.all()
        return {lun.candidate.path: lun for lun in luns if lun.candidate.path in wanted}


def _volumes(seen: Mapping[str, Seen]) -> dict[str, _Volume]:
    """The physical volume on each device that has one."""
    found: dict[str, _Volume] = {}
    groups = groups_of(seen)
    for device, what in seen.items():
        if what.label is not None:
            volume = _Volume(what.label.pv_uuid, what.label.size)
            found[device] = _in_group(volume, groups)
    return found


def _in_group(volume: _Volume, groups: Iterable[Found]) -> _Volume:
    for group in groups:
        for pv in group.head.pvs.values():
            if pv.uuid == volume.uuid:
                size = pv.pe_count * group.head.extent_size
                return replace(volume, size=size, group=group.uuid)
    return volume


def _device(lun: Lun, volume: _Volume | None, state: _State | None) -> dict[str, Any]:
    there = volume or _Volume()
    found = {
        **lun.describe(),
        "capacity": str(lun.limits.size),
        "logicalblocksize": str(lun.limits.logical),
        "physicalblocksize": str(lun.limits.physical),
        "pvUUID": there.uuid,
        "pvsize": "" if there.size is None else str(there.size),
        "vgUUID": there.group,
        "status": state.status if state else UNKNOWN,
    }
    if state is not None and state.partitioned:
        found["partitioned"] = True
    return found


def _described(pv: PhysicalVolume, lun: Lun | None) -> dict[str, Any]:
    """A device that is not there is called by the name that it had."""
    if lun is not None:
        return {**lun.describe(), "devcapacity": str(lun.limits.size)}
    return {
        "GUID": pv.device.rpartition("/")[2],
        "devtype": FC,
        "vendorID": "",
        "productID": "",
        "serial": "",
        "fwrev": "",
        "discard_max_bytes": 0,
        "discard_zeroes_data": 0,
        "pathlist": [],
        "pathstatus": [],
        "devcapacity": str(pv.size),
    }


def _answer(guid: str, future: Future[_State]) -> _State:
    if not future.done():
        log.warning("Device %s does not answer; what is on it is unknown", guid)
        return _State(UNKNOWN)
    try:
        return future.result()
    except (AgentError, OSError) as error:
        log.warning("Device %s: %s", guid, error)
        return _State(UNKNOWN)


def _kind(number: int) -> str:
    return ISCSI if number == TYPE_NUMBERS[ISCSI] else FC
