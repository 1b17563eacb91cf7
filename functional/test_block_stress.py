# SPDX-License-Identifier: GPL-2.0-or-later
"""Three hosts change one block domain at once, and die at it.

Only the leases on the LUNs keep the hosts apart: each has its own sanlock, host id, LVM directory
and stand-in for device-mapper.  After every round an independent checker looks at the devices:
nothing is in two places, everything is well-formed, and nothing is lost that was answered as done.

It takes two minutes in CI, and up to two more where the machine is too slow to make 2,000 changes
in them; VDSM_STORAGE_STRESS_SECONDS makes it longer, VDSM_STORAGE_STRESS_SEED repeats the choices
of a run (not its timing).
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

import pytest

from functional.block_chaos import Keeper
from functional.block_hosts import (
    BLANK,
    COW,
    EXTENT,
    MIB,
    PATIENCE,
    SPARSE,
    Cluster,
    Host,
    new_id,
    wait_for,
)
from functional.block_load import Book, Disk, Worker
from functional.checker.check import Promised, inspect
from functional.checker.group import read_group
from functional.processes import AgentProcess
from functional.standin.process import StandInProcess
from functional.walk import STEPS
from vdsm_storage.rpc.client import RemoteError

SECONDS: Final = float(os.environ.get("VDSM_STORAGE_STRESS_SECONDS", "120"))
CHANGES: Final = 2000  # answered as done
SEED: Final = int(os.environ.get("VDSM_STORAGE_STRESS_SEED", "0")) or random.randrange(1, 10**6)
ROUND: Final = 30.0  # seconds
HOSTS: Final = 3
WORKERS: Final = 4  # a host
KINDS: Final = (
    "volume.create", "volume.delete", "volume.extend", "image.delete", "lease.create",
    "lease.delete",
)  # fmt: skip
IO_TIMEOUT: Final = 2  # seconds
DEAD: Final = 8 * IO_TIMEOUT + 60  # seconds after which sanlock takes a host for dead
# Steps at which a host stops; making a volume writes to the group, a slot and a lease after them.
STOPS: Final = ("made", "formatted") if SECONDS > 300 else ("made",)
VERBS: Final = ("Volume.create", "Volume.extendSize", "Volume.setDescription", "Image.delete")
SETTINGS: Final = {
    "sanlock__io_timeout": str(IO_TIMEOUT),
    "storage__lock_timeout": "10",
    "storage__user": "root",
    "storage__group": "root",
}


def crash_points() -> list[str]:
    return [f"{kind}:{step}" for kind in KINDS for step in STEPS[kind]]


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
        for sanlock in (True, False):  # of a test that failed
            with contextlib.suppress(OSError):
                host.signal(signal.SIGCONT, sanlock)
        host.client.close()


@pytest.fixture(scope="module")
def book() -> Book:
    return Book()


def look(cluster: Cluster, book: Book) -> list[str]:
    """What is wrong, with nothing going on; what was in doubt is known afterwards."""
    found = inspect(cluster.luns, cluster.domain, book.expected())
    return found.problems + book.resolve(found)


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


# -- a host that stops while it has the lease -------------------------------------------------


class Creation(threading.Thread):
    """A volume that is made by a host; `outcome` is 0, an error's number, or -1 for no answer."""

    def __init__(self, cluster: Cluster, host: Host) -> None:
        super().__init__()
        self.image, self.volume = new_id(), new_id()
        self._cluster = cluster
        self._host = host
        self.outcome: int | None = None
        self.start()

    def run(self) -> None:
        try:
            self.outcome = self._host.task(
                "Volume.create", **self._cluster.ids(self.image, self.volume), size=str(EXTENT),
                volFormat=COW, preallocate=SPARSE, diskType="DATA", desc="stop",
                srcImgUUID=BLANK, srcVolUUID=BLANK,
            )  # fmt: skip
        except RemoteError as error:
            self.outcome = error.code

    def record(self, book: Book) -> None:
        """What was answered."""
        promised = Promised(self.image, EXTENT, EXTENT, "COW", BLANK, "stop", 0)
        disk = Disk(self.image, {self.volume: promised})
        if self.outcome != 0:
            book.doubt(disk, self.volume)
        book.put(disk)


