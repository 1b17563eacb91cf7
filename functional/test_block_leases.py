# SPDX-License-Identifier: GPL-2.0-or-later
"""Hosts that lose their leases on LUNs in the middle of their work, and hosts that die there.

Whatever becomes of a host, once another one may have its lease it writes nothing more, its
operation ends with an error, and what it left is cleared away, by itself or by others.  That is
looked at byte by byte: the whole of a LUN before and after, but for sanlock's own records of hosts.

Sanlock gives a dead host's leases away after eight I/O time-outs and the minute of a watchdog: all
that has to wait for it waits at once.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import pytest

from functional.block_hosts import (
    BLANK,
    COW,
    EXTENT,
    MIB,
    PREALLOCATED,
    RAW,
    SPARSE,
    Cluster,
    Host,
    new_id,
    wait_for,
)
from functional.checker.check import check
from functional.checker.group import Group, read_group
from functional.processes import AgentProcess
from functional.standin.process import StandInProcess
from vdsm_storage.rpc.client import RemoteError

pytestmark = [pytest.mark.sanlock, pytest.mark.slow, pytest.mark.timeout(600)]

IO_TIMEOUT: Final = 1  # seconds; nothing here waits for a disk
LOST: Final = 8 * IO_TIMEOUT  # seconds without renewal until a host lets go of its leases
DEAD: Final = LOST + 60  # until others may have them
LOCK_TIMEOUT: Final = 3.0
SLACK: Final = 15.0  # seconds that a busy machine, and one attempt of sanlock's, may take longer
COLLECT: Final = 1.0  # seconds between looks for what dead hosts left
NOT_SPM: Final = 654
MADE: Final = "volume.create:made"
PIECE: Final = MIB  # of a LUN, compared as one
SECTOR: Final = 512
HALF_MADE: Final = "OVIRT_VOL_INITIALIZING"


class Pool(Cluster):
    """A pool with one domain on one LUN."""

    def group(self) -> Group:
        wrong: list[str] = []
        group = read_group(self.luns, self.domain, wrong)
        assert group is not None
        assert wrong == []
        return group

    def status(self, host: Host) -> tuple[str, int]:
        """Role, and the manager's host id."""
        began = time.monotonic()
        found = host.call("StoragePool.getSpmStatus", storagepoolID=self.pool)
        assert time.monotonic() - began < 8.0  # an engine asks every ten
        return found["spmStatus"], int(found["spmId"])

    def start_spm(self, host: Host) -> int:
        return host.task(
            "StoragePool.spmStart", storagepoolID=self.pool, prevID=-1, prevLver="-1",
            enableScsiFencing="false", maxHostID=250, domVersion="5",
        )  # fmt: skip

    def stop_spm(self, host: Host) -> None:
        host.call("StoragePool.spmStop", storagepoolID=self.pool)

    def fill(self, host: Host, extents: int = 1) -> str:
        """A raw volume full of bytes; its image."""
        making = Creation(self, host, RAW, extents * EXTENT)
        assert making.wait() == 0
        where = self.ids(making.image, making.volume)
        path = host.call("Image.prepare", **where)["path"]
        with open(path, "r+b", buffering=0) as device:
            for _ in range(4):
                device.write(b"\xa5" * MIB)
            os.fsync(device.fileno())
        host.call("Image.teardown", **where)
        return making.image

    def lease(self, host: Host) -> Work:
        """A lease that a host makes."""
        lease = {"sd_id": self.domain, "lease_id": new_id()}
        return Work(host, "Lease.create", lease=lease, metadata=None)

    def restart(self, host: Host) -> None:
        """After its death; it may not be able to recover yet."""
        host.client.close()
        host.agent.start()
        host.connect()
        wait_for(lambda: self._usable(host), f"host {host.id} to use the domain")

    def half_made(self) -> set[str]:
        return {lv.name for lv in self.group().lvs.values() if HALF_MADE in lv.tags}


class Work(threading.Thread):
    """A task of a host; `outcome` is 0, an error's number, or -32605 for no answer."""

    def __init__(self, host: Host, verb: str, **params: Any) -> None:
        super().__init__()
        self._host, self._verb, self._params = host, verb, params
        self.outcome: int | None = None
        self.took = 0.0
        self.start()

    def run(self) -> None:
        began = time.monotonic()
        try:
            self.outcome = self._host.task(self._verb, **self._params)
        except RemoteError as error:
            self.outcome = error.code
        self.took = time.monotonic() - began

    def wait(self) -> int:
        wait_for(lambda: self.outcome is not None, f"the answer to {self._verb}", 60)
        assert self.outcome is not None
        return self.outcome


