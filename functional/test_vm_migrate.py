# SPDX-License-Identifier: GPL-2.0-or-later
"""A VM moves to another host with its disks: two agents, two libvirtds, shared storage."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from functional.migrate_lab import Two, shared, two_hosts
from functional.processes import AgentProcess
from functional.vm_create import nothing_stays


@pytest.fixture(scope="module")
def workdir(workdir: Path) -> Iterator[Path]:
    with shared(workdir) as path:
        yield path


@pytest.fixture(scope="module")
def two(
    workdir: Path, start_agent: Callable[..., AgentProcess], make_server: Callable[[str], Any]
) -> Iterator[Two]:
    with two_hosts(workdir, start_agent, make_server, vms__arrival_timeout="5") as made:
        yield made


@pytest.fixture(autouse=True)
def let_go(two: Two) -> Iterator[None]:
    with nothing_stays(two.first), nothing_stays(two.second):
        yield


def test_it_moves_and_comes_back(two: Two) -> None:
    """The guest writes all the time; no number is lost, and each host keeps nothing of it."""
    machine = two.writer("counts")
    with nothing_stays(two.second):
        for source in two.both:
            two.ask(machine, source)
            found = two.has_moved(machine, source)
            assert found["downtime"] >= 0
            two.writes(machine)
    two.end(machine, two.first)
