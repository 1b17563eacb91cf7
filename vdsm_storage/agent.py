# SPDX-License-Identifier: GPL-2.0-or-later
"""The one place that builds the long-lived objects and hands each what it needs."""

from __future__ import annotations

import asyncio
import dataclasses
import importlib.metadata
import logging
import os
import time
from collections.abc import Mapping
from typing import Any

from vdsm_storage.base.clock import SystemClock
from vdsm_storage.base.lanes import Lanes
from vdsm_storage.base.locks import Locks
from vdsm_storage.config import Config
from vdsm_storage.domains.block_growth import BlockTools
from vdsm_storage.domains.leasing import DomainLeasing
from vdsm_storage.domains.registry import Registry as Domains
from vdsm_storage.domains.remembered import boot_id
from vdsm_storage.domains.services import Base, DomainServices
from vdsm_storage.domains.storage_network import storage_network
from vdsm_storage.host import pki
from vdsm_storage.host.facts import HostFacts
from vdsm_storage.host.imageio import ImageTickets
from vdsm_storage.host.kernel_files import KernelFiles
from vdsm_storage.host.libvirt import Libvirt
from vdsm_storage.host.libvirt_blockjobs import LibvirtBlockJobs
from vdsm_storage.host.libvirt_disks import LibvirtDisks
from vdsm_storage.host.libvirt_events import EventLoop
from vdsm_storage.host.libvirt_migration import LibvirtMigration
from vdsm_storage.host.libvirt_thresholds import LibvirtThresholds
from vdsm_storage.host.qemu_img import NewImage, QemuImg
from vdsm_storage.host.qemu_img_luks import QemuImgLuks
from vdsm_storage.host.sanlock import Sanlock
from vdsm_storage.host.sanlock_daemon import SanlockDaemon
from vdsm_storage.images.copy_external import ExternalCopying
from vdsm_storage.images.data import Data
from vdsm_storage.images.encryption import Encryption
from vdsm_storage.images.guard import Guard
from vdsm_storage.images.images import Images
from vdsm_storage.images.streams import ImageStreams
from vdsm_storage.images.volumes import Volumes
from vdsm_storage.images.workshop import Workshop
from vdsm_storage.jobs.hostjobs import Jobs
from vdsm_storage.jobs.journal import JOB, TASK, Entry, Journal
from vdsm_storage.jobs.operation import CrashPoints, Kind
from vdsm_storage.jobs.runner import Runner
from vdsm_storage.jobs.tasks import Tasks, status_of
from vdsm_storage.leases.external import ExternalLeases, Hosting
from vdsm_storage.leases.lease import Leases
from vdsm_storage.leases.lockspace import Lockspaces
from vdsm_storage.lvm.activation import Activation, DeviceMapper
from vdsm_storage.lvm.command import Lvm
from vdsm_storage.lvm.groups import Groups
from vdsm_storage.lvm.launcher import Launcher
from vdsm_storage.monitor.direct import managers
from vdsm_storage.monitor.extend import Ask, Extender
from vdsm_storage.monitor.health import Health
from vdsm_storage.monitor.poller import Poller
from vdsm_storage.monitor.pool_mailbox import PoolMailbox
from vdsm_storage.monitor.thin import Thin, policy_of
from vdsm_storage.monitor.thin_history import History
from vdsm_storage.monitor.thin_moving import Moving
from vdsm_storage.monitor.thin_tools import ThinTools
from vdsm_storage.rpc import tls
from vdsm_storage.rpc.announce import announce, withdraw
from vdsm_storage.rpc.broker import Broker
from vdsm_storage.rpc.dispatch import Dispatcher, Settings
from vdsm_storage.rpc.http import Services as HttpServices
from vdsm_storage.rpc.listener import Listener
from vdsm_storage.rpc.peer import Peers
from vdsm_storage.schema.loader import Schema
from vdsm_storage.schema.normalise import Checker
from vdsm_storage.schema.openrpc import Discovery
from vdsm_storage.secrets.build import registry_of
from vdsm_storage.secrets.libvirt_keyring import LibvirtKeyring
from vdsm_storage.verbs.context import Context, Services
from vdsm_storage.verbs.tables import BUILT, VERBS
from vdsm_storage.vms.disks import DiskBase, VmDisks
from vdsm_storage.vms.holdings import Holdings
from vdsm_storage.vms.keeping import DiskTools
from vdsm_storage.vms.merge_storage import MergeStorage
from vdsm_storage.vms.replicate import CopyTools
from vdsm_storage.vms.resize import Looking
from vdsm_storage.vms.services import VmBase, VmServices
from vdsm_storage.vms.throttle import Throttles
from vdsm_storage.vms.transient import Transients
from vdsm_storage.vms.vm_secrets import VmSecrets

