# SPDX-License-Identifier: GPL-2.0-or-later
"""The one place that builds the long-lived objects and hands each what it needs."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.metadata
import logging
import os

import orjson

from vdsm_storage.base import files
from vdsm_storage.base.clock import SystemClock
from vdsm_storage.base.lanes import Lanes
from vdsm_storage.base.locks import Locks
from vdsm_storage.config import Config
from vdsm_storage.host import pki
from vdsm_storage.host.facts import HostFacts
from vdsm_storage.host.imageio import ImageTickets
from vdsm_storage.host.kernel_files import KernelFiles
from vdsm_storage.host.qemu_img import QemuImg
from vdsm_storage.jobs.journal import JOB, Entry, Journal
from vdsm_storage.jobs.operation import CrashPoints
from vdsm_storage.jobs.runner import Runner
from vdsm_storage.rpc import tls
from vdsm_storage.rpc.broker import Broker
from vdsm_storage.rpc.dispatch import Dispatcher, Settings
from vdsm_storage.rpc.http import Services as HttpServices
from vdsm_storage.rpc.listener import Listener
from vdsm_storage.schema.loader import Schema
from vdsm_storage.schema.normalise import Checker
from vdsm_storage.verbs.context import Context, Services
from vdsm_storage.verbs.tables import VERBS

log = logging.getLogger("agent")

VERSION = importlib.metadata.version("vdsm-storage")


class Agent:
    """An agent that can be started and stopped once."""

    def __init__(self, config: Config, dev: bool, crash_point: str | None = None) -> None:
        self._config = config
        self._dev = dev
        self._clock = SystemClock()
        self._lanes = Lanes(self._clock, config.storage.lane_workers, config.storage.lane_queue)
        self._locks = Locks(self._clock)
        self._broker = Broker()
        self._schema = Schema()
        self._listener: Listener | None = None
        self._recovered = False
        state = os.path.join(config.paths.state, "journal")
        self._runner = Runner(
            Journal(state), self._lanes, self._clock, CrashPoints(crash_point), self._on_change
        )
        self._qemu_img = QemuImg()
        self._services = Services(
            config=config,
            facts=HostFacts(
                KernelFiles(), self._clock, VERSION, (config.paths.run,), dict
            ),
            tickets=ImageTickets(config.paths.imageio),
        )

    async def start(self) -> int:
        """Serve; returns the port."""
        config = self._config
        if self._dev and config.tls.enabled:
            await asyncio.to_thread(pki.make_authority, config.paths.pki)
        context = tls.server_context(tls.host_files(config.paths.pki)) if config.tls.enabled else None
        dispatcher = Dispatcher(
            Checker(self._schema, config.rpc.strict),
            VERBS,
            self._context,
            self._lanes,
            Settings(config.rpc.max_outstanding, config.rpc.strict, config.rpc.check_replies),
            lambda: self._recovered,
        )
        http = HttpServices(self._openrpc, self._health)
        self._listener = await Listener.start(config, context, self._broker, dispatcher, http)
        self._runner.load()
        self._recovered = True
        self._announce(self._listener.port)
        log.info("Serving on port %s, version %s", self._listener.port, VERSION)
        return self._listener.port

    async def stop(self) -> None:
        """Stop serving and give back what this host should not keep."""
        if self._listener is not None:
            await self._listener.stop()
        self._lanes.close()
        for name in ("port", "plain"):
            with contextlib.suppress(OSError):
                files.unlink_if_there(os.path.join(self._config.paths.run, name))
        log.info("Stopped")

    def _announce(self, port: int) -> None:
        """Tell local clients the port, and that they need no TLS."""
        run = self._config.paths.run
        files.unlink_if_there(os.path.join(run, "plain"))
        if not self._config.tls.enabled:
            files.write_atomic(os.path.join(run, "plain"), b"")
        files.write_atomic(os.path.join(run, "port"), f"{port}\n".encode())

    def _context(self, flow_id: str, client: str) -> Context:
        return Context(self._services, flow_id, client)

    def _openrpc(self) -> bytes:
        return orjson.dumps({})

    def _health(self) -> tuple[int, dict[str, object]]:
        return 200, {"status": "ok", "lanes": self._lanes.stats()}

    def _on_change(self, entry: Entry, fraction: float | None) -> None:
        if entry.family == JOB:
            self._broker.publish_event(f"|jobs|status|{entry.id}", {"id": entry.id})
