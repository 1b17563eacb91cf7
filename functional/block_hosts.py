# SPDX-License-Identifier: GPL-2.0-or-later
"""Hosts that share LUNs, with one block domain and one pool, on a machine without device-mapper.

Each host is an agent with a sanlock daemon, a host id, a stand-in for device-mapper, and a
directory for LVM of its own: only the leases on the LUNs keep the hosts apart.
"""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from functional.processes import AgentProcess
from functional.standin.process import StandInProcess
from vdsm_storage.rpc.client import Client

MIB = 1024**2
EXTENT = 128 * MIB
ISCSI = 3
COW, RAW = 4, 5
PREALLOCATED, SPARSE = 1, 2
BLANK = str(uuid.UUID(int=0))
UNREADY = "RHAT_storage_domain_UNREADY"
PATIENCE = 180.0  # seconds


def new_id() -> str:
    return str(uuid.uuid4())


class BareLvm:
    """The installed lvm with a configuration of its own, as an administrator would use it."""

    def __init__(self, directory: Path, devices: Sequence[str]) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "lvm.conf").write_text(
            'devices { dir="/dev" scan=["/dev"] use_devicesfile=0 hints="none" scan_lvs=0\n'
            'obtain_device_list_from_udev=0 external_device_info_source="none"\n'
            "md_component_detection=0 ignore_suspended_devices=1 }\n"
            "global { use_aio=0 event_activation=0 use_lvmpolld=0 use_lvmlockd=0 notify_dbus=0\n"
            f'locking_dir="{directory}" }}\n'
            "backup { backup=0 archive=0 }\nactivation { monitoring=0 }\n"
        )
        self.devices = list(devices)
        self._environment = {
            **os.environ, "LVM_SYSTEM_DIR": str(directory), "LVM_SUPPRESS_FD_WARNINGS": "1"
        }  # fmt: skip

    def run(self, command: str, *words: str) -> str:
        where = ("--devices", ",".join(self.devices), "--driverloaded", "n")
        return subprocess.run(
            ["lvm", command, *where, *words], env=self._environment, check=True,
            capture_output=True, text=True, timeout=120,
        ).stdout  # fmt: skip

    def make_group(self, name: str) -> str:
        """A group for a domain, as LVMVolumeGroup.create makes it; its UUID."""
        areas = ("--metadatasize", "128m", "--metadatacopies", "2", "--metadataignore", "y")
        self.run("pvcreate", "--yes", "--zero", "y", *areas, *self.devices)
        self.run("pvchange", "--metadataignore", "n", self.devices[0])
        how = ("--physicalextentsize", "128m", "--setautoactivation", "n", "--addtag", UNREADY)
        self.run("vgcreate", *how, name, *self.devices)
        return self.run("vgs", "--noheadings", "-o", "vg_uuid", name).strip()


@dataclass
class Host:
    """One host; `id` is its number in the pool."""

    id: int
    agent: AgentProcess
    standin: StandInProcess
    client: Client = field(init=False)
    up: threading.Event = field(default_factory=threading.Event)  # it may be asked

    def connect(self) -> None:
        self.client = Client.dev(str(self.agent.dir), timeout=PATIENCE)

    def call(self, verb: str, **params: Any) -> Any:
        return self.client.call(verb, params)

    def task(self, verb: str, **params: Any) -> int:
        """Start a task and wait for its end: 0 or its error's number.  Raises RemoteError."""
        client = self.client  # it must not become that of another life meanwhile
        task = client.call(verb, params)
        while (status := client.call("Task.getStatus", {"taskID": task}))[
            "taskState"
        ] != "finished":
            time.sleep(0.01)
        client.call("Task.clear", {"taskID": task})
        return int(status["code"])

    def signal(self, number: signal.Signals, sanlock: bool = False) -> None:
        """To the agent, or its sanlock daemon."""
        if sanlock:
            pid = int((self.agent.dir / "sanlock" / "sanlock.pid").read_text())
        else:
            assert self.agent.process is not None
            pid = self.agent.process.pid
        os.kill(pid, number)

    def is_stopped(self) -> bool:
        """By SIGSTOP."""
        assert self.agent.process is not None
        stat = Path(f"/proc/{self.agent.process.pid}/stat").read_text()
        return stat.rpartition(")")[2].split()[0] == "T"


class Cluster:
    """`luns` carry the volume group `domain`; the first host makes domain and pool."""

    def __init__(self, hosts: Sequence[Host], luns: Sequence[str], directory: Path) -> None:
        self.hosts = hosts
        self.luns = luns
        self.domain, self.pool = new_id(), new_id()
        self.lvm = BareLvm(directory / "bare-lvm", luns)
        group = self.lvm.make_group(self.domain)
        first = hosts[0]
        for host in hosts:
            host.connect()
        first.call(
            "StorageDomain.create", storagedomainID=self.domain, domainType=ISCSI, version="5",
            typeArgs=group, name="stress", domainClass=1, blockSize=512, maxHosts=250,
        )  # fmt: skip
        first.call(
            "StoragePool.create", storagepoolID=self.pool, name="stress",
            masterSdUUID=self.domain, masterVersion=1, domainList=[self.domain],
            lockRenewalIntervalSec=5, leaseTimeSec=60, ioOpTimeoutSec=10, leaseRetries=3,
        )  # fmt: skip
        for host in hosts:
            self.connect_pool(host)
        for host in hosts:
            self.settle(host)
            host.up.set()

    def connect_pool(self, host: Host) -> None:
        host.call(
            "StoragePool.connect", storagepoolID=self.pool, hostID=host.id, scsiKey=self.pool,
            masterSdUUID=self.domain, masterVersion=1, domainDict={self.domain: "active"},
        )  # fmt: skip

    def settle(self, host: Host) -> None:
        """Until the host can use the domain, and has recovered what it did before."""
        wait_for(lambda: self._usable(host), f"host {host.id} to use the domain")
        wait_for(lambda: self._idle(host), f"host {host.id} to recover")

    def revive(self, host: Host, crash_point: str = "") -> None:
        """A new agent for a host whose agent is dead; it may be armed."""
        host.up.clear()
        host.client.close()
        if host.agent.alive():
            host.agent.kill()
        host.agent.start(crash_point)
        host.connect()
        self.settle(host)
        host.up.set()

    def _usable(self, host: Host) -> bool:
        state = host.call("Host.getStats")["storageDomains"].get(self.domain)
        return bool(state and state["valid"] and state["acquired"])

    @staticmethod
    def _idle(host: Host) -> bool:
        tasks = host.call("Host.getAllTasksStatuses").values()
        journal = host.agent.dir / "state" / "journal"
        waiting = [path for path in journal.glob("*.json") if '"finished"' not in path.read_text()]
        return not waiting and all(task["taskState"] == "finished" for task in tasks)

    def ids(self, image: str, volume: str) -> dict[str, str]:
        return {
            "storagepoolID": self.pool, "storagedomainID": self.domain,
            "imageID": image, "volumeID": volume,
        }  # fmt: skip


def wait_for(holds: Callable[[], Any], what: str, seconds: float = PATIENCE) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, f"waited {seconds:.0f} s for {what}"
        time.sleep(0.1)
