# SPDX-License-Identifier: GPL-2.0-or-later
"""Connections to storage: a local directory is linked, a POSIX file system is mounted.

Both appear below <data_center>/mnt under a name made from the connection (`/a_b/c` is `_a__b_c`).
Connecting twice is one connection.  What still is in use is not disconnected.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import asdict, dataclass
from typing import Any

from vdsm_storage.base.clock import Clock, Deadline
from vdsm_storage.base.lanes import Lanes
from vdsm_storage.base.locks import Lock, Locks
from vdsm_storage.base.owner import Owner
from vdsm_storage.base.uuids import BLANK
from vdsm_storage.domains import remembered
from vdsm_storage.domains.remembered import Remembered
from vdsm_storage.errors import (
    AccessTimeout,
    AgentError,
    CommandTimeout,
    ConnectionInvalid,
    ConnectionPermission,
    ConnectionTypeUnsupported,
    DisconnectionFailed,
    InvalidParams,
    MountFailed,
)
from vdsm_storage.host.mount import MountPoint, Mounts, check_options, check_spec

log = logging.getLogger("connection")

IN_USE_WAIT = 20.0  # seconds that a domain may take to let go of its connection
RESTORE_WAIT = 20.0  # seconds; what takes longer goes on, and is asked for again
NAME_LIMIT = 255  # bytes of a file name


@dataclass(frozen=True)
class Connection:
    """One storage connection, as it was asked for.  Never holds a password."""

    type: str
    spec: str
    vfs_type: str = ""
    options: str = ""

    @property
    def is_local(self) -> bool:
        return self.type == "LOCALFS"

    @property
    def directory(self) -> str:
        """Its name below <data_center>/mnt: `/` as `_`, `_` as `__`."""
        return self.spec.replace("_", "__").replace("/", "_")

    @property
    def remote_path(self) -> str:
        """What the metadata of its domain calls it."""
        return self.spec


def parse(kind: str, params: Mapping[str, Any]) -> Connection:
    """One of the engine's flat maps, checked.  Raises 453, 468."""
    spec = str(params.get("connection") or "")
    if kind == "LOCALFS":
        check_spec(spec, "none")
        if not spec.startswith("/"):
            raise ConnectionInvalid(connection=spec, reason="it must be an absolute path")
        found = Connection(kind, normalise(spec))
    elif kind == "POSIXFS":
        vfs_type = str(params.get("vfs_type") or "")
        options = ",".join(check_options(str(params.get("mnt_options") or "")))
        check_spec(spec, vfs_type)
        found = Connection(kind, normalise(spec), vfs_type, options)
    else:
        raise ConnectionTypeUnsupported(type=kind)
    if len(found.directory.encode()) > NAME_LIMIT or found.spec in ("/", ""):
        raise ConnectionInvalid(connection=spec, reason="no directory name can be made from it")
    return found


def normalise(spec: str) -> str:
    """Without a slash at the end, without doubled ones in the path."""
    host, colon, path = ("", "", spec) if spec.startswith("/") else spec.rpartition(":")
    if not path.startswith("/"):
        return spec
    return host + colon + os.path.normpath("/" + path.lstrip("/"))


