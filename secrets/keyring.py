# SPDX-License-Identifier: GPL-2.0-or-later
"""What is asked of libvirt's secrets."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from vdsm_storage.base.secret import Secret
from vdsm_storage.secrets.model import Defined, Entry


class KeyringError(Exception):
    """libvirt refused, did not answer in time, or is not there.  The text shows no value."""


class UnansweredError(KeyringError):
    """The connection is gone, or libvirt hangs: it is of no use to ask for anything else now."""


@dataclass(frozen=True)
class Backup:
    """A secret that somebody else defined, as far as libvirt tells.  `value` is base64; None when
    it has none, or is private."""

    xml: str
    value: Secret | None


class Keyring(Protocol):
    """Secrets of one libvirt.  Every call is bounded in time and raises KeyringError."""

    def all(self) -> list[Defined]:
        """Every secret, also those that are not ours."""

    def define(self, entry: Entry) -> None:
        """Make the secret, or give the one with this UUID and usage a new value.

        A failure may leave a secret behind that has no value.
        """

    def undefine(self, uuid: str) -> None:
        """Remove a secret; one that is not there is as good."""

    def backup(self, uuid: str) -> Backup | None:
        """What `restore` needs; None if there is no such secret."""

    def restore(self, backup: Backup) -> None:
        """Define it as it was, with its value if that is known."""
