# SPDX-License-Identifier: GPL-2.0-or-later
"""One body for every kind of storage and every version of the format.

Each `Site` is a domain of a pool whose master is a local domain of the same version (a newer
master would have it upgraded).  What a domain is to its callers must not depend on where it lies;
what its metadata say depends on the version alone.  How that looks in files and on LUNs is told by
functional/backends.py.
"""

from __future__ import annotations

import hashlib
import subprocess
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from functional.backends import TYPES, Backend, look
from functional.engine.host import FCP, LOCALFS, StorageServer
from functional.pool_lab import BLANK, COW, MIB, RAW, Lab, Volume, make_lab, wait_for
from functional.processes import AgentProcess
from functional.standin.process import StandInProcess

PREALLOCATED, SPARSE = 1, 2
LUN = "lun"
SITES = [
    *((kind, version) for kind in ("local", "bind", LUN) for version in (3, 4, 5)),
    *((kind, 5) for kind in ("local-4k", "ext4", "xfs", "fuse")),
]


@dataclass
class Site:
    """A domain in the pool of `lab`; `storage` shows what is really there."""

    lab: Lab
    server: StorageServer
    version: int
    domain: str
    storage: Backend

    @property
    def shared(self) -> bool:
        """Other hosts may see it: it has leases."""
        return self.server.type != LOCALFS

    @property
    def unit(self) -> int:
        return self.storage.unit

    def new_raw(self, units: int = 1) -> Volume:
        """A raw volume, as thin as the storage can have it."""
        kind = SPARSE if self.storage.sparse_raw else PREALLOCATED
        return self.lab.create(self.domain, units * self.unit, RAW, preallocate=kind)

    @property
    def has_xleases(self) -> bool:
        return self.shared and self.version >= 4

    def meta(self, where: Volume) -> dict[str, str]:
        return self.storage.meta(where)

    def info(self, where: Volume) -> dict[str, Any]:
        found: dict[str, Any] = self.lab.call("Volume.getInfo", **self.lab.ids(where))
        return found

    def io(self, where: Volume, *commands: str) -> None:
        """As a guest: through the prepared path, in the volume's format."""
        path = self.lab.prepare(where)
        argv = ["qemu-io", "-f", "qcow2" if self.info(where)["format"] == "COW" else "raw"]
        for command in commands:
            argv += ["-c", command]
        done = subprocess.run(
            [*argv, str(path)], capture_output=True, text=True, timeout=120, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
        assert "failed" not in done.stdout, done.stdout
        self.lab.call("Image.teardown", **self.lab.ids(where))

    def digest(self, where: Volume, tmp: Path) -> str:
        """Of what a guest would read."""
        flat = tmp / "flat"
        fmt = "qcow2" if self.info(where)["format"] == "COW" else "raw"
        path = self.lab.prepare(where)
        argv = ["qemu-img", "convert", "-f", fmt, "-O", "raw", str(path), str(flat)]
        subprocess.run(argv, check=True, timeout=120)
        self.lab.call("Image.teardown", **self.lab.ids(where))
        with flat.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    def delete(self, where: Volume) -> int:
        ids = self.lab.ids(where)
        del ids["volumeID"]
        return self.lab.task("Image.delete", **ids, postZero="false", force="false")


@pytest.fixture(scope="module")
def luns(make_luns: Callable[..., list[str]]) -> list[str]:
    return make_luns(2)


@pytest.fixture(scope="module")
def agent(
    start_agent: Callable[..., AgentProcess],
    make_standin: Callable[..., StandInProcess],
    luns: list[str],
) -> AgentProcess:
    return start_agent(
        "conformance", tls=False, standin=make_standin(sync=False), lvm__devices=",".join(luns)
    )


@pytest.fixture(scope="module", params=SITES, ids=lambda param: f"{param[0]}-v{param[1]}")
def site(
    request: pytest.FixtureRequest,
    agent: AgentProcess,
    make_server: Callable[[str], StorageServer],
    luns: list[str],
) -> Iterator[Site]:
    """Made, and at the end taken apart again: both are part of what must conform."""
    kind, version = request.param
    lab = make_lab(agent)
    server = StorageServer(FCP, devices=tuple(luns)) if kind == LUN else make_server(kind)
    for each in (make_server("local"), server):
        assert lab.connect(each) == [0]
        domain = str(uuid.uuid4())
        create_domain(lab, domain, each, version)
        lab.servers[domain] = each
    lab.call(
        "StoragePool.create", storagepoolID=lab.pool, name="conformance", masterVersion=1,
        masterSdUUID=next(iter(lab.servers)), domainList=[next(iter(lab.servers))],
        lockRenewalIntervalSec=5, leaseTimeSec=60, ioOpTimeoutSec=10, leaseRetries=3,
    )  # fmt: skip
    del lab.servers[domain]
    lab.connect_pool()
    ids = {"storagedomainID": domain, "storagepoolID": lab.pool}
    lab.call("StorageDomain.attach", **ids)
    lab.call("StorageDomain.activate", **ids)
    lab.wait_usable(domain)
    link = agent.dir / "data-center" / lab.pool / domain
    made = Site(lab, server, version, domain, look(agent, server, domain, link.resolve()))
    yield made
    leave(made)
    lab.client.close()


def create_domain(lab: Lab, domain: str, server: StorageServer, version: int) -> None:
    auto = version == 5 and not server.is_block
    lab.call(
        "StorageDomain.create", storagedomainID=domain, domainType=server.type, maxHosts=250,
        typeArgs=lab.type_args(domain, server), name="conformance", domainClass=1,
        version=str(version), blockSize=0 if auto else 512,
    )  # fmt: skip


def leave(site: Site) -> None:
    """Detached, formatted and disconnected; nothing of it is left on the storage."""
    lab, (master,) = site.lab, site.lab.servers
    assert lab.call("StorageDomain.getImages", storagedomainID=site.domain) == []
    assert site.storage.images() == {}
    site.storage.check_idle()
    ids = {"storagedomainID": site.domain, "masterSdUUID": master, "masterVersion": 1}
    lab.call("StorageDomain.deactivate", storagepoolID=lab.pool, **ids)
    lab.call("StorageDomain.detach", storagepoolID=lab.pool, **ids)
    assert lab.call("StorageDomain.getInfo", storagedomainID=site.domain)["pool"] == []
    lab.call("StorageDomain.format", storagedomainID=site.domain, autoDetach=False)
    assert site.storage.gone()
    where = {"storagepoolID": lab.pool, "hostID": 1, "scsiKey": lab.pool}
    lab.call("StoragePool.spmStart", storagepoolID=lab.pool, prevID=-1, prevLver="-1",
             enableScsiFencing="false", maxHostID=250)  # fmt: skip
    wait_for(
        lambda: lab.call("StoragePool.getSpmStatus", storagepoolID=lab.pool)["spmStatus"] == "SPM",
        "the manager's role",
    )
    for task in lab.call("Host.getAllTasksStatuses"):
        lab.wait_task(task)
    lab.call("StoragePool.destroy", **where)
    for server in (lab.servers[master], site.server):
        answer = lab.call(
            "StoragePool.disconnectStorageServer", storagepoolID=BLANK,
            domainType=server.type, connectionParams=[server.as_map()],
        )  # fmt: skip
        assert [one["status"] for one in answer] == [0]


# -- the domain ----------------------------------------------------------------------------------


def test_the_domain(site: Site) -> None:
    lab = site.lab
    info = lab.call("StorageDomain.getInfo", storagedomainID=site.domain)
    assert (info["version"], info["class"]) == (str(site.version), "Data")
    assert info["type"] == TYPES[site.server.type]
    assert (info["pool"], info["role"]) == ([lab.pool], "Regular")
    assert info["block_size"] == (4096 if "4k" in site.server.spec else 512)
    assert site.domain in lab.call("StoragePool.getInfo", storagepoolID=lab.pool)["dominfo"]
    assert ("ALIGNMENT" in site.storage.metadata()) == (site.version == 5)
    special = site.storage.special()
    assert ("xleases" in special) == site.has_xleases
    assert (special["ids"] > 0, special["leases"] > 0) == (site.shared, site.shared)
    lab.call("StorageDomain.validate", storagedomainID=site.domain)
    stats = lab.call("StorageDomain.getStats", storagedomainID=site.domain)
    assert 0 < int(stats["diskfree"]) <= int(stats["disktotal"])
    lab.call("StorageDomain.setDescription", storagedomainID=site.domain, description="renamed")
    info = lab.call("StorageDomain.getInfo", storagedomainID=site.domain)
    assert info["name"] == "renamed"
    health = lab.health(site.domain)
    assert (health["valid"], health["version"]) == (True, site.version)


def test_leases(site: Site) -> None:
    lab, lease = site.lab, {"sd_id": site.domain, "lease_id": str(uuid.uuid4())}
    if not site.has_xleases:
        assert lab.code("Lease.create", lease=lease) == 350
        return
    assert lab.task("Lease.create", lease=lease) == 0
    info = lab.call("Lease.info", lease=lease)
    assert (info["path"].rpartition("/")[2], info["offset"]) == ("xleases", 3 * MIB)
    assert lab.call("Lease.status", lease=lease)["owners"] == []
    assert lab.task("Lease.delete", lease=lease) == 0
    assert lab.code("Lease.info", lease=lease) == 936


def test_what_all_domains_answer(site: Site) -> None:
    """Verbs of backup domains, and on files those of block domains, say that this is none; the
    pool's small ones work."""
    lab, (master,) = site.lab, site.lab.servers
    where = {"storagedomainID": site.domain, "storagepoolID": lab.pool}
    block = site.server.is_block
    assert lab.code("StorageDomain.extend", **where, devlist=["x"]) == (606 if block else 2009)
    assert lab.code("StorageDomain.resizePV", **where, guid="x") == (619 if block else 2009)
    assert lab.code("StoragePool.getBackedUpVmsList", **where) == 378
    assert lab.code("StoragePool.getBackedUpVmsInfo", **where, vmList=[]) == 378
    files = {"storagedomainID": site.domain, "pattern": "*", "caseSensitive": False}
    assert lab.call("StorageDomain.getFileStats", **files) == {}
    pool = {"storagepoolID": lab.pool}
    lab.call("StoragePool.refresh", **pool, masterSdUUID=master, masterVersion=1)
    assert lab.code("StoragePool.refresh", **pool, masterSdUUID=site.domain, masterVersion=1) == 324
    lab.call("StoragePool.setDescription", **pool, description="another name")
    assert lab.call("StoragePool.getInfo", **pool)["info"]["name"] == "another name"
    assert lab.call("StoragePool.upgrade", **pool, targetDomVersion=site.version) == "started"
    info = lab.call("StorageDomain.getInfo", storagedomainID=site.domain)
    assert info["version"] == str(site.version)


# -- volumes -------------------------------------------------------------------------------------


@pytest.mark.parametrize("prealloc", [SPARSE, PREALLOCATED], ids=["sparse", "preallocated"])
@pytest.mark.parametrize("fmt", [RAW, COW], ids=["raw", "cow"])
def test_a_volume(site: Site, fmt: int, prealloc: int) -> None:
    """Made, written, extended, described, deleted; its metadata say what the version wants."""
    lab, size = site.lab, 2 * site.unit
    if (fmt, prealloc) == (RAW, SPARSE) and not site.storage.sparse_raw:
        where = Volume(site.domain, str(uuid.uuid4()), str(uuid.uuid4()))
        assert lab.code("Volume.create", **lab.new_volume(where, size, fmt)) == 202
        return
    where = lab.create(site.domain, size, fmt, preallocate=prealloc)
    check_volume(site, where, size, fmt, prealloc)
    if fmt == RAW and not site.storage.zeroed:
        site.io(where, "write -P 0 0 1M")
    site.io(where, "write -P 0x11 1M 1M")
    assert lab.task("Volume.extendSize", **lab.ids(where), newSize=str(2 * size)) == 0
    check_volume(site, where, 2 * size, fmt, prealloc)
    if fmt == COW:
        qemu = lab.call("Volume.getQemuImageInfo", **lab.ids(where))
        assert qemu["compat"] == ("0.10" if site.version == 3 else "1.1")
        assert qemu["virtualsize"] == 2 * size
    last = f"write -P 0x22 {2 * size - MIB} 1M"
    site.io(where, "read -P 0 0 1M", "read -P 0x11 1M 1M", last)
    lab.call("Volume.setDescription", **lab.ids(where), description="new")
    lab.call("Volume.setLegality", **lab.ids(where), legality="ILLEGAL")
    meta = site.meta(where)
    assert (meta["DESCRIPTION"], meta["LEGALITY"]) == ("new", "ILLEGAL")
    assert lab.code("Image.prepare", **lab.ids(where)) == 227
    lab.call("Volume.setLegality", **lab.ids(where), legality="LEGAL")
    lab.call("Volume.verify_untrusted", **lab.ids(where))
    assert site.delete(where) == 0
    assert site.delete(where) == 268
    assert where.image not in site.storage.images()


def test_a_creation_is_reverted(site: Site) -> None:
    lab = site.lab
    base = site.new_raw()
    where = Volume(site.domain, base.image, str(uuid.uuid4()))
    task = lab.start_create(where, site.unit, COW, srcImgUUID=base.image, srcVolUUID=base.volume)
    wait_for(
        lambda: lab.call("Task.getStatus", taskID=task)["taskState"] == "finished", "the volume"
    )
    assert lab.call("Task.getInfo", taskID=task) == {"id": task, "verb": "createVolume"}
    assert site.meta(base)["VOLTYPE"] == "INTERNAL"
    lab.prepare(where)
    lab.call(
        "Volume.teardown", storagedomainID=site.domain, imageID=where.image, volumeID=where.volume
    )
    lab.call("Task.revert", taskID=task)
    assert lab.call("Task.getStatus", taskID=task)["taskResult"] == "cleanSuccess"
    lab.call("Task.clear", taskID=task)
    assert lab.code("Volume.getInfo", **lab.ids(where)) == 201
    assert site.meta(base)["VOLTYPE"] == "LEAF"
    assert site.delete(base) == 0


def check_volume(site: Site, where: Volume, size: int, fmt: int, prealloc: int) -> None:
    """What the storage holds of the volume, and what the agent tells about it."""
    meta, info = site.meta(where), site.info(where)
    if site.version == 5:
        assert meta["CAP"] == str(size)
        assert not {"SIZE", "MTIME"} & set(meta)
    else:
        assert (meta["SIZE"], meta["MTIME"]) == (str(size // 512), "0")
        assert not {"CAP", "SEQ"} & set(meta)
    assert (meta["FORMAT"], meta["VOLTYPE"]) == ("RAW" if fmt == RAW else "COW", "LEAF")
    assert meta["TYPE"] == ("SPARSE" if prealloc == SPARSE else "PREALLOCATED")
    assert (info["capacity"], info["status"]) == (str(size), "OK")
    site.storage.check_volume(where, info)
    if site.shared:
        assert info["lease"]["owners"] == []
    assert ("lease" in info) == site.shared


def test_snapshots(site: Site, tmp_path: Path) -> None:
    """Two upon a raw base; extended, copied to raw, merged into the base, deleted."""
    lab, unit = site.lab, site.unit
    base = site.new_raw()
    site.io(base, "write -P 0x31 0 1M", "write -P 0 1M 1M")
    middle = lab.snapshot(base, size=unit, sequence=2)
    site.io(middle, "write -P 0x32 1M 1M")
    top = lab.snapshot(middle, size=unit, sequence=3)
    site.io(top, "write -P 0x33 2M 1M", "read -P 0x31 0 1M", "read -P 0x32 1M 1M")
    assert [site.meta(v)["VOLTYPE"] for v in (base, middle, top)] == [
        "INTERNAL", "INTERNAL", "LEAF",
    ]  # fmt: skip
    assert site.meta(top)["PUUID"] == middle.volume
    qemu = lab.call("Volume.getQemuImageInfo", **lab.ids(top))
    assert qemu["backingfile"] == middle.volume  # relative: the domain may be mounted elsewhere
    assert lab.task("Volume.extendSize", **lab.ids(top), newSize=str(2 * unit)) == 0
    content = site.digest(top, tmp_path)
    target = site.new_raw(2)
    assert lab.copy(top, target) == 0
    assert site.digest(target, tmp_path) == content
    assert site.meta(target)["GEN"] == "1"
    merge(site, middle, top)
    assert site.digest(middle, tmp_path) == content
    assert lab.call("Image.reconcileVolumeChain", **chain_ids(lab, middle)) == [
        base.volume, middle.volume,
    ]  # fmt: skip
    delete = {**lab.ids(middle), "postZero": "false", "force": "false"}
    assert lab.task("Volume.delete", **{**delete, "volumeID": base.volume}) == 204
    assert lab.task("Volume.delete", **delete) == 0
    assert site.meta(base)["VOLTYPE"] == "LEAF"
    site.io(base, "read -P 0x31 0 1M", "read -P 0 1M 1M")
    assert [site.delete(v) for v in (base, target)] == [0, 0]


def chain_ids(lab: Lab, leaf: Volume) -> dict[str, str]:
    ids = lab.ids(leaf)
    ids["leafVolID"] = ids.pop("volumeID")
    return ids


def merge(site: Site, base: Volume, top: Volume) -> None:
    """Cold: prepare, merge, finalize, and the merged volume is deleted."""
    lab = site.lab
    subchain = {
        "sd_id": site.domain, "img_id": base.image, "base_id": base.volume, "top_id": top.volume,
        "base_generation": site.info(base)["generation"],
    }  # fmt: skip
    where = {"storagepoolID": lab.pool, "subchainInfo": subchain}
    assert lab.task("StoragePool.prepareMerge", **where) == 0
    assert lab.job("SDM.merge", subchain_info=subchain) == 0
    assert lab.task("StoragePool.finalizeMerge", **where) == 0
    ids = {**lab.ids(top), "postZero": "false", "force": "true"}
    assert lab.task("Volume.delete", **ids) == 0


def test_a_template(site: Site) -> None:
    """Shared by a disk upon it, and kept as long as the disk is there."""
    lab = site.lab
    template = lab.create(site.domain, site.unit, COW)
    site.io(template, "write -P 0x41 0 1M")
    place = {"sd_id": site.domain, "img_id": template.image, "vol_id": template.volume}
    assert lab.job("SDM.update_volume", vol_info=place, vol_attr={"type": "SHARED"}) == 0
    disk = lab.create(
        site.domain, site.unit, COW, srcImgUUID=template.image, srcVolUUID=template.volume
    )
    site.io(disk, "read -P 0x41 0 1M", "write -P 0x42 1M 1M")
    site.storage.check_shared(template, disk.image)
    images = (template.image, disk.image)
    where = {"storagedomainID": site.domain, "storagepoolID": lab.pool}
    shown = [lab.call("StorageDomain.getVolumes", **where, imageID=image) for image in images]
    assert set(shown[0]) == {template.volume}
    assert set(shown[1]) == {template.volume, disk.volume}
    larger = str(2 * site.unit)
    assert lab.code("Volume.extendSize", **lab.ids(template), newSize=larger) == 213
    assert site.delete(template) == 223
    assert [site.delete(v) for v in (disk, template)] == [0, 0]
