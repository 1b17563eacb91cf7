# SPDX-License-Identifier: GPL-2.0-or-later
"""What callers are told when libvirt refuses, for what no QEMU of ours says (code 75), and when a
guest that may freeze later is to be thawed.  The rest is in functional/test_vm_freeze.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pytest

from vdsm_storage.base.clock import SystemClock
from vdsm_storage.errors import (
    AgentError,
    LibvirtLost,
    LibvirtTimeout,
    LibvirtUnavailable,
    VMIsDown,
)
from vdsm_storage.host.libvirt_model import VmError, VmState, Why
from vdsm_storage.host.libvirt_vms import LibvirtVms
from vdsm_storage.vms.freeze import Freezing, Limits
from vdsm_storage.vms.frozen import FREEZE, THAWING, FrozenVms, Record
from vdsm_storage.vms.registry import Registry

VM = "11111111-1111-4111-8111-111111111111"


class Refusing:
    """Stands for libvirt, which always gives one error."""

    def __init__(self, error: Exception) -> None:
        self._error = error

    def watch(self, *_: object) -> None:
        pass

    enabled = True

    def state(self, vm: str) -> VmState:
        if isinstance(self._error, VmError) and self._error.why is Why.NO_VM:
            raise self._error
        return VmState(vm, "vm", 1, 0)

    def freeze(self, _vm: str, _timeout: float) -> int:
        raise self._error

    thaw = freeze


def make(tmp_path: Path, error: Exception) -> tuple[Freezing, FrozenVms]:
    vms = cast(LibvirtVms, Refusing(error))
    records = FrozenVms(str(tmp_path))
    told: list[Any] = []
    freezing = Freezing(
        Registry(vms), vms, records, Limits(1, 1), SystemClock(), lambda *it: told.append(it)
    )
    return freezing, records


CODES = [
    (VmError(Why.NO_VM, "x"), 1, 1, False),
    (VmError(Why.AGENT, "Guest agent is not responding: not connected"), 19, 19, True),
    (VmError(Why.AGENT, "QEMU guest agent is not connected"), 19, 19, False),
    (VmError(Why.OTHER, "QEMU guest agent is not configured"), 76, 77, False),
    (VmError(Why.UNSUPPORTED, "no function"), 75, 75, False),
    (VmError(Why.OTHER, "x"), 76, 77, True),
    (VmError(Why.NOT_RUNNING, "domain is not running"), 76, 77, False),  # paused
    (LibvirtTimeout(call="freeze", seconds=1), 59, 59, True),
    (LibvirtUnavailable(uri="x", reason="it is away"), 59, 59, False),
    (LibvirtLost(uri="x", reason="it went away"), 59, 59, True),
]


@pytest.mark.parametrize(("error", "freeze", "thaw", "doubt"), CODES)
def test_codes(tmp_path: Path, error: Exception, freeze: int, thaw: int, doubt: bool) -> None:
    """`doubt`: the guest may freeze after all, so it is to be thawed."""
    freezing, records = make(tmp_path, error)
    with pytest.raises(AgentError) as caught:
        freezing.thaw(VM)
    assert caught.value.code == thaw
    with pytest.raises(AgentError) as caught:
        freezing.freeze(VM)
    assert caught.value.code == freeze
    assert [record.state for record in records.all()] == ([THAWING] if doubt else [])


def test_a_guest_that_has_to_be_thawed_is_not_forgotten(tmp_path: Path) -> None:
    """By a freeze that comes later, and of which its agent is not even asked."""
    freezing, records = make(tmp_path, VmError(Why.AGENT, "QEMU guest agent is not connected"))
    records.put(Record(VM, FREEZE, 0.0, THAWING, 2))
    with pytest.raises(AgentError):
        freezing.freeze(VM)
    assert records.all() == [Record(VM, FREEZE, 0.0, THAWING, 2)]


def test_a_vm_that_has_ended_is_not_thawed_for_ever(tmp_path: Path) -> None:
    freezing, records = make(tmp_path, LibvirtTimeout(call="freeze", seconds=1))
    with pytest.raises(LibvirtTimeout):
        freezing.freeze(VM)
    (record,) = records.all()
    assert freezing.due(record)
    assert not freezing.rescue(VM)  # tried again

    def down(vm: str) -> VmState:
        raise VMIsDown(vm=vm)

    freezing._registry.state = down  # type: ignore[method-assign]
    assert freezing.rescue(VM)
    assert records.all() == []
