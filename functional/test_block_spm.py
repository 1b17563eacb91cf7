# SPDX-License-Identifier: GPL-2.0-or-later
"""A pool on LUNs with two hosts: who is its manager, and what the manager does for other hosts.

The mailbox is asked as a VDSM host asks it (tests/monitor/other_mailbox.py, which shares no code
with the product), through the second host's own devices; what came of it is read from the LUNs by
the checker's parser.
"""

from __future__ import annotations

import contextlib
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final

import pytest

from functional.block_hosts import (
    BLANK,
    COW,
    EXTENT,
    ISCSI,
    MIB,
    SPARSE,
    BareLvm,
    Cluster,
    Host,
    new_id,
    wait_for,
)
from functional.checker.check import check
from functional.checker.group import read_group
from functional.processes import AgentProcess
from functional.standin.process import StandInProcess
from tests.monitor.other_mailbox import OtherHost, pwrite
from vdsm_storage.rpc.client import RemoteError

pytestmark = [pytest.mark.sanlock, pytest.mark.slow]

LOCK_TIMEOUT: Final = 3.0  # seconds that a verb waits for another host's lease
NOT_SPM, BUSY, ALREADY = 654, 406, 656
VISITOR: Final = 7  # the host id of a host of the other kind


class Pool(Cluster):
    """Two hosts; the LUNs carry a domain each, the first one is the master at the beginning."""

    def __init__(self, hosts: list[Host], luns: list[str], directory: Path) -> None:
        self.hosts = hosts
        self.pool = new_id()
        self.version = 1
        self.moving = False  # some hosts do not know the master yet
        self.lun_of: dict[str, str] = {}
        for host in hosts:
            host.connect()
        for lun in luns:
            self._create_domain(lun, directory)
        self.domain, self.second = self.lun_of
        self.first = self.master = self.domain
        hosts[0].call(
            "StoragePool.create", storagepoolID=self.pool, name="two", masterSdUUID=self.master,
            masterVersion=1, domainList=list(self.lun_of), lockRenewalIntervalSec=5,
            leaseTimeSec=60, ioOpTimeoutSec=10, leaseRetries=3,
        )  # fmt: skip
        for host in hosts:
            self.connect_pool(host)
        for host in hosts:
            self.settle(host)

    def _create_domain(self, lun: str, directory: Path) -> None:
        domain = new_id()
        group = BareLvm(directory / f"bare-lvm-{len(self.lun_of)}", [lun]).make_group(domain)
        self.hosts[0].call(
            "StorageDomain.create", storagedomainID=domain, domainType=ISCSI, version="5",
            typeArgs=group, name="two", domainClass=1, blockSize=512, maxHosts=250,
        )  # fmt: skip
        self.lun_of[domain] = lun

    def connect_pool(self, host: Host) -> None:
        host.call(
            "StoragePool.connect", storagepoolID=self.pool, hostID=host.id, scsiKey=self.pool,
            masterSdUUID=self.master, masterVersion=self.version,
            domainDict=dict.fromkeys(self.lun_of, "active"),
        )  # fmt: skip

    def settle(self, host: Host) -> None:
        super().settle(host)

        def usable() -> bool:
            found = host.call("Host.getStats")["storageDomains"]
            states = [found.get(domain) for domain in self.lun_of]
            return all(state and state["valid"] and state["acquired"] for state in states)

        wait_for(usable, f"host {host.id} to use both domains")

    # -- the manager -------------------------------------------------------------------------

    def status(self, host: Host) -> tuple[str, int, int]:
        """Role, lease version and owner, as this host tells them."""
        found = host.call("StoragePool.getSpmStatus", storagepoolID=self.pool)
        return found["spmStatus"], int(found["spmLver"]), int(found["spmId"])

    def start_spm(self, host: Host) -> int:
        """0 or the error's number; as an engine asks for it."""
        _, lver, owner = self.status(host)
        return host.task(
            "StoragePool.spmStart", storagepoolID=self.pool, prevID=owner, prevLver=str(lver),
            enableScsiFencing="false", maxHostID=250, domVersion="5",
        )  # fmt: skip

    def stop_spm(self, host: Host) -> None:
        host.call("StoragePool.spmStop", storagepoolID=self.pool)

    @contextlib.contextmanager
    def managed_by(self, host: Host) -> Iterator[None]:
        assert self.start_spm(host) == 0
        try:
            yield
        finally:
            self.stop_spm(host)

    # -- disks -------------------------------------------------------------------------------

    def create(self, host: Host, domain: str = "", size: int = EXTENT) -> tuple[str, str]:
        """A thin disk: image and volume.  Raises RemoteError."""
        image, volume = new_id(), new_id()
        code = host.task(
            "Volume.create", storagepoolID=self.pool, storagedomainID=domain or self.first,
            imageID=image, volumeID=volume, size=str(size), volFormat=COW, preallocate=SPARSE,
            diskType="DATA", desc="", srcImgUUID=BLANK, srcVolUUID=BLANK,
        )  # fmt: skip
        assert code == 0
        return image, volume

    def delete(self, host: Host, image: str, domain: str = "") -> None:
        assert host.task(
            "Image.delete", storagepoolID=self.pool, storagedomainID=domain or self.first,
            imageID=image, postZero="false", force="false",
        ) == 0  # fmt: skip

    def mib(self, volume: str, domain: str = "") -> int:
        """The size of the volume's LV on the LUN."""
        wrong: list[str] = []
        domain = domain or self.first
        group = read_group([self.lun_of[domain]], domain, wrong)
        assert group is not None, wrong
        return group.size(volume) // MIB

    def check(self) -> list[str]:
        return [problem for domain, lun in self.lun_of.items() for problem in check([lun], domain)]


