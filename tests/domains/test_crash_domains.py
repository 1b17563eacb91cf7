# SPDX-License-Identifier: GPL-2.0-or-later
"""kill -9 at every step of every operation on domains and pools, then a restart."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.domains.conftest import World, build, wait_for
from vdsm_storage.base.uuids import new_uuid
from vdsm_storage.domains import lifecycle, masters, spm, upgrade
from vdsm_storage.domains.file import read_metadata
from vdsm_storage.errors import StorageDomainDoesNotExist
from vdsm_storage.jobs import journal

CHILD = Path(__file__).with_name("crash_child.py")
TOP = CHILD.parent.parent.parent
POINTS = {
    lifecycle.CREATE: ("laid_out", "leases", "complete"),
    lifecycle.FORMAT: ("hidden",),
    masters.CREATE: ("members", "written"),
    masters.RECONSTRUCT: ("promoted",),
    masters.SWITCH: ("promoted", "known"),
    masters.DESTROY: ("members",),
    spm.START: ("locked", "ready"),
    upgrade.UPGRADE: ("xleases", "volumes", "metadata"),
}
ALL = [(kind, step) for kind, steps in POINTS.items() for step in steps]


@pytest.fixture
def ids() -> tuple[str, str]:
    return new_uuid(), new_uuid()


@pytest.fixture
def paths(tmp_path: Path) -> tuple[str, str]:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    return str(tmp_path / "one"), str(tmp_path / "two")


def test_all_points_are_here(tmp_path: Path) -> None:
    world = build(tmp_path, None)
    kinds = [kind for kind in world.services.kinds() if not kind.name.startswith("block.")]
    assert {kind.name: kind.steps for kind in kinds} == POINTS
    world.close()


@pytest.mark.parametrize(("kind", "step"), ALL)
def test_crash(
    kind: str, step: str, tmp_path: Path, paths: tuple[str, str], ids: tuple[str, str]
) -> None:
    argv = [sys.executable, str(CHILD), str(tmp_path / "agent"), kind, *paths, *ids]
    env = {**os.environ, "VDSM_STORAGE_CRASH": f"{kind}:{step}", "PYTHONPATH": str(TOP)}
    result = subprocess.run(argv, env=env, capture_output=True, text=True, timeout=60)
    assert result.returncode == -signal.SIGKILL, result.stderr
    for _ in range(2):  # a second restart changes nothing more
        for world in restart(tmp_path):
            wait_for(lambda w=world: recovered(w))
            check(kind, step, world, paths, ids)


@pytest.mark.parametrize("step", ["promoted", "known"])
def test_recovered_before_the_pool_is_connected_again(
    step: str, tmp_path: Path, paths: tuple[str, str], ids: tuple[str, str]
) -> None:
    """A lane may recover once the mounts are back: the pool then comes with its new master."""
    kind = masters.SWITCH
    argv = [sys.executable, str(CHILD), str(tmp_path / "agent"), kind, *paths, *ids]
    env = {**os.environ, "VDSM_STORAGE_CRASH": f"{kind}:{step}", "PYTHONPATH": str(TOP)}
    subprocess.run(argv, env=env, capture_output=True, text=True, timeout=60)
    world = build(tmp_path / "agent", None)
    try:
        world.services.connections.restore()
        wait_for(lambda: recovered(world))
        assert world.services.pools.connected() is None
        world.services.pools.restore()
        check(kind, step, world, paths, ids)
    finally:
        world.health.close(10.0)
        world.lanes.close()


def restart(tmp_path: Path) -> Iterator[World]:
    world = build(tmp_path / "agent", None)
    world.services.restore()
    try:
        yield world
    finally:
        world.health.close(10.0)  # no clean stop: the next one restores again
        world.lanes.close()


def recovered(world: World) -> bool:
    world.runner.recover_domains(world.services.usable)
    tasks = world.runner.all(journal.TASK) + world.runner.all(journal.JOB)
    return not world.runner.all(journal.CALL) and all(task.done.is_set() for task in tasks)


def check(
    kind: str, step: str, world: World, paths: tuple[str, str], ids: tuple[str, str]
) -> None:
    for path, sd_id in zip(paths, ids, strict=True):
        assert set(os.listdir(path)) <= {sd_id}  # nothing half-made, nothing half-removed
    if kind == lifecycle.CREATE:
        assert os.listdir(paths[0]) == []
        with pytest.raises(StorageDomainDoesNotExist):
            world.services.registry.get(ids[0])
        return
    if kind == lifecycle.FORMAT:
        assert os.listdir(paths[0]) == []
        return
    check_pool(kind, step, world, paths, ids)


def check_pool(
    kind: str, step: str, world: World, paths: tuple[str, str], ids: tuple[str, str]
) -> None:
    found = [
        read_metadata(os.path.join(path, sd_id), sd_id)
        for path, sd_id in zip(paths, ids, strict=True)
    ]
    pools = [metadata.pools for metadata in found]
    roles = [metadata.role for metadata in found]
    if kind == masters.CREATE:
        done = step == "written"
        assert (pools[0] == pools[1] != []) == done
        assert roles == (["Master", "Regular"] if done else ["Regular", "Regular"])
    elif kind == masters.DESTROY:
        assert pools == [[], []]
        assert roles == ["Regular", "Regular"]
    elif kind == spm.START:
        pool = world.services.pools.connected()
        assert pool is not None
        assert world.services.spm.status(pool.id)["spmStatus"] == "Free"
        (task,) = world.runner.all(journal.TASK)
        assert task.entry.outcome == "cleanSuccess"
    elif kind == masters.SWITCH:
        assert roles == ["Regular", "Master"]
        pool = world.services.pools.connected()
        assert pool is not None
        assert pool.master == ids[1]
    elif kind == upgrade.UPGRADE:
        done = step == "metadata"
        assert found[0].version == (5 if done else 4)
        (job,) = world.runner.all(journal.JOB)
        assert job.entry.outcome == ("success" if done else "cleanSuccess")
    else:
        assert roles[1] == "Master"
        assert found[1].master_version == 2
