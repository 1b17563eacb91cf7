# SPDX-License-Identifier: GPL-2.0-or-later
"""Encrypted volumes: made, extended, put upon each other, and run by a guest that libvirt gives
the key; what lies on the storage is in no layer in the clear."""

from __future__ import annotations

import base64
import contextlib
import re
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import libvirt
import pytest

from functional.luks_lab import (
    KEY,
    OTHER,
    PATTERN,
    PREALLOCATED,
    SECRETS,
    SIZE,
    World,
    disk,
    luks_lab,
)
from functional.pool_lab import COW, MIB, Volume, wait_for
from functional.processes import AgentProcess
from functional.standin.process import StandInProcess


@pytest.fixture(scope="module")
def world(
    workdir: Path,
    start_agent: Callable[..., AgentProcess],
    make_standin: Callable[..., StandInProcess],
    make_luns: Callable[..., list[str]],
) -> Iterator[World]:
    with luks_lab(workdir, start_agent, make_standin, make_luns) as one:
        yield one


KINDS = pytest.mark.parametrize("kind", ["local", "lun"])


@KINDS
def test_a_volume_is_encrypted(world: World, kind: str) -> None:
    where = world.make(kind)
    assert world.opens(where, KEY)
    assert not world.opens(where, OTHER)
    info = world.lab.call("Volume.getInfo", **world.lab.ids(where))
    assert (info["capacity"], info["format"], info["status"]) == (str(SIZE), "COW", "OK")
    assert world.lab.call("Volume.getQemuImageInfo", **world.lab.ids(where))["virtualsize"] == SIZE


@KINDS
def test_a_guest_runs_on_it_and_on_its_snapshots(world: World, kind: str) -> None:
    base = world.make(kind)
    with world.guest(base) as guest:
        guest.io("write -P 0xa5 0 1M")
    top = world.lab.snapshot(base, size=SIZE, secretID=SECRETS["disk"])
    with world.guest(top, base) as guest:
        guest.io("read -P 0xa5 0 1M")
        guest.io("write -P 0xa5 1M 1M")
    with world.guest(top, base) as guest:
        guest.io("read -P 0xa5 0 2M")
    with pytest.raises(libvirt.libvirtError), world.guest(top, base, secret="other"):
        pass
    for volume in (base, top):
        assert world.opens(volume, KEY)
        with world.prepared(volume) as path, path.open("rb") as file:
            data = file.read(16 * MIB)
        assert len(data) > 3 * MIB
        assert PATTERN not in data


@KINDS
def test_a_live_snapshot(world: World, kind: str) -> None:
    """The guest goes on into the new volume, which is opened with the secret of the disk."""
    lab, base = world.lab, world.make(kind)
    with world.guest(base) as guest:
        guest.io("write -P 0xa5 0 1M")
        top = lab.snapshot(base, size=SIZE, secretID=SECRETS["disk"])
        drive = {"domainID": base.domain, "imageID": base.image, "baseVolumeID": base.volume,
                 "volumeID": top.volume}  # fmt: skip
        snapshot = {"vmID": guest.id, "snapDrives": [drive], "frozen": True}
        job = str(uuid.uuid4())
        lab.call("VM.snapshot", **snapshot, jobUUID=job)
        assert lab.wait_job(job) == 0
        guest.io("read -P 0xa5 0 1M")
        guest.io("write -P 0xa5 1M 1M")
    with world.guest(top, base) as guest:
        guest.io("read -P 0xa5 0 2M")
    with world.guest(base) as guest:
        guest.io("read -P 0 1M 1M")
    with world.prepared(top) as path, path.open("rb") as file:
        assert PATTERN not in file.read(16 * MIB)


