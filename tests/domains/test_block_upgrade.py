# SPDX-License-Identifier: GPL-2.0-or-later
"""Block domains of format 3 and 4: worked on, upgraded to format 5, killed while upgrading."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from functional.checker.check import HALF_MADE, MARKED, check
from functional.luns import Luns
from tests.domains.block_world import BlockHost, HostMaker, block_hosts, workdir
from tests.domains.conftest import wait_for
from tests.domains.golden_block import (
    Names,
    comparable,
    golden,
    golden_json,
    golden_rows,
    new_volume,
)
from vdsm_storage.base import files
from vdsm_storage.base.cancel import Cancel
from vdsm_storage.base.units import MIB
from vdsm_storage.base.uuids import BLANK, new_uuid
from vdsm_storage.domains.block import BlockDomain
from vdsm_storage.domains.masters import NewPool
from vdsm_storage.domains.new_domain import CreateRequest
from vdsm_storage.domains.upgrade import UPGRADE
from vdsm_storage.host.sanlock import Sanlock
from vdsm_storage.images.create import NewVolumeRequest
from vdsm_storage.images.metadata import VolumeMetadata
from vdsm_storage.images.store import NewVolume, no_progress
from vdsm_storage.jobs import journal
from vdsm_storage.leases.external import LeaseRef

pytestmark = [pytest.mark.sanlock, pytest.mark.slow, pytest.mark.timeout(600)]

CHILD = Path(__file__).with_name("block_crash_child.py")
CONVERTED = "v4-converted-to-v5"
OLD_SLOT, NEW_SLOT = 512, 8192


@pytest.fixture
def hosts(sanlock: Sanlock) -> Iterator[HostMaker]:
    with workdir() as directory, block_hosts(directory, sanlock) as made:
        yield made


def make_domain(host: BlockHost, lun: str, version: int, sd_id: str = "", **more: Any) -> str:
    sd_id = sd_id or new_uuid()
    vg = host.make_group(sd_id, [lun])
    given = {"type": "ISCSI", "name": "old", "version": version, **more}
    host.services.create(CreateRequest(sd_id, remote_path=vg, **given))
    return sd_id


def upgrade(host: BlockHost, pool: str, version: int = 5) -> None:
    wait_for(lambda: all(map(host.world.health.usable, host.services.pools.get(pool).domains)))
    before = {job.entry.id for job in host.world.runner.all(journal.JOB)}
    host.services.upgrades.start(pool, version)
    jobs = [job for job in host.world.runner.all(journal.JOB) if job.entry.id not in before]
    assert jobs
    for job in jobs:
        assert job.done.wait(60)
        assert job.entry.outcome == "success", job.entry.error


# -- the golden one --------------------------------------------------------------------------


def test_as_other_hosts_upgrade(hosts: HostMaker) -> None:
    """A domain of two volumes that is in a pool; not one byte, tag or answer is different."""
    given = golden_json("v4", "input.json")
    sd_id, pool = given["sd_uuid"], given["pool_uuid"]
    luns, host = hosts.luns, hosts.host("host")
    master_lun, lun = luns.make("master"), luns.make(given["devices"][0])
    master = make_domain(host, master_lun, 5)
    make_domain(host, lun, 4, sd_id, type=given["type"], name=given["name"])
    host.services.masters.create(NewPool(pool, "x", master, 1, [master, sd_id]))
    host.world.attach(pool, master, sd_id)
    for number, volume in enumerate(given["volumes"][:2]):
        host.create(new_volume(volume, sd_id, given["ctime"] + number))
    names = golden_names(luns, sd_id, lun)
    before = report(luns, sd_id, names, "before.vgs.json")
    assert slots(luns, sd_id, "before-metadata@0.bin", 0)
    upgrade(host, pool)
    after = report(luns, sd_id, names, "converted.vgs.json")
    report(luns, sd_id, names, "converted.lvs.json")
    assert int(after["vg_seqno"]) == int(before["vg_seqno"]) + 1  # one write of the metadata
    assert slots(luns, sd_id, "converted-metadata@0.bin", 0)
    assert slots(luns, sd_id, "converted-metadata@1M.bin", MIB)
    assert not any(luns.group(sd_id).read("metadata", 0, MIB))
    info = golden_json(CONVERTED, "converted-sd-info.json")
    info["vguuid"] = names.text(info["vguuid"])
    assert host.domain(sd_id).info() == info
    assert check([lun], sd_id) == []


def golden_names(luns: Luns, sd_id: str, lun: str) -> Names:
    """By the tags, which tell the ids of group and device."""
    (row,) = golden_rows(CONVERTED, "before.vgs.json")
    device = os.path.basename(lun)
    theirs = next(t for t in row["vg_tags"].split(",") if t.startswith("MDT_PV0="))
    pv = theirs.split("uuid:")[1].split("&")[0]
    group = luns.group(sd_id)
    (mine,) = group.pvs.values()
    return Names({device: lun}, {row["vg_uuid"]: group.uuid, pv: mine.uuid})


def report(luns: Luns, sd_id: str, names: Names, name: str) -> dict[str, str]:
    """What lvm reports of the domain's group is what it reported then; the first row."""
    command = name.split(".")[-2]
    theirs = golden_rows(CONVERTED, name)
    mine = luns.report(command, list(theirs[0]), sd_id)

    def key(row: dict[str, Any]) -> str:
        return str(row.get("lv_name"))

    expected = [comparable(row, names) for row in theirs]
    assert sorted(map(comparable, mine), key=key) == sorted(expected, key=key)
    return mine[0]


