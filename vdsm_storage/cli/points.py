# SPDX-License-Identifier: GPL-2.0-or-later
"""What the history of a thin disk says, for people: times of trouble, a summary, sizes in words."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

# Kinds of points (schema: ThinPointKind) that begin a span, by its name, and that end some.
BEGINS: Final[Mapping[str, str]] = {"paused": "paused", "throttled": "slowed", "full": "full"}
ENDS: Final[Mapping[str, str]] = {"resumed": "paused", "released": "slowed", "extended": "full"}

BYTE_UNITS: Final = (("TiB", 1 << 40), ("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10))
# (name, seconds, from how many seconds on it is taken)
TIME_UNITS: Final = (
    ("days", 86400.0, 5 * 86400.0), ("hours", 3600.0, 5 * 3600.0), ("minutes", 60.0, 300.0),
    ("seconds", 1.0, 0.0),
)  # fmt: skip


@dataclass(frozen=True)
class Row:
    """A point of the history, as numbers: seconds since the epoch, and bytes."""

    when: float
    written: int
    size: int
    limit: int
    what: str


@dataclass(frozen=True)
class Span:
    """From when to when a guest was paused, slowed or without space, in seconds since the epoch."""

    name: str
    start: float
    end: float


def rows_of(points: Sequence[Mapping[str, Any]]) -> list[Row]:
    """Points as VM.getThinHistory tells them (schema: ThinPoint), by time.  One alone is taken to
    have lasted for a second.  ValueError for none."""
    rows = sorted((_row(point) for point in points), key=lambda row: row.when)
    if not rows:
        raise ValueError("there are no points")
    if rows[0].when == rows[-1].when:
        rows.append(replace(rows[-1], when=rows[-1].when + 1.0, what="looked"))
    return rows


def _row(point: Mapping[str, Any]) -> Row:
    written, size, limit = (int(point[name]) for name in ("allocation", "size", "threshold"))
    return Row(float(point["when"]), written, size, limit, str(point["what"]))


def spans_of(rows: Sequence[Row]) -> list[Span]:
    """What has not ended goes on to the last point."""
    since: dict[str, float] = {}
    found: list[Span] = []
    for row in rows:
        name = ENDS.get(row.what)
        if name in since:
            found.append(Span(name, since.pop(name), row.when))
        if row.what in BEGINS:
            since.setdefault(BEGINS[row.what], row.when)
    return [*found, *(Span(name, start, rows[-1].when) for name, start in since.items())]


def summary(rows: Sequence[Row], spans: Sequence[Span]) -> str:
    """One line: how much was written how fast, and how it went."""
    pairs = itertools.pairwise(rows)
    grown = sum(max(0, after.written - before.written) for before, after in pairs)
    seconds = rows[-1].when - rows[0].when
    slowed = sum(span.end - span.start for span in spans if span.name == "slowed")
    words = [
        f"{bytes_text(grown)} written in {time_text(seconds)} ({bytes_text(grown / seconds)}/s)",
        _count("extension", sum(row.what == "extended" for row in rows)),
        _count("pause", sum(row.what == "paused" for row in rows)),
    ]
    return ", ".join([*words, f"slowed for {time_text(slowed)}"] if slowed else words)


def _count(what: str, number: int) -> str:
    return f"{number or 'no'} {what}{'' if number == 1 else 's'}"


def bytes_text(count: float) -> str:
    """
    >>> bytes_text(1536 * 1024), bytes_text(1000 * 1024), bytes_text(17)
    ('1.5 MiB', '1000 KiB', '17 B')
    """
    for name, factor in BYTE_UNITS:
        if count >= factor:
            return f"{_three(count / factor)} {name}"
    return f"{count:.0f} B"


def time_text(seconds: float) -> str:
    """
    >>> time_text(0.0125), time_text(299), time_text(5400)
    ('0.0125 s', '299 s', '90 minutes')
    """
    name, factor, _ = next(unit for unit in TIME_UNITS if seconds >= unit[2])
    return f"{_three(seconds / factor)} {'s' if factor == 1 else name}"


def _three(number: float) -> str:
    """Three digits, or all before the point."""
    return f"{number:.0f}" if number >= 999.5 else f"{number:.3g}"
