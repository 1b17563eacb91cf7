# SPDX-License-Identifier: GPL-2.0-or-later
"""Logging in to iSCSI targets and out of them, by iscsiadm.

Passwords go into open-iscsi's records (iscsi_records.py), never onto a command line.
"""

from __future__ import annotations

import logging
import os
import re
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

from vdsm_storage.base.clock import Clock, Deadline
from vdsm_storage.base.run import Command, run
from vdsm_storage.base.secret import Secret
from vdsm_storage.errors import (
    CommandError,
    CommandTimeout,
    IscsiAuthFailed,
    IscsiDiscoveryFailed,
    IscsiInterfaceError,
    IscsiLoginFailed,
    IscsiLogoutFailed,
)
from vdsm_storage.host.iscsi_records import Records, value_of
from vdsm_storage.host.iscsi_sessions import DEFAULT, Portal, Session, Sessions, portal_text
from vdsm_storage.host.kernel_files import KernelFiles

# iscsiadm's exit codes (iscsiadm(8), EXIT STATUS).
SESSION_EXISTS: Final = 15
FATAL_LOGIN: Final = 19
NOTHING_FOUND: Final = 21
AUTHORISATION: Final = 24

TRIES: Final = 2  # of a login; the daemon waits a second between two
_MARGIN: Final = 10.0  # seconds that iscsiadm gets beyond what the daemon should need
_SHORT: Final = 30.0  # seconds for what asks nobody but the record files
_POLL: Final = 0.1
_LOOSE: Final = "2"
_REPORTED = re.compile(r"initiator reported error \(\d+ - ([^)]*)\)")
_TARGET = re.compile(r"(\S+):(\d+),(-?\d+) (\S+)")

log = logging.getLogger("host.iscsi")


class IscsiadmError(Exception):
    """`code` is its exit code, -1 when it did not end by itself."""

    def __init__(self, code: int, reason: str) -> None:
        self.code = code
        self.reason = reason
        super().__init__(reason)


@dataclass(frozen=True)
class Chap:
    """`user` "" is no CHAP, or what the host's iscsid.conf says."""

    user: str = ""
    password: Secret = field(default_factory=lambda: Secret(""))


