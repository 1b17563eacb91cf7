# SPDX-License-Identifier: GPL-2.0-or-later
"""The engine's flows on one host: on a local directory, and on POSIX storage and LUNs under real
sanlock leases.

One data centre per kind of storage; the tests of a module run in order and build on each other's
data centre, but not on each other's disks.
"""

from __future__ import annotations

import io
import os
import subprocess
import tarfile
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from functional.engine.datacenter import DataCenter, Disk, Domain, TaskFailedError
from functional.engine.host import COW, FCP, PREALLOCATED, RAW, SPARSE, Host, StorageServer, pdiv
from functional.engine.replies import NO_UUID
from functional.engine.wire import VdsError
from functional.processes import AgentProcess
from functional.standin.process import StandInProcess

MIB = 1024**2
GIB = 1024**3
LOCAL, LUN = "local", "lun"
EXTENT = 128 * MIB


@dataclass
class Lab:
    """`make_server(kind)` gives storage for one more domain."""

    agent: AgentProcess
    host: Host
    dc: DataCenter
    kind: str
    make_server: Callable[[str], StorageServer]

    @property
    def domain(self) -> Domain:
        return self.dc.domains[self.dc.master]

    def size(self, size: int) -> int:
        """Of a disk: on LUNs whole extents, which a raw one would have anyway."""
        return -(-size // EXTENT) * EXTENT if self.kind == LUN else size

    def restart(self, crash: bool = True) -> None:
        """The agent dies, or is stopped, and comes back on another port; the engine reconnects."""
        if crash:
            self.agent.kill()
        else:
            assert self.agent.stop() == ""
        self.come_back()

    def come_back(self) -> None:
        self.host.close()
        self.agent.start()
        self.host = self.agent.host("host-1", 1)
        self.dc.hosts = []
        self.dc.spm = None
        self.dc.activate_host(self.host)


@pytest.fixture(scope="module")
def luns(make_luns: Callable[..., list[str]]) -> list[str]:
    return make_luns(2)


@pytest.fixture(scope="module", params=[LOCAL, "ext4", LUN])
def lab(
    request: pytest.FixtureRequest,
    make_server: Callable[[str], StorageServer],
    start_agent: Callable[..., AgentProcess],
    make_standin: Callable[..., StandInProcess],
    luns: list[str],
) -> Iterator[Lab]:
    kind = request.param
    servers = [StorageServer(FCP, devices=(lun,)) for lun in luns]

    def make(wanted: str) -> StorageServer:
        return servers.pop(0) if kind == LUN else make_server(wanted)

    if kind == LUN:
        devices = ",".join(luns)
        agent = start_agent("block", False, make_standin(sync=False), lvm__devices=devices)
    else:
        agent = start_agent(f"agent-{kind}", tls=kind == LOCAL)
    host = agent.host("host-1", 1)
    dc = DataCenter.begin([host], make(kind))
    made = Lab(agent, host, dc, kind, make)
    yield made
    errors = made.host.vds.errors + made.host.irs.errors
    made.host.close()
    assert errors == []


# -- 3.1, 3.2 ------------------------------------------------------------------------------------


def test_first_data_center(lab: Lab) -> None:
    info = lab.host.pool_info(lab.dc.id)
    assert (info.name, info.master, info.master_version) == ("Default", lab.dc.master, 1)
    assert info.domains == {lab.dc.master: "Active"}
    assert lab.host.domain_info(lab.dc.master).pools == [lab.dc.id]
    assert lab.host.domain_info(lab.dc.master).master
    status = lab.host.spm_status(lab.dc.id)
    assert status is not None
    assert (status.status, status.id) == ("SPM", 1)
    lab.dc.wait_healthy(lab.host)
    lab.dc.wait(lambda: lab.host.health()[lab.dc.master].acquired, "the host id is held")


def test_connecting_again_is_a_refresh(lab: Lab) -> None:
    statuses = lab.host.connect_servers(lab.dc.id, [lab.domain.server])
    assert set(statuses.values()) == {0}
    for _ in range(3):
        lab.dc.connect_pool(lab.host)
    assert lab.dc.active() <= set(lab.host.health())


def test_one_bad_server_does_not_fail_the_others(lab: Lab, tmp_path: Path) -> None:
    good = lab.domain.server
    if good.is_block:
        pytest.skip("Fibre Channel is one network: there are no servers")
    bad = StorageServer(good.type, str(tmp_path / "not there"), good.vfs_type, good.options)
    statuses = lab.host.connect_servers(lab.dc.id, [bad, good])
    assert statuses[good.id] == 0
    assert statuses[bad.id] != 0
    assert set(lab.host.disconnect_servers(lab.dc.id, [bad]).values()) == {0}


def test_ovf_store(lab: Lab) -> None:
    """Two OVF_STORE disks; a tar goes in by PUT and comes back by GET, each a task."""
    tar = io.BytesIO()
    with tarfile.open(fileobj=tar, mode="w") as archive:
        ovf = os.urandom(100_000)
        member = tarfile.TarInfo(f"{uuid.uuid4()}.ovf")
        member.size = len(ovf)
        archive.addfile(member, io.BytesIO(ovf))
    data = tar.getvalue()
    for disk in lab.dc.create_ovf_stores():
        where = pdiv(lab.dc.id, disk.domain, disk.image, disk.leaf)
        task = lab.host.put_stream(where, data)
        lab.dc.finish_task(lab.host, "downloadImageFromStream", task)
        task, read = lab.host.get_stream(where, len(data))
        lab.dc.finish_task(lab.host, "uploadImageToStream", task)
        assert read == data
        assert lab.dc.info(disk).description.startswith('{"Updated"')


# -- 3.5 -----------------------------------------------------------------------------------------


def test_spm_stop_and_start(lab: Lab) -> None:
    with pytest.raises(VdsError) as refused:
        lab.host.disconnect_pool(lab.dc.id)
    assert refused.value.code == 656
    lab.dc.stop_spm()
    free = lab.host.spm_status(lab.dc.id)
    assert free is not None
    assert free.status == "Free"
    lab.dc.elect()
    again = lab.host.spm_status(lab.dc.id)
    assert again is not None
    assert again.status == "SPM"
    if lab.kind != LOCAL:
        assert int(again.version) > int(free.version)
    with pytest.raises(VdsError) as refused:
        lab.dc.start_spm(lab.host, again)
    assert refused.value.code == 656


def test_spm_stop_is_refused_while_a_task_runs(lab: Lab) -> None:
    code = None
    for _ in range(20):  # until one is asked before the short task has ended
        disk = lab.dc.create_disk(lab.dc.master, 16 * MIB)
        params = {"storagepoolID": lab.dc.id, "storagedomainID": disk.domain, "imageID": disk.image}
        flags = {"postZero": "false", "force": "false"}
        task = lab.host.irs.call("Image.delete", {**params, **flags})
        try:
            lab.host.irs.call("StoragePool.spmStop", {"storagepoolID": lab.dc.id})
        except VdsError as refused:
            code = refused.code
        lab.dc.finish_task(lab.host, "Image.delete", task)
        if code is not None:
            break
        lab.dc.elect()
    assert code == 406


def test_unknown_pool(lab: Lab) -> None:
    other = str(uuid.uuid4())
    assert lab.host.spm_status(other) is None
    lab.host.disconnect_pool(other)


# -- 3.6 -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fmt", "prealloc"), [(RAW, SPARSE), (RAW, PREALLOCATED), (COW, SPARSE), (COW, PREALLOCATED)]
)
def test_create_extend_delete_a_disk(lab: Lab, fmt: int, prealloc: int) -> None:
    dc, size = lab.dc, lab.size(64 * MIB)
    if lab.kind == LUN and (fmt, prealloc) == (RAW, SPARSE):
        pytest.skip("raw volumes are not sparse on LUNs, and no engine asks for such")
    disk = dc.create_disk(dc.master, size, fmt=fmt, prealloc=prealloc)
    info = dc.info(disk)
    assert (info.status, info.capacity, info.parent) == ("OK", size, NO_UUID)
    assert info.format == ("RAW" if fmt == RAW else "COW")
    assert info.type == ("SPARSE" if prealloc == SPARSE else "PREALLOCATED")
    assert info.owners == []
    assert info.has_lease == (lab.kind != LOCAL)
    if prealloc == PREALLOCATED and fmt == RAW:
        assert info.true_size >= size
    dc.extend(disk, 2 * size)
    assert dc.info(disk).capacity == 2 * size
    assert disk.image in lab.host.images(dc.master)
    dc.delete(disk)
    assert disk.image not in lab.host.images(dc.master)
    dc.delete(disk)  # 268: somebody was there before


