# SPDX-License-Identifier: GPL-2.0-or-later
"""For extend.py: what disks cost that nobody writes to.  Each runs in a process of its own.

libvirt is one that answers with what the real one does, built anew for each question: what it
costs libvirt's library to receive that is not in it.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import tracemalloc
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from functional.standin.process import ROOT
from vdsm_storage.base.clock import SystemClock
from vdsm_storage.base.lanes import Lanes
from vdsm_storage.config import Thin as Settings
from vdsm_storage.host.libvirt_model import VmState
from vdsm_storage.host.libvirt_thresholds import LibvirtThresholds
from vdsm_storage.monitor import thin_drive as td
from vdsm_storage.monitor.thin import Thin, policy_of
from vdsm_storage.monitor.thin_drive import Watched
from vdsm_storage.monitor.thin_history import History
from vdsm_storage.monitor.thin_tools import ThinTools
from vdsm_storage.vms.registry import Registry

MIB = 1024**2
GIB = 1024**3
DISKS = 4  # of a VM
SIZE, ALLOCATION, THRESHOLD = 1024 * MIB, 300 * MIB, 768 * MIB
DOMAIN = str(uuid.UUID(int=1))
SCANS = 5
RUNNING = 1
XML = """<domain type='kvm'><name>{vm}</name><uuid>{vm}</uuid><devices>{disks}
<channel type='unix'><target type='virtio' name='org.qemu.guest_agent.0' state='connected'/>
</channel></devices></domain>"""
DISK = """<disk type='block' device='disk'>
<driver name='qemu' type='qcow2' cache='none' error_policy='stop' io='native'/>
<source dev='{path}' index='1'/><backingStore/><target dev='vd{letter}' bus='virtio'/>
<serial>{image}</serial><alias name='ua-{image}'/></disk>"""


@dataclass(frozen=True)
class Vm:
    id: str
    paths: Sequence[str]

    def UUIDString(self) -> str:  # noqa: N802 - as libvirt's
        return self.id

    def stats(self) -> dict[str, Any]:
        """As libvirt's bulk call has them."""
        found: dict[str, Any] = {"block.count": len(self.paths)}
        for number, path in enumerate(self.paths):
            key = f"block.{number}"
            found[f"{key}.name"] = f"vd{'abcd'[number]}"
            found[f"{key}.path"] = path
            found[f"{key}.backingIndex"] = 1
            for what in ("rd", "wr", "fl"):
                found |= {f"{key}.{what}.{each}": 12345678 for each in ("reqs", "bytes", "times")}
            found[f"{key}.allocation"] = ALLOCATION
            found[f"{key}.capacity"] = 100 * GIB
            found[f"{key}.physical"] = SIZE
            found[f"{key}.threshold"] = THRESHOLD
        return found


