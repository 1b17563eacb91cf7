# SPDX-License-Identifier: GPL-2.0-or-later
"""What the domain says about a volume, and its text form.

The text is `KEY=value` lines with sorted keys and a last line `EOF`: a file's whole content, or
the start of a block domain's slot of 512 bytes.  Domains of version 5 store the capacity in bytes
(CAP) and a sequence number (SEQ); older ones store it in sectors (SIZE) and carry MTIME=0.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace

from vdsm_storage.base.uuids import BLANK
from vdsm_storage.errors import MetadataCleared, MetadataOverflow, VolumeMetadataReadError
from vdsm_storage.images import luks

TEXT_LIMIT = 512  # bytes of text that every reader accepts
DESCRIPTION_LIMIT = 210  # characters that are kept
GENERATIONS = 1000  # GEN counts 0 to 999 and starts again
MAX_SEQUENCE = 2**32 - 1
SECTOR = 512

RAW = "RAW"
COW = "COW"
# A raw volume that is a LUKS container.  Callers know it as RAW.  Hosts that do not know the word
# keep it when they write the metadata anew.
LUKS = "LUKS"
SPARSE = "SPARSE"
PREALLOCATED = "PREALLOCATED"
LEAF = "LEAF"
INTERNAL = "INTERNAL"
SHARED = "SHARED"
LEGAL = "LEGAL"
ILLEGAL = "ILLEGAL"
FAKE = "FAKE"

CLEARED_KEY = b"NONE"  # written over the metadata of a deleted volume by old releases

_TEXT_KEYS: Mapping[str, str] = {
    "DOMAIN": "domain",
    "IMAGE": "image",
    "PUUID": "parent",
    "FORMAT": "format",
    "TYPE": "type",
    "VOLTYPE": "voltype",
    "DISKTYPE": "disktype",
    "DESCRIPTION": "description",
    "LEGALITY": "legality",
}


@dataclass(frozen=True)
class VolumeMetadata:
    """`capacity` is bytes, `ctime` seconds since the epoch; `parent` is BLANK for a base.

    The values of the enumerations are those on disk (RAW, SPARSE, LEAF ...); a reader accepts
    others, because other hosts have written them.
    """

    domain: str
    image: str
    capacity: int
    format: str
    type: str
    voltype: str
    disktype: str
    parent: str = BLANK
    description: str = ""
    legality: str = LEGAL
    ctime: int = 0
    generation: int = 0
    sequence: int = 0

    @property
    def is_legal(self) -> bool:
        return self.legality != ILLEGAL

    @property
    def is_raw(self) -> bool:
        """Whether the guest's bytes follow each other on the storage, encrypted or not."""
        return self.format in (RAW, LUKS)

    @property
    def overhead(self) -> int:
        """Bytes of a raw volume in front of the guest's."""
        return luks.PAYLOAD if self.format == LUKS else 0

    def with_(self, **changes: object) -> VolumeMetadata:
        """A copy with some fields changed."""
        return replace(self, **changes)  # type: ignore[arg-type]

    def next_generation(self) -> VolumeMetadata:
        """A copy with the generation counted up."""
        return replace(self, generation=(self.generation + 1) % GENERATIONS)

    def encode(self, version: int, volume: str = "?") -> bytes:
        """The text for a domain of `version`.  Raises MetadataOverflow (756), naming `volume`."""
        values: dict[str, object] = {key: getattr(self, name) for key, name in _TEXT_KEYS.items()}
        values["DESCRIPTION"] = clean_description(self.description)
        values["CTIME"] = self.ctime
        values["GEN"] = self.generation % GENERATIONS
        if version >= 5:
            values["CAP"] = self.capacity
            values["SEQ"] = self.sequence
        else:
            values["SIZE"] = self.capacity // SECTOR
            values["MTIME"] = 0
        lines = [f"{key}={values[key]}\n" for key in sorted(values)]
        data = "".join([*lines, "EOF\n"]).encode("utf-8", "replace")
        if len(data) > TEXT_LIMIT:
            raise MetadataOverflow(volume=volume, size=len(data), limit=TEXT_LIMIT)
        return data

    def encode_slot(self, version: int, volume: str = "?") -> bytes:
        """The text padded with NULs to a block domain's slot."""
        return self.encode(version, volume).ljust(TEXT_LIMIT, b"\0")

    def as_dump(self) -> dict[str, object]:
        """The fields as StorageDomain.dump shows them: numbers stay numbers."""
        fields = {name: getattr(self, name) for name in _DUMP_FIELDS if name != "domain"}
        return _dump_order({**fields, "format": known_format(self.format)})


