# SPDX-License-Identifier: GPL-2.0-or-later
"""The text of a volume's metadata, in its slot of 512 bytes."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Final

SIZE: Final = 512
MIB: Final = 1024**2
UUID: Final = r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}"
NUMBER: Final = r"0|[1-9]\d*"
KEYS: Final[Mapping[str, str]] = {
    "CTIME": NUMBER,
    "DESCRIPTION": r"[^\n\0]{0,210}",
    "DISKTYPE": "DATA|ISOF|MEMD|MEMM|OVFS|HEVD|HESD|HEMD|HECI|SCRD|1|2",
    "DOMAIN": UUID,
    "FORMAT": "COW|RAW|LUKS",
    "GEN": r"\d{1,3}",
    "IMAGE": UUID,
    "LEGALITY": "LEGAL|ILLEGAL|FAKE",
    "PUUID": UUID,
    "TYPE": "SPARSE|PREALLOCATED",
    "VOLTYPE": "LEAF|INTERNAL|SHARED",
}
NEW: Final[Mapping[str, str]] = {"CAP": NUMBER, "SEQ": NUMBER}
OLD: Final[Mapping[str, str]] = {"SIZE": NUMBER, "MTIME": NUMBER}


def first(version: int) -> int:
    """The first slot that a volume may have."""
    return 1 if version >= 5 else 4


def offset(version: int, slot: int) -> int:
    """Where it is in the volume `metadata`."""
    return MIB + slot * 8192 if version >= 5 else slot * SIZE


def parse(data: bytes, version: int) -> tuple[dict[str, str], list[str]]:
    """The values, and what is wrong with a slot's text."""
    text, _, rest = data.partition(b"\0")
    problems = [] if not rest.strip(b"\0") else ["bytes follow the text"]
    if not text:
        return {}, ["it is empty"]
    try:
        lines = text.decode("utf-8").split("\n")
    except UnicodeDecodeError as error:
        return {}, [f"it is not UTF-8: {error}"]
    if lines[-2:] != ["EOF", ""]:
        return {}, [f"it does not end with EOF: {text[-40:]!r}"]
    values: dict[str, str] = {}
    for line in lines[:-2]:
        key, sign, value = line.partition("=")
        if not sign or key in values:
            problems.append(f"a bad line {line!r}")
        values[key] = value
    if list(values) != sorted(values):
        problems.append(f"its lines are not in order: {list(values)}")
    wanted = {**KEYS, **(NEW if version >= 5 else OLD)}
    problems += [f"it has no {key}" for key in sorted(wanted.keys() - values.keys())]
    for key, value in values.items():
        if key not in wanted:
            problems.append(f"it has a {key}")
        elif not re.fullmatch(wanted[key], value):
            problems.append(f"{key}={value}")
    return ({} if problems else values), problems


def capacity(values: Mapping[str, str]) -> int:
    """Bytes."""
    return int(values["CAP"]) if "CAP" in values else int(values["SIZE"]) * 512
