# SPDX-License-Identifier: GPL-2.0-or-later
"""An agent with a pool of two domains, driven without an engine, and what must always hold.

The domains are in files or on LUNs; see functional/backends.py.
"""

from __future__ import annotations

import contextlib
import copy
import json
import os
import subprocess
import time
import uuid
from pathlib import Path
from typing import Any

from functional.backends import Backend, look
from functional.engine.host import NO_UUID, StorageServer
from functional.pool_lab import Volume
from functional.processes import AgentProcess
from vdsm_storage.rpc.client import Client, RemoteError

PATIENCE = 120.0  # seconds
# In an emulated guest, asking costs more than waiting.
SLOWER = 10 if os.environ.get("VDSM_STORAGE_LAB_GUEST") else 1
MIB = 1024 * 1024
RAW, COW = 5, 4
PREALLOCATED, SPARSE = 1, 2
MANY = 12  # images of one domain, which are deleted in between


def new_id() -> str:
    return str(uuid.uuid4())


class World:
    """`main` is the pool's master, `second` another domain of the pool.

    `places` has the storage of each domain, `attached` are those of the pool.
    """

    def __init__(self, agent: AgentProcess, servers: list[StorageServer], attach: bool) -> None:
        self.agent = agent
        self.host_id = 1
        self.pool, self.main, self.second = new_id(), new_id(), new_id()
        self.places = dict(zip((self.main, self.second), servers, strict=True))
        self.version = 1  # of the master
        self.armed = ""  # with a crash point
        self.attached = [self.main, self.second] if attach else [self.main]
        self.client = Client.dev(str(agent.dir), timeout=180.0)
        self.block = servers[0].is_block
        self.size = 128 * MIB if self.block else 8 * MIB  # of a volume
        self.prealloc = PREALLOCATED if self.block else SPARSE  # of a raw one
        self._sound: dict[str, object] = {}
        for domain, server in self.places.items():
            self.connect_server(server)
            if domain in self.attached:
                self.create_domain(domain)
        self.create_pool()
        self.connect_pool()
        self.settle()

    def seen_by(self, agent: AgentProcess, host_id: int) -> World:
        """The same pool, on another host."""
        other = copy.copy(self)
        other.agent, other.host_id = agent, host_id
        other.client = Client.dev(str(agent.dir), timeout=180.0)
        for server in self.places.values():
            other.connect_server(server)
        other.connect_pool()
        other.settle()
        return other

    # -- the agent's life --------------------------------------------------------------------

    def restart(self, crash_point: str = "") -> None:
        """kill -9, and a new agent that may be armed to die at a point."""
        self.client.close()
        if self.agent.process is not None and self.agent.process.poll() is None:
            self.agent.kill()
        self.armed = crash_point
        self.agent.start(crash_point)
        self.reconnect()
        self.settle()

    def reconnect(self) -> None:
        """To an agent that was started again."""
        self.client = Client.dev(str(self.agent.dir), timeout=180.0)

    def settle(self) -> None:
        """Until every domain of the pool is usable and nothing waits for its recovery."""
        self.wait(self._usable, "domains to be usable")
        self.wait(self._idle, "recovery")

    def _usable(self) -> bool:
        found = self.call("Host.getStats")["storageDomains"]
        return all(
            (state := found.get(domain)) and state["valid"] and state["acquired"]
            for domain in self.attached
        )

    def _idle(self) -> bool:
        tasks = self.call("Host.getAllTasksStatuses").values()
        jobs = self.call("Host.getJobs").values()
        return (
            all(task["taskState"] == "finished" for task in tasks)
            and all(job["status"] in ("done", "failed", "aborted") for job in jobs)
            and self._journal_is_quiet()
        )

    def _journal_is_quiet(self) -> bool:
        """Operations that their callers wait for show in the journal only."""
        for path in (self.agent.dir / "state" / "journal").glob("*.json"):
            with contextlib.suppress(FileNotFoundError):
                if '"state": "finished"' not in path.read_text():  # it may be half written
                    return False
        return True

    @staticmethod
    def wait(condition: Any, what: str) -> None:
        deadline = time.monotonic() + PATIENCE
        while not condition():
            assert time.monotonic() < deadline, f"waited {PATIENCE} s for {what}"
            time.sleep(0.05 * SLOWER)

    # -- verbs -------------------------------------------------------------------------------

    def call(self, verb: str, **params: Any) -> Any:
        return self.client.call(verb, params)

    def task(self, verb: str, **params: Any) -> str:
        """Start a task and wait for its end; "" or what went wrong."""
        task = self.call(verb, **params)
        while (status := self.call("Task.getStatus", taskID=task))["taskState"] != "finished":
            time.sleep(0.02 * SLOWER)
        self.call("Task.clear", taskID=task)
        return "" if status["code"] == 0 else f"{status['code']} {status['message']}"

    def job(self, verb: str, job: str = "", **params: Any) -> str:
        """Start a job and wait for its end; "" or what went wrong."""
        job = job or new_id()
        self.call(verb, job_id=job, **params)
        while (state := self.call("Host.getJobs", job_ids=[job])[job])["status"] in (
            "pending", "running", "aborting",
        ):  # fmt: skip
            time.sleep(0.02 * SLOWER)
        return "" if state["status"] == "done" else json.dumps(state)

    def connect_server(self, server: StorageServer) -> None:
        found = self.call(
            "StoragePool.connectStorageServer", storagepoolID=NO_UUID, domainType=server.type,
            connectionParams=[server.as_map()],
        )  # fmt: skip
        assert [row["status"] for row in found] == [0], found

    def create_group(self, domain: str) -> str:
        group: str = self.call(
            "LVMVolumeGroup.create", name=domain, devlist=self.places[domain].guids, force=False
        )
        return group

    def create_domain(self, domain: str, version: str = "5", group: str = "") -> None:
        """On its place; in a new volume group, or in `group`."""
        server = self.places[domain]
        place = server.spec
        if server.is_block:
            place = group or self.create_group(domain)
        self.call(
            "StorageDomain.create", storagedomainID=domain, domainType=server.type,
            version=version, typeArgs=place, name="walk", domainClass=1,
            blockSize=0 if version == "5" and not server.is_block else 512, maxHosts=250,
        )  # fmt: skip

    def format_domain(self, domain: str) -> None:
        self.call("StorageDomain.format", storagedomainID=domain, autoDetach=False)

    def create_pool(self) -> None:
        self.call(
            "StoragePool.create", storagepoolID=self.pool, name="walk", masterSdUUID=self.main,
            masterVersion=self.version, domainList=self.attached, lockRenewalIntervalSec=5,
            leaseTimeSec=60, ioOpTimeoutSec=10, leaseRetries=3,
        )  # fmt: skip

    def connect_pool(self) -> None:
        self.call(
            "StoragePool.connect", storagepoolID=self.pool, hostID=self.host_id, scsiKey=self.pool,
            masterSdUUID=self.main, masterVersion=self.version,
            domainDict=dict.fromkeys(self.attached, "active"),
        )  # fmt: skip

    def disconnect_pool(self) -> None:
        self.call(
            "StoragePool.disconnect", storagepoolID=self.pool, hostID=self.host_id,
            scsiKey=self.pool,
        )

    def start_spm(self) -> str:
        return self.task(
            "StoragePool.spmStart", storagepoolID=self.pool, prevID=-1, prevLver="-1",
            enableScsiFencing="false", maxHostID=250, domVersion="5",
        )  # fmt: skip

    def is_spm(self) -> bool:
        status = self.call("StoragePool.getSpmStatus", storagepoolID=self.pool)
        return bool(status["spmStatus"] == "SPM")

    def destroy_pool(self) -> None:
        """By its manager."""
        if not self.is_spm():
            assert self.start_spm() == ""
        self.call("StoragePool.destroy", storagepoolID=self.pool, hostID=1, scsiKey=self.pool)

    def info_of(self, domain: str) -> dict[str, Any]:
        found: dict[str, Any] = self.call("StorageDomain.getInfo", storagedomainID=domain)
        return found

    def ids(self, image: str, volume: str, domain: str = "") -> dict[str, str]:
        return {
            "storagepoolID": self.pool, "storagedomainID": domain or self.main,
            "imageID": image, "volumeID": volume,
        }  # fmt: skip

    def new_volume(self, image: str, volume: str, **more: Any) -> dict[str, Any]:
        """Parameters of Volume.create for a small volume, raw and as thin as it can be."""
        domain = more.pop("domain", self.main)
        thin = SPARSE if more.get("volFormat") == COW else self.prealloc
        return {
            **self.ids(image, volume, domain), "size": str(self.size), "volFormat": RAW,
            "preallocate": thin, "diskType": "DATA", "desc": "walk", "srcImgUUID": NO_UUID,
            "srcVolUUID": NO_UUID, **more,
        }  # fmt: skip

    def create(self, image: str, **more: Any) -> str:
        volume = new_id()
        assert self.task("Volume.create", **self.new_volume(image, volume, **more)) == ""
        return volume

    def chain(self, fmt: int = RAW) -> tuple[str, str, str]:
        """An image of a base and a snapshot, each with some data."""
        image = new_id()
        base = self.create(image, volFormat=fmt)
        top = self.create(image, volFormat=COW, srcImgUUID=image, srcVolUUID=base, sequence=2)
        for volume, name, place in ((base, "raw" if fmt == RAW else "qcow2", 0), (top, "qcow2", 1)):
            self.write(image, volume, name, place)
        return image, base, top

    def write(self, image: str, volume: str, fmt: str, place: int) -> None:
        path = self.call("Image.prepare", **self.ids(image, volume))["path"]
        command = f"write -P {0x50 + place} {place}M 1M"
        subprocess.run(["qemu-io", "-f", fmt, "-c", command, path], check=True, timeout=60,
                       capture_output=True)  # fmt: skip
        self.call("Image.teardown", **self.ids(image, volume))

    def volumes(self, image: str, domain: str = "") -> list[str]:
        found: list[str] = self.call(
            "StorageDomain.getVolumes", storagedomainID=domain or self.main,
            storagepoolID=self.pool, imageID=image,
        )  # fmt: skip
        return found

    def images(self, domain: str = "") -> list[str]:
        found: list[str] = self.call(
            "StorageDomain.getImages", storagedomainID=domain or self.main
        )
        return found

    def info(self, image: str, volume: str, domain: str = "") -> dict[str, Any]:
        found: dict[str, Any] = self.call("Volume.getInfo", **self.ids(image, volume, domain))
        return found

    def div(self, image: str, volume: str, domain: str = "") -> dict[str, Any]:
        """An endpoint of a job, with the volume's present generation."""
        generation = self.info(image, volume, domain)["generation"]
        return {
            "endpoint_type": "div", "sd_id": domain or self.main, "img_id": image,
            "vol_id": volume, "generation": generation,
        }  # fmt: skip

    def exists(self, domain: str) -> bool:
        try:
            self.info_of(domain)
        except RemoteError as error:
            if error.code != 358:
                raise
            return False
        return True

    # -- what must hold ----------------------------------------------------------------------

    def storage(self, domain: str) -> Backend:
        """What there really is of a domain."""
        server = self.places[domain]
        return look(self.agent, server, domain, Path(server.spec) / domain)

    def check(self) -> None:
        """Nothing half made on any domain of the pool, nothing left running or held."""
        for domain in self.attached:
            self._check_domain(domain)

    def _check_domain(self, domain: str) -> None:
        storage = self.storage(domain)
        storage.check_idle()
        parents: dict[tuple[str, str], dict[str, Any]] = {}
        images = storage.images()
        assert set(self.images(domain)) == set(images)
        for image, volumes in images.items():
            assert set(self.volumes(image, domain)) == volumes
            for volume in volumes:
                parents[image, volume] = self.info(image, volume, domain)
        for (image, volume), info in parents.items():
            self._check_data(storage, Volume(domain, image, volume), info)
            lease = info.get("lease")
            assert lease is None or lease["owners"] == [], f"lease of {volume} is held: {lease}"
            kids = [v for (i, v), k in parents.items() if i == image and k["parent"] == volume]
            # A merged volume that waits for its deletion is ILLEGAL and belongs to no chain.
            if info["voltype"] != "SHARED" and (kids or info["legality"] == "LEGAL"):
                assert info["voltype"] == ("INTERNAL" if kids else "LEAF"), (volume, kids, info)
            if info["parent"] != NO_UUID:
                assert (image, info["parent"]) in parents, f"{volume} lost its parent"

    def _check_data(self, storage: Backend, where: Volume, info: dict[str, Any]) -> None:
        """By qemu-img, unless nothing was written since the last time."""
        if info["format"] != "COW" or info["legality"] != "LEGAL":
            return
        if self._sound.get(where.volume) == (now := storage.changed(where)):
            return
        ids = self.ids(where.image, where.volume, where.domain)
        path = self.call("Image.prepare", **ids, allowIllegal=True)["path"]
        argv = ["qemu-img", "check", "-q", "-f", "qcow2", path]
        done = subprocess.run(argv, capture_output=True, text=True, timeout=60, check=False)
        self.call("Image.teardown", **ids)
        assert done.returncode in (0, 3), f"{path}: {done.stderr}"
        self._sound[where.volume] = now

    def clear(self) -> None:
        """Delete all images when they are many."""
        for domain in self.attached:
            images = self.images(domain)
            if len(images) < MANY:
                continue
            where = {"storagepoolID": self.pool, "storagedomainID": domain}
            for image in images:
                assert self.task(
                    "Image.delete", **where, imageID=image, postZero="false", force="false"
                ) == ""  # fmt: skip
