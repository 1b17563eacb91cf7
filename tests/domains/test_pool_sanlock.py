# SPDX-License-Identifier: GPL-2.0-or-later
"""Pools on POSIX domains under a real sanlock: host ids, the manager's lease, restarts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.domains.conftest import GOLDEN, World, build, wait_for
from vdsm_storage.base.uuids import BLANK
from vdsm_storage.domains.hostid import TEMPORARY
from vdsm_storage.errors import CannotDetachMaster
from vdsm_storage.host.mount import Mounts
from vdsm_storage.host.sanlock import Sanlock

pytestmark = [pytest.mark.sanlock, pytest.mark.mount]


def posix(world: World, tmp_path: Path, directory: str, **more: object) -> str:
    path = tmp_path / directory
    path.mkdir()
    world.bind(str(path))
    return world.domain(str(path), "POSIXFS", **more)


@pytest.mark.slow
def test_a_pools_life(shared_world: World, tmp_path: Path) -> None:
    """One long test: every host id takes seconds."""
    world, services = shared_world, shared_world.services
    master = posix(world, tmp_path, "one", name="Döm posix 5")
    pool = world.pool(master, connect=False)
    check_dump_after_create(world, master)

    # connecting acquires the host id in the background; the first writer waits for it
    world.attach(pool, master)
    domain = services.registry.get(master)
    assert domain.lockspace is not None
    with domain.store.lock.held(30.0):
        assert domain.lockspace.is_held()
        assert domain.lock.inquire().owners == (1,)
        # our own short hold makes no pool manager
        assert services.spm.status(pool) == {"spmStatus": "Free", "spmLver": -1, "spmId": -1}

    # the manager holds the lease, its version counts
    assert world.task(services.spm.start(pool)).outcome == "success"
    status = services.spm.status(pool)
    assert (status["spmStatus"], status["spmId"], status["spmLver"]) == ("SPM", 1, 3)
    services.spm.stop(pool)
    assert domain.lock.inquire().owners == ()

    # a writer to another domain of the pool also holds the master's lease
    member = posix(world, tmp_path, "two")
    services.members.attach(member, pool)
    services.members.activate(member, pool)
    other = services.registry.get(member)
    with other.store.lock.held(30.0):
        assert domain.own_lock.inquire().owners == (1,)
        assert other.own_lock.inquire().owners == (1,)
        assert other.store.lock.is_held()
    assert domain.own_lock.inquire().owners == ()
    other.lock.acquire(10.0)
    assert domain.own_lock.is_held()
    other.lock.release()
    assert not domain.own_lock.is_held()

    with pytest.raises(CannotDetachMaster):
        services.members.detach(master, pool)
    check_maintenance(world, tmp_path, pool, member)


def check_dump_after_create(world: World, master: str) -> None:
    """StoragePool.create leaves the leases as other hosts do: SDM was host 250's once."""
    services = world.services
    sample = json.loads((GOLDEN / "file-domain/posix-v5/5-dump.json").read_text())
    dump = services.dump(master, True)
    assert dump["metadata"].keys() == sample["metadata"].keys()
    (lease,), (expected,) = dump["leases"], sample["leases"]
    assert lease == {**expected, "lockspace": master}
    (host,), (expected,) = dump["lockspace"], sample["lockspace"]
    assert host == {**expected, "lockspace": master, "resource": host["resource"]}
    assert dump["xleases"] == {}
    assert services.registry.get(master).lock.inquire().last_owner == TEMPORARY


def check_maintenance(world: World, tmp_path: Path, pool: str, member: str) -> None:
    """A deactivated domain gives its host id back, so that its connection can go."""
    services = world.services
    spec = str(tmp_path / "two")
    path = services.connections.find(spec, "POSIXFS")
    assert path is not None
    services.members.deactivate(member, pool, BLANK, 1)
    assert member not in world.health.storage_domains()
    params = {"connection": spec, "vfs_type": "none", "mnt_options": "bind"}
    assert services.connections.disconnect("POSIXFS", [params])[0]["status"] == 0
    assert Mounts(10.0).find(path) is None
    answer = services.pools.info(pool, -1, -1)["dominfo"][member]
    assert answer["status"] == "Attached"
    assert "diskfree" not in answer


@pytest.mark.slow
def test_a_restart_after_a_crash(tmp_path: Path, sanlock: Sanlock) -> None:
    """The daemon keeps the host id; what was connected is found again, and nobody manages."""
    first = build(tmp_path / "agent", sanlock)
    master = posix(first, tmp_path, "one")
    pool = first.pool(master)
    wait_for(lambda: first.health.usable(master))
    world = build(tmp_path / "agent", sanlock)
    try:
        world.services.restore()
        assert world.services.pools.get(pool).host_id == 1
        wait_for(lambda: world.health.usable(master))
        assert world.services.spm.status(pool)["spmStatus"] == "Free"
        with world.services.registry.get(master).store.lock.held(10.0):
            pass
    finally:
        first.health._closed = True
        world.close()
    assert Mounts(10.0).points() == [
        p for p in Mounts(10.0).points() if str(tmp_path) not in p.target
    ]


@pytest.mark.slow
def test_a_temporary_host_id_that_a_crash_left(tmp_path: Path, sanlock: Sanlock) -> None:
    """The monitor gives host id 250 back and takes its own."""
    world = build(tmp_path / "agent", sanlock)
    try:
        master = posix(world, tmp_path, "one")
        pool = world.pool(master, connect=False)
        domain = world.services.registry.get(master)
        assert domain.lockspace is not None
        domain.lockspace.acquire(TEMPORARY, 30.0)
        domain.lockspace._host_id = None  # as a new process sees it
        world.attach(pool, master)
        wait_for(lambda: world.health.usable(master))
        assert domain.lockspace.joined_as() == 1
        assert world.health.storage_domains()[master]["acquired"] is True
    finally:
        world.close()