@pytest.fixture(scope="module")
def pool(
    workdir: Path,
    make_luns: Callable[..., list[str]],
    make_standin: Callable[..., StandInProcess],
    start_agent: Callable[..., AgentProcess],
) -> Iterator[Pool]:
    luns = make_luns(2, 200 * 1024**3)
    settings = {
        "lvm__devices": ",".join(luns), "storage__lock_timeout": str(LOCK_TIMEOUT),
        "sanlock__io_timeout": "1",
    }  # fmt: skip
    hosts = []
    for number in (1, 2):
        standin = make_standin(f"s{number}", sync=False)
        agent = start_agent(f"a{number}", tls=False, standin=standin, **settings)
        hosts.append(Host(number, agent, standin))
    yield Pool(hosts, luns, workdir)
    for host in hosts:
        host.client.close()
    stops = [threading.Thread(target=host.agent.stop) for host in hosts]  # leaving takes seconds
    for stop in stops:
        stop.start()
    for stop in stops:
        stop.join()


@pytest.fixture
def visitor(pool: Pool) -> Iterator[Callable[..., OtherHost]]:
    """visitor(domain, number, events=True) -> a host of the other kind at that master's mailbox,
    through the second host's devices."""
    started: list[OtherHost] = []

    def make(domain: str = "", number: int = VISITOR, events: bool = True) -> OtherHost:
        inbox, outbox = (
            str(pool.hosts[1].standin.path(domain or pool.master, name))
            for name in ("inbox", "outbox")
        )
        made = OtherHost(inbox, outbox, number, events)
        made.start()
        started.append(made)
        return made

    yield make
    for made in started:
        made.kill()


def answer(host: OtherHost, volume: str, seconds: float = 20.0) -> int:
    """The size in MiB that the manager answered; it is taken off."""
    wait_for(lambda: volume in host.results, "the manager's answer", seconds)
    wait_for(lambda: not host.active, "the mailbox to be clean", seconds)
    return host.results.pop(volume)


# -- who is the manager ------------------------------------------------------------------------


class Watch(threading.Thread):
    """Asks both hosts again and again who the manager is; `problems` is what cannot be true."""

    def __init__(self, pool: Pool) -> None:
        super().__init__(daemon=True)
        self._pool = pool
        self._ended = threading.Event()
        self.rounds = 0
        self.problems: list[str] = []
        self.slowest = 0.0

    def run(self) -> None:
        last: dict[int, tuple[str, int, int]] = {}
        while not self._ended.is_set():
            for host in self._pool.hosts:
                moving, began = self._pool.moving, time.monotonic()
                try:
                    now = self._pool.status(host)
                except RemoteError:  # it is dead at the moment
                    last.pop(host.id, None)
                    continue
                self.slowest = max(self.slowest, time.monotonic() - began)
                if moving or self._pool.moving:  # they look at different masters
                    last.clear()
                    continue
                self._look(host.id, now, last)
                last[host.id] = now
            self.rounds += 1
            time.sleep(0.02)

    def _look(self, host: int, now: tuple[str, int, int], last: Any) -> None:
        role, lver, owner = now
        told = f"host {host} says {now} after {last}"
        if role not in ("SPM", "Free", "Contend") or (role == "SPM" and owner != host):
            self.problems.append(told)
        if (owner == -1) != (lver == -1):
            self.problems.append(told)
        before = last.get(host)
        if before is not None and role == before[0] == "SPM" and lver == before[1]:
            # It was the manager all the time since: nobody else was, and the other one knew.
            for other, (its_role, its_lver, its_owner) in last.items():
                if other != host and its_role == "SPM":
                    self.problems.append(told)
                if other != host and (its_lver, its_owner) != (lver, host):
                    self.problems.append(told)

    def end(self) -> None:
        self._ended.set()
        self.join(60)
        assert self.problems == []


