# SPDX-License-Identifier: GPL-2.0-or-later
"""Connections to storage networks: iSCSI portals are logged in to, Fibre Channel is looked at.

When a connect returns, the devices of what it connected are there.  A session outlives the agent,
for guests use it: a stop of the agent leaves it, and who connects again finds it.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, Final

from vdsm_storage.base.clock import Clock, Deadline
from vdsm_storage.base.lanes import Lanes
from vdsm_storage.base.locks import Lock, Locks
from vdsm_storage.base.uuids import BLANK
from vdsm_storage.domains import remembered
from vdsm_storage.domains.portals import Wanted, parse, parse_address, parse_chap
from vdsm_storage.domains.remembered import Remembered
from vdsm_storage.domains.rescan import Rescan
from vdsm_storage.domains.storage_network import StorageNetwork
from vdsm_storage.errors import (
    AccessTimeout,
    AgentError,
    ConnectionTypeUnsupported,
    DisconnectionFailed,
    InvalidParams,
    agent_error,
)
from vdsm_storage.host.iscsi_sessions import Portal, Session, portal_text
from vdsm_storage.host.multipath import Map

ISCSI: Final = "ISCSI"
FCP: Final = "FCP"
TYPES: Final = (ISCSI, FCP)

LOGINS: Final = 90.0  # seconds for all logins of a call; its answer is due in 170
IN_USE_WAIT: Final = 20.0  # seconds that a domain may take to let go of its devices
RESTORE_WAIT: Final = 60.0
ASK_AGAIN: Final = 2.0  # seconds between two requests to let go of devices
GONE_WAIT: Final = 10.0  # seconds for the maps of a session that ended to go
_LEAVING: Final = Lock("04_san", "logout")  # one call decides at a time which path is the last
_POLL: Final = 0.2

log = logging.getLogger("san")


@dataclass(frozen=True)
class SanBase:
    """What lies below.  `logins` is how many logins run at once."""

    network: StorageNetwork
    rescan: Rescan
    lanes: Lanes
    locks: Locks
    memory: Remembered
    clock: Clock
    logins: int = 10


@dataclass(frozen=True)
class _Leaver:
    """A session that shall end, and the maps that lose paths by that."""

    session: Session
    maps: tuple[Map, ...]


class San:
    """All iSCSI sessions and Fibre Channel hosts of this host; `watch` wires it."""

    def __init__(self, base: SanBase) -> None:
        self._iscsi = base.network.iscsi
        self._multipath = base.network.multipath
        self._scsi = base.network.scsi
        self._rescan = base.rescan
        self._lanes = base.lanes
        self._locks = base.locks
        self._memory = base.memory
        self._clock = base.clock
        self._turn = threading.BoundedSemaphore(base.logins)
        self._in_use: Callable[[], Mapping[str, Sequence[str]]] = dict
        self._let_go: Callable[[Sequence[str]], None] = lambda devices: None
        self._on_change: Callable[[], None] = lambda: None

    def watch(
        self,
        in_use: Callable[[], Mapping[str, Sequence[str]]],
        let_go: Callable[[Sequence[str]], None],
        on_change: Callable[[], None],
    ) -> None:
        """Wiring.  `in_use()` gives the devices (paths) of each domain in use, by domain;
        `let_go(devices)` closes what has devices open and is not in use; `on_change()` is called
        after devices came."""
        self._in_use = in_use
        self._let_go = let_go
        self._on_change = on_change

    # -- the verbs ---------------------------------------------------------------------------

    def discover(self, address: str, port: object, user: str, password: object) -> list[str]:
        """What a portal offers.  Raises 453, 475, 476."""
        host, number = parse_address(address, port)
        portal = portal_text(host, number)
        chap = parse_chap(portal, user, password)
        with self._locks.held([Lock("05_discovery", portal)], timeout=LOGINS):
            return self._iscsi.discover(host, number, chap)

    def connect(self, kind: str, params: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """Connect each; the answer has one {id, status} for each, status 0 or an error's code.

        The devices are there when it returns.
        """
        _check(kind, params, "connectStorageServer")
        found: list[tuple[str, AgentError | None]] = []
        if kind == FCP:
            found = [(_id(one), None) for one in params]
            look = self._scsi.fc_hosts()
        else:
            found = self._log_in_all(params)
            sessions = self._iscsi.sessions.all().values()
            look = [session.host for session in sessions if session.is_logged_in]
        if any(error is None for _, error in found):
            problem = self._find_devices(look)
            found = [(name, error or problem) for name, error in found]
        return [{"id": name, "status": _status(error)} for name, error in found]

    def disconnect(self, kind: str, params: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """End the sessions of each; what is not connected is fine.

        A session is kept, with status 452, when a device that is in use would lose its last path.
        """
        _check(kind, params, "disconnectStorageServer")
        if kind == FCP:
            return [{"id": _id(one), "status": 0} for one in params]
        wanted = [(_id(one), _parsed(one)) for one in params]
        portals = [one.portal for _, one in wanted if isinstance(one, Wanted)]
        locks = [_LEAVING, *(_lock(portal) for portal in portals)]
        with self._locks.held(locks, timeout=LOGINS):
            errors = self._log_out_all(portals)
        return [
            {
                "id": name,
                "status": _status(
                    errors.get(one.portal.key) if isinstance(one, Wanted) else one
                ),
            }
            for name, one in wanted
        ]

    # -- logging in --------------------------------------------------------------------------

    def _log_in_all(
        self, params: Sequence[Mapping[str, Any]]
    ) -> list[tuple[str, AgentError | None]]:
        """Side by side, each in a lane of its own: a dead portal delays no other."""
        running: dict[str, Future[Any]] = {}
        rows: list[tuple[str, str, AgentError | None]] = []
        for one in params:
            wanted = _parsed(one)
            if isinstance(wanted, AgentError):
                rows.append((_id(one), "", wanted))
                continue
            key = wanted.portal.key
            rows.append((_id(one), key, None))
            if key not in running:
                running[key] = self._submit(wanted.portal, partial(self._log_in, wanted))
        deadline = Deadline(self._clock, LOGINS)
        errors = {key: _error(future, deadline) for key, future in running.items()}
        return [(name, errors[key] if key else error) for name, key, error in rows]

    def _log_in(self, wanted: Wanted) -> None:
        portal = wanted.portal
        with self._locks.held([_lock(portal)], timeout=LOGINS), self._turn:
            self._iscsi.login(portal, wanted.chap)
        self._memory.put(remembered.SESSIONS, portal.key, asdict(portal))

    def _submit(self, portal: Portal, call: Callable[[], object]) -> Future[Any]:
        return self._lanes.submit(f"iscsi {portal.key}", call, LOGINS)

    def _find_devices(self, hosts: Sequence[int]) -> AgentError | None:
        """Look for LUNs and wait for their devices; what went wrong, if it did."""
        try:
            self._rescan.hosts(hosts)
        except AgentError as error:
            return error
        self._on_change()
        return None

    # -- logging out -------------------------------------------------------------------------

    def _log_out_all(self, portals: Sequence[Portal]) -> dict[str, AgentError]:
        """The errors, by key of the portal."""
        errors: dict[str, AgentError] = {}
        leaving: dict[str, _Leaver] = {}
        deadline = Deadline(self._clock, IN_USE_WAIT)
        for portal in portals:
            session = self._iscsi.sessions.find(portal)
            if session is None:
                self._forget(portal)
                continue
            try:
                leaver = self._leaver(session, [one.session for one in leaving.values()], deadline)
                leaving[portal.key] = leaver
            except DisconnectionFailed as error:
                errors[portal.key] = error
        running = {
            key: self._submit(one.session.portal, partial(self._log_out, one))
            for key, one in leaving.items()
        }
        end = Deadline(self._clock, LOGINS)
        for key, future in running.items():
            if (problem := _error(future, end)) is not None:
                errors[key] = problem
        self._flush([one.name for leaver in leaving.values() for one in leaver.maps])
        return errors

    def _log_out(self, leaver: _Leaver) -> None:
        self._iscsi.logout(leaver.session)
        self._forget(leaver.session.portal)

    def _forget(self, portal: Portal) -> None:
        self._iscsi.forget(portal)
        self._memory.drop(remembered.SESSIONS, portal.key)

    def _leaver(
        self, session: Session, leaving: Sequence[Session], deadline: Deadline
    ) -> _Leaver:
        """Waits for who is just letting go.  Raises DisconnectionFailed (452)."""
        going = {session.id, *(one.id for one in leaving)}
        nothing, asked = threading.Event(), Deadline(self._clock, 0.0)
        while True:
            disks = {disk.name for disk in self._scsi.disks() if disk.session in going}
            maps = [one for one in self._multipath.maps() if _uses(one, disks)]
            last = [one for one in maps if all(path.device in disks for path in one.working)]
            users = self._users(last)
            if users and asked.passed():
                # Whoever has them open without using them.
                asked = Deadline(self._clock, ASK_AGAIN)
                self._let_go([one.path for one in last])
                users = self._users(last)
            if not users:
                return _Leaver(session, tuple(maps))
            if deadline.passed():
                raise DisconnectionFailed(
                    connection=session.portal.text,
                    reason=f"it is the last path to {'; '.join(users)}",
                )
            self._clock.wait(nothing, _POLL)

    def _users(self, maps: Sequence[Map]) -> list[str]:
        """Who uses the maps, in words."""
        domains: dict[str, list[str]] = {}
        for domain, devices in self._in_use().items():
            for device in devices:
                domains.setdefault(device, []).append(f"domain {domain}")
        found = []
        for one in maps:
            users = domains.get(one.path, [])
            if not users and self._multipath.is_open(one.name):
                above = self._scsi.holders(one.kernel)
                users = above or ["a program of this host"]
            if users:
                found.append(f"{one.name}, which {', '.join(users)} uses")
        return found

    def _flush(self, names: Sequence[str]) -> None:
        """multipathd removes a map with its last path; what it leaves is removed here."""
        deadline, nothing = Deadline(self._clock, GONE_WAIT), threading.Event()
        while dead := self._pathless(names):
            if deadline.passed():
                for name in dead:
                    self._multipath.flush(name)
                return
            self._clock.wait(nothing, _POLL)

    def _pathless(self, names: Sequence[str]) -> list[str]:
        return [one.name for one in self._multipath.maps() if one.name in names and not one.paths]

    # -- start -------------------------------------------------------------------------------

    def restore(self) -> bool:
        """After a crash in this boot: sessions that are gone are logged in again.

        open-iscsi's record has the password.  Failures are logged; False if there are any.
        """
        records = self._memory.all(remembered.SESSIONS)
        portals = [Portal(**record) for record in records.values()]
        running = [self._submit(one, partial(self._log_in_again, one)) for one in portals]
        deadline = Deadline(self._clock, RESTORE_WAIT)
        errors = [_error(future, deadline) for future in running]
        for portal, error in zip(portals, errors, strict=True):
            log.info("Session %s was restored, status %s", portal.key, _status(error))
        if portals:
            problem = self._find_devices([one.host for one in self._iscsi.sessions.all().values()])
            errors.append(problem)
        return not any(errors)

    def _log_in_again(self, portal: Portal) -> None:
        """Unless the engine disconnected it meanwhile."""
        with self._locks.held([_lock(portal)], timeout=RESTORE_WAIT), self._turn:
            if portal.key in self._memory.all(remembered.SESSIONS):
                self._iscsi.login_again(portal)


def _check(kind: str, params: Sequence[Mapping[str, Any]], verb: str) -> None:
    if kind not in TYPES:
        raise ConnectionTypeUnsupported(type=kind)
    if not params:
        raise InvalidParams(
            method=f"StoragePool.{verb}",
            parameter="connectionParams",
            reason="the list is empty",
        )


def _parsed(params: Mapping[str, Any]) -> Wanted | AgentError:
    try:
        return parse(params)
    except AgentError as error:
        return error


def _id(params: Mapping[str, Any]) -> str:
    return str(params.get("id") or BLANK)


def _lock(portal: Portal) -> Lock:
    return Lock("05_san", portal.key)


def _uses(one: Map, disks: set[str]) -> bool:
    return any(path.device in disks for path in one.paths)


def _error(future: Future[Any], deadline: Deadline) -> AgentError | None:
    try:
        future.result(deadline.left())
    except TimeoutError:
        return AccessTimeout(what="The iSCSI portal", seconds=LOGINS)
    except AgentError as error:
        return error
    except OSError as error:
        return agent_error(error)
    return None


def _status(error: AgentError | None) -> int:
    """0, or the code of the error, which is logged."""
    if error is None:
        return 0
    log.warning("Storage connection: %s", error)
    return error.code
