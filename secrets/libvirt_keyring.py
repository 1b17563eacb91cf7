# SPDX-License-Identifier: GPL-2.0-or-later
"""libvirt's secrets through the agent's one connection."""

from __future__ import annotations

import base64
import contextlib
from collections.abc import Callable, Mapping
from typing import Any, Final, Protocol, TypeVar

import libvirt

from vdsm_storage.base.secret import Secret
from vdsm_storage.errors import AgentError
from vdsm_storage.secrets.keyring import Backup, KeyringError, UnansweredError
from vdsm_storage.secrets.model import Defined, Entry

T = TypeVar("T")

SECONDS: Final = 10.0  # for a call; libvirt looks into its memory, no storage is behind it

# virSecretUsageType; its other values (TLS, vTPM) are never ours.
_TYPES: Final[Mapping[int, str]] = {
    libvirt.VIR_SECRET_USAGE_TYPE_VOLUME: "volume",
    libvirt.VIR_SECRET_USAGE_TYPE_CEPH: "ceph",
    libvirt.VIR_SECRET_USAGE_TYPE_ISCSI: "iscsi",
}
_PRIVATE: Final = frozenset((libvirt.VIR_ERR_INVALID_SECRET, libvirt.VIR_ERR_NO_SECRET))


class Calls(Protocol):
    """host.libvirt.Libvirt, as far as it is used here."""

    def call(self, name: str, function: Callable[[Any], T], timeout: float | None) -> T:
        """`function(connection)`, bounded in time.  AgentError, libvirtError."""


class LibvirtKeyring:
    """A keyring.Keyring."""

    def __init__(self, calls: Calls) -> None:
        self._calls = calls

    def all(self) -> list[Defined]:
        def listed(connection: Any) -> list[Defined]:
            # Each brings its UUID and usage along: one call, however many there are.
            return [
                Defined(one.UUIDString(), _TYPES.get(one.usageType(), ""), one.usageID())
                for one in connection.listAllSecrets(0)
            ]

        return self._call("list secrets", listed)

    def define(self, entry: Entry) -> None:
        def define(connection: Any) -> None:
            connection.secretDefineXML(entry.xml(), 0).setValue(entry.value(), 0)

        self._call(f"define secret {entry.uuid}", define)

    def undefine(self, uuid: str) -> None:
        def undefine(connection: Any) -> None:
            secret = _find(connection, uuid)
            if secret is not None:
                secret.undefine()

        self._call(f"undefine secret {uuid}", undefine)

    def backup(self, uuid: str) -> Backup | None:
        def backup(connection: Any) -> Backup | None:
            secret = _find(connection, uuid)
            if secret is None:
                return None
            value = None
            with contextlib.suppress(_PrivateError):
                value = Secret(base64.b64encode(_value(secret)).decode("ascii"))
            return Backup(secret.XMLDesc(0), value)

        return self._call(f"look at secret {uuid}", backup)

    def restore(self, backup: Backup) -> None:
        def restore(connection: Any) -> None:
            secret = connection.secretDefineXML(backup.xml, 0)
            if backup.value is not None:
                secret.setValue(base64.b64decode(backup.value.reveal()), 0)

        self._call("restore a secret", restore)

    def _call(self, name: str, function: Callable[[Any], T]) -> T:
        try:
            return self._calls.call(name, function, SECONDS)
        except AgentError as error:
            raise UnansweredError(str(error)) from error
        except libvirt.libvirtError as error:
            raise KeyringError(f"libvirt could not {name}: {error}") from error


class _PrivateError(Exception):
    """libvirt has no value, or gives it to nobody."""


def _find(connection: Any, uuid: str) -> Any:
    """The secret, or None.  libvirtError."""
    try:
        return connection.secretLookupByUUIDString(uuid)
    except libvirt.libvirtError as error:
        if error.get_error_code() == libvirt.VIR_ERR_NO_SECRET:
            return None
        raise


def _value(secret: Any) -> bytes:
    try:
        value: bytes = secret.value(0)
    except libvirt.libvirtError as error:
        if error.get_error_code() in _PRIVATE:
            raise _PrivateError from error
        raise
    return value