@pytest.fixture
def watch(pool: Pool) -> Iterator[Watch]:
    watching = Watch(pool)
    watching.start()
    yield watching
    watching.end()


def test_the_manager_is_known_to_both_hosts(pool: Pool, watch: Watch) -> None:
    """Its number and the version of its lease, which counts up; a free pool has none."""
    first, second = pool.hosts
    for host in pool.hosts:
        assert pool.status(host) == ("Free", -1, -1)
    versions = []
    for manager, other in ((first, second), (second, first), (second, first)):
        with pool.managed_by(manager):
            role, lver, owner = pool.status(manager)
            assert (role, owner) == ("SPM", manager.id)
            assert pool.status(other) == ("Free", lver, manager.id)
            versions.append(lver)
            info = manager.call("StoragePool.getInfo", storagepoolID=pool.pool)["info"]
            assert (info["spm_id"], info["lver"]) == (manager.id, lver)
            for host, code in ((manager, ALREADY), (other, NOT_SPM)):
                assert refusal(host, "StoragePool.spmStart" if host is manager else
                               "StoragePool.spmStop", pool) == code  # fmt: skip
            if len(versions) == 1:
                began = time.monotonic()
                assert pool.start_spm(other) == NOT_SPM  # it ends by itself
                assert time.monotonic() - began < LOCK_TIMEOUT + 3
                assert pool.status(other) == ("Free", lver, manager.id)
        for host in pool.hosts:
            assert pool.status(host) == ("Free", -1, -1)
    assert versions == sorted(set(versions))
    assert watch.rounds > 10
    assert watch.slowest < 2.0


def refusal(host: Host, verb: str, pool: Pool) -> int:
    more: dict[str, Any] = {}
    if verb.endswith("spmStart"):
        more = {"prevID": -1, "prevLver": "-1", "enableScsiFencing": "false", "maxHostID": 250}
    with pytest.raises(RemoteError) as refused:
        host.call(verb, storagepoolID=pool.pool, **more)
    return refused.value.code


# -- the mailbox ---------------------------------------------------------------------------------


def test_volumes_are_extended_for_another_host(
    pool: Pool, visitor: Callable[..., OtherHost], watch: Watch
) -> None:
    """To the size that was asked for, in whole extents; asking again changes nothing."""
    first = pool.hosts[0]
    image, volume = pool.create(first)
    _, elsewhere = pool.create(first, pool.second)
    with pool.managed_by(first):
        host = visitor()
        for asked, expected in ((300, 384), (384, 384), (10, 384), (385, 512)):
            host.request(pool.first, volume, asked)
            assert answer(host, volume) == expected
            assert pool.mib(volume) == expected
        # A domain that is not the master.
        host.request(pool.second, elsewhere, 1024)
        assert answer(host, elsewhere) == 1024
        assert pool.mib(elsewhere, pool.second) == 1024
        # It can be used at once by whoever has it active: the second host sees the new size.
        info = pool.hosts[1].call("Volume.getInfo", **pool.ids(image, volume))
        assert info["apparentsize"] == str(512 * MIB)
    assert pool.check() == []


def test_what_cannot_be_is_answered_with_zero(
    pool: Pool, visitor: Callable[..., OtherHost]
) -> None:
    first = pool.hosts[0]
    image, volume = pool.create(first)
    before = pool.mib(volume)
    with pool.managed_by(first):
        host = visitor()
        unknown = new_id()
        impossible = (
            (pool.first, volume, 0xFFFFFFFF),  # MiB: more than the group has
            (pool.first, volume, 199 * 1024),  # a little more
            (pool.first, unknown, 256),
            (new_id(), volume, 256),
            (pool.first, "00000000-0000-0000-0000-000000000000", 256),
        )
        for domain, name, size in impossible:
            host.request(domain, name, size)
            assert answer(host, name, 40) == 0
        host.request(pool.first, volume, before + 1)  # and it goes on
        assert answer(host, volume) == before + 128
    pool.delete(first, image)


