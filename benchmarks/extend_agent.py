# SPDX-License-Identifier: GPL-2.0-or-later
"""For extend.py: an agent that can also be told what happens to disks that no libvirt knows.

It is the product's agent, with a second thin provisioning beside its own.  That one is the
product's as well, down to the lease, lvm and the devices; only libvirt is a few lines here: it
answers at once, or asks a QEMU by its own monitor.  A socket takes JSON lines, as the stand-in of
functional/ does:

    {"do": "watch", "drives": [[vm, domain, image, volume], ...], "policy": {...},
     "qmp": {vm: path, ...}, "latencies": [seconds, ...]}
    {"do": "cross"}      every guest has just written past its threshold
    {"do": "settled"}    -> whether all have what they want, and are armed again
    {"do": "facts"}      -> how each is; how often they were slowed
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import logging
import os
import socket
import socketserver
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from benchmarks.loop_volumes import Pieces
from vdsm_storage import __main__ as program
from vdsm_storage.agent import Agent
from vdsm_storage.errors import NoSuchVM
from vdsm_storage.host.libvirt_model import VmState
from vdsm_storage.host.libvirt_thresholds import Crossed, Extent
from vdsm_storage.monitor import thin_drive as td
from vdsm_storage.monitor.extend import Extender
from vdsm_storage.monitor.thin import Thin
from vdsm_storage.monitor.thin_drive import Watched
from vdsm_storage.monitor.thin_tools import ThinTools
from vdsm_storage.monitor.watermark import Policy
from vdsm_storage.vms.drives import VolumePath

RUNNING = 1
NODE = "vda[1]"
STORAGE = "storage"  # QEMU's name of the node that is the device


class Monitor:
    """QMP of one QEMU; `event(name, data)` comes from a thread of its own."""

    def __init__(self, path: str, event: Callable[[str, dict[str, Any]], None]) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.connect(path)
        self._file = self._socket.makefile("rwb")
        self._event = event
        self._turn = threading.Lock()
        self._answered = threading.Semaphore(0)
        self._answer: dict[str, Any] = {}
        json.loads(self._file.readline())  # its greeting
        threading.Thread(target=self._read, name="qmp", daemon=True).start()
        self.call("qmp_capabilities")

    def call(self, command: str, **arguments: Any) -> Any:
        with self._turn:
            text = json.dumps({"execute": command, "arguments": arguments})
            self._file.write(text.encode() + b"\n")
            self._file.flush()
            self._answered.acquire()
            if "return" not in self._answer:
                raise OSError(f"{command}: {self._answer}")
            return self._answer["return"]

    def _read(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            for line in self._file:
                found = json.loads(line)
                if "event" in found:
                    self._event(found["event"], found.get("data", {}))
                else:
                    self._answer = found
                    self._answered.release()
        self._answer = {}
        self._answered.release()

    def close(self) -> None:
        self._socket.shutdown(socket.SHUT_RDWR)


class Hypervisor:
    """In place of libvirt: LibvirtThresholds, the registry of VMs, and Throttles.

    `devices` has the paths of what guests write to.  A VM with a path in `qmp` is a QEMU that is
    asked and listened to; others write exactly what `cross` says.
    """

    enabled = True

    def __init__(self, devices: Mapping[str, str], qmp: Mapping[str, str]) -> None:
        self._fds = {vm: os.open(path, os.O_RDONLY) for vm, path in devices.items()}
        self._written = dict.fromkeys(devices, 0)
        self.crossed: Callable[[Crossed], None] = lambda crossed: None
        self.slowed = 0  # times
        self._monitors = {
            vm: Monitor(path, functools.partial(self._told, vm)) for vm, path in qmp.items()
        }

    # -- events ------------------------------------------------------------------------------

    def watch_writes(
        self, crossed: Callable[[Crossed], None], _full: Callable[[str, str], None]
    ) -> None:
        self.crossed = crossed

    def watch(self, *_callbacks: object) -> None: ...

    def when_changed(self, _callback: object) -> None: ...

    def _told(self, vm: str, name: str, data: dict[str, Any]) -> None:
        if name == "BLOCK_WRITE_THRESHOLD" and data["node-name"] == STORAGE:
            offset = data["write-threshold"] + data["amount-exceeded"]
            self.crossed(Crossed(vm, NODE, offset))

    def cross(self, vm: str, offset: int) -> None:
        self._written[vm] = offset
        self.crossed(Crossed(vm, NODE, offset))

    # -- what is asked -----------------------------------------------------------------------

    def arm(self, vm: str, _node: str, offset: int, _timeout: float) -> None:
        if vm in self._monitors:
            how = {"node-name": STORAGE, "write-threshold": offset}
            self._monitors[vm].call("block-set-write-threshold", **how)

    def written(self, vm: str, _target: str) -> tuple[int, int]:
        if vm in self._monitors:
            found = self._monitors[vm].call("query-blockstats", **{"query-nodes": True})
            stats = {each.get("node-name"): each["stats"] for each in found}
            self._written[vm] = stats[STORAGE]["wr_highest_offset"]
        return self._written[vm], os.lseek(self._fds[vm], 0, os.SEEK_END)

    def extents(self, _vms: Sequence[str] = ()) -> Mapping[str, Mapping[str, Extent]]:
        return {}

    def state(self, vm: str) -> VmState:
        return VmState(vm, vm, RUNNING, 0)

    def definition(self, vm: str, *, fresh: bool = False) -> Any:
        raise NoSuchVM(vm=vm)

    def running(self) -> list[VmState]:
        return []

    def lower(self, _vm: str, _disk: str, _rate: int) -> None:
        self.slowed += 1

    def lift(self, _vm: str, _disk: str) -> None: ...

    def forget(self, _vm: str) -> None: ...

    def lowered(self) -> list[tuple[str, str]]:
        return []

    def close(self) -> None:
        for monitor in self._monitors.values():
            monitor.close()
        for fd in self._fds.values():
            os.close(fd)


class Counting:
    """An Extender that counts how often it is asked."""

    def __init__(self, extender: Extender) -> None:
        self._extender = extender
        self.batches = 0

    def extend_many(self, *arguments: Any) -> Any:
        self.batches += 1
        return self._extender.extend_many(*arguments)


class Bench:
    """The second thin provisioning; `tools` are those of the first."""

    def __init__(self, tools: ThinTools, path: Callable[[str, str], str]) -> None:
        self._tools = tools
        self._path = path
        self._hypervisor: Hypervisor | None = None
        self._thin: Thin | None = None
        self._drives: list[Watched] = []
        self._counting = Counting(tools.extender)

    def command(self, line: bytes) -> dict[str, Any]:
        request = json.loads(line)
        try:
            return {"ok": True, "result": getattr(self, f"do_{request.pop('do')}")(**request)}
        except Exception as error:
            logging.getLogger("bench").exception("A command of the benchmark failed")
            return {"ok": False, "errno": 5, "error": repr(error)}

    def do_watch(
        self, drives: list[list[str]], policy: dict[str, Any], qmp: dict[str, str],
        latencies: list[float],
    ) -> None:  # fmt: skip
        self.do_forget()
        policy_ = Policy(**policy)
        devices = {vm: self._path(domain, volume) for vm, domain, _, volume in drives}
        hypervisor = self._hypervisor = Hypervisor(devices, qmp)
        counting = self._counting = Counting(self._tools.extender)
        any_ = cast(Any, hypervisor)
        tools = replace(
            self._tools, registry=any_, libvirt=any_, throttles=any_, policy=policy_,
            extender=cast(Any, counting), board=td.Board(),
            settings=replace(self._tools.settings, throttle=bool(qmp)),
        )  # fmt: skip
        thin = self._thin = Thin(tools)
        thin.start()
        for vm, domain, image, volume in drives:
            for seconds in latencies:
                tools.latencies[domain].add(seconds)
            new = Watched(vm, "vda", "ua-disk")
            each = new.successor(NODE, VolumePath(domain, image, volume))
            allocation, each.size = hypervisor.written(vm, "vda")
            each.limit = 1 << 50
            each.saw(tools.clock.monotonic(), allocation)
            tools.board.add(each)
            self._drives.append(each)
            thin._extending.arm_again(each)

    def do_forget(self) -> None:
        if self._thin is not None and self._hypervisor is not None:
            self._thin.close()
            self._hypervisor.close()
        self._thin, self._hypervisor, self._drives = None, None, []

    def do_cross(self) -> None:
        assert self._hypervisor is not None
        for each in self._drives:
            self._hypervisor.cross(each.vm, each.threshold)

    def do_settled(self) -> bool:
        return all(each.state == td.ARMED and not each.due for each in self._drives)

    def do_facts(self) -> dict[str, Any]:
        assert self._hypervisor is not None
        return {
            "latencies": [each.last_latency for each in self._drives],
            "slowest": max(each.max_latency for each in self._drives),
            "extends": sum(each.extends for each in self._drives),
            "pauses": sum(each.pauses for each in self._drives),
            "headroom": max(each.headroom for each in self._drives),
            "errors": sorted({each.error for each in self._drives if each.error}),
            "slowed": self._hypervisor.slowed,
            "batches": self._counting.batches,
            "drives": {
                each.vm: {"extends": each.extends, "slowest": each.max_latency}
                for each in self._drives
            },
        }


class BenchAgent(Agent):
    control = ""  # path of the socket

    def _thin_provisioning(self, *arguments: Any) -> Thin:
        thin = super()._thin_provisioning(*arguments)

        def path(domain: str, volume: str) -> str:
            activation = self._activation
            return activation.path(domain, volume) if activation else f"/dev/{domain}/{volume}"

        server = Server(self.control, Bench(thin._tools, path))
        threading.Thread(target=server.serve_forever, name="bench", daemon=True).start()
        return thin


class Server(socketserver.ThreadingMixIn, socketserver.UnixStreamServer):
    daemon_threads = True

    def __init__(self, path: str, bench: Bench) -> None:
        self.bench = bench
        super().__init__(path, Handler)


class Handler(socketserver.StreamRequestHandler):
    server: Server

    def handle(self) -> None:
        for line in self.rfile:
            self.wfile.write(json.dumps(self.server.bench.command(line)).encode() + b"\n")


def main() -> int:
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--pieces")
    parser.add_argument("--control")
    options, rest = parser.parse_known_args()
    BenchAgent.control = options.control
    activation = Pieces(Path(options.pieces)) if options.pieces else None
    return program.main(rest, functools.partial(BenchAgent, activation=activation))
