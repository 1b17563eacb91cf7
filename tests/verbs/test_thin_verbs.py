# SPDX-License-Identifier: GPL-2.0-or-later
"""Disks that grow, in the statistics of VMs."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from vdsm_storage.schema.loader import Schema
from vdsm_storage.schema.replies import compile_reply
from vdsm_storage.verbs import host, vm
from vdsm_storage.verbs.context import Context

VM = "8d6a1f0e-0000-4000-8000-000000000001"
DOWN = "8d6a1f0e-0000-4000-8000-000000000002"
GROWS = {
    "state": "at limit", "size": "4096", "allocation": "10", "threshold": "0", "headroom": "5",
    "chunk": "6", "limit": "4096", "writeRate": "1.5", "extends": "2", "lastLatency": "0.01",
    "maxLatency": "0.2", "events": "2", "pauses": "0", "pausesAvoided": "1", "throttleTime": "0.0",
    "throttle": "0",
}  # fmt: skip
MORE = {"timeToFull": "12.5", "error": "no space"}


class Watching:
    def history(self, vm: str, drive: str, since: float) -> dict[str, Any]:
        raise AssertionError((vm, drive, since))

    def stats(self, vm: str) -> dict[str, dict[str, str]]:
        assert vm == VM
        return {"vda": GROWS, "sdc": {**GROWS, **MORE}, "gone": GROWS}


def rows() -> list[dict[str, Any]]:
    up = {
        "vmId": VM, "vmName": "a", "status": "Up", "hash": "1", "statusTime": "5",
        "monitorResponse": "0", "pauseCode": "NOERR", "vcpuCount": "1", "vmJobs": {},
        "disks": {"vda": {"truesize": "1"}, "vdb": {"truesize": "1"}, "sdc": {"truesize": "1"}},
        "cpuUser": "0.00", "cpuSys": "0.00", "memUsage": "0",
    }  # fmt: skip
    return [up, {"vmId": DOWN, "status": "Down", "exitCode": 0, "exitMessage": "ended"}]


@pytest.fixture
def ctx() -> Context:
    found = rows()
    vms = SimpleNamespace(all_stats=lambda: found, one_stats=lambda _vm: found[0])
    services: Any = SimpleNamespace(vms=vms, thin=Watching())
    return Context(services)


@pytest.mark.parametrize("name", ["Host.getAllVmStats", "VM.getStats"])
def test_what_is_watched_is_told_with_its_disk(ctx: Context, name: str) -> None:
    told = vm.getStats(ctx, VM) if name == "VM.getStats" else host.getAllVmStats(ctx)
    disks = told[0]["disks"]
    assert {drive: disk.get("thin") for drive, disk in disks.items()} == {
        "vda": GROWS, "vdb": None, "sdc": {**GROWS, **MORE},
    }  # fmt: skip
    assert all(disk["truesize"] == "1" for disk in disks.values())
    assert problems_of(disks["sdc"]["thin"]) == []
    assert told[1:] == rows()[1:] if name != "VM.getStats" else len(told) == 1


@pytest.mark.parametrize(
    ("key", "wrong"),
    [("state", "idle"), ("size", 4096), ("writeRate", "fast"), ("timeToFull", 1.0), ("more", "1")],
)
def test_what_would_break_a_reader_is_found(key: str, wrong: object) -> None:
    assert problems_of({**GROWS, **MORE}) == []
    (problem,) = problems_of({**GROWS, **MORE, key: wrong})
    assert f".{key}" in problem


def problems_of(thin: object) -> list[str]:
    """By the schema; checked alone, for an answer of Host.getAllVmStats may be of several forms."""
    schema = Schema()
    verb = replace(schema.verb("VM.getStats"), returns="VmDiskThin")
    check = compile_reply(schema, verb)
    problems: list[str] = []
    assert check is not None
    check(thin, "thin", problems)
    return problems