def test_many_requests_at_once(pool: Pool, visitor: Callable[..., OtherHost]) -> None:
    """Of two hosts, for the same volumes: the larger size wins, nothing is done twice."""
    first = pool.hosts[0]
    disks = [pool.create(first) for _ in range(6)]
    with pool.managed_by(first):
        hosts = [visitor(number=number) for number in (VISITOR, 249)]
        for extra, host in enumerate(hosts):
            for number, (_, volume) in enumerate(disks):
                host.request(pool.first, volume, 256 + 128 * (number + extra))
        for host in hosts:
            wait_for(lambda h=host: len(h.results) == len(disks), "all answers", 30)
        for number, (_, volume) in enumerate(disks):
            small, large = (host.results[volume] for host in hosts)
            assert large == 384 + 128 * number == pool.mib(volume)
            assert small in (large - 128, large)
    for image, _ in disks:
        pool.delete(first, image)


def test_an_event_gives_a_quick_answer(pool: Pool, visitor: Callable[..., OtherHost]) -> None:
    """A manager looks for events twice a second, and at everything each two seconds."""
    first = pool.hosts[0]
    disks = [pool.create(first) for _ in range(8)]
    took: dict[bool, list[float]] = {True: [], False: []}
    with pool.managed_by(first):
        hosts = {True: visitor(), False: visitor(number=VISITOR + 1, events=False)}
        for number, (_, volume) in enumerate(disks):
            events = number < 5
            time.sleep(0.13 * number)  # somewhere in the manager's rounds
            began = time.monotonic()
            hosts[events].request(pool.first, volume, 256)
            wait_for(lambda v=volume, h=hosts[events]: v in h.results, "an answer", 10)
            took[events].append(time.monotonic() - began)
            assert hosts[events].results[volume] == 256
    assert statistics.median(took[True]) < 1.0, took
    assert max(took[False]) < 5.0, took
    for image, _ in disks:
        pool.delete(first, image)


def test_nothing_is_served_without_a_manager(pool: Pool, visitor: Callable[..., OtherHost]) -> None:
    """A request stays until there is one again, on another host perhaps."""
    first, second = pool.hosts
    image, volume = pool.create(first)
    with pool.managed_by(first):
        host = visitor()
        host.request(pool.first, volume, 256)
        assert answer(host, volume) == 256
    host.request(pool.first, volume, 512)
    time.sleep(4.0)
    assert host.results == {}
    assert pool.mib(volume) == 256
    with pool.managed_by(second):
        assert answer(host, volume) == 512
    assert pool.mib(volume) == 512
    pool.delete(first, image)


def test_the_mailbox_moves_with_the_master(
    pool: Pool, visitor: Callable[..., OtherHost], watch: Watch
) -> None:
    first, second = pool.hosts
    image, volume = pool.create(first)
    old, new = pool.first, pool.second
    assert pool.start_spm(first) == 0
    for here, there in ((old, new), (new, old)):
        at_old = visitor(here)
        at_old.request(old, volume, 256)
        assert answer(at_old, volume) >= 256
        pool.version += 1
        pool.moving = True
        code = first.task(
            "StoragePool.switchMaster", storagepoolID=pool.pool, oldMasterUUID=here,
            newMasterUUID=there, masterVersion=pool.version,
        )  # fmt: skip
        assert code == 0
        pool.master = there
        for each in pool.hosts:
            pool.connect_pool(each)
        wait_for(lambda: pool.status(second)[2] == 1, "the second host to know", 10)
        pool.moving = False
        role, _, owner = pool.status(first)
        assert (role, owner) == ("SPM", 1)
        at_new = visitor(there)
        size = pool.mib(volume) + 128
        at_new.request(old, volume, size)
        assert answer(at_new, volume) == size
        # Nobody serves the old one any more.
        at_old.request(old, volume, size + 128)
        time.sleep(3.0)
        assert at_old.results == {}
        assert pool.mib(volume) == size
        for host in (at_old, at_new):
            host.kill()
            pwrite(host.inbox, bytes(4096), VISITOR * 4096)  # it takes its request back
    assert refusal_of_create(pool, second) == NOT_SPM
    pool.stop_spm(first)
    pool.delete(second, image)
    assert pool.check() == []