class Iscsi:
    """`login_timeout` seconds are what one login or one discovery may take."""

    def __init__(
        self,
        files: KernelFiles,
        sessions: Sessions,
        records: Records,
        clock: Clock,
        login_timeout: float,
    ) -> None:
        self._files = files
        self.sessions = sessions
        self._records = records
        self._clock = clock
        self._timeout = login_timeout
        self._interfaces = threading.Lock()
        # iscsiadm stumbles over a directory of records that another one removes meanwhile.
        self._nodes = threading.Lock()

    # -- discovery ---------------------------------------------------------------------------

    def discover(self, address: str, port: int, chap: Chap) -> list[str]:
        """What a portal offers, lines such as `192.0.2.1:3260,1 iqn.2020-01.org.example:t1`.

        Nothing of it is kept.  One call a portal at a time.  Raises IscsiAuthFailed (476),
        IscsiDiscoveryFailed (475).
        """
        portal = portal_text(address, port)
        database = ["-m", "discoverydb", "-t", "sendtargets", "-p", portal]
        try:
            if chap.user:
                try:
                    names = ("send_targets", f"{address},{port}", "st_config")
                    return self._discover_with(chap, names, database)
                except IscsiadmError as error:
                    # A portal that asks for a password at the login only cannot be made to take
                    # one here.
                    if error.code != FATAL_LOGIN:
                        raise
            return self._discover(database)
        except IscsiadmError as error:
            if error.code == AUTHORISATION:
                raise IscsiAuthFailed(target="discovery", portal=portal) from error
            raise IscsiDiscoveryFailed(portal=portal, reason=error.reason) from error
        except OSError as error:
            raise IscsiDiscoveryFailed(portal=portal, reason=error) from error

    def _discover(self, database: Sequence[str]) -> list[str]:
        ask = [*database, "-I", DEFAULT, "-o", "nonpersistent", "--discover"]
        return parse_targets(self._iscsiadm(ask, self._timeout))

    def _discover_with(
        self, chap: Chap, names: Sequence[str], database: Sequence[str]
    ) -> list[str]:
        before = self._text(names)
        self._iscsiadm([*database, "-o", "new"], _SHORT)
        try:
            self._fill(names, _discovery_values(chap, self._timeout))
            return self._discover(database)
        finally:
            self._restore(names, before, database)

    def _restore(self, names: Sequence[str], before: str, database: Sequence[str]) -> None:
        """The password does not stay; a record that somebody else made does."""
        path = self._records.find(*names)
        if before and path is not None:
            self._records.replace(path, before)
        else:
            self._iscsiadm([*database, "-o", "delete"], _SHORT)

    # -- login -------------------------------------------------------------------------------

    def login(self, portal: Portal, chap: Chap) -> None:
        """Have a session with a portal; one that is there is used as it is.

        Raises IscsiAuthFailed (476), IscsiLoginFailed (465), IscsiInterfaceError (473).
        """
        if self._is_there(portal):
            return
        self._set_up_interface(portal)
        node = _node(portal)
        names = ("nodes", portal.target, f"{portal.address},{portal.port},{portal.group}")
        try:
            with self._nodes:
                self._iscsiadm([*node, "-o", "new"], _SHORT)
            self._fill((*names, portal.interface), _node_values(chap, self._timeout))
        except (IscsiadmError, OSError) as error:
            raise _login_failed(portal, error) from error
        try:
            self._login(portal)
        except (IscsiAuthFailed, IscsiLoginFailed):
            self.forget(portal)  # a password that is no good stays nowhere
            raise

    def login_again(self, portal: Portal) -> None:
        """As before, with the record that `login` left.  Raises as `login`."""
        if not self._is_there(portal):
            self._login(portal)

    def _login(self, portal: Portal) -> None:
        try:
            self._iscsiadm([*_node(portal), "--login"], self._timeout + _MARGIN)
        except IscsiadmError as error:
            if error.code == AUTHORISATION:
                raise IscsiAuthFailed(target=portal.target, portal=portal.text) from error
            # Somebody else logs in at this moment, or the daemon still does for a caller that
            # gave up: it counts when the kernel has the session.
            if error.code != SESSION_EXISTS or not self._comes(portal):
                raise _login_failed(portal, error) from error

    def _is_there(self, portal: Portal) -> bool:
        """Raises IscsiLoginFailed for a session whose connection is lost and does not come back."""
        session = self.sessions.find(portal)
        if session is None:
            return False
        if not session.is_logged_in and not self._comes(portal):
            raise IscsiLoginFailed(
                target=portal.target,
                portal=portal.text,
                reason=f"session {session.id} has lost its connection; the portal does not answer",
            )
        return True

    def _comes(self, portal: Portal) -> bool:
        """Wait for the session to be logged in."""
        deadline, nothing = Deadline(self._clock, self._timeout), threading.Event()
        while True:
            session = self.sessions.find(portal)
            if session is not None and session.is_logged_in:
                return True
            if deadline.passed():
                return False
            self._clock.wait(nothing, _POLL)

    # -- interfaces --------------------------------------------------------------------------

    def _set_up_interface(self, portal: Portal) -> None:
        """The iSCSI interface, bound to its network interface."""
        name, network = portal.interface, portal.net_interface
        if name == DEFAULT:
            return
        argv = ["-m", "iface", "-I", name]
        with self._interfaces:
            before = self._text(("ifaces", name))
            try:
                if not before:
                    self._iscsiadm([*argv, "-o", "new"], _SHORT)
                if network and value_of(before, "iface.net_ifacename") != network:
                    update = ["-o", "update", "-n", "iface.net_ifacename", "-v", network]
                    self._iscsiadm([*argv, *update], _SHORT)
            except (IscsiadmError, OSError) as error:
                raise IscsiInterfaceError(interface=name, reason=error) from error
        if network:
            self._accept_answers(network)

    def _accept_answers(self, network: str) -> None:
        """Two interfaces in one subnet: answers may come in by the other one.  The kernel's strict
        filter (1) would drop them."""
        path = f"/proc/sys/net/ipv4/conf/{network}/rp_filter"
        everywhere = self._files.number("/proc/sys/net/ipv4/conf/all/rp_filter")
        if max(everywhere, self._files.number(path)) != 1:
            return
        try:
            with open(self._files.path(path), "w", encoding="ascii") as file:
                file.write(_LOOSE)
        except OSError as error:
            log.warning("The filter of %s stays strict: %s", network, error)

    # -- logout ------------------------------------------------------------------------------

    def logout(self, session: Session) -> None:
        """End one session; one that is not there is fine.  Raises IscsiLogoutFailed (474)."""
        try:
            self._iscsiadm(
                ["-m", "session", "-r", str(session.id), "--logout"], self._timeout + _MARGIN
            )
        except IscsiadmError as error:
            if error.code != NOTHING_FOUND and session.id in self.sessions.all():
                portal = session.portal
                raise IscsiLogoutFailed(
                    target=portal.target, portal=portal.text, reason=error.reason
                ) from error

    def forget(self, portal: Portal) -> None:
        """Remove the record of a portal, and the password with it."""
        # Without the group: the target may have told another one than the record has.
        target, address = portal.target, portal_text(portal.address, portal.port)
        argv = ["-m", "node", "-T", target, "-p", address, "-I", portal.interface, "-o", "delete"]
        try:
            with self._nodes:
                self._iscsiadm(argv, _SHORT)
        except IscsiadmError as error:
            if error.code != NOTHING_FOUND:
                log.warning("The record of %s at %s stays: %s", target, address, error.reason)

    # -- inside ------------------------------------------------------------------------------

    def _text(self, names: Sequence[str]) -> str:
        path = self._records.find(*names)
        if path is None:
            return ""
        with open(path, encoding="utf-8") as file:
            return file.read()

    def _fill(self, names: Sequence[str], values: dict[str, str | Secret]) -> None:
        path = self._records.find(*names)
        if path is None:
            raise FileNotFoundError(f"iscsiadm made no record {os.path.join(*names)}")
        self._records.update(path, values)

    def _iscsiadm(self, argv: Sequence[str], timeout: float) -> str:
        """Its output.  Raises IscsiadmError."""
        try:
            return run(Command(["iscsiadm", *argv], timeout)).stdout.decode(errors="replace")
        except CommandTimeout as error:
            raise IscsiadmError(-1, f"no answer in {timeout:g} seconds") from error
        except CommandError as error:
            status = str(error.facts["status"]).rpartition(" ")[2]
            code = int(status) if status.isdigit() else -1
            raise IscsiadmError(code, own_words(str(error.facts["stderr"]))) from error


