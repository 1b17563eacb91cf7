# SPDX-License-Identifier: GPL-2.0-or-later
"""What engines do with the data of disks while no VM runs: merge, upload, backup, upkeep."""

from __future__ import annotations

import contextlib
import os
import subprocess
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from functional.engine.datacenter import (
    DataCenter,
    Disk,
    FlowError,
    TaskFailedError,
)
from functional.engine.host import COW, PREALLOCATED, RAW, SPARSE, Host, StorageServer, pdiv
from functional.engine.wire import NetworkError, VdsError
from functional.processes import AgentProcess

MIB = 1024**2
SIZE = 32 * MIB


@dataclass
class Lab:
    agent: AgentProcess
    host: Host
    dc: DataCenter

    def job(self, verb: str, **params: Any) -> Any:
        return self.dc.wait_job(self.host, self.dc.start_job(self.host, verb, params))

    def path(self, disk: Disk, volume: str) -> str:
        """The file of a volume, as a tool on the host finds it; its base may be ILLEGAL."""
        where = pdiv(self.dc.id, disk.domain, disk.image, volume)
        found = self.host.vds.call("Image.prepare", {**where, "allowIllegal": True})["path"]
        assert type(found) is str
        return found

    def info(self, disk: Disk, volume: str) -> Any:
        return self.host.volume_info(self.dc.id, disk.domain, disk.image, volume)

    def qemu_info(self, disk: Disk, volume: str) -> dict[str, Any]:
        where = pdiv(self.dc.id, disk.domain, disk.image, volume)
        found = self.host.vds.call("Volume.getQemuImageInfo", where)
        assert isinstance(found, dict)
        return found

    def crash(self, point: str, begin: Callable[[], Any]) -> None:
        """`begin` reaches a crash point; the agent comes back and recovers."""
        self.host.close()
        assert self.agent.stop() == ""
        self.agent.start(point)
        self.connect()
        with contextlib.suppress(VdsError, NetworkError, TaskFailedError, FlowError):
            begin()  # it may die before it has answered
        self.agent.wait_dead()
        self.host.close()
        self.agent.start()
        self.connect()

    def connect(self) -> None:
        self.host = self.agent.host("host-1", 1)
        self.dc.hosts, self.dc.spm = [], None
        self.dc.activate_host(self.host)


@pytest.fixture(scope="module")
def lab(
    make_server: Callable[[str], StorageServer], start_agent: Callable[..., AgentProcess]
) -> Iterator[Lab]:
    agent = start_agent("agent-data", tls=False)
    host = agent.host("host-1", 1)
    dc = DataCenter.begin([host], make_server("bind"))
    made = Lab(agent, host, dc)
    yield made
    errors = made.host.vds.errors + made.host.irs.errors
    made.host.close()
    assert errors == []


