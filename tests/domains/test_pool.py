# SPDX-License-Identifier: GPL-2.0-or-later
"""Pools on local directories: what an engine does with them, and what it reads."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import Any

import pytest

from tests.domains.conftest import World, wait_for
from vdsm_storage.base.clock import SystemClock
from vdsm_storage.base.uuids import BLANK, new_uuid
from vdsm_storage.domains.masters import NewPool
from vdsm_storage.domains.pool import ACTIVE, ATTACHED, Pool
from vdsm_storage.errors import (
    AgentError,
    CannotConnectMultiplePools,
    CannotDetachMaster,
    CannotFormatAttached,
    CannotFormatConnected,
    HostIdMismatch,
    IsSpm,
    NotSpm,
    SpmStatusError,
    StorageDomainActive,
    StorageDomainAlreadyAttached,
    StorageDomainNotInPool,
    StoragePoolMasterNotFound,
    StoragePoolUnknown,
    StoragePoolWrongMaster,
    TaskInProgress,
)
from vdsm_storage.images.store import Store
from vdsm_storage.jobs.operation import Kind, Operation
from vdsm_storage.jobs.runner import Request
from vdsm_storage.leases.local_lock import FileLock


@pytest.fixture
def two(world: World, tmp_path: Path) -> tuple[str, str]:
    """Two free domains."""
    made = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        world.connect(str(tmp_path / name))
        made.append(world.domain(str(tmp_path / name)))
    return made[0], made[1]


def metadata(world: World, sd_id: str) -> dict[str, str]:
    return dict(world.services.registry.get(sd_id).metadata().values)


def info(world: World, pool: str) -> dict[str, Any]:
    return world.services.pools.info(pool, *world.services.spm.cached(pool))


# -- create ----------------------------------------------------------------------------------


def test_create(world: World, two: tuple[str, str]) -> None:
    master, member = two
    pool = world.pool(master, member, connect=False)
    found = metadata(world, master)
    assert found["ROLE"] == "Master"
    assert found["POOL_UUID"] == pool
    assert found["POOL_DOMAINS"] == f"{master}:Active,{member}:Active"
    found = metadata(world, member)
    assert (found["ROLE"], found["POOL_UUID"]) == ("Regular", pool)
    assert "MASTER_VERSION" not in found
    with pytest.raises(StorageDomainAlreadyAttached) as error:
        world.services.masters.create(NewPool(new_uuid(), "x", master, 1, [master]))
    assert error.value.code == 380
    with pytest.raises(StoragePoolUnknown):
        world.services.pools.get(pool)


# -- connect ---------------------------------------------------------------------------------


def test_connect_and_links(world: World, two: tuple[str, str]) -> None:
    pool = world.pool(*two)
    tree = world.root / "data-center" / pool
    for sd_id in two:
        assert (tree / sd_id / "dom_md" / "metadata").exists()
        assert (tree / sd_id).readlink() == Path(world.services.registry.get(sd_id).path)
    assert (tree / "mastersd").readlink() == (tree / two[0]).readlink()
    assert set(world.health.storage_domains()) == set(two)  # at once, measured or not
    world.services.pools.disconnect(pool)
    assert not tree.exists()
    world.services.pools.disconnect(pool)
    wait_for(lambda: not world.health.busy(two[0]))
    assert world.health.storage_domains() == {}


def test_refresh(world: World, two: tuple[str, str]) -> None:
    pool = world.pool(*two)
    refreshed = Pool(pool, 1, two[0], 1, {two[0]: ACTIVE, two[1]: ATTACHED})
    world.services.pools.connect(refreshed, with_map=True)
    assert set(world.health.storage_domains()) == {two[0]}  # how engines see "in maintenance"
    assert not (world.root / "data-center" / pool / two[1]).is_symlink()
    world.services.pools.connect(Pool(pool, 1, two[0], 1), with_map=False)
    assert world.services.pools.get(pool) == refreshed


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"host_id": 2}, HostIdMismatch),
        ({"master_version": 0}, StoragePoolWrongMaster),
        ({"master": new_uuid()}, StoragePoolMasterNotFound),
        ({"id": new_uuid()}, CannotConnectMultiplePools),
    ],
)
def test_refused_refresh(
    world: World, two: tuple[str, str], change: dict[str, Any], error: type[AgentError]
) -> None:
    pool = world.pool(*two)
    wanted = {"id": pool, "host_id": 1, "master": two[0], "master_version": 1, **change}
    with pytest.raises(error):
        world.services.pools.connect(Pool(**wanted, domains={two[0]: ACTIVE}), with_map=True)
    assert world.services.pools.get(pool).active == sorted(two)


@pytest.mark.parametrize("with_map", [True, False])
def test_wrong_masters(world: World, two: tuple[str, str], with_map: bool) -> None:
    pool = world.pool(*two, connect=False)

    def connect(pool_id: str, master: str, version: int) -> None:
        wanted = Pool(pool_id, 1, master, version, {master: ACTIVE})
        world.services.pools.connect(wanted, with_map=with_map)

    for pool_id, master, version in ((pool, two[1], 1), (new_uuid(), two[0], 1), (pool, two[0], 0)):
        with pytest.raises(StoragePoolWrongMaster) as error:
            connect(pool_id, master, version)
        assert error.value.code == 324
    if not with_map:
        with pytest.raises(StoragePoolWrongMaster):
            connect(pool, two[0], 2)
    assert world.services.pools.connected() is None


def test_info_has_the_types_that_engines_read(world: World, two: tuple[str, str]) -> None:
    pool = world.pool(*two)
    wait_for(lambda: all(map(world.health.usable, two)))
    world.services.members.deactivate(two[1], pool, BLANK, 1)
    found = info(world, pool)
    assert found["info"]["name"] == "Default"
    assert found["info"]["type"] == "LOCALFS"
    assert found["info"]["master_uuid"] == two[0]
    assert found["info"]["master_ver"] == 1
    assert found["info"]["version"] == "5"
    active, attached = found["dominfo"][two[0]], found["dominfo"][two[1]]
    assert active["status"] == "Active"
    assert active["diskfree"].isdigit()
    assert active["disktotal"].isdigit()
    assert active["alerts"] == []
    assert attached["status"] == "Attached"


# -- members ---------------------------------------------------------------------------------


def test_attach_activate_deactivate_detach(world: World, two: tuple[str, str]) -> None:
    pool = world.pool(two[0])
    members = world.services.members
    members.attach(two[1], pool)
    assert world.services.pools.get(pool).domains[two[1]] == ATTACHED
    assert metadata(world, two[1])["POOL_UUID"] == pool
    with pytest.raises(StorageDomainAlreadyAttached):
        members.attach(two[1], pool)
    members.activate(two[1], pool)
    members.activate(two[1], pool)
    assert two[1] in world.health.storage_domains()
    with pytest.raises(StorageDomainActive):
        members.detach(two[1], pool)
    members.deactivate(two[1], pool, BLANK, 1)
    members.deactivate(two[1], pool, BLANK, 1)
    members.detach(two[1], pool)
    assert metadata(world, two[1])["POOL_UUID"] == ""
    assert two[1] not in info(world, pool)["dominfo"]
    with pytest.raises(StorageDomainNotInPool):
        members.activate(two[1], pool)
    with pytest.raises(CannotDetachMaster):
        members.detach(two[0], pool)


def test_force_detach_without_a_pool(world: World, two: tuple[str, str]) -> None:
    pool = world.pool(*two)
    with pytest.raises(StorageDomainActive):
        world.services.members.force_detach(two[0], pool)
    world.services.pools.disconnect(pool)
    for sd_id in two:
        world.services.members.force_detach(sd_id, pool)
        found = metadata(world, sd_id)
        assert (found["ROLE"], found["POOL_UUID"]) == ("Regular", "")
        assert not [key for key in found if key.startswith(("POOL_S", "POOL_D", "MASTER"))]


def test_format_refused_while_in_use(world: World, two: tuple[str, str]) -> None:
    pool = world.pool(*two)
    pools, lifecycle = world.services.pools, world.services.lifecycle
    with pytest.raises(CannotFormatConnected):
        lifecycle.format(two[0], True, pools.user_of(two[0]))
    pools.disconnect(pool)
    with pytest.raises(CannotFormatAttached) as error:
        lifecycle.format(two[0], False, pools.user_of(two[0]))
    assert error.value.code == 391
    lifecycle.format(two[0], True, pools.user_of(two[0]))
    assert not os.path.exists(world.services.registry.get(two[1]).path.replace(two[1], two[0]))


def test_names(world: World, two: tuple[str, str]) -> None:
    pool = world.pool(two[0])
    world.services.members.set_description(two[0], "  neü ")
    world.services.members.set_pool_description(pool, "Pööl")
    assert metadata(world, two[0])["DESCRIPTION"] == "neü"
    assert info(world, pool)["info"]["name"] == "Pööl"


def test_domains_containing_image(world: World, two: tuple[str, str]) -> None:
    pool = world.pool(*two)
    assert world.services.pools.containing_image(pool, new_uuid()) == []


# -- the master role -------------------------------------------------------------------------


def test_switch_master(world: World, two: tuple[str, str]) -> None:
    pool = world.pool(*two)
    world.task(world.services.spm.start(pool))
    with pytest.raises(StoragePoolWrongMaster):
        world.services.start_switch(pool, two[1], two[0], 2)
    entry = world.task(world.services.start_switch(pool, two[0], two[1], 2))
    assert entry.outcome == "success"
    assert metadata(world, two[0])["ROLE"] == "Regular"
    assert metadata(world, two[1])["ROLE"] == "Master"
    found = info(world, pool)["info"]
    assert (found["master_uuid"], found["master_ver"]) == (two[1], 2)
    assert world.services.spm.status(pool)["spmStatus"] == "SPM"
    assert world.services.registry.get(two[1]).own_lock.is_held()
    assert not world.services.registry.get(two[0]).own_lock.is_held()
    link = world.root / "data-center" / pool / "mastersd"
    assert link.readlink().name == two[1]


def test_deactivating_the_master_moves_the_role(world: World, two: tuple[str, str]) -> None:
    pool = world.pool(*two)
    world.task(world.services.spm.start(pool))
    world.services.members.deactivate(two[0], pool, two[1], 2)
    assert metadata(world, two[1])["ROLE"] == "Master"
    assert world.services.pools.get(pool).domains == {two[0]: ATTACHED, two[1]: ACTIVE}
    world.services.members.detach(two[0], pool)
    world.services.spm.stop(pool)


def test_reconstruct(world: World, two: tuple[str, str]) -> None:
    pool = world.pool(*two, connect=False)
    new = NewPool(pool, "Default", two[1], 5, [two[1], two[0], new_uuid()], host_id=1)
    world.services.masters.reconstruct(new)
    assert metadata(world, two[1])["MASTER_VERSION"] == "5"
    assert metadata(world, two[0])["ROLE"] == "Regular"
    with pytest.raises(StoragePoolWrongMaster):
        world.attach(pool, *two, version=5)
    world.attach(pool, two[1], two[0], version=5)


def test_destroy(world: World, two: tuple[str, str]) -> None:
    pool = world.pool(*two)
    world.task(world.services.spm.start(pool))
    world.services.destroy(pool)
    assert all(metadata(world, sd)["POOL_UUID"] == "" for sd in two)
    assert world.services.pools.connected() is None


# -- the manager -----------------------------------------------------------------------------


def test_manager(world: World, two: tuple[str, str]) -> None:
    spm = world.services.spm
    pool = world.pool(two[0])
    with pytest.raises(StoragePoolUnknown) as unknown:
        spm.status(new_uuid())
    assert unknown.value.code == 309
    assert spm.status(pool) == {"spmStatus": "Free", "spmLver": -1, "spmId": -1}
    with pytest.raises(NotSpm) as not_spm:
        spm.stop(pool)
    assert not_spm.value.code == 654
    entry = world.task(spm.start(pool))
    assert (entry.outcome, entry.verb) == ("success", "spmStart")
    found = spm.status(pool)
    assert (found["spmStatus"], found["spmId"]) == ("SPM", 1)
    with pytest.raises(IsSpm) as is_spm:
        spm.start(pool)
    assert is_spm.value.code == 656
    root = Path(world.services.registry.get(two[0]).path)
    assert sorted(p.name for p in (root / "master").iterdir()) == ["tasks", "vms"]
    spm.stop(pool)
    assert spm.status(pool)["spmStatus"] == "Free"
    assert not world.services.registry.get(two[0]).own_lock.is_held()


def test_manager_stays_while_tasks_run(world: World, two: tuple[str, str]) -> None:
    go = threading.Event()

    def run(op: Operation) -> None:
        assert go.wait(30)

    world.runner.add_kinds([Kind("test.wait", (), run, lambda op: False)])
    pool = world.pool(two[0])
    world.task(world.services.spm.start(pool))
    task = world.runner.start_task(Request("test.wait", {}, [], "test"))
    with pytest.raises(TaskInProgress) as error:
        world.services.spm.stop(pool)
    assert error.value.code == 406
    go.set()
    world.task(task)
    world.services.spm.stop(pool)


def test_another_manager(world: World, two: tuple[str, str], tmp_path: Path) -> None:
    """Somebody else holds the master's lock: the task fails, and nothing is half taken."""
    pool = world.pool(*two)
    master = world.services.registry.get(two[0])
    spm = world.services.spm
    spm._lock_timeout = 0.2
    other = FileLock(two[0], f"{master.path}/dom_md/ids", SystemClock())
    with other.held(1.0):
        entry = world.task(spm.start(pool))
        assert entry.error["code"] == SpmStatusError.code
        assert spm.status(pool)["spmStatus"] == "Free"
        store: Store = master.store
        with pytest.raises(SpmStatusError), store.lock.held(0.1):
            pass
    assert world.task(spm.start(pool)).outcome == "success"


def test_manager_is_not_assumed_after_a_restart(world: World, two: tuple[str, str]) -> None:
    pool = world.pool(two[0])
    world.task(world.services.spm.start(pool))
    world.services.spm.close()  # the lease goes with the process
    assert world.services.spm.status(pool)["spmStatus"] == "Free"


def test_the_manager_that_lost_its_lease(world: World, two: tuple[str, str]) -> None:
    """An operation that holds the lease for a moment does not make a manager again."""
    pool = world.pool(*two)
    master = world.services.registry.get(two[0])
    world.task(world.services.spm.start(pool))
    assert world.services.leases_lost(two[1]) == {two[1]}
    assert world.services.spm.is_spm(pool)
    master.own_lock.release()
    assert world.services.leases_lost(two[0]) == set(two)
    with master.store.lock.held(5.0):
        assert world.services.spm.status(pool)["spmStatus"] == "Free"
    assert world.task(world.services.spm.start(pool)).outcome == "success"