def test_a_failed_task_leaves_nothing(lab: Lab) -> None:
    """A volume upon one that is not there."""
    dc = lab.dc
    disk = dc.create_disk(dc.master, 16 * MIB)
    broken = Disk(disk.domain, disk.image, (str(uuid.uuid4()),))
    with pytest.raises((TaskFailedError, VdsError)):
        dc.create_volume(broken, 16 * MIB, parent=(disk.image, str(uuid.uuid4())))
    params = {
        "storagedomainID": disk.domain,
        "storagepoolID": dc.id,
        "imageID": disk.image,
    }
    assert lab.host.vds.call("StorageDomain.getVolumes", params) == [disk.leaf]
    dc.delete(disk)


def test_what_a_guest_writes_is_in_the_chain(lab: Lab) -> None:
    dc = lab.dc
    size = lab.size(32 * MIB)
    disk = dc.create_disk(dc.master, size)
    write(lab, disk, 0x11, 0)
    snapshot = dc.snapshot(disk, size)
    write(lab, snapshot, 0x22, MIB)
    assert dc.info(snapshot).parent == disk.leaf
    path = lab.host.prepare(dc.id, snapshot.domain, snapshot.image, snapshot.leaf)
    qemu_io(path, "read -P 0x11 0 1M", "qcow2")
    qemu_io(path, "read -P 0x22 1M 1M", "qcow2")
    lab.host.teardown(dc.id, snapshot.domain, snapshot.image, snapshot.leaf)
    dc.delete(snapshot)


