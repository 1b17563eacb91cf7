# SPDX-License-Identifier: GPL-2.0-or-later
"""The device-mapper of one "host", on a kernel that has none; for tests only.

    python -P -m functional.standin.daemon DIRECTORY [--no-sync]

It outlives the agent, as mapped devices do.  Its child (mapper.py) is a FUSE file system with one
file an active volume; a loop device on each file makes a true block device of it, and
DIRECTORY/dev/<vg>/<lv> is a link to that device.  DIRECTORY/socket takes JSON lines:

    {"do": "activate", "vg": VG, "lv": LV, "segments": [[device, offset, length], ...]}
    {"do": "refresh", ...the same}   an active volume gets a new mapping and size, while in use
    {"do": "deactivate", "vg": VG, "lv": LV}    EBUSY when somebody has it open, as in device-mapper
    {"do": "active", "vg": VG, "users": true}  -> {lv: {"size": bytes, "device": path, "users": []}}
    {"do": "lun", "device": DEVICE}   -> a device of this host's own for a LUN that all hosts share
    {"do": "fault", "target": TARGET, "mode": "hang" | "error" | "", "ops": ["read", "write"]}
    {"do": "drop"}                              requests that hang fail now; the fault stays
    {"do": "clear"}                             all faults are lifted
    {"do": "held"}                              how many requests hang
    {"do": "shutdown"}

TARGET is "vg/lv", "*", or a physical volume's device: all on it has the fault.  The device
may be named as all hosts see it, or by this host's own device for it; what reads and writes the LUN
itself (LVM) has the fault only if it uses the latter.  The answer is {"ok": true, "result": ...} or
{"ok": false, "errno": N, "error": text}.

The child exists because a process that opens its own FUSE files cannot always be killed.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import signal
import socketserver
import subprocess
import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from functional.standin import loops

PATIENCE: Final = 1.0  # seconds that a device may still be open by a program that ends
SEPARATOR: Final = "@"  # in no name of LVM's
LUNS: Final = "luns"  # the group of the devices that stand for whole LUNs
BOTH: Final = ("read", "write")


@dataclass
class Active:
    """An active volume; `lock` is held while it comes, changes or goes."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    device: str = ""
    size: int = 0


