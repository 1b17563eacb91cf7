# SPDX-License-Identifier: GPL-2.0-or-later
"""iSCSI connections as engines send them: flat maps of strings, checked.

What comes in becomes an argument of iscsiadm, a file name and a line of a file.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from vdsm_storage.base.secret import Secret
from vdsm_storage.errors import ConnectionInvalid
from vdsm_storage.host.iscsi import Chap
from vdsm_storage.host.iscsi_sessions import DEFAULT, PORT, Portal, canonical

_NAME_LIMIT: Final = 223  # bytes of an iSCSI name (RFC 7143)
_TEXT_LIMIT: Final = 255  # bytes of open-iscsi's user and password
_TARGET = re.compile(r"(iqn\.|eui\.|naa\.)[A-Za-z0-9.:_-]+")
_HOST = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,254}")
_INTERFACE = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._:-]{0,64}")
_NETWORK = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._:-]{0,14}")  # no `.` or `..`


@dataclass(frozen=True)
class Wanted:
    """A portal and what to log in to it with."""

    portal: Portal
    chap: Chap


def parse(params: Mapping[str, Any]) -> Wanted:
    """One of the engine's maps.  Raises ConnectionInvalid (453)."""
    address, port = parse_address(params.get("connection"), params.get("port"))
    target = str(params.get("iqn") or "")
    if not _TARGET.fullmatch(target) or len(target) > _NAME_LIMIT:
        raise ConnectionInvalid(connection=target, reason="it is no name of an iSCSI target")
    interface = _optional(params.get("ifaceName"), _INTERFACE) or DEFAULT
    portal = Portal(
        target=target,
        address=address,
        port=port,
        group=int(params.get("tpgt") or 1),
        interface=interface,
        net_interface=_optional(params.get("netIfaceName"), _NETWORK),
    )
    return Wanted(portal, parse_chap(portal.text, params.get("user"), params.get("password")))


def parse_address(address: object, port: object) -> tuple[str, int]:
    """An IP address or a host name, and a TCP port.  Raises ConnectionInvalid (453)."""
    text = str(address or "").strip()
    if text.startswith("[") and text.endswith("]"):
        text = text[1:-1]
    if not _HOST.fullmatch(text) and not _is_ipv6(text):
        raise ConnectionInvalid(
            connection=str(address), reason="it is neither an IP address nor a host name"
        )
    number = int(str(port or PORT))
    if not 0 < number < 65536:
        raise ConnectionInvalid(connection=text, reason=f"{number} is no TCP port")
    return canonical(text), number


def parse_chap(portal: str, user: object, password: object) -> Chap:
    """No user is no CHAP.  Raises ConnectionInvalid (453), which never shows the password."""
    name = str(user or "")
    secret = password if isinstance(password, Secret) else Secret(str(password or ""))
    for what, text in (("user", name), ("password", secret.reveal())):
        if len(text.encode()) > _TEXT_LIMIT or not text.isprintable() or text != text.strip():
            reason = f"its CHAP {what} is too long, or has blanks at an end or control characters"
            raise ConnectionInvalid(connection=portal, reason=reason)
    if name and not secret:
        raise ConnectionInvalid(connection=portal, reason="its CHAP user has no password")
    return Chap(name, secret)


def _is_ipv6(text: str) -> bool:
    """With a zone perhaps, which is the name of an interface."""
    bare, percent, zone = text.partition("%")
    try:
        ipaddress.IPv6Address(bare)
    except ValueError:
        return False
    return not percent or _NETWORK.fullmatch(zone) is not None


def _optional(text: object, form: re.Pattern[str]) -> str:
    name = str(text or "")
    if name and not form.fullmatch(name):
        raise ConnectionInvalid(connection=name, reason="it is no name of an interface")
    return name
