# SPDX-License-Identifier: GPL-2.0-or-later
"""A block domain's metadata as tags of its volume group.

    MDT_DESCRIPTION=my&32&domain   MDT_ROLE=Regular   ...   MDT__SHA_CKSUM=<SHA-1 of all others>

The keys and the checksum over the decoded lines are those of `metadata`.  What LVM does not take
in a tag is written as `&<code point>&`.  LVM keeps tags in no order, and other tags beside them
say what the volume group is.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final

from vdsm_storage.domains import metadata as md
from vdsm_storage.errors import InvalidDomainMetadata

READY: Final = "RHAT_storage_domain"  # a volume group that holds a whole domain
UNREADY: Final = "RHAT_storage_domain_UNREADY"  # one that shall become a domain
PREFIX: Final = "MDT_"
# LVM's manual allows 1024 characters, its tools check nothing (60,000 work with 2.03.16).  A pool
# of more than 21 domains needs more than 1024 in POOL_DOMAINS, so only the absurd is refused.
TAG_LIMIT: Final = 32768

_FORBIDDEN = re.compile(r"[^a-zA-Z0-9_+.\-/=!:#]")
_ENCODED = re.compile(r"&([0-9]+)&")
_KEY = re.compile(r"[A-Za-z0-9_]+")
_PV_KEY = re.compile(r"PV([0-9]+)")
_PV_VALUE = re.compile(
    r"pv:(?P<guid>[^,]*),uuid:(?P<uuid>[^,]*),pestart:(?P<pestart>[0-9]+)"
    r",pecount:(?P<pecount>[0-9]+),mapoffset:(?P<mapoffset>[0-9]+)"
)


def is_domain(tags: Iterable[str]) -> bool:
    """Whether a volume group with these tags is a complete storage domain."""
    return READY in tags


def version(tags: Iterable[str]) -> int | None:
    """The version of the domain's format, unchecked; None where no tag tells."""
    key = f"{PREFIX}VERSION="
    found = [tag.removeprefix(key) for tag in tags if tag.startswith(key)]
    return int(found[0]) if len(found) == 1 and re.fullmatch(r"[0-9]{1,3}", found[0]) else None


# -- one tag ---------------------------------------------------------------------------------


def encode_value(text: str) -> str:
    """`text` with every character that no tag may hold as `&<decimal code point>&`."""
    return _FORBIDDEN.sub(lambda found: f"&{ord(found.group())}&", text)


def decode_value(text: str) -> str:
    """The reverse, in one pass from the left; what is no encoded character stands for itself."""
    return _ENCODED.sub(_decode_character, text)


def _decode_character(found: re.Match[str]) -> str:
    digits = found.group(1)
    code = int(digits) if len(digits) < 20 else sys.maxunicode + 1
    if code > sys.maxunicode or 0xD800 <= code < 0xE000:
        return found.group()  # no character has this number
    return chr(code)


def _encode_line(key: str, value: str, where: str) -> str:
    if not _KEY.fullmatch(key):
        raise InvalidDomainMetadata(domain=where, reason=f"the key {key!r}")
    if any(ord(c) < 32 or 0xD800 <= ord(c) < 0xE000 for c in value):
        reason = f"{key} holds a control character or half a surrogate pair: {value!r}"
        raise InvalidDomainMetadata(domain=where, reason=reason)
    tag = f"{PREFIX}{key}={encode_value(value)}"
    if len(tag) > TAG_LIMIT:
        reason = f"{key} makes a tag of {len(tag)} characters, {TAG_LIMIT} are the limit"
        raise InvalidDomainMetadata(domain=where, reason=reason)
    return tag


# -- all tags of a domain --------------------------------------------------------------------


def decode_tags(tags: Iterable[str], where: str) -> dict[str, str]:
    """The metadata, without its checksum; `where` names the domain in errors.

    A missing checksum is accepted with a warning, a wrong one is MetadataSealBroken (752).
    """
    return md.unseal(_lines(tags).values(), where)


def encode_tags(values: Mapping[str, str]) -> frozenset[str]:
    """Every tag, the one with the checksum too.

    Raises InvalidDomainMetadata (751) for what tags cannot hold.
    """
    return frozenset(_encoded(values).values())


def changes(
    old_tags: Iterable[str], values: Mapping[str, str]
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """(tags to add, tags to remove), sorted: what turns the old metadata into `values`.

    Both belong in one command of lvm; a tag that stays as it is appears in neither, however it
    is spelled.  Tags that are no metadata are left alone.
    """
    old = _lines(old_tags)
    new = _encoded(values)
    present = set(old.values())
    add = [tag for line, tag in new.items() if line not in present]
    remove = [tag for tag, line in old.items() if line not in new]
    return tuple(sorted(add)), tuple(sorted(remove))


def _lines(tags: Iterable[str]) -> dict[str, str]:
    """{tag: its decoded line} of the tags that are metadata."""
    return {tag: decode_value(tag[len(PREFIX) :]) for tag in tags if tag.startswith(PREFIX)}


def _encoded(values: Mapping[str, str]) -> dict[str, str]:
    """{decoded line: its tag}, the checksum among them."""
    where = values.get("SDUUID", "?")
    sealed = {**values, md.CHECKSUM: md.checksum(values)}
    return {f"{key}={value}": _encode_line(key, value, where) for key, value in sealed.items()}


# -- the physical volumes that a domain remembers --------------------------------------------


@dataclass(frozen=True)
class PvRecord:
    """One device of the domain: the base name of its path, LVM's uuid, its extents, and how many
    extents the devices before it have.
    """

    guid: str
    uuid: str
    pecount: int
    mapoffset: int

    @property
    def value(self) -> str:
        return (
            f"pv:{self.guid},uuid:{self.uuid},pestart:0"
            f",pecount:{self.pecount},mapoffset:{self.mapoffset}"
        )


def pv_value(guid: str, uuid: str, pecount: int, mapoffset: int) -> str:
    """The value of a key PVn."""
    return PvRecord(guid, uuid, pecount, mapoffset).value


def parse_pv(value: str, where: str = "?") -> PvRecord:
    """The reverse.  Raises InvalidDomainMetadata (751), naming the domain `where`."""
    found = _PV_VALUE.fullmatch(value)
    if found is None:
        raise InvalidDomainMetadata(domain=where, reason=f"{value!r} describes no device")
    return PvRecord(found["guid"], found["uuid"], int(found["pecount"]), int(found["mapoffset"]))


def physical_volumes(values: Mapping[str, str]) -> list[PvRecord]:
    """The devices in their order: the first one holds the `metadata` volume."""
    where = values.get("SDUUID", "?")
    numbered = sorted(
        (int(found.group(1)), key)
        for key in values
        if (found := _PV_KEY.fullmatch(key)) is not None
    )
    return [parse_pv(values[key], where) for _, key in numbered]


def pv_changes(
    values: Mapping[str, str], devices: Iterable[tuple[str, str, int]]
) -> dict[str, str | None]:
    """What a domain's keys PVn must become for `devices` of (guid, uuid, extents), in order.

    For DomainMetadata.with_changes: keys that the domain has no device for any more are None.
    """
    found: dict[str, str | None] = {key: None for key in values if _PV_KEY.fullmatch(key)}
    offset = 0
    for number, (guid, uuid, pecount) in enumerate(devices):
        found[f"PV{number}"] = pv_value(guid, uuid, pecount, offset)
        offset += pecount
    return found
