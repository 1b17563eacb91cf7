# SPDX-License-Identifier: GPL-2.0-or-later
"""A host as the engine talks to it: two connections, and the parameters it really sends."""

from __future__ import annotations

import http.client
import ssl
import uuid
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import Any

from functional.engine import replies
from functional.engine.replies import NO_UUID
from functional.engine.wire import IRS, VDS, Connection, VdsError, client_tls

FCP, ISCSI, LOCALFS, POSIXFS = 2, 3, 4, 6
COW, RAW = 4, 5
PREALLOCATED, SPARSE = 1, 2
DATA_CLASS = 1
UNKNOWN_POOL = 309


def optional(**params: Any) -> dict[str, Any]:
    """The engine leaves out what is null, blank or empty."""
    return {key: value for key, value in params.items() if value not in (None, "", [], {})}


@dataclass(frozen=True)
class StorageServer:
    """Where a domain's storage is; `spec` is what the engine calls the connection.

    A block domain has `devices`, the LUNs that it is made on.
    """

    type: int
    spec: str = ""
    vfs_type: str = ""
    options: str = ""
    devices: tuple[str, ...] = ()
    id: str = field(default_factory=lambda: str(uuid.uuid4()))

    @property
    def is_block(self) -> bool:
        return self.type in (FCP, ISCSI)

    @property
    def guids(self) -> list[str]:
        """What the engine calls its LUNs."""
        return [PurePath(device).name for device in self.devices]

    def as_map(self) -> dict[str, str]:
        """A flat map of strings."""
        return {
            "id": self.id,
            "connection": self.spec,
            "port": "",
            "iqn": "",
            "user": "",
            "password": "",
            "ipv6_enabled": "false",
            **optional(vfs_type=self.vfs_type, mnt_options=self.options),
        }