# -- 3.10 ----------------------------------------------------------------------------------------


def test_copy_a_chain(lab: Lab) -> None:
    """A cold copy of a disk with a snapshot, volume by volume, then a template of it."""
    dc = lab.dc
    size = lab.size(32 * MIB)
    source = dc.create_disk(dc.master, size)
    write(lab, source, 0x33, 0)
    source = dc.snapshot(source, size)
    write(lab, source, 0x44, 2 * MIB)
    target = copy_of(lab, source)
    for number, volume in enumerate(target.volumes):
        before = generation(lab, target, volume)
        job = dc.copy_volume(lab.host, source, target, number)
        assert (job.status, job.code) == ("done", 0)
        assert generation(lab, target, volume) == before + 1
    path = lab.host.prepare(dc.id, target.domain, target.image, target.leaf)
    qemu_io(path, "read -P 0x33 0 1M", "qcow2")
    qemu_io(path, "read -P 0x44 2M 1M", "qcow2")
    lab.host.teardown(dc.id, target.domain, target.image, target.leaf)
    dc.delete(source)
    dc.delete(target)


def test_template(lab: Lab) -> None:
    """One collapsed copy, then type SHARED; disks upon it share the base."""
    dc = lab.dc
    size = lab.size(16 * MIB)
    source = dc.snapshot(dc.create_disk(dc.master, size), size)
    write(lab, source, 0x55, 0)
    template = dc.create_disk(dc.master, size, fmt=COW)
    params = {
        "source": dc.div(source, source.leaf),
        "destination": dc.div(template, template.leaf, 0),
        "copy_bitmaps": False,
    }
    job = dc.wait_job(lab.host, dc.start_job(lab.host, "SDM.copy_data", params))
    assert job.status == "done"
    params = {
        "vol_info": dc.div(template, template.leaf, 1),
        "vol_attr": {"type": "SHARED"},
    }
    job = dc.wait_job(lab.host, dc.start_job(lab.host, "SDM.update_volume", params))
    assert job.status == "done"
    assert dc.info(template).voltype == "SHARED"
    disk = Disk(dc.master, str(uuid.uuid4()), (str(uuid.uuid4()),))
    dc.create_volume(disk, size, parent=(template.image, template.leaf))
    path = lab.host.prepare(dc.id, disk.domain, disk.image, disk.leaf)
    qemu_io(path, "read -P 0x55 0 1M", "qcow2")
    lab.host.teardown(dc.id, disk.domain, disk.image, disk.leaf)
    for done in (disk, source, template):
        dc.delete(done)


