# SPDX-License-Identifier: GPL-2.0-or-later
"""LUNs as engines see them: a block device, what it is, and the paths that lead to it.

All of it is from sysfs and device-mapper: no LUN is asked, so that a dead one is described too.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from vdsm_storage.domains.candidates import Candidate
from vdsm_storage.domains.storage_network import StorageNetwork
from vdsm_storage.host.iscsi_sessions import Session
from vdsm_storage.host.multipath import Path
from vdsm_storage.host.scsi import FC, ISCSI, Disk, Limits

MIXED: Final = "MIXED"
ACTIVE: Final = "active"
FAILED: Final = "failed"
# As the numbers of storage types: engines' 2 and 3.
TYPE_NUMBERS: Final[Mapping[str, int]] = {FC: 2, ISCSI: 3, MIXED: 3}


@dataclass(frozen=True)
class LunPath:
    """`disk` is None for what is no SCSI disk; `session` for what is not reached by iSCSI."""

    name: str
    active: bool
    size: int
    disk: Disk | None
    session: Session | None

    @property
    def type(self) -> str:
        """What is not iSCSI is called Fibre Channel, the host's own disks too."""
        return ISCSI if self.disk is not None and self.disk.transport == ISCSI else FC

    def status(self) -> dict[str, Any]:
        return {
            "physdev": self.name,
            "state": ACTIVE if self.active else FAILED,
            "capacity": str(self.size),
            "lun": str(self.disk.lun if self.disk else 0),
            "type": self.type,
        }

    def connection(self) -> dict[str, Any] | None:
        """The portal behind the path.

        With the password: engines keep it with the LUN, to connect other hosts.
        """
        if self.session is None:
            return None
        portal = self.session.portal
        found: dict[str, Any] = {
            "connection": portal.address,
            "port": str(portal.port),
            "iqn": portal.target,
            "portal": str(portal.group),
            "initiatorname": portal.interface,
        }
        if self.session.user:
            found["user"] = self.session.user
            found["password"] = self.session.password
        return found


@dataclass(frozen=True)
class Lun:
    candidate: Candidate
    limits: Limits
    paths: tuple[LunPath, ...]

    @property
    def guid(self) -> str:
        return self.candidate.guid

    @property
    def type(self) -> str:
        types = {path.type for path in self.paths}
        if len(types) > 1:
            return MIXED
        return types.pop() if types else FC

    @property
    def is_dead(self) -> bool:
        """Whether no path works, so that a question to it would hang."""
        return not any(path.active for path in self.paths)

    def is_of(self, kind: str | None) -> bool:
        return kind is None or self.type in (kind, MIXED)

    def describe(self) -> dict[str, Any]:
        """What all replies about a LUN have in common."""
        disk = next((path.disk for path in self.paths if path.disk is not None), None)
        connections = [path.connection() for path in self.paths]
        return {
            "GUID": self.guid,
            "devtype": self.type,
            "vendorID": disk.vendor if disk else "",
            "productID": disk.model if disk else "",
            "serial": disk.serial if disk else "",
            "fwrev": disk.revision if disk else "",
            "discard_max_bytes": self.limits.discard_max,
            "discard_zeroes_data": 0,  # kernels since 4.12 promise it for no device
            "pathlist": [one for one in connections if one is not None],
            "pathstatus": [path.status() for path in self.paths],
        }


class Luns:
    def __init__(self, network: StorageNetwork) -> None:
        self.candidates = network.candidates
        self._scsi = network.scsi
        self._multipath = network.multipath
        self._sessions = network.sessions

    def all(self, guids: Iterable[str] = ()) -> list[Lun]:
        """Every LUN, or those called `guids`."""
        wanted = set(guids)
        found = [one for one in self.candidates.all() if not wanted or one.guid in wanted]
        maps = {one.name: one for one in self._multipath.maps()} if found else {}
        sessions = self._sessions.all() if found else {}
        return [
            self._lun(one, maps[one.guid].paths if one.guid in maps else (), sessions)
            for one in found
            if one.guid in maps or not one.is_map  # not one that goes away at this moment
        ]

    def _lun(
        self, candidate: Candidate, paths: Iterable[Path], sessions: Mapping[int, Session]
    ) -> Lun:
        limits = self._scsi.limits(candidate.kernel)
        if not candidate.is_map:
            paths = [Path(candidate.kernel, "", True)]
        found = tuple(self._path(path, sessions) for path in paths)
        return Lun(candidate, limits, found)

    def _path(self, path: Path, sessions: Mapping[int, Session]) -> LunPath:
        disk = self._scsi.disk(path.device)
        session = disk.session if disk is not None else None
        return LunPath(
            name=path.device,
            active=path.active and (disk is None or disk.is_running),
            size=disk.limits.size if disk else self._scsi.limits(path.device).size,
            disk=disk,
            session=sessions.get(session) if session is not None else None,
        )
