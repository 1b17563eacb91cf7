# SPDX-License-Identifier: GPL-2.0-or-later
"""What sanlock's calls take, give and complain about."""

from __future__ import annotations

import errno
from dataclasses import dataclass
from typing import Any, Final

from vdsm_storage.base.units import MIB
from vdsm_storage.errors import AgentError

# sanlock_rv.h: a live host has the lease, or several ask for it at this moment
HELD: Final = frozenset({-243, -244, -245, -246, -247, errno.EEXIST, errno.EAGAIN, errno.EBUSY})
NO_LEASE: Final = -223  # there is no lease record at this place
_REASONS: Final = {
    -220: "its storage cannot be read",
    -221: "its storage cannot be written",
    NO_LEASE: "no lease was ever written there",
    -226: "the lease there is of another domain",
    -227: "another lease is there",
    -243: "its owner is alive",
    -244: "its owner is alive",
    -245: "another host got it first",
    -246: "several hosts ask for it at once",
    -262: "another host uses this host id, or did a moment ago: give each host an id of its own",
    errno.EEXIST: "this host has it already",
    errno.ENOSPC: "this host has no host id on the domain yet: connect the storage pool and wait",
    errno.ECONNREFUSED: "the sanlock daemon does not run: start it (systemctl start sanlock)",
    errno.EINPROGRESS: "it is being acquired",
}
_HOST_FREE: Final = 2
_HOST_LIVE: Final = 3
_HOST_DEAD: Final = 5


@dataclass(frozen=True)
class Place:
    """Where a lease or a lockspace is; `align` and `sector` in bytes."""

    path: str
    offset: int = 0
    align: int = MIB
    sector: int = 512

    @property
    def disks(self) -> list[tuple[str, int]]:
        return [(self.path, self.offset)]


@dataclass(frozen=True)
class Resource:
    """What a lease's leader record says of itself; empty names for a cleared one."""

    lockspace: str
    resource: str
    version: int


@dataclass(frozen=True)
class HostState:
    """A host in a lockspace; `flags` is one of sanlock's HOST_*."""

    host_id: int
    generation: int
    timestamp: int
    flags: int

    @property
    def alive(self) -> bool:
        return self.flags == _HOST_LIVE

    @property
    def gone(self) -> bool:
        """It left, or died so long ago that its leases are free."""
        return self.flags in (_HOST_FREE, _HOST_DEAD)


@dataclass(frozen=True)
class Failure:
    """The error that a call raises; `busy` when who is in the way may go away."""

    error: type[AgentError]
    facts: dict[str, Any]
    busy: type[AgentError] | None = None

    def of(self, reason: str, *, busy: bool) -> AgentError:
        error = self.busy if busy and self.busy is not None else self.error
        return error(reason=reason, **self.facts)


def reason(number: int, text: str) -> str:
    """In words, for a call that failed with sanlock's `number` and `text`."""
    return f"{_REASONS.get(number) or text} (sanlock {number})"


# What errors name.


def place_facts(place: Place) -> dict[str, Any]:
    return {"path": place.path, "offset": place.offset}


def lease_facts(lockspace: str, resource: str, place: Place) -> dict[str, Any]:
    return {"lockspace": lockspace, "resource": resource, **place_facts(place)}


def host_facts(lockspace: str, host_id: int, place: Place) -> dict[str, Any]:
    return {"domain": lockspace, "host_id": host_id, "path": place.path}
