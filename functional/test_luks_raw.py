# SPDX-License-Identifier: GPL-2.0-or-later
"""Encrypted raw volumes, which are LUKS containers because the domain's metadata say so: as
test_luks.py, and what a guest or a mistake could do to them."""

from __future__ import annotations

import contextlib
import re
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from functional.backends import look
from functional.checker.check import check
from functional.luks_lab import (
    KEY,
    OTHER,
    PATTERN,
    PREALLOCATED,
    SECRETS,
    SIZE,
    Guest,
    World,
    disk,
    luks_lab,
)
from functional.nbd import NbdServer
from functional.pool_lab import MIB, RAW, Volume, endpoint, wait_for
from functional.processes import AgentProcess
from functional.standin.process import StandInProcess
from functional.walk import STEPS

HEADER = 2_068_480  # bytes: what QEMU puts in front of the data
LUN = 128 * MIB  # of a logical volume
KINDS = pytest.mark.parametrize("kind", ["local", "lun"])
CAPACITY = {"local": SIZE, "lun": LUN - HEADER}  # the guest has all of a device
DISK = {"secretID": SECRETS["disk"]}


@pytest.fixture(scope="module")
def world(
    workdir: Path,
    start_agent: Callable[..., AgentProcess],
    make_standin: Callable[..., StandInProcess],
    make_luns: Callable[..., list[str]],
) -> Iterator[World]:
    with luks_lab(workdir, start_agent, make_standin, make_luns) as one:
        yield one


def make(world: World, kind: str, **more: Any) -> Volume:
    more = {"size": SIZE, **more, "secretID": SECRETS["disk"]}
    return world.lab.create(world.domains[kind], fmt=RAW, preallocate=PREALLOCATED, **more)


def info(world: World, where: Volume) -> dict[str, Any]:
    found: dict[str, Any] = world.lab.call("Volume.getInfo", **world.lab.ids(where))
    return found


def capacity(world: World, where: Volume) -> int:
    return int(info(world, where)["capacity"])


def above(world: World, base: Volume, **more: Any) -> Volume:
    return world.lab.snapshot(base, size=capacity(world, base), **more)


def stored(world: World, where: Volume) -> dict[str, str]:
    """The volume's metadata as they lie on the storage."""
    server = world.lab.servers[where.domain]
    return look(world.lab.agent, server, where.domain, world.lab.root(where.domain)).meta(where)


def first_bytes(world: World, where: Volume) -> bytes:
    with world.prepared(where) as path, path.open("rb") as file:
        return file.read(16 * MIB)


def write_start(world: World, where: Volume, data: bytes) -> None:
    with world.prepared(where) as path, path.open("r+b") as file:
        file.write(data)


# -- what it is ------------------------------------------------------------------------------


@KINDS
def test_a_volume_is_a_container(world: World, kind: str) -> None:
    """Callers see a raw volume with the capacity that its guest has."""
    where = make(world, kind)
    assert world.opens(where, KEY, raw=True)
    assert not world.opens(where, OTHER, raw=True)
    found = info(world, where)
    assert (found["format"], found["type"], found["status"]) == ("RAW", "PREALLOCATED", "OK")
    assert int(found["capacity"]) == CAPACITY[kind]
    assert int(found["apparentsize"]) == CAPACITY[kind] + HEADER
    image = world.lab.call("Volume.getQemuImageInfo", **world.lab.ids(where))
    assert image == {"format": "luks", "virtualsize": CAPACITY[kind]}
    with world.guest(where, raw=True) as guest:
        assert guest.capacity == CAPACITY[kind]
    dump = world.lab.call("StorageDomain.dump", sd_id=where.domain)["volumes"][where.volume]
    assert (dump["format"], dump["status"]) == ("RAW", "OK")


def test_a_thin_file(world: World) -> None:
    where = world.make("local", fmt=RAW)
    found = info(world, where)
    assert int(found["capacity"]) == SIZE
    assert int(found["apparentsize"]) == SIZE + HEADER
    assert int(found["truesize"]) < 4 * MIB
    assert world.code(world.domains["lun"], fmt=RAW, **DISK) == 202  # as without a key


