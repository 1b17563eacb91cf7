# SPDX-License-Identifier: GPL-2.0-or-later
"""External leases on a real file with a real sanlock."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from vdsm_storage.base.clock import SystemClock
from vdsm_storage.base.lanes import Lanes
from vdsm_storage.base.locks import Locks
from vdsm_storage.base.units import MIB
from vdsm_storage.base.uuids import new_uuid
from vdsm_storage.errors import (
    ActionStopped,
    GenerationMismatch,
    JobStatusMismatch,
    LeaseExists,
    LeaseHeldElsewhere,
    LeasesIndexUnusable,
    LeasesUnsupported,
    NoSuchLease,
)
from vdsm_storage.jobs.journal import TASK, Journal
from vdsm_storage.jobs.operation import CrashPoints
from vdsm_storage.jobs.runner import Request, Runner
from vdsm_storage.jobs.tasks import Tasks
from vdsm_storage.leases import external as ext
from vdsm_storage.leases.external import ExternalLeases, Hosting, LeaseRef
from vdsm_storage.leases.index import INDEX_SIZE
from vdsm_storage.leases.local_lock import FileLock
from vdsm_storage.leases.model import Geometry

pytestmark = pytest.mark.sanlock
HARDWARE = "4c4c4544-0000-0000-0000-000000000001"
JOB = {"type": "JOB", "job_id": new_uuid(), "generation": 3, "job_status": "PENDING"}


@dataclass
class Domain:
    id: str
    xleases_path: str | None
    lock: FileLock
    geometry: Geometry = field(default_factory=Geometry)


@dataclass
class World:
    domain: Domain
    external: ExternalLeases
    runner: Runner
    leases: Any

    def run(self, kind: str, lease: str, **params: Any) -> None:
        given = {"sd_id": self.domain.id, "lease_id": lease, **params}
        self.runner.run(Request(kind, given, [self.domain.id], "lease"))

    def create(self, metadata: Any = None) -> LeaseRef:
        ref = LeaseRef(self.domain.id, new_uuid())
        task = self.external.start_create(ref, metadata)
        assert self.wait(task) == "success"
        return ref

    def wait(self, task: str) -> str:
        running = self.runner.get(task, TASK)
        assert running is not None
        assert running.done.wait(20)
        return running.entry.outcome


@pytest.fixture
def world(joined: Any, tmp_path: Path) -> Iterator[World]:
    clock = SystemClock()
    for name in ("lock", "xleases"):
        (tmp_path / name).touch()
    sd_id = joined.lockspace.id
    domain = Domain(
        sd_id, str(tmp_path / "xleases"), FileLock(sd_id, str(tmp_path / "lock"), clock)
    )
    joined.leases.format_xleases(domain.xleases_path, sd_id, Geometry())
    lanes = Lanes(clock)
    journal = Journal(str(tmp_path / "journal"))
    runner = Runner(journal, lanes, clock, CrashPoints(), lambda entry, fraction: None)
    hosting = Hosting(runner.start_task, lambda: HARDWARE)
    external = ExternalLeases(
        joined.leases, lambda _: domain, Locks(clock), clock, 1.0, hosting
    )
    runner.add_kinds(external.kinds())
    yield World(domain, external, runner, joined.leases)
    lanes.close()


def test_create_grows_the_file_lease_by_lease(world: World) -> None:
    path = world.domain.xleases_path
    assert path is not None
    assert os.path.getsize(path) == MIB + INDEX_SIZE
    refs = [world.create() for _ in range(2)]
    assert os.path.getsize(path) == 5 * MIB
    for number, ref in enumerate(refs):
        assert world.external.spec(ref).offset == (3 + number) * MIB
        assert world.external.status(ref) == {"owners": [], "version": None}
    assert set(world.external.all(world.domain.id)) == {ref.lease_id for ref in refs}


def test_create_twice(world: World) -> None:
    ref = world.create()
    with pytest.raises(LeaseExists):
        world.run(ext.CREATE, ref.lease_id)
    assert world.external.spec(ref).offset == 3 * MIB
    with world.leases.held(world.external.spec(ref), 1):
        assert world.external.status(ref)["owners"] == [7]


def test_delete_clears_the_slot_and_it_is_used_again(world: World) -> None:
    first, second = world.create(), world.create()
    spec = world.external.spec(first)
    world.run(ext.DELETE, first.lease_id)
    with pytest.raises(NoSuchLease) as error:
        world.external.spec(first)
    assert error.value.code == 936
    with open(spec.path, "rb") as file:
        file.seek(spec.offset)
        record = file.read(512)
    assert record[:4] == b"\x10\x20\x15\x06"  # sanlock's magic stays
    assert not any(record[56:152])  # both names are gone
    third = world.create()
    assert world.external.spec(third).offset == spec.offset
    assert world.external.spec(second).offset == spec.offset + MIB


def test_delete_of_a_lease_in_use(world: World) -> None:
    ref = world.create()
    with (
        world.leases.held(world.external.spec(ref), 1),
        pytest.raises(LeaseHeldElsewhere),
    ):
        world.run(ext.DELETE, ref.lease_id)
    assert world.external.status(ref)["owners"] == []


def test_delete_of_no_lease(world: World) -> None:
    with pytest.raises(NoSuchLease):
        world.run(ext.DELETE, new_uuid())


def test_job_metadata_from_create_to_end(world: World) -> None:
    ref = world.create(metadata=JOB)
    found = world.external.status(ref)["metadata"]
    assert {key: found[key] for key in JOB} == JOB
    assert found["host_hardware_id"] == HARDWARE
    with world.external.job(ref, JOB["job_id"], 3):
        assert world.external.status(ref)["metadata"]["job_status"] == "PENDING"
    done = world.external.status(ref)["metadata"]
    assert (done["generation"], done["job_status"]) == (4, "SUCCEEDED")
    with pytest.raises(GenerationMismatch), world.external.job(ref, JOB["job_id"], 3):
        pass
    with pytest.raises(JobStatusMismatch), world.external.job(ref, JOB["job_id"], 4):
        pass


def test_a_job_that_fails_says_so(world: World) -> None:
    ref = world.create(metadata=JOB)
    with pytest.raises(ActionStopped), world.external.job(ref, JOB["job_id"], 3):
        raise ActionStopped()
    assert world.external.status(ref)["metadata"]["job_status"] == "FAILED"


def test_fence(world: World) -> None:
    ref = world.create(metadata=JOB)
    with pytest.raises(GenerationMismatch) as error:
        world.external.fence(ref, {**JOB, "generation": 2})
    assert error.value.code == 911
    with world.external.job(ref, JOB["job_id"], 3), pytest.raises(LeaseHeldElsewhere):
        world.external.fence(ref, JOB)
    other = world.create(metadata=JOB)
    world.external.fence(other, JOB)
    found = world.external.status(other)["metadata"]
    assert (found["generation"], found["job_status"]) == (4, "FENCED")
    with pytest.raises(JobStatusMismatch), world.external.job(other, JOB["job_id"], 4):
        pass


def test_fence_of_a_lease_without_a_job(world: World) -> None:
    with pytest.raises(JobStatusMismatch) as error:
        world.external.fence(world.create(), JOB)
    assert error.value.code == 912


def test_rebuild_finds_every_lease(world: World) -> None:
    refs = [world.create() for _ in range(3)]
    world.run(ext.DELETE, refs[1].lease_id)
    before = world.external.all(world.domain.id)
    path = world.domain.xleases_path
    assert path is not None
    with open(path, "r+b") as file:
        file.seek(MIB)
        file.write(bytes(4096))
    with pytest.raises(LeasesIndexUnusable):
        world.external.spec(refs[0])
    world.runner.run(Request(ext.REBUILD, {"sd_id": world.domain.id}, [], "lease"))
    assert world.external.all(world.domain.id) == before


def test_a_domain_without_external_leases(world: World) -> None:
    world.domain.xleases_path = None
    with pytest.raises(LeasesUnsupported):
        world.external.check_domain(world.domain.id)


def test_tasks_tell_engines_what_they_are(world: World) -> None:
    ref = world.create()
    assert world.wait(world.external.start_delete(ref)) == "success"
    assert world.wait(world.external.start_rebuild(ref.sd_id)) == "success"
    verbs = [info["verb"] for info in Tasks(world.runner).infos().values()]
    assert verbs == ["addLease", "removeLease", "rebuildLeases"]
    with pytest.raises(NoSuchLease):
        world.external.start_delete(ref)


def test_create_reverted(world: World) -> None:
    ref = LeaseRef(world.domain.id, new_uuid())
    task = world.external.start_create(ref, None)
    world.wait(task)
    Tasks(world.runner).revert(task)
    with pytest.raises(NoSuchLease):
        world.external.info(ref)
    assert Tasks(world.runner).status(task)["taskResult"] == "cleanSuccess"
    assert world.external.info(world.create())["offset"] == 3 * MIB
