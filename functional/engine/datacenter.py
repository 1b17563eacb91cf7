# SPDX-License-Identifier: GPL-2.0-or-later
"""A data centre: the engine's own picture of a pool, and the order in which it does things."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

from functional.engine.host import (
    COW,
    PREALLOCATED,
    RAW,
    SPARSE,
    Host,
    StorageServer,
    optional,
    pdiv,
)
from functional.engine.replies import NO_UUID, SpmStatus
from functional.engine.wire import VdsError

PATIENCE = 60.0  # seconds for a task, job or state in these tests; the engine has none
OVF_SIZE = 128 * 1024 * 1024
NOT_SPM = 654
TASK_UNKNOWN = 401


class FlowError(Exception):
    """What the engine would report to its user."""


class TaskFailedError(FlowError):
    def __init__(self, verb: str, code: int, message: str) -> None:
        super().__init__(f"{verb}: task failed: {code} {message}")
        self.code = code


@dataclass
class Domain:
    """`active` goes into the map that every connect carries."""

    id: str
    server: StorageServer
    version: str = "5"
    active: bool = True


@dataclass(frozen=True)
class Disk:
    """One image; `volumes` from the base to the leaf."""

    domain: str
    image: str
    volumes: tuple[str, ...]

    @property
    def leaf(self) -> str:
        return self.volumes[-1]


@dataclass
class DataCenter:
    """`poll` is the engine's interval: 10 s there, short here."""

    name: str = "dc"
    id: str = field(default_factory=lambda: str(uuid.uuid4()))
    poll: float = 0.05
    hosts: list[Host] = field(default_factory=list)
    domains: dict[str, Domain] = field(default_factory=dict)
    master: str = NO_UUID
    master_version: int = 1
    spm: Host | None = None

    # -- 3.1: a host becomes part of the pool ------------------------------------------------

    def activate_host(self, host: Host) -> None:
        """capabilities ... getStats, servers, pool, health of every active domain, election."""
        capabilities = host.capabilities()
        needed = {int(domain.version) for domain in self.domains.values()}
        if "4.7" not in capabilities.levels or not needed <= set(capabilities.domain_versions):
            raise FlowError(f"{host.name}: does not suit the cluster")
        host.hardware()
        host.health()
        self.connect_servers(host)
        self.connect_pool(host)
        missing = self.active() - set(host.health())
        if missing:
            raise FlowError(f"{host.name}: {missing} not reported: NonOperational")
        if host not in self.hosts:
            self.hosts.append(host)
        if self.spm is None:
            self.elect()

    def connect_servers(self, host: Host) -> None:
        """One call for all domains of a type, the master's server first."""
        servers: dict[int, list[StorageServer]] = {}
        ordered = sorted(self.domains.values(), key=lambda domain: domain.id != self.master)
        for domain in ordered:
            servers.setdefault(domain.server.type, []).append(domain.server)
        for group in servers.values():
            bad = {k: s for k, s in host.connect_servers(self.id, group).items() if s}
            if bad:
                raise FlowError(f"{host.name}: storage servers {bad}")

    def connect_pool(self, host: Host) -> None:
        domains = {d.id: "active" if d.active else "attached" for d in self.domains.values()}
        params = {
            "storagepoolID": self.id,
            "hostID": host.id,
            "scsiKey": self.id,
            "masterSdUUID": self.master,
            "masterVersion": self.master_version,
            **optional(domainDict=domains),
        }
        host.vds.call("StoragePool.connect", params)

    def active(self) -> set[str]:
        return {domain.id for domain in self.domains.values() if domain.active}

    def wait_healthy(self, host: Host) -> None:
        """Until every active domain has been measured and is valid."""

        def healthy() -> bool:
            health = host.health()
            return all(health[d].actual and health[d].valid for d in self.active())

        self.wait(healthy, f"{host.name}: domains valid")

    # -- 3.2: the first domain of a pool -----------------------------------------------------

    @classmethod
    def begin(cls, hosts: Sequence[Host], server: StorageServer, name: str = "Default") -> Self:
        """A data centre of hosts that are up, with one domain, and its manager."""
        made = cls(name=name)
        made.create_first(hosts[0], Domain(str(uuid.uuid4()), server))
        for host in hosts:
            made.activate_host(host)
        made.activate_master()
        return made

    def create_first(self, host: Host, domain: Domain) -> None:
        """The domain, and the pool with it as master."""
        self.create_domain(host, domain, pool=NO_UUID)
        statuses = host.connect_servers(self.id, [domain.server])
        assert set(statuses.values()) == {0}
        self.clean(host, domain)
        params = {
            "storagepoolID": self.id,
            "name": self.name,
            "masterSdUUID": domain.id,
            "masterVersion": self.master_version,
            "domainList": [domain.id],
            "lockRenewalIntervalSec": 5,
            "leaseTimeSec": 60,
            "ioOpTimeoutSec": 10,
            "leaseRetries": 3,
        }
        host.vds.call("StoragePool.create", params)
        self.domains[domain.id] = domain
        self.master = domain.id

    def create_domain(self, host: Host, domain: Domain, pool: str) -> None:
        statuses = host.connect_servers(pool, [domain.server])
        assert set(statuses.values()) == {0}, statuses
        host.create_domain(domain.id, f"domain-{domain.id[:8]}", domain.server, domain.version)
        free, total = host.domain_stats(domain.id)
        assert 0 < free <= total
        info = host.domain_info(domain.id)
        assert info.remote_path == domain.server.spec
        if domain.server.is_block:  # its LUNs go into the engine's database
            group = host.group_info(info.group)
            assert (group.name, list(group.devices)) == (domain.id, domain.server.guids)
        assert info.domain_class == "Data"
        assert info.version == domain.version
        assert info.pools == []

    def clean(self, host: Host, domain: Domain) -> None:
        """A domain that says it belongs to a pool is detached by force, on any host."""
        if host.domain_info(domain.id).pools:
            params = {"storagedomainID": domain.id, "storagepoolID": self.id, "force": True}
            host.vds.call("StorageDomain.detach", params)

    def activate_master(self) -> None:
        """After the election: activation on the SPM, refresh on every host."""
        self.irs("StorageDomain.activate", storagedomainID=self.master)
        for host in self.hosts:
            self.connect_pool(host)

    def create_ovf_stores(self) -> list[Disk]:
        """Two raw volumes that keep the engine's descriptions of VMs."""
        disks = []
        for number in range(2):
            text = json.dumps({"DiskAlias": "OVF_STORE", "DiskDescription": f"OVF_STORE {number}"})
            disk = self.create_disk(
                self.master, OVF_SIZE, fmt=RAW, disk_type="OVFS", desc=text
            )
            where = pdiv(self.id, disk.domain, disk.image, disk.leaf)
            description = json.dumps({"Updated": True, "Domains": [{"StorageDomain": self.master}]})
            self.irs_raw("Volume.setDescription", {**where, "description": description})
            disks.append(disk)
        return disks

    # -- 3.5: the storage pool manager -------------------------------------------------------

    def elect(self) -> Host:
        """Each host in turn: connect, ask, fence a previous manager, start."""
        for host in self.hosts:
            if self._try_start(host):
                self.spm = host
                self._adopt_tasks(host)
                return host
        raise FlowError("no host could become the storage pool manager")

    def _try_start(self, host: Host) -> bool:
        status = host.spm_status(self.id)
        if status is None:
            self.connect_pool(host)
            status = host.spm_status(self.id)
        if status is None:
            return False
        if status.status == "SPM":
            return True
        if status.status == "Free" and status.id != -1 and not self._previous_done(status, host):
            return False
        try:
            return self.start_spm(host, status)
        except (VdsError, TaskFailedError):
            return False

    def _previous_done(self, status: SpmStatus, candidate: Host) -> bool:
        """False if the last manager must be fenced first."""
        for host in self.hosts:
            if host.id == status.id and host is not candidate:
                other = host.spm_status(self.id)
                return other is None or other.status == "Free"
        return True

    def start_spm(self, host: Host, status: SpmStatus) -> bool:
        params = {
            "storagepoolID": self.id,
            "prevID": status.id,
            "prevLver": status.version,
            "enableScsiFencing": "false",
            "maxHostID": 250,
            "domVersion": "5",
        }
        task = host.vds.call("StoragePool.spmStart", params)
        assert type(task) is str
        done = self.wait_task(host, task)
        after = host.spm_status(self.id)
        host.clear_task(task)
        if not done.succeeded:
            raise TaskFailedError("StoragePool.spmStart", done.code, done.message)
        return after is not None and after.status == "SPM"

    def _adopt_tasks(self, host: Host) -> None:
        """Tasks that nobody waits for any more are cleared."""
        host.task_verbs()
        for task, status in host.tasks().items():
            if status.finished:
                host.clear_task(task)

    def stop_spm(self) -> None:
        """Refused while tasks are not cleared."""
        assert self.spm is not None
        for task, status in self.spm.tasks().items():
            if status.finished:
                self.spm.clear_task(task)
        self.spm.irs.call("StoragePool.spmStop", {"storagepoolID": self.id})
        self.spm = None

    # -- SPM verbs ---------------------------------------------------------------------------

    def irs(self, verb: str, **params: Any) -> Any:
        """A verb on the SPM, with fail-over to another host when it is no longer that."""
        return self.irs_raw(verb, {"storagepoolID": self.id, **params})

    def irs_raw(self, verb: str, params: dict[str, Any]) -> Any:
        for attempt in range(3):
            if self.spm is None:
                self.elect()
            assert self.spm is not None
            try:
                return self.spm.irs.call(verb, params)
            except VdsError as error:
                if error.code != NOT_SPM or attempt == 2:
                    raise
                self._fail_over()
        raise FlowError(f"{verb}: no storage pool manager")

    def _fail_over(self) -> None:
        """The manager says that it is none: ask it, stop it if it half is, elect another."""
        old = self.spm
        assert old is not None
        status = old.spm_status(self.id)
        if status is not None and status.status in ("SPM", "Contend"):
            old.vds.call("StoragePool.spmStop", {"storagepoolID": self.id})
        self.hosts = [host for host in self.hosts if host is not old] + [old]
        self.spm = None

    def task(self, verb: str, **params: Any) -> None:
        """An SPM task: start, poll all tasks, clear.  Raises TaskFailedError."""
        task = self.irs(verb, **params)
        assert self.spm is not None
        self.finish_task(self.spm, verb, task)

    def finish_task(self, host: Host, verb: str, task: str) -> None:
        status = host.tasks().get(task)

        def finished() -> bool:
            nonlocal status
            status = host.tasks().get(task)
            return status is None or status.finished

        self.wait(finished, f"{verb}: task {task}")
        if status is None:
            raise FlowError(f"{verb}: task {task} vanished before it was cleared")
        host.clear_task(task)
        assert task not in host.tasks()
        if not status.succeeded:
            raise TaskFailedError(verb, status.code, status.message)

    def wait_task(self, host: Host, task: str) -> Any:
        """Task.getStatus until the end, as after spmStart."""
        status = host.task(task)

        def finished() -> bool:
            nonlocal status
            status = host.task(task)
            return status.finished or status.state == "unknown"

        self.wait(finished, f"task {task}")
        return status

    # -- 3.6: disks --------------------------------------------------------------------------

    def thin(self, domain: str, fmt: int) -> int:
        """A volume's type that takes least: raw ones are never sparse on block domains."""
        block = fmt == RAW and self.domains[domain].server.is_block
        return PREALLOCATED if block else SPARSE

    def create_disk(
        self,
        domain: str,
        size: int,
        fmt: int = RAW,
        prealloc: int | None = None,
        disk_type: str = "DATA",
        desc: str = "",
        initial: int | None = None,
    ) -> Disk:
        disk = Disk(domain, str(uuid.uuid4()), (str(uuid.uuid4()),))
        self.create_volume(
            disk, fmt=fmt, prealloc=prealloc, size=size, disk_type=disk_type, desc=desc,
            initial=initial,
        )  # fmt: skip
        return disk

    def create_volume(
        self,
        disk: Disk,
        size: int,
        fmt: int = COW,
        prealloc: int | None = None,
        disk_type: str = "DATA",
        desc: str = "",
        initial: int | None = None,
        parent: tuple[str, str] = (NO_UUID, NO_UUID),
        sequence: int = 1,
    ) -> None:
        """Makes the last of `disk.volumes`; `parent` is (image, volume)."""
        self.task(
            "Volume.create",
            **{
                **self.new_leaf(disk, size, parent, sequence),
                "volFormat": fmt,
                "preallocate": prealloc or self.thin(disk.domain, fmt),
                "diskType": disk_type,
                "desc": desc or json.dumps({"DiskAlias": "d", "DiskDescription": ""}),
                **optional(initialSize=str(initial) if initial else None),
            },
        )

    def new_leaf(
        self, disk: Disk, size: int, parent: tuple[str, str], sequence: int
    ) -> dict[str, Any]:
        """Parameters of Volume.create for a thin qcow2 volume, the last of `disk.volumes`."""
        return {
            "storagedomainID": disk.domain,
            "imageID": disk.image,
            "volumeID": disk.leaf,
            "size": str(size),
            "volFormat": COW,
            "preallocate": SPARSE,
            "diskType": "DATA",
            "desc": json.dumps({"DiskAlias": "d", "DiskDescription": ""}),
            "srcImgUUID": parent[0],
            "srcVolUUID": parent[1],
            "addBitmaps": False,
            "legal": True,
            "sequence": sequence,
        }

    def snapshot(self, disk: Disk, size: int) -> Disk:
        """A new leaf upon the old one (the VM is down)."""
        grown = Disk(disk.domain, disk.image, (*disk.volumes, str(uuid.uuid4())))
        self.create_volume(
            grown, size, parent=(disk.image, disk.leaf), sequence=len(grown.volumes)
        )
        return grown

    def extend(self, disk: Disk, size: int) -> None:
        where = pdiv(self.id, disk.domain, disk.image, disk.leaf)
        self.task("Volume.extendSize", **{**where, "newSize": str(size)})

    def delete(self, disk: Disk) -> None:
        """268, and 256 with the image gone, mean that somebody was there before."""
        params = {
            "storagedomainID": disk.domain,
            "imageID": disk.image,
            "postZero": "false",
            "force": "false",
            "discard": False,
        }
        try:
            self.task("Image.delete", **params)
        except VdsError as error:
            if error.code != 268:
                raise

    def info(self, disk: Disk, host: Host | None = None) -> Any:
        host = host or self.hosts[-1]
        return host.volume_info(self.id, disk.domain, disk.image, disk.leaf)

    # -- 3.10: jobs on any host --------------------------------------------------------------

    def div(self, disk: Disk, volume: str, generation: int | None = None) -> dict[str, Any]:
        return {
            "endpoint_type": "div",
            "sd_id": disk.domain,
            "img_id": disk.image,
            "vol_id": volume,
            "prepared": False,
            **({} if generation is None else {"generation": generation}),
        }

    def start_job(self, host: Host, verb: str, params: dict[str, Any]) -> str:
        job = str(uuid.uuid4())
        assert host.vds.call(verb, {"job_id": job, **params}) is True
        return job

    def wait_job(self, host: Host, job: str, job_type: str = "storage") -> Any:
        state: Any = None

        def ended() -> bool:
            nonlocal state
            state = host.jobs([job], job_type).get(job)
            return state is None or state.status in ("done", "failed", "aborted")

        self.wait(ended, f"job {job}")
        return state

    def copy_volume(self, host: Host, source: Disk, target: Disk, number: int) -> Any:
        """The data of the volume with that place in the chain, guarded by its generation."""
        volume = target.volumes[number]
        generation = host.volume_info(self.id, target.domain, target.image, volume).generation
        params = {
            "source": self.div(source, source.volumes[number]),
            "destination": self.div(target, volume, generation),
            "copy_bitmaps": False,
            "legal": True,
        }
        return self.wait_job(host, self.start_job(host, "SDM.copy_data", params))

    # -- 3.13: maintenance -------------------------------------------------------------------

    def host_to_maintenance(self, host: Host) -> None:
        if host is self.spm:
            self.stop_spm()
        host.disconnect_pool(self.id)
        for domain in self.domains.values():
            host.disconnect_servers(self.id, [domain.server])
        self.hosts.remove(host)
        assert not self.active() & set(host.health())

    def domain_to_maintenance(self, domain: Domain) -> None:
        """Over when no host reports the domain any more."""
        self.irs(
            "StorageDomain.deactivate",
            storagedomainID=domain.id,
            masterSdUUID=NO_UUID,
            masterVersion=self.master_version,
        )
        domain.active = False
        for host in self.hosts:
            self.connect_pool(host)
        for host in self.hosts:
            self.wait(lambda host=host: domain.id not in host.health(), "domain unreported")  # type: ignore[misc]
            if host is not self.spm:
                host.disconnect_servers(self.id, [domain.server])
        assert self.spm is not None
        self.spm.disconnect_servers(self.id, [domain.server])

    def wait(self, done: Callable[[], bool], what: str) -> None:
        end = time.monotonic() + PATIENCE
        while not done():
            if time.monotonic() > end:
                raise FlowError(f"{what}: not within {PATIENCE} s")
            time.sleep(self.poll)


__all__ = ["PREALLOCATED", "DataCenter", "Disk", "Domain", "FlowError", "TaskFailedError"]
