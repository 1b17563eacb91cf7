# SPDX-License-Identifier: GPL-2.0-or-later
"""An NBD server with one raw export: what an engine calls an external endpoint."""

from __future__ import annotations

import subprocess
import tempfile
import time
from pathlib import Path
from types import TracebackType
from typing import Any

MIB = 1024 * 1024


class NbdServer:
    """Serves `file` (of zeros at first) while the context lasts."""

    def __init__(self, directory: Path, size: int) -> None:
        self._place = Path(tempfile.mkdtemp(prefix="nbd", dir=directory))
        self.socket = self._place / "socket"
        self.file = self._place / "disk"
        with self.file.open("wb") as file:
            file.truncate(size)
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> NbdServer:
        argv = ["qemu-nbd", "--persistent", "--format=raw", f"--socket={self.socket}"]
        self._process = subprocess.Popen([*argv, str(self.file)], stdin=subprocess.DEVNULL)
        end = time.monotonic() + 20.0
        while not self.socket.exists():
            assert time.monotonic() < end, "qemu-nbd does not listen"
            time.sleep(0.02)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        assert self._process is not None
        self._process.terminate()
        self._process.wait(20)
        self.socket.unlink(missing_ok=True)

    @property
    def url(self) -> str:
        return f"nbd:unix:{self.socket}"

    def endpoint(self, domain: str, lease: str, generation: int, **more: Any) -> dict[str, Any]:
        return {
            "endpoint_type": "external", "url": self.url, "generation": generation,
            "lease": {"sd_id": domain, "lease_id": lease}, "format": "raw", "is_zero": False,
            **more,
        }  # fmt: skip