@KINDS
def test_the_mark_stays(world: World, kind: str) -> None:
    where = make(world, kind)
    assert stored(world, where)["FORMAT"] == "LUKS"
    world.lab.call("Volume.setDescription", **world.lab.ids(where), description="another")
    world.lab.call("Volume.setLegality", **world.lab.ids(where), legality="ILLEGAL")
    world.lab.call("Volume.setLegality", **world.lab.ids(where), legality="LEGAL")
    after = stored(world, where)
    assert (after["FORMAT"], after["DESCRIPTION"]) == ("LUKS", "another")
    assert world.opens(where, KEY, raw=True)


@KINDS
def test_a_guests_own_header_is_no_mark(world: World, kind: str) -> None:
    """A guest that encrypts its disk by itself is on a volume in the clear, as ever."""
    container, clear = make(world, kind), world.lab.create(
        world.domains[kind], SIZE, RAW, preallocate=PREALLOCATED
    )  # fmt: skip
    write_start(world, clear, first_bytes(world, container)[:HEADER])
    image = world.lab.call("Volume.getQemuImageInfo", **world.lab.ids(clear))
    assert image["format"] == "raw"
    top = above(world, clear)
    with world.guest(world.make("local")) as guest:
        assert plug(world, guest, top, key=False) == 0
        assert plug_out(world, guest, top) == 0


@KINDS
def test_a_mark_without_a_header_is_refused(world: World, kind: str) -> None:
    """Somebody who does not know what it is wrote over it: nothing opens it as raw."""
    where = make(world, kind)
    write_start(world, where, bytes(512))
    assert world.lab.code("Volume.getQemuImageInfo", **world.lab.ids(where)) == 262
    with world.guest(world.make("local")) as guest:
        assert plug(world, guest, where, key=True) == 1630
        assert plug(world, guest, where, key=False) == 1630


# -- guests ----------------------------------------------------------------------------------


@KINDS
def test_a_guest_runs_on_it_and_on_its_snapshots(world: World, kind: str) -> None:
    base = make(world, kind)
    with world.guest(base, raw=True) as guest:
        guest.io("write -P 0xa5 0 1M")
    top = above(world, base, **DISK)
    found = world.lab.call("Volume.getQemuImageInfo", **world.lab.ids(top))
    assert found["backingfile"] == base.volume
    assert b"luks" in first_bytes(world, top)[:512]  # the format of what it is based on
    with world.guest(top, base, raw=True) as guest:
        guest.io("read -P 0xa5 0 1M")
        guest.io("write -P 0xa5 1M 1M")
    with world.guest(top, base, raw=True) as guest:
        guest.io("read -P 0xa5 0 2M")
    for volume in (base, top):
        data = first_bytes(world, volume)
        assert len(data) > 3 * MIB
        assert PATTERN not in data


@KINDS
def test_a_snapshot_and_a_merge_of_a_running_guest(world: World, kind: str) -> None:
    """The merge writes into the container, not over it."""
    lab, base = world.lab, make(world, kind)
    with world.guest(base, raw=True) as guest:
        guest.io("write -P 0xa5 0 1M")
        top = above(world, base, **DISK)
        drive = {"domainID": base.domain, "imageID": base.image}
        of_snapshot = {**drive, "baseVolumeID": base.volume, "volumeID": top.volume}
        job = str(uuid.uuid4())
        lab.call(
            "VM.snapshot", vmID=guest.id, snapDrives=[of_snapshot], frozen=True, jobUUID=job
        )
        assert lab.wait_job(job) == 0
        guest.io("write -P 0xa5 1M 1M")
        merge(world, guest, top, base.volume, top.volume)
        guest.io("read -P 0xa5 0 2M")
        guest.io("write -P 0xa5 2M 1M")
    assert info(world, base)["voltype"] == "LEAF"
    assert capacity(world, base) == CAPACITY[kind]
    with world.guest(base, raw=True) as guest:
        guest.io("read -P 0xa5 0 3M")
    assert PATTERN not in first_bytes(world, base)