class Connections:
    """All connections of this host.  `directory` is <data_center>/mnt.

    Needs: Mounts, Owner (who must be able to use what is connected), Lanes, Locks, Remembered.
    `on_change()` is called after a connection came or went (wired later: `watch`).
    """

    def __init__(
        self,
        directory: str,
        mounts: Mounts,
        owner: Owner,
        lanes: Lanes,
        locks: Locks,
        memory: Remembered,
        clock: Clock,
    ) -> None:  # fmt: skip
        self._directory = directory
        self._mounts = mounts
        self._owner = owner
        self._lanes = lanes
        self._locks = locks
        self._memory = memory
        self._clock = clock
        self._mutex = threading.Lock()
        self._connected: dict[str, Connection] = {}
        self._in_use: Callable[[str], Sequence[str]] = lambda mount: ()
        self._on_change: Callable[[str, bool], None] = lambda mount, connected: None

    def watch(
        self, in_use: Callable[[str], Sequence[str]], on_change: Callable[[str, bool], None]
    ) -> None:
        """Wiring.  `in_use(mount)` names the domains in use there; on_change(mount, connected?)."""
        self._in_use = in_use
        self._on_change = on_change

    # -- the verbs ---------------------------------------------------------------------------

    def connect(self, kind: str, params: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """Connect each; the answer has one {id, status} for each, status 0 or an error's code."""
        return self._each(kind, params, self._connect)

    def disconnect(self, kind: str, params: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """Disconnect each; what is not connected is fine."""
        return self._each(kind, params, self._disconnect)

    def _each(
        self,
        kind: str,
        params: Sequence[Mapping[str, Any]],
        work: Callable[[Connection], None],
    ) -> list[dict[str, Any]]:
        if not params:
            raise InvalidParams(
                method="StoragePool.connectStorageServer",
                parameter="connectionParams",
                reason="the list is empty",
            )
        # Each in the lane of its mount: one dead server does not make the others wait.
        running: list[tuple[str, Future[Any] | AgentError]] = []
        for one in params:
            try:
                connection = parse(kind, one)
                future = self._submit(connection, work)
            except AgentError as error:
                running.append((str(one.get("id") or BLANK), error))
            else:
                running.append((str(one.get("id") or BLANK), future))
        deadline = Deadline(self._clock, 165.0)
        return [{"id": name, "status": _status(it, deadline)} for name, it in running]

    def _submit(self, connection: Connection, work: Callable[[Connection], None]) -> Future[Any]:
        return self._lanes.submit(
            f"mount {connection.directory}", lambda: work(connection), timeout=160.0
        )

    # -- looking -----------------------------------------------------------------------------

    def mounts(self) -> dict[str, Connection]:
        """The connected directories and what is there."""
        with self._mutex:
            return {self._path(c): c for c in self._connected.values()}

    def is_connected(self, path: str) -> bool:
        return path in self.mounts()

    def find(self, remote_path: str, kind: str) -> str | None:
        """The directory of the connection that StorageDomain.create names, or None."""
        wanted = {remote_path, normalise(remote_path)}
        for path, connection in self.mounts().items():
            if connection.type == kind and connection.spec in wanted:
                return path
        return None

    def _path(self, connection: Connection) -> str:
        return os.path.join(self._directory, connection.directory)

    # -- one connection ----------------------------------------------------------------------

    def _connect(self, connection: Connection) -> None:
        path = self._path(connection)
        with self._locks.held([Lock("05_mount", path)], timeout=120.0):
            with self._mutex:
                other = self._connected.get(path)
            if other is not None and other.spec != connection.spec:
                raise MountFailed(
                    spec=connection.spec, target=path, reason=f"{other.spec} is connected there"
                )
            os.makedirs(self._directory, mode=0o755, exist_ok=True)
            if connection.is_local:
                self._link(connection, path)
            else:
                self._mount(connection, path)
            with self._mutex:
                self._connected[path] = connection
        self._memory.put(remembered.CONNECTIONS, path, asdict(connection))
        self._on_change(path, True)

    def _link(self, connection: Connection, path: str) -> None:
        if not os.path.isdir(connection.spec):
            raise ConnectionInvalid(
                connection=connection.spec, reason="there is no such directory; make it"
            )
        self._check_usable(connection.spec, connection)
        if os.path.islink(path):
            if os.readlink(path) == connection.spec:
                return
            os.unlink(path)
        os.symlink(connection.spec, path)

    def _mount(self, connection: Connection, path: str) -> None:
        point = self._mounts.find(path)  # first: to look at a mount whose server is dead hangs
        if point is not None:
            if not self._is(point, connection, path):
                raise MountFailed(
                    spec=connection.spec,
                    target=path,
                    reason=f"{point.source} ({point.fstype}) is mounted there; unmount it",
                )
            return
        if os.path.islink(path):
            os.unlink(path)
        os.makedirs(path, mode=0o755, exist_ok=True)
        try:
            self._mounts.mount(
                connection.spec, path, connection.vfs_type, connection.options.split(",")
            )
            self._check_usable(path, connection)
        except AgentError:
            self._mounts.unmount(path)
            os.rmdir(path)
            raise

    def _check_usable(self, path: str, connection: Connection) -> None:
        reason = self._mounts.unusable_by(path, self._owner)
        if reason is not None:
            user = f"user {self._owner.uid}, group {self._owner.gid}"
            raise ConnectionPermission(path=connection.spec, user=user, reason=reason)

    def _is(self, point: MountPoint, connection: Connection, path: str) -> bool:
        """Whether what is mounted is this connection, mounted by an earlier life of the agent."""
        if self._memory.all(remembered.CONNECTIONS).get(path) == asdict(connection):
            return True
        if point.source == connection.spec:
            return True
        if self._mounts.backing_file(point.source) == connection.spec:
            return True
        return "bind" in connection.options.split(",") and _same(connection.spec, path)

    def _disconnect(self, connection: Connection) -> None:
        path = self._path(connection)
        with self._locks.held([Lock("05_mount", path)], timeout=120.0):
            with self._mutex:
                known = self._connected.get(path)
            if known is None:
                self._memory.drop(remembered.CONNECTIONS, path)  # it was not restored yet
            if known is None or known.spec != connection.spec:
                return
            self._release(path, known, IN_USE_WAIT)

    def _release(
        self, path: str, connection: Connection, wait: float, final: bool = False
    ) -> None:
        deadline = Deadline(self._clock, wait)
        # Nobody who uses storage that hangs comes to an end; at the agent's end it is left behind.
        hangs = final and bool(self._in_use(path)) and not self._mounts.answers(path)
        while not hangs and (used := self._in_use(path)):
            if deadline.passed():
                raise DisconnectionFailed(
                    connection=connection.spec, reason=f"domain {', '.join(used)} is in use"
                )
            self._clock.wait(threading.Event(), 0.1)
        self._on_change(path, False)
        if connection.is_local:
            if os.path.islink(path):
                os.unlink(path)
        elif hangs:
            self._mounts.unmount(path, lazy=True)
            os.rmdir(path)
        else:
            self._unmount(path, deadline, final)
        with self._mutex:
            self._connected.pop(path, None)
        self._memory.drop(remembered.CONNECTIONS, path)

    def _unmount(self, path: str, deadline: Deadline, final: bool) -> None:
        """Unmount, waiting a moment for whoever is just closing a file.

        When the agent ends (`final`), a server that does not answer is not waited for.
        """
        while True:
            try:
                self._mounts.unmount(path)
                break
            except DisconnectionFailed as error:
                if final and isinstance(error.__cause__, CommandTimeout):
                    self._mounts.unmount(path, lazy=True)
                    break
                if deadline.passed():
                    raise
                self._clock.wait(threading.Event(), 0.2)
        os.rmdir(path)

    # -- start and stop ----------------------------------------------------------------------

    def restore(self) -> bool:
        """After a crash in this boot: connect what was connected.

        Failures are logged; False if there are any: then it is worth another call.
        """
        known = self.mounts()
        records = self._memory.all(remembered.CONNECTIONS)
        missing = [_record(found) for path, found in records.items() if path not in known]
        futures = [self._submit(connection, self._reconnect) for connection in missing]
        good, deadline = True, Deadline(self._clock, RESTORE_WAIT)
        for connection, future in zip(missing, futures, strict=True):
            status = _status(future, deadline)
            log.info("Connection %s was restored, status %s", connection.spec, status)
            good = good and status == 0
        return good

    def _reconnect(self, connection: Connection) -> None:
        """Unless the engine disconnected it meanwhile."""
        if self._path(connection) in self._memory.all(remembered.CONNECTIONS):
            self._connect(connection)

    def close(self, timeout: float = 10.0) -> None:
        """The clean stop: everything that nobody uses is disconnected."""
        futures = []
        for path, connection in self.mounts().items():

            def work(c: Connection, path: str = path) -> None:
                self._release(path, c, timeout, final=True)

            futures.append(self._submit(connection, work))
        deadline = Deadline(self._clock, timeout + 30.0)
        for future in futures:
            _status(future, deadline)


def _record(record: Mapping[str, Any]) -> Connection:
    return Connection(**record)


def _same(one: str, other: str) -> bool:
    try:
        return os.path.samestat(os.stat(one), os.stat(other))
    except OSError:
        return False


def _status(running: Future[Any] | AgentError, deadline: Deadline) -> int:
    """0, or the code of the error, which is logged."""
    try:
        if isinstance(running, AgentError):
            raise running
        running.result(deadline.left())
    except TimeoutError:
        log.warning("A storage server did not answer in time")
        return AccessTimeout.code
    except AgentError as error:
        log.warning("Storage connection: %s", error)
        return error.code
    except OSError as error:
        log.warning("Storage connection: %s", error)
        return MountFailed.code
    return 0
