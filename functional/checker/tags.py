# SPDX-License-Identifier: GPL-2.0-or-later
"""The metadata of a block domain: the tags of its volume group."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping
from typing import Final

from functional.checker.group import Group

DOMAIN: Final = "RHAT_storage_domain"
UNREADY: Final = "RHAT_storage_domain_UNREADY"
PREFIX: Final = "MDT_"
CHECKSUM: Final = "_SHA_CKSUM"
ALLOWED: Final = re.compile(r"[a-zA-Z0-9_+.\-/=!:#&]*")
NEEDED: Final = (
    "CLASS", "DESCRIPTION", "IOOPTIMEOUTSEC", "LEASERETRIES", "LEASETIMESEC", "LOCKPOLICY",
    "LOCKRENEWALINTERVALSEC", "POOL_UUID", "PV0", "ROLE", "SDUUID", "TYPE", "VERSION", "VGUUID",
)  # fmt: skip
BY_VERSION: Final[Mapping[bool, tuple[str, ...]]] = {
    True: ("ALIGNMENT", "BLOCK_SIZE"),  # from version 5 on
    False: ("LOGBLKSIZE", "PHYBLKSIZE"),
}
VALUES: Final[Mapping[str, str]] = {
    "CLASS": "Data|Iso|Backup",
    "ROLE": "Regular|Master",
    "LOCKPOLICY": "|ON",
    "TYPE": "ISCSI|FCP",
    "VERSION": "[2345]",
    "BLOCK_SIZE": "512",
    "ALIGNMENT": "1048576",
    "POOL_UUID": "[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}|",
}


def decode(text: str) -> str:
    return re.sub(r"&(\d+)&", lambda found: chr(int(found[1])), text)


def checksum(values: Mapping[str, str]) -> str:
    lines = sorted(f"{key}={value}" for key, value in values.items() if key != CHECKSUM)
    digest = hashlib.sha1(usedforsecurity=False)
    for line in lines:
        digest.update(line.encode("ascii", "xmlcharrefreplace"))
    return digest.hexdigest()


def values_of(group: Group, problems: list[str]) -> dict[str, str]:
    """The domain's metadata by their keys."""
    values: dict[str, str] = {}
    if group.tags.count(DOMAIN) != 1 or UNREADY in group.tags:
        problems.append(f"the group is not marked as a domain: {group.tags}")
    if len(set(group.tags)) != len(group.tags):
        problems.append(f"a tag of the group is there twice: {group.tags}")
    for tag in group.tags:
        if not ALLOWED.fullmatch(tag):
            problems.append(f"tag {tag!r} has characters that LVM does not allow")
        if tag.startswith(PREFIX):
            key, sign, value = decode(tag.removeprefix(PREFIX)).partition("=")
            if not sign:
                problems.append(f"tag {tag} has no value")
            elif key in values:
                problems.append(f"{key} is in two tags of the group")
            else:
                values[key] = value
        elif tag not in (DOMAIN, UNREADY):
            problems.append(f"the group has a tag {tag}")
    return values


def check(group: Group, values: Mapping[str, str], sd_id: str) -> Iterator[str]:
    """What is wrong with a domain's metadata."""
    if values.get(CHECKSUM) != checksum(values):
        yield f"checksum {values.get(CHECKSUM)} of the domain's metadata, not {checksum(values)}"
    five = values.get("VERSION") == "5"
    for key in (*NEEDED, *BY_VERSION[five]):
        if key not in values:
            yield f"the domain's metadata have no {key}"
    for key in BY_VERSION[not five]:
        if key in values:
            yield f"the domain's metadata have {key}, which version {values['VERSION']} has not"
    for key, pattern in VALUES.items():
        if key in values and not re.fullmatch(pattern, values[key]):
            yield f"the domain's metadata have {key}={values[key]}"
    for key, wanted in (("SDUUID", sd_id), ("VGUUID", group.uuid)):
        if values.get(key) != wanted:
            yield f"the domain's metadata have {key}={values.get(key)}, not {wanted}"
    if values.get("ROLE") == "Master" and not values.get("POOL_UUID"):
        yield "the domain is a master without a pool"
    yield from _mapping(group, values)


def _mapping(group: Group, values: Mapping[str, str]) -> Iterator[str]:
    """PV0, PV1, ...: one a physical volume, the first that of the metadata."""
    numbers = sorted(int(key[2:]) for key in values if re.fullmatch(r"PV\d+", key))
    if numbers != list(range(len(group.pvs))):
        yield f"{len(group.pvs)} physical volumes, and the domain's metadata have PV{numbers}"
        return
    by_uuid = {pv.uuid: pv for pv in group.pvs.values()}
    offset = 0
    for number in numbers:
        row = values[f"PV{number}"]
        fields = dict(part.partition(":")[::2] for part in row.split(","))
        pv = by_uuid.pop(fields.get("uuid", ""), None)
        if pv is None:
            yield f"PV{number}={row} is no physical volume of the group"
            return
        want = {"pestart": "0", "pecount": str(pv.pe_count), "mapoffset": str(offset)}
        if {key: fields.get(key) for key in want} != want or not fields.get("pv"):
            yield f"PV{number}={row} does not fit {want}"
        offset += pv.pe_count
        first = group.lvs.get("metadata")
        if number == 0 and first and first.segments and first.segments[0].pv != pv.name:
            yield f"PV0={row} is not where the metadata are"