@KINDS
def test_a_disk_comes_and_goes(world: World, kind: str) -> None:
    """With all its layers, for who has the key; and never without one."""
    lab, base = world.lab, world.make(kind)
    with world.guest(base) as guest:
        guest.io("write -P 0xa5 0 1M")
    top = lab.snapshot(base, size=SIZE, secretID=SECRETS["disk"])
    link = lab.agent.dir / "run" / "storage" / top.domain / top.image
    alias = f"ua-{top.image}"
    path = lab.prepare(top)
    lab.call("Image.teardown", **lab.ids(top))
    # What the caller says of the layers below is not believed.
    xml = disk([path, path.parent / "another"], SECRETS["disk"])
    target = f"<target dev='sdb' bus='scsi'/><alias name='{alias}'/>"
    xml = xml.replace("<target dev='vda' bus='virtio'/>", target)
    bare = re.sub("<encryption.*?</encryption>", "", xml)
    with world.guest(world.make("local")) as guest:

        def ask(verb: str, asked: str) -> int:
            whole = f"<{verb}><devices>{asked}</devices></{verb}>"
            params = {"vmId": guest.id, "xml": whole}
            return lab.code(f"VM.{verb}", vmID=guest.id, params=params)

        assert ask("hotplugDisk", bare) == 1630
        assert not link.exists()
        assert ask("hotplugDisk", xml) == 0
        assert link.exists()
        guest.io("read -P 0xa5 0 1M", alias)
        guest.io("write -P 0xa5 1M 1M", alias)
        assert ask("hotunplugDisk", f"<disk type='file'><alias name='{alias}'/></disk>") == 0
        assert not link.exists()
    with world.guest(top, base) as guest:
        guest.io("read -P 0xa5 0 2M")


def test_a_disk_moves(world: World) -> None:
    """To a volume with the same key, and never into the clear."""
    lab, here = world.lab, world.make("local")
    there, clear = world.make("lun"), lab.create(world.domains["lun"], SIZE)
    above = lab.snapshot(world.make("lun"), size=SIZE, secretID=SECRETS["disk"])

    def ends(to: Volume) -> dict[str, dict[str, str]]:
        names = {"srcDisk": here, "dstDisk": to}
        return {
            name: {"poolID": lab.pool, "domainID": one.domain, "imageID": one.image,
                   "volumeID": one.volume}
            for name, one in names.items()
        }  # fmt: skip

    with world.guest(here) as guest:
        guest.io("write -P 0xa5 0 1M")
        assert lab.code("VM.diskReplicateStart", vmID=guest.id, **ends(clear)) == 55
        assert lab.code("VM.diskReplicateStart", vmID=guest.id, **ends(above)) == 55
        lab.call("VM.diskReplicateStart", vmID=guest.id, **ends(there))
        guest.io("write -P 0xa5 1M 1M")
        while (code := lab.code("VM.diskReplicateFinish", vmID=guest.id, **ends(there))) == 40:
            time.sleep(0.1)
        assert code == 0
        guest.io("read -P 0xa5 0 2M")
    link = lab.agent.dir / "run" / "storage" / there.domain / there.image
    wait_for(lambda: not link.exists(), "what the guest had to be let go")
    with world.guest(there) as guest:
        guest.io("read -P 0xa5 0 2M")
    with world.prepared(there) as path, path.open("rb") as file:
        assert PATTERN not in file.read(16 * MIB)


@KINDS
def test_extended(world: World, kind: str) -> None:
    where = world.make(kind)
    with world.guest(where) as guest:
        guest.io("write -P 0xa5 0 1M")
    assert world.extend(where, 2 * SIZE) == 1000  # which key?
    assert world.extend(where, 2 * SIZE, secretID=str(uuid.uuid4())) == 1000
    assert world.extend(where, 2 * SIZE, secretID=SECRETS["other"]) == 206
    info = world.lab.call("Volume.getInfo", **world.lab.ids(where))
    assert info["capacity"] == str(SIZE)
    assert world.extend(where, 2 * SIZE, secretID=SECRETS["disk"]) == 0
    info = world.lab.call("Volume.getInfo", **world.lab.ids(where))
    assert info["capacity"] == str(2 * SIZE)
    with world.guest(where) as guest:
        assert guest.capacity == 2 * SIZE
        guest.io("read -P 0xa5 0 1M")
        guest.io("write -P 0xa5 127M 1M")


@KINDS
def test_preallocated(world: World, kind: str) -> None:
    """Room for all of it and for the header, from the beginning."""
    where = world.make(kind, preallocate=PREALLOCATED)
    sizes = world.lab.call("Volume.getSize", **world.lab.ids(where))
    assert int(sizes["truesize"]) > SIZE + 2 * MIB
    with world.guest(where) as guest:
        guest.io(f"write -P 0xa5 0 {SIZE}")
    after = world.lab.call("Volume.getSize", **world.lab.ids(where))
    assert int(after["apparentsize"]) == int(sizes["apparentsize"])


