# SPDX-License-Identifier: GPL-2.0-or-later
"""AES-256-GCM.  Run as a program it serves sealing.SealProcess; the agent does not import it.

    python -m vdsm_storage.secrets.aead seal | open

Standard input: the key (32 bytes), the length of the head (8 bytes, big-endian), the head, then
what is to be sealed or opened.  Standard output: the result.  Exit code 3: it does not open.
"""

from __future__ import annotations

import os
import struct
import sys
from typing import Final

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from vdsm_storage.base import dump
from vdsm_storage.secrets.sealing import KEY, DoesNotOpenError

NONCE: Final = 12  # bytes; random: one key would have to seal 2**32 times for two to meet
DOES_NOT_OPEN: Final = 3


class AesGcm:
    """A sealing.Cipher, in this process."""

    def seal(self, key: bytes, head: bytes, data: bytes) -> bytes:
        nonce = os.urandom(NONCE)
        return nonce + AESGCM(key).encrypt(nonce, data, head)

    def open(self, key: bytes, head: bytes, sealed: bytes) -> bytes:
        try:
            return AESGCM(key).decrypt(sealed[:NONCE], sealed[NONCE:], head)
        except (InvalidTag, ValueError):  # ValueError: it has not even a nonce
            raise DoesNotOpenError from None


def main(argv: list[str]) -> int:
    dump.never()
    given = sys.stdin.buffer.read()
    (length,) = struct.unpack_from(">Q", given, KEY)
    start = KEY + 8
    key, head, data = given[:KEY], given[start : start + length], given[start + length :]
    cipher = AesGcm()
    try:
        result = cipher.seal(key, head, data) if argv == ["seal"] else cipher.open(key, head, data)
    except DoesNotOpenError:
        return DOES_NOT_OPEN
    sys.stdout.buffer.write(result)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
