# SPDX-License-Identifier: GPL-2.0-or-later
"""Volumes whose data are encrypted: which key, and that no layer above one is in the clear."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from vdsm_storage.base.secret import Secret
from vdsm_storage.errors import InvalidParameter, UnsupportedOperation
from vdsm_storage.host.qemu_img_luks import QemuImgLuks
from vdsm_storage.images import guard, layers
from vdsm_storage.images import metadata as md
from vdsm_storage.images.chain import Member
from vdsm_storage.images.store import Store


class Encryption:
    """`find_key(secret)` gives the value that a secret has here, base64, or None."""

    def __init__(self, luks: QemuImgLuks, find_key: Callable[[str], Secret | None]) -> None:
        self.luks = luks
        self._find_key = find_key

    def key(self, secret: str) -> Secret:
        """Raises InvalidParameter (1000)."""
        found = self._find_key(secret)
        if found is None:
            reason = "it is no secret of a volume on this host; Host.registerSecrets makes it one"
            raise InvalidParameter(parameter="secretID", value=secret, reason=reason)
        return found


def check_covered(store: Store, member: Member, secret: str | None) -> None:
    """A volume is put upon `member`: what is written to it must not be in the clear when what is
    below is not.  Raises 1000."""
    if secret is not None or not _can_be(member):
        return
    with guard.active(store, member.image, [member.volume], prepared=False):
        encrypted = layers.is_encrypted(store, member)
    if encrypted:
        raise needs_key(member.volume)


def check_clear(store: Store, members: Sequence[Member], *, prepared: bool = False) -> None:
    """None of these is encrypted: their data is to be read, written elsewhere in the clear, or
    written over.  Raises 2009."""
    for member in members:
        if not _can_be(member):
            continue
        with guard.active(store, member.image, [member.volume], prepared=prepared):
            if layers.is_encrypted(store, member):
                reason = f"volume {member.volume} is encrypted, and its key is not given"
                raise UnsupportedOperation(operation="this", reason=reason)


def _can_be(member: Member) -> bool:
    """Whether it may be encrypted, as far as the metadata say."""
    return member.is_cow or member.metadata.format == md.LUKS


def needs_key(volume: str) -> InvalidParameter:
    reason = f"volume {volume} is encrypted: name the secret that has its key"
    return InvalidParameter(parameter="secretID", value="", reason=reason)
