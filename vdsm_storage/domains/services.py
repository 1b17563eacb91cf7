# SPDX-License-Identifier: GPL-2.0-or-later
"""Everything about domains and pools that verbs use, put together."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from concurrent.futures import wait
from dataclasses import dataclass
from functools import partial
from typing import Any

from vdsm_storage.base import owner as owners
from vdsm_storage.base.clock import Clock
from vdsm_storage.base.lanes import Lanes
from vdsm_storage.base.locks import Locks
from vdsm_storage.base.owner import Owner
from vdsm_storage.config import Config
from vdsm_storage.domains import dump
from vdsm_storage.domains.block import BLOCK, BLOCK_TYPES, BlockDomain
from vdsm_storage.domains.block_family import BlockBase, BlockFamily
from vdsm_storage.domains.block_growth import BlockGrowth, BlockTools
from vdsm_storage.domains.block_lifecycle import GROUP, BlockLifecycle
from vdsm_storage.domains.block_use import Uses
from vdsm_storage.domains.connection import Connections
from vdsm_storage.domains.devices import DeviceBase, Devices
from vdsm_storage.domains.domain import Domain
from vdsm_storage.domains.family import Leasing
from vdsm_storage.domains.file_family import FileFamily
from vdsm_storage.domains.lifecycle import Lifecycle
from vdsm_storage.domains.links import Links
from vdsm_storage.domains.luns import Luns
from vdsm_storage.domains.masters import FOUND, Masters
from vdsm_storage.domains.members import Members
from vdsm_storage.domains.new_domain import CreateRequest
from vdsm_storage.domains.pool import Pools, Watcher
from vdsm_storage.domains.registry import Registry
from vdsm_storage.domains.remembered import Remembered, boot_id
from vdsm_storage.domains.rescan import Rescan
from vdsm_storage.domains.san import San, SanBase
from vdsm_storage.domains.spm import Spm
from vdsm_storage.domains.upgrade import Upgrades
from vdsm_storage.errors import AgentError, StoragePoolWrongMaster
from vdsm_storage.host.master_fs import MasterFs
from vdsm_storage.host.mount import Mounts
from vdsm_storage.jobs.operation import Kind
from vdsm_storage.jobs.runner import Runner

log = logging.getLogger("domains")

RECOVERY = 3600.0  # seconds that a recovery may wait for its turn
COLLECT = 5.0  # seconds that the removal of what dead hosts left may wait for its turn
CLOSE = 30.0  # seconds for all domains to be closed when the agent stops


@dataclass(frozen=True)
class Base:
    """What lies below: agent.py builds it."""

    config: Config
    clock: Clock
    lanes: Lanes
    locks: Locks
    runner: Runner
    leasing: Leasing
    block: BlockTools


class DomainServices:
    """Connections, registry, pools and what works on them.

    Order in agent.py: build; `runner.add_kinds(services.kinds())`; build the monitor with
    `services.registry`, its `on_usable` calling `services.domain_available(sd_id)` and then
    `runner.recover_domains(services.usable)`; `services.watch(monitor, recover)`; after
    `runner.load()`, `services.restore()` in a thread until it is True.  At the end:
    `services.close()`.
    """

    def __init__(self, base: Base) -> None:
        config = base.config
        self._runner = base.runner
        self._lanes = base.lanes
        storage, paths = config.storage, config.paths
        owner = owners.resolve(storage.user, storage.group)
        self.memory = Remembered(paths.state, boot_id())
        self.connections = _connections(base, owner, self.memory)
        lock_timeout, id_timeout = storage.lock_timeout, config.sanlock.host_id_timeout
        family = _block_family(base, owner)
        self.groups = base.block.groups
        self.devices, self.san = _storage_network(base, self.memory)
        self.registry = Registry(
            (FileFamily(self.connections, base.leasing, owner), family), base.lanes, base.clock
        )
        self.lifecycle = Lifecycle(
            self.registry, self.connections, base.leasing, owner, base.locks, base.runner
        )
        self.pools = Pools(
            self.registry,
            self.connections,
            self.memory,
            Links(paths.data_center),
            base.locks,
            base.clock,
        )
        self.spm = Spm(
            self.pools, base.runner, base.lanes, self._upgrade, lock_timeout, id_timeout
        )
        self.masters = Masters(
            self.pools, base.runner, self.spm.moved, lock_timeout, id_timeout
        )
        self.upgrades = Upgrades(
            self.pools, base.runner, base.locks, lock_timeout, id_timeout
        )
        self.members = Members(
            self.pools, lock_timeout, id_timeout, self.masters.switch, self._upgrade
        )
        self.block_lifecycle = BlockLifecycle(
            self.registry, family, base.locks, base.runner, lock_timeout, id_timeout
        )
        self.growth = BlockGrowth(
            self.pools, base.block, base.locks, base.runner, lock_timeout, id_timeout
        )
        self.registry.watch(self.pools.master_lock, self.pools.ready)

    def kinds(self) -> Sequence[Kind]:
        parts = (
            self.lifecycle,
            self.block_lifecycle,
            self.growth,
            self.masters,
            self.spm,
            self.upgrades,
        )
        return [kind for part in parts for kind in part.kinds()]

    def watch(
        self,
        watcher: Watcher,
        recover: Callable[[], Any],
        on_disconnect: Callable[[], None] = lambda: None,
    ) -> None:
        """Wiring of the monitor; `recover()` tries what was interrupted, when storage came;
        `on_disconnect()` ends what works on the pool's domains."""
        self.pools.watch(watcher, on_disconnect)

        def changed(mount: str, connected: bool) -> None:
            if connected:
                self._lanes.submit(f"recover {mount}", recover, RECOVERY)
            else:
                self.registry.forget_mount(mount)

        def devices_came() -> None:
            self._lanes.submit("recover devices", recover, RECOVERY)

        self.connections.watch(self.pools.in_use, changed)
        self.san.watch(self._devices_in_use, self._let_go, devices_came)

    def _devices_in_use(self) -> dict[str, list[str]]:
        """The devices of the block domains that are in use."""
        found: dict[str, list[str]] = {}
        for sd_id in self.pools.in_use(BLOCK):
            try:
                found[sd_id] = list(self.groups.find(sd_id).devices().values())
            except AgentError as error:
                log.warning("The devices of domain %s cannot be told: %s", sd_id, error)
        return found

    def _let_go(self, devices: Sequence[str]) -> None:
        """Close the block domains on these devices that are not in use."""
        used = self.pools.in_use(BLOCK)
        names = {found.name for found in self.groups.scan(devices).values()}
        idle = []
        for sd_id in names.difference(used):
            try:
                idle.append(self.registry.get(sd_id))
            except AgentError:  # it is another's group
                continue
        self._close(idle)
        for domain in idle:
            self.registry.forget(domain.id)

    def _upgrade(self, pool_id: str, version: int) -> None:
        """A new manager brings the pool's domains to the version that the engine expects."""
        try:
            self.upgrades.start(pool_id, version)
        except AgentError as error:
            log.warning("Pool %s is not upgraded to version %s: %s", pool_id, version, error)

    # -- making and removing domains -----------------------------------------------------------

    def create(self, request: CreateRequest) -> None:
        """StorageDomain.create."""
        if request.type in BLOCK_TYPES:
            self.block_lifecycle.create(request)
        else:
            self.lifecycle.create(request)

    def format(self, sd_id: str, auto_detach: bool) -> None:
        """StorageDomain.format.  Raises 358, 391, 392, 654."""
        domain, pool = self.registry.get(sd_id), self.pools.user_of(sd_id)
        if isinstance(domain, BlockDomain):
            self.block_lifecycle.format(domain, auto_detach, pool)
        else:
            self.lifecycle.format(sd_id, auto_detach, pool)

    def dump(self, sd_id: str, full: bool) -> dict[str, Any]:
        return dump.dump(self.registry.get(sd_id), full)

    def start_switch(self, pool_id: str, old: str, new: str, version: int) -> str:
        """StoragePool.switchMaster; returns the task's id.  Raises 309, 324, 353."""
        pool = self.pools.get(pool_id)
        if old != pool.master:
            raise StoragePoolWrongMaster(
                domain=old, pool=pool_id, version=version, reason=f"{pool.master} is"
            )
        return self._runner.start_task(self.masters.switch_request(pool, new, version))

    def destroy(self, pool_id: str) -> None:
        """StoragePool.destroy."""
        self.masters.destroy(pool_id)
        self.spm.close()

    # -- recovery ----------------------------------------------------------------------------

    def usable(self, name: str) -> bool:
        """Whether what an operation needs is there: a connection (path), a domain that is found
        (`found:UUID`), or one on which this host can take leases (UUID); a volume group
        (`vg:NAME`)."""
        if name.startswith("/"):
            return self.connections.is_connected(name)
        try:
            if name.startswith(GROUP):
                return self.groups.find(name.removeprefix(GROUP)) is not None
            domain = self.registry.get(name.removeprefix(FOUND))
        except AgentError:
            return False
        if name.startswith(FOUND):
            return True
        return domain.lockspace is None or domain.lockspace.is_held()

    def leases_lost(self, sd_id: str) -> set[str]:
        """This host lost its leases on a domain; the domains whose operations have to stop."""
        self.spm.lost(sd_id)
        return self.guarded_by(sd_id)

    def guarded_by(self, sd_id: str) -> set[str]:
        """The domains that nobody may write to without the domain's leases."""
        pool = self.pools.connected()
        if pool is None or pool.master != sd_id:
            return {sd_id}
        return {sd_id, *pool.domains}

    def domain_available(self, sd_id: str) -> None:
        self.pools.domain_available(sd_id)

    def collect(self) -> None:
        """Begin to remove what dead hosts left on the pool's domains.  Called now and then."""
        pool = self.pools.connected()
        for sd_id in pool.active if pool is not None else ():
            domain = self.registry.peek(sd_id)
            if domain is not None and self.usable(sd_id):
                work = partial(_collect, domain, partial(self._runner.idle, sd_id))
                self._lanes.submit(f"collect {sd_id}", work, COLLECT)

    def restore(self) -> bool:
        """After a crash in this boot: what was connected is connected again.

        False while a storage server is missing: to be called again.
        """
        if not self.memory.crashed:
            return True
        good = self.connections.restore()
        good = self.san.restore() and good
        self.pools.restore()
        return good

    def close(self, stop_watching: Callable[[], None]) -> None:
        """The clean stop: the role, host ids, links and connections are given back."""
        self.spm.close()
        pool = self.pools.connected()
        if pool is not None:
            self.pools.disconnect(pool.id)
        stop_watching()
        self._close_domains()
        self.connections.close()
        self.memory.release()

    def _close_domains(self) -> None:
        """Those that were looked at and are in no pool, too; each in its own lane."""
        domains = [self.registry.peek(sd_id) for sd_id in self.registry.known()]
        self._close([domain for domain in domains if domain is not None])

    def _close(self, domains: Sequence[Domain]) -> None:
        work = [self._lanes.submit(f"close {d.id}", d.close, CLOSE) for d in domains]
        wait(work, CLOSE)
        for future in work:
            if future.done() and (error := future.exception()) is not None:
                log.warning("%s", error)


