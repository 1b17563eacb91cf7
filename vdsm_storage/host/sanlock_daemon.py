# SPDX-License-Identifier: GPL-2.0-or-later
"""A sanlock daemon of the agent's own, for `--dev`: no watchdog, no privileges, its files in one
directory.  It outlives an agent that is killed and is found again by the next one, so that leases
and host ids go on meanwhile.
"""

from __future__ import annotations

import contextlib
import grp
import logging
import os
import pwd
import signal
import socket
import subprocess
import time
from typing import Final

from vdsm_storage.base.files import write_atomic
from vdsm_storage.base.uuids import new_uuid
from vdsm_storage.errors import SanlockDaemonError

log = logging.getLogger("sanlock")

PID_FILE: Final = "sanlock.pid"  # the daemon writes it and locks it
SOCKET: Final = "sanlock.sock"
LOG_FILE: Final = "sanlock.log"  # of this run; the daemon says a few lines a lease
NAME_FILE: Final = "host_name"
START: Final = 20.0  # seconds
STOP: Final = 10.0  # seconds for a daemon to end after SIGTERM
POLL: Final = 0.02


class SanlockDaemon:
    """The daemon whose run directory is `directory` (made if missing)."""

    def __init__(self, directory: str, io_timeout: int = 10) -> None:
        self.directory = directory
        self._io_timeout = io_timeout
        self._process: subprocess.Popen[bytes] | None = None

    def pid(self) -> int | None:
        """The daemon's process id; None when it does not run."""
        try:
            with open(os.path.join(self.directory, PID_FILE), encoding="ascii") as file:
                pid = int(file.read().strip() or 0)
            with open(f"/proc/{pid}/environ", "rb") as file:
                environment = file.read().split(b"\0")
        except (OSError, ValueError):
            return None
        ours = f"SANLOCK_RUN_DIR={self.directory}".encode() in environment
        return pid if ours and self._state(pid) not in ("Z", "") else None

    def start(self) -> int:
        """Start it, or find it running; returns its pid when it serves.  Raises 701."""
        os.makedirs(self.directory, mode=0o755, exist_ok=True)
        running = self.pid()
        if running is None:
            self._launch()
        deadline = time.monotonic() + START
        while time.monotonic() < deadline:
            pid = self.pid()
            if pid is not None and self._serves():
                if running is None:
                    log.info("sanlock %d runs in %s", pid, self.directory)
                return pid
            if self._process is not None and self._process.poll() is not None:
                code = self._process.returncode
                raise SanlockDaemonError(
                    directory=self.directory, reason=f"it ended with exit code {code}"
                )
            time.sleep(POLL)
        raise SanlockDaemonError(directory=self.directory, reason=f"not ready in {START:.0f} s")

    def stop(self) -> None:
        """End it.  Release the host ids first: it does not end while it has one, and is killed."""
        pid = self.pid()
        if pid is None:
            return
        for number in (signal.SIGTERM, signal.SIGKILL):
            try:
                os.kill(pid, number)
            except ProcessLookupError:
                break
            deadline = time.monotonic() + STOP
            while self.pid() == pid and time.monotonic() < deadline:
                self._reap()
                time.sleep(POLL)
            if self.pid() is None:
                break
            log.warning("sanlock %d in %s did not end when asked", pid, self.directory)
        self._reap()

    def _reap(self) -> None:
        if self._process is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(POLL)
                self._process = None

    def _launch(self) -> None:
        user = pwd.getpwuid(os.geteuid()).pw_name
        group = grp.getgrgid(os.getegid()).gr_name
        with open(os.path.join(self.directory, LOG_FILE), "wb") as output:
            self._process = subprocess.Popen(
                [
                    *("sanlock", "daemon", "-D", "-w", "0", "-h", "0", "-l", "0"),
                    *("-L", "-1", "-S", "-1", "-U", user, "-G", group),
                    *("-e", self._name(), "-o", str(self._io_timeout)),
                ],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                cwd="/",
                env={
                    **os.environ,
                    "SANLOCK_PRIVILEGED": "0",
                    "SANLOCK_RUN_DIR": self.directory,
                },
                start_new_session=True,
            )

    def _name(self) -> str:
        """A name that stays: sanlock then takes its own host id back at once after a crash."""
        path = os.path.join(self.directory, NAME_FILE)
        try:
            with open(path, encoding="ascii") as file:
                return file.read().strip()
        except FileNotFoundError:
            name = new_uuid()
            write_atomic(path, name.encode())
            return name

    def _serves(self) -> bool:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
            connection.settimeout(1.0)
            try:
                connection.connect(os.path.join(self.directory, SOCKET))
            except OSError:
                return False
        return True

    @staticmethod
    def _state(pid: int) -> str:
        try:
            with open(f"/proc/{pid}/stat", encoding="ascii", errors="replace") as file:
                return file.read().rpartition(")")[2].split()[0]
        except OSError:
            return ""
