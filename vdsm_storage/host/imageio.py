# SPDX-License-Identifier: GPL-2.0-or-later
"""Tickets of ovirt-imageio, the daemon that moves disk images in and out over HTTPS.

A ticket allows one transfer of one image for a limited time.  The daemon's control service
listens on a unix socket: PUT, GET, PATCH and DELETE /tickets/ID.
"""

from __future__ import annotations

import http.client
import json
import logging
import os
import socket
from collections.abc import Mapping
from typing import Any

from vdsm_storage.base.secret import Secret
from vdsm_storage.base.uuids import is_uuid
from vdsm_storage.errors import (
    ImageDaemonError,
    ImageDaemonUnsupported,
    ImageTicketsError,
    InvalidParameter,
)

log = logging.getLogger("host.imageio")

# The daemon lets running requests end for 60 seconds before it refuses to remove a ticket.
TIMEOUT = 75.0
REPLY_LIMIT = 1024 * 1024


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: str) -> None:
        super().__init__("localhost", timeout=TIMEOUT)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._path)


def _revealed(value: object) -> str:
    """The daemon is told what a peer gave us as a password, and nobody else is."""
    if isinstance(value, Secret):
        return value.reveal()
    raise TypeError(f"{type(value).__name__} is not JSON")


class ImageTickets:
    """`control` is the path of the daemon's control socket."""

    def __init__(self, control: str) -> None:
        self._control = control

    def add(self, ticket: Mapping[str, Any]) -> None:
        """Every key is passed on: the daemon knows more of them than the verbs' schema does."""
        self._ask("PUT", str(ticket["uuid"]), dict(ticket))

    def get(self, ticket_id: str) -> dict[str, Any]:
        """What the daemon knows of the ticket: its state, and how much was transferred."""
        found = self._ask("GET", ticket_id)
        assert isinstance(found, dict)
        return found

    def extend(self, ticket_id: str, timeout: int) -> None:
        """Let the ticket live `timeout` seconds from now."""
        self._ask("PATCH", ticket_id, {"timeout": timeout})

    def remove(self, ticket_id: str) -> None:
        """No transfer runs any more when this returns.  An unknown ticket is as good as removed."""
        self._ask("DELETE", ticket_id)

    def _ask(self, method: str, ticket_id: str, body: Mapping[str, Any] | None = None) -> Any:
        if not is_uuid(ticket_id):
            reason = "a ticket's id is a UUID"
            raise InvalidParameter(parameter="uuid", value=ticket_id, reason=reason)
        if not os.path.exists(self._control):
            raise ImageDaemonUnsupported(path=self._control)
        text = json.dumps(body, default=_revealed) if body is not None else None
        connection = _UnixConnection(self._control)
        try:
            connection.request(method, f"/tickets/{ticket_id}", body=text)
            response = connection.getresponse()
            answer = response.read(REPLY_LIMIT)
        except (OSError, http.client.HTTPException) as error:
            raise ImageDaemonError(path=self._control, reason=error) from error
        finally:
            connection.close()
        log.debug("%s ticket %s: %d", method, ticket_id, response.status)
        if response.status >= 300:
            reason = answer.decode("utf-8", "replace").strip() or response.reason
            raise ImageTicketsError(
                method=method, ticket=ticket_id, status=response.status, reason=reason
            )
        return self._parse(answer)

    def _parse(self, answer: bytes) -> Any:
        try:
            return json.loads(answer) if answer else None
        except ValueError as error:
            raise ImageDaemonError(path=self._control, reason=error) from error
