# SPDX-License-Identifier: GPL-2.0-or-later
"""A host that needs more storage for a volume: from the pool's manager on another host, or alone.

The manager is an agent of its own with its own sanlock; this process is the other host, with the
real parts of an agent's storage.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import pytest

from functional.block_hosts import Cluster, Host
from functional.processes import AgentProcess, leftovers
from functional.standin import loops
from tests.domains.block_world import BlockHost, block_hosts, workdir
from tests.domains.conftest import wait_for
from vdsm_storage.base.clock import SystemClock
from vdsm_storage.base.units import MIB
from vdsm_storage.base.uuids import BLANK, new_uuid
from vdsm_storage.errors import (
    ExtendNotAnswered,
    ExtendRefused,
    InvalidConfiguration,
    UnsupportedOnFileDomain,
    VolumeGroupSizeError,
)
from vdsm_storage.host.sanlock import Sanlock
from vdsm_storage.images import metadata as md
from vdsm_storage.images.create import NewVolumeRequest
from vdsm_storage.monitor.direct import managers
from vdsm_storage.monitor.extend import BRIEF, Extender
from vdsm_storage.monitor.pool_mailbox import PoolMailbox
from vdsm_storage.rpc.peer import Peers

pytestmark = [pytest.mark.sanlock, pytest.mark.slow]

HERE: Final = 2  # this host's id
SLACK: Final = 3.0  # seconds that a busy machine may need beyond what was allowed


@dataclass
class Lab:
    """`other` is the host that may be the manager."""

    cluster: Cluster
    host: BlockHost
    mailbox: PoolMailbox
    extender: Extender

    @property
    def domain(self) -> str:
        return self.cluster.domain

    @property
    def other(self) -> Host:
        return self.cluster.hosts[0]

    def make(self, size: int = 128 * MIB) -> tuple[str, str]:
        """A disk, made by this host."""
        image, volume = new_uuid(), new_uuid()
        request = NewVolumeRequest(self.domain, image, volume, size, md.COW, md.SPARSE, "DATA")
        self.host.create(request)
        return image, volume

    def extend(self, volume: str, mib: int, timeout: float = 20.0) -> int:
        """MiB."""
        return self.extender.extend(self.domain, volume, mib * MIB, timeout) // MIB

    def mib(self, volume: str) -> int:
        """On the LUN, as the checker reads it."""
        return self.host.luns.group(self.domain).size(volume) // MIB

    def start_spm(self) -> None:
        code = self.other.task(
            "StoragePool.spmStart", storagepoolID=self.cluster.pool, prevID=-1, prevLver="-1",
            enableScsiFencing="false", maxHostID=250, domVersion="5",
        )  # fmt: skip
        assert code == 0

    def stop_spm(self) -> None:
        self.other.call("StoragePool.spmStop", storagepoolID=self.cluster.pool)


@pytest.fixture(scope="module")
def lab(sanlock: Sanlock) -> Iterator[Lab]:
    with workdir() as directory, block_hosts(directory, sanlock) as hosts:
        hosts.luns.make("lun", 100 * 1024**3)
        settings = {"lvm__devices": hosts.luns.pattern, "sanlock__io_timeout": "1"}
        standin = hosts.standin("manager")
        agent = AgentProcess(directory / "agent", False, settings, standin)
        agent.start()
        other = Host(1, agent, standin)
        try:
            cluster = Cluster([other], hosts.luns.paths, directory)
            yield _lab(cluster, hosts.host("here"))
        finally:
            other.signal(signal.SIGCONT)
            other.client.close()
            problem = agent.stop()
            left = [line for line in leftovers(directory / "agent") if "process" in line]
        assert (problem, left) == ("", [])


def _lab(cluster: Cluster, host: BlockHost) -> Lab:
    world, clock = host.world, SystemClock()
    mailbox = PoolMailbox(host.services.pools, world.lanes, clock, lambda *it: extender.serve(*it))
    extender = Extender(host.services.registry, mailbox.ask, 10.0, clock)
    host.services.watch(world.health, lambda: None, mailbox.close)
    world.attach(cluster.pool, cluster.domain, host_id=HERE)
    wait_for(lambda: host.services.usable(cluster.domain))
    return Lab(cluster, host, mailbox, extender)


def test_a_host_extends_by_itself_without_a_manager(lab: Lab) -> None:
    image, volume = lab.make()
    began = time.monotonic()
    assert lab.extend(volume, 300) == 384 == lab.mib(volume)
    assert time.monotonic() - began < SLACK
    assert lab.extend(volume, 200) == 384  # it has that already
    with pytest.raises(VolumeGroupSizeError):
        lab.extend(volume, 1024**2)
    lab.host.run("image.delete", {"domain": lab.domain, "image": image})


def test_the_manager_is_asked(lab: Lab) -> None:
    """And this host sees the new size at once, on the active device too."""
    _, idle = lab.make()
    image, volume = lab.make()
    store = lab.host.domain(lab.domain).store
    store.prepare(image, [volume])
    device = os.path.realpath(store.path(image, volume))
    assert size_of(device) == 128
    lab.start_spm()
    try:
        assert lab.extend(volume, 300) == 384 == lab.mib(volume)
        assert size_of(device) == 384
        # The manager is known now: nobody waits for the lock before it is asked.
        took = []
        for size in (512, 640, 768):
            began = time.monotonic()
            assert lab.extend(volume, size) == size
            took.append(time.monotonic() - began)
            assert size_of(device) == size
        assert min(took) < BRIEF, took
        assert lab.extend(idle, 256) == 256 == lab.mib(idle)
        with pytest.raises(ExtendRefused):
            lab.extend(volume, 1024**2)
    finally:
        lab.stop_spm()
    assert lab.extend(volume, 1024) == 1024  # by itself again
    store.release(image, [volume])


def size_of(device: str) -> int:
    """MiB."""
    with loops.opened(device) as fd:
        return os.lseek(fd, 0, os.SEEK_END) // MIB


def test_many_at_once_by_the_manager(lab: Lab) -> None:
    disks = [lab.make() for _ in range(5)]
    lab.start_spm()
    with ThreadPoolExecutor(10) as threads:
        asked = [
            threads.submit(lab.extend, volume, 256 + 128 * number)
            for _, volume in disks
            for number in range(2)
        ]
        assert all(future.result(60) >= 256 for future in asked)
    assert {lab.mib(volume) for _, volume in disks} == {384}
    lab.stop_spm()


def test_the_manager_is_asked_directly(lab: Lab) -> None:
    """Where its address is known; one that does not answer there is asked by the mailbox."""
    mailbox: list[int] = []

    def ask(domain: str, volume: str, size: int, timeout: float) -> int:
        mailbox.append(size // MIB)
        return lab.mailbox.ask(domain, volume, size, timeout)

    def extender(address: str) -> Extender:
        direct = managers(f"{lab.other.id} = {address}", Peers(lambda: None).call)
        return Extender(lab.host.services.registry, ask, 10.0, SystemClock(), direct)

    _, volume = lab.make()
    port = (lab.other.agent.dir / "run" / "port").read_text().strip()
    lab.start_spm()
    try:
        there, nobody = extender(f"127.0.0.1:{port}"), extender("127.0.0.1:1")
        assert there.extend(lab.domain, volume, 256 * MIB, 20.0) == 256 * MIB
        assert (lab.mib(volume), mailbox) == (256, [])
        with pytest.raises(ExtendRefused):
            there.extend(lab.domain, volume, 1024**2 * MIB, 20.0)
        assert (lab.mib(volume), mailbox) == (256, [])
        assert nobody.extend(lab.domain, volume, 384 * MIB, 20.0) == 384 * MIB
        assert (lab.mib(volume), mailbox) == (384, [384])
    finally:
        lab.stop_spm()
    assert there.extend(lab.domain, volume, 512 * MIB, 20.0) == 512 * MIB  # here


@pytest.mark.parametrize("text", ["1", "one=host", "1=", "=host", "1=a, 2"])
def test_addresses_that_are_none(text: str) -> None:
    with pytest.raises(InvalidConfiguration, match=r"\[thin\] managers"):
        managers(text, Peers(lambda: None).call)


def test_a_manager_that_hangs(lab: Lab) -> None:
    """An error in time; the answer that comes later harms nobody."""
    _, volume = lab.make()
    _, other = lab.make()
    lab.start_spm()
    assert lab.extend(volume, 256) == 256
    lab.other.signal(signal.SIGSTOP)  # for less than six I/O time-outs: it stays the manager
    try:
        for timeout in (1.0, 3.0):
            began = time.monotonic()
            with pytest.raises(ExtendNotAnswered):
                lab.extend(volume, 512, timeout)
            assert time.monotonic() - began < timeout + SLACK
        assert lab.mib(volume) == 256
    finally:
        lab.other.signal(signal.SIGCONT)
    assert lab.extend(other, 384) == 384
    assert lab.extend(volume, 640) == 640
    lab.stop_spm()


def test_the_manager_dies_while_it_is_asked(lab: Lab) -> None:
    """Whoever waits for its answer goes on alone."""
    _, volume = lab.make()
    lab.start_spm()
    lab.other.signal(signal.SIGSTOP)
    with ThreadPoolExecutor(1) as threads:
        waiting = threads.submit(lab.extend, volume, 512, 60.0)
        threading.Event().wait(BRIEF + 2.0)
        assert not waiting.done()
        lab.other.client.close()
        lab.other.agent.kill()
        assert waiting.result(60) == 512 == lab.mib(volume)
    lab.cluster.revive(lab.other)


def test_another_host_that_changes_the_domain_all_the_time(lab: Lab) -> None:
    """It holds the lock again and again, and is no manager: nobody answers, both have turns."""
    _, volume = lab.make()
    ended = threading.Event()

    def work() -> int:
        done = 0
        while not ended.is_set():
            image, name = new_uuid(), new_uuid()
            where = lab.cluster.ids(image, name)
            code = lab.other.task(
                "Volume.create", **where, size=str(MIB), volFormat=4, preallocate=2,
                diskType="DATA", desc="", srcImgUUID=BLANK, srcVolUUID=BLANK,
            )  # fmt: skip
            done += code == 0
        return done

    with ThreadPoolExecutor(3) as threads:
        busy = [threads.submit(work) for _ in range(3)]
        try:
            for size in range(256, 256 + 6 * 128, 128):
                assert lab.extend(volume, size, 30.0) == size
        finally:
            ended.set()
        assert all(future.result(60) > 0 for future in busy)


def test_files_grow_by_themselves(lab: Lab, tmp_path: Path) -> None:
    world = lab.host.world
    (tmp_path / "data").mkdir()
    world.connect(str(tmp_path / "data"))
    sd_id = world.domain(str(tmp_path / "data"))
    with pytest.raises(UnsupportedOnFileDomain):
        lab.extender.extend(sd_id, new_uuid(), MIB, 1.0)