def test_generation_fences_a_late_job(lab: Lab) -> None:
    dc = lab.dc
    source, target = (dc.create_disk(dc.master, 16 * MIB) for _ in range(2))
    late = {
        "source": dc.div(source, source.leaf),
        "destination": dc.div(target, target.leaf, 0),
        "copy_bitmaps": False,
    }
    fence = {"vol_info": dc.div(target, target.leaf, 0), "vol_attr": {"generation": 3}}
    job = dc.wait_job(lab.host, dc.start_job(lab.host, "SDM.update_volume", fence))
    assert job.status == "done"
    assert generation(lab, target, target.leaf) == 3
    job = dc.wait_job(lab.host, dc.start_job(lab.host, "SDM.copy_data", late))
    assert (job.status, job.code) == ("failed", 911)
    assert dc.info(target).status == "OK"
    with pytest.raises(VdsError) as twice:
        lab.host.vds.call("SDM.copy_data", {"job_id": job.id, **late})
    assert twice.value.code == 69
    dc.delete(source)
    dc.delete(target)


def test_a_job_lost_by_kill_9(lab: Lab) -> None:
    """The engine finds out by lease and generation, and fences if it was not done."""
    dc = lab.dc
    source, target = (dc.create_disk(dc.master, 512 * MIB) for _ in range(2))
    write(lab, source, 0x66, 0, "400M")
    params = {
        "source": dc.div(source, source.leaf),
        "destination": dc.div(target, target.leaf, 0),
        "copy_bitmaps": False,
    }
    job_id = dc.start_job(lab.host, "SDM.copy_data", params)
    lab.restart()
    state = lab.host.jobs([job_id]).get(job_id)
    if state is not None and state.status not in ("done", "failed", "aborted"):
        state = dc.wait_job(lab.host, job_id)
    info = dc.info(target)
    assert info.owners == []
    assert info.generation in (0, 1)
    if info.generation == 0:
        fence = {"vol_info": dc.div(target, target.leaf, 0), "vol_attr": {"generation": 3}}
        job = dc.wait_job(lab.host, dc.start_job(lab.host, "SDM.update_volume", fence))
        assert job.status == "done"
    assert state is None or (state.status == "done") == (info.generation == 1)
    dc.delete(source)
    dc.delete(target)


def test_tasks_survive_kill_9_until_they_are_cleared(lab: Lab) -> None:
    dc = lab.dc
    image, volume = str(uuid.uuid4()), str(uuid.uuid4())
    params = {
        **pdiv(dc.id, dc.master, image, volume),
        "size": str(16 * MIB),
        "volFormat": COW,
        "preallocate": SPARSE,
        "diskType": "DATA",
        "desc": "",
        "srcImgUUID": NO_UUID,
        "srcVolUUID": NO_UUID,
    }
    task = lab.host.irs.call("Volume.create", params)
    end = time.monotonic() + 60
    while not lab.host.tasks()[task].finished and time.monotonic() < end:
        time.sleep(0.05)
    lab.agent.kill()
    lab.host.close()
    lab.agent.start()
    lab.host = lab.agent.host("host-1", 1)
    assert lab.host.tasks()[task].succeeded
    assert lab.host.task_verbs()[task] == "createVolume"
    lab.dc.hosts, lab.dc.spm = [], None
    dc.activate_host(lab.host)  # adopts and clears what is finished
    assert task not in lab.host.tasks()
    dc.delete(Disk(dc.master, image, (volume,)))


