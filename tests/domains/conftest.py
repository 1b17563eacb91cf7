# SPDX-License-Identifier: GPL-2.0-or-later
"""A whole storage stack below one directory: real directories, mounts, and sanlock where asked."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from vdsm_storage import config as configuration
from vdsm_storage.base.clock import SystemClock
from vdsm_storage.base.lanes import Lanes
from vdsm_storage.base.locks import Locks
from vdsm_storage.base.uuids import new_uuid
from vdsm_storage.domains.block_growth import BlockTools
from vdsm_storage.domains.leasing import DomainLeasing
from vdsm_storage.domains.masters import NewPool
from vdsm_storage.domains.new_domain import CreateRequest
from vdsm_storage.domains.pool import ACTIVE, Pool
from vdsm_storage.domains.services import Base, DomainServices
from vdsm_storage.domains.storage_network import storage_network
from vdsm_storage.host.kernel_files import KernelFiles
from vdsm_storage.host.sanlock import Sanlock
from vdsm_storage.jobs import journal
from vdsm_storage.jobs.journal import Journal
from vdsm_storage.jobs.operation import CrashPoints
from vdsm_storage.jobs.runner import Runner
from vdsm_storage.leases.lease import Leases
from vdsm_storage.leases.lockspace import Lockspaces
from vdsm_storage.lvm.activation import Activation, DeviceMapper
from vdsm_storage.lvm.command import Lvm
from vdsm_storage.lvm.groups import Groups
from vdsm_storage.monitor.health import Health

GOLDEN = Path(__file__).parent.parent / "data" / "golden"


def wait_for(condition: Callable[[], Any], timeout: float = 60.0) -> Any:
    end = time.monotonic() + timeout
    while not (found := condition()):
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.02)
    return found


@dataclass
class World:
    """One agent's storage half.  `crash` arms a crash point in this very process."""

    root: Path
    base: Base
    services: DomainServices
    health: Health
    runner: Runner
    lanes: Lanes
    lockspaces: Lockspaces
    leases: Leases
    events: list[tuple[str, dict[str, Any]]]

    def connect(self, path: str, kind: str = "LOCALFS", **more: str) -> str:
        answer = self.services.connections.connect(kind, [{"id": "", "connection": path, **more}])
        assert answer[0]["status"] == 0
        mount = self.services.connections.find(path, kind)
        assert mount is not None
        return mount

    def bind(self, path: str) -> str:
        return self.connect(path, "POSIXFS", vfs_type="none", mnt_options="bind")

    def domain(self, path: str, kind: str = "LOCALFS", **more: Any) -> str:
        """Make a domain on a connected path; returns its UUID."""
        sd_id = str(more.pop("id", new_uuid()))
        request = CreateRequest(sd_id, kind, path, **{"name": "dom", **more})
        self.services.lifecycle.create(request)
        return sd_id

    def pool(self, *domains: str, host_id: int = 1, connect: bool = True) -> str:
        """Make a pool of domains, the first is the master; connect it."""
        pool_id = new_uuid()
        new = NewPool(pool_id, "Default", domains[0], 1, list(domains))
        self.services.masters.create(new)
        if connect:
            self.attach(pool_id, *domains, host_id=host_id)
        return pool_id

    def attach(self, pool_id: str, *domains: str, host_id: int = 1, version: int = 1) -> None:
        pool = Pool(pool_id, host_id, domains[0], version, dict.fromkeys(domains, ACTIVE))
        self.services.pools.connect(pool, with_map=True)

    def task(self, task_id: str, timeout: float = 60.0) -> Any:
        """Wait for a task; its entry."""
        running = self.runner.get(task_id, journal.TASK)
        assert running is not None
        assert running.done.wait(timeout)
        return running.entry

    def close(self) -> None:
        self.services.close(lambda: self.health.close(30.0))
        self.lockspaces.release_all()
        self.lanes.close()


def build(
    root: Path,
    sanlock: Sanlock | None,
    interval: float = 0.2,
    devices: str = "",
    activation: Activation | None = None,
) -> World:
    """`devices` are those of block domains; `activation` takes the place of device-mapper."""
    config = configuration.dev(configuration.Config(), str(root))
    config.lvm.devices = devices
    config.storage.lock_timeout = 15.0
    config.sanlock.host_id_timeout = 60.0
    clock = SystemClock()
    lanes, locks = Lanes(clock), Locks(clock)
    runner = Runner(
        Journal(os.path.join(config.paths.state, "journal")),
        lanes,
        clock,
        CrashPoints(os.environ.get("VDSM_STORAGE_CRASH")),
        lambda entry, fraction: None,
    )
    if sanlock is None:
        with mock.patch.dict(os.environ):  # or the next process that a test starts looks there
            sanlock = Sanlock(str(root / "none"), 1)
    leases, lockspaces = Leases(sanlock, clock), Lockspaces(sanlock, clock)
    leasing = DomainLeasing(lockspaces, leases, clock)
    lvm = Lvm(config.paths.lvm, config.lvm.timeout, config.lvm.commands)
    network = storage_network(config.lvm, clock, KernelFiles())
    candidates = network.candidates.candidates
    groups = Groups(lvm, candidates, lanes.submit, config.lvm.scan_timeout)
    block = BlockTools(groups, activation or DeviceMapper(lvm), network)
    base = Base(config, clock, lanes, locks, runner, leasing, block)
    services = DomainServices(base)
    events: list[tuple[str, dict[str, Any]]] = []

    def recover() -> None:
        runner.recover_domains(services.usable)

    def on_usable(sd_id: str) -> None:
        services.domain_available(sd_id)
        recover()

    health = Health(
        services.registry, lanes, clock, interval, lambda *it: events.append(it), on_usable
    )
    services.watch(health, recover)
    runner.add_kinds(services.kinds())
    runner.load()
    return World(root, base, services, health, runner, lanes, lockspaces, leases, events)


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    """Local domains: no sanlock."""
    made = build(tmp_path / "agent", None)
    yield made
    made.close()


@pytest.fixture
def shared_world(tmp_path: Path, sanlock: Sanlock) -> Iterator[World]:
    """POSIX domains with real sanlock leases."""
    made = build(tmp_path / "agent", sanlock)
    yield made
    made.close()


@pytest.fixture
def data(tmp_path: Path) -> str:
    """An empty directory to connect."""
    (tmp_path / "data").mkdir()
    return str(tmp_path / "data")


@pytest.fixture(params=["ext4", "xfs"])
def image(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, str]:
    """A file with a file system in it: (path, type)."""
    path = tmp_path / f"{request.param}.img"
    with path.open("wb") as file:
        file.truncate(512 * 1024 * 1024)
    subprocess.run([f"mkfs.{request.param}", "-q", str(path)], check=True, timeout=60)
    return str(path), request.param