class Creation(Work):
    """A volume that a host makes."""

    def __init__(self, pool: Pool, host: Host, form: int = COW, size: int = EXTENT) -> None:
        self.image, self.volume = new_id(), new_id()
        params = {
            **pool.ids(self.image, self.volume), "size": str(size), "volFormat": form,
            "preallocate": PREALLOCATED if form == RAW else SPARSE, "diskType": "DATA",
            "desc": "", "srcImgUUID": BLANK, "srcVolUUID": BLANK,
        }  # fmt: skip
        super().__init__(host, "Volume.create", **params)


def refused(pool: Pool, host: Host) -> int:
    """The error of a creation that comes in bounded time."""
    creation = Creation(pool, host)
    outcome = creation.wait()
    assert creation.took < LOCK_TIMEOUT + SLACK
    return outcome


def stop_in_the_middle(pool: Pool, host: Host) -> Creation:
    """A volume was made, and its agent stopped before it was formatted and published."""
    creation = Creation(pool, host)
    wait_for(host.is_stopped, "the agent to stop at its step")
    return creation


# -- the bytes of a LUN --------------------------------------------------------------------------


def picture(pool: Pool) -> dict[str, str]:
    """A checksum for every piece of the LUN that holds anything, without what sanlock writes for
    each host alone: all of `ids`, and in the domain's lease the blocks of the hosts."""
    [lun] = pool.luns
    fd = os.open(lun, os.O_RDONLY)
    try:
        os.fsync(fd)  # into the file
    finally:
        os.close(fd)
    group = pool.group()
    found = {}
    backing = Path(f"/sys/block/{os.path.basename(lun)}/loop/backing_file").read_text().strip()
    with open(backing, "rb", buffering=0) as file:
        for start in pieces(file.fileno()):
            name = place(group, start)
            if name.startswith("ids "):
                continue
            data = os.pread(file.fileno(), PIECE, start)
            if name == f"leases {MIB}":  # SDM: its leader, a record of requests, 250 hosts
                data = data[:SECTOR] + data[252 * SECTOR :]
            if any(data):  # zeros may be a hole at one time and none at another
                found[name] = hashlib.sha256(data).hexdigest()
    return found


def pieces(fd: int) -> Iterator[int]:
    """Where the pieces begin that are not holes."""
    at = 0
    while True:
        try:
            at = os.lseek(fd, at, os.SEEK_DATA) // PIECE * PIECE
        except OSError:  # there is no more
            return
        yield at
        at += PIECE


def place(group: Group, offset: int) -> str:
    """The volume at a byte of the LUN, and the offset in it."""
    [pv] = group.pvs.values()
    extent, inside = divmod(offset - pv.pe_start, group.extent_size)
    for lv in group.lvs.values():
        for segment in lv.segments:
            if segment.pv_start <= extent < segment.pv_start + segment.count:
                start = segment.start + extent - segment.pv_start
                return f"{lv.name} {start * group.extent_size + inside}"
    return f"the LUN {offset}"


def extents_of(group: Group, lv: str) -> set[int]:
    return {
        extent
        for segment in group.lvs[lv].segments
        for extent in range(segment.pv_start, segment.pv_start + segment.count)
    }


def compare(before: Mapping[str, str], after: Mapping[str, str]) -> list[str]:
    """The pieces that are not what they were."""
    return sorted(name for name in {*before, *after} if before.get(name) != after.get(name))


# -- the hosts -----------------------------------------------------------------------------------


@dataclass
class Lab:
    """Three hosts on one LUN, two on another; the first of those has a path of its own to it."""

    three: Pool
    two: Pool
    path: str


