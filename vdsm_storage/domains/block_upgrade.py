# SPDX-License-Identifier: GPL-2.0-or-later
"""A block domain of format 4 becomes format 5: the volumes' metadata moves to wider slots.

The steps, under the domain's lock: `copy_slots`, then one write of the domain's metadata with
`upgraded`, then `zero_old_slots`.  Up to the second one the domain is still of format 4 and its
slots are untouched, so what was cut off before is simply done again; after it only the zeroing is.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from typing import Final

from vdsm_storage.base import files
from vdsm_storage.base.units import MIB
from vdsm_storage.domains.block_slots import SLOT_SIZE, Slots, slot_offset
from vdsm_storage.errors import AgentError
from vdsm_storage.images import metadata

log = logging.getLogger("domain.upgrade")

OLD: Final = 4
NEW: Final = 5
_CHUNK: Final = MIB  # bytes of `metadata` that are rewritten at once


def copy_slots(path: str, volumes: Mapping[int, str], version: int = OLD) -> list[str]:
    """Write the metadata of `volumes` (VolumeIndex.by_slot) to its place in format 5.

    `path` is the `metadata` volume.  Returns the volumes whose text could not be understood; it
    is copied as it is.  Durable when this returns.  May block; raises OSError.
    """
    unread: list[str] = []
    texts: dict[int, bytes] = {}  # by offset
    for slot, data in Slots(path, version).read_all(volumes).items():
        text = _converted(data, volumes[slot])
        if text is None:
            unread.append(volumes[slot])
        texts[slot_offset(slot, NEW)] = data if text is None else text
    _write(os.path.realpath(path), texts)
    return unread


def _converted(data: bytes, volume: str) -> bytes | None:
    try:
        return metadata.decode(data, volume).encode_slot(NEW, volume)
    except AgentError as error:
        log.warning("Copied as it is: %s", error)
        return None


def _write(path: str, texts: Mapping[int, bytes]) -> None:
    """Write slots at their offsets; what lies between them stays as it was."""
    for start in sorted({offset // _CHUNK * _CHUNK for offset in texts}):
        chunk = bytearray(files.read_direct(path, _CHUNK, start))
        mine = [offset for offset in texts if start <= offset < start + _CHUNK]
        chunk.extend(bytes(max(0, max(mine) - start + SLOT_SIZE - len(chunk))))
        for offset in mine:
            chunk[offset - start : offset - start + SLOT_SIZE] = texts[offset]
        files.write_direct(path, bytes(chunk), start)


def upgraded(alignment: int = MIB) -> dict[str, str | None]:
    """The changes of the domain's metadata, for DomainMetadata.with_changes."""
    return {
        "VERSION": str(NEW),
        "BLOCK_SIZE": "512",
        "ALIGNMENT": str(alignment),
        "LOGBLKSIZE": None,
        "PHYBLKSIZE": None,
    }


def zero_old_slots(path: str) -> None:
    """Wipe the slots of the old format, durably; only when the domain says it has the new one."""
    files.write_direct(os.path.realpath(path), bytes(slot_offset(0, NEW)), 0)
