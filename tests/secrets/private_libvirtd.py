# SPDX-License-Identifier: GPL-2.0-or-later
"""A libvirtd of one's own: the session instance of an unprivileged user, all its files below one
directory.  It can be killed, stopped and started again."""

from __future__ import annotations

import contextlib
import os
import pwd
import signal
import socket
import subprocess
import time
from pathlib import Path

USER = "nobody"
START = 60.0  # seconds
PLACES = {
    "XDG_RUNTIME_DIR": "run", "XDG_CONFIG_HOME": "config", "XDG_CACHE_HOME": "cache",
    "XDG_DATA_HOME": "data",
}  # fmt: skip


class PrivateLibvirtd:
    """`directory` must be short, for a socket is below it, and reachable for other users."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.log = directory / "config" / "libvirtd.log"
        self.socket = directory / "run" / "libvirt" / "libvirt-sock"
        self.uri = f"qemu+unix:///session?socket={self.socket}"
        self._user = pwd.getpwnam(USER)
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Returns when it answers."""
        for name in PLACES.values():
            path = self.directory / name
            path.mkdir(parents=True, exist_ok=True)
            os.chown(path, self._user.pw_uid, self._user.pw_gid)
        config = self.directory / "libvirtd.conf"
        # All that it knows about secrets, into a file that tests look through.
        config.write_text(
            f'log_outputs = "1:file:{self.log}"\nlog_filters = "1:secret 1:remote 1:rpc 3:*"\n'
        )
        environment = {
            **os.environ, **{name: str(self.directory / place) for name, place in PLACES.items()},
            "HOME": str(self.directory),
        }  # fmt: skip
        self.socket.unlink(missing_ok=True)
        self._process = subprocess.Popen(
            ["/usr/sbin/libvirtd", "--config", str(config)], env=environment, cwd="/",
            user=self._user.pw_uid, group=self._user.pw_gid, extra_groups=[],
            stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        end = time.monotonic() + START
        while not self._answers():
            assert self._process.poll() is None, "libvirtd ended"
            assert time.monotonic() < end, "libvirtd does not come up"
            time.sleep(0.02)

    def _answers(self) -> bool:
        with socket.socket(socket.AF_UNIX) as probe, contextlib.suppress(OSError):
            probe.connect(str(self.socket))
            return True
        return False

    def kill(self) -> None:
        """kill -9: what it keeps in memory only is gone."""
        if self._process is not None:
            self._process.kill()
            self._process.wait(10)
            self._process = None

    def hang(self) -> None:
        """It answers nobody any more, until it is killed or `go_on` is called."""
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)

    def go_on(self) -> None:
        assert self._process is not None
        self._process.send_signal(signal.SIGCONT)
