# SPDX-License-Identifier: GPL-2.0-or-later
"""Connections to libvirt that calls are made on: each has one call at a time.

Two threads in one connection are what libvirt's client library does not survive when the daemon
dies or hangs under them (seen with 9.0: it writes into the stack of a thread that returned, see
CVE-2024-4418).  So a call has a connection to itself, and none of these has a keep-alive, which
would close it from another thread.  Whether the daemon lives is told by the connection that brings
the events.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from typing import Any, Final, TypeVar

import libvirt

IDLE: Final = 8  # that stay open for the next call

T = TypeVar("T")


class Lost(Exception):  # noqa: N818 - what happened, not a fault of who asked
    """The connection went while a call was on it, or none could be made."""


class CallConnections:
    """To the libvirt at `uri`, opened when they are needed.  Any thread."""

    def __init__(self, uri: str) -> None:
        self._uri = uri
        self._lock = threading.Lock()
        self._idle: list[Any] = []
        self._generation = 0

    def use(self, function: Callable[[Any], T]) -> T:
        """`function(connection)`.  Waits as long as libvirt does.

        Raises Lost, and libvirtError when libvirt says that it cannot be done.
        """
        with self._lock:
            generation = self._generation
        connection = self._take()
        try:
            return function(connection)
        except libvirt.libvirtError as error:
            if error.get_error_domain() == libvirt.VIR_FROM_RPC or not is_alive(connection):
                raise Lost(str(error)) from error
            raise
        finally:
            self._give_back(connection, generation)

    def renew(self) -> None:
        """The daemon went away, or is another one: connections that are open are not used again.

        Those that are idle are closed, which waits as long as libvirt does.
        """
        with self._lock:
            self._generation += 1
            idle, self._idle = self._idle, []
        for connection in idle:
            close(connection)

    def _take(self) -> Any:
        while True:
            with self._lock:
                connection = self._idle.pop() if self._idle else None
            if connection is None:
                return self._open()
            if is_alive(connection):
                return connection
            close(connection)

    def _open(self) -> Any:
        try:
            return libvirt.open(self._uri)
        except libvirt.libvirtError as error:
            raise Lost(str(error)) from error

    def _give_back(self, connection: Any, generation: int) -> None:
        with self._lock:
            kept = generation == self._generation and len(self._idle) < IDLE
            if kept:
                self._idle.append(connection)
        if not kept:
            close(connection)


def close(connection: Any) -> None:
    with contextlib.suppress(libvirt.libvirtError):
        connection.close()


def is_alive(connection: Any) -> bool:
    """What this end knows; nothing is sent."""
    try:
        return bool(connection.isAlive())
    except libvirt.libvirtError:
        return False
