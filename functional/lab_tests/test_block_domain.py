# SPDX-License-Identifier: GPL-2.0-or-later
"""A block domain on real device-mapper: volumes that are activated, grown, moved, wiped; LUNs that
come, grow, are emptied, and die.
"""

from __future__ import annotations

import json
import os
import subprocess
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from functional.lab.inner.dm import Layer, Loops, active
from functional.lab.inner.tool import run, wait_for
from functional.processes import AgentProcess
from vdsm_storage.rpc.client import Client, RemoteError

GIB, MIB = 1024**3, 1024**2
EXTENT = 128 * MIB
BLANK = str(uuid.UUID(int=0))
ISCSI, COW, RAW = 3, 4, 5
PREALLOCATED, SPARSE = 1, 2


def new_id() -> str:
    return str(uuid.uuid4())


class Lab:
    """An agent that uses every device below /dev/mapper/lun-*, with one pool."""

    def __init__(self, directory: Path) -> None:
        settings = {"lvm__devices": "/dev/mapper/lun-*", "storage__lock_timeout": "20"}
        self.agent = AgentProcess(directory / "agent", False, settings)
        self.agent.start()
        self.client = Client.dev(str(self.agent.dir), timeout=300)
        self.pool = new_id()
        self.domains: list[str] = []

    def restart(self) -> None:
        self.client.close()
        if self.agent.alive():
            self.agent.kill()
        self.agent.start()
        self.client = Client.dev(str(self.agent.dir), timeout=300)

    def call(self, verb: str, **params: Any) -> Any:
        return self.client.call(verb, params)

    def code(self, verb: str, **params: Any) -> int:
        try:
            self.client.call(verb, params)
        except RemoteError as error:
            return error.code
        return 0

    def task(self, verb: str, **params: Any) -> int:
        task = self.call(verb, **params)
        wait_for(verb, lambda: self._task(task)["taskState"] == "finished", 300)
        status = self._task(task)
        self.call("Task.clear", taskID=task)
        return int(status["code"])

    def _task(self, task: str) -> dict[str, Any]:
        found: dict[str, Any] = self.call("Task.getStatus", taskID=task)
        return found

    def job(self, job: str) -> dict[str, Any]:
        found: dict[str, Any] = self.call("Host.getJobs", job_ids=[job])[job]
        return found

    def wait_job(self, job: str) -> dict[str, Any]:
        ends = ("done", "failed", "aborted")
        wait_for("the job", lambda: self.job(job)["status"] in ends, 300)
        return self.job(job)

    def add_domain(self, *guids: str) -> str:
        domain = new_id()
        group = self.call("LVMVolumeGroup.create", name=domain, devlist=list(guids), force=False)
        self.call(
            "StorageDomain.create", storagedomainID=domain, domainType=ISCSI, typeArgs=group,
            name="lab", domainClass=1, version="5", blockSize=512, maxHosts=250,
        )  # fmt: skip
        self.domains.append(domain)
        if len(self.domains) == 1:
            self.call(
                "StoragePool.create", storagepoolID=self.pool, name="lab", masterSdUUID=domain,
                masterVersion=1, domainList=[domain], lockRenewalIntervalSec=5, leaseTimeSec=60,
                ioOpTimeoutSec=10, leaseRetries=3,
            )  # fmt: skip
        else:
            self.call("StorageDomain.attach", storagedomainID=domain, storagepoolID=self.pool)
        self.connect()
        return domain

    def connect(self, **status: str) -> None:
        wanted = {domain: status.get(domain, "active") for domain in self.domains}
        self.call(
            "StoragePool.connect", storagepoolID=self.pool, hostID=1, scsiKey=self.pool,
            masterSdUUID=self.domains[0], masterVersion=1, domainDict=wanted,
        )  # fmt: skip
        for domain, state in wanted.items():
            if state == "active":
                wait_for("the host id", lambda d=domain: self.health(d).get("acquired"), 120)

    def health(self, domain: str) -> dict[str, Any]:
        found: dict[str, Any] = self.call("Host.getStats")["storageDomains"].get(domain, {})
        return found

    def ids(self, domain: str, image: str, volume: str) -> dict[str, str]:
        return {
            "storagepoolID": self.pool, "storagedomainID": domain, "imageID": image,
            "volumeID": volume,
        }  # fmt: skip

    def create(
        self, domain: str, size: int, fmt: int, image: str = "", parent: str = BLANK
    ) -> dict[str, str]:
        ids = self.ids(domain, image or new_id(), new_id())
        source = ids["imageID"] if parent != BLANK else BLANK
        code = self.task(
            "Volume.create", **ids, size=str(size), volFormat=fmt, diskType="DATA", desc="",
            preallocate=PREALLOCATED if fmt == RAW else SPARSE, srcImgUUID=source,
            srcVolUUID=parent,
        )  # fmt: skip
        assert code == 0
        return ids


