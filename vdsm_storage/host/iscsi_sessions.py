# SPDX-License-Identifier: GPL-2.0-or-later
"""iSCSI portals, and the sessions with them as sysfs shows them: no program is run."""

from __future__ import annotations

import ipaddress
import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from vdsm_storage.base.secret import Secret
from vdsm_storage.host.kernel_files import KernelFiles

PORT: Final = 3260
DEFAULT: Final = "default"  # the iSCSI interface that binds to nothing
SESSIONS: Final = "/sys/class/iscsi_session"
CONNECTIONS: Final = "/sys/class/iscsi_connection"
LOGGED_IN: Final = "LOGGED_IN"

_HOST = re.compile(r"/host(\d+)/session\d+")
_NULL: Final = "(null)"  # what the kernel shows where there is nothing

log = logging.getLogger("host.iscsi")


@dataclass(frozen=True)
class Portal:
    """A target at an address, reached through an iSCSI interface.  Never holds a password.

    `net_interface` is the network interface that the iSCSI interface is bound to, "" for none.
    """

    target: str
    address: str
    port: int = PORT
    group: int = 1
    interface: str = DEFAULT
    net_interface: str = ""

    @property
    def text(self) -> str:
        """As iscsiadm takes it: 192.0.2.1:3260,1 or [2001:db8::1]:3260,1."""
        return f"{portal_text(self.address, self.port)},{self.group}"

    @property
    def key(self) -> str:
        """Equal for two portals that are one session."""
        return f"{canonical(self.address)} {self.port} {self.target} {self.interface}"


@dataclass(frozen=True)
class Session:
    """A session that the kernel has; it may have lost its connection (`state`)."""

    id: int
    host: int
    portal: Portal
    state: str
    user: str
    password: Secret

    @property
    def is_logged_in(self) -> bool:
        return self.state == LOGGED_IN


def portal_text(address: str, port: int) -> str:
    return f"[{address}]:{port}" if ":" in address else f"{address}:{port}"


def canonical(address: str) -> str:
    """One form of an address, whichever was written: names in lower case, IPv6 shortened."""
    try:
        return str(ipaddress.ip_address(address))
    except ValueError:
        return address.lower()


class Sessions:
    """Reads below the root of `files`."""

    def __init__(self, files: KernelFiles) -> None:
        self._files = files

    def all(self) -> dict[int, Session]:
        """By number."""
        found = {}
        for name in self._files.names(SESSIONS):
            session = self._session(int(name.removeprefix("session")))
            if session is not None:
                found[session.id] = session
        return found

    def find(self, portal: Portal) -> Session | None:
        """The session with a portal."""
        return by_key(self.all()).get(portal.key)

    def _session(self, number: int) -> Session | None:
        """None while it is being made or ended."""
        base = f"{SESSIONS}/session{number}"
        connection = f"{CONNECTIONS}/connection{number}:0"
        host = _HOST.search(self._files.real(f"{base}/device"))
        # `persistent`: what was asked for.  A target may have sent the session elsewhere.
        address = self._text(f"{connection}/persistent_address")
        target = self._text(f"{base}/targetname")
        if not (host and address and target):
            return None
        portal = Portal(
            target=target,
            address=address,
            port=self._files.number(f"{connection}/persistent_port", PORT),
            group=self._files.number(f"{base}/tpgt", 1),
            interface=self._text(f"{base}/ifacename") or DEFAULT,
        )
        return Session(
            id=number,
            host=int(host.group(1)),
            portal=portal,
            state=self._text(f"{base}/state"),
            user=self._text(f"{base}/username"),
            password=Secret(self._text(f"{base}/password")),
        )

    def _text(self, path: str) -> str:
        text = self._files.text(path)
        return "" if text == _NULL else text


def by_key(sessions: Mapping[int, Session]) -> dict[str, Session]:
    return {session.portal.key: session for session in sessions.values()}