def slots(luns: Luns, sd_id: str, name: str, offset: int) -> bool:
    data = golden(CONVERTED, name)
    return luns.group(sd_id).read("metadata", offset, len(data)) == data


# -- whatever a domain may hold --------------------------------------------------------------


@dataclass
class Filled:
    """A domain with volumes of all sorts; the text in the slot of `damaged` is `text`."""

    host: BlockHost
    domain: BlockDomain
    lun: str
    pool: str
    volumes: list[NewVolumeRequest]
    damaged: str
    slot: int
    text: bytes

    def assert_sound(self) -> None:
        """But for what was damaged before."""
        problems = check([self.lun], self.domain.id, allow=(HALF_MADE, MARKED))
        assert [problem for problem in problems if self.damaged not in problem] == []

    def infos(self) -> dict[str, Any]:
        """What the upgrade must not change; old formats know no sequence."""
        found = {}
        for made in self.volumes:
            info = self.host.volumes.info(self.domain.id, made.image, made.volume)
            found[made.volume] = info
        return found


def fill(hosts: HostMaker, version: int) -> Filled:
    host, lun = hosts.host("host"), hosts.luns.make("lun")
    sd_id = make_domain(host, lun, version)
    pool = host.world.pool(sd_id)
    wait_for(lambda: host.world.health.usable(sd_id))
    domain = host.domain(sd_id)
    image, removed, broken = new_uuid(), new_uuid(), new_uuid()
    base = NewVolumeRequest(
        sd_id, image, new_uuid(), 300 * MIB, "RAW", "PREALLOCATED", "DATA", "base = ü"
    )
    top = replace(
        base, volume=new_uuid(), format="COW", type="SPARSE", parent_image=image,
        parent=base.volume, capacity=400 * MIB, description="",
    )  # fmt: skip
    last = replace(base, image=removed, volume=new_uuid(), capacity=128 * MIB)
    odd = replace(last, image=broken, volume=new_uuid())
    for request in (base, top, last, odd):
        host.create(request)
    store = domain.store
    with store.lock.held(15.0):
        top_now = store.load(image, top.volume)
        store.save(image, top.volume, top_now.with_(generation=7, legality="ILLEGAL"))
        store.mark_removed(removed, zero=True)
        store.make(NewVolume(new_uuid(), new_uuid(), MIB, True, True))  # never published
    slot = next(number for number, name in store.by_slot().items() if name == odd.volume)
    text = b"CTIME=\xff\nDOMAIN=damaged\nEOF\n".ljust(512, b"\0")
    files.write_direct(os.path.realpath(domain.metadata_path), text, slot * OLD_SLOT)
    return Filled(host, domain, lun, pool, [base, top], odd.volume, slot, text)


@pytest.mark.parametrize(("old", "new"), [(3, 4), (4, 5)])  # and from 3 to 5 below
def test_all_sorts_of_volumes(hosts: HostMaker, old: int, new: int) -> None:
    filled = fill(hosts, old)
    host, domain, store = filled.host, filled.domain, filled.domain.store
    before, marked, places = filled.infos(), store.removed_images(), dict(store.by_slot())
    dumped = host.services.dump(domain.id, True)
    assert min(places) == 4
    assert (domain.xleases_path is None) == (old == 3)
    upgrade(host, filled.pool, new)
    assert (domain.version, store.version, domain.metadata().version) == (new, new, new)
    assert (filled.infos(), store.removed_images(), store.by_slot()) == (before, marked, places)
    after = host.services.dump(domain.id, True)
    assert after["volumes"] == dumped["volumes"]
    assert after["xleases"] == {}
    step, base = (NEW_SLOT, MIB) if new == 5 else (OLD_SLOT, 0)
    group = host.luns.group(domain.id)
    assert group.read("metadata", base + filled.slot * step, 512) == filled.text  # as it was
    assert_leases_work(filled)
    work_on(filled)
    filled.assert_sound()


def assert_leases_work(filled: Filled) -> None:
    """External ones, which format 3 does not have."""
    host, sd_id = filled.host, filled.domain.id
    assert os.path.islink(os.path.join(filled.domain.path, "dom_md", "xleases"))
    lease = LeaseRef(sd_id, new_uuid())
    host.task(host.leases.start_create(lease, None))
    assert list(host.leases.all(sd_id)) == [lease.lease_id]


