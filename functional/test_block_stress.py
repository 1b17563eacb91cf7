# SPDX-License-Identifier: GPL-2.0-or-later
"""Three hosts change one block domain at once, and die at it.

Only the leases on the LUNs keep the hosts apart: each has its own sanlock, host id, LVM directory
and stand-in for device-mapper.  After every round an independent checker looks at the devices:
nothing is in two places, everything is well-formed, and nothing is lost that was answered as done.

VDSM_STORAGE_STRESS_SECONDS makes it longer than the two minutes and a half that it takes in CI,
VDSM_STORAGE_STRESS_SEED repeats the choices of a run (not its timing).
"""

from __future__ import annotations

import os
import random
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

import pytest

from functional.block_chaos import Keeper
from functional.block_hosts import PATIENCE, Cluster, Host
from functional.block_load import Book, Worker
from functional.checker.check import check
from functional.checker.group import read_group
from functional.checker.leases import Reader, external
from functional.processes import AgentProcess
from functional.standin.process import StandInProcess
from vdsm_storage import config
from vdsm_storage.agent import Agent

SECONDS: Final = float(os.environ.get("VDSM_STORAGE_STRESS_SECONDS", "150"))
SEED: Final = int(os.environ.get("VDSM_STORAGE_STRESS_SEED", "0")) or random.randrange(1, 10**6)
ROUND: Final = 30.0  # seconds
HOSTS: Final = 3
WORKERS: Final = 4  # a host
KINDS: Final = (
    "volume.create", "volume.delete", "volume.extend", "image.delete", "lease.create",
    "lease.delete",
)  # fmt: skip
SETTINGS: Final = {
    "sanlock__io_timeout": "2",
    "storage__lock_timeout": "10",
    "storage__user": "root",
    "storage__group": "root",
}


def crash_points() -> list[str]:
    with tempfile.TemporaryDirectory() as directory:
        agent = Agent(config.dev(config.Config(), directory), dev=False)
        steps = {kind.name: kind.steps for kind in agent.kinds.values()}
    return [f"{kind}:{step}" for kind in KINDS for step in steps[kind]]


@pytest.fixture(scope="module")
def cluster(
    workdir: Path,
    make_luns: Callable[..., list[str]],
    make_standin: Callable[..., StandInProcess],
    start_agent: Callable[..., AgentProcess],
) -> Iterator[Cluster]:
    luns = make_luns(2, 600 * 1024**3)
    hosts = []
    for number in range(1, HOSTS + 1):
        standin = make_standin(f"s{number}", sync=False)
        settings = {**SETTINGS, "lvm__devices": ",".join(luns)}
        agent = start_agent(f"a{number}", tls=False, standin=standin, **settings)
        hosts.append(Host(number, agent, standin))
    yield Cluster(hosts, luns, workdir)
    for host in hosts:
        host.client.close()


@pytest.fixture(scope="module")
def book() -> Book:
    return Book()


def look(cluster: Cluster, book: Book) -> list[str]:
    """What is wrong, with nothing going on; what was in doubt is known afterwards."""
    problems = check(cluster.luns, cluster.domain, book.expected())
    wrong: list[str] = []
    group = read_group(cluster.luns, cluster.domain, wrong)
    assert group is not None, wrong
    leases, _ = external(group, cluster.domain, Reader(group, cluster.domain))
    return problems + book.resolve(group.lvs, leases)


def work(cluster: Cluster, book: Book, seconds: float, seed: int, points: list[str]) -> list[str]:
    """A round; how the agents died."""
    workers = [
        Worker(cluster, host, book, seed + 100 * host.id + number)
        for host in cluster.hosts
        for number in range(WORKERS)
    ]
    keepers = [Keeper(cluster, host, points, seed + host.id) for host in cluster.hosts]
    for thread in (*workers, *(keepers if points else ())):
        thread.start()
    time.sleep(seconds)
    for worker in workers:
        worker.stop.set()
    late = [worker for worker in workers if not worker.join(PATIENCE)]
    for keeper in keepers if points else ():
        keeper.stop()
    assert late == []
    for host in cluster.hosts:
        cluster.settle(host)
    return [f"{name} {count}" for k in keepers for name, count in k.deaths.items()]


def say(book: Book, *words: object) -> None:
    print(*words, dict(book.done), "answers:", {
        f"{verb} {code}": count for (verb, code), count in book.answers.items() if code
    }, "disks:", book.disks, file=sys.stderr)  # fmt: skip


@pytest.mark.slow
@pytest.mark.sanlock
@pytest.mark.timeout(SECONDS * 3 + 300)
def test_changes_from_all_hosts_while_they_die(cluster: Cluster, book: Book) -> None:
    points = crash_points()
    chance = random.Random(SEED)
    end = time.monotonic() + SECONDS
    say(book, "seed", SEED)
    first = True
    while time.monotonic() < end:
        deaths = work(cluster, book, ROUND, chance.randrange(10**6), [] if first else points)
        say(book, "round:", deaths)
        assert look(cluster, book) == [], f"seed {SEED}"
        assert book.problems == [], f"seed {SEED}"
        first = False