def test_memory_is_not_saved_into_one(world: World) -> None:
    """It would be written over the header."""
    volumes = [make(world, "local") for _ in range(2)]
    names = [part for one in volumes for part in (one.image, one.volume)]
    where = ",".join([world.domains["local"], world.lab.pool, *names])
    job = str(uuid.uuid4())
    with world.guest(world.make("local")) as guest:
        world.lab.call("VM.snapshot", vmID=guest.id, snapDrives=[], snapMemory=where, jobUUID=job)
        assert world.lab.wait_job(job) == 48
    assert all(world.opens(one, KEY, raw=True) for one in volumes)


def pdiv(world: World, where: Volume) -> dict[str, str]:
    return {
        "poolID": world.lab.pool, "domainID": where.domain, "imageID": where.image,
        "volumeID": where.volume,
    }  # fmt: skip


def merge(world: World, guest: Guest, leaf: Volume, base: str, top: str) -> None:
    job = str(uuid.uuid4())
    world.lab.call(
        "VM.merge", vmID=guest.id, drive=pdiv(world, leaf), baseVolUUID=base, topVolUUID=top,
        jobUUID=job, bandwidth="0",
    )  # fmt: skip
    assert world.lab.wait_job(job) == 0


def plug(world: World, guest: Guest, where: Volume, *, key: bool) -> int:
    """VM.hotplugDisk; what it says of the format, and of what lies below, is wrong."""
    path = world.lab.prepare(where)
    world.lab.call("Image.teardown", **world.lab.ids(where))
    xml = disk([path, path.parent / "another"], SECRETS["disk"])
    target = f"<target dev='sdb' bus='scsi'/><alias name='ua-{where.image}'/>"
    xml = xml.replace("<target dev='vda' bus='virtio'/>", target)
    if not key:
        xml = re.sub("<encryption.*?</encryption>", "", xml)
    params = {"vmId": guest.id, "xml": f"<hotplug><devices>{xml}</devices></hotplug>"}
    return world.lab.code("VM.hotplugDisk", vmID=guest.id, params=params)


def plug_out(world: World, guest: Guest, where: Volume) -> int:
    xml = f"<disk type='file'><alias name='ua-{where.image}'/></disk>"
    params = {"vmId": guest.id, "xml": f"<hotunplug><devices>{xml}</devices></hotunplug>"}
    return world.lab.code("VM.hotunplugDisk", vmID=guest.id, params=params)


@KINDS
def test_a_disk_comes_grows_and_goes(world: World, kind: str) -> None:
    lab, where = world.lab, make(world, kind)
    link = lab.agent.dir / "run" / "storage" / where.domain / where.image
    with world.guest(world.make("local")) as guest:
        assert plug(world, guest, where, key=False) == 1630
        assert not link.exists()
        assert plug(world, guest, where, key=True) == 0
        alias = f"ua-{where.image}"
        guest.io("write -P 0xa5 0 1M", alias)
        assert world.extend(where, 2 * CAPACITY[kind]) == 0  # no key is needed for that
        size = capacity(world, where)
        ids = {"driveSpecs": pdiv(world, where), "newSize": str(size)}
        seen = lab.call("VM.diskSizeExtend", vmID=guest.id, **ids)
        assert int(seen) == size
        guest.io(f"write -P 0xa5 {size - MIB} 1M", alias)
        assert plug_out(world, guest, where) == 0
        assert not link.exists()
        middle = above(world, where, **DISK)
        top = above(world, middle, **DISK)
        assert plug(world, guest, top, key=True) == 0
        guest.io("read -P 0xa5 0 1M", alias)
        merge(world, guest, top, where.volume, middle.volume)
        guest.io(f"read -P 0xa5 {size - MIB} 1M", alias)
        found = lab.call("Volume.getQemuImageInfo", **lab.ids(top))
        assert found["backingfile"] == where.volume
        assert plug_out(world, guest, top) == 0
    assert PATTERN not in first_bytes(world, where)


