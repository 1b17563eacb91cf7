# SPDX-License-Identifier: GPL-2.0-or-later
"""Encryption by a process of its own, which is rarely needed: what it imports is large."""

from __future__ import annotations

import struct
import sys
from typing import Final, Protocol

from vdsm_storage.base.run import Command, run
from vdsm_storage.errors import CommandError

KEY: Final = 32  # bytes
TIMEOUT: Final = 60.0  # seconds
_MODULE: Final = "vdsm_storage.secrets.aead"
_REFUSED: Final = "exit code 3"


class DoesNotOpenError(Exception):
    """The key is another one, or what was sealed has been changed."""


class Cipher(Protocol):
    """Authenticated encryption.  `head` is authenticated, and not in the result."""

    def seal(self, key: bytes, head: bytes, data: bytes) -> bytes:
        """What `open` takes.  Raises CommandError, CommandTimeout."""

    def open(self, key: bytes, head: bytes, sealed: bytes) -> bytes:
        """The data.  Raises DoesNotOpenError; CommandError, CommandTimeout."""


class SealProcess:
    """A Cipher.  Key and data go through pipes."""

    def seal(self, key: bytes, head: bytes, data: bytes) -> bytes:
        return self._run("seal", key, head, data)

    def open(self, key: bytes, head: bytes, sealed: bytes) -> bytes:
        try:
            return self._run("open", key, head, sealed)
        except CommandError as error:
            if error.status == _REFUSED:
                raise DoesNotOpenError from None
            raise

    @staticmethod
    def _run(what: str, key: bytes, head: bytes, data: bytes) -> bytes:
        given = key + struct.pack(">Q", len(head)) + head + data
        argv = [sys.executable, "-P", "-m", _MODULE, what]
        return run(Command(argv, TIMEOUT, input=given)).stdout
