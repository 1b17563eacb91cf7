# SPDX-License-Identifier: GPL-2.0-or-later
"""Thin provisioning: volumes of running guests grow before their guests are out of space.

    libvirt's event ─► Thin ─► Extending (plan, extend, resume, arm) ─► the next event
    what changed a VM ─► Looking ─┘

Nothing polls.  A disk that nobody writes to costs nothing but a look every few minutes, which is
one call of libvirt's for all.
"""

from __future__ import annotations

import logging
from typing import Final

from vdsm_storage.config import Thin as Settings
from vdsm_storage.host.libvirt_model import Change, VmEvent
from vdsm_storage.host.libvirt_thresholds import Crossed
from vdsm_storage.monitor import thin_history as th
from vdsm_storage.monitor.thin_look import Looking
from vdsm_storage.monitor.thin_tools import ThinTools
from vdsm_storage.monitor.thin_view import ThinView
from vdsm_storage.monitor.watermark import Policy

# A VM that arrived from another host goes on, too.
LOOK_AFTER: Final = (Change.STARTED, Change.RESUMED, Change.DEVICES, Change.IO_ERROR)
BY_ERROR: Final = 2  # VIR_DOMAIN_EVENT_SUSPENDED_IOERROR

log = logging.getLogger("thin")


def policy_of(settings: Settings) -> Policy:
    return Policy(
        headroom_min=settings.headroom_min,
        headroom_max=settings.headroom_max,
        chunk_min=settings.chunk_min,
        chunk_max=settings.chunk_max,
        chunk_seconds=settings.chunk_seconds,
        safety=settings.safety,
        half_life=settings.half_life,
        first_latency=settings.first_latency,
        throttle_floor=settings.throttle_floor,
    )


class Thin:
    """Order in agent.py: build, then start libvirt, then `start`."""

    def __init__(self, tools: ThinTools) -> None:
        self._tools = tools
        self._looking = Looking(tools)
        self._extending = self._looking.extending
        self.view = ThinView(tools.history, tools.board, tools.clock, self._extending.space.known)
        if not tools.settings.enabled:
            return
        tools.libvirt.watch_writes(self._crossed, self._out_of_space)
        tools.registry.watch(self._event, self._looking.all)
        tools.registry.when_changed(self._looking.vm)

    def start(self) -> None:
        if self._tools.registry.enabled and self._tools.settings.enabled:
            self._tools.alarms.start()
            self._scan_later()

    def close(self) -> None:
        self._tools.alarms.close()
        self._extending.brake.release_all()

    def domain_usable(self) -> None:
        """Disks on it could not be watched before."""
        if self._tools.settings.enabled:
            self._looking.all()

    def _scan_later(self) -> None:
        def scan() -> None:
            self._looking.all()
            self._scan_later()

        self._tools.alarms.after(self._tools.settings.scan_interval, scan)

    # -- events, from libvirt's event loop ---------------------------------------------------

    def _crossed(self, crossed: Crossed) -> None:
        each = self._tools.board.by_node(crossed.vm, crossed.node)
        if each is None:
            self._looking.vm(crossed.vm)
            return
        now = self._tools.clock.monotonic()
        each.saw(now, crossed.offset)
        each.events += 1
        each.threshold = 0
        self._extending.want(each, now)
        self._tools.note(each, th.EVENT)

    def _out_of_space(self, vm: str, alias: str) -> None:
        each = self._tools.board.by_alias(vm, alias)
        if each is None:
            self._looking.vm(vm)
            return
        if not each.paused:
            each.paused = True
            each.pauses += 1
            each.saw(self._tools.clock.monotonic(), each.size)
            log.warning("VM %s pauses: disk %s has no space left", vm, each.name)
            self._tools.note(each, th.PAUSED)
        self._extending.want(each)

    # -- events of VMs -----------------------------------------------------------------------

    def _event(self, event: VmEvent) -> None:
        if event.change is Change.STOPPED:
            self._looking.forget(event.vm)
            return
        by_error = event.change is Change.PAUSED and event.facts.get("detail") == BY_ERROR
        if by_error or event.change in LOOK_AFTER:
            self._looking.vm(event.vm)
