# SPDX-License-Identifier: GPL-2.0-or-later
"""The engine's flows of several domains on LUNs, with two hosts.

Each host is an agent with a sanlock and a stand-in for device-mapper of its own; they share the
LUNs, and a directory.  The tests run in order and build on each other's data centre.
"""

from __future__ import annotations

import os
import subprocess
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from functional.backends import BlockBackend, is_blank
from functional.block_hosts import BareLvm
from functional.checker.tags import checksum
from functional.engine.datacenter import DataCenter, Disk, Domain
from functional.engine.host import COW, FCP, RAW, Host, StorageServer, pdiv
from functional.engine.replies import NO_UUID, Device
from functional.engine.wire import VdsError
from functional.processes import AgentProcess

MIB, GIB = 1024**2, 1024**3
EXTENT = 128 * MIB


@dataclass
class Lab:
    """`luns` are free; `directory` is for a domain in files."""

    agents: list[AgentProcess]
    hosts: list[Host]
    dc: DataCenter
    luns: list[str]
    directory: StorageServer

    @property
    def second(self) -> Domain:
        """The block domain that is not the master."""
        domains = self.dc.domains.values()
        return next(d for d in domains if d.server.is_block and d.id != self.dc.master)

    @property
    def files(self) -> Domain:
        return next(d for d in self.dc.domains.values() if not d.server.is_block)

    def other(self) -> Host:
        """A host that is not the manager."""
        return next(host for host in self.hosts if host is not self.dc.spm)

    def attach(self, domain: Domain) -> None:
        """3.3, 3.4: all hosts connect, the manager attaches and activates, all hosts refresh."""
        dc = self.dc
        for host in self.hosts:
            host.connect_servers(dc.id, [domain.server])
        dc.clean(self.other(), domain)
        dc.irs("StorageDomain.attach", storagedomainID=domain.id)
        dc.irs("StorageDomain.activate", storagedomainID=domain.id)
        domain.active = True
        dc.domains[domain.id] = domain
        for host in self.hosts:
            dc.connect_pool(host)
        for host in self.hosts:
            dc.wait_healthy(host)
        if domain.server.is_block:
            self.sync_luns(domain)

    def rest(self, domain: Domain) -> None:
        """Maintenance: no host has anything of it active."""
        self.dc.domain_to_maintenance(domain)
        self.wait_inactive(domain)

    def wait_inactive(self, domain: Domain) -> None:
        for standin in self.storage(domain).hosts:
            self.dc.wait(lambda s=standin: s.active(domain.id) == {}, "the LUN to be let go")  # type: ignore[misc]

    def leave(self, domain: Domain) -> None:
        """Maintenance and detach."""
        dc = self.dc
        self.rest(domain)
        for host in self.hosts:
            host.connect_servers(dc.id, [domain.server])
        detach = {"storagedomainID": domain.id, "masterSdUUID": dc.master}
        dc.irs("StorageDomain.detach", **detach, masterVersion=dc.master_version)
        del dc.domains[domain.id]
        for host in self.hosts:
            dc.connect_pool(host)
        self.wait_inactive(domain)

    def sync_luns(self, domain: Domain) -> dict[str, Device]:
        """What the engine does after each change of a domain's LUNs."""
        assert self.dc.spm is not None
        group = self.dc.spm.group_info(self.dc.spm.domain_info(domain.id).group)
        assert set(group.devices) == set(domain.server.guids)
        return group.devices

    def storage(self, domain: Domain) -> BlockBackend:
        standins = [agent.standin for agent in self.agents if agent.standin is not None]
        return BlockBackend(domain.server.devices, domain.id, standins)

    def check(self) -> None:
        for domain in self.dc.domains.values():
            if domain.server.is_block:
                self.storage(domain).check_idle()

    def io(self, host: Host, disk: Disk, command: str) -> None:
        """As a guest on that host."""
        where = (self.dc.id, disk.domain, disk.image, disk.leaf)
        path = host.prepare(*where)
        fmt = "qcow2" if host.volume_info(*where).format == "COW" else "raw"
        argv = ["qemu-io", "-f", fmt, "-c", command, path]
        done = subprocess.run(argv, capture_output=True, text=True, timeout=120, check=False)
        host.teardown(*where)
        assert done.returncode == 0, done.stdout + done.stderr
        assert "failed" not in done.stdout


