# SPDX-License-Identifier: GPL-2.0-or-later
"""The registered secrets at rest: one file, encrypted and authenticated.

    vdsm-storage secrets 1
    {"boot": "2b0d…", "key": "9f86d081884c7d65"}
    <a JSON list of secrets, sealed: see aead.py>

The first two lines are authenticated with the rest.  The boot id tells what a crashed agent left in
this boot from what is older: after a reboot libvirt's secrets are gone, no guest runs, and whoever
manages this host registers again.  The key's id tells a file of another key from a damaged one.

The file is replaced as a whole and made durable, so that a crash at any moment leaves the secrets
of before or those of after.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterable
from typing import Any, Final

from vdsm_storage.base import files
from vdsm_storage.base.secret import Secret
from vdsm_storage.errors import AgentError
from vdsm_storage.secrets.key import KeySource, KeyUnusableError
from vdsm_storage.secrets.model import Entry
from vdsm_storage.secrets.sealing import Cipher, DoesNotOpenError

log = logging.getLogger("secrets")

MAGIC: Final = b"vdsm-storage secrets 1\n"
LOST: Final = "the secrets in it must be registered again"
_SUFFIX: Final = ".new"


class StoreError(Exception):
    """The secrets could not be kept; the text shows no value."""


class Store:
    """The file at `path`, for the boot with the id `boot`."""

    def __init__(self, path: str, source: KeySource, cipher: Cipher, boot: str) -> None:
        self._path = path
        self._source = source
        self._cipher = cipher
        self._boot = boot

    def load(self) -> list[Entry]:
        """What was kept in this boot; empty, with a line in the log, if that cannot be had."""
        try:
            # A write that was cut short may have left it.
            files.unlink_if_there(self._path + _SUFFIX)
            size = os.lstat(self._path).st_size
            return self._open(files.read_small(self._path, size))
        except FileNotFoundError:
            return []
        except OSError as error:
            log.warning("%s cannot be read (%s): %s", self._path, error.strerror, LOST)
            return []
        except _UnusableError as error:
            log.warning("%s %s: %s", self._path, error, LOST)
            return []

    def save(self, entries: Iterable[Entry]) -> None:
        """Keep these and no others, durably.  Raises StoreError; then those of before are kept."""
        rows = [_row(entry) for entry in entries]
        try:
            if not rows:
                _remove(self._path)
                return
            key = self._source.get()
            header = json.dumps({"boot": self._boot, "key": key.id}).encode()
            head = MAGIC + header + b"\n"
            sealed = self._cipher.seal(key.bytes, head, json.dumps(rows).encode())
            os.makedirs(os.path.dirname(self._path), mode=0o700, exist_ok=True)
            files.write_atomic(self._path, head + sealed, mode=0o600, suffix=_SUFFIX)
        except OSError as error:
            raise StoreError(f"they cannot be kept in {self._path}: {error.strerror}") from error
        except KeyUnusableError as error:
            raise StoreError(f"there is no key to keep them with: {error}") from error
        except AgentError as error:
            raise StoreError(f"they cannot be encrypted: {error}") from error

    def _open(self, data: bytes) -> list[Entry]:
        magic, header, sealed = data[: len(MAGIC)], b"", b""
        if magic == MAGIC:
            header, _, sealed = data[len(MAGIC) :].partition(b"\n")
        try:
            facts = json.loads(header)
            boot, key_id = str(facts["boot"]), str(facts["key"])
        except (ValueError, KeyError, TypeError, RecursionError):
            raise _UnusableError("is damaged") from None
        if boot != self._boot:
            log.info("Secrets of an earlier boot are dropped: whoever needs them registers again")
            _remove(self._path)
            return []
        try:
            key = self._source.get()
        except KeyUnusableError as error:
            raise _UnusableError(f"cannot be decrypted: {error}") from error
        if key.id != key_id:
            raise _UnusableError("was encrypted with another key")
        head = MAGIC + header + b"\n"
        try:
            rows = json.loads(self._cipher.open(key.bytes, head, sealed))
        except (DoesNotOpenError, ValueError):
            raise _UnusableError("is damaged") from None
        except AgentError as error:
            raise _UnusableError(f"cannot be decrypted: {error}") from error
        return [_entry(row) for row in rows]


class Forgetful:
    """Stands for a Store when nothing is to be kept.  A file from when something was is removed."""

    def __init__(self, path: str) -> None:
        self._path = path

    def load(self) -> list[Entry]:
        try:
            _remove(self._path)
        except OSError as error:
            log.warning("%s should be removed, and cannot be: %s", self._path, error.strerror)
        return []

    def save(self, entries: Iterable[Entry]) -> None:
        """They are in memory, and that is all."""


class _UnusableError(Exception):
    """Why a file is of no use."""


def _remove(path: str) -> None:
    files.unlink_if_there(path + _SUFFIX)
    if files.unlink_if_there(path):
        files.sync_directory(os.path.dirname(path))


def _row(entry: Entry) -> dict[str, str]:
    return {
        "uuid": entry.uuid,
        "usageType": entry.usage_type,
        "usageID": entry.usage_id,
        "description": entry.description,
        "password": entry.password.reveal(),
    }


def _entry(row: dict[str, Any]) -> Entry:
    return Entry(
        uuid=row["uuid"],
        usage_type=row["usageType"],
        usage_id=row["usageID"],
        password=Secret(row["password"]),
        description=row["description"],
    )
