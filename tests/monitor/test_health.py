# SPDX-License-Identifier: GPL-2.0-or-later
"""Monitoring: what engines read, and that storage which hangs harms only itself."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.domains.conftest import World, build, wait_for
from vdsm_storage.base.units import MIB
from vdsm_storage.base.uuids import new_uuid
from vdsm_storage.domains.connection import Connections
from vdsm_storage.errors import StorageDomainDoesNotExist

INTERVAL = 0.2  # of the checks in these tests


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    made = build(tmp_path / "agent", None, INTERVAL)
    yield made
    made.close()


@pytest.fixture
def data(tmp_path: Path) -> str:
    (tmp_path / "data").mkdir()
    return str(tmp_path / "data")


@dataclass
class FuseServer:
    """A file system served by a process, which can be stopped in its tracks."""

    directory: Path
    pid: int

    def stop(self) -> None:
        os.kill(self.pid, signal.SIGSTOP)

    def resume(self) -> None:
        os.kill(self.pid, signal.SIGCONT)


@pytest.fixture
def fuse(tmp_path: Path) -> Iterator[FuseServer]:
    image, directory = tmp_path / "fuse.img", tmp_path / "fuse"
    directory.mkdir()
    with image.open("wb") as file:
        file.truncate(128 * MIB)
    subprocess.run(["mkfs.ext4", "-q", str(image)], check=True)
    server = subprocess.Popen(["fuse2fs", "-f", str(image), str(directory)])
    wait_for(lambda: os.path.ismount(directory))
    yield FuseServer(directory, server.pid)
    os.kill(server.pid, signal.SIGCONT)
    subprocess.run(["fusermount3", "-u", "-z", str(directory)], check=False)
    server.wait(20)


def age(world: World, sd_id: str) -> float:
    return float(world.health.storage_domains()[sd_id]["lastCheck"])


def test_record(world: World, data: str) -> None:
    """The types that engines cast: strings for the numbers with a fraction, real booleans."""
    world.connect(data)
    sd_id = world.domain(data)
    started = threading.Event()
    look = world.health._look

    def held_up(*args: object) -> object:
        assert started.wait(10)
        return look(*args)  # type: ignore[arg-type]

    world.health._look = held_up  # type: ignore[method-assign, assignment]
    world.pool(sd_id)
    record = world.health.storage_domains()[sd_id]
    assert record == {
        "code": 0, "lastCheck": record["lastCheck"], "delay": "0.000000", "valid": True,
        "acquired": False, "actual": False, "version": -1,
    }  # fmt: skip
    started.set()
    wait_for(lambda: world.health.storage_domains()[sd_id]["actual"])
    record = world.health.storage_domains()[sd_id]
    assert record["valid"] is True
    assert record["acquired"] is True
    assert (record["code"], record["version"]) == (0, 5)
    assert isinstance(record["lastCheck"], str)
    assert float(record["delay"]) > 0
    assert world.health.storage_domains([new_uuid()]) == {}
    assert list(world.health.storage_domains([sd_id])) == [sd_id]


def test_a_domain_that_is_not_there(world: World, data: str) -> None:
    world.connect(data)
    missing = new_uuid()
    world.services.pools.monitor(missing, 1)
    wait_for(lambda: world.health.storage_domains()[missing]["actual"])
    record = world.health.storage_domains()[missing]
    assert (record["code"], record["valid"]) == (358, False)
    assert world.events[-1][0] == missing
    world.services.pools.unmonitor(missing)
    wait_for(lambda: not world.health.busy(missing))


def test_events_on_change_only(world: World, data: str) -> None:
    world.connect(data)
    sd_id = world.domain(data)
    world.pool(sd_id)
    wait_for(lambda: world.health.usable(sd_id))
    path = world.services.registry.get(sd_id).metadata_path
    sound = Path(path).read_bytes()
    Path(path).write_bytes(sound.replace(b"VERSION=5", b"VERSION=4"))
    wait_for(lambda: not world.health.storage_domains()[sd_id]["valid"])
    assert world.health.storage_domains()[sd_id]["code"] == 752
    Path(path).write_bytes(sound)
    wait_for(lambda: world.health.storage_domains()[sd_id]["valid"])
    wait_for(lambda: len(world.events) == 3)
    assert [event[1]["code"] for event in world.events] == [0, 752, 0]


def test_a_domain_that_is_removed_and_comes_back(world: World, data: str) -> None:
    world.connect(data)
    sd_id = world.domain(data)
    world.pool(sd_id)
    wait_for(lambda: world.health.usable(sd_id))
    root = Path(world.services.registry.get(sd_id).path)
    root.rename(root.parent / "away")
    wait_for(lambda: world.health.storage_domains()[sd_id]["code"] == 358)
    (root.parent / "away").rename(root)
    wait_for(lambda: world.health.usable(sd_id))
    wait_for(lambda: world.events[-1][1]["code"] == 0)
    codes = [record["code"] for sd, record in world.events if sd == sd_id]
    assert [codes[0], codes[-1]] == [0, 0]
    assert 358 in codes


def test_a_pool_domain_stays_watched(world: World, data: str) -> None:
    world.connect(data)
    sd_id = world.domain(data)
    pool = world.pool(sd_id)
    world.services.pools.monitor(sd_id, 1)
    world.services.pools.unmonitor(sd_id)
    assert world.health.watched() == [sd_id]
    world.services.pools.monitor(sd_id, 1)
    world.services.pools.disconnect(pool)
    assert world.health.watched() == [sd_id]


@pytest.mark.mount
def test_hanging_storage_harms_only_itself(
    world: World, fuse: FuseServer, data: str, tmp_path: Path
) -> None:
    world.connect(str(fuse.directory))
    world.connect(data)
    hanging, sound = world.domain(str(fuse.directory)), world.domain(data)
    pool = world.pool(sound, hanging)
    wait_for(lambda: world.health.usable(hanging) and world.health.usable(sound))
    fuse.stop()
    try:
        wait_for(lambda: age(world, hanging) > 10 * INTERVAL)
        # Nothing piles up: one check waits, none behind it.
        lane = world.lanes.stats()[f"monitor {hanging}"]
        assert (lane["threads"], lane["queued"]) == (1, 0)
        assert age(world, sound) < age(world, hanging) / 2
        # The others go on, and what engines poll is answered at once.
        assert world.services.registry.get(sound).info()["uuid"] == sound
        found = world.services.pools.info(pool, -1, -1)["dominfo"]
        assert set(found) == {sound, hanging}
        world.services.members.set_description(sound, "still here")
        assert world.services.spm.status(pool)["spmStatus"] == "Free"
        look_on_all_connections(world)
    finally:
        fuse.resume()
    wait_for(lambda: age(world, hanging) < 5 * INTERVAL)
    assert world.health.usable(hanging)
    world.services.registry.forget(hanging)
    wait_for(lambda: world.services.registry.scan() == sorted((sound, hanging)))


def look_on_all_connections(world: World) -> None:
    """The first look waits for the connection that hangs, the second knows better."""
    took = []
    for _ in range(2):
        started = time.monotonic()
        with pytest.raises(StorageDomainDoesNotExist):
            world.services.registry.get(new_uuid())
        took.append(time.monotonic() - started)
    assert took[1] < took[0] / 2


@pytest.mark.mount
def test_a_fuse_connection(world: World, tmp_path: Path) -> None:
    """POSIXFS with a FUSE type, mounted by the agent."""
    image = tmp_path / "posix.img"
    with image.open("wb") as file:
        file.truncate(64 * MIB)
    subprocess.run(["mkfs.ext4", "-q", str(image)], check=True)
    params = {"id": "a", "connection": str(image), "vfs_type": "fuse.fuse2fs"}
    connections: Connections = world.services.connections
    assert connections.connect("POSIXFS", [params]) == [{"id": "a", "status": 0}]
    assert connections.connect("POSIXFS", [params]) == [{"id": "a", "status": 0}]
    path = connections.find(str(image), "POSIXFS")
    assert path is not None
    assert os.path.ismount(path)
    assert connections.disconnect("POSIXFS", [params]) == [{"id": "a", "status": 0}]
    assert not os.path.exists(path)


@pytest.mark.mount
def test_a_clean_stop_with_a_dead_server(tmp_path: Path) -> None:
    """The agent ends in time, and takes the mount out of the tree."""
    world = build(tmp_path / "agent", None, INTERVAL)
    image = tmp_path / "dead.img"
    with image.open("wb") as file:
        file.truncate(64 * MIB)
    subprocess.run(["mkfs.ext4", "-q", str(image)], check=True)
    mount = world.connect(str(image), "POSIXFS", vfs_type="fuse.fuse2fs")
    world.services.connections._mounts._timeout = 1.0
    server = server_of(image)
    os.kill(server, signal.SIGSTOP)
    try:
        world.close()
        assert mount not in Path("/proc/self/mountinfo").read_text()
    finally:
        os.kill(server, signal.SIGCONT)


def server_of(image: Path) -> int:
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            words = (entry / "cmdline").read_bytes().split(b"\0")
            if words[:2] == [b"fuse2fs", str(image).encode()]:
                return int(entry.name)
    raise AssertionError("no server")