log = logging.getLogger("agent")

VERSION = importlib.metadata.version("vdsm-storage")
SETTLE_SECONDS = 2.0  # for a look at libvirt's secrets to end
STOP_SECONDS = 20.0  # for running operations to take themselves back when the agent stops


class Agent:
    """An agent that can be started and stopped once."""

    def __init__(
        self,
        config: Config,
        dev: bool,
        crash_point: str | None = None,
        activation: Activation | None = None,
    ) -> None:
        """`activation` takes the place of device-mapper."""
        self._config = config
        self._activation = activation
        self._clock = clock = SystemClock()
        self._lanes = Lanes(clock, config.storage.lane_workers, config.storage.lane_queue)
        self._launcher = Launcher()
        self._broker = Broker()
        self._listener: Listener | None = None
        self._recovered = False
        self._restored = False  # what was connected before a crash is connected again
        self._recovery: asyncio.Task[None] | None = None
        self._make_authority = dev and config.tls.enabled
        lost = os.path.join(config.paths.run, "lost")
        where = config.paths.sanlock_run, config.sanlock.io_timeout
        sanlock = Sanlock(*where, lost)
        self._daemon = SanlockDaemon(*where) if dev else None
        self._lockspaces = Lockspaces(sanlock, clock)
        self._leases = Leases(sanlock, clock)
        journal = Journal(os.path.join(config.paths.state, "journal"))
        self._crash = crash = CrashPoints(crash_point)
        self._runner = Runner(journal, self._lanes, clock, crash, self._job_changed)
        self._discovery = Discovery(BUILT, VERSION)
        self._event_loop = EventLoop()
        self._libvirt = Libvirt(config.libvirt, self._event_loop, clock)
        self._secrets = registry_of(
            config, LibvirtKeyring(self._libvirt), Locks(clock), boot_id(), crash.reach, os.environ
        )
        self._settler = Poller("secrets", clock, self._settle_secrets)
        self._libvirt.when_connected(self._settler.wake)
        self._peers = Peers(lambda: tls.peer_context(config))
        self._services = self._build()

    def _build(self) -> Services:
        """The services that verbs use, and the kinds of operations that they run."""
        config, clock, lanes, runner = self._config, self._clock, self._lanes, self._runner
        locks, limits, timeout = Locks(clock), config.storage, config.storage.lock_timeout
        qemu_img = QemuImg(memory=limits.untrusted_memory, cpu=limits.untrusted_cpu)
        leasing = DomainLeasing(self._lockspaces, self._leases, clock)
        block = self._block_tools()
        storage = DomainServices(Base(config, clock, lanes, locks, runner, leasing, block))
        registry, find = storage.registry, storage.registry.find_store
        told = self._domain_changed, self._domain_usable
        health = Health(registry, lanes, clock, limits.monitor_interval, *told)
        # A manager's mailbox extends volumes, and who extends them may have to ask by mailbox.
        mailbox = PoolMailbox(storage.pools, lanes, clock, lambda *it: extender.serve(*it))
        extender = Extender(registry, mailbox.ask, timeout, clock, self._managers())
        storage.spm.watch(mailbox)
        storage.watch(health, self._recover, mailbox.close)
        volumes = Volumes(find, qemu_img, self._leases, locks, config, runner, self._encryption())
        images = Images(volumes, os.path.join(config.paths.run, "storage"))
        guard = Guard(find, locks, self._leases, timeout)
        merging = MergeStorage(guard, qemu_img, extender.extend, timeout)
        vms = self._vm_services(volumes.shop, images, merging)
        facts = self._host_facts(health, block, vms)
        data = Data(find, qemu_img, self._leases, locks, config, runner)
        leases = ExternalLeases(self._leases, registry.get, locks, clock, timeout, Hosting(
            runner.start_task, lambda: facts.hardware()["systemUUID"]
        ))
        self._streams = ImageStreams(find, runner, locks, timeout)
        disks = self._vm_disks(vms, volumes, images, storage, guard, leases, extender)
        self._thin = self._thin_provisioning(vms, disks, registry, extender)
        parts = (storage, volumes, data, leases, self._streams, vms, disks)
        for part in (*parts, ExternalCopying(guard, qemu_img, leases)):
            runner.add_kinds(part.kinds(), dataclasses.asdict(config.bandwidth))
        return Services(
            config=config,
            facts=facts,
            health=health,
            storage=storage,
            tickets=ImageTickets(config.paths.imageio),
            volumes=volumes,
            data=data,
            images=images,
            leases=leases,
            tasks=Tasks(runner),
            jobs=Jobs(runner, clock, config.storage.job_keep),
            secrets=self._secrets,
            vms=vms,
            disks=disks,
            thin=self._thin.view,
            extender=extender,
        )

    def _host_facts(self, health: Health, block: BlockTools, vms: VmServices) -> HostFacts:
        return HostFacts(
            KernelFiles(), self._clock, VERSION, (self._config.paths.run,), health.storage_domains,
            block.network.multipath.health, vms.counts,
        )  # fmt: skip

    def _vm_disks(
        self, vms: VmServices, volumes: Volumes, images: Images, storage: DomainServices,
        guard: Guard, leases: ExternalLeases, extender: Extender,
    ) -> VmDisks:  # fmt: skip
        def overlay(path: str, backing: str, fmt: str, size: int) -> None:
            new = NewImage(path, "qcow2", size, backing=backing, backing_format=fmt)
            volumes.shop.qemu.create(new)

        paths = self._config.paths
        tools = DiskTools(
            LibvirtDisks(self._libvirt), vms.registry, storage.registry.find_store,
            lambda *names: images.prepare(*names)["path"], images.teardown,
            Holdings(os.path.join(paths.run, "holdings")), VmSecrets(self._secrets, paths.run),
            Transients(os.path.join(paths.state, "transient"), overlay),
            Throttles(os.path.join(paths.run, "throttled"), LibvirtDisks(self._libvirt)),
            volumes.shop.locks, self._runner, self._clock, vms.coming,
        )  # fmt: skip
        looking = Looking(
            storage.devices.see_size, lambda *names: int(volumes.qemu_info(*names)["virtualsize"])
        )
        jobs, limit = LibvirtBlockJobs(self._libvirt), self._config.bandwidth.replicate
        copying = CopyTools(jobs, extender.extend, vms.merges.jobs.images_of, limit)
        return VmDisks(DiskBase(
            tools, self._lanes, guard, looking, LibvirtMigration(self._libvirt), vms, leases.spec,
            self._config.vms, copying,
        ))  # fmt: skip

    def _thin_provisioning(
        self, vms: VmServices, disks: VmDisks, domains: Domains, extender: Extender
    ) -> Thin:
        settings = self._config.thin
        history = History(os.path.join(self._config.paths.run, "thin"))
        tools = ThinTools(
            vms.registry, LibvirtThresholds(self._libvirt), domains, extender, disks.throttles,
            history, policy_of(settings), settings, self._lanes, self._clock,
            self._broker.publish_event, self._crash.reach, Moving(vms.migrations).refresh,
            vms.migrations.sending,
        )  # fmt: skip
        return Thin(tools)

    def _vm_services(self, shop: Workshop, images: Images, merging: MergeStorage) -> VmServices:
        def prepare(domain: str, image: str, volume: str) -> str:
            return images.prepare(domain, image, volume)["path"]

        below = VmBase(
            self._config, self._clock, self._lanes, LibvirtBlockJobs(self._libvirt),
            self._broker.publish_event, self._runner, self._peers.call,
        )  # fmt: skip
        return VmServices(below, shop, prepare, merging)

    def _managers(self) -> Mapping[int, Ask]:
        return managers(self._config.thin.managers, self._peers.call)

    def _encryption(self) -> Encryption:
        directory = os.path.join(self._config.paths.run, "luks")
        luks = QemuImgLuks(directory, self._config.secrets.luks_iteration_time)
        return Encryption(luks, self._secrets.volume_key)

    def _block_tools(self) -> BlockTools:
        config, lanes = self._config.lvm, self._lanes
        lvm = Lvm(self._config.paths.lvm, config.timeout, config.commands, self._launcher.start)
        network = storage_network(config, self._clock, KernelFiles())
        candidates = network.candidates.candidates
        groups = Groups(lvm, candidates, lanes.submit, config.scan_timeout)
        return BlockTools(groups, self._activation or DeviceMapper(lvm), network)

    @property
    def kinds(self) -> Mapping[str, Kind]:
        """Every kind of operation, with the names of its steps (the crash points)."""
        return self._runner.kinds

    # -- life --------------------------------------------------------------------------------

    async def start(self) -> int:
        """Serve; returns the port."""
        config = self._config
        starting = [asyncio.to_thread(self._daemon.start)] if self._daemon else []
        if self._make_authority:
            await asyncio.to_thread(pki.make_authority, config.paths.pki)
        host = tls.host_files(config.paths.pki)
        context = tls.server_context(host) if config.tls.enabled else None
        rpc = config.rpc
        dispatcher = Dispatcher(
            Checker(Schema(), rpc.strict),
            VERBS,
            self._context,
            self._lanes,
            Settings(
                rpc.max_outstanding, rpc.strict, rpc.check_replies, config.storage.lane_workers,
                rpc.verb_timeout,
            ),
            lambda: self._recovered,
            {"rpc.discover": self._discovery.document},
        )
        http = HttpServices(self._discovery.encoded, self._health, self._streams, self._lanes)
        self._listener = await Listener.start(config, context, self._broker, dispatcher, http)
        self._runner.load()
        self._services.disks.load()
        self._settler.start()
        self._leases.lost.start(self._leases_lost)
        self._libvirt.start()
        self._services.vms.start()
        self._services.disks.start()
        self._thin.start()
        await asyncio.gather(*starting, asyncio.to_thread(self._libvirt.wait_tried))
        self._recovered = True
        self._recovery = asyncio.create_task(self._keep_recovering())
        announce(config.paths.run, self._listener.port, tls=config.tls.enabled)
        log.info("Serving on port %s, version %s", self._listener.port, VERSION)
        return self._listener.port

    async def stop(self) -> None:
        """Stop serving, and give back what this host should not keep."""
        if self._listener is not None:
            await self._listener.stop()
        if self._recovery is not None:
            self._recovery.cancel()
        await asyncio.to_thread(self._give_back)
        withdraw(self._config.paths.run)
        log.info("Stopped")

    def _give_back(self) -> None:
        self._runner.stop_all(STOP_SECONDS)
        health = self._services.health
        self._settler.stop(SETTLE_SECONDS)
        self._secrets.close()
        self._services.storage.close(lambda: health.close(STOP_SECONDS))
        self._thin.close()
        self._services.disks.close()
        self._services.vms.close()
        self._libvirt.stop()
        self._event_loop.stop()
        self._lockspaces.release_all()
        self._leases.lost.close()
        self._lanes.close()
        self._launcher.close()
        if self._daemon is not None:
            self._daemon.stop()

    # -- what lower floors tell --------------------------------------------------------------

    async def _keep_recovering(self) -> None:
        """Recover at once, and again what could not be: a storage server may come later, another
        host or a dying program may still hold what it needs."""
        work = self._lanes.submit(":restore", self._restore, STOP_SECONDS)
        collected = self._clock.monotonic()
        while True:
            await asyncio.sleep(self._config.storage.monitor_interval)
            if self._clock.monotonic() - collected > self._config.storage.collect_interval:
                collected = self._clock.monotonic()
                self._lanes.submit(":collect", self._services.storage.collect, STOP_SECONDS)
            if not work.done():
                continue
            if not self._restored:
                work = self._lanes.submit(":restore", self._restore, STOP_SECONDS)
            elif self._runner.interrupted():
                work = self._lanes.submit(":restore", self._recover, STOP_SECONDS)

    def _restore(self) -> None:
        """After a crash in this boot: connect what was connected; recover what can be."""
        self._restored = self._services.storage.restore()
        self._recover()

    def _recover(self) -> None:
        self._runner.recover_domains(self._services.storage.usable)

    def _settle_secrets(self) -> float:
        self._secrets.settle()
        return self._config.secrets.check_interval

    def _leases_lost(self, sd_id: str) -> None:
        if self._daemon is not None and self._daemon.pid() is None:
            self._daemon.start()
        self._runner.stop_domains(self._services.storage.leases_lost(sd_id))

    def _domain_usable(self, sd_id: str) -> None:
        self._services.storage.domain_available(sd_id)
        self._recover()
        self._thin.domain_usable()

    def _domain_changed(self, sd_id: str, record: dict[str, Any]) -> None:
        self._broker.publish_event(f"|storage|domain_status|{sd_id}", {sd_id: record})

    def _job_changed(self, entry: Entry, fraction: float | None) -> None:
        if entry.family == JOB:
            info = self._services.jobs.describe(entry, fraction)
            self._broker.publish_event(f"|jobs|status|{entry.id}", info)
        elif entry.family == TASK:
            self._broker.publish_event(f"|tasks|status|{entry.id}", status_of(entry))

    # -- what upper floors ask ---------------------------------------------------------------

    def _context(self, flow_id: str, client: str) -> Context:
        return Context(self._services, flow_id, client)

    def _health(self) -> tuple[int, dict[str, object]]:
        status = "ok" if self._recovered else "recovering"
        state = {"version": VERSION, "time": time.time(), "lanes": self._lanes.stats()}
        return (200 if self._recovered else 503), {"status": status, **state}