@pytest.fixture(scope="module")
def lab(
    workdir: Path,
    make_luns: Callable[..., list[str]],
    make_standin: Callable[..., StandInProcess],
    start_agent: Callable[..., AgentProcess],
) -> Iterator[Lab]:
    luns = make_luns(2, 100 * 1024**3)
    path = ""

    def host(name: str, number: int, lun: str, own_path: bool = False) -> Host:
        nonlocal path
        standin = make_standin(f"s{name}", sync=False)
        if own_path:
            lun = path = standin.lun(lun)
        agent = start_agent(
            f"a{name}", tls=False, standin=standin, lvm__devices=lun,
            sanlock__io_timeout=str(IO_TIMEOUT), storage__lock_timeout=str(LOCK_TIMEOUT),
            storage__collect_interval=str(COLLECT),
        )  # fmt: skip
        return Host(number, agent, standin)

    three = [host(str(number), number, luns[0]) for number in (1, 2, 3)]
    two = [host("4", 1, luns[1], own_path=True), host("5", 2, luns[1])]
    with ThreadPoolExecutor(5) as threads:
        pools = [
            threads.submit(Pool, hosts, [lun], workdir / f"pool-{len(hosts)}")
            for hosts, lun in zip((three, two), luns, strict=True)
        ]
        yield Lab(*(pool.result() for pool in pools), path)
        for each in (*three, *two):
            for sanlock in (True, False):  # of a test that failed
                with contextlib.suppress(OSError):
                    each.signal(signal.SIGCONT, sanlock)
            each.client.close()
        two[0].standin.resume(path)
        list(threads.map(lambda each: each.agent.stop(), (*three, *two)))


# -- sanlock dies --------------------------------------------------------------------------------


def test_the_managers_sanlock_dies(lab: Lab) -> None:
    """In the middle of an operation of the manager: it writes nothing more, and is no manager."""
    pool = lab.three
    first, second, _ = pool.hosts
    pool.revive(first, f"stop {MADE}")
    assert pool.start_spm(first) == 0
    creation = stop_in_the_middle(pool, first)
    extents = extents_of(pool.group(), creation.volume)
    first.signal(signal.SIGKILL, sanlock=True)
    time.sleep(0.5)  # what the daemon said before it died counts for a moment
    first.signal(signal.SIGCONT)
    assert creation.wait() != 0
    wait_for(lambda: pool.status(first)[0] == "Free", "the role to be gone", 10)
    # Its sanlock is started anew, its host id taken again: others need not take it for dead.
    pool.settle(first)
    wait_for(lambda: not pool.half_made(), "the volume to be taken back", 30)
    [lun] = pool.luns
    start = next(iter(pool.group().pvs.values())).pe_start
    with open(lun, "rb") as device:
        for extent in extents:
            device.seek(start + extent * EXTENT)
            assert device.read(MIB) == bytes(MIB), "it was formatted without a lease"
    wait_for(lambda: pool.start_spm(second) == 0, "the second host to become the manager", 30)
    assert pool.status(first) == ("Free", 2)
    assert pool.status(second) == ("SPM", 2)
    assert refused(pool, first) == NOT_SPM
    pool.stop_spm(second)
    pool.revive(first)  # it would stop again
    pool.fill(first)
    assert check(pool.luns, pool.domain) == []


# -- hosts that stop, hang and die ---------------------------------------------------------------


def test_what_a_host_left_that_lost_its_journal(lab: Lab) -> None:
    """It has the same host id again and knows of nothing: it clears away what bears that."""
    pool = lab.three
    first = pool.hosts[0]
    pool.revive(first, MADE)
    creation = Creation(pool, first)
    first.agent.wait_dead()
    assert creation.wait() != 0
    assert pool.half_made() == {creation.volume}
    for entry in (first.agent.dir / "state" / "journal").iterdir():
        entry.unlink()
    pool.revive(first)
    wait_for(lambda: not pool.half_made(), "the volume to be removed", 30)
    assert check(pool.luns, pool.domain) == []


def test_what_a_living_host_left_is_its_own(lab: Lab) -> None:
    """Its agent died between the making of a volume and its publication; the host lives."""
    pool = lab.three
    _, _, third = pool.hosts
    pool.revive(third, MADE)
    creation = Creation(pool, third)
    third.agent.wait_dead()
    assert creation.wait() != 0
    time.sleep(4 * COLLECT)
    assert pool.half_made() == {creation.volume}


