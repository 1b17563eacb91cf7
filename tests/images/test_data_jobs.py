# SPDX-License-Identifier: GPL-2.0-or-later
"""update_volume, amend_volume, bitmaps, sparsify and reduce on real volumes."""

from __future__ import annotations

import json
import os
import stat
import subprocess

import pytest

from vdsm_storage.base.uuids import new_uuid
from vdsm_storage.errors import (
    AddBitmapError,
    BitmapDoesNotExist,
    GenerationMismatch,
    IncorrectFormat,
    InvalidParameter,
    InvalidVolumeUpdate,
    UnsupportedOperation,
    VolumeNonWritable,
)
from vdsm_storage.host.qemu_img import Image, QemuImg
from vdsm_storage.images import bitmaps as bm
from vdsm_storage.images import metadata as md
from vdsm_storage.images.copy import CopyRequest
from vdsm_storage.images.sparsify import reduce_task, sparsify_job
from vdsm_storage.images.update import amend_job, update_job

MIB = 1024 * 1024


def info(datalab, ref):
    return datalab.qemu_img.info(Image(datalab.path(ref), datalab.format(ref)))


# -- update ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("attributes", "field", "value"),
    [
        ({"legality": "ILLEGAL"}, "legality", "ILLEGAL"),
        ({"description": "näme", "type": None}, "description", "näme"),
        ({"type": "SHARED"}, "voltype", "SHARED"),
    ],
)
def test_update_counts_the_generation(datalab, attributes, field, value):
    ref = datalab.volume(datalab.domain())
    datalab.run(update_job(ref, 0, attributes))
    now = datalab.metadata(ref)
    assert getattr(now, field) == value
    assert now.generation == 1


def test_fencing_sets_the_generation(datalab):
    ref = datalab.volume(datalab.domain())
    datalab.run(update_job(ref, 0, {"generation": 3}))
    assert datalab.metadata(ref).generation == 3
    with pytest.raises(GenerationMismatch) as caught:
        datalab.run(update_job(ref, 0, {"generation": 3}))
    assert caught.value.code == 911
    datalab.run(update_job(ref, 3, {"generation": 999}))
    datalab.run(update_job(ref, None, {"legality": "LEGAL"}))
    assert datalab.metadata(ref).generation == 0  # it wraps


def test_what_update_refuses(datalab):
    store = datalab.domain()
    base, leaf = datalab.chain(store, 2)
    for attributes in (
        {},
        {"legality": None},
        {"type": "LEAF"},
        {"legality": "FAKE"},
        {"generation": 1000},
    ):
        with pytest.raises(InvalidVolumeUpdate) as caught:
            update_job(leaf, 0, attributes)
        assert caught.value.code == 235
    for ref in (base, leaf):
        with pytest.raises(InvalidVolumeUpdate):
            datalab.run(update_job(ref, 0, {"type": "SHARED"}))
        assert datalab.metadata(ref).generation == 0


@pytest.mark.parametrize("point", ["volume.update:locked", "volume.update:updated"])
def test_update_crash(datalab, point):
    ref = datalab.volume(datalab.domain())
    done = point.endswith("updated")
    running = datalab.crash(update_job(ref, 0, {"description": "x"}), point)
    assert running.entry.outcome == ("success" if done else "cleanSuccess")
    assert datalab.metadata(ref).generation == int(done)


# -- amend -------------------------------------------------------------------------------------


def test_amend(datalab):
    ref = datalab.chain(datalab.domain(4), 1, raw_base=False)[0]
    before = datalab.checksum(ref)
    for generation, compat in enumerate(("0.10", "1.1", "1.1")):
        datalab.run(amend_job(ref, generation, compat))
        assert info(datalab, ref).compat == compat
        assert datalab.metadata(ref).generation == generation + 1
        assert datalab.metadata(ref).legality == md.LEGAL
    assert datalab.checksum(ref) == before


