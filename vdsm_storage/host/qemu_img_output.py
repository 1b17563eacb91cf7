# SPDX-License-Identifier: GPL-2.0-or-later
"""What qemu-img prints, as values: pure parsers, each showing what version 7.2 prints."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any

from vdsm_storage.errors import CommandError

_PERCENT = re.compile(rb"\((\d+\.\d+)/100%\)")


@dataclass(frozen=True)
class Bitmap:
    name: str
    granularity: int
    flags: tuple[str, ...]  # auto: enabled; in-use: inconsistent, was not closed cleanly

    @property
    def enabled(self) -> bool:
        return "auto" in self.flags

    @property
    def valid(self) -> bool:
        return "in-use" not in self.flags


@dataclass(frozen=True)
class Info:
    """`qemu-img info` of one layer.  `allocated` is what the file takes from its file system."""

    format: str
    virtual_size: int
    allocated: int
    cluster_size: int | None
    backing: str | None
    backing_format: str | None
    compat: str | None
    bitmaps: tuple[Bitmap, ...]
    data_file: str | None
    encrypted: bool
    corrupt: bool
    snapshots: int


@dataclass(frozen=True)
class Measure:
    """Bytes a target file needs; `bitmaps` come on top of `required`."""

    required: int
    fully_allocated: int
    bitmaps: int


@dataclass(frozen=True)
class Check:
    """`end` is the offset behind the last cluster in use (what a logical volume must hold)."""

    end: int | None
    errors: int
    corruptions: int
    leaks: int


@dataclass(frozen=True)
class Extent:
    """A range of the guest's bytes.  `offset` is where the layer's file has them; None for holes,
    zeros and compressed clusters."""

    start: int
    length: int
    depth: int
    present: bool
    zero: bool
    data: bool
    offset: int | None = None


def parse_info(output: bytes) -> Info:
    """{"virtual-size": 4194304, "filename": "top", "cluster-size": 65536, "format": "qcow2",
    "actual-size": 1413120, "format-specific": {"type": "qcow2", "data": {"compat": "1.1",
    "bitmaps": [{"flags": ["auto"], "name": "1111..", "granularity": 65536}], "corrupt": false}},
    "backing-filename-format": "raw", "full-backing-filename": "base", "backing-filename": "base"}
    """
    try:
        return _info(json.loads(output))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise _unreadable("info", error) from error


def parse_chain(output: bytes) -> list[Info]:
    """[{as parse_info}, ...], the top layer first."""
    try:
        return [_info(layer) for layer in json.loads(output)]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise _unreadable("info", error) from error


def _info(data: dict[str, Any]) -> Info:
    special = data.get("format-specific", {}).get("data", {})
    return Info(
        format=data["format"],
        virtual_size=data["virtual-size"],
        allocated=data.get("actual-size", 0),
        cluster_size=data.get("cluster-size"),
        backing=data.get("backing-filename"),
        backing_format=data.get("backing-filename-format"),
        compat=special.get("compat"),
        bitmaps=tuple(
            Bitmap(b["name"], b["granularity"], tuple(b["flags"]))
            for b in special.get("bitmaps", ())
        ),
        data_file=special.get("data-file"),
        encrypted=bool(data.get("encrypted", False)),
        corrupt=bool(special.get("corrupt", False)),
        snapshots=len(data.get("snapshots", ())),
    )


def parse_measure(output: bytes) -> Measure:
    """{"bitmaps": 327680, "required": 1376256, "fully-allocated": 4521984}"""
    try:
        data = json.loads(output)
        return Measure(data["required"], data["fully-allocated"], data.get("bitmaps", 0))
    except (ValueError, KeyError, TypeError) as error:
        raise _unreadable("measure", error) from error


def parse_check(output: bytes) -> Check:
    """{"image-end-offset": 262144, "total-clusters": 16384, "corruptions": 3, "check-errors": 0,
    "leaks": 1, "filename": "old", "format": "qcow2"}; lines on defects go to stderr.
    """
    try:
        data = json.loads(output)
        return Check(
            end=data.get("image-end-offset"),
            errors=data.get("check-errors", 0),
            corruptions=data.get("corruptions", 0),
            leaks=data.get("leaks", 0),
        )
    except (ValueError, TypeError, AttributeError) as error:
        raise _unreadable("check", error) from error


def parse_map(output: bytes) -> list[Extent]:
    """[{"start": 0, "length": 1048576, "depth": 0, "present": true, "zero": false, "data": true,
    "offset": 589824}, {"start": 1048576, "length": 3145728, "depth": 0, "present": false, ...}]
    """
    keys = ("start", "length", "depth", "present", "zero", "data")
    try:
        return [
            Extent(**{key: extent[key] for key in keys}, offset=extent.get("offset"))
            for extent in json.loads(output)
        ]
    except (ValueError, KeyError, TypeError) as error:
        raise _unreadable("map", error) from error


def parse_progress(tail: bytes) -> float | None:
    r"""The last whole report of `    (12.50/100%)\r    (25.00/100%)\r`, as 0.0 to 1.0."""
    found = _PERCENT.findall(tail)
    return min(1.0, float(found[-1]) / 100) if found else None


def _unreadable(subcommand: str, error: Exception) -> CommandError:
    return CommandError(
        program=f"qemu-img {subcommand}",
        status="output not understood",
        stderr=f"{type(error).__name__}: {error}",
    )