def shared_state(cluster: Cluster) -> list[bytes | str]:
    """All that only the holder of the lease may change: the group's text, slots, the index of
    leases, the leases of volumes."""
    wrong: list[str] = []
    group = read_group(cluster.luns, cluster.domain, wrong)
    assert group is not None, wrong
    return [
        repr(group),
        group.read("metadata", 0, 17 * MIB),
        group.read("xleases", MIB, 256 * 1024),
        *(group.read("leases", (101 + slot) * MIB, 512) for slot in range(600)),
    ]


@pytest.mark.slow
@pytest.mark.sanlock
@pytest.mark.timeout(600)
@pytest.mark.parametrize("step", STOPS)
def test_a_host_stops_past_the_life_of_its_lease(cluster: Cluster, book: Book, step: str) -> None:
    """The next host goes on after sanlock's time-out; the first one, when it wakes, writes nothing
    under the lease that it had."""
    first, second, third = cluster.hosts
    cluster.revive(first, f"stop volume.create:{step}")
    stopped = Creation(cluster, first)
    wait_for(first.is_stopped, "the first host to stop")
    first.signal(signal.SIGSTOP, sanlock=True)
    began = time.monotonic()

    # Nobody gets the lease before its time is over, and then somebody does.
    cluster.revive(second, f"stop volume.create:{step}")
    refused = 0
    while not second.is_stopped():
        waiting = Creation(cluster, second)
        wait_for(lambda w=waiting: w.outcome is not None or second.is_stopped(), "the lease")
        if waiting.outcome is not None:
            assert waiting.outcome == 654, "the lease was not respected"
            refused += 1
    waited = time.monotonic() - began
    # It was renewed the last time before the host stopped.
    assert DEAD - 3 * IO_TIMEOUT < waited < DEAD + 40, f"the lease was free after {waited:.0f} s"
    assert refused > 0

    # The second host has it while it is stopped, for its sanlock goes on: whatever the first one
    # writes now, it writes without a lease.
    stood = time.monotonic()
    before = shared_state(cluster)
    first.signal(signal.SIGCONT)
    time.sleep(1.0)  # the agent first: its sanlock cannot tell it yet
    assert shared_state(cluster) == before
    first.signal(signal.SIGCONT, sanlock=True)
    time.sleep(2.0 * IO_TIMEOUT)
    assert shared_state(cluster) == before

    second.signal(signal.SIGCONT)
    stood = time.monotonic() - stood
    for creation in (stopped, waiting):
        wait_for(lambda c=creation: c.outcome is not None, "an answer")
        creation.record(book)
    # One that stood still for six I/O time-outs does not go on with what it was at.
    assert waiting.outcome == 0 or (stood > 4 * IO_TIMEOUT and waiting.outcome == 651), stood
    for host in (first, second, third):
        cluster.revive(host)
    assert look(cluster, book) == []
    say(book, f"stopped at {step} for {waited:.0f} s; answered then: {stopped.outcome}")


# -- all at once -------------------------------------------------------------------------------


def say(book: Book, *words: object) -> None:
    answers = {host: dict(codes) for host, codes in book.by_host().items()}
    print(*words, "done:", dict(book.done()), "answers by host:", answers, "disks:", book.disks,
          file=sys.stderr, flush=True)  # fmt: skip


@pytest.mark.slow
@pytest.mark.sanlock
@pytest.mark.timeout(SECONDS * 3 + 300)
def test_changes_from_all_hosts_while_they_die(cluster: Cluster, book: Book) -> None:
    points = crash_points()
    chance = random.Random(SEED)
    began = time.monotonic()
    say(book, "seed", SEED)
    first, deaths = True, []
    while (spent := time.monotonic() - began) < 2 * SECONDS:
        if spent > SECONDS and book.done().total() >= CHANGES:
            break
        deaths += work(cluster, book, ROUND, chance.randrange(10**6), [] if first else points)
        say(book, "round:", deaths)
        assert look(cluster, book) == [], f"seed {SEED}"
        assert book.problems == [], f"seed {SEED}"
        first = False
    # It was worth its while: every kind of change by every host, and deaths at named steps.
    made = {(host, verb) for (host, verb, code), _ in book.answers.items() if code == 0}
    assert {(host.id, verb) for host in cluster.hosts for verb in VERBS} <= made
    assert sum(":" in death for death in deaths) >= 3