class Connection:
    """What is asked of libvirt's own, and LibvirtVms."""

    enabled = True

    def __init__(self, disks: int) -> None:
        self.vms = [new_vm() for _ in range(disks // DISKS)]

    def getAllDomainStats(self, _kinds: int, _flags: int) -> list[Any]:  # noqa: N802
        return [(vm, vm.stats()) for vm in self.vms]

    def all(self) -> list[VmState]:
        return [VmState(vm.id, vm.id, RUNNING, 0) for vm in self.vms]

    def xml(self, wanted: str) -> str:
        vm = next(vm for vm in self.vms if vm.id == wanted)
        disks = "".join(
            DISK.format(path=path, letter="abcd"[number], image=path.split("/")[-2])
            for number, path in enumerate(vm.paths)
        )
        return XML.format(vm=vm.id, disks=disks)

    def watch(self, *_callbacks: object) -> None: ...


class Thresholds(LibvirtThresholds):
    """The product's, without the thread in which libvirt is called."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def _call(self, _what: str, call: Callable[[Any], Any], _timeout: float | None = None) -> Any:
        return call(self._connection)

    def watch_writes(self, *_callbacks: object) -> None: ...


class NoThrottles:
    def lift(self, _vm: str, _disk: str) -> None: ...

    def lowered(self) -> list[tuple[str, str]]:
        return []


def new_vm() -> Vm:
    domain, ids = DOMAIN, [(uuid.uuid4(), uuid.uuid4()) for _ in range(DISKS)]
    folder = f"/rhev/data-center/mnt/blockSD/{domain}/images"
    return Vm(str(uuid.uuid4()), [f"{folder}/{image}/{volume}" for image, volume in ids])


def service(directory: str, disks: int) -> tuple[Thin, ThinTools, Registry]:
    connection = Connection(disks)
    registry = Registry(cast(Any, connection))
    settings = Settings()
    tools = ThinTools(
        registry, Thresholds(connection), cast(Any, None), cast(Any, None),
        cast(Any, NoThrottles()), History(directory), policy_of(settings), settings,
        Lanes(SystemClock()), SystemClock(), lambda _name, _facts: None, lambda _point: None,
    )  # fmt: skip
    return Thin(tools), tools, registry


def watch(tools: ThinTools, registry: Registry) -> None:
    """All disks, as if they had been found and armed."""
    now = tools.clock.monotonic()
    for state in registry.running():
        for drive in registry.definition(state.id).drives:
            assert drive.volume is not None
            new = Watched(state.id, drive.name, drive.alias)
            each = new.successor(drive.node, drive.volume)
            each.size, each.limit = SIZE, 110 * GIB
            each.saw(now, ALLOCATION)
            each.plan(tools.policy, now, tools.tail(DOMAIN))
            each.threshold, each.state = THRESHOLD, td.ARMED
            tools.board.add(each)


# -- in processes of their own --------------------------------------------------------------------


def idle(disks: int, seconds: float) -> dict[str, float]:
    """CPU and system calls of nothing, and of looks at all of them."""
    directory = tempfile.mkdtemp(prefix="vdsm-idle-")
    try:
        thin, tools, registry = service(directory, disks)
        watch(tools, registry)
        thin.start()
        before, switches = cpu(), switched()
        time.sleep(seconds)
        asleep, woken = cpu() - before, switched() - switches
        scanned = []
        looking = thin._looking
        looking._look_at_all()
        for _ in range(SCANS):
            before = cpu()
            looking._look_at_all()
            scanned.append(cpu() - before)
        calls = system_calls(looking._look_at_all)
        if any(each.state != td.ARMED for each in tools.board.all()):
            raise SystemExit("a disk that nobody writes to is not armed any more")
        return {
            "asleep": asleep, "seconds": seconds, "switches": woken,
            "scan": statistics.median(scanned), "interval": tools.settings.scan_interval,
            "scan_calls": calls,
        }  # fmt: skip
    finally:
        shutil.rmtree(directory)


def memory(disks: int, traced: bool) -> dict[str, float]:
    """Bytes of a disk that is watched; what is known of its VM anyway is not in it."""
    directory = tempfile.mkdtemp(prefix="vdsm-idle-")
    try:
        _thin, tools, registry = service(directory, disks)
        for state in registry.running():
            registry.definition(state.id)
        if traced:
            tracemalloc.start()
        before = tracemalloc.get_traced_memory()[0] if traced else resident()
        watch(tools, registry)
        after = tracemalloc.get_traced_memory()[0] if traced else resident()
        return {"bytes": (after - before) / len(tools.board.all())}
    finally:
        shutil.rmtree(directory)


def cpu() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def switched() -> int:
    """Times that any thread of this process was woken."""
    found = 0
    for status in Path("/proc/self/task").glob("*/status"):
        text = status.read_text()
        found += int(text.partition("\nvoluntary_ctxt_switches:")[2].split()[0])
    return found


def system_calls(work: Callable[[], None]) -> int:
    """Of this process, while it does `work`; -1 without strace."""
    if shutil.which("strace") is None:
        return -1
    with tempfile.NamedTemporaryFile("r", prefix="vdsm-idle-") as out:
        argv = ["strace", "-f", "-qq", "-o", out.name, "-p", str(os.getpid())]
        tracer = subprocess.Popen(argv, stderr=subprocess.DEVNULL)
        while not traced_by(tracer.pid):
            if tracer.poll() is not None:
                return -1  # this kernel does not let us
            time.sleep(0.01)
        mark = out.name + ".mark"
        os.access(mark + "1", os.F_OK)
        work()
        os.access(mark + "2", os.F_OK)
        tracer.terminate()
        tracer.wait(30)
        lines = out.read().splitlines()
    begin = next(number for number, line in enumerate(lines) if ".mark1" in line)
    end = next(number for number, line in enumerate(lines) if ".mark2" in line)
    return end - begin - 1


def traced_by(tracer: int) -> bool:
    tasks = Path("/proc/self/task").glob("*/status")
    return all(f"TracerPid:\t{tracer}\n" in task.read_text() for task in tasks)


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")


def begin(function: str, *arguments: object) -> subprocess.Popen[str]:
    """One of these, in a process of its own."""
    code = (
        f"import json, sys; sys.path.append({str(ROOT)!r})\n"
        f"from benchmarks import extend_idle\n"
        f"print(json.dumps(extend_idle.{function}(*{arguments!r})))"
    )
    argv = [sys.executable, "-P", "-c", code]
    return subprocess.Popen(argv, stdout=subprocess.PIPE, text=True)


def result(process: subprocess.Popen[str]) -> dict[str, float]:
    text, _ = process.communicate(timeout=300)
    if process.returncode:
        raise SystemExit("a measurement of idle disks failed")
    found: dict[str, float] = json.loads(text)
    return found
