# SPDX-License-Identifier: GPL-2.0-or-later
"""copy_data between volumes of real directories, with qemu-img."""

from __future__ import annotations

import os
import threading

import pytest

from vdsm_storage.base.uuids import new_uuid
from vdsm_storage.errors import (
    CopyImageError,
    DestinationVolumeTooSmall,
    GenerationMismatch,
    ImageIsNotLegalChain,
    PrepareIllegalVolume,
    StorageDomainDoesNotExist,
    UnsupportedOperation,
    VolumeDoesNotExist,
    VolumeNonWritable,
)
from vdsm_storage.host.qemu_img import Image
from vdsm_storage.images import metadata as md
from vdsm_storage.images.copy import CopyRequest
from vdsm_storage.images.guard import VolumeRef

MIB = 1024 * 1024


@pytest.mark.parametrize("version", [3, 5])
@pytest.mark.parametrize("depth", [1, 3])
@pytest.mark.parametrize("raw_base", [True, False])
@pytest.mark.parametrize(
    ("cow", "preallocated"), [(True, False), (True, True), (False, False), (False, True)]
)
def test_collapse(datalab, version, depth, raw_base, cow, preallocated):
    source, target = datalab.domain(version), datalab.domain(version)
    leaf = datalab.chain(source, depth, raw_base=raw_base)[-1]
    copy = datalab.volume(target, cow=cow, preallocated=preallocated)
    datalab.run(CopyRequest(leaf, copy, generation=0).as_job())
    assert datalab.checksum(copy) == datalab.checksum(leaf)
    assert datalab.metadata(copy).generation == 1
    assert datalab.metadata(copy).legality == md.LEGAL
    info = datalab.qemu_img.info(Image(datalab.path(copy), datalab.format(copy)))
    assert info.backing is None
    assert info.virtual_size == 2 * MIB
    if cow:
        assert info.compat == ("0.10" if version == 3 else "1.1")
    if preallocated:
        assert info.allocated >= 2 * MIB
    assert datalab.leftovers(target) == []


def copy_chain(datalab, refs, target):
    """Copy a chain layer by layer, parents first, as engines do."""
    image, copies = new_uuid(), []
    for ref in refs:
        cow = datalab.format(ref) == "qcow2"
        parent = copies[-1] if copies else None
        copies.append(datalab.volume(target, image=image, parent=parent, cow=cow))
    for ref, copy in zip(refs, copies, strict=True):
        datalab.run(CopyRequest(ref, copy, generation=0).as_job())
    return copies


@pytest.mark.parametrize("raw_base", [True, False])
def test_chain_keeps_its_layers(datalab, raw_base):
    refs = datalab.chain(datalab.domain(), 3, raw_base=raw_base)
    copies = copy_chain(datalab, refs, datalab.domain())
    for ref, copy in zip(refs, copies, strict=True):
        assert datalab.checksum(copy) == datalab.checksum(ref)
        mine = datalab.qemu_img.info(Image(datalab.path(copy), datalab.format(copy)))
        parent = datalab.metadata(copy).parent
        assert mine.backing == (None if ref is refs[0] else parent)
    used = [datalab.stores[c.domain].sizes(c.image, c.volume).allocated for c in copies]
    assert used[2] < 500 * 1024  # its own two clusters, not the chain's data


def test_larger_target_keeps_its_size(datalab):
    store = datalab.domain()
    source = datalab.chain(store, 2)[-1]
    for cow in (True, False):
        target = datalab.volume(store, size=4 * MIB, cow=cow)
        datalab.run(CopyRequest(source, target).as_job())
        image = Image(datalab.path(target), datalab.format(target))
        assert datalab.qemu_img.info(image).virtual_size == 4 * MIB
        assert datalab.qemu_img.compare(Image(datalab.path(source), "qcow2"), image)


