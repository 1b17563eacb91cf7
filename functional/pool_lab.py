# SPDX-License-Identifier: GPL-2.0-or-later
"""An agent with one pool, asked through the client library: what tests need to do it harm."""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from functional.engine.host import LOCALFS, POSIXFS, StorageServer
from functional.processes import AgentProcess
from vdsm_storage.rpc.client import Client, RemoteError

BLANK = str(uuid.UUID(int=0))
MIB = 1024 * 1024
COW, RAW = 4, 5
PATIENCE = 120.0


@dataclass
class Volume:
    domain: str
    image: str
    volume: str


@dataclass
class Lab:
    """`domains` are in the pool, the first is its master; `roots` are their directories as the
    storage shows them, not through the agent's mount."""

    agent: AgentProcess
    client: Client
    pool: str = field(default_factory=lambda: str(uuid.uuid4()))
    servers: dict[str, StorageServer] = field(default_factory=dict)

    @property
    def pid(self) -> int:
        assert self.agent.process is not None
        return self.agent.process.pid

    def call(self, verb: str, **params: Any) -> Any:
        return self.client.call(verb, params)

    def code(self, verb: str, **params: Any) -> int:
        """0, or the number of the verb's error."""
        try:
            self.client.call(verb, params)
        except RemoteError as error:
            return error.code
        return 0

    def reconnect(self) -> None:
        self.client.close()
        self.client = Client.dev(str(self.agent.dir), timeout=PATIENCE)

    # -- domains -----------------------------------------------------------------------------

    def connect(self, *servers: StorageServer) -> list[int]:
        kind = servers[0].type
        answer = self.call(
            "StoragePool.connectStorageServer", storagepoolID=BLANK, domainType=kind,
            connectionParams=[server.as_map() for server in servers],
        )  # fmt: skip
        return [one["status"] for one in answer]

    def type_args(self, domain: str, server: StorageServer) -> str:
        """The path that a file domain is made on, or a new volume group for a block domain."""
        if not server.is_block:
            return server.spec
        group: str = self.call(
            "LVMVolumeGroup.create", name=domain, devlist=server.guids, force=False
        )
        return group

    def add_domain(self, server: StorageServer) -> str:
        """A new domain in the pool; the first makes the pool and connects it."""
        domain = str(uuid.uuid4())
        assert self.connect(server) == [0]
        self.call(
            "StorageDomain.create", storagedomainID=domain, domainType=server.type,
            typeArgs=self.type_args(domain, server), name="hostile", domainClass=1, version="5",
            blockSize=512, maxHosts=250,
        )  # fmt: skip
        first = not self.servers
        self.servers[domain] = server
        if first:
            self.call(
                "StoragePool.create", storagepoolID=self.pool, name="hostile",
                masterSdUUID=domain, masterVersion=1, domainList=[domain],
                lockRenewalIntervalSec=5, leaseTimeSec=60, ioOpTimeoutSec=10, leaseRetries=3,
            )  # fmt: skip
            self.connect_pool()
        else:
            ids = {"storagedomainID": domain, "storagepoolID": self.pool}
            self.call("StorageDomain.attach", **ids)
            self.call("StorageDomain.activate", **ids)
        self.wait_usable(domain)
        return domain

    def connect_pool(self) -> None:
        self.call(
            "StoragePool.connect", storagepoolID=self.pool, hostID=1, scsiKey=self.pool,
            masterSdUUID=next(iter(self.servers)), masterVersion=1,
            domainDict=dict.fromkeys(self.servers, "active"),
        )  # fmt: skip

    def health(self, domain: str) -> dict[str, Any]:
        found: dict[str, Any] = self.call("Host.getStats")["storageDomains"].get(domain, {})
        return found

    def wait_usable(self, domain: str) -> None:
        wait_for(lambda: self.health(domain).get("acquired"), "the host id")

    def root(self, domain: str) -> Path:
        """The domain's directory on a server that is a directory."""
        return Path(self.servers[domain].spec) / domain

    def directory(self, where: Volume) -> Path:
        return self.root(where.domain) / "images" / where.image

    # -- volumes -----------------------------------------------------------------------------

    def ids(self, where: Volume) -> dict[str, str]:
        return {
            "storagepoolID": self.pool, "storagedomainID": where.domain,
            "imageID": where.image, "volumeID": where.volume,
        }  # fmt: skip

    def new_volume(self, where: Volume, size: int, fmt: int, **more: Any) -> dict[str, Any]:
        """Parameters of Volume.create."""
        return {
            **self.ids(where), "size": str(size), "volFormat": fmt, "preallocate": 2,
            "diskType": "DATA", "desc": "", "srcImgUUID": BLANK, "srcVolUUID": BLANK, **more,
        }  # fmt: skip

    def start_create(self, where: Volume, size: int, fmt: int, **more: Any) -> str:
        task: str = self.call("Volume.create", **self.new_volume(where, size, fmt, **more))
        return task

    def create(
        self, domain: str, size: int = 4 * MIB, fmt: int = COW, image: str = "", **more: Any
    ) -> Volume:
        where = Volume(domain, image or str(uuid.uuid4()), str(uuid.uuid4()))
        assert self.wait_task(self.start_create(where, size, fmt, **more)) == 0
        return where

    def snapshot(self, parent: Volume, **more: Any) -> Volume:
        return self.create(
            parent.domain, image=parent.image, srcImgUUID=parent.image, srcVolUUID=parent.volume,
            **more,
        )  # fmt: skip

    def prepare(self, where: Volume) -> Path:
        return Path(self.call("Image.prepare", **self.ids(where))["path"])

    def wait_task(self, task: str) -> int:
        """Its error's number, 0 for success; it is cleared."""

        def finished() -> bool:
            return bool(self.call("Task.getStatus", taskID=task)["taskState"] == "finished")

        wait_for(finished, "the task")
        code: int = self.call("Task.getStatus", taskID=task)["code"]
        self.call("Task.clear", taskID=task)
        return code

    def task(self, verb: str, **params: Any) -> int:
        """The error's number of a verb that answers with a task, from either."""
        try:
            task = self.call(verb, **params)
        except RemoteError as error:
            return error.code
        return self.wait_task(task)

    def job(self, verb: str, **params: Any) -> int:
        """The same for a job."""
        job = str(uuid.uuid4())
        try:
            self.call(verb, job_id=job, **params)
        except RemoteError as error:
            return error.code
        return self.wait_job(job)

    def wait_job(self, job: str) -> int:
        def ended() -> bool:
            status = self.call("Host.getJobs", job_ids=[job])[job]["status"]
            return status not in ("pending", "running", "aborting")

        wait_for(ended, "the job")
        error = self.call("Host.getJobs", job_ids=[job])[job].get("error") or {}
        return int(error.get("code", 0))

    def copy(self, source: Volume, target: Volume) -> int:
        return self.job(
            "SDM.copy_data", source=endpoint(source), destination=endpoint(target)
        )

    # -- what the agent costs ----------------------------------------------------------------

    def memory(self) -> int:
        """Resident bytes."""
        with open(f"/proc/{self.pid}/statm", encoding="ascii") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGESIZE")

    def threads(self) -> int:
        return len(os.listdir(f"/proc/{self.pid}/task"))

    def descriptors(self) -> int:
        return len(os.listdir(f"/proc/{self.pid}/fd"))


def endpoint(where: Volume) -> dict[str, Any]:
    return {
        "endpoint_type": "div", "sd_id": where.domain, "img_id": where.image,
        "vol_id": where.volume,
    }  # fmt: skip


def make_lab(agent: AgentProcess) -> Lab:
    return Lab(agent, Client.dev(str(agent.dir), timeout=PATIENCE))


def local_server(path: Path) -> StorageServer:
    path.mkdir(parents=True, exist_ok=True)
    return StorageServer(LOCALFS, str(path))


def bind_server(path: Path) -> StorageServer:
    """A directory as a POSIX file system."""
    return StorageServer(POSIXFS, str(path), vfs_type="none", options="bind")


def wait_for(holds: Callable[[], Any], what: str, seconds: float = PATIENCE) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, f"{what} did not come"
        time.sleep(0.02)
