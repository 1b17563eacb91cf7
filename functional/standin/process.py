# SPDX-License-Identifier: GPL-2.0-or-later
"""A stand-in as a process: started, told what to do, killed, and cleaned up after."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from functional.standin import loops

ROOT = Path(__file__).parents[2]  # of the source tree
ANSWER = 60.0  # seconds
STOP = 30.0


class Channel:
    """One connection to a stand-in; for one thread at a time.  Errors come as OSError."""

    def __init__(self, path: str) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.settimeout(ANSWER)
        self._socket.connect(path)
        self._file = self._socket.makefile("rwb")

    def call(self, do: str, **arguments: Any) -> Any:
        self._file.write(json.dumps({"do": do, **arguments}).encode() + b"\n")
        self._file.flush()
        line = self._file.readline()
        if not line:
            raise ConnectionResetError("the stand-in is gone")
        answer = json.loads(line)
        if not answer["ok"]:
            raise OSError(answer["errno"], answer["error"])
        return answer["result"]

    def close(self) -> None:
        self._file.close()
        self._socket.close()


class StandInProcess:
    """The device-mapper of one host, all its state below `directory`.

    Without `sync` nothing is flushed to the disk under the LUNs, which only matters to a machine
    that loses its power.
    """

    def __init__(self, directory: Path, sync: bool = True) -> None:
        self.dir = directory
        self._sync = sync
        self.process: subprocess.Popen[str] | None = None

    @property
    def socket(self) -> str:
        return str(self.dir / "socket")

    def start(self) -> None:
        environment = {
            **os.environ, "VDSM_STORAGE_TEST_AGENT": str(self.dir), "PYTHONPATH": str(ROOT)
        }  # fmt: skip
        self.process = subprocess.Popen(
            [
                *(sys.executable, "-P", "-m", "functional.standin.daemon", str(self.dir)),
                *(() if self._sync else ("--no-sync",)),
            ],
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True, env=environment,
            start_new_session=True,
        )  # fmt: skip
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == "ready\n", "the stand-in did not start"

    def call(self, do: str, **arguments: Any) -> Any:
        channel = Channel(self.socket)
        try:
            return channel.call(do, **arguments)
        finally:
            channel.close()

    def path(self, vg: str, lv: str) -> Path:
        """The link to the device of an active volume."""
        return self.dir / "dev" / vg / lv

    def activate(self, vg: str, lv: str, segments: Iterable[Sequence[Any]]) -> Path:
        self.call("activate", vg=vg, lv=lv, segments=list(segments))
        return self.path(vg, lv)

    def active(self, vg: str) -> dict[str, dict[str, Any]]:
        found: dict[str, dict[str, Any]] = self.call("active", vg=vg)
        return found

    def lun(self, device: str) -> str:
        """This host's own device for a LUN that all hosts share."""
        return str(self.call("lun", device=device))

    # -- harm --------------------------------------------------------------------------------

    def hang(self, target: str, *ops: str) -> None:
        """I/O waits until `resume`.  The target: "vg/lv", a device below the volumes, or "*"."""
        self.call("fault", target=target, mode="hang", ops=ops or ("read", "write"))

    def fail(self, target: str, *ops: str) -> None:
        """I/O fails with EIO until `resume`."""
        self.call("fault", target=target, mode="error", ops=ops or ("read", "write"))

    def resume(self, target: str) -> int:
        """Lift the fault; what hung is done now, and counted."""
        return int(self.call("fault", target=target, mode=""))

    def drop(self) -> int:
        """What hangs fails now; the faults stay."""
        return int(self.call("drop"))

    def held(self) -> int:
        """How many requests hang."""
        return int(self.call("held"))

    def kill(self) -> None:
        """kill -9: volumes that are open give errors."""
        assert self.process is not None
        self.process.send_signal(signal.SIGKILL)
        self.process.wait(STOP)

    # -- its end -----------------------------------------------------------------------------

    def stop(self) -> list[str]:
        """End it and clean up; what was still in use."""
        left = []
        if self.process is not None:
            with contextlib.suppress(OSError):
                left = self.call("shutdown")
            try:
                self.process.wait(STOP)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait(STOP)
            assert self.process.stdout is not None
            self.process.stdout.close()
            self.process = None
        self._clean()
        return left

    def _clean(self) -> None:
        """What a stand-in that was killed leaves."""
        mount = self.dir / "fuse"
        Path(loops.below_dev(str(self.dir))).unlink(missing_ok=True)
        for backing in Path("/sys/block").glob("loop*/loop/backing_file"):
            with contextlib.suppress(OSError):
                if backing.read_text().strip().startswith(f"{mount}/"):
                    loops.release(f"/dev/{backing.parts[3]}")
        lines = Path("/proc/self/mountinfo").read_text().splitlines()
        points = [line.split()[4] for line in lines]
        if str(mount) in points:
            subprocess.run(["umount", "--lazy", str(mount)], check=False, timeout=30)
