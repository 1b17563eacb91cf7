# SPDX-License-Identifier: GPL-2.0-or-later
"""What is known of the thin volumes that guests write to, kept in memory.

Nothing here is needed after a restart: it is found again at the VMs and their volumes.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterable, Sequence
from typing import Final

from vdsm_storage.monitor.watermark import Plan, Policy, Rate, View, is_possible, plan
from vdsm_storage.vms.drives import VolumePath

log = logging.getLogger("thin")

UNARMED: Final = "unarmed"  # not watched, yet or any more
ARMED: Final = "armed"
POLLED: Final = "polled"  # libvirt lets nobody arm it now: looked at instead
EXTENDING: Final = "extending"
FULL: Final = "full"  # the volume group has no more space
AT_LIMIT: Final = "at limit"  # a qcow2 volume of its capacity cannot need more


# What a disk keeps when its guest begins to write to another layer.
KEPT: Final = (
    "events", "extends", "last_latency", "max_latency", "paused", "pauses", "pauses_avoided",
    "rate", "throttle", "throttle_since", "throttle_time",
)  # fmt: skip


class Watched:
    """A disk of a VM; a few hundred bytes.  Sizes in bytes, times in monotonic seconds.

    `node` is libvirt's name of the layer that the guest writes to, `volume` what it is, `limit`
    the most that it may ever need.  Changed by whoever has the board's mutex, or, of one that is
    being extended, by its worker.
    """

    __slots__ = (
        "alias", "allocation", "chunk", "due", "error", "events", "extends", "failures",
        "headroom", "last_latency", "limit", "max_latency", "mirrored", "name", "node", "paused",
        "pauses", "pauses_avoided", "rate", "size", "started", "state", "threshold", "throttle",
        "throttle_since", "throttle_time", "vm", "volume",
    )  # fmt: skip

    def __init__(
        self, vm: str, name: str, alias: str, half_life: float = Policy.half_life
    ) -> None:
        self.vm = vm
        self.name = name
        self.alias = alias
        self.node = ""
        self.volume = VolumePath("", "", "")
        self.mirrored: VolumePath | None = None
        self.size = self.allocation = self.limit = 0
        self.threshold = self.headroom = self.chunk = 0
        self.rate = Rate(half_life)
        self.state = UNARMED
        self.error = ""
        self.failures = 0  # in a row
        self.due = 0.0  # since when it wants more; 0 when it does not
        self.started = 0.0  # the same of what is being dealt with
        self.paused = False  # the guest waits for space
        self.events = self.extends = self.pauses = self.pauses_avoided = 0
        self.last_latency = self.max_latency = 0.0  # from wanting to having more
        self.throttle = 0  # bytes a second that the guest may write just now; 0 as many as it likes
        self.throttle_since = self.throttle_time = 0.0

    def saw(self, now: float, allocation: int) -> None:
        """The guest has written so far.  What cannot be is not believed: a size is never made of
        it."""
        if is_possible(View(self.size, allocation, self.limit)):
            self.allocation = max(self.allocation, allocation)
            self.rate.add(now, self.allocation)
        else:
            log.warning(
                "VM %s disk %s: byte %d cannot have been written, the volume has %d and needs %d"
                " at most", self.vm, self.name, allocation, self.size, self.limit,
            )  # fmt: skip

    def successor(self, node: str, volume: VolumePath) -> Watched:
        """The same disk, whose guest writes to another layer now; what is being done to this one
        is nobody's concern any more.  The rate is the guest's, and stays."""
        new = Watched(self.vm, self.name, self.alias)
        for slot in KEPT:
            setattr(new, slot, getattr(self, slot))
        new.node, new.volume = node, volume
        new.rate.reset()
        return new

    @property
    def is_scratch(self) -> bool:
        """Whether it is no disk of the guest's: what a backup writes to (vda_7)."""
        return not self.node.startswith(f"{self.name}[")

    @property
    def layer(self) -> str:
        """As LibvirtThresholds.written calls it."""
        return self.node if self.is_scratch else self.name

    @property
    def standing(self) -> tuple[str, int, int, int]:
        """What a point of its history tells."""
        return self.state, self.allocation, self.size, self.threshold

    @property
    def free(self) -> int:
        return max(0, self.size - self.allocation)

    def plan(self, policy: Policy, now: float, latency: float) -> Plan:
        view = View(self.size, self.allocation, self.limit)
        made = plan(policy, view, self.rate.now(now), latency)
        self.headroom, self.chunk = made.headroom, made.chunk
        return made


class Board:
    """All of them, by what events call them."""

    def __init__(self) -> None:
        self.mutex = threading.RLock()
        self._vms: dict[str, dict[str, Watched]] = {}

    def of(self, vm: str) -> list[Watched]:
        with self.mutex:
            return list(self._vms.get(vm, {}).values())

    def all(self) -> list[Watched]:
        with self.mutex:
            return [each for drives in self._vms.values() for each in drives.values()]

    def vms(self) -> list[str]:
        with self.mutex:
            return list(self._vms)

    def by_node(self, vm: str, node: str) -> Watched | None:
        return next((each for each in self.of(vm) if each.node == node), None)

    def by_alias(self, vm: str, alias: str) -> Watched | None:
        return next((each for each in self.of(vm) if each.alias == alias), None)

    def get(self, vm: str, name: str) -> Watched | None:
        with self.mutex:
            return self._vms.get(vm, {}).get(name)

    def add(self, each: Watched) -> None:
        with self.mutex:
            self._vms.setdefault(each.vm, {})[each.name] = each

    def keep(self, vm: str, names: Iterable[str]) -> Sequence[Watched]:
        """The VM has no others; returns those that went."""
        kept = set(names)
        with self.mutex:
            drives = self._vms.get(vm, {})
            gone = [drives.pop(name) for name in set(drives) - kept]
            if not drives:
                self._vms.pop(vm, None)
        return gone

    def has(self, each: Watched) -> bool:
        return self.get(each.vm, each.name) is each