@pytest.fixture(scope="module")
def lab(
    make_luns: Callable[..., list[str]],
    make_standin: Callable[..., Any],
    make_server: Callable[[str], StorageServer],
    start_agent: Callable[..., AgentProcess],
) -> Iterator[Lab]:
    luns = make_luns(4)
    # No I/O waits for a disk here: sanlock may be in a hurry.
    settings = {
        "lvm__devices": ",".join(luns), "sanlock__io_timeout": "1", "storage__lock_timeout": "5"
    }  # fmt: skip
    agents = [
        start_agent(f"a{n}", tls=False, standin=make_standin(f"s{n}", sync=False), **settings)
        for n in (1, 2)
    ]
    hosts = [agent.host(f"host-{n}", n) for n, agent in enumerate(agents, start=1)]
    dc = DataCenter.begin(hosts, StorageServer(FCP, devices=(luns[0],)), "block")
    made = Lab(agents, hosts, dc, luns[1:], make_server("bind"))
    yield made
    errors = [error for host in made.hosts for error in (*host.vds.errors, *host.irs.errors)]
    for host in made.hosts:
        host.close()
    assert errors == []


def test_first_data_center(lab: Lab) -> None:
    dc = lab.dc
    for host in lab.hosts:
        dc.wait_healthy(host)
        info = host.pool_info(dc.id)
        assert (info.type, info.master, info.domains) == ("FCP", dc.master, {dc.master: "Active"})
    first, second = (host.spm_status(dc.id) for host in lab.hosts)
    assert first is not None
    assert second is not None
    assert (first.status, first.id) == ("SPM", 1)
    assert (second.status, second.id) == ("Free", 1)
    for disk in dc.create_ovf_stores():
        where = pdiv(dc.id, disk.domain, disk.image, disk.leaf)
        data = os.urandom(50_000)
        dc.finish_task(lab.hosts[0], "upload", lab.hosts[0].put_stream(where, data))
        task, read = lab.hosts[1].get_stream(where, len(data))
        dc.finish_task(lab.hosts[1], "download", task)
        assert read == data
    lab.check()


def test_more_domains(lab: Lab) -> None:
    """On a LUN, made by the host that is not the manager, and in a directory."""
    for server in (StorageServer(FCP, devices=(lab.luns.pop(0),)), lab.directory):
        domain = Domain(str(uuid.uuid4()), server)
        lab.dc.create_domain(lab.other(), domain, pool=lab.dc.id)
        lab.attach(domain)
    for host in lab.hosts:
        assert host.pool_info(lab.dc.id).domains == dict.fromkeys(lab.dc.domains, "Active")
    lab.check()


# -- 3.5 -----------------------------------------------------------------------------------------


def test_the_manager_moves(lab: Lab) -> None:
    """Stopped and elected elsewhere; who asks the old one hears 654 and finds the new one."""
    dc = lab.dc
    before = lab.hosts[1].spm_status(dc.id)
    dc.stop_spm()
    dc.hosts = list(reversed(lab.hosts))
    assert dc.elect() is lab.hosts[1]
    after = lab.hosts[0].spm_status(dc.id)
    assert before is not None
    assert after is not None
    assert (after.status, after.id) == ("Free", 2)
    assert int(after.version) > int(before.version)
    dc.spm = lab.hosts[0]
    dc.delete(dc.create_disk(dc.master, EXTENT))
    assert dc.spm is lab.hosts[1]


