# SPDX-License-Identifier: GPL-2.0-or-later
"""Cold merge: prepareMerge, SDM.merge, finalizeMerge on real chains."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import threading
import time

import pytest

from vdsm_storage.base.uuids import new_uuid
from vdsm_storage.errors import (
    GenerationMismatch,
    MergeSnapshotsError,
    NoSpaceLeftOnDomain,
    UnexpectedVolumeState,
    VolumeDoesNotExist,
    VolumeIsNotInChain,
    VolumeNonWritable,
    WrongParentVolume,
)
from vdsm_storage.host.qemu_img import Image
from vdsm_storage.images import chain
from vdsm_storage.images import metadata as md
from vdsm_storage.images.merge import MergeRequest

MIB = 1024 * 1024


def request(refs, base, generation=0, bitmaps=False):
    """Merge refs[base + 1] into refs[base]."""
    low, top = refs[base], refs[base + 1]
    return MergeRequest(low.domain, low.image, low.volume, top.volume, generation, bitmaps)


def merge(datalab, asked):
    datalab.run(asked.prepare_task())
    datalab.run(asked.merge_job())
    datalab.run(asked.finalize_task())


def bitmaps(datalab, ref):
    return {b.name: b for b in datalab.qemu_img.info(Image(datalab.path(ref), "qcow2")).bitmaps}


@pytest.mark.parametrize("raw_base", [True, False])
@pytest.mark.parametrize(("depth", "base"), [(2, 0), (3, 0), (3, 1), (4, 1)])
def test_merge(datalab, raw_base, depth, base):
    store = datalab.domain()
    refs = datalab.chain(store, depth, raw_base=raw_base)
    leaf, top, low = refs[-1], refs[base + 1], refs[base]
    before = datalab.checksum(leaf)
    merge(datalab, request(refs, base))
    merged = low if top is leaf else leaf
    assert datalab.checksum(merged) == before
    now = datalab.metadata(low)
    assert (now.legality, now.generation) == (md.LEGAL, 1)
    assert now.voltype == (md.LEAF if top is leaf else md.INTERNAL)
    assert datalab.metadata(top).legality == md.ILLEGAL
    names = [m.volume for m in chain.walk(store, merged.image, merged.volume)]
    assert names == [r.volume for r in refs if r is not top]
    if top is not leaf:
        header = datalab.qemu_img.info(Image(datalab.path(refs[base + 2]), "qcow2"))
        assert header.backing == low.volume
        assert header.backing_format == datalab.format(low)
    store.unmake(top.image, top.volume)
    assert datalab.checksum(merged) == before


@pytest.mark.parametrize(("cow", "preallocated"), [(True, False), (False, False), (False, True)])
def test_base_grows_to_the_size_of_top(datalab, cow, preallocated):
    store = datalab.domain()
    base = datalab.volume(store, cow=cow, preallocated=preallocated)
    top = datalab.volume(store, parent=base, size=4 * MIB)
    datalab.write(top, 3 * MIB, MIB, 7)
    before = datalab.checksum(top)
    merge(datalab, request([base, top], 0))
    assert datalab.checksum(base) == before
    assert datalab.metadata(base).capacity == 4 * MIB
    if preallocated:
        assert store.sizes(base.image, base.volume).allocated >= 4 * MIB


def test_only_neighbours_that_may_change_are_merged(datalab):
    store = datalab.domain()
    refs = datalab.chain(store, 3)
    low, middle, leaf = refs
    other = datalab.volume(store)
    template = datalab.volume(store, voltype=md.SHARED)
    child = datalab.volume(store, parent=template)
    cases = [
        (MergeRequest(low.domain, low.image, low.volume, leaf.volume), WrongParentVolume, 921),
        (MergeRequest(low.domain, low.image, leaf.volume, middle.volume), VolumeIsNotInChain, 920),
        (MergeRequest(low.domain, low.image, leaf.volume, leaf.volume), VolumeIsNotInChain, 920),
        (MergeRequest(low.domain, low.image, other.volume, leaf.volume), VolumeDoesNotExist, 201),
        (request(refs, 0, generation=4), GenerationMismatch, 911),
        (request([template, child], 0), VolumeNonWritable, 213),
    ]
    for asked, error, code in cases:
        with pytest.raises(error) as caught:
            datalab.run(asked.prepare_task())
        assert caught.value.code == code
    for ref in refs:
        assert datalab.metadata(ref).legality == md.LEGAL


def test_steps_in_the_wrong_order(datalab):
    refs = datalab.chain(datalab.domain(), 2)
    asked = request(refs, 0)
    for early in (asked.merge_job(), asked.finalize_task()):
        with pytest.raises(UnexpectedVolumeState, match="prepareMerge"):
            datalab.run(early)
    datalab.run(asked.prepare_task())
    datalab.run(asked.merge_job())
    with pytest.raises(GenerationMismatch):
        datalab.run(asked.merge_job())
    with pytest.raises(GenerationMismatch):
        datalab.run(asked.prepare_task())


def test_finalize_without_merge_is_refused_when_base_is_too_small(datalab):
    store = datalab.domain()
    base = datalab.volume(store)
    top = datalab.volume(store, parent=base, size=4 * MIB)
    asked = request([base, top], 0)
    datalab.run(asked.prepare_task())
    with pytest.raises(UnexpectedVolumeState, match="merged"):
        datalab.run(asked.finalize_task())


@pytest.mark.parametrize("raw_base", [True, False])
def test_finalize_without_merge_loses_nothing(datalab, raw_base):
    """The samples of top that are not in base give it away."""
    store = datalab.domain()
    refs = datalab.chain(store, 3, raw_base=raw_base)
    before = datalab.checksum(refs[2])
    asked = request(refs, 0)
    datalab.run(asked.prepare_task())
    with pytest.raises(UnexpectedVolumeState, match="merged"):
        datalab.run(asked.finalize_task())
    assert datalab.checksum(refs[2]) == before
    assert datalab.metadata(refs[1]).legality == md.LEGAL
    datalab.run(asked.merge_job())
    datalab.run(asked.finalize_task())
    assert datalab.checksum(refs[2]) == before


@pytest.mark.parametrize("raw_base", [True, False])
@pytest.mark.parametrize("zeros", [True, False])
def test_zeros_and_nothing_are_merged_too(datalab, raw_base, zeros):
    store = datalab.domain()
    base = datalab.volume(store, cow=not raw_base)
    datalab.write(base, 0, MIB, 7)
    top = datalab.volume(store, parent=base)
    if zeros:
        datalab.io(top, "write -q -z 0 512k")
        datalab.write(top, 524288, 65536, 0)
    before = datalab.checksum(top)
    merge(datalab, request([base, top], 0))
    assert datalab.checksum(base) == before


def test_bitmaps_are_united(datalab):
    store = datalab.domain()
    base = datalab.volume(store, size=4 * MIB)
    tool = datalab.qemu_img
    tool.bitmap_add(datalab.path(base), "both")
    datalab.write(base, 0, MIB, 1)
    top = datalab.volume(store, parent=base, size=4 * MIB)
    datalab.write(top, MIB, MIB, 2)
    tool.bitmap_add(datalab.path(top), "both")
    tool.bitmap_add(datalab.path(top), "late")
    datalab.write(top, 2 * MIB, 65536, 3)
    merge(datalab, request([base, top], 0, bitmaps=True))
    found = bitmaps(datalab, base)
    assert {name: b.enabled for name, b in found.items()} == {"both": True, "late": True}
    assert dirty(datalab, base, "late") == [(2 * MIB, 65536)]
    assert dirty(datalab, base, "both")[0][0] == 0
    assert sum(length for _, length in dirty(datalab, base, "both")) >= MIB + 65536


def dirty(datalab, ref, name):
    """The dirty ranges of a bitmap, as a backup client sees them over NBD."""
    socket = f"/tmp/nbd-{os.getpid()}-{new_uuid()[:8]}.sock"
    server = subprocess.Popen(
        ["qemu-nbd", "-r", "-t", "-f", "qcow2", "-B", name, "-k", socket, datalab.path(ref)]
    )
    try:
        for _ in range(500):
            if os.path.exists(socket):
                break
            time.sleep(0.01)
        node = (
            f"driver=nbd,server.type=unix,server.path={socket},"
            f"x-dirty-bitmap=qemu:dirty-bitmap:{name}"
        )
        argv = ["qemu-img", "map", "--output=json", "--image-opts", node]
        out = subprocess.run(argv, capture_output=True, check=True, timeout=60).stdout
    finally:
        server.terminate()
        server.wait(10)
        if os.path.exists(socket):
            os.unlink(socket)
    return [(e["start"], e["length"]) for e in json.loads(out) if not e["data"]]


def break_bitmap(datalab, ref, name):
    """Leave it in use, as a guest that was killed does."""
    argv = ["qemu-io", "-f", "qcow2", datalab.path(ref)]
    process = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    process.stdin.write(b"write 0 64k\n")
    process.stdin.flush()
    for _ in range(500):
        time.sleep(0.01)
        found = bitmaps(datalab, ref).get(name)  # None: qemu is just writing the directory
        if found is not None and not found.valid:
            break
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not bitmaps(datalab, ref)[name].valid


@pytest.mark.parametrize("where", ["base", "top"])
def test_broken_bitmap_does_not_stop_the_merge(datalab, where):
    store = datalab.domain()
    base = datalab.volume(store)
    datalab.qemu_img.bitmap_add(datalab.path(base), "old")
    if where == "base":
        break_bitmap(datalab, base, "old")
    top = datalab.volume(store, parent=base)
    datalab.qemu_img.bitmap_add(datalab.path(top), "old")
    datalab.qemu_img.bitmap_add(datalab.path(top), "good")
    if where == "top":
        datalab.qemu_img.bitmap_remove(datalab.path(top), "good")
        break_bitmap(datalab, top, "old")
    else:
        datalab.write(top, 0, 65536, 4)
    before = datalab.checksum(top)
    merge(datalab, request([base, top], 0, bitmaps=True))
    assert datalab.checksum(base) == before
    assert set(bitmaps(datalab, base)) == ({"good"} if where == "base" else set())


def test_top_bitmaps_stay_behind_with_a_raw_base(datalab):
    refs = datalab.chain(datalab.domain(), 2)
    datalab.qemu_img.bitmap_add(datalab.path(refs[1]), "x")
    before = datalab.checksum(refs[1])
    merge(datalab, request(refs, 0, bitmaps=True))
    assert datalab.checksum(refs[0]) == before


@pytest.mark.mount
def test_no_space_can_be_repeated(datalab, small_fs):
    """The chain stays readable when base fills the storage; freed space lets the merge finish."""
    store = datalab.domain(root=small_fs)
    base = datalab.volume(store, size=64 * MIB)
    top = datalab.volume(store, parent=base, size=64 * MIB)
    datalab.write(top, 0, 12 * MIB, 5)
    filler = small_fs / "filler"
    free = os.statvfs(small_fs).f_bavail * os.statvfs(small_fs).f_frsize
    filler.write_bytes(b"x" * (free - 4 * MIB))
    before = datalab.checksum(top)
    asked = request([base, top], 0)
    datalab.run(asked.prepare_task())
    with pytest.raises(MergeSnapshotsError, match="No space left"):
        datalab.run(asked.merge_job())
    assert datalab.checksum(top) == before
    assert datalab.metadata(base).legality == md.ILLEGAL
    assert datalab.metadata(base).generation == 0
    filler.unlink()
    merge(datalab, asked)
    assert datalab.checksum(base) == before


def test_abort(datalab):
    store = datalab.domain()
    base = datalab.volume(store, size=400 * MIB)
    top = datalab.volume(store, parent=base, size=400 * MIB)
    datalab.write(top, 0, 300 * MIB, 5)
    asked = request([base, top], 0)
    datalab.run(asked.prepare_task())
    runner = datalab.runner()
    job_id = new_uuid()
    runner.start_job(job_id, asked.merge_job())
    running = runner.get(job_id, "job")
    tick = threading.Event()
    while store.sizes(base.image, base.volume).allocated < 2 * MIB and not running.done.is_set():
        tick.wait(0.002)
    runner.stop(running)
    assert running.done.wait(30)
    assert running.entry.error["code"] == 443
    assert datalab.metadata(base).generation == 0
    merge(datalab, asked)
    pattern = Image(datalab.path(base), "qcow2")
    assert datalab.qemu_img.check(pattern).corruptions == 0
    assert datalab.metadata(base).generation == 1


@pytest.mark.parametrize("step", ["prepare_task", "merge_job", "finalize_task"])
def test_crash_walk(datalab, step):
    """After any crash the chain reads the same, and the merge can be done from the start."""
    kind = {"prepare_task": "merge.prepare", "merge_job": "merge.run"}.get(step, "merge.finalize")
    for point in datalab.points(kind):
        store = datalab.domain()
        refs = datalab.chain(store, 3, raw_base=False)
        datalab.qemu_img.bitmap_add(datalab.path(refs[1]), "mine")
        before = datalab.checksum(refs[2])
        asked = request(refs, 0, bitmaps=True)
        if step != "prepare_task":
            datalab.run(asked.prepare_task())
        if step == "finalize_task":
            datalab.run(asked.merge_job())
        running = datalab.crash(getattr(asked, step)(), point)
        assert datalab.checksum(refs[2]) == before, point
        assert datalab.leftovers(store) == []
        now = datalab.metadata(refs[0])
        finished = running.entry.outcome == "success"
        if step == "prepare_task":
            assert (now.legality, finished) == (md.LEGAL, False), point
        elif step == "merge_job":
            assert (now.legality, now.generation) == (md.ILLEGAL, int(finished)), point
        else:
            assert finished == (point != "merge.finalize:locked")
            assert (now.legality == md.LEGAL) == finished, point
        if step == "finalize_task":
            if not finished:
                datalab.run(asked.finalize_task())
        elif not (step == "merge_job" and finished):
            merge(datalab, asked)
        else:
            datalab.run(asked.finalize_task())
        assert datalab.checksum(refs[2]) == before, point
        assert set(bitmaps(datalab, refs[0])) == {"mine"}, point


@pytest.mark.mount
def test_no_room_to_prepare(datalab, small_fs):
    """A preallocated base that cannot grow is as it was, and the merge can be asked again."""
    store = datalab.domain(root=small_fs)
    base = datalab.volume(store, cow=False, preallocated=True)
    top = datalab.volume(store, parent=base, size=64 * MIB)
    before = datalab.checksum(top)
    with pytest.raises(NoSpaceLeftOnDomain):
        datalab.run(request([base, top], 0).prepare_task())
    now = datalab.metadata(base)
    assert (now.legality, now.capacity) == (md.LEGAL, 2 * MIB)
    assert store.sizes(base.image, base.volume).apparent == 2 * MIB
    assert datalab.checksum(top) == before


def test_kill_9_in_the_middle_of_the_commit(datalab):
    """No writer is left behind; the chain reads the same; the merge is done again.

    qemu-img has both images open for writing, so the bitmaps of both missed writes: they go, and
    backup tools make a full backup instead of a wrong one.
    """
    store = datalab.domain()
    base = datalab.volume(store, size=400 * MIB)
    datalab.qemu_img.bitmap_add(datalab.path(base), "lost")
    top = datalab.volume(store, parent=base, size=400 * MIB)
    datalab.qemu_img.bitmap_add(datalab.path(top), "late")
    datalab.write(top, 0, 300 * MIB, 5)
    asked = request([base, top], 0, bitmaps=True)
    datalab.run(asked.prepare_task())

    def writing():
        return store.sizes(base.image, base.volume).allocated > 4 * MIB

    running = datalab.kill(asked.merge_job(), writing)
    assert running.entry.outcome == "cleanSuccess"
    assert datalab.metadata(base).generation == 0
    datalab.wait_free(base)
    datalab.io(top, "read -q -P 5 0 300M")
    merge(datalab, asked)
    datalab.io(base, "read -q -P 5 0 300M")
    assert bitmaps(datalab, base) == {}
    assert datalab.qemu_img.check(Image(datalab.path(base), "qcow2")).corruptions == 0