def _collect(domain: Domain, idle: Callable[[], bool]) -> None:
    try:
        domain.collect(COLLECT, idle)
    except (AgentError, OSError) as error:
        log.info("Domain %s: what dead hosts left stays for now: %s", domain.id, error)


def _connections(base: Base, owner: Owner, memory: Remembered) -> Connections:
    return Connections(
        os.path.join(base.config.paths.data_center, "mnt"),
        Mounts(base.config.storage.mount_timeout),
        owner,
        base.lanes,
        base.locks,
        memory,
        base.clock,
    )


def _storage_network(base: Base, memory: Remembered) -> tuple[Devices, San]:
    network, lvm = base.block.network, base.config.lvm
    rescan = Rescan(network, base.lanes, base.clock)
    devices = Devices(
        DeviceBase(Luns(network), rescan, base.block.groups, base.lanes, lvm.scan_timeout)
    )
    return devices, San(
        SanBase(network, rescan, base.lanes, base.locks, memory, base.clock, lvm.logins)
    )


def _block_family(base: Base, owner: Owner) -> BlockFamily:
    paths = base.config.paths
    return BlockFamily(
        BlockBase(
            groups=base.block.groups,
            activation=base.block.activation,
            leasing=base.leasing,
            owner=owner,
            uses=Uses(os.path.join(paths.run, "storage")),
            master=MasterFs(paths.run, owner, base.config.lvm.timeout),
            mounts=os.path.join(paths.data_center, "mnt"),
            busy=base.runner.busy,
        )
    )