def work_on(filled: Filled) -> None:
    """A snapshot that goes again, a description, and an image that grows."""
    host, sd_id = filled.host, filled.domain.id
    base, top = filled.volumes
    host.volumes.set_legality(sd_id, top.image, top.volume, "LEGAL")
    host.volumes.set_description(sd_id, base.image, base.volume, "after")
    snapshot = replace(top, volume=new_uuid(), parent=top.volume)
    other = replace(base, image=new_uuid(), volume=new_uuid())
    host.create(snapshot)
    host.create(other)
    host.task(host.volumes.extend(sd_id, other.image, other.volume, 500 * MIB))
    host.task(host.volumes.delete(sd_id, top.image, [snapshot.volume], force=False))
    infos = filled.infos()
    assert infos[base.volume]["description"] == "after"
    assert infos[top.volume]["voltype"] == "LEAF"
    info = host.volumes.info(sd_id, other.image, other.volume)
    assert (info["capacity"], info["status"]) == (str(512 * MIB), "OK")
    assert other.parent == BLANK


# -- another host ----------------------------------------------------------------------------


def test_a_host_that_knew_the_old_format(hosts: HostMaker) -> None:
    """It writes to the new places as soon as the domain is upgraded, and reads from there."""
    first, lun = hosts.host("host"), hosts.luns.make("lun")
    sd_id = make_domain(first, lun, 3)
    second = hosts.host("other")
    image, volume = new_uuid(), new_uuid()
    metadata = VolumeMetadata(sd_id, image, 128 * MIB, "RAW", "PREALLOCATED", "LEAF", "DATA")
    store = first.domain(sd_id).store
    store.make(NewVolume(image, volume, 128 * MIB, True, True))
    store.publish(image, volume, metadata)
    old = second.domain(sd_id)
    assert old.store.load(image, volume) == metadata
    domain = first.domain(sd_id)
    domain.make_xleases()
    domain.upgrade_volumes(5, no_progress, Cancel())
    domain.update_metadata(domain.upgrade_changes(5))
    domain.clean_upgrade()
    old.store.save(image, volume, metadata.with_(description="of the other"))
    assert store.load(image, volume).description == "of the other"
    assert old.store.load(image, volume).description == "of the other"
    assert old.version == 3  # as it was last looked at
    assert old.metadata().version == 5
    assert os.path.exists(str(old.xleases_path))
    assert not any(hosts.luns.group(sd_id).read("metadata", 0, MIB))


# -- killed ----------------------------------------------------------------------------------


def test_killed_at_every_step(hosts: HostMaker, sanlock_daemon: str) -> None:
    """A domain of format 3 is upgraded, which ends at the first step, then at the second, then at
    the third; in between it is worked on in the old format."""
    filled = fill(hosts, 3)
    sd_id, pool = filled.domain.id, filled.pool
    host = filled.host
    for step, version, outcome in (
        ("xleases", 3, "cleanSuccess"), ("volumes", 3, "cleanSuccess"), ("metadata", 5, "success"),
    ):  # fmt: skip
        work_on(filled)
        before = filled.infos()
        hosts.end(host)
        die(hosts, sanlock_daemon, step, sd_id, pool)
        host = hosts.host("host")
        host.services.restore()
        wait_for(partial(recovered, host))
        wait_for(partial(host.world.health.usable, sd_id))
        filled = replace(filled, host=host, domain=host.domain(sd_id))
        assert filled.domain.metadata().version == version
        job = max(host.world.runner.all(journal.JOB), key=lambda found: found.entry.created)
        assert job.entry.outcome == outcome
        assert filled.infos() == before
        old = hosts.luns.group(sd_id).read("metadata", 0, MIB)
        assert any(old) == (version == 3)
    work_on(filled)
    assert_leases_work(filled)
    filled.assert_sound()


def die(hosts: HostMaker, sanlock: str, step: str, sd_id: str, pool: str) -> None:
    argv = [
        sys.executable, "-P", str(CHILD), str(hosts.directory / "host"), hosts.luns.pattern,
        hosts.standin("host").socket, sd_id, pool,
    ]  # fmt: skip
    top = CHILD.parents[2]
    environment = {
        **os.environ, "SANLOCK_RUN_DIR": sanlock, "PYTHONPATH": str(top),
        "VDSM_STORAGE_CRASH": f"{UPGRADE}:{step}",
    }  # fmt: skip
    result = subprocess.run(
        argv, env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert result.returncode == -signal.SIGKILL, result.stderr


def recovered(host: BlockHost) -> bool:
    runner = host.world.runner
    runner.recover_domains(host.services.usable)
    return all(job.done.is_set() for job in runner.all(journal.JOB))