def test_old_data_of_the_target_is_gone(datalab):
    store = datalab.domain()
    source = datalab.volume(store, cow=False)
    for cow in (True, False):
        target = datalab.volume(store, cow=cow)
        datalab.write(target, 0, 2 * MIB, 99)
        datalab.run(CopyRequest(source, target).as_job())
        assert datalab.checksum(target) == datalab.checksum(source)


def test_bitmaps_follow(datalab):
    store = datalab.domain()
    source = datalab.chain(store, 2, raw_base=False)[-1]
    datalab.qemu_img.bitmap_add(datalab.path(source), "one")
    datalab.write(source, 0, 65536, 5)
    for bitmaps in (True, False):
        target = datalab.volume(store)
        datalab.run(CopyRequest(source, target, bitmaps=bitmaps).as_job())
        info = datalab.qemu_img.info(Image(datalab.path(target), "qcow2"))
        assert [b.name for b in info.bitmaps] == (["one"] if bitmaps else [])


def test_bitmaps_need_cow(datalab):
    store = datalab.domain()
    source = datalab.volume(store)
    for target in (datalab.volume(store, cow=False), datalab.volume(datalab.domain(3))):
        with pytest.raises(UnsupportedOperation):
            datalab.run(CopyRequest(source, target, bitmaps=True).as_job())
        assert datalab.metadata(target).legality == md.LEGAL


def test_what_is_refused_leaves_the_target_alone(datalab):
    store = datalab.domain()
    source = datalab.chain(store, 2)[-1]
    small = datalab.volume(store, size=MIB)
    template = datalab.volume(store, voltype=md.SHARED)
    target = datalab.volume(store)
    missing = VolumeRef(store.id, source.image, new_uuid())
    nowhere = VolumeRef(new_uuid(), source.image, source.volume)
    cases = [
        (CopyRequest(source, target, generation=7), GenerationMismatch, 911),
        (CopyRequest(source, template), VolumeNonWritable, 213),
        (CopyRequest(missing, target), VolumeDoesNotExist, 201),
        (CopyRequest(source, missing), VolumeDoesNotExist, 201),
        (CopyRequest(nowhere, target), StorageDomainDoesNotExist, 358),
    ]
    for request, error, code in cases:
        with pytest.raises(error) as caught:
            datalab.run(request.as_job())
        assert caught.value.code == code
        assert datalab.metadata(target).legality == md.LEGAL
        assert datalab.metadata(target).generation == 0
    with pytest.raises(DestinationVolumeTooSmall):
        datalab.run(CopyRequest(source, small).as_job())


def test_illegal_source(datalab):
    store = datalab.domain()
    base, leaf = datalab.chain(store, 2)
    store.save(base.image, base.volume, datalab.metadata(base).with_(legality=md.ILLEGAL))
    with pytest.raises(PrepareIllegalVolume):
        datalab.run(CopyRequest(leaf, datalab.volume(store)).as_job())


@pytest.mark.parametrize("evil", ["/etc/passwd", "nbd:127.0.0.1:10809", "../../secret"])
def test_a_header_that_names_another_file_is_not_followed(datalab, evil):
    store = datalab.domain()
    source = datalab.volume(store)
    image = Image(datalab.path(source), "qcow2")
    datalab.qemu_img.rebase_unsafe(image, evil, "raw")
    target = datalab.volume(store)
    with pytest.raises(ImageIsNotLegalChain, match="names"):
        datalab.run(CopyRequest(source, target).as_job())
    assert datalab.metadata(target).legality == md.ILLEGAL


def test_abort_in_the_middle(datalab):
    store = datalab.domain()
    source = datalab.volume(store, cow=False, size=400 * MIB, preallocated=True)
    datalab.write(source, 0, 400 * MIB, 3)
    target = datalab.volume(store, cow=False, size=400 * MIB)
    runner = datalab.runner()
    job_id = new_uuid()
    runner.start_job(job_id, CopyRequest(source, target, generation=0).as_job())
    running = runner.get(job_id, "job")
    started = threading.Event()
    while not started.wait(0.005):
        if datalab.metadata(target).legality == md.ILLEGAL or running.done.is_set():
            break
    runner.stop(running)
    assert running.done.wait(30)
    assert running.entry.aborted
    assert running.entry.error["code"] == 443
    assert datalab.metadata(target).legality == md.ILLEGAL
    assert datalab.metadata(target).generation == 0
    datalab.run(CopyRequest(source, target, generation=0).as_job())  # and it can be done again
    assert datalab.metadata(target).generation == 1


