# SPDX-License-Identifier: GPL-2.0-or-later
"""The VMs that this agent was asked to start: those that wait, and those that came to an end.

libvirt knows only what runs.  A VM that was asked for is listed from the answer to VM.create on,
and when it did not start or has ended it stays listed as Down, with the reason, until VM.destroy:
that is how engines learn of it.  One file a VM, in a directory that a boot empties.
"""

from __future__ import annotations

import enum
import json
import logging
import os
import threading
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Final

from vdsm_storage.base import files
from vdsm_storage.base.uuids import is_uuid
from vdsm_storage.errors import VMExists
from vdsm_storage.host.libvirt_model import DOWN

WAITING: Final = "WaitForLaunch"
COMING: Final = "Migration Destination"  # from another host
UP: Final = "Up"
ENDING: Final = "Powering down"

LATE: Final = 1000  # starts that were given up are remembered
LATE_NAME: Final = "given-up.json"

log = logging.getLogger("vms.launches")


class Exit(enum.IntEnum):
    """Why a VM is down, by the numbers of engines' VmExitReason."""

    SUCCESS = 0
    GENERIC_ERROR = 1
    LOST_QEMU = 2
    START_FAILED = 3
    MIGRATED = 4
    SAVED = 5
    ADMIN_SHUTDOWN = 6
    USER_SHUTDOWN = 7
    MISSING = 9
    DESTROYED_ON_STARTUP = 10


# Those that are no failures: exitCode 0 (NORMAL), otherwise 1 (ERROR).
_NORMAL: Final = (
    Exit.SUCCESS, Exit.MIGRATED, Exit.SAVED, Exit.ADMIN_SHUTDOWN, Exit.USER_SHUTDOWN,
    Exit.DESTROYED_ON_STARTUP,
)  # fmt: skip
# virDomainEventStoppedDetailType
_STOPPED: Final[Mapping[int, tuple[Exit, str]]] = {
    0: (Exit.USER_SHUTDOWN, "The guest shut down"),
    1: (Exit.ADMIN_SHUTDOWN, "The VM was ended from outside"),
    3: (Exit.MIGRATED, "The VM went to another host"),
    4: (Exit.SAVED, "The VM's memory was saved"),
}


def why_stopped(facts: Mapping[str, Any]) -> tuple[Exit, str]:
    """From the facts of libvirt's event."""
    lost = (Exit.LOST_QEMU, "QEMU or the guest crashed")
    return lost if facts.get("crashed") else _STOPPED.get(int(facts.get("detail", -1)), lost)


@dataclass
class Launch:
    """`status` is WAITING, COMING, UP (whatever libvirt says of it now) or DOWN."""

    vm: str
    name: str
    status: str
    exit: dict[str, Any] = field(default_factory=dict)

    def row(self) -> dict[str, Any]:
        """As lists and statistics show it."""
        return {"vmId": self.vm, "vmName": self.name, "status": self.status, **self.exit}