_DUMP_FIELDS = (
    "domain",
    "image",
    "parent",
    "capacity",
    "format",
    "type",
    "voltype",
    "disktype",
    "description",
    "legality",
    "ctime",
    "generation",
    "sequence",
)


def known_format(found: str) -> str:
    """As callers know it."""
    return RAW if found == LUKS else found


def new_ctime() -> int:
    """The creation time of a volume made now."""
    return int(time.time())


def clean_description(text: str) -> str:
    """What is stored of a description: its first 210 characters, on one line."""
    cut = text[:DESCRIPTION_LIMIT]
    return "".join(" " if char in "\r\n\0" else char for char in cut)


@dataclass(frozen=True)
class Parsed:
    """What a tolerant reading gave: the fields that could be read, and what was wrong."""

    fields: Mapping[str, object]
    errors: tuple[str, ...]
    cleared: bool = False

    def as_dump(self) -> dict[str, object]:
        """The fields for StorageDomain.dump, which also shows volumes that cannot be used."""
        fields = {k: v for k, v in self.fields.items() if k != "domain"}
        if "format" in fields:
            fields["format"] = known_format(str(fields["format"]))
        return _dump_order(fields)


def decode(data: bytes, volume: str = "?") -> VolumeMetadata:
    """Read the text or slot of `volume`.

    Raises MetadataCleared (757), or VolumeMetadataReadError (207) with everything that is wrong.
    """
    parsed = parse(data)
    if parsed.cleared:
        raise MetadataCleared(volume=volume)
    if parsed.errors:
        raise VolumeMetadataReadError(volume=volume, reason="; ".join(parsed.errors))
    return VolumeMetadata(**parsed.fields)  # type: ignore[arg-type]


def parse(data: bytes) -> Parsed:
    """Read what can be read.

    The rules are those of the ecosystem's readers: stop at a line that starts with EOF, skip what
    is no `KEY=value` or no UTF-8, strip keys and values, the last of two equal keys counts, keys
    nobody knows are dropped, GEN and SEQ may be missing.
    """
    text = data.rstrip(b"\0")
    if not text:
        return Parsed({}, ("the metadata is empty",), cleared=True)
    raw, errors = _lines(text)
    if CLEARED_KEY.decode() in raw:
        return Parsed({}, ("the metadata was cleared",), cleared=True)
    fields: dict[str, object] = {}
    for key, name in _TEXT_KEYS.items():
        if key in raw:
            fields[name] = raw[key]
        else:
            errors.append(f"{key} is missing")
    capacity_key = "CAP" if "CAP" in raw or "SIZE" not in raw else "SIZE"
    numbers = {
        capacity_key: ("capacity", None),
        "CTIME": ("ctime", None),
        "GEN": ("generation", 0),
        "SEQ": ("sequence", 0),
    }
    for key, (name, default) in numbers.items():
        value = _number(raw, key, default, errors)
        if value is not None:
            fields[name] = value * SECTOR if key == "SIZE" else value
    return Parsed(_dump_order(fields), tuple(errors))


def _lines(text: bytes) -> tuple[dict[str, str], list[str]]:
    """Keys and values, and what was wrong; sound text is read at once, it is read often."""
    try:
        lines = text.decode("utf-8")
    except UnicodeDecodeError:
        return _damaged_lines(text)
    found: dict[str, str] = {}
    for line in lines.replace("\r", "\n").split("\n"):
        key, equal, value = line.partition("=")
        if line.startswith("EOF"):
            break
        if equal:
            found[key.strip()] = value.strip()
    return found, []


def _damaged_lines(text: bytes) -> tuple[dict[str, str], list[str]]:
    """The same line by line, for text that is no UTF-8 somewhere."""
    raw: dict[str, str] = {}
    errors: list[str] = []
    for line in text.splitlines():
        if line.startswith(b"EOF"):
            break
        if b"=" not in line:
            continue
        try:
            key, _, value = line.decode("utf-8").partition("=")
        except UnicodeDecodeError as error:
            errors.append(f"line {line!r} is not UTF-8 ({error.reason})")
            continue
        raw[key.strip()] = value.strip()
    return raw, errors


def _number(
    raw: Mapping[str, str], key: str, default: int | None, errors: list[str]
) -> int | None:
    if key not in raw:
        if default is None:
            errors.append(f"{key} is missing")
        return default
    try:
        return int(raw[key])
    except ValueError:
        errors.append(f"{key} is no number: {raw[key]!r}")
        return None


def _dump_order(fields: Mapping[str, object]) -> dict[str, object]:
    return {name: fields[name] for name in _DUMP_FIELDS if name in fields}