@KINDS
def test_refused(world: World, kind: str) -> None:
    domain = world.domains[kind]
    known = {"secretID": SECRETS["disk"]}
    assert world.code(domain, secretID=str(uuid.uuid4())) == 1000
    assert world.code(domain, secretID=SECRETS["ceph"]) == 1000  # opens no volumes
    base = world.make(kind)
    on = {"srcImgUUID": base.image, "srcVolUUID": base.volume}
    assert world.code(domain, **on) == 1000  # in the clear upon what is encrypted
    clear = world.lab.create(domain, SIZE)
    above = world.lab.snapshot(clear, size=SIZE, **known)  # the other way it is all right
    assert world.opens(above, KEY)


@KINDS
def test_bitmaps(world: World, kind: str) -> None:
    bitmap = str(uuid.uuid4())
    base = world.make(kind, bitmap=bitmap)
    top = world.lab.snapshot(base, size=SIZE, secretID=SECRETS["disk"], addBitmaps=True)
    for volume in (base, top):
        info = world.lab.call("Volume.getQemuImageInfo", **world.lab.ids(volume))
        assert [one["name"] for one in info["bitmaps"]] == [bitmap]


@KINDS
def test_what_reads_data_is_refused(world: World, kind: str) -> None:
    """And leaves both sides as they were; nothing is copied into the clear."""
    lab, domain = world.lab, world.domains[kind]
    other = world.domains["lun" if kind == "local" else "local"]
    base = world.make(kind)
    with world.guest(base) as guest:
        guest.io("write -P 0xa5 0 1M")
    top = lab.snapshot(base, size=SIZE, secretID=SECRETS["disk"])
    ids = {"storagepoolID": lab.pool, "imageID": base.image}
    whole = {**ids, "storagedomainID": domain, "volumeID": top.volume}
    assert lab.code("Volume.measure", **whole, dstVolFormat=COW) == 2009
    clone = {**ids, "storagedomainID": domain, "dstSdUUID": other}
    assert lab.task("Image.cloneStructure", **clone) == 2009
    assert base.image not in lab.call("StorageDomain.getImages", storagedomainID=other)
    target = lab.create(domain, SIZE)
    assert lab.copy(top, target) == 2009
    merge = {"sd_id": domain, "img_id": base.image, "base_id": base.volume, "top_id": top.volume}
    prepare = {"storagepoolID": lab.pool, "subchainInfo": {**merge, "base_generation": 0}}
    assert lab.task("StoragePool.prepareMerge", **prepare) == 2009
    assert lab.call("Volume.getInfo", **lab.ids(base))["legality"] == "LEGAL"
    with world.guest(top, base) as guest:
        guest.io("read -P 0xa5 0 1M")


def test_the_agent_dies_while_it_makes_one(world: World) -> None:
    """Nothing is left, not even of the header that was made aside."""
    agent = world.lab.agent
    domain = world.domains["local"]
    images = world.lab.root(domain) / "images"
    before = sorted(images.iterdir())
    agent.kill()
    agent.start("volume.create:formatted")
    world.lab.reconnect()
    world.lab.wait_usable(domain)
    where = Volume(domain, str(uuid.uuid4()), str(uuid.uuid4()))
    with contextlib.suppress(Exception):
        more = {"secretID": SECRETS["disk"]}
        world.lab.call("Volume.create", **world.lab.new_volume(where, SIZE, COW, **more))
    agent.wait_dead()
    agent.start()
    world.lab.reconnect()
    world.lab.wait_usable(domain)
    for task in world.lab.call("Host.getAllTasksStatuses"):
        world.lab.wait_task(task)
    assert sorted(images.iterdir()) == before
    assert list((agent.dir / "run" / "luks").iterdir()) == []
    assert world.opens(world.make("local"), KEY)  # the secret is there again


def test_keys_are_nowhere(world: World) -> None:
    """Comes last."""
    for text in (KEY, OTHER):
        forms = (text.encode(), base64.b64encode(text.encode()).rstrip(b"="))
        for path in world.lab.agent.dir.rglob("*"):
            if path.is_file() and "data-center" not in path.parts:
                data = path.read_bytes()
                assert [form for form in forms if form in data] == [], path
