# SPDX-License-Identifier: GPL-2.0-or-later
"""Looking for new LUNs and new sizes, and waiting until their devices are there.

The kernel asks the storage while it looks, which may hang: every SCSI host is looked at in a lane
of its own, for a bounded time, and not again while it owes an answer.  No domain waits for it.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Collection, Iterable, Sequence
from concurrent.futures import Future, wait
from functools import partial
from typing import Any, Final

from vdsm_storage.base.clock import Clock, Deadline
from vdsm_storage.base.lanes import Lanes
from vdsm_storage.domains.storage_network import StorageNetwork
from vdsm_storage.errors import AgentError
from vdsm_storage.host import udev
from vdsm_storage.host.scsi import Disk

SCAN: Final = 20.0  # seconds that a SCSI host may take
SETTLE: Final = 5.0  # seconds for udev
APPEAR: Final = 45.0  # seconds for all devices to be there; 2 or 3 are usual
QUIET: Final = 2.0  # seconds of nothing to do after which no more devices are expected
_POLL: Final = 0.2

log = logging.getLogger("domains.rescan")


class Rescan:
    def __init__(self, network: StorageNetwork, lanes: Lanes, clock: Clock) -> None:
        self._scsi = network.scsi
        self._multipath = network.multipath
        self._sessions = network.sessions
        self._candidates = network.candidates
        self._lanes = lanes
        self._clock = clock
        self._mutex = threading.Lock()
        self._left_alone: frozenset[str] = frozenset()  # disks that multipath does not want
        self._owing: dict[str, tuple[Future[Any], Deadline]] = {}

    def everything(self, guids: Collection[str] = ()) -> None:
        """New LUNs on all hosts; new sizes of the devices called `guids`, or of all."""
        self.hosts()
        self.sizes(guids)

    def hosts(self, hosts: Iterable[int] | None = None) -> None:
        """Look for new LUNs on SCSI hosts (all of the network's), and wait for their devices."""
        chosen = self._network_hosts() if hosts is None else set(hosts)
        self._ask({f"scsi host{n}": partial(self._scsi.scan, n) for n in sorted(chosen)})
        self.wait_for_devices()

    def sizes(self, guids: Collection[str] = ()) -> None:
        """Ask for the sizes of devices (all that are there) and let their maps grow."""
        disks = self._disks_of(guids)
        hosts: dict[int, list[str]] = {}
        for disk in disks:
            hosts.setdefault(disk.host, []).append(disk.name)
        work = {n: partial(self._rescan, names) for n, names in hosts.items()}
        self._ask({f"scsi host{n} sizes": call for n, call in work.items()})
        wanted = frozenset(guids)
        if self._multipath.resize_grown(lambda name: not wanted or name in wanted):
            udev.settle(SETTLE)

    def wait_for_devices(self) -> None:
        """Until every disk of the storage network has its map, for a bounded time.

        Raises MultipathSetupError (467) when there is nobody who makes maps.
        """
        deadline = Deadline(self._clock, APPEAR)
        settled = udev.settle(SETTLE)
        quiet: Deadline | None = None
        while missing := self._without_map():
            if not (settled and self._multipath.is_idle()):
                quiet = None
            elif quiet is None:
                quiet = Deadline(self._clock, QUIET)
            is_over = quiet is not None and quiet.passed()
            if is_over or deadline.passed():
                names = ", ".join(disk.name for disk in missing)
                log.warning("Multipath makes no device of %s: is that blacklisted?", names)
                if is_over:
                    self._left_alone = frozenset(map(_identity, missing)) | self._left_alone
                return
            self._clock.wait(threading.Event(), _POLL)
            settled = udev.settle(1.0)
        udev.settle(SETTLE)

    # -- inside ------------------------------------------------------------------------------

    def _network_hosts(self) -> set[int]:
        sessions = self._sessions.all().values()
        found = {session.host for session in sessions if session.is_logged_in}
        return found | set(self._scsi.fc_hosts())

    def _without_map(self) -> list[Disk]:
        plain = {one.kernel for one in self._candidates.all() if not one.is_map}
        return [
            disk
            for disk in self._scsi.san_disks()
            if disk.is_running
            and disk.name not in plain
            and _identity(disk) not in self._left_alone
            and self._multipath.map_of(disk.name) is None
        ]

    def _disks_of(self, guids: Collection[str]) -> list[Disk]:
        """The paths that work, of some devices or of all."""
        disks = [disk for disk in self._scsi.san_disks() if disk.is_running]
        if not guids:
            return disks
        maps = [one for one in self._multipath.maps() if one.name in guids]
        names = {path.device for one in maps for path in one.paths}
        names |= {one.kernel for one in self._candidates.all() if one.guid in guids}
        return [disk for disk in disks if disk.name in names]

    def _rescan(self, names: Sequence[str]) -> None:
        for name in names:
            try:
                self._scsi.rescan(name)
            except OSError as error:  # it went away, or its path failed
                log.warning("The size of %s cannot be asked for: %s", name, error)

    def _ask(self, calls: dict[str, Callable[[], None]]) -> None:
        """Make the calls side by side; those that do not end in time go on by themselves."""
        running = {key: self._start(key, call) for key, call in calls.items()}
        wait([future for future in running.values() if future is not None], SCAN)
        for key, future in running.items():
            if future is None or not future.done():
                log.warning("%s does not answer; it is not waited for", key)
            elif (error := future.exception()) is not None:
                log.warning("%s: %s", key, error)

    def _start(self, key: str, call: Callable[[], None]) -> Future[Any] | None:
        """None while an earlier call hangs."""
        with self._mutex:
            before = self._owing.get(key)
            owes = before is not None and not before[0].done()
            if before is not None and owes and before[1].passed():
                return None
            try:
                future = self._lanes.submit(key, call, SCAN)
            except AgentError as error:
                log.warning("%s: %s", key, error)
                return None
            if not owes:
                self._owing[key] = (future, Deadline(self._clock, SCAN))
            return future


def _identity(disk: Disk) -> str:
    return f"{disk.name} {disk.host} {disk.lun} {disk.serial}"
