# SPDX-License-Identifier: GPL-2.0-or-later
"""May a device become a physical volume?  Looked at before anything is written."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from vdsm_storage.errors import (
    AgentError,
    DeviceBlockSizeError,
    ForbiddenPhysicalVolumeOperation,
    InaccessiblePhysDev,
    LvmCommandError,
    PartitionedPhysDev,
    PhysDevInitializationError,
)
from vdsm_storage.lvm import devices as block
from vdsm_storage.lvm.command import Lvm
from vdsm_storage.lvm.labels import DamageError, read_header, read_label
from vdsm_storage.lvm.model import PhysicalVolume, VolumeGroup
from vdsm_storage.lvm.report import JSON, parse_report
from vdsm_storage.lvm.scan import Found, Scanner, Seen, groups_of

DOMAIN_TAG: Final = "RHAT_storage_domain"  # and ..._UNREADY while a domain is being made
SECTOR: Final = 512  # bytes; the format of block domains has no other
METADATA: Final = "metadata"  # the volume of a domain that begins at extent 0 of the first device
PROBE: Final = 20.0  # seconds for blkid


def is_domain(tags: Sequence[str]) -> bool:
    """Whether a group with these tags is a storage domain, or is becoming one."""
    return any(tag.startswith(DOMAIN_TAG) for tag in tags)


def forbid_metadata_pv(model: VolumeGroup, pv: PhysicalVolume, device: str) -> None:
    """The format wants the domain's metadata at extent 0 of the device on which LVM's own
    metadata is in use, and that stays so.  Raises ForbiddenPhysicalVolumeOperation (617).
    """
    lv = model.lvs.get(METADATA)
    begins = lv is not None and lv.segments and lv.segments[0].pv == pv.name
    if begins or _metadata_in_use(device):
        raise ForbiddenPhysicalVolumeOperation(
            device=device, reason=f"it has the metadata of {model.name}, which stays where it is"
        )


def _metadata_in_use(device: str) -> bool:
    """Whether LVM keeps a group's metadata on it; a device that cannot be read has none."""
    try:
        label = read_label(device)
        areas = label.areas if label is not None else ()
        return any(not read_header(device, area).ignored for area in areas)
    except (OSError, DamageError):
        return False


@dataclass(frozen=True)
class _Look:
    """The devices that shall be used, and the groups that they may be in."""

    seen: Mapping[str, Seen]
    groups: Sequence[Found]

    def group_of(self, device: str) -> Found | None:
        label = self.seen[device].label
        if label is None:
            return None
        return next((found for found in self.groups if label.pv_uuid in found.devices), None)


class Checks:
    """`candidates` are the devices that groups may be on."""

    def __init__(self, lvm: Lvm, scanner: Scanner, candidates: Callable[[], Sequence[str]]) -> None:
        self._lvm = lvm
        self._scanner = scanner
        self._candidates = candidates

    def usable(self, devices: Sequence[str], force: bool) -> None:
        """Raises what is wrong with the first device that cannot be used."""
        if not devices:
            raise InaccessiblePhysDev(devices="(none given)")
        look = self._look(devices)
        self._check_there(devices, look)
        if len({block.number(device) for device in devices}) < len(devices):
            reason = "it is given twice"
            raise PhysDevInitializationError(device=", ".join(devices), reason=reason)
        self._check_sectors(devices)
        for device in devices:
            self._check_free(device, look, force)

    def why_not(self, devices: Sequence[str]) -> dict[str, str | None]:
        """By device, why it cannot be used by itself, or None."""
        look = self._look(devices)
        return {device: self._why_not(device, look) for device in devices}

    def _why_not(self, device: str, look: _Look) -> str | None:
        try:
            self._check_there([device], look)
            self._check_sectors([device])
            self._check_free(device, look, force=False)
        except AgentError as error:
            return str(error)
        except OSError as error:
            return f"{device}: {error.strerror}"
        return None

    def _look(self, devices: Sequence[str]) -> _Look:
        seen = self._scanner.look(devices)
        if any(one.label is not None for one in seen.values()):  # whose are they?
            others = [device for device in self._candidates() if device not in seen]
            seen |= self._scanner.look(others)
        return _Look(seen, groups_of(seen))

    def _check_there(self, devices: Sequence[str], look: _Look) -> None:
        missing = [d for d in devices if block.number(d) is None or d not in look.seen]
        if missing:
            raise InaccessiblePhysDev(devices=", ".join(missing))

    def _check_sectors(self, devices: Sequence[str]) -> None:
        for device in devices:
            size = block.sector_size(device)
            if size != SECTOR:
                raise DeviceBlockSizeError(device=device, size=size)

    def _check_free(self, device: str, look: _Look, force: bool) -> None:
        found = look.group_of(device)
        if found is not None and (is_domain(found.tags) or not force):
            what = "storage domain" if is_domain(found.tags) else "volume group"
            raise _used(device, f"it belongs to {what} {found.name}: remove that first")
        if block.partition_table(device, PROBE):
            raise PartitionedPhysDev(device=device)
        if block.in_use(device):
            raise _used(device, f"it is in use on this host, {self._by(device)}")
        if force:
            return
        label = look.seen[device].label
        if label is not None and found is None and self._claimed(device):
            raise _used(device, "it belongs to a volume group whose other devices are not here")
        if words := block.what_is_on(device, PROBE):
            raise _used(device, f"{words}; force takes it nevertheless")

    def _by(self, device: str) -> str:
        return ", ".join(block.users(device)) or "mounted or taken by a program"

    def _claimed(self, device: str) -> bool:
        """Whether its label says that a group has it, though no group was found."""
        argv = ["pvs", *JSON, "-o", "pv_in_use", device]
        try:
            (row,) = parse_report(self._lvm.run(argv, [device]).stdout)["pv"]
        except (LvmCommandError, ValueError, KeyError):
            return True
        return bool(row["pv_in_use"])


def _used(device: str, reason: str) -> AgentError:
    return PhysDevInitializationError(device=device, reason=reason)