def test_a_disk_moves(world: World) -> None:
    """From one container to another of its size, with the same key, and never into the clear."""
    lab, here, there = world.lab, make(world, "lun"), make(world, "lun")
    clear = lab.create(world.domains["lun"], SIZE, RAW, preallocate=PREALLOCATED)
    large = make(world, "local", size=2 * LUN)

    def ends(to: Volume) -> dict[str, dict[str, str]]:
        return {"srcDisk": pdiv(world, here), "dstDisk": pdiv(world, to)}

    with world.guest(here, raw=True) as guest:
        guest.io("write -P 0xa5 0 1M")
        for wrong in (clear, large):
            assert lab.code("VM.diskReplicateStart", vmID=guest.id, **ends(wrong)) == 55
        lab.call("VM.diskReplicateStart", vmID=guest.id, **ends(there))
        guest.io("write -P 0xa5 1M 1M")

        def pivoted() -> bool:
            code = lab.code("VM.diskReplicateFinish", vmID=guest.id, **ends(there))
            assert code in (0, 40)  # 40: not all is copied
            return code == 0

        wait_for(pivoted, "the copy")
        guest.io("read -P 0xa5 0 2M")
    standin = lab.agent.standin
    assert standin is not None
    wait_for(
        lambda: there.volume not in standin.active(there.domain), "what the guest had to be let go"
    )
    with world.guest(there, raw=True) as guest:
        guest.io("read -P 0xa5 0 2M")
    assert PATTERN not in first_bytes(world, there)


@KINDS
def test_extended(world: World, kind: str) -> None:
    """It, and a snapshot upon it."""
    base = make(world, kind)
    with world.guest(base, raw=True) as guest:
        guest.io("write -P 0xa5 0 1M")
    assert world.extend(base, 2 * LUN) == 0
    size = capacity(world, base)
    assert size == {"local": 2 * LUN, "lun": 3 * LUN - HEADER}[kind]
    with world.guest(base, raw=True) as guest:
        assert guest.capacity == size
        guest.io("read -P 0xa5 0 1M")
        guest.io(f"write -P 0xa5 {size - MIB} 1M")
    top = above(world, base, **DISK)
    assert world.extend(top, 4 * LUN) == 1000  # that one needs its key
    assert world.extend(top, 4 * LUN, **DISK) == 0
    found = world.lab.call("Volume.getQemuImageInfo", **world.lab.ids(top))
    assert (found["backingfile"], found["virtualsize"]) == (base.volume, 4 * LUN)
    with world.guest(top, base, raw=True) as guest:
        assert guest.capacity == 4 * LUN
        guest.io(f"read -P 0xa5 {size - MIB} 1M")


# -- what is refused -------------------------------------------------------------------------


@KINDS
def test_refused(world: World, kind: str) -> None:
    domain = world.domains[kind]
    raw = {"fmt": RAW, "preallocate": PREALLOCATED}
    assert world.code(domain, secretID=str(uuid.uuid4()), **raw) == 1000
    assert world.code(domain, secretID=SECRETS["ceph"], **raw) == 1000  # opens no volumes
    base = make(world, kind)
    on = {"srcImgUUID": base.image, "srcVolUUID": base.volume}
    assert world.code(domain, size=capacity(world, base), **on) == 1000  # in the clear upon it
    assert world.code(domain, **raw, **on, **DISK) == 202
    assert info(world, base)["voltype"] == "LEAF"