def refusal_of_create(pool: Pool, host: Host) -> int:
    """The number of the error that a creation gets, in bounded time; nothing is made."""
    began = time.monotonic()
    images = set(host.call("StorageDomain.getImages", storagedomainID=pool.first))
    with pytest.raises(RemoteError) as refused:
        pool.create(host)
    assert time.monotonic() - began < LOCK_TIMEOUT + 3
    assert set(host.call("StorageDomain.getImages", storagedomainID=pool.first)) == images
    return refused.value.code


# -- the manager dies ----------------------------------------------------------------------------


def test_the_managers_agent_is_killed(
    pool: Pool, visitor: Callable[..., OtherHost], watch: Watch
) -> None:
    """Its sanlock gives the lease back at once: another host can be the manager, and what was
    asked for meanwhile is done then.  The old one comes back without the role."""
    first, second = pool.hosts
    image, volume = pool.create(first)
    assert pool.start_spm(first) == 0
    lver = pool.status(first)[1]
    host = visitor()
    host.request(pool.first, volume, 256)
    assert answer(host, volume) == 256
    first.agent.kill()
    host.request(pool.first, volume, 512)
    wait_for(lambda: pool.start_spm(second) == 0, "the second host to become the manager", 30)
    role, now, owner = pool.status(second)
    assert (role, owner) == ("SPM", 2)
    assert now > lver
    assert answer(host, volume) == 512
    pool.revive(first)
    assert pool.status(first) == ("Free", now, 2)
    assert refusal_of_create(pool, first) == NOT_SPM
    pool.stop_spm(second)
    pool.delete(first, image)
    assert pool.check() == []


# -- without a manager ---------------------------------------------------------------------------


def test_both_hosts_change_a_domain_in_turn(pool: Pool) -> None:
    """Each sees at once what the other did."""
    first, second = pool.hosts
    for here, there in ((first, second), (second, first)):
        image, volume = pool.create(here)
        where = pool.ids(image, volume)
        info = there.call("Volume.getInfo", **where)
        assert (info["status"], info["capacity"]) == ("OK", str(EXTENT))
        assert there.task("Volume.extendSize", **where, newSize=str(5 * EXTENT)) == 0
        assert here.call("Volume.getInfo", **where)["capacity"] == str(5 * EXTENT)
        pool.delete(there, image)
        assert image not in here.call("StorageDomain.getImages", storagedomainID=pool.first)
    assert pool.check() == []


def test_both_hosts_change_a_domain_at_once(pool: Pool) -> None:
    """Neither keeps the other from it for long."""
    refused: list[int] = []
    kept: list[str] = []

    def until_done(work: Callable[[], Any]) -> Any:
        """What an engine does with a 654."""
        while True:
            try:
                return work()
            except RemoteError as error:
                refused.append(error.code)
                if len(refused) == 8:
                    raise

    def work(host: Host) -> None:
        for number in range(6):
            image, volume = until_done(lambda: pool.create(host))
            where = {**pool.ids(image, volume), "newSize": str(3 * EXTENT)}
            assert until_done(lambda w=where: host.task("Volume.extendSize", **w)) == 0
            if number % 2:
                until_done(lambda i=image: pool.delete(host, i))
            else:
                kept.append(image)

    with ThreadPoolExecutor(4) as threads:
        for future in [threads.submit(work, host) for host in pool.hosts * 2]:
            future.result(120)
    assert set(refused) <= {NOT_SPM}
    assert len(refused) < 8
    for host in pool.hosts:
        images = host.call("StorageDomain.getImages", storagedomainID=pool.first)
        assert set(kept) <= set(images)
    assert pool.check() == []
    for image in kept:
        pool.delete(pool.hosts[0], image)


def test_a_manager_keeps_the_others_from_changing(pool: Pool) -> None:
    """654 in bounded time on every domain of the pool, and no longer once there is none."""
    first, second = pool.hosts
    with pool.managed_by(first):
        assert refusal_of_create(pool, second) == NOT_SPM
        with pytest.raises(RemoteError) as refused:
            pool.create(second, pool.second)
        assert refused.value.code == NOT_SPM
        image, _ = pool.create(first)
    pool.delete(second, image)
    image, _ = pool.create(second, pool.second)
    pool.delete(first, image, pool.second)