def qemu_io(path: str, fmt: str, *commands: str) -> None:
    argv = ["qemu-io", "-f", fmt]
    for command in commands:
        argv += ["-c", command]
    done = subprocess.run([*argv, path], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Pattern verification failed" not in done.stdout


def three_layers(lab: Lab, fmt: int) -> Disk:
    """Each layer writes its own MiB and all write the first one."""
    disk = lab.dc.create_disk(lab.dc.master, SIZE, fmt=fmt)
    for number in range(3):
        if number:
            disk = lab.dc.snapshot(disk, SIZE)
        own = f"write -P {number + 1} {number + 1}M 1M"
        image_format = "raw" if fmt == RAW and not number else "qcow2"
        path = lab.path(disk, disk.leaf)
        qemu_io(path, image_format, own, f"write -P {number + 17} 0 1M")
    return disk


def check_layers(lab: Lab, disk: Disk, fmt: str = "qcow2") -> None:
    qemu_io(
        lab.path(disk, disk.leaf), fmt,
        "read -P 19 0 1M", "read -P 1 1M 1M", "read -P 2 2M 1M", "read -P 3 3M 1M",
    )  # fmt: skip


# -- jobs ----------------------------------------------------------------------------------------


def test_a_copy_is_stopped(lab: Lab) -> None:
    """Its progress is told; stopped, it leaves an ILLEGAL target of the old generation."""
    dc, size = lab.dc, 1024 * MIB
    source, target = dc.create_disk(dc.master, size), dc.create_disk(dc.master, size)
    with open(lab.path(source, source.leaf), "r+b") as file:
        for _ in range(size // MIB):
            file.write(os.urandom(4096) * 256)
    copy = {
        "source": dc.div(source, source.leaf),
        "destination": dc.div(target, target.leaf, 0),
    }
    job_id = str(uuid.uuid4())
    lab.host.vds.call("SDM.copy_data", {"job_id": job_id, **copy})
    seen: list[float] = []

    def moving() -> bool:
        job = lab.host.jobs([job_id])[job_id]
        assert job.status in ("pending", "running")
        seen.append(job.progress or 0.0)
        return 0.0 < seen[-1] < 100.0

    dc.wait(moving, "progress")
    lab.host.vds.call("Task.stop", {"taskID": job_id})
    dc.wait(lambda: lab.host.jobs([job_id])[job_id].status == "aborted", "the end of the job")
    info = lab.info(target, target.leaf)
    assert (info.status, info.generation, info.owners) == ("ILLEGAL", 0, [])
    with pytest.raises(VdsError) as ended:
        lab.host.vds.call("Task.stop", {"taskID": job_id})
    assert ended.value.code == 84
    assert lab.job("SDM.copy_data", **copy).status == "done"
    dc.delete(source)
    dc.delete(target)


# -- 3.8: cold merge -----------------------------------------------------------------------------


def subchain(lab: Lab, disk: Disk, base: int) -> dict[str, Any]:
    low = disk.volumes[base]
    return {
        "sd_id": disk.domain,
        "img_id": disk.image,
        "base_id": low,
        "top_id": disk.volumes[base + 1],
        "base_generation": lab.info(disk, low).generation,
    }


def merge(lab: Lab, disk: Disk, base: int, bitmaps: bool = False) -> Disk:
    """Delete the snapshot between two volumes; returns the disk without it."""
    info = subchain(lab, disk, base)
    lab.dc.task("StoragePool.prepareMerge", subchainInfo=info)
    job = lab.job("SDM.merge", subchain_info=info, merge_bitmaps=bitmaps)
    assert (job.status, job.code) == ("done", 0)
    assert lab.info(disk, info["base_id"]).generation == info["base_generation"] + 1
    lab.dc.task("StoragePool.finalizeMerge", subchainInfo=info)
    return delete_top(lab, disk, base)


def delete_top(lab: Lab, disk: Disk, base: int) -> Disk:
    top = disk.volumes[base + 1]
    lab.dc.task(
        "Image.deleteVolumes",
        storagedomainID=disk.domain,
        imageID=disk.image,
        volumeList=[top],
        postZero="false",
        force="false",
    )
    left = tuple(volume for volume in disk.volumes if volume != top)
    params = {
        "storagedomainID": disk.domain, "storagepoolID": lab.dc.id, "imageID": disk.image
    }  # fmt: skip
    assert set(lab.host.vds.call("StorageDomain.getVolumes", params)) == set(left)
    return Disk(disk.domain, disk.image, left)


@pytest.mark.parametrize("fmt", [RAW, COW])
def test_cold_merge(lab: Lab, fmt: int) -> None:
    """The middle snapshot, then the last one, until one volume is left."""
    disk = three_layers(lab, fmt)
    disk = merge(lab, disk, 0)
    check_layers(lab, disk)
    disk = merge(lab, disk, 0)
    assert lab.info(disk, disk.leaf).status == "OK"
    check_layers(lab, disk, "raw" if fmt == RAW else "qcow2")
    lab.dc.delete(disk)


@pytest.mark.parametrize(
    "point",
    [
        "merge.prepare:marked",
        "merge.run:started",
        "merge.run:committed",
        "merge.finalize:rebased",
        "merge.finalize:top",
    ],
)
def test_cold_merge_after_kill_9(lab: Lab, point: str) -> None:
    """The engine asks for the step again, or finds it done; no byte is lost."""
    disk = three_layers(lab, COW)
    info = subchain(lab, disk, 0)

    def step(wanted: str) -> None:
        if wanted == "prepare":
            lab.dc.task("StoragePool.prepareMerge", subchainInfo=info)
        elif wanted == "run":
            lab.job("SDM.merge", subchain_info=info, merge_bitmaps=True)
        else:
            lab.dc.task("StoragePool.finalizeMerge", subchainInfo=info)

    steps = ["prepare", "run", "finalize"]
    at = steps.index(point.split(".")[1].split(":", maxsplit=1)[0])
    for wanted in steps[:at]:
        step(wanted)
    lab.crash(point, lambda: step(steps[at]))
    check_layers(lab, disk)
    if steps[at] == "run":
        assert lab.info(disk, disk.volumes[0]).generation == info["base_generation"]
    again = delete_top if steps[at] == "finalize" else merge
    disk = again(lab, disk, 0)
    check_layers(lab, disk)
    lab.dc.delete(disk)


# -- 3.11: upload --------------------------------------------------------------------------------


def upload(lab: Lab, disk: Disk, data: bytes) -> int:
    """The order of an upload through the file back end; returns the code of verify_untrusted."""
    where = pdiv(lab.dc.id, disk.domain, disk.image, disk.leaf)
    path = lab.path(disk, disk.leaf)
    lab.dc.irs("Volume.setLegality", **where, legality="ILLEGAL")
    assert lab.info(disk, disk.leaf).status == "ILLEGAL"
    with open(path, "r+b") as file:
        file.write(data)
    code = 0
    try:
        assert lab.host.vds.call("Volume.verify_untrusted", where) is True
        lab.dc.irs("Volume.setLegality", **where, legality="LEGAL")
        lab.host.vds.call("Volume.getQemuImageInfo", where)
    except VdsError as error:
        code = error.code
    teardown = {
        "storagepoolID": lab.dc.id, "storagedomainID": disk.domain,
        "imageID": disk.image, "leafVolID": disk.leaf,
    }  # fmt: skip
    lab.host.vds.call("Image.teardown", teardown)
    return code


def image(tmp_path: Path, *options: str, size: str = "32M") -> bytes:
    path = tmp_path / "upload"
    path.unlink(missing_ok=True)
    subprocess.run(["qemu-img", "create", "-q", *options, str(path), size], check=True, timeout=60)
    return path.read_bytes()


def test_uploads(lab: Lab, tmp_path: Path) -> None:
    good = [
        (COW, image(tmp_path, "-f", "qcow2")),
        (COW, image(tmp_path, "-f", "qcow2", "-o", "compat=0.10")),
        (RAW, os.urandom(4 * MIB)),
    ]
    secret = ["-u", "-b", "/etc/shadow", "-F", "raw"]
    bad = [
        (COW, image(tmp_path, "-f", "qcow2", *secret)),
        (COW, image(tmp_path, "-f", "qcow2", "-o", f"data_file={tmp_path}/data")),
        (COW, image(tmp_path, "-f", "qcow2", size="64M")),
        (COW, os.urandom(4 * MIB)),
        (RAW, image(tmp_path, "-f", "qcow2")),
    ]
    for fmt, data in good:
        disk = lab.dc.create_disk(lab.dc.master, SIZE, fmt=fmt, prealloc=SPARSE)
        assert upload(lab, disk, data) == 0
        assert lab.info(disk, disk.leaf).status == "OK"
        lab.dc.delete(disk)
    for fmt, data in bad:
        disk = lab.dc.create_disk(lab.dc.master, SIZE, fmt=fmt)
        assert upload(lab, disk, data) == 484
        assert lab.info(disk, disk.leaf).status == "ILLEGAL"
        lab.dc.delete(disk)


# -- 3.12: cold backup; upkeep -------------------------------------------------------------------


def bitmaps(lab: Lab, disk: Disk) -> set[str]:
    return {bitmap["name"] for bitmap in lab.qemu_info(disk, disk.leaf).get("bitmaps", [])}


def test_checkpoints_of_a_stopped_vm(lab: Lab) -> None:
    disk = lab.dc.create_disk(lab.dc.master, SIZE, fmt=COW, prealloc=PREALLOCATED)
    one, two = str(uuid.uuid4()), str(uuid.uuid4())
    for number, name in enumerate((one, two)):
        where = lab.dc.div(disk, disk.leaf, number)
        assert lab.job("SDM.add_bitmap", vol_info=where, bitmap=name).status == "done"
    assert bitmaps(lab, disk) == {one, two}
    where = {**lab.dc.div(disk, disk.leaf), "generation": None}
    assert lab.job("SDM.remove_bitmap", vol_info=where, bitmap=one).status == "done"
    missing = lab.job("SDM.remove_bitmap", vol_info=where, bitmap=one)
    assert (missing.status, missing.code) == ("failed", 947)
    copy = lab.dc.create_disk(lab.dc.master, SIZE, fmt=COW)
    job = lab.job(
        "SDM.copy_data",
        source=lab.dc.div(disk, disk.leaf),
        destination=lab.dc.div(copy, copy.leaf, 0),
        copy_bitmaps=True,
        legal=True,
    )
    assert job.status == "done"
    assert bitmaps(lab, copy) == {two}
    assert lab.job("SDM.clear_bitmaps", vol_info=where).status == "done"
    assert bitmaps(lab, disk) == set()
    assert lab.info(disk, disk.leaf).generation == 4
    lab.dc.delete(disk)
    lab.dc.delete(copy)


def test_recovery_that_fails_is_tried_again(lab: Lab) -> None:
    """The volume is locked by another program when the agent comes back; later it is not."""
    disk = lab.dc.create_disk(lab.dc.master, SIZE, fmt=COW)
    path, name = lab.path(disk, disk.leaf), str(uuid.uuid4())
    argv = ["qemu-io", "-f", "qcow2", path]
    held: list[subprocess.Popen[bytes]] = []
    jobs: list[str] = []

    def begin() -> None:
        where = lab.dc.div(disk, disk.leaf, 0)
        params = {"vol_info": where, "bitmap": name}
        jobs.append(lab.dc.start_job(lab.host, "SDM.add_bitmap", params))
        lab.agent.wait_dead()
        with open(os.devnull, "wb") as null:
            held.append(subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=null))

    lab.crash("volume.add_bitmap:changed", begin)
    for _ in range(4):
        time.sleep(0.5)
        assert lab.host.jobs(jobs)[jobs[0]].status == "running"
    held[0].communicate(b"quit\n", timeout=10)
    assert lab.dc.wait_job(lab.host, jobs[0]).status == "failed"
    assert bitmaps(lab, disk) == set()
    assert lab.info(disk, disk.leaf).generation == 0
    lab.dc.delete(disk)


def test_amend_and_sparsify(lab: Lab) -> None:
    disk = lab.dc.create_disk(lab.dc.master, SIZE, fmt=COW)
    where = lab.dc.div(disk, disk.leaf, 0)
    job = lab.job("SDM.amend_volume", vol_info=where, qcow2_attr={"compat": "0.10"})
    assert job.status == "done"
    assert lab.qemu_info(disk, disk.leaf)["compat"] == "0.10"
    path = lab.path(disk, disk.leaf)
    qemu_io(path, "qcow2", "write -P 1 0 16M", "write -P 0 4M 12M")
    before = lab.info(disk, disk.leaf).true_size
    where["generation"] = 1
    assert lab.job("SDM.sparsify_volume", vol_info=where).status == "done"
    assert lab.info(disk, disk.leaf).true_size < before - 8 * MIB
    qemu_io(path, "qcow2", "read -P 1 0 4M", "read -P 0 4M 12M")
    lab.dc.delete(disk)


def test_measure_before_a_copy(lab: Lab) -> None:
    disk = three_layers(lab, RAW)
    where = pdiv(lab.dc.id, disk.domain, disk.image, disk.leaf)
    sizes = {}
    for chain in (True, False):
        found = lab.host.vds.call(
            "Volume.measure", {**where, "dstVolFormat": COW, "backing_chain": chain}
        )
        sizes[chain] = found["required"]
    assert 2 * MIB < sizes[False] < 3 * MIB
    assert 4 * MIB < sizes[True] < 36 * MIB
    lab.dc.delete(disk)


def test_what_is_refused_at_once(lab: Lab) -> None:
    disk = lab.dc.create_disk(lab.dc.master, 4 * MIB, fmt=COW)
    div = lab.dc.div(disk, disk.leaf, 0)
    external = {
        "endpoint_type": "external",
        "url": "rbd:pool/volume",
        "lease": {"sd_id": disk.domain, "lease_id": str(uuid.uuid4())},
        "generation": 0,
        "format": "raw",
        "is_zero": False,
    }
    nowhere = {**div, "sd_id": str(uuid.uuid4())}
    for verb, params, code in (
        ("SDM.copy_data", {"source": div, "destination": external}, 2009),
        ("SDM.copy_data", {"source": div, "destination": nowhere}, 358),
        ("SDM.update_volume", {"vol_info": div, "vol_attr": {}}, 235),
        ("SDM.add_bitmap", {"vol_info": div, "bitmap": "--help"}, 1000),
    ):
        with pytest.raises(VdsError) as refused:
            lab.dc.start_job(lab.host, verb, params)
        assert refused.value.code == code
    assert lab.info(disk, disk.leaf).generation == 0
    lab.dc.delete(disk)