@KINDS
def test_what_reads_or_writes_its_data_is_refused(world: World, kind: str) -> None:
    """And changes nothing: least of all is it written over."""
    lab, domain = world.lab, world.domains[kind]
    other = world.domains["lun" if kind == "local" else "local"]
    alone, base = make(world, kind), make(world, kind)
    clear = lab.create(domain, SIZE, RAW, preallocate=PREALLOCATED)
    top = above(world, base, **DISK)
    before = [(first_bytes(world, one), stored(world, one)) for one in (alone, base)]
    whole = {**lab.ids(alone), "dstVolFormat": RAW}
    assert lab.code("Volume.measure", **whole) == 2009
    where = {"vmID": str(uuid.UUID(int=0)), "disk": pdiv(world, alone)}
    assert lab.code("VM.getDiskAlignment", **where) == 2009
    assert lab.copy(clear, alone) == 2009
    assert lab.copy(alone, clear) == 2009
    with NbdServer(lab.agent.dir / "run", MIB) as server:
        outside = server.endpoint(domain, str(uuid.uuid4()), 0)
        assert lab.job("SDM.copy_data", source=outside, destination=endpoint(alone)) == 2009
    ids = {"storagepoolID": lab.pool, "imageID": alone.image}
    clone = {**ids, "storagedomainID": domain, "dstSdUUID": other}
    assert lab.task("Image.cloneStructure", **clone) == 2009
    move = {**clone, "operation": "MOVE", "postZero": False, "force": False}
    assert lab.task("Image.move", **move) == 2009
    assert alone.image not in lab.call("StorageDomain.getImages", storagedomainID=other)
    sub = {"sd_id": domain, "img_id": base.image, "base_id": base.volume, "top_id": top.volume}
    prepare = {"storagepoolID": lab.pool, "subchainInfo": {**sub, "base_generation": 0}}
    assert lab.task("StoragePool.prepareMerge", **prepare) == 2009
    assert [(first_bytes(world, one), stored(world, one)) for one in (alone, base)] == before


# -- deaths ----------------------------------------------------------------------------------


def restart(world: World, point: str) -> None:
    lab = world.lab
    if lab.agent.alive():
        lab.agent.kill()
    lab.agent.start(point)
    lab.reconnect()
    for domain in world.domains.values():
        lab.wait_usable(domain)
    for task in lab.call("Host.getAllTasksStatuses"):
        lab.wait_task(task)


def check_sound(world: World, kind: str) -> None:
    domain = world.domains[kind]
    server = world.lab.servers[domain]
    if server.is_block:
        assert check(server.devices, domain) == []
    look(world.lab.agent, server, domain, world.lab.root(domain)).check_idle()


POINTS = [f"{k}:{step}" for k in ("volume.create", "volume.extend") for step in STEPS[k]]


@KINDS
def test_the_agent_dies(world: World, kind: str) -> None:
    """At every step of making one and of extending it: done, or as before and done then."""
    lab, domain = world.lab, world.domains[kind]
    made = Volume(domain, str(uuid.uuid4()), str(uuid.uuid4()))
    for point in POINTS:
        if point.startswith("volume.create"):
            made = Volume(domain, str(uuid.uuid4()), str(uuid.uuid4()))
            request = lab.new_volume(made, SIZE, RAW, preallocate=PREALLOCATED, **DISK)
            verb, before, size = "Volume.create", 0, CAPACITY[kind]
        else:
            before = capacity(world, made)
            size = before + LUN
            verb, request = "Volume.extendSize", {**lab.ids(made), "newSize": str(size)}
        restart(world, point)
        with contextlib.suppress(Exception):  # it may die before it has answered
            lab.call(verb, **request)
        lab.agent.wait_dead()
        restart(world, "")
        check_sound(world, kind)
        assert list((lab.agent.dir / "run" / "luks").glob("*")) == [], point
        there = made.image in lab.call("StorageDomain.getImages", storagedomainID=domain)
        now = capacity(world, made) if there else 0
        assert now in (before, size), point
        if now != size:
            assert lab.task(verb, **request) == 0, point
        assert capacity(world, made) == size, point
        assert int(info(world, made)["apparentsize"]) == size + HEADER, point
        assert world.opens(made, KEY, raw=True), point
    check_sound(world, kind)