def test_the_managers_agent_dies(lab: Lab) -> None:
    """Its leases go with it, and the other host is elected at once; it comes back as a host."""
    dc = lab.dc
    disk = dc.create_disk(dc.master, EXTENT)
    lab.agents[1].kill()
    lab.hosts[1].close()
    dc.hosts, dc.spm = [lab.hosts[0]], None
    assert dc.elect() is lab.hosts[0]
    dc.delete(disk)
    lab.agents[1].start()
    lab.hosts[1] = lab.agents[1].host("host-2", 2)
    dc.activate_host(lab.hosts[1])
    dc.wait_healthy(lab.hosts[1])
    dc.wait(lambda: lab.hosts[1].health()[dc.master].acquired, "its host id")
    assert dc.spm is lab.hosts[0]
    lab.check()


# -- 3.6 -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("fmt", [RAW, COW])
def test_a_disk_on_both_hosts(lab: Lab, fmt: int) -> None:
    """Made by the manager; written, grown and read on both."""
    dc, (first, second) = lab.dc, lab.hosts
    disk = dc.create_disk(dc.master, EXTENT, fmt=fmt)
    lab.io(second, disk, "write -P 0x41 0 1M")
    disk = dc.snapshot(disk, EXTENT)
    assert dc.info(disk, second).parent == disk.volumes[0]
    where = (dc.id, disk.domain, disk.image, disk.leaf)
    path = second.prepare(*where)
    dc.extend(disk, 4 * EXTENT)
    second.vds.call("Volume.refresh", pdiv(*where))
    assert dc.info(disk, second).capacity == 4 * EXTENT
    assert os.path.realpath(path).startswith("/dev/")
    second.teardown(*where)
    lab.io(first, disk, "read -P 0x41 0 1M")
    lab.io(first, disk, f"write -P 0x42 {4 * EXTENT - MIB} 1M")
    lab.io(second, disk, f"read -P 0x42 {4 * EXTENT - MIB} 1M")
    dc.delete(disk)
    lab.check()


def test_a_raw_disk_that_is_in_use_grows(lab: Lab) -> None:
    """Active on the host that is not the manager: it sees the new size after Volume.refresh."""
    dc, second = lab.dc, lab.hosts[1]
    disk = dc.create_disk(dc.master, EXTENT)
    where = (dc.id, disk.domain, disk.image, disk.leaf)
    path = second.prepare(*where)
    with open(path, "rb") as device:
        assert device.seek(0, os.SEEK_END) == EXTENT
        dc.extend(disk, 3 * EXTENT)
        second.vds.call("Volume.refresh", pdiv(*where))
        assert device.seek(0, os.SEEK_END) == 3 * EXTENT
    second.teardown(*where)
    dc.delete(disk)


# -- 3.10 ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["block to block", "block to files", "files to block"])
def test_move_a_disk(lab: Lab, way: str) -> None:
    """The same ids on the target, parents first, sized as measured; the data by any host."""
    dc, worker = lab.dc, lab.other()
    places = {
        "block to block": (dc.domains[dc.master], lab.second),
        "block to files": (lab.second, lab.files),
        "files to block": (lab.files, dc.domains[dc.master]),
    }
    start, end = places[way]
    sizes = (EXTENT, 4 * GIB)  # more than a new thin disk begins with
    source = dc.create_disk(start.id, sizes[0])
    lab.io(worker, source, "write -P 0x21 0 1M")
    source = dc.snapshot(source, sizes[1])
    lab.io(worker, source, "write -P 0x22 3M 2M")
    target = Disk(end.id, source.image, ())
    parent = (NO_UUID, NO_UUID)
    for number, (volume, size) in enumerate(zip(source.volumes, sizes, strict=True), start=1):
        target = Disk(target.domain, target.image, (*target.volumes, volume))
        fmt = RAW if number == 1 else COW
        initial = None
        if fmt == COW and end.server.is_block:
            initial = measured(lab, worker, source, volume)
        dc.create_volume(target, size, fmt=fmt, parent=parent, sequence=number, initial=initial)
        parent = (target.image, target.leaf)
    for number in range(len(source.volumes)):
        assert dc.copy_volume(worker, source, target, number).status == "done"
    if end.server.is_block:
        assert dc.info(target).true_size == EXTENT  # not the chunk of a new disk
    dc.delete(source)
    assert source.image not in worker.images(source.domain)
    for host in lab.hosts:
        lab.io(host, target, "read -P 0x21 0 1M")
        lab.io(host, target, "read -P 0x22 3M 2M")
    dc.delete(target)
    lab.check()