# -- 3.13 ----------------------------------------------------------------------------------------


def test_domain_to_maintenance_and_away(lab: Lab) -> None:
    """A second domain: attach, activate, use, deactivate, detach, format."""
    dc, host = lab.dc, lab.host
    domain = Domain(str(uuid.uuid4()), lab.make_server("bind"))
    dc.create_domain(host, domain, pool=dc.id)
    dc.clean(host, domain)
    dc.irs("StorageDomain.attach", storagedomainID=domain.id)
    assert host.images(domain.id) == []
    dc.irs("StorageDomain.activate", storagedomainID=domain.id)
    dc.domains[domain.id] = domain
    dc.connect_pool(host)
    dc.wait_healthy(host)
    assert host.pool_info(dc.id).domains[domain.id] == "Active"
    disk = dc.create_disk(domain.id, 16 * MIB)
    dc.delete(disk)
    dc.domain_to_maintenance(domain)
    assert host.pool_info(dc.id).domains[domain.id] == "Attached"
    dc.connect_servers(host)
    detach = {"storagedomainID": domain.id, "masterSdUUID": dc.master}
    dc.irs("StorageDomain.detach", **detach, masterVersion=dc.master_version)
    del dc.domains[domain.id]
    dc.connect_pool(host)
    assert domain.id not in host.pool_info(dc.id).domains
    host.vds.call("StorageDomain.format", {"storagedomainID": domain.id, "autoDetach": False})
    with pytest.raises(VdsError) as gone:
        host.domain_info(domain.id)
    assert gone.value.code == 358
    assert set(host.disconnect_servers(dc.id, [domain.server]).values()) == {0}


def test_host_to_maintenance_and_back(lab: Lab) -> None:
    lab.dc.host_to_maintenance(lab.host)
    assert lab.host.spm_status(lab.dc.id) is None
    assert lab.host.health() == {}
    lab.dc.activate_host(lab.host)
    lab.dc.wait_healthy(lab.host)
    assert lab.dc.spm is lab.host


# -- helpers -------------------------------------------------------------------------------------


def write(lab: Lab, disk: Disk, pattern: int, offset: int, length: str = "1M") -> None:
    """As a guest would, through the prepared path."""
    where = (lab.dc.id, disk.domain, disk.image, disk.leaf)
    path = lab.host.prepare(*where)
    fmt = "qcow2" if lab.dc.info(disk).format == "COW" else "raw"
    qemu_io(path, f"write -P {pattern} {offset} {length}", fmt)
    lab.host.teardown(*where)


def qemu_io(path: str, command: str, fmt: str) -> None:
    argv = ["qemu-io", "-f", fmt, "-c", command, path]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Pattern verification failed" not in done.stdout


def copy_of(lab: Lab, source: Disk) -> Disk:
    """Volumes of the same shape, parents first."""
    target = Disk(source.domain, str(uuid.uuid4()), ())
    parent = (NO_UUID, NO_UUID)
    ids = {volume: str(uuid.uuid4()) for volume in source.volumes}
    for number, volume in enumerate(source.volumes, start=1):
        info = lab.host.volume_info(lab.dc.id, source.domain, source.image, volume)
        target = Disk(target.domain, target.image, (*target.volumes, ids[volume]))
        fmt = COW if info.format == "COW" else RAW
        lab.dc.create_volume(target, info.capacity, fmt=fmt, parent=parent, sequence=number)
        parent = (target.image, target.leaf)
    return target


def generation(lab: Lab, disk: Disk, volume: str) -> int:
    return lab.host.volume_info(lab.dc.id, disk.domain, disk.image, volume).generation
