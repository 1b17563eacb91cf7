# SPDX-License-Identifier: GPL-2.0-or-later
"""A merge whose libvirt fails now and then, as it does while a VM ends."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from vdsm_storage.base.clock import SystemClock
from vdsm_storage.errors import (
    AgentError,
    LibvirtFailure,
    LibvirtTimeout,
    LibvirtUnavailable,
    MergeFailed,
)
from vdsm_storage.jobs.journal import JOB, Entry, Journal
from vdsm_storage.jobs.operation import CrashPoints, Kind, Operation
from vdsm_storage.vms import merge
from vdsm_storage.vms.merge import FAILURES, Merges, Tools

FAILS = LibvirtFailure(call="VM", reason="End of file from qemu monitor")
AWAY = (
    LibvirtUnavailable(uri="qemu", reason="it is away"),
    LibvirtTimeout(call="VM", seconds=1),
)


@pytest.fixture
def op(tmp_path: Path) -> Operation:
    entry = Entry("job", JOB, "vm.merge", "VM.merge", {}, [])
    kind = Kind("vm.merge", (), lambda op: None, lambda op: False)
    return Operation(kind, entry, Journal(str(tmp_path)), CrashPoints())


@pytest.fixture
def merges(monkeypatch: pytest.MonkeyPatch) -> Merges:
    monkeypatch.setattr(merge, "LOOK", (0.001, 0.002))
    made = object.__new__(Merges)
    made._tools = cast(Tools, SimpleNamespace(clock=SystemClock()))
    return made


def looks(*errors: AgentError) -> Any:
    """Raises each of them, then answers."""
    left: Iterator[AgentError] = iter(errors)

    def look() -> str:
        if (error := next(left, None)) is not None:
            raise error
        return "answer"

    return look


def test_it_is_looked_again(merges: Merges, op: Operation) -> None:
    few = [FAILS] * (FAILURES - 1)
    assert merges._patiently(op, looks(*few, *AWAY * 9)) == "answer"


def test_what_stays_wrong_is_told(merges: Merges, op: Operation) -> None:
    with pytest.raises(LibvirtFailure, match="End of file"):
        merges._patiently(op, looks(*[FAILS] * FAILURES))


def test_what_no_look_changes_is_told_at_once(merges: Merges, op: Operation) -> None:
    with pytest.raises(MergeFailed):
        merges._patiently(op, looks(MergeFailed(top="t", base="b", reason="no such disk")))
