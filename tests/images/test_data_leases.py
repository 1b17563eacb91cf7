# SPDX-License-Identifier: GPL-2.0-or-later
"""Jobs under a volume's real sanlock lease: who holds it, who must wait, what a crash leaves."""

from __future__ import annotations

import os
import time

import pytest

from vdsm_storage.base.clock import SystemClock
from vdsm_storage.base.lanes import Lanes
from vdsm_storage.base.uuids import new_uuid
from vdsm_storage.domains.file_store import FileStore
from vdsm_storage.host.sanlock import Sanlock
from vdsm_storage.images import metadata as md
from vdsm_storage.images.copy import Copying, CopyRequest
from vdsm_storage.images.guard import Guard
from vdsm_storage.leases.lease import Leases
from vdsm_storage.leases.lockspace import Lockspaces
from vdsm_storage.leases.model import Geometry

pytestmark = pytest.mark.sanlock

MIB = 1024 * 1024
HOST_ID = 9


@pytest.fixture(scope="module")
def lockspace(sanlock, tmp_path_factory):
    """A domain that this host is in, with its leases; joining takes seconds."""
    root = tmp_path_factory.mktemp("shared")
    sd_id, clock = new_uuid(), SystemClock()
    leases = Leases(sanlock, clock)
    (root / "ids").touch()
    leases.write_lockspace(sd_id, str(root / "ids"), Geometry())
    space = Lockspaces(sanlock, clock).open(sd_id, str(root / "ids"), Geometry())
    space.acquire(HOST_ID, 60)
    os.makedirs(root / sd_id / "images")
    yield sd_id, root, leases
    space.release()


@pytest.fixture
def shared(lockspace, datalab):
    """The domain's store in the lab, and copies that use its leases."""
    sd_id, root, leases = lockspace
    lock = datalab.domain().lock
    store = FileStore(str(root / sd_id), sd_id, 5, Geometry(), lock, leases)
    datalab.stores = {sd_id: store}
    use(datalab, leases)
    return store, leases


def use(datalab, leases):
    guard = Guard(datalab.find_store, datalab.locks, leases, 1.0)
    datalab.kinds = Copying(guard, datalab.qemu_img).kinds()


def two_volumes(datalab, store):
    source = datalab.volume(store, cow=False, size=256 * MIB)
    datalab.write(source, 0, 256 * MIB, 3)
    return source, datalab.volume(store, cow=False, size=256 * MIB)


def test_the_target_is_held_while_it_is_written(datalab, shared):
    store, leases = shared
    source, target = two_volumes(datalab, store)
    spec = store.lease(target.image, target.volume)
    assert leases.state(spec).owners == ()
    runner, job_id = datalab.runner(), new_uuid()
    runner.start_job(job_id, CopyRequest(source, target, 0).as_job())
    running = runner.get(job_id, "job")
    seen = set()
    while not running.done.is_set():
        if datalab.metadata(target).legality == md.ILLEGAL:
            seen.add(leases.state(spec).owners)
        assert leases.state(store.lease(source.image, source.volume)).owners == ()
    assert (HOST_ID,) in seen
    assert running.entry.outcome == "success"
    state = leases.state(spec)
    assert (state.owners, state.last_version) == ((), 1)


def test_a_target_that_another_holds(datalab, shared):
    store, leases = shared
    source, target = datalab.volume(store), datalab.volume(store)
    with leases.held(store.lease(target.image, target.volume), 5):
        running = datalab.job(CopyRequest(source, target, 0).as_job())
    assert running.entry.error["code"] == 651
    assert datalab.metadata(target).generation == 0
    assert datalab.metadata(target).legality == md.LEGAL
    assert datalab.job(CopyRequest(source, target, 0).as_job()).entry.outcome == "success"


def test_kill_9_frees_the_lease(datalab, shared, sanlock_daemon):
    store, leases = shared
    source, target = datalab.volume(store), datalab.volume(store)
    spec = store.lease(target.image, target.volume)
    request = CopyRequest(source, target, 0).as_job()
    job_id, child = new_uuid(), os.fork()
    if child == 0:
        try:
            use(datalab, Leases(Sanlock(sanlock_daemon, io_timeout=1), SystemClock()))
            datalab.lanes = Lanes(datalab.clock, 4, 100)
            runner = datalab.runner("volume.copy_data:marked")
            runner.start_job(job_id, request)
            runner.get(job_id, "job").done.wait(60)
        finally:
            os._exit(7)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -9
    for _ in range(500):
        if leases.state(spec).owners == ():
            break
        time.sleep(0.02)
    assert leases.state(spec).owners == ()
    assert leases.state(spec).last_version == 1  # it was held
    runner = datalab.runner()
    runner.load()
    runner.recover_domains(lambda domain: domain == store.id)
    assert runner.get(job_id, "job").entry.outcome == "cleanSuccess"
    assert datalab.metadata(target).legality == md.ILLEGAL
    assert datalab.metadata(target).generation == 0
    datalab.run(request)
    assert datalab.metadata(target).generation == 1