class StandIn:
    def __init__(self, directory: Path, options: Sequence[str]) -> None:
        self._mount = directory / "fuse"
        self._dev = directory / "dev"
        for path in (self._mount, self._dev):
            path.mkdir(parents=True, exist_ok=True)
        self._lock = threading.Lock()
        self._active: dict[tuple[str, str], Active] = {}
        self._luns: dict[str, str] = {}  # this host's device -> the shared one
        self._pipe = threading.Lock()
        self._attaching = threading.Lock()  # or our threads would snatch devices from each other
        self._mapper = subprocess.Popen(
            [sys.executable, "-P", "-m", "functional.standin.mapper", str(self._mount),
             *options],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True,
        )  # fmt: skip
        assert self._mapper.stdout is not None
        if self._mapper.stdout.readline() != "ready\n":
            raise SystemExit("the mapper did not start")

    def _map(self, do: str, **arguments: Any) -> Any:
        with self._pipe:
            assert self._mapper.stdin is not None
            assert self._mapper.stdout is not None
            self._mapper.stdin.write(json.dumps({"do": do, **arguments}) + "\n")
            self._mapper.stdin.flush()
            answer = json.loads(self._mapper.stdout.readline() or '{"ok": false, "errno": 107}')
        if not answer["ok"]:
            raise OSError(answer["errno"], answer.get("error", "the mapper is gone"))
        return answer["result"]

    # -- commands ----------------------------------------------------------------------------

    def command(self, line: bytes) -> dict[str, Any]:
        request = json.loads(line)
        try:
            return {"ok": True, "result": getattr(self, f"do_{request.pop('do')}")(**request)}
        except OSError as error:
            return {"ok": False, "errno": error.errno or errno.EIO, "error": str(error)}

    def do_activate(self, vg: str, lv: str, segments: list[Any]) -> str:
        """The device."""
        active = self._entry(vg, lv)
        with active.lock:
            if active.device:
                return active.device
            name = f"{vg}{SEPARATOR}{lv}"
            active.size = self._map("map", name=name, segments=self._shared(segments))
            try:
                with self._attaching:
                    active.device = loops.attach(str(self._mount / name))
            except OSError:
                self._map("unmap", name=name)
                raise
            link = self._dev / vg / lv
            link.parent.mkdir(exist_ok=True)
            link.unlink(missing_ok=True)
            link.symlink_to(active.device)
            return active.device

    def do_lun(self, device: str) -> str:
        with loops.opened(device) as fd:
            size = os.lseek(fd, 0, os.SEEK_END)
        name = os.path.basename(device)
        own = self.do_activate(LUNS, name, [[device, 0, size]])
        self._luns[own] = device
        return own

    def _shared(self, segments: list[Any]) -> list[Any]:
        """A volume's mapping does not go through our own file system a second time."""
        return [[self._luns.get(device, device), *rest] for device, *rest in segments]

    def do_refresh(self, vg: str, lv: str, segments: list[Any]) -> None:
        active = self._entry(vg, lv)
        with active.lock:
            if active.device:
                name = f"{vg}{SEPARATOR}{lv}"
                active.size = self._map("map", name=name, segments=self._shared(segments))
                os.stat(self._mount / name)  # the kernel learns the file's size
                loops.grow(active.device)

    def do_deactivate(self, vg: str, lv: str) -> None:
        active = self._entry(vg, lv)
        with active.lock:
            if not active.device:
                return
            try:
                loops.detach_patiently(active.device, PATIENCE)
            except OSError as error:
                who = ", ".join(loops.users().get(active.device, ()))
                raise OSError(error.errno, f"{vg}/{lv} is in use: {who or error}") from error
            active.device = ""
            self._map("unmap", name=f"{vg}{SEPARATOR}{lv}")
            (self._dev / vg / lv).unlink(missing_ok=True)

    def do_active(self, vg: str, users: bool = True) -> dict[str, dict[str, Any]]:
        with self._lock:
            found = {lv: one for (group, lv), one in self._active.items() if group == vg}
        who = loops.users() if users and any(one.device for one in found.values()) else {}
        return {
            lv: {"size": one.size, "device": one.device, "users": who.get(one.device, [])}
            for lv, one in found.items()
            if one.device
        }

    def do_fault(self, target: str, mode: str, ops: tuple[str, ...] = BOTH) -> int:
        """How many requests that hung were done now."""
        lv = not target.startswith("/") and target != "*"
        name = target.replace("/", SEPARATOR) if lv else "*"
        device = "*" if lv or target == "*" else self._luns.get(target, target)
        return int(self._map("fault", name=name, device=device, mode=mode, ops=ops))

    def do_clear(self) -> int:
        return int(self._map("clear"))

    def do_drop(self) -> int:
        return int(self._map("drop"))

    def do_held(self) -> int:
        return int(self._map("held"))

    def do_ping(self) -> int:
        return os.getpid()

    def do_shutdown(self) -> list[str]:
        """Nothing hangs any more, everything is detached; what could not be."""
        with contextlib.suppress(OSError):
            self.do_clear()
        left = []
        for (vg, lv), active in list(self._active.items()):
            try:
                self.do_deactivate(vg, lv)
            except OSError as error:
                left.append(f"{active.device}: {error}")
                loops.release(active.device)
        return left

    def close(self) -> None:
        """The file system goes with its server."""
        self._mapper.kill()
        self._mapper.wait(30)
        subprocess.run(["umount", "--lazy", str(self._mount)], check=False, timeout=30)

    def _entry(self, vg: str, lv: str) -> Active:
        with self._lock:
            return self._active.setdefault((vg, lv), Active())


class Server(socketserver.ThreadingMixIn, socketserver.UnixStreamServer):
    daemon_threads = True
    request_queue_size = 100

    def __init__(self, path: str, standin: StandIn) -> None:
        self.standin = standin
        super().__init__(path, Handler)


class Handler(socketserver.StreamRequestHandler):
    server: Server

    def handle(self) -> None:
        for line in self.rfile:
            answer = self.server.standin.command(line)
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                self.wfile.write(json.dumps(answer).encode() + b"\n")
            if b'"shutdown"' in line:
                threading.Thread(target=self.server.shutdown, daemon=True).start()
                return


def main() -> int:
    directory = Path(sys.argv[1])
    directory.mkdir(parents=True, exist_ok=True)
    standin = StandIn(directory, sys.argv[2:])
    path = directory / "socket"
    path.unlink(missing_ok=True)
    with Server(str(path), standin) as server:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # it ends by `shutdown` only
        sys.stdout.write("ready\n")
        sys.stdout.flush()
        server.serve_forever(poll_interval=0.1)
    standin.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