def test_progress_is_told(datalab):
    store = datalab.domain()
    source = datalab.volume(store, cow=False, size=64 * MIB)
    datalab.write(source, 0, 64 * MIB, 3)
    running = datalab.job(CopyRequest(source, datalab.volume(store, size=64 * MIB)).as_job())
    assert running.entry.outcome == "success"
    assert running.operation.fraction == 1.0


def test_crash_walk(datalab):
    """Dying at any step leaves the target untouched, ILLEGAL, or whole; never in between."""
    store = datalab.domain()
    source = datalab.chain(store, 2)[-1]
    expected = {"locked": (0, md.LEGAL), "marked": (0, md.ILLEGAL), "copied": (0, md.ILLEGAL)}
    points = datalab.points("volume.copy_data")
    assert len(points) == 4
    for point in points:
        target = datalab.volume(store)
        running = datalab.crash(CopyRequest(source, target, generation=0).as_job(), point)
        now = datalab.metadata(target)
        state = expected.get(point.split(":")[1], (1, md.LEGAL))
        assert (now.generation, now.legality) == state, point
        assert running.entry.outcome == ("success" if state[0] else "cleanSuccess")
        assert (running.entry.error is None) == bool(state[0])
        assert datalab.leftovers(store) == []
        if not state[0]:
            datalab.run(CopyRequest(source, target, generation=0).as_job())
        assert datalab.checksum(target) == datalab.checksum(source)


@pytest.mark.mount
def test_no_space(datalab, small_fs):
    store, full = datalab.domain(), datalab.domain(root=small_fs)
    source = datalab.volume(store, cow=False, size=64 * MIB)
    datalab.write(source, 0, 64 * MIB, 3)
    target = datalab.volume(full, size=64 * MIB)
    with pytest.raises(CopyImageError, match="No space left"):
        datalab.run(CopyRequest(source, target, generation=0).as_job())
    assert datalab.metadata(target).legality == md.ILLEGAL
    assert datalab.metadata(target).generation == 0
    assert datalab.leftovers(full) == []
    assert os.path.exists(datalab.path(target))


def test_the_same_job_asked_of_many(datalab):
    """One does it; the others find the generation changed."""
    store = datalab.domain()
    source, target = datalab.chain(store, 2)[-1], datalab.volume(store)
    runner, request = datalab.runner(), CopyRequest(source, target, generation=0).as_job()
    ids = [new_uuid() for _ in range(6)]
    for job_id in ids:
        runner.start_job(job_id, request)
    jobs = [runner.get(job_id, "job") for job_id in ids]
    assert all(job.done.wait(60) for job in jobs)
    codes = sorted(job.entry.error["code"] if job.entry.error else 0 for job in jobs)
    assert codes == [0, 911, 911, 911, 911, 911]
    assert datalab.metadata(target).generation == 1
    assert datalab.checksum(target) == datalab.checksum(source)


def test_a_waiting_job_can_be_stopped(datalab):
    store = datalab.domain()
    source, target = datalab.volume(store), datalab.volume(store)
    runner, job_id = datalab.runner(), new_uuid()
    with datalab.guard.writing(target):
        runner.start_job(job_id, CopyRequest(source, target, generation=0).as_job())
        running = runner.get(job_id, "job")
        assert not running.done.wait(1.5)
        runner.stop(running)
        assert running.done.wait(30)
    assert running.entry.error["code"] == 443
    assert datalab.metadata(target).legality == md.LEGAL