@pytest.fixture(scope="module")
def luns(loops: Loops) -> Iterator[Callable[[int], str]]:
    """luns(bytes) -> the name of a new LUN; `/dev/mapper/<name>` can be made to fail and grow."""
    made: list[Layer] = []

    def make(size: int) -> str:
        made.append(Layer(loops.make(size), f"lun-{len(made)}"))
        return made[-1].name

    make.layers = made  # type: ignore[attr-defined]
    yield make
    for one in reversed(made):
        one.remove()


@pytest.fixture(scope="module")
def lab(luns: Callable[[int], str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    made = Lab(tmp_path_factory.mktemp("lab"))
    made.add_domain(luns(8 * GIB))
    yield made
    made.client.close()
    assert made.agent.stop() == ""


def lvs(guids: list[str], domain: str) -> dict[str, dict[str, str]]:
    """What the installed lvm says, with its own configuration."""
    devices = ",".join(f"/dev/mapper/{guid}" for guid in guids)
    out = run(
        "lvs", "--devices", devices, "--reportformat", "json", "--units", "b", "--nosuffix",
        "-o", "lv_name,lv_size,lv_tags,devices", domain,
    )  # fmt: skip
    return {row["lv_name"]: row for row in json.loads(out)["report"][0]["lv"]}


def io(path: str, fmt: str, *commands: str) -> None:
    """qemu-io past the page cache; a pattern that is not there fails."""
    words = [word for command in commands for word in ("-c", command)]
    done = subprocess.run(
        ["qemu-io", "-f", fmt, "-n", *words, path], capture_output=True, text=True, timeout=300,
        check=True,
    )  # fmt: skip
    assert "failed" not in done.stdout + done.stderr, done.stdout


# -- volumes -----------------------------------------------------------------------------------


def test_volumes_are_active_while_they_are_used(lab: Lab) -> None:
    domain = lab.domains[0]
    base = lab.create(domain, EXTENT, RAW)
    top = lab.create(domain, EXTENT, COW, base["imageID"], base["volumeID"])
    names = {base["volumeID"], top["volumeID"]}
    assert not names & active(domain)
    path = lab.call("Image.prepare", **top)["path"]
    assert names <= active(domain)
    assert os.path.realpath(path).startswith("/dev/dm-")
    io(path, "qcow2", "write -P 0x5a 1M 1M", "read -P 0 0 1M", "flush")
    assert lab.call("Volume.getQemuImageInfo", **top)["backingfile"] == base["volumeID"]
    assert names <= active(domain)  # an operation's end does not take it from the guest
    lab.restart()
    lab.connect()
    assert names <= active(domain)  # nor does a death of the agent
    io(path, "qcow2", "read -P 0x5a 1M 1M")
    lab.call("Image.teardown", **top)
    assert not names & active(domain)
    row = lvs(["lun-0"], domain)[top["volumeID"]]
    assert set(row["lv_tags"].split(",")) == {
        f"IU_{top['imageID']}", f"PU_{base['volumeID']}", "MD_2"
    }  # fmt: skip
    assert lab.task("Image.delete", **top, postZero="false", force="false") == 0


def test_what_a_guest_has_open_stays(lab: Lab) -> None:
    domain = lab.domains[0]
    ids = lab.create(domain, EXTENT, RAW)
    path = lab.call("Image.prepare", **ids)["path"]
    with open(path, "rb"):
        lab.call("Image.teardown", **ids)
        assert ids["volumeID"] in active(domain)
        assert lab.task("Image.delete", **ids, postZero="false", force="false") != 0
    lab.call("Image.prepare", **ids)
    lab.call("Image.teardown", **ids)
    assert ids["volumeID"] not in active(domain)


def test_an_active_volume_grows(lab: Lab) -> None:
    """By this host, and by another one: then Volume.refresh shows it."""
    domain = lab.domains[0]
    ids = lab.create(domain, EXTENT, RAW)
    path = lab.call("Image.prepare", **ids)["path"]
    assert lab.task("Volume.extendSize", **ids, newSize=str(2 * EXTENT)) == 0
    assert run("blockdev", "--getsize64", path).strip() == str(2 * EXTENT)
    name = f"{domain}/{ids['volumeID']}"
    options = ("--devices", "/dev/mapper/lun-0", "--driverloaded", "n", "--autobackup", "n")
    run("lvextend", *options, "-L", f"{3 * EXTENT}b", name)
    assert run("blockdev", "--getsize64", path).strip() == str(2 * EXTENT)
    lab.call("Volume.refresh", **ids)
    assert run("blockdev", "--getsize64", path).strip() == str(3 * EXTENT)
    lab.call("Image.teardown", **ids)
    assert lab.task("Image.delete", **ids, postZero="false", force="false") == 0


def test_deleted_data_is_zeroed(lab: Lab) -> None:
    domain = lab.domains[0]
    ids = lab.create(domain, EXTENT, RAW)
    path = lab.call("Image.prepare", **ids)["path"]
    io(path, "raw", "write -P 0x77 0 1M", "write -P 0x77 127M 1M")
    lab.call("Image.teardown", **ids)
    place = lvs(["lun-0"], domain)[ids["volumeID"]]["devices"]
    first = int(place.rpartition("(")[2].rstrip(")"))
    start = 129 * MIB + first * EXTENT
    lun = "/dev/mapper/lun-0"
    assert piece(lun, start) == b"\x77" * MIB
    params = {**ids, "postZero": "true", "force": "false", "discard": True}
    assert lab.task("Image.delete", **params) == 0
    assert piece(lun, start) == bytes(MIB)
    assert piece(lun, start + 127 * MIB) == bytes(MIB)
    assert ids["volumeID"] not in active(domain)


def piece(device: str, start: int) -> bytes:
    run("blockdev", "--flushbufs", device)
    with open(device, "rb", buffering=0) as opened:
        opened.seek(start)
        return opened.read(MIB)


# -- LUNs ----------------------------------------------------------------------------------------


def test_a_lun_grows(lab: Lab, luns: Any, loops: Loops) -> None:
    domain, layer = lab.domains[0], luns.layers[0]
    before = int(lab.call("StorageDomain.getStats", storagedomainID=domain)["disktotal"])
    loops.grow(layer.device, 10 * GIB)
    layer.grow()
    where = {"storagedomainID": domain, "storagepoolID": lab.pool}
    size = lab.call("StorageDomain.resizePV", **where, guid=layer.name)
    after = int(lab.call("StorageDomain.getStats", storagedomainID=domain)["disktotal"])
    assert (int(size), after - before) == (after, 2 * GIB)
    assert lab.code("StorageDomain.resizePV", **where, guid="lun-99") == 619


def test_data_moves_to_a_new_lun_and_the_old_one_goes(lab: Lab, luns: Any) -> None:
    """Not the first LUN: that has the metadata.  A move is stopped first."""
    guids = [luns(6 * GIB), luns(4 * GIB)]
    domain = lab.add_domain(*guids)
    where = {"storagedomainID": domain, "storagepoolID": lab.pool}
    ids = lab.create(domain, 12 * EXTENT, RAW)  # more than what is left of the first
    path = lab.call("Image.prepare", **ids)["path"]
    io(path, "raw", *(f"write -P {n + 1} {n * 128 + 5}M 1M" for n in range(12)))
    lab.call("Image.teardown", **ids)
    source = guids[1]
    assert f"/dev/mapper/{source}(" in lvs(guids, domain)[ids["volumeID"]]["devices"]
    third = luns(4 * GIB)
    luns.layers[-1].slow(0, 30)  # a move takes long enough to be met
    assert lab.code("StorageDomain.extend", **where, devlist=[third], force=False) == 0
    params = {"sd_id": domain, "src_guid": source, "dst_guids": [third]}
    assert lab.code("SDM.move_domain_device", job_id=new_id(), move_params=params) == 382
    lab.call("StorageDomain.deactivate", **where, masterSdUUID=BLANK, masterVersion=1)
    wait_for("the host id to go", lambda: not lab.health(domain), 120)
    metadata = {**params, "src_guid": guids[0]}
    job = new_id()
    lab.call("SDM.move_domain_device", job_id=job, move_params=metadata)
    assert lab.wait_job(job)["error"]["code"] == 617

    job = new_id()
    lab.call("SDM.move_domain_device", job_id=job, move_params=params)
    wait_for("the move to begin", lambda: "pvmove0" in lvs_hidden([*guids, third], domain), 120)
    lab.call("Task.stop", taskID=job)
    assert lab.wait_job(job)["status"] == "aborted"
    assert "pvmove0" not in lvs_hidden([*guids, third], domain)

    luns.layers[-1].heal()
    job = new_id()
    lab.call("SDM.move_domain_device", job_id=job, move_params=params)
    assert lab.wait_job(job)["status"] == "done"
    job = new_id()
    lab.call("SDM.reduce_domain", job_id=job, reduce_params={"sd_id": domain, "guid": source})
    assert lab.wait_job(job)["status"] == "done"
    left = run("pvs", "--devices", f"/dev/mapper/{source}", "--noheadings")
    assert left.strip() == ""
    lab.connect()
    path = lab.call("Image.prepare", **ids)["path"]
    io(path, "raw", *(f"read -P {n + 1} {n * 128 + 5}M 1M" for n in range(12)))
    lab.call("Image.teardown", **ids)
    info = lab.call("StorageDomain.getInfo", storagedomainID=domain)
    assert (info["metadataDevice"], info["vgMetadataDevice"]) == (guids[0], guids[0])


def lvs_hidden(guids: list[str], domain: str) -> str:
    devices = ",".join(f"/dev/mapper/{guid}" for guid in guids)
    return run("lvs", "-a", "--noheadings", "--devices", devices, "-o", "lv_name", domain)


def test_a_dead_lun_is_that_domains_business_only(lab: Lab, luns: Any) -> None:
    domain = lab.add_domain(luns(6 * GIB))
    layer = luns.layers[-1]
    where = {"storagedomainID": domain}
    layer.fail()
    wait_for("it to be noticed", lambda: not lab.health(domain)["valid"], 60)
    assert lab.health(domain)["code"] in (358, 379, 513)
    assert lab.code("StorageDomain.getStats", **where) in (358, 379, 513)
    assert lab.code("StorageDomain.getStats", storagedomainID=lab.domains[0]) == 0
    devices = {row["GUID"] for row in lab.call("Host.getDeviceList", storageType=0)}
    assert "lun-0" in devices
    layer.heal()
    wait_for("it to be well again", lambda: lab.health(domain)["valid"], 60)
    assert lab.code("StorageDomain.getStats", **where) == 0


def test_nothing_is_left_when_domains_are_formatted(lab: Lab) -> None:
    for domain in reversed(lab.domains[1:]):
        where = {"storagedomainID": domain, "storagepoolID": lab.pool}
        lab.call("StorageDomain.deactivate", **where, masterSdUUID=BLANK, masterVersion=1)
        lab.call("StorageDomain.detach", **where, masterSdUUID=BLANK, masterVersion=1)
        wait_for("the host id to go", lambda d=domain: not lab.health(d), 120)
        lab.domains.remove(domain)
        wait_for(
            "the format", lambda d=domain: lab.code(
                "StorageDomain.format", storagedomainID=d, autoDetach=False
            ) in (0, 358), 120,
        )  # fmt: skip
        assert active(domain) == set()
        assert not os.path.exists(f"/dev/{domain}")