class Host:
    """`pki` of a development agent, or None for plain text."""

    def __init__(self, name: str, host_id: int, port: int, pki: Path | None = None) -> None:
        self.name = name
        self.id = host_id
        self._address = ("127.0.0.1", port)
        self._tls: ssl.SSLContext | None = client_tls(pki) if pki is not None else None
        self.events: list[tuple[str, Any]] = []
        self.vds = Connection(self._address, self._tls, VDS, self._on_event)
        self.irs = Connection(self._address, self._tls, IRS)

    def _on_event(self, method: str, params: Any) -> None:
        self.events.append((method, params))

    def close(self) -> None:
        self.vds.close()
        self.irs.close()

    # -- becoming Up -------------------------------------------------------------------------

    def capabilities(self) -> replies.Capabilities:
        return replies.capabilities(self.vds.call("Host.getCapabilities", {}))

    def hardware(self) -> dict[str, Any]:
        reply = self.vds.call("Host.getHardwareInfo", {})
        return {key: value for key, value in reply.items() if type(value) is str}

    def health(self) -> dict[str, replies.DomainHealth]:
        return replies.host_stats(self.vds.call("Host.getStats", {}))

    # -- storage servers ---------------------------------------------------------------------

    def connect_servers(self, pool: str, servers: list[StorageServer]) -> dict[str, int]:
        return self._servers("connectStorageServer", pool, servers)

    def disconnect_servers(self, pool: str, servers: list[StorageServer]) -> dict[str, int]:
        return self._servers("disconnectStorageServer", pool, servers)

    def _servers(self, verb: str, pool: str, servers: list[StorageServer]) -> dict[str, int]:
        if servers[0].type == FCP:
            servers = servers[:1]  # one network for all of them
        params = {
            "domainType": servers[0].type,
            "storagepoolID": pool,
            "connectionParams": [server.as_map() for server in servers],
        }
        statuses = replies.connection_statuses(self.vds.call(f"StoragePool.{verb}", params))
        assert set(statuses) == {server.id for server in servers}
        return statuses

    # -- domains -----------------------------------------------------------------------------

    def create_domain(self, domain: str, name: str, server: StorageServer, version: str) -> None:
        params = {
            "storagedomainID": domain,
            "domainType": server.type,
            "typeArgs": self.create_group(domain, server) if server.is_block else server.spec,
            "name": name,
            "domainClass": DATA_CLASS,
            "version": version,
            "maxHosts": 250,
            "blockSize": 0 if version == "5" and not server.is_block else 512,
        }
        self.vds.call("StorageDomain.create", params)

    def create_group(self, domain: str, server: StorageServer) -> str:
        """3.4: the LUNs are looked at, then made a volume group; its id."""
        params = {"storageType": server.type, "guids": server.guids, "checkStatus": True}
        found = replies.devices(self.vds.call("Host.getDeviceList", params))
        assert {guid: found[guid].status for guid in server.guids} == dict.fromkeys(
            server.guids, "free"
        )
        params = {"name": domain, "devlist": server.guids, "force": False}
        group = self.vds.call("LVMVolumeGroup.create", params)
        assert type(group) is str
        return group

    def group_info(self, group: str) -> replies.GroupInfo:
        """The engine's look at a domain's LUNs: when it is made, and whenever it is activated."""
        return replies.group_info(
            self.vds.call("LVMVolumeGroup.getInfo", {"lvmvolumegroupID": group})
        )

    def domain_info(self, domain: str) -> replies.DomainInfo:
        params = {"storagedomainID": domain}
        return replies.domain_info(self.vds.call("StorageDomain.getInfo", params))

    def domain_stats(self, domain: str) -> tuple[int, int]:
        params = {"storagedomainID": domain}
        return replies.domain_stats(self.vds.call("StorageDomain.getStats", params))

    def images(self, domain: str) -> list[str]:
        reply = self.vds.call("StorageDomain.getImages", {"storagedomainID": domain})
        return list(reply)

    # -- the pool ----------------------------------------------------------------------------

    def spm_status(self, pool: str) -> replies.SpmStatus | None:
        """None for a pool that this host does not know (not an error: it is then connected)."""
        try:
            reply = self.vds.call("StoragePool.getSpmStatus", {"storagepoolID": pool})
        except VdsError as error:
            if error.code == UNKNOWN_POOL:
                return None
            raise
        return replies.spm_status(reply)

    def pool_info(self, pool: str) -> replies.PoolInfo:
        return replies.pool_info(self.irs.call("StoragePool.getInfo", {"storagepoolID": pool}))

    def disconnect_pool(self, pool: str) -> None:
        params = {"storagepoolID": pool, "hostID": self.id, "scsiKey": pool}
        self.vds.call("StoragePool.disconnect", params)

    # -- tasks and jobs ----------------------------------------------------------------------

    def tasks(self) -> dict[str, replies.TaskStatus]:
        return replies.all_tasks(self.irs.call("Host.getAllTasksStatuses", {}))

    def task_verbs(self) -> dict[str, str]:
        return replies.task_verbs(self.irs.call("Host.getAllTasksInfo", {}))

    def task(self, task: str) -> replies.TaskStatus:
        return replies.task_status(self.vds.call("Task.getStatus", {"taskID": task}))

    def clear_task(self, task: str) -> None:
        self.irs.call("Task.clear", {"taskID": task})

    def jobs(self, job_ids: list[str], job_type: str = "storage") -> dict[str, replies.Job]:
        params = {"job_type": job_type, **optional(job_ids=job_ids)}
        return replies.jobs(self.vds.call("Host.getJobs", params))

    # -- volumes, on any host ----------------------------------------------------------------

    def volume_info(self, pool: str, domain: str, image: str, volume: str) -> replies.VolumeInfo:
        params = pdiv(pool, domain, image, volume)
        return replies.volume_info(self.vds.call("Volume.getInfo", params))

    def prepare(self, pool: str, domain: str, image: str, volume: str) -> str:
        """The path that a guest would get."""
        params = {**pdiv(pool, domain, image, volume), "allowIllegal": False}
        path = self.vds.call("Image.prepare", params)["path"]
        assert type(path) is str
        return path

    def teardown(self, pool: str, domain: str, image: str, volume: str) -> None:
        params = pdiv(pool, domain, image, volume)
        params["leafVolID"] = params.pop("volumeID")  # the engine's name for it
        self.vds.call("Image.teardown", params)

    # -- virtual machines ----------------------------------------------------------------------

    def vms(self) -> dict[str, replies.VmStats]:
        """The poll of every 15 seconds."""
        return replies.vm_stats(self.vds.call("Host.getAllVmStats", {}))

    def chains(self, vm: str) -> dict[str, list[str]]:
        """The volumes of each image that a VM uses, base first; read when its hash has changed."""
        return replies.chains(self.vds.call("Host.dumpxmls", {"vmList": [vm]})[vm])

    # -- streams -----------------------------------------------------------------------------

    def put_stream(self, where: dict[str, str], data: bytes) -> str:
        """The engine's OVF upload; returns the task to poll and clear."""
        status, headers, body = self._http("PUT", stream_headers(where), data)
        assert status == 200, body
        return headers["Task-Id"]

    def get_stream(self, where: dict[str, str], length: int) -> tuple[str, bytes]:
        headers = {**stream_headers(where), "Range": f"bytes=0-{length - 1}"}
        status, received, body = self._http("GET", headers, None)
        assert status == 206, body
        assert "Content-Range" in received
        return received["Task-Id"], body

    def _http(
        self, method: str, headers: dict[str, str], body: bytes | None
    ) -> tuple[int, http.client.HTTPMessage, bytes]:
        connection: http.client.HTTPConnection
        if self._tls is not None:
            connection = http.client.HTTPSConnection(
                *self._address, timeout=300, context=self._tls
            )
        else:
            connection = http.client.HTTPConnection(*self._address, timeout=300)
        try:
            connection.request(method, "/", body=body, headers=headers)
            response = connection.getresponse()
            return response.status, response.headers, response.read()
        finally:
            connection.close()


def pdiv(pool: str, domain: str, image: str, volume: str) -> dict[str, Any]:
    return {
        "storagepoolID": pool,
        "storagedomainID": domain,
        "imageID": image,
        "volumeID": volume,
    }


def stream_headers(where: dict[str, str]) -> dict[str, str]:
    names = (
        ("storagepoolID", "Storage-Pool-Id"),
        ("storagedomainID", "Storage-Domain-Id"),
        ("imageID", "Image-Id"),
        ("volumeID", "Volume-Id"),
    )
    return {header: where[key] for key, header in names}


__all__ = ["NO_UUID", "Host", "StorageServer", "optional", "pdiv"]
