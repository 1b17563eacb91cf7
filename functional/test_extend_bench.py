# SPDX-License-Identifier: GPL-2.0-or-later
"""The benchmark of growing volumes measures what it says that it does; never how fast it is."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from functional.lab.guest import why_not
from functional.standin.process import ROOT

VOLUMES = (10, 60)
DISKS = 50
ROUNDS = 3
TIMEOUT = 600.0  # seconds; 90 on a quiet machine

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]


@pytest.fixture(scope="module")
def found(workdir: Path) -> dict[str, Any]:
    """What it wrote; it may have found that a promise is not kept, on a machine that is busy."""
    if reason := why_not():
        pytest.skip(reason)
    file = workdir / "found.json"
    done = subprocess.run(
        [sys.executable, "-P", str(ROOT / "benchmarks" / "extend.py"), "--quick",
         "--lun", str(workdir), "--json", str(file)],
        env={**os.environ, "TMPDIR": str(workdir)}, capture_output=True, text=True,
        timeout=TIMEOUT, check=False,
    )  # fmt: skip
    assert file.exists(), done.stderr
    assert [each.name for each in workdir.iterdir()] == [file.name]
    assert done.returncode == (0 if all(row["ok"] for row in measures(file)) else 1)
    text: dict[str, Any] = json.loads(file.read_text())
    return text


def measures(file: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = json.loads(file.read_text())["measures"]
    return rows


def test_times(found: dict[str, Any]) -> None:
    times = {(each["volumes"], each["what"]): each for each in found["times"]}
    for count in VOLUMES:
        mine = [each for (volumes, _), each in times.items() if volumes == count]
        singles = [each for each in mine if not each["what"].startswith("50")]
        assert [each["times"] for each in singles] == 4 * [ROUNDS]
        assert all(0 < each["p50"] <= each["p99"] <= each["max"] for each in mine)
        event = times[count, "one disk, a guest's, from libvirt's event"]
        assert event["max"] < times[count, "the same, from the guest's write"]["max"]
    storms = [each for each in found["times"] if each["what"].startswith("50")]
    assert [(each["volumes"], each["times"]) for each in storms] == [(60, DISKS)]


def test_promises(found: dict[str, Any]) -> None:
    names = {(row["count"], row["name"]): row["limit"] for row in found["measures"]}
    for count in VOLUMES:
        for disk in ("a guest's disk", "a disk, event told"):
            assert names[count, f"{disk}: p50 / bare p50"] == 1.5
            assert names[count, f"{disk}: p99 / bare p99"] == 3
    for kind in ("fixed", "adaptive, idle"):
        assert names[60, f"headroom, {kind} / W x 1.39 s"] == 0.2
    assert names[1000, "memory of a watched disk, KiB, traced"] == 4
    assert names[100, "CPU of idle disks, % of a core"] == 0.1


def test_what_does_not_depend_on_time(found: dict[str, Any]) -> None:
    values = {row["name"]: row["value"] for row in found["measures"]}
    assert 0 < values["memory of a watched disk, KiB, traced"] < 4
    assert values.get("system calls in a look at them, for a disk", 0) < 0.1
    (commits,) = (text for text in found["remarks"] if "commits" in text)
    assert int(commits.split(" are ")[1].split()[0]) <= 5, commits


def test_disks_that_are_written_at_many_rates(found: dict[str, Any]) -> None:
    """None meets the end of its volume where it is promised not to, through many extensions."""
    (row,) = (each for each in found["measures"] if each["name"].startswith("extensions,"))
    assert (row["value"], row["limit"]) == (0, 0), found["remarks"]
    assert row["count"] > 50
    rates = [text for text in found["remarks"] if text.startswith("a disk written at")]
    assert len(rates) == 7
    assert all(text.endswith("ms, promised") for text in rates[:3]), rates
    assert not any(" 0 extensions" in text for text in rates), rates