def test_what_amend_refuses(datalab):
    old, new = datalab.domain(3), datalab.domain(5)
    with pytest.raises(UnsupportedOperation):
        datalab.run(amend_job(datalab.volume(old), 0, "1.1"))
    with pytest.raises(IncorrectFormat):
        datalab.run(amend_job(datalab.volume(new, cow=False), 0, "1.1"))
    with pytest.raises(InvalidVolumeUpdate):
        amend_job(datalab.volume(new), 0, "2.0")
    ref = datalab.volume(new)
    datalab.qemu_img.bitmap_add(datalab.path(ref), "b")  # version 2 has no bitmaps
    with pytest.raises(InvalidVolumeUpdate):
        datalab.run(amend_job(ref, 0, "0.10"))
    assert datalab.metadata(ref).legality == md.LEGAL
    assert datalab.metadata(ref).generation == 0


def test_amend_crash_walk(datalab):
    for point in datalab.points("volume.amend"):
        ref = datalab.volume(datalab.domain(4))
        running = datalab.crash(amend_job(ref, 0, "0.10"), point)
        assert running.entry.outcome == "cleanSuccess"
        now = datalab.metadata(ref)
        assert (now.legality, now.generation) == (md.LEGAL, 0)
        datalab.run(amend_job(ref, 0, "0.10"))
        assert info(datalab, ref).compat == "0.10"


# -- bitmaps -----------------------------------------------------------------------------------


def names(datalab, ref):
    return [bitmap.name for bitmap in info(datalab, ref).bitmaps]


def test_bitmaps(datalab):
    base, leaf = datalab.chain(datalab.domain(), 2, raw_base=False)
    one, two = new_uuid(), new_uuid()
    for ref in (base, leaf):
        datalab.run(bm.bitmap_job(bm.ADD, ref, 0, one))
        datalab.run(bm.bitmap_job(bm.ADD, ref, 1, two))
        assert set(names(datalab, ref)) == {one, two}
        assert all(bitmap.enabled for bitmap in info(datalab, ref).bitmaps)
        datalab.run(bm.bitmap_job(bm.REMOVE, ref, 2, one))
        assert names(datalab, ref) == [two]
        datalab.run(bm.bitmap_job(bm.ADD, ref, None, one))
        datalab.run(bm.bitmap_job(bm.CLEAR, ref, None))
        assert names(datalab, ref) == []
        assert datalab.metadata(ref).generation == 5
        assert datalab.metadata(ref).legality == md.LEGAL


def test_what_bitmap_jobs_refuse(datalab):
    store = datalab.domain()
    ref, raw = datalab.volume(store), datalab.volume(store, cow=False)
    datalab.run(bm.bitmap_job(bm.ADD, ref, 0, "a"))
    with pytest.raises(AddBitmapError):
        datalab.run(bm.bitmap_job(bm.ADD, ref, 1, "a"))
    with pytest.raises(BitmapDoesNotExist) as caught:
        datalab.run(bm.bitmap_job(bm.REMOVE, ref, 1, "b"))
    assert caught.value.code == 947
    with pytest.raises(GenerationMismatch):
        datalab.run(bm.bitmap_job(bm.REMOVE, ref, 0, "a"))
    for kind in (bm.ADD, bm.CLEAR):
        with pytest.raises(IncorrectFormat):
            datalab.run(bm.bitmap_job(kind, raw, 0, "a"))
    for name in ("", "--help", "-r", "a b", "a,b", "x" * 1024):
        with pytest.raises(InvalidParameter):
            bm.bitmap_job(bm.ADD, ref, 0, name)
    assert names(datalab, ref) == ["a"]


def test_bitmap_crash_walk(datalab):
    for kind in (bm.ADD, bm.REMOVE, bm.CLEAR):
        for point in datalab.points(kind):
            ref = datalab.volume(datalab.domain())
            datalab.qemu_img.bitmap_add(datalab.path(ref), "old")
            name = "new" if kind == bm.ADD else "old"
            job = bm.bitmap_job(kind, ref, 0, None if kind == bm.CLEAR else name)
            done = datalab.crash(job, point).entry.outcome == "success"
            # a bitmap that is gone cannot come back: recovery completes its removal
            late = ("done", "changed") if kind == bm.REMOVE else ("done",)
            assert done == point.endswith(late), point
            assert datalab.metadata(ref).generation == int(done)
            assert datalab.metadata(ref).legality == md.LEGAL
            if kind == bm.ADD:
                assert set(names(datalab, ref)) == ({"old", "new"} if done else {"old"})


