# SPDX-License-Identifier: GPL-2.0-or-later
"""Which VMs of this host are on their way to another one, or have just been.

Whoever changes a volume of a VM asks `destination_of`: while the VM moves, the host that it moves
to must see the change first.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

from vdsm_storage.errors import AgentError, MigrationInProgress, MigrationNotInProgress

LEAVING: Final = "Migration Source"
KEPT: Final = 1000  # migrations that came to an end

# (host:port, verb, parameters, seconds) -> the answer of the agent there.  Raises
# NoConnectionToPeer (10), PeerRefused.
Ask = Callable[[str, str, Mapping[str, Any], float], Any]


@dataclass(frozen=True)
class Destination:
    """The agent of the host that a VM moves to."""

    peer: str
    ask: Ask

    def call(self, verb: str, params: Mapping[str, Any], timeout: float) -> Any:
        """Raises NoConnectionToPeer (10), PeerRefused."""
        return self.ask(self.peer, verb, params, timeout)


@dataclass(frozen=True)
class Migration:
    """`percent` of the memory is sent, `sending` once libvirt has that to do; `downtime` in
    milliseconds, of one that is done."""

    peer: str
    going: bool = True
    sending: bool = False
    percent: int = 0
    downtime: int = 0
    error: AgentError | None = None


class Migrations:
    """Any thread."""

    def __init__(self, ask: Ask) -> None:
        self._ask = ask
        self._lock = threading.Lock()
        self._known: dict[str, Migration] = {}
        self._downtimes: dict[str, int] = {}

    # -- looking -----------------------------------------------------------------------------

    def leaving(self, vm: str) -> bool:
        found = self._known.get(vm)
        return found is not None and found.going

    def sending(self, vm: str) -> bool:
        """Whether libvirt keeps calls waiting that change something of it, for it is being sent."""
        found = self._known.get(vm)
        return found is not None and found.going and found.sending

    def destination_of(self, vm: str) -> Destination | None:
        """Where it is moving to right now."""
        found = self._known.get(vm)
        return Destination(found.peer, self._ask) if found is not None and found.going else None

    def at(self, peer: str) -> Destination:
        return Destination(peer, self._ask)

    def percent(self, vm: str) -> int | None:
        found = self._known.get(vm)
        return found.percent if found is not None and found.going else None

    def count(self) -> int:
        with self._lock:
            return sum(each.going for each in self._known.values())

    def ahead(self, vm: str) -> int:
        """How many of those that are on their way began before this one."""
        with self._lock:
            going = [other for other, each in self._known.items() if each.going]
        return going.index(vm) if vm in going else 0

    def status(self, vm: str) -> Migration:
        """Of the last one of a VM.  Raises MigrationNotInProgress (81)."""
        found = self._known.get(vm)
        if found is None:
            raise MigrationNotInProgress(vm=vm)
        return found

    # -- what happens ------------------------------------------------------------------------

    def begin(self, vm: str, peer: str) -> None:
        """Raises MigrationInProgress (51)."""
        with self._lock:
            there = self._known.pop(vm, None)
            if there is not None and there.going:
                self._known[vm] = there
                raise MigrationInProgress(vm=vm, peer=there.peer)
            self._downtimes.pop(vm, None)
            self._known[vm] = Migration(peer)
            self._limit()

    def send(self, vm: str) -> None:
        """libvirt is about to be told to."""
        with self._lock:
            there = self._known.get(vm)
            if there is not None and there.going:
                self._known[vm] = replace(there, sending=True)

    def sent(self, vm: str, percent: int) -> bool:
        """How much of its memory is there; whether that is news."""
        with self._lock:
            there = self._known.get(vm)
            if there is None or not there.going or there.percent == percent:
                return False
            self._known[vm] = replace(there, percent=percent)
        return True

    def stood_still(self, vm: str, milliseconds: int) -> None:
        """libvirt tells of a VM that has moved."""
        with self._lock:
            if vm in self._known:
                self._downtimes[vm] = milliseconds

    def ended(self, vm: str, error: AgentError | None) -> None:
        """It is there, or has failed with `error` and stays."""
        with self._lock:
            there = self._known.get(vm)
            if there is not None:
                downtime = self._downtimes.pop(vm, 0)
                percent = 100 if error is None else there.percent
                self._known[vm] = Migration(there.peer, False, False, percent, downtime, error)

    def _limit(self) -> None:
        over = [vm for vm, each in self._known.items() if not each.going][:-KEPT]
        for vm in over:
            del self._known[vm]
