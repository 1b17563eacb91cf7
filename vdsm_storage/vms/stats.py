# SPDX-License-Identifier: GPL-2.0-or-later
"""Statistics of VMs as engines read them, from one bulk call of libvirt's for all VMs.

Numbers travel as strings where engines cast (schema: RunningVmStats, VmDiskStats).  Rates and
latencies are those since the last time that the VM was asked for, and 0 the first time.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vdsm_storage.base.clock import Clock
from vdsm_storage.errors import LibvirtFailure, LibvirtTimeout, NoSuchVM, VMIsDown
from vdsm_storage.host.libvirt_model import (
    ENOSPC,
    IO_ERROR,
    PAUSED,
    STATUSES,
    BulkStats,
    VmError,
)
from vdsm_storage.host.libvirt_vms import LibvirtVms
from vdsm_storage.vms.drives import Drive
from vdsm_storage.vms.registry import Registry

PAUSE_UNKNOWN = "EOTHER"
NO_PAUSE = "NOERR"

Values = Mapping[str, Any]

log = logging.getLogger("vms.stats")


@dataclass(frozen=True)
class _Sample:
    when: float  # seconds, monotonic
    values: Values


class Statistics:
    """`freeze_age(vm)` tells for how many seconds a guest is frozen, None when it is not;
    `jobs(vm)` its block jobs."""

    def __init__(
        self,
        vms: LibvirtVms,
        registry: Registry,
        clock: Clock,
        freeze_age: Callable[[str], float | None],
        jobs: Callable[[str], dict[str, dict[str, Any]]],
    ) -> None:
        self._vms = vms
        self._registry = registry
        self._clock = clock
        self._freeze_age = freeze_age
        self._jobs = jobs
        self._lock = threading.Lock()
        self._samples: dict[str, _Sample] = {}

    def all(self) -> list[dict[str, Any]]:
        """Of every VM that runs.  Raises 59."""
        if not self._registry.enabled:
            return []
        found = self._bulk(())
        with self._lock:
            gone = self._samples.keys() - {each.id for each in found}
            for vm in gone:
                del self._samples[vm]
        return [one for each in found if (one := self._describe(each)) is not None]

    def one(self, vm: str) -> dict[str, Any]:
        """Raises NoSuchVM (1), VMIsDown (6), 59."""
        self._registry.state(vm)
        described = [self._describe(each) for each in self._bulk((vm,))]
        if not described or described[0] is None:
            raise VMIsDown(vm=vm)
        return described[0]

    def _bulk(self, vms: Sequence[str]) -> list[BulkStats]:
        try:
            try:
                return self._vms.stats(vms)
            except LibvirtTimeout as error:
                # The first one to ask a QEMU that has just begun to hang waits for it; libvirt
                # knows it from then on and tells the rest without it.
                log.warning("Statistics are asked for again: %s", error)
                return self._vms.stats(vms)
        except VmError as error:
            if vms:
                raise self._registry.gone(vms[0], error) from error
            raise LibvirtFailure(call="statistics of VMs", reason=error.text) from error

    def _describe(self, found: BulkStats) -> dict[str, Any] | None:
        """None for a VM that ended meanwhile."""
        values = found.values
        now = self._clock.monotonic()
        with self._lock:
            before = self._samples.get(found.id, _Sample(now, values))
            self._samples[found.id] = _Sample(now, values)
        jobs = self._jobs(found.id)  # first: when it has gone, the XML is right
        try:
            definition = self._registry.definition(found.id)
            if _moved(values, definition.drives):  # nothing tells of a snapshot made by others
                definition = self._registry.definition(found.id, fresh=True)
        except (NoSuchVM, VMIsDown):
            return None
        seconds = now - before.when
        state = int(values.get("state.state", 0))
        stats: dict[str, Any] = {
            "vmId": found.id,
            "vmName": found.name,
            "status": STATUSES.get(state, "Up"),
            "hash": definition.hash,
            "statusTime": str(round(now * 1000)),
            # No answer about any disk: its QEMU hangs.
            "monitorResponse": "0" if _answered(values, definition.drives) else "-1",
            "pauseCode": self.pause_code(found.id, state, int(values.get("state.reason", 0))),
            "vcpuCount": str(values.get("vcpu.current", 1)),
            "vmJobs": jobs,
            "disks": _disks(values, before.values, definition.drives, seconds),
            **_cpu(values, before.values, seconds),
            **_memory(values),
        }
        age = self._freeze_age(found.id)
        if age is not None:
            stats["freezeAge"] = f"{age:.1f}"
        return stats

    def pause_code(self, vm: str, state: int, reason: int) -> str:
        """NOERR unless a disk made the guest pause; then ENOSPC, or EOTHER."""
        if state != PAUSED or reason != IO_ERROR:
            return NO_PAUSE
        try:
            codes = set(self._vms.disk_errors(vm).values())
        except VmError:
            return PAUSE_UNKNOWN
        return ENOSPC if ENOSPC in codes else PAUSE_UNKNOWN


def _moved(values: Values, drives: Sequence[Drive]) -> bool:
    """Whether a disk has another file than the one that we know of."""
    paths = {drive.name: drive.path for drive in drives}
    for number in range(int(values.get("block.count", 0))):
        name = values.get(f"block.{number}.name")
        path = values.get(f"block.{number}.path", "")
        if name not in paths or (path and path != paths[name]):
            return True
    return False


def _answered(values: Values, drives: Sequence[Drive]) -> bool:
    return not drives or any(
        f"block.{number}.rd.reqs" in values for number in range(int(values.get("block.count", 0)))
    )


def _cpu(values: Values, before: Values, seconds: float) -> dict[str, str]:
    """Percent of one processor."""

    def load(key: str) -> str:
        used = int(values.get(key, 0)) - int(before.get(key, 0))
        return f"{max(0.0, used / 1e7 / seconds):.2f}" if seconds > 0 else "0.00"

    return {"cpuUser": load("cpu.user"), "cpuSys": load("cpu.system")}


def _memory(values: Values) -> dict[str, str]:
    """Percent of its memory that a guest with a balloon says it uses."""
    unused, available = values.get("balloon.unused"), values.get("balloon.available")
    if not available or unused is None:
        return {"memUsage": "0"}
    return {"memUsage": str(round(100 * (available - unused) / available))}


def _disks(
    values: Values, before: Values, drives: Sequence[Drive], seconds: float
) -> dict[str, dict[str, str]]:
    """By target.  libvirt's keys: block.<n>.name, .rd.reqs, .rd.bytes, .rd.times (ns), .wr.…,
    .fl.reqs, .fl.times, .allocation (highest byte written), .capacity, .physical."""
    known = {drive.name: drive for drive in drives}
    found: dict[str, dict[str, str]] = {}
    for number in range(int(values.get("block.count", 0))):
        key = f"block.{number}"
        drive = known.get(values.get(f"{key}.name", ""))
        if drive is None or f"{key}.rd.reqs" not in values:  # not told by a QEMU that hangs
            continue
        disk = _disk(values, before, key, seconds, block=drive.kind == "block")
        if drive.volume is not None:
            disk["imageID"] = drive.volume.image
        elif drive.device == "lun" or drive.path.startswith("/dev/mapper/"):
            disk["lunGUID"] = drive.path.rpartition("/")[2]
        found[drive.name] = disk
    return found


def _disk(
    values: Values, before: Values, key: str, seconds: float, *, block: bool
) -> dict[str, str]:
    def now(name: str) -> int:
        return int(values.get(f"{key}.{name}", 0))

    def since(name: str) -> int:
        """0 after the guest or its disks were made anew, and counting began again."""
        return max(0, now(name) - int(before.get(f"{key}.{name}", 0)))

    def rate(name: str) -> str:
        return f"{since(name) / seconds:.2f}" if seconds > 0 else "0.00"

    def latency(kind: str) -> str:
        requests = since(f"{kind}.reqs")
        return str(round(since(f"{kind}.times") / requests)) if requests else "0"

    return {
        # Of a file its blocks; a block device is taken as a whole.
        "truesize": str(now("physical" if block else "allocation")),
        "apparentsize": str(now("physical")),
        "written": str(now("allocation")),
        "readRate": rate("rd.bytes"),
        "writeRate": rate("wr.bytes"),
        "readOps": str(now("rd.reqs")),
        "writeOps": str(now("wr.reqs")),
        "readBytes": str(now("rd.bytes")),
        "writtenBytes": str(now("wr.bytes")),
        "readLatency": latency("rd"),
        "writeLatency": latency("wr"),
        "flushLatency": latency("fl"),
    }
