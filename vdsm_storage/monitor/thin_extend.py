# SPDX-License-Identifier: GPL-2.0-or-later
"""From an event to the next threshold: plan, extend, let the guest go on, arm.

One worker a domain takes all drives that want more at that moment: while it extends some, others
come, and are one commit of the volume group together.  What concerns VMs is done by several
workers beside it, so that a QEMU that hangs holds up nobody else.

Any step may be the last one: sizes are absolute, so that what was begun is done again at no cost.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Final

from vdsm_storage.errors import (
    AgentError,
    ExtendRefused,
    VolumeDoesNotExist,
    VolumeGroupSizeError,
)
from vdsm_storage.host.libvirt_model import IO_ERROR, PAUSED, VmError
from vdsm_storage.monitor import thin_drive as td
from vdsm_storage.monitor import thin_history as th
from vdsm_storage.monitor.crew import Crew
from vdsm_storage.monitor.thin_brake import Brake
from vdsm_storage.monitor.thin_close import Closely
from vdsm_storage.monitor.thin_drive import Watched
from vdsm_storage.monitor.thin_mirrors import Mirrors
from vdsm_storage.monitor.thin_space import Space
from vdsm_storage.monitor.thin_tools import ThinTools

WORKERS: Final = 32  # VMs that are dealt with at once; threads are made when they are needed
DOMAINS: Final = 64  # domains that volumes are extended on at once
EXTEND: Final = 60.0  # seconds for one attempt to extend
FIRST_RETRY, LAST_RETRY = 0.25, 5.0  # seconds after a failure; twice as long after each further one
NO_SPACE: Final = (VolumeGroupSizeError, ExtendRefused)  # the latter may mean something else
SETTLE: Final = 0.1  # seconds until libvirt has been told that a guest has paused
SETTLES: Final = 20  # times

log = logging.getLogger("thin")


class Extending:
    """`look(vm)` asks for a look at what a VM has now: it is not what we know."""

    def __init__(self, tools: ThinTools, look: Callable[[str], None]) -> None:
        self._tools = tools
        self._look = look
        self.space = Space(tools, self.want)
        self._mirrors = Mirrors(tools)
        self._closely = Closely(tools, self.want, self.arm_again, look)
        self.brake = Brake(tools, self._closely.must)
        self._growing: Crew[Watched] = Crew(
            tools.lanes, "thin", DOMAINS, lambda each: each.volume.domain, self._grow, whole=True
        )
        self._vms: Crew[Watched] = Crew(
            tools.lanes, "thin vms", WORKERS, lambda each: each.vm, self._finish
        )

    # -- wanting -----------------------------------------------------------------------------

    def want(self, each: Watched, since: float | None = None) -> None:
        """It may need more space.  Does not wait, so that events can call it."""
        if not each.due:
            each.due = self._tools.clock.monotonic() if since is None else since
        self._growing.put(each)

    def arm_again(self, each: Watched) -> None:
        """It has room enough, and is to be watched."""
        self._vms.put(each)

    # -- extending ---------------------------------------------------------------------------

    def _grow(self, batch: Sequence[Watched]) -> None:
        """Of one domain."""
        tools = self._tools
        now = tools.clock.monotonic()
        wants: dict[Watched, int] = {}
        for each in batch:
            if not tools.board.has(each):
                continue
            each.started, each.due = each.due or now, 0.0
            target = self._target(each, now)
            if target is None:
                self._vms.put(each)
            else:
                wants[each] = target
        if wants:
            self.brake.begin(list(wants))
            tools.reach("thin:planned")
            self._extend(wants)

    def _target(self, each: Watched, now: float) -> int | None:
        """What it shall have; None: it has room enough."""
        tools = self._tools
        if each.paused and each.size >= each.limit:
            # What says that it needs no more is wrong: bitmaps, or snapshots inside of it.
            each.limit = each.size + tools.policy.extent
            log.warning("VM %s disk %s needs more than it may: now %d bytes", each.vm, each.name,
                        each.limit)  # fmt: skip
        return each.plan(tools.policy, now, self._closely.latency(each)).target

    def _extend(self, wants: Mapping[Watched, int]) -> None:
        since = {each: each.started for each in wants}
        for each in wants:
            if each.state != td.FULL:  # until it has some, and told once
                each.state = td.EXTENDING
        self._mirrors.extend(wants)
        outcomes = self._try(wants)
        short = [each for each, o in outcomes.items() if isinstance(o, NO_SPACE)]
        if short:
            # There is not as much for each of them; the least of it may do.
            least = {each: each.size + self._tools.policy.extent for each in short}
            outcomes = {**outcomes, **self._try(least)}
        for each, outcome in outcomes.items():
            if isinstance(outcome, AgentError):
                self._failed(each, outcome, since[each])
            else:
                self._extended(each, outcome, since[each])
        self.space.changed({each.volume.domain for each in wants})

    def _try(self, wants: Mapping[Watched, int]) -> dict[Watched, int | AgentError]:
        (domain,) = {each.volume.domain for each in wants}
        sizes: defaultdict[str, int] = defaultdict(int)
        for each, size in wants.items():  # a shared volume may be in two VMs
            sizes[each.volume.volume] = max(sizes[each.volume.volume], size)
        try:
            found = self._tools.extender.extend_many(domain, sizes, EXTEND)
        except AgentError as error:
            return dict.fromkeys(wants, error)
        return {each: found[each.volume.volume] for each in wants}

    def _extended(self, each: Watched, size: int, since: float) -> None:
        tools = self._tools
        tools.reach("thin:extended")
        each.size = size
        now = tools.clock.monotonic()
        if each.due:  # asked for meanwhile, and had now: what it may need more is another need
            each.due = now
        each.last_latency = now - since
        each.max_latency = max(each.max_latency, each.last_latency)
        if each.state != td.FULL:  # then it is not the storage that took so long
            tools.latencies[each.volume.domain].add(each.last_latency)
        each.extends += 1
        each.failures, each.error = 0, ""
        tools.note(each, th.EXTENDED)
        log.info("VM %s disk %s has %d bytes after %.3f s", each.vm, each.name, size,
                 each.last_latency)  # fmt: skip
        self._vms.put(each)

    def _failed(self, each: Watched, error: AgentError, since: float) -> None:
        each.error = str(error)
        if isinstance(error, NO_SPACE) and self.space.is_gone(each):
            self._full(each, since)
            return
        each.failures += 1
        each.state = td.UNARMED
        delay = min(LAST_RETRY, FIRST_RETRY * 2 ** min(each.failures - 1, 10))
        log.warning("VM %s disk %s is not extended, tried again in %g s: %s", each.vm, each.name,
                    delay, error)  # fmt: skip
        self.brake.failed(each, delay)
        if isinstance(error, VolumeDoesNotExist):
            self._look(each.vm)
        self._tools.alarms.after(delay, lambda: self._again(each, since))

    def _full(self, each: Watched, since: float) -> None:
        if each.state != td.FULL or not each.failures:
            log.error("VM %s disk %s: %s", each.vm, each.name, each.error)
            self._tools.note(each, th.FULL)
        each.failures += 1
        each.state = td.FULL
        each.due = each.due or since
        self.space.wait_for(each)

    def _again(self, each: Watched, since: float) -> None:
        if self._tools.board.has(each):
            self.want(each, since)

    # -- the VM ------------------------------------------------------------------------------

    def _finish(self, work: Sequence[Watched]) -> None:
        """It has room: its guest goes on if it waits for that, and is watched again."""
        (each,) = work
        tools = self._tools
        if not tools.board.has(each):
            return
        began = each.started
        try:
            tools.before_resume(each.vm, each.name, each.volume)
            if each.paused and not self._closely.must(each.vm):
                self._resume(each)
            tools.reach("thin:resumed")
            self._arm(each)
            if each.started == began and not each.due:
                each.started = 0.0
                self.brake.release(each)
        except VmError as error:
            log.info("VM %s disk %s is looked at anew: %s", each.vm, each.name, error.text)
            each.started, each.state = 0.0, td.UNARMED
            self._look(each.vm)
        except (AgentError, OSError) as error:
            each.error = str(error)
            each.state = td.UNARMED
            log.warning("VM %s disk %s is not watched, tried again: %s", each.vm, each.name, error)
            tools.alarms.after(LAST_RETRY, lambda: self._vms.put(each))

    def _arm(self, each: Watched) -> None:
        """First armed, then looked: what the guest writes in between is seen by one of them."""
        tools = self._tools
        now = tools.clock.monotonic()
        latency = self._closely.latency(each)
        planned = each.plan(tools.policy, now, latency)
        threshold = planned.threshold
        if planned.target is not None:
            threshold = max(1, each.size - each.headroom)
        each.threshold = threshold or 0
        if not self._closely.arm(each):
            return
        tools.reach("thin:armed")
        allocation, size = tools.libvirt.written(each.vm, each.layer)
        now = tools.clock.monotonic()
        each.size = size or each.size
        each.saw(now, allocation)
        if each.plan(tools.policy, now, latency).target is not None:
            self.want(each, now)
        elif each.threshold:
            each.state = td.ARMED
            tools.note(each, th.ARMED)
        else:
            each.state = td.AT_LIMIT

    def _resume(self, each: Watched, patience: int = SETTLES) -> None:
        """Only one that waits for space: who paused a VM for another reason continues it."""
        tools = self._tools
        state = tools.registry.state(each.vm)
        if state.state == PAUSED and state.reason == IO_ERROR:
            tools.libvirt.resume(each.vm)
            log.info("VM %s goes on: disk %s has space", each.vm, each.name)
        elif state.state != PAUSED and patience:
            # The disk's error is told before the pause is.
            tools.alarms.after(SETTLE, lambda: self._resume_later(each, patience - 1))
            return
        each.paused = False
        tools.note(each, th.RESUMED)

    def _resume_later(self, each: Watched, patience: int) -> None:
        if not each.paused:
            return
        try:
            self._resume(each, patience)
        except (AgentError, VmError) as error:
            log.info("VM %s is looked at anew: %s", each.vm, error)
            self._look(each.vm)
