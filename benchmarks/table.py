# SPDX-License-Identifier: GPL-2.0-or-later
"""Promises that are measured against bare work in the same run, how that is done, and the table of
them that is printed."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

ROUNDS = 9  # of a measurement
TRIES = 3  # times that many rounds, while a promise is not kept


@dataclass
class Row:
    """One promise at one number of things.

    `ours` and `against` are median milliseconds, for information.
    """

    name: str
    count: int
    value: float
    limit: float | None
    at_least: bool = False
    ours: float = 0.0
    against: float = 0.0

    @property
    def kept(self) -> bool:
        if self.limit is None:
            return True
        return self.value >= self.limit if self.at_least else self.value <= self.limit


def low(seconds: Sequence[float]) -> float:
    """The mean of the shortest third: what else runs here only adds time."""
    return statistics.mean(sorted(seconds)[: max(1, len(seconds) // 3)])


def wall(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


@dataclass
class Table:
    rows: list[Row] = field(default_factory=list)

    def compare(
        self,
        row: Row,
        ours: Callable[[], float],
        against: Callable[[], float],
        repeat: int = 1,
    ) -> Row:
        """Both give seconds, and alternate; `repeat` looks of ours are one measurement."""
        mine: list[float] = []
        bare: list[float] = []
        for _ in range(TRIES):
            for _ in range(ROUNDS):
                mine += [ours() for _ in range(repeat)]
                bare.append(against())
            row.value = min(bare) / min(mine) if row.at_least else low(mine) / low(bare)
            if row.kept:
                break
        row.ours = statistics.median(mine) * 1000
        row.against = statistics.median(bare) * 1000
        self.add(row)
        return row

    def add(self, row: Row) -> None:
        self.rows.append(row)
        if "-v" in sys.argv:
            print(asdict(row), file=sys.stderr, flush=True)


def options() -> argparse.Namespace:
    """Of the command line: `quick`, `json`; -v tells each row when it is known."""
    parser = argparse.ArgumentParser()
    for option in ("--quick", "--json", "-v"):
        parser.add_argument(option, action="store_true")
    return parser.parse_args()


@contextlib.contextmanager
def directory() -> Iterator[Path]:
    """One that others may enter, for all that a benchmark makes."""
    place = os.environ.get("TMPDIR", "/var/tmp")
    made = Path(tempfile.mkdtemp(prefix="vb", dir=place))
    made.chmod(0o755)
    try:
        yield made
    finally:
        shutil.rmtree(made)


def conclude(rows: Sequence[Row], remarks: Sequence[str], as_json: bool) -> int:
    """Print all; the exit code, which is 1 when a promise was not kept."""
    if as_json:
        measures = [{**asdict(row), "ok": row.kept} for row in rows]
        print(json.dumps({"measures": measures, "remarks": remarks}, indent=1))
    else:
        show(rows)
        print(*remarks, sep="\n")
    return 0 if all(row.kept for row in rows) else 1


def show(rows: Sequence[Row]) -> None:
    """A line a promise."""
    for row in rows:
        sign = ">=" if row.at_least else "<="
        limit = f"{sign} {row.limit:<5g}" if row.limit is not None else " " * 8
        mark = "" if row.limit is None else "ok" if row.kept else "NOT KEPT"
        times = f"{row.ours:10.2f} ms / {row.against:8.2f} ms" if row.against else ""
        print(f"{row.count:6,}  {row.name:46} {row.value:8.2f} {limit} {mark:8} {times}")