# -- sparsify and reduce -----------------------------------------------------------------------


@pytest.mark.parametrize(("cow", "depth"), [(True, 1), (True, 2), (False, 1)])
def test_sparsify(datalab, cow, depth):
    store = datalab.domain()
    size = 8 * MIB
    ref = datalab.chain(store, depth, raw_base=not cow, size=size)[-1]
    datalab.write(ref, MIB, 4 * MIB, 9)
    datalab.io(ref, f"write -q -P 0 {2 * MIB} {3 * MIB}")
    if cow:
        datalab.qemu_img.bitmap_add(datalab.path(ref), "kept")
    before, used = datalab.checksum(ref), store.sizes(ref.image, ref.volume).allocated
    status = os.stat(datalab.path(ref))
    datalab.run(sparsify_job(ref, 0))
    assert datalab.checksum(ref) == before
    assert store.sizes(ref.image, ref.volume).allocated < used - 2 * MIB
    now = os.stat(datalab.path(ref))
    assert stat.S_IMODE(now.st_mode) == stat.S_IMODE(status.st_mode) == 0o660
    assert datalab.metadata(ref).generation == 1
    assert datalab.metadata(ref).legality == md.LEGAL
    assert datalab.leftovers(store) == []
    if cow:
        assert names(datalab, ref) == ["kept"]
        assert info(datalab, ref).backing == (None if depth == 1 else datalab.metadata(ref).parent)


def test_sparsify_keeps_the_qcow2_version(datalab):
    ref = datalab.volume(datalab.domain())
    datalab.run(amend_job(ref, 0, "0.10"))
    datalab.run(sparsify_job(ref, 1))
    assert info(datalab, ref).compat == "0.10"
    copy = datalab.volume(datalab.domain())
    datalab.run(CopyRequest(ref, copy, bitmaps=True).as_job())
    assert info(datalab, copy).compat == "1.1"


def test_what_sparsify_refuses(datalab):
    store = datalab.domain()
    base, _ = datalab.chain(store, 2)
    full = datalab.volume(store, cow=False, preallocated=True)
    illegal = datalab.volume(store, legality=md.ILLEGAL)
    for ref, error in (
        (base, VolumeNonWritable),
        (full, UnsupportedOperation),
        (illegal, VolumeNonWritable),
    ):
        with pytest.raises(error):
            datalab.run(sparsify_job(ref, 0))


def test_sparsify_crash_walk(datalab):
    for point in datalab.points("volume.sparsify"):
        store = datalab.domain()
        ref = datalab.chain(store, 2)[-1]
        before = datalab.checksum(ref)
        done = datalab.crash(sparsify_job(ref, 0), point).entry.outcome == "success"
        assert done == point.endswith("done"), point
        assert datalab.checksum(ref) == before
        assert datalab.leftovers(store) == []
        now = datalab.metadata(ref)
        assert (now.legality, now.generation) == (md.LEGAL, int(done)), point


def test_reduce_on_files_changes_nothing(datalab):
    store = datalab.domain()
    ref = datalab.chain(store, 1, raw_base=False)[0]
    before = datalab.checksum(ref)
    datalab.run(reduce_task(ref, allow_active=False))
    assert datalab.checksum(ref) == before
    with pytest.raises(IncorrectFormat):
        datalab.run(reduce_task(datalab.volume(store, cow=False), allow_active=False))


def test_measure_of_a_merge(datalab):
    """What block domains will give a base before a merge is what it takes after it."""
    tool = QemuImg()
    base, top = datalab.chain(datalab.domain(), 2, raw_base=False, size=64 * MIB)
    datalab.write(base, MIB, 4 * MIB, 1)
    datalab.write(top, 3 * MIB, 8 * MIB, 2)
    both = [Image(datalab.path(ref), "qcow2") for ref in (base, top)]
    need = tool.measure_layers(both, "qcow2")
    tool.commit(Image(datalab.path(top), "qcow2"), datalab.path(base))
    argv = ["qemu-img", "check", "--output=json", datalab.path(base)]
    end = json.loads(subprocess.run(argv, capture_output=True, check=True).stdout)
    assert end["image-end-offset"] <= need.required + need.bitmaps
    assert need.required < 12 * MIB