class Launches:
    """`directory` is made if it is missing; `tell(vm)` is called when one came up or went down."""

    def __init__(self, directory: str, tell: Callable[[str], None]) -> None:
        self._directory = directory
        self._tell = tell
        self._lock = threading.Lock()
        os.makedirs(directory, mode=0o755, exist_ok=True)
        self._launches = self._load()
        self._late = self._load_late()

    # -- looking -----------------------------------------------------------------------------

    def waiting(self, vm: str) -> bool:
        """Whether it is being started."""
        found = self._launches.get(vm)
        return found is not None and found.status == WAITING

    def coming(self, vm: str) -> bool:
        """Whether it is on its way from another host."""
        found = self._launches.get(vm)
        return found is not None and found.status == COMING

    def not_yet(self, vm: str) -> str:
        """As what it is listed while it is being started or is on its way, whatever libvirt has of
        it by then; "" for all others."""
        found = self._launches.get(vm)
        return found.status if found is not None and found.status in (WAITING, COMING) else ""

    def row(self, vm: str) -> dict[str, Any] | None:
        """Of one that is being started, or is down."""
        found = self._launches.get(vm)
        return None if found is None or found.status == UP else found.row()

    def rows(self, up: Collection[str], running: Collection[str]) -> list[dict[str, Any]]:
        """Of those that libvirt does not run: `running` are these, as it said after `up` were up.

        One that was up and does not run has just ended, and why is about to be told.
        """
        with self._lock:
            launches = [each for each in self._launches.values() if each.vm not in running]
        rows = [each.row() for each in launches if each.status != UP]
        ending = [each for each in launches if each.status == UP and each.vm in up]
        return rows + [{**each.row(), "status": ENDING} for each in ending]

    def of_status(self, status: str) -> list[str]:
        with self._lock:
            return [each.vm for each in self._launches.values() if each.status == status]

    # -- what happens ------------------------------------------------------------------------

    def begin(self, vm: str, name: str, status: str = WAITING) -> None:
        """It is asked for.  Raises VMExists (4) unless it is unknown or down, OSError."""
        with self._lock:
            there = self._launches.get(vm)
            if there is not None and there.status != DOWN:
                raise VMExists(vm=vm)
            self._keep(Launch(vm, name, status))

    def adopt(self, vm: str, name: str) -> bool:
        """One that others started shall be listed at its end; False if it would be anyway."""
        with self._lock:
            known = vm in self._launches
            if not known:
                self._keep(Launch(vm, name, UP))
        return not known

    def up(self, vm: str) -> None:
        """It runs."""
        with self._lock:
            there = self._launches.get(vm)
            if there is None:
                return
            self._keep(Launch(vm, there.name, UP))
        self._tell(vm)

    def down(self, vm: str, reason: Exit, message: str) -> None:
        """It did not start, or has ended; nothing happens if that is known."""
        with self._lock:
            there = self._launches.get(vm)
            if there is None or there.status == DOWN:
                return
            code = 0 if reason in _NORMAL else 1
            told = {"exitCode": code, "exitReason": int(reason), "exitMessage": message}
            self._keep(Launch(vm, there.name, DOWN, told))
        log.info("VM %s is down: %s", vm, message)
        self._tell(vm)

    def drop(self, vm: str) -> bool:
        """It is unknown from now on; False if it was before."""
        with self._lock:
            known = self._launches.pop(vm, None) is not None
        if known:
            files.unlink_if_there(self._path(vm))
        return known

    # -- starts that were given up -----------------------------------------------------------

    def give_up(self, vm: str, launch: str) -> None:
        """This start of it was let go; libvirt may have been told, and not have come to it yet."""
        with self._lock:
            late = {**self._late, vm: launch}
            self._late = dict(list(late.items())[-LATE:])
            self._keep_late()

    def given_up(self) -> Mapping[str, str]:
        """The last such start of each VM."""
        return self._late

    def forgive(self, vm: str) -> None:
        """It came, and was undone."""
        with self._lock:
            self._late = {other: launch for other, launch in self._late.items() if other != vm}
            self._keep_late()

    def _keep_late(self) -> None:
        path = os.path.join(self._directory, LATE_NAME)
        files.write_volatile(path, json.dumps(self._late).encode(), 0o600)

    def _load_late(self) -> dict[str, str]:
        try:
            found = json.loads(files.read_small(os.path.join(self._directory, LATE_NAME)))
            return {str(vm): str(launch) for vm, launch in found.items()}
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, AttributeError) as error:
            log.error("%s cannot be read: %s", LATE_NAME, error)
            return {}

    # -- the files ---------------------------------------------------------------------------

    def _keep(self, launch: Launch) -> None:
        files.write_volatile(self._path(launch.vm), json.dumps(asdict(launch)).encode(), 0o600)
        self._launches[launch.vm] = launch

    def _path(self, vm: str) -> str:
        if not is_uuid(vm):
            raise ValueError(f"{vm!r} is no UUID and cannot name a file")
        return os.path.join(self._directory, vm + ".json")

    def _load(self) -> dict[str, Launch]:
        found = {}
        for name in os.listdir(self._directory):
            if not name.endswith(".json") or not is_uuid(name[:-5]):
                continue
            try:
                launch = Launch(**json.loads(files.read_small(os.path.join(self._directory, name))))
            except (OSError, ValueError, TypeError) as error:
                log.error("%s cannot be read (%s): that VM is not listed", name, error)
            else:
                found[launch.vm] = launch
        return found