def test_hosts_that_lose_their_leases_write_nothing_more(lab: Lab) -> None:
    """The first host is stopped, with its sanlock; the third one is dead for good; of the other
    pool's manager the LUN hangs, and fails in the end.  All in the middle of their work."""
    three, two = lab.three, lab.two
    first, second, third = three.hosts
    hanging, heir = two.hosts
    third.agent.kill_sanlock()
    [left] = three.half_made()

    three.revive(first, "stop lease.create:written")
    stopped = three.lease(first)
    wait_for(first.is_stopped, "the agent to stop at its step")
    first.signal(signal.SIGSTOP, sanlock=True)
    began = time.monotonic()

    two.revive(hanging, f"stop {MADE}")
    assert two.start_spm(hanging) == 0
    hung = stop_in_the_middle(two, hanging)
    hanging.standin.hang(lab.path)
    began_hanging = time.monotonic()
    hanging.signal(signal.SIGCONT)

    with ThreadPoolExecutor(2) as threads:
        taking = threads.submit(take_over, three, second, began)
        inheriting = threads.submit(inherit, two, heir, began_hanging)
        check_hanging(two, hanging, hung, lab.path)
        assert three.half_made() == {left}  # that host may still be alive
        taking.result()
        inheriting.result()

    # The others change the domains: the place of the stopped host's lease is another one's now.
    wait_for(lambda: not three.half_made(), "what dead hosts left to be removed", 30)
    three.fill(second, 3)
    assert three.start_spm(second) == 0  # and keep the first one from its own recovery
    assert [three.lease(second).wait() for _ in range(2)] == [0, 0]
    two.fill(heir, 2)

    before = picture(three), picture(two)
    first.signal(signal.SIGCONT)
    time.sleep(1.0)  # the agent first: its sanlock cannot tell it anything yet
    assert compare(before[0], picture(three)) == []
    first.signal(signal.SIGCONT, sanlock=True)
    hanging.standin.resume(lab.path)
    assert stopped.wait() != 0
    time.sleep(2.0)
    if not first.agent.alive():  # its sanlock was faster, and killed it for the lease
        three.restart(first)
    assert refused(three, first) != 0
    assert refused(two, hanging) != 0
    assert three.status(first)[0] == two.status(hanging)[0] == "Free"
    time.sleep(LOST)
    assert compare(before[0], picture(three)) == []
    assert compare(before[1], picture(two)) == []

    three.stop_spm(second)
    two.stop_spm(heir)
    three.revive(third)  # with a new sanlock
    for pool in (three, two):
        for host in pool.hosts:
            pool.settle(host)
        assert check(pool.luns, pool.domain) == []
        pool.revive(pool.hosts[0])  # it would stop again
        for host in pool.hosts:
            pool.fill(host)
            assert pool.lease(host).wait() == 0
        assert check(pool.luns, pool.domain) == []


def take_over(pool: Pool, host: Host, began: float) -> None:
    """Make a volume as soon as the lease is to be had: not before the other host is dead."""
    times = 0
    while (code := refused(pool, host)) != 0:
        assert code == NOT_SPM
        times += 1
        assert time.monotonic() - began < DEAD + 60
    # It was renewed the last time before it stopped.
    assert time.monotonic() - began > DEAD - 3 * IO_TIMEOUT
    assert times > 0


def inherit(pool: Pool, host: Host, began: float) -> None:
    """Become the manager as soon as that can be; until then the other one is, for all we know."""
    while pool.start_spm(host) != 0:
        assert pool.status(host) == ("Free", 1)
        assert time.monotonic() - began < DEAD + 60
    assert time.monotonic() - began > DEAD - 3 * IO_TIMEOUT
    assert pool.status(host) == ("SPM", 2)


def check_hanging(pool: Pool, host: Host, hung: Creation, path: str) -> None:
    """It lets go of the role in time, refuses work, and ends what it did when its LUN fails."""
    began = time.monotonic()
    wait_for(lambda: pool.status(host)[0] == "Free", "the role to be gone", LOST + SLACK)
    assert time.monotonic() - began < LOST + SLACK
    assert hung.outcome is None  # it waits for the storage
    another = Creation(pool, host)
    time.sleep(3.0)
    assert another.outcome != 0
    host.standin.fail(path)  # what hangs, too
    assert hung.wait() != 0
    assert another.wait() != 0
    assert pool.status(host)[0] == "Free"
    assert host.agent.alive()
