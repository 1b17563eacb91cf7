# SPDX-License-Identifier: GPL-2.0-or-later
"""SCSI disks and the hosts (adapters, iSCSI sessions) that they hang on, as sysfs shows them.

Nothing here asks a device: what the kernel learnt when it found a disk is in sysfs, so that a disk
whose storage is dead is described as fast as any.  Looking for new disks does ask, and may hang.
"""

from __future__ import annotations

import logging
import os
import re
from dataclasses import dataclass
from typing import Final

from vdsm_storage.host.kernel_files import KernelFiles

BLOCK: Final = "/sys/block"
SCSI_HOSTS: Final = "/sys/class/scsi_host"
FC_HOSTS: Final = "/sys/class/fc_host"
SECTOR: Final = 512  # bytes; the unit of sysfs' sizes, whatever the device has

ISCSI: Final = "iSCSI"
FC: Final = "FCP"  # what engines call everything that is not iSCSI
RUNNING: Final = "running"

_ALL: Final = "- - -"  # every channel, target and LUN
_PAGE_HEADER: Final = 4  # bytes before a VPD page's content
_SESSION = re.compile(r"/session(\d+)/target")
_ADDRESS = re.compile(r"(\d+):(\d+):(\d+):(\d+)")

log = logging.getLogger("host.scsi")


@dataclass(frozen=True)
class Limits:
    """What a block device of any sort can; bytes."""

    size: int
    logical: int
    physical: int
    discard_max: int


@dataclass(frozen=True)
class Disk:
    """A SCSI disk, which is one path to a LUN.

    `transport` is ISCSI, FC or "" (the host's own); `session` is the iSCSI session's number.
    """

    name: str  # sdc
    number: str  # major:minor
    limits: Limits
    vendor: str
    model: str
    revision: str
    serial: str
    state: str
    host: int
    lun: int
    transport: str
    session: int | None

    @property
    def is_running(self) -> bool:
        return self.state == RUNNING


class Scsi:
    """Reads, and for `scan`, `rescan` and `remove` writes, below the root of `files`."""

    def __init__(self, files: KernelFiles) -> None:
        self._files = files

    # -- what is there -----------------------------------------------------------------------

    def names(self) -> list[str]:
        """All SCSI disks, in the order in which the kernel names them."""
        found = [name for name in self._files.names(BLOCK) if name.startswith("sd")]
        return sorted(found, key=lambda name: (len(name), name))

    def disks(self) -> list[Disk]:
        """All SCSI disks but those that went away meanwhile."""
        found = (self.disk(name) for name in self.names())
        return [disk for disk in found if disk is not None]

    def san_disks(self) -> list[Disk]:
        """Those that are reached over a network of storage, and are more than a placeholder."""
        return [disk for disk in self.disks() if disk.transport and disk.limits.size]

    def disk(self, name: str) -> Disk | None:
        """None when there is no such SCSI disk."""
        directory = f"{BLOCK}/{name}/device"
        place = self._files.real(directory)
        address = _ADDRESS.fullmatch(os.path.basename(place))
        if address is None:
            return None
        host, _, _, lun = (int(part) for part in address.groups())
        session = _SESSION.search(place)
        texts = {key: self._files.text(f"{directory}/{key}") for key in ("vendor", "model", "rev")}
        return Disk(
            name=name,
            number=self._files.text(f"{BLOCK}/{name}/dev"),
            limits=self.limits(name),
            vendor=texts["vendor"],
            model=texts["model"],
            revision=texts["rev"],
            serial=self._serial(directory, texts["vendor"], texts["model"]),
            state=self._files.text(f"{directory}/state"),
            host=host,
            lun=lun,
            transport=self._transport(host, session is not None),
            session=int(session.group(1)) if session else None,
        )

    def limits(self, name: str) -> Limits:
        """Of a block device of any sort, by the kernel's name (sdc, dm-3, vda)."""
        queue = f"{BLOCK}/{name}/queue"
        return Limits(
            size=self._files.number(f"{BLOCK}/{name}/size") * SECTOR,
            logical=self._files.number(f"{queue}/logical_block_size", SECTOR),
            physical=self._files.number(f"{queue}/physical_block_size", SECTOR),
            discard_max=self._files.number(f"{queue}/discard_max_bytes"),
        )

    def holders(self, name: str) -> list[str]:
        """Block devices that are built on this one, by the kernel's names."""
        return self._files.names(f"{BLOCK}/{name}/holders")

    def fc_hosts(self) -> list[int]:
        """The Fibre Channel adapters' host numbers."""
        return [int(name.removeprefix("host")) for name in self._files.names(FC_HOSTS)]

    def _transport(self, host: int, in_session: bool) -> str:
        if in_session or self._files.exists(f"/sys/class/iscsi_host/host{host}"):
            return ISCSI
        return FC if self._files.exists(f"{FC_HOSTS}/host{host}") else ""

    def _serial(self, directory: str, vendor: str, model: str) -> str:
        """In the form of udev's scsi_id for page 0x80, by which engines know it.

        Vendor and model are padded to their 8 and 16 bytes, so that a vendor that fills them is
        not parted from the model.
        """
        try:
            with open(self._files.path(f"{directory}/vpd_pg80"), "rb") as file:
                page = file.read()
        except OSError:
            return ""
        serial = page[_PAGE_HEADER:].rstrip(b"\0").decode(errors="replace")
        return "_".join(f"S{vendor:8.8}{model:16.16}{serial}".split())

    # -- finding and losing disks ------------------------------------------------------------

    def scan(self, host: int) -> None:
        """Let the kernel look for new LUNs on a host.  May hang; raises OSError."""
        self._write(f"{SCSI_HOSTS}/host{host}/scan", _ALL)

    def rescan(self, name: str) -> None:
        """Let the kernel ask a disk for its size.  May hang; raises OSError."""
        self._write(f"{BLOCK}/{name}/device/rescan", "1")

    def remove(self, name: str) -> None:
        """Let the kernel forget a disk.  May hang while I/O to it does; raises OSError."""
        self._write(f"{BLOCK}/{name}/device/delete", "1")

    def _write(self, path: str, text: str) -> None:
        with open(self._files.path(path), "w", encoding="ascii") as file:
            file.write(text)
