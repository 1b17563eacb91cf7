# SPDX-License-Identifier: GPL-2.0-or-later
"""What libvirt tells of VMs, in words of our own: nothing here needs the library.

The numbers are those of libvirt's public enumerations (virDomainState and the like).
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final


class Why(enum.Enum):
    """Sorts of errors that callers tell apart."""

    NO_VM = "no such VM"
    NOT_RUNNING = "the VM does not run"
    AGENT = "the guest agent does not answer"
    UNSUPPORTED = "not supported"
    OTHER = "another reason"


class VmError(Exception):
    """libvirt refused; `text` is its message."""

    def __init__(self, why: Why, text: str) -> None:
        super().__init__(text)
        self.why = why
        self.text = text


@dataclass(frozen=True)
class VmState:
    """`state` and `reason` as libvirt counts them."""

    id: str
    name: str
    state: int
    reason: int

    @property
    def running(self) -> bool:
        """Whether there is a QEMU of it, going on or not."""
        return self.state in STATUSES and STATUSES[self.state] != DOWN

    @property
    def status(self) -> str:
        """As engines call it."""
        return STATUSES.get(self.state, "Up")


DOWN: Final = "Down"
PAUSED: Final = 3  # VIR_DOMAIN_PAUSED
# NOSTATE, RUNNING, BLOCKED, PAUSED, SHUTDOWN, SHUTOFF, CRASHED, PMSUSPENDED
STATUSES: Final[Mapping[int, str]] = {
    0: "Up", 1: "Up", 2: "Up", 3: "Paused", 4: "Powering down", 5: DOWN, 6: DOWN, 7: "Paused",
}  # fmt: skip
IO_ERROR: Final = 5  # VIR_DOMAIN_PAUSED_IOERROR
ENOSPC: Final = "ENOSPC"


@dataclass(frozen=True)
class BulkStats:
    """One VM in the answer of libvirt's bulk call; `values` by libvirt's names."""

    id: str
    name: str
    values: Mapping[str, Any]


class Change(enum.Enum):
    """What may have happened to a VM."""

    STARTED = "started"
    STOPPED = "stopped"
    PAUSED = "paused"
    RESUMED = "resumed"
    DEVICES = "devices"  # its XML is not what it was
    LIMITS = "limits"  # the same, but its devices are
    IO_ERROR = "io error"
    REBOOTED = "rebooted"  # its guest began anew
    AGENT = "agent"  # its agent connected or went away


@dataclass(frozen=True)
class VmEvent:
    vm: str
    change: Change
    facts: Mapping[str, Any] = field(default_factory=dict)
