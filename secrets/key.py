# SPDX-License-Identifier: GPL-2.0-or-later
"""The key that the secrets at rest are encrypted with.

A credential that systemd passes to the service comes first: it may be encrypted on the disk with a
key of this host or of its TPM, which is systemd's work (LoadCredentialEncrypted=).  Else it is a
file that only this user can read, made when it is first needed.
"""

from __future__ import annotations

import errno
import hmac
import logging
import os
import stat
from dataclasses import dataclass
from typing import Final

from vdsm_storage.base import files

log = logging.getLogger("secrets")

CREDENTIAL: Final = "vdsm-storage.secrets-key"
SIZE: Final = 32  # bytes; of a credential: at least
_LARGEST_CREDENTIAL: Final = 1024 * 1024  # bytes, systemd's own limit


class KeyUnusableError(Exception):
    """There is no key; the text says why and shows nothing of it."""


@dataclass(frozen=True, repr=False)
class Key:
    """`id` tells one key from another and gives nothing of the key away (hexadecimal digits)."""

    bytes: bytes
    id: str


class KeySource:
    """`path` of the key file; `credentials` is systemd's CREDENTIALS_DIRECTORY, if there is one."""

    def __init__(self, path: str, credentials: str | None) -> None:
        self._path = path
        self._credential = os.path.join(credentials, CREDENTIAL) if credentials else None

    def get(self) -> Key:
        """The key.  Raises KeyUnusableError."""
        try:
            return _derive(self._from_credential() or self._from_file())
        except OSError as error:
            raise KeyUnusableError(f"{error.filename or self._path}: {error.strerror}") from error

    def _from_credential(self) -> bytes | None:
        if self._credential is None:
            return None
        try:
            raw = files.read_small(self._credential, _LARGEST_CREDENTIAL)
        except FileNotFoundError:
            return None
        if len(raw) < SIZE:
            # Going on with a file would be less than what was asked for, without a word.
            raise KeyUnusableError(f"{self._credential} has fewer than {SIZE} bytes")
        return raw

    def _from_file(self) -> bytes:
        try:
            return _read_private(self._path)
        except FileNotFoundError:
            return self._make()
        except KeyUnusableError as error:
            log.warning("%s; it is replaced by a new key", error)
            return self._make()

    def _make(self) -> bytes:
        os.makedirs(os.path.dirname(self._path), mode=0o755, exist_ok=True)
        raw = os.urandom(SIZE)
        files.write_atomic(self._path, raw, mode=0o600)
        return raw


def _read_private(path: str) -> bytes:
    """A file that nobody else can have read or written.  OSError, KeyUnusableError."""
    try:
        # O_NONBLOCK: what lies there may be a pipe.
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError as error:
        if error.errno != errno.ELOOP:
            raise
        raise KeyUnusableError(f"The key {path} is a link") from None
    try:
        found = os.fstat(fd)
        if not stat.S_ISREG(found.st_mode) or found.st_size != SIZE:
            raise KeyUnusableError(f"The key {path} is no file of {SIZE} bytes")
        if found.st_uid != os.geteuid() or found.st_mode & 0o077:
            raise KeyUnusableError(f"The key {path} is not this user's alone")
        return os.read(fd, SIZE)
    finally:
        os.close(fd)


def _derive(raw: bytes) -> Key:
    """Two values that tell nothing of each other, nor of `raw`."""

    def expand(purpose: bytes) -> bytes:
        return hmac.digest(raw, b"vdsm-storage secrets: " + purpose, "sha256")

    return Key(expand(b"AES-256-GCM"), expand(b"key id")[:8].hex())
