# SPDX-License-Identifier: GPL-2.0-or-later
"""Disks that libvirt lets nobody arm: as long as that is so, they are looked at instead.

While a VM moves to another host libvirt (9.0) keeps all calls waiting that change something of it,
`setBlockThreshold` among them, for 30 seconds or until that is over.  What else it may do so for is
known by a call that is not answered.
What was armed before stays so, and one extension may be all that is needed.  Afterwards the disk is
looked at every EVERY seconds, which is part of the latency that its headroom must outlast.  Nobody
can slow such a guest, or continue it if it pauses.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from typing import Final

from vdsm_storage.errors import AgentError, LibvirtTimeout
from vdsm_storage.host.libvirt_model import VmError
from vdsm_storage.monitor import thin_drive as td
from vdsm_storage.monitor import thin_history as th
from vdsm_storage.monitor.crew import Crew
from vdsm_storage.monitor.thin_drive import Watched
from vdsm_storage.monitor.thin_tools import ThinTools

EVERY: Final = 0.2  # seconds; with an idle disk's headroom and a tail of 0.05 s: 1 GiB/s
ARMING: Final = 2.0  # seconds that an answer to setBlockThreshold is waited for
BUSY: Final = 30.0  # seconds until it is tried again; libvirt has given up that call by then
WORKERS: Final = 16

log = logging.getLogger("thin")


class Closely:
    """`want` and `arm_again` are told what came of a look: that it needs more space, that it can be
    armed now."""

    def __init__(
        self, tools: ThinTools, want: Callable[[Watched], None],
        arm_again: Callable[[Watched], None], look: Callable[[str], None],
    ) -> None:  # fmt: skip
        self._tools = tools
        self._want = want
        self._arm_again = arm_again
        self._look = look
        self._busy: dict[str, float] = {}  # VMs whose libvirt kept a call waiting, until when
        self._lock = threading.Lock()
        self._pending: set[Watched] = set()  # to be looked at in a moment
        self._crew: Crew[Watched] = Crew(
            tools.lanes, "thin close", WORKERS, lambda each: each.vm, self._look_at
        )

    def arm(self, each: Watched) -> bool:
        """At `each.threshold`.  False when that is not possible now: then it is looked at from now
        on.  Raises VmError, LibvirtUnavailable."""
        if not self.must(each.vm):
            try:
                self._tools.libvirt.arm(each.vm, each.node, each.threshold, ARMING)
            except LibvirtTimeout:
                self._busy[each.vm] = self._tools.clock.monotonic() + BUSY
            else:
                return True
        if each.state != td.POLLED:
            log.info("VM %s disk %s cannot be armed now: it is looked at instead", each.vm,
                     each.name)  # fmt: skip
            each.state, each.threshold = td.POLLED, 0
            self._tools.note(each, th.LOOKED)
        self._later(each)
        return False

    def must(self, vm: str) -> bool:
        """Whether nothing of the VM can be changed now."""
        until = self._busy.get(vm, 0.0)
        if until and self._tools.clock.monotonic() >= until:
            self._busy.pop(vm, None)
            until = 0.0
        return bool(until) or self._tools.sending(vm)

    def latency(self, each: Watched) -> float:
        """Seconds from the guest's write to more space, at worst."""
        tail = self._tools.tail(each.volume.domain)
        return tail + EVERY if self.must(each.vm) else tail

    def _later(self, each: Watched) -> None:
        with self._lock:
            if each in self._pending:
                return
            self._pending.add(each)
        self._tools.alarms.after(EVERY, lambda: self._crew.put(each))

    def _look_at(self, work: Sequence[Watched]) -> None:
        (each,) = work
        tools = self._tools
        with self._lock:
            self._pending.discard(each)
        if each.state != td.POLLED or each.due or not tools.board.has(each):
            return
        if not self.must(each.vm):
            self._arm_again(each)
            return
        try:
            allocation, size = tools.libvirt.written(each.vm, each.layer)
        except VmError:
            self._look(each.vm)
            return
        except AgentError as error:
            log.info("VM %s disk %s: %s", each.vm, each.name, error)
            self._later(each)
            return
        now = tools.clock.monotonic()
        each.size = size or each.size
        each.saw(now, allocation)
        if each.plan(tools.policy, now, self.latency(each)).target is not None:
            self._want(each)
        else:
            self._later(each)