def measured(lab: Lab, host: Host, disk: Disk, volume: str) -> int:
    """The engine's initialSize: without the tenth that is added again."""
    where = pdiv(lab.dc.id, disk.domain, disk.image, volume)
    found = host.vds.call("Volume.measure", {**where, "dstVolFormat": COW, "backing_chain": False})
    return int(found["required"] * 10 // 11)


@pytest.mark.parametrize("to_files", [False, True], ids=["to block", "to files"])
def test_moved_by_one_verb(lab: Lab, to_files: bool) -> None:
    """Image.move, which old engines send to the manager."""
    dc = lab.dc
    start, end = (dc.master, lab.files.id) if to_files else (lab.files.id, dc.master)
    disk = dc.create_disk(start, EXTENT)
    lab.io(lab.hosts[0], disk, "write -P 0x31 1M 1M")
    disk = dc.snapshot(disk, EXTENT)
    lab.io(lab.hosts[1], disk, "write -P 0x32 2M 1M")
    dc.task(
        "Image.move", imageID=disk.image, dstSdUUID=end, storagedomainID=start,
        operation=2, postZero="false", force="false",
    )  # fmt: skip
    moved = Disk(end, disk.image, disk.volumes)
    base = lab.other().volume_info(dc.id, end, disk.image, disk.volumes[0])
    assert (base.type, base.capacity) == ("PREALLOCATED", EXTENT)  # as it was, or has to be
    for host in lab.hosts:
        lab.io(host, moved, "read -P 0x31 1M 1M")
        lab.io(host, moved, "read -P 0x32 2M 1M")
    dc.delete(moved)
    lab.check()


def test_template(lab: Lab) -> None:
    """Collapsed into one volume; disks upon it on both hosts at once."""
    dc = lab.dc
    source = dc.snapshot(dc.create_disk(dc.master, EXTENT), EXTENT)
    lab.io(lab.hosts[0], source, "write -P 0x55 0 1M")
    template = dc.create_disk(lab.second.id, EXTENT, fmt=COW)
    params = {
        "source": dc.div(source, source.leaf),
        "destination": dc.div(template, template.leaf, 0),
        "copy_bitmaps": False,
    }
    worker = lab.other()
    assert dc.wait_job(worker, dc.start_job(worker, "SDM.copy_data", params)).status == "done"
    share = {"vol_info": dc.div(template, template.leaf, 1), "vol_attr": {"type": "SHARED"}}
    assert dc.wait_job(worker, dc.start_job(worker, "SDM.update_volume", share)).status == "done"
    disks = []
    for number, host in enumerate(lab.hosts):
        disk = Disk(lab.second.id, str(uuid.uuid4()), (str(uuid.uuid4()),))
        dc.create_volume(disk, EXTENT, parent=(template.image, template.leaf))
        lab.io(host, disk, f"write -P {0x60 + number} 1M 1M")
        lab.io(host, disk, "read -P 0x55 0 1M")
        disks.append(disk)
    with pytest.raises(VdsError) as used:
        dc.delete(template)
    assert used.value.code == 223
    for done in (*disks, source, template):
        dc.delete(done)
    lab.check()


# -- 3.4: LUNs that come, grow, and go -----------------------------------------------------------


def test_extend_by_a_lun(lab: Lab) -> None:
    """Each host looks at the new LUN first; a volume then lies on both."""
    dc, domain = lab.dc, lab.second
    new = lab.luns.pop(0)
    wider = StorageServer(FCP, devices=(*domain.server.devices, new))
    for host in lab.hosts:
        if host is not dc.spm:
            host.connect_servers(dc.id, [wider])
            params = {"storageType": FCP, "guids": wider.guids[-1:], "checkStatus": True}
            (found,) = host.vds.call("Host.getDeviceList", params)
            assert (found["GUID"], found["status"]) == (wider.guids[-1], "free")
    free, total = lab.other().domain_stats(domain.id)
    dc.irs("StorageDomain.extend", storagedomainID=domain.id, devlist=wider.guids[-1:], force=False)
    domain.server = wider
    extents = [device.extents for device in lab.sync_luns(domain).values()]
    for host in lab.hosts:
        more_free, more = host.domain_stats(domain.id)
        assert (more - total, more_free - free) == (157 * EXTENT, 157 * EXTENT)
    assert extents == [157, 157]
    disk = dc.create_disk(domain.id, free + 2 * EXTENT)
    lab.io(lab.hosts[0], disk, f"write -P 0x71 {free + EXTENT} 1M")
    lab.io(lab.hosts[1], disk, f"read -P 0x71 {free + EXTENT} 1M")
    dc.delete(disk)
    lab.check()


def test_a_lun_grows(lab: Lab) -> None:
    """3.4: the user refreshes LUNs; all hosts look, the manager resizes."""
    dc, domain = lab.dc, lab.second
    device = domain.server.devices[-1]
    name = domain.server.guids[-1]
    backing = Path(f"/sys/block/{name}/loop/backing_file").read_text().strip()
    os.truncate(backing, os.path.getsize(backing) + GIB)
    subprocess.run(["losetup", "--set-capacity", device], check=True, timeout=60)
    for host in lab.hosts:
        params = {"storageType": FCP, "guids": [name], "checkStatus": False}
        host.vds.call("Host.getDeviceList", params)
    _, total = lab.other().domain_stats(domain.id)
    size = dc.irs("StorageDomain.resizePV", storagedomainID=domain.id, guid=name)
    assert size == str((157 + 8) * EXTENT)
    assert lab.sync_luns(domain)[name].extents == 165
    for host in lab.hosts:
        assert host.domain_stats(domain.id)[1] == total + GIB
    lab.check()


def test_reduce(lab: Lab) -> None:
    """An empty LUN is taken away from a domain that is in maintenance."""
    dc, domain = lab.dc, lab.second
    gone, name = domain.server.devices[-1], domain.server.guids[-1]
    lab.rest(domain)
    worker = lab.other()
    worker.connect_servers(dc.id, [domain.server])
    params = {"reduce_params": {"sd_id": domain.id, "guid": name}}
    job = dc.wait_job(worker, dc.start_job(worker, "SDM.reduce_domain", params))
    assert (job.status, job.code) == ("done", 0)
    assert is_blank(gone)
    domain.server = StorageServer(FCP, devices=domain.server.devices[:-1])
    dc.irs("StorageDomain.activate", storagedomainID=domain.id)
    domain.active = True
    for host in lab.hosts:
        dc.connect_pool(host)
        dc.wait_healthy(host)
    lab.sync_luns(domain)
    lab.check()
    lab.luns.append(gone)


# -- the master ----------------------------------------------------------------------------------


def test_the_master_goes_to_maintenance(lab: Lab) -> None:
    """The same verb moves the role to the domain that the engine names; then it comes back."""
    dc = lab.dc
    old, new = dc.domains[dc.master], lab.second
    dc.master_version += 1
    dc.irs(
        "StorageDomain.deactivate", storagedomainID=old.id, masterSdUUID=new.id,
        masterVersion=dc.master_version,
    )  # fmt: skip
    dc.master, old.active = new.id, False
    for host in lab.hosts:
        dc.connect_pool(host)
        info = host.pool_info(dc.id)
        assert (info.master, info.domains[old.id]) == (new.id, "Attached")
        dc.wait(lambda host=host: old.id not in host.health(), "unreported")  # type: ignore[misc]
    dc.delete(dc.create_disk(new.id, EXTENT))
    dc.irs("StorageDomain.activate", storagedomainID=old.id)
    old.active = True
    for host in lab.hosts:
        dc.connect_pool(host)
        dc.wait_healthy(host)
    lab.check()


def test_switch_master(lab: Lab) -> None:
    dc = lab.dc
    old, new = dc.master, lab.second.id
    dc.master_version += 1
    dc.task(
        "StoragePool.switchMaster", oldMasterUUID=old, newMasterUUID=new,
        masterVersion=dc.master_version,
    )  # fmt: skip
    dc.master = new
    for host in lab.hosts:
        dc.connect_pool(host)
        assert host.pool_info(dc.id).master == new
    assert lab.other().domain_info(new).master
    assert not lab.other().domain_info(old).master


def test_reconstruct_the_master(lab: Lab) -> None:
    """3.5, 6: the engine gives the role to another domain, on the host that was no manager."""
    dc, host = lab.dc, lab.other()
    new = lab.second.id
    dc.stop_spm()
    for each in lab.hosts:
        each.disconnect_pool(dc.id)
    dc.master, dc.master_version = new, dc.master_version + 1
    params = {
        "storagepoolID": dc.id, "hostId": host.id, "name": dc.name, "masterSdUUID": new,
        "masterVersion": dc.master_version, "domainDict": dict.fromkeys(dc.domains, "active"),
        "lockRenewalIntervalSec": 5, "leaseTimeSec": 60, "ioOpTimeoutSec": 10, "leaseRetries": 3,
    }  # fmt: skip
    assert host.vds.call("StoragePool.reconstructMaster", params) is True
    for each in lab.hosts:
        dc.connect_pool(each)
    dc.hosts = [host, *(each for each in lab.hosts if each is not host)]
    assert dc.elect() is host
    for each in lab.hosts:
        info = each.pool_info(dc.id)
        assert (info.master, info.master_version) == (new, dc.master_version)
        assert set(info.domains) == set(dc.domains)
        dc.wait_healthy(each)
    lab.check()


# -- away ----------------------------------------------------------------------------------------


def test_import_a_domain_of_another_pool(lab: Lab, tmp_path: Path) -> None:
    """It still says that it belongs elsewhere: detached by force, attached; its disks are there."""
    dc, domain = lab.dc, lab.second
    disk = dc.create_disk(domain.id, EXTENT)
    lab.leave(domain)
    pretend_member(lab, domain, tmp_path)
    host = lab.other()
    params = {
        "storagepoolID": NO_UUID, "domainClass": 1, "storageType": str(FCP), "remotePath": "",
    }  # fmt: skip
    assert domain.id in host.vds.call("Host.getStorageDomains", params)
    assert host.domain_info(domain.id).pools not in ([], [dc.id])
    lab.attach(domain)
    assert disk.image in host.images(domain.id)
    assert dc.info(disk, host).status == "OK"
    dc.delete(disk)
    lab.check()


def pretend_member(lab: Lab, domain: Domain, directory: Path) -> None:
    """Tags as another pool's host leaves them."""
    values = lab.storage(domain).metadata()
    old = [f"MDT_POOL_UUID={values['POOL_UUID']}", f"MDT__SHA_CKSUM={values['_SHA_CKSUM']}"]
    values["POOL_UUID"] = str(uuid.uuid4())
    new = [f"MDT_POOL_UUID={values['POOL_UUID']}", f"MDT__SHA_CKSUM={checksum(values)}"]
    tags = [word for tag in old for word in ("--deltag", tag)]
    tags += [word for tag in new for word in ("--addtag", tag)]
    BareLvm(directory / "lvm", domain.server.devices).run("vgchange", *tags, domain.id)


def test_a_domain_goes(lab: Lab) -> None:
    """Maintenance, detach, format: its LUN is free for all hosts."""
    dc, domain = lab.dc, lab.second
    storage = lab.storage(domain)
    lab.leave(domain)
    host = lab.other()
    host.vds.call("StorageDomain.format", {"storagedomainID": domain.id, "autoDetach": False})
    assert storage.gone()
    for each in lab.hosts:
        with pytest.raises(VdsError) as gone:
            each.domain_info(domain.id)
        assert gone.value.code == 358
        assert domain.id not in each.pool_info(dc.id).domains
        params = {"storageType": FCP, "guids": domain.server.guids, "checkStatus": True}
        (found,) = each.vds.call("Host.getDeviceList", params)
        assert found["status"] == "free"