def _node(portal: Portal) -> list[str]:
    return ["-m", "node", "-T", portal.target, "-p", portal.text, "-I", portal.interface]


def _node_values(chap: Chap, timeout: float) -> dict[str, str | Secret]:
    """The daemon gives up by itself before we do: it would go on for a caller that has gone."""
    values: dict[str, str | Secret] = {
        "node.startup": "manual",
        "node.conn[0].startup": "manual",
        "node.session.initial_login_retry_max": str(TRIES),
        "node.conn[0].timeo.login_timeout": str(_a_try(timeout)),
    }
    if chap.user:
        values["node.session.auth.authmethod"] = "CHAP"
        values["node.session.auth.username"] = chap.user
        values["node.session.auth.password"] = chap.password
    return values


def _discovery_values(chap: Chap, timeout: float) -> dict[str, str | Secret]:
    return {
        "discovery.sendtargets.auth.authmethod": "CHAP",
        "discovery.sendtargets.auth.username": chap.user,
        "discovery.sendtargets.auth.password": chap.password,
        "discovery.sendtargets.timeo.login_timeout": str(_a_try(timeout)),
        "discovery.sendtargets.reopen_max": str(TRIES - 1),
    }


def _a_try(timeout: float) -> int:
    """Seconds that one of TRIES may take."""
    return max(2, int(timeout / TRIES) - 2)


def _login_failed(portal: Portal, error: Exception) -> IscsiLoginFailed:
    return IscsiLoginFailed(target=portal.target, portal=portal.text, reason=error)


def own_words(stderr: str) -> str:
    """What iscsiadm says went wrong, out of

    iscsiadm: Could not login to [iface: default, target: iqn.2020-01.org.example:t1, portal: …].
    iscsiadm: initiator reported error (8 - connection timed out)
    iscsiadm: Could not log into all portals
    """
    found = _REPORTED.search(stderr)
    if found:
        return found.group(1)
    lines = [line.removeprefix("iscsiadm: ").strip() for line in stderr.splitlines()]
    return "; ".join(dict.fromkeys(line for line in lines if line)) or "no message"


def parse_targets(text: str) -> list[str]:
    """The lines that name a target, each once, as they came."""
    lines = (line.strip() for line in text.splitlines())
    return list(dict.fromkeys(line for line in lines if _TARGET.fullmatch(line)))
