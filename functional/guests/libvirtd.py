# SPDX-License-Identifier: GPL-2.0-or-later
"""A libvirtd of one's own, in name spaces of its own: nothing of this machine's libvirt is touched.

Its processes and mounts are a world apart (`unshare --pid --mount`), where /etc/libvirt,
/run/libvirt and the like are directories of ours.  The first process of that world ends with us,
and takes libvirtd and all guests with it.  Outside, only the socket is needed.  The daemon can be
killed, stopped and started again while its guests go on.
"""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import signal
import socket
import subprocess
import time
import uuid
from pathlib import Path

START = 180.0  # seconds; the first time QEMU is asked for what it can
FOLDERS = {
    "etc": "/etc/libvirt",
    "run": "/run/libvirt",
    "lib": "/var/lib/libvirt",
    "log": "/var/log/libvirt",
    "cache": "/var/cache/libvirt",
}
# Guests run as root here, and their logs are files: virtlogd is one daemon less.
QEMU_CONF = """
stdio_handler = "file"
user = "root"
group = "root"
dynamic_ownership = 0
security_driver = "none"
namespaces = []
cgroup_controllers = []
"""
# Debian's build wants this account to exist, even when guests do not run under it.
ACCOUNT = "libvirt-qemu"


class Libvirtd:
    """`directory` must be short: sockets are below it."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.socket = directory / "sock" / "libvirt-sock"
        self.uri = f"qemu+unix:///system?socket={self.socket}"
        self._world: subprocess.Popen[bytes] | None = None
        self._init = 0
        self._daemon: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """The world, and the daemon in it; returns when it answers."""
        for name in (*FOLDERS, "sock"):
            (self.directory / name).mkdir(parents=True)
        (self.directory / "etc" / "qemu.conf").write_text(QEMU_CONF)
        (self.directory / "etc" / "libvirtd.conf").write_text(
            f'unix_sock_dir = "{self.socket.parent}"\n'
            'auth_unix_rw = "none"\nauth_unix_ro = "none"\nunix_sock_group = "root"\n'
            # Else two of them would be one host, and no guest could move from one to the other.
            f'host_uuid = "{uuid.uuid4()}"\n'
            f'log_outputs = "3:file:{self.directory}/libvirtd.log"\n'
        )
        for name, row in (("passwd", ":x:64055:64055::/:/bin/false"), ("group", ":x:64055:")):
            text = Path(f"/etc/{name}").read_text()
            known = f"{ACCOUNT}:" in text
            (self.directory / name).write_text(text if known else f"{text}{ACCOUNT}{row}\n")
        self._world = subprocess.Popen(
            ["setpriv", "--pdeathsig", "KILL", "unshare", "--mount", "--pid", "--fork",
             "--kill-child", "--mount-proc", "--propagation", "slave", "sh", "-ec",
             self._preparation()],
            stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        self._init = self._child(self._world.pid)
        while not (self.directory / "made").exists():
            assert self._world.poll() is None, "the world of libvirtd ended"
            time.sleep(0.02)
        self.start_daemon()

    def _preparation(self) -> str:
        binds = {**FOLDERS, "passwd": "/etc/passwd", "group": "/etc/group"}
        # Mounts of other tests, of other runs too, would stay busy for as long as this world lasts.
        # What it has copies of is known only here.
        base = Path(os.environ.get("TMPDIR", "/var/tmp"))
        own = base / self.directory.relative_to(base).parts[0]
        lines = [
            "cut -d' ' -f5 /proc/self/mountinfo | tac | while read -r point; do"
            f' case "$point" in {shlex.quote(str(own))}|{shlex.quote(str(own))}/*) ;;'
            f' {shlex.quote(str(base.parent))}/*) umount --lazy "$point" || : ;; esac; done'
        ]
        for name, target in binds.items():
            if name in FOLDERS:
                lines.append(f"mkdir -p {target}")
            lines.append(f"mount --bind {shlex.quote(str(self.directory / name))} {target}")
        lines.append(f"touch {shlex.quote(str(self.directory / 'made'))}")
        # Processes that lost their parent must not stay as zombies: libvirtd waits for their end.
        return "\n".join([*lines, "exec env --ignore-signal=CHLD sleep infinity"])

    def start_daemon(self) -> None:
        self._daemon = subprocess.Popen(
            ["nsenter", "-t", str(self._init), "-m", "-p", "libvirtd",
             "--pid-file", str(self.directory / "libvirtd.pid"),
             "--config", str(self.directory / "etc" / "libvirtd.conf")],
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        end = time.monotonic() + START
        while not self._answers():
            assert self._daemon.poll() is None, (self.directory / "libvirtd.log").read_text()
            assert time.monotonic() < end, "libvirtd does not answer"
            time.sleep(0.05)

    def _answers(self) -> bool:
        with socket.socket(socket.AF_UNIX) as probe:
            try:
                probe.connect(str(self.socket))
            except OSError:
                return False
        return True

    def signal(self, number: signal.Signals) -> None:
        """To the daemon alone; guests go on."""
        assert self._daemon is not None
        os.kill(self._child(self._daemon.pid), number)
        if number == signal.SIGCONT:  # nsenter stops itself when its child is stopped
            self._daemon.send_signal(number)

    def process(self, inner: int) -> int:
        """The number here of a process that has the number `inner` in there."""
        world = Path(f"/proc/{self._init}/ns/pid").readlink()
        for entry in Path("/proc").iterdir():
            with contextlib.suppress(OSError):
                if entry.name.isdigit() and (entry / "ns/pid").readlink() == world:
                    numbers = re.search(r"NSpid:\s*(.*)", (entry / "status").read_text())
                    if numbers is not None and int(numbers[1].split()[-1]) == inner:
                        return int(entry.name)
        raise LookupError(f"no process {inner} in the world of libvirtd")

    def qemu(self, name: str) -> int:
        """The process of a guest, by its name."""
        return self.process(int((self.directory / "run" / "qemu" / f"{name}.pid").read_text()))

    def kill_daemon(self) -> None:
        assert self._daemon is not None
        self.signal(signal.SIGKILL)
        self._daemon.send_signal(signal.SIGCONT)  # it stands still if the daemon did
        self._daemon.wait(10)
        self._daemon = None

    def stop(self) -> None:
        """The end of all in there."""
        if self._daemon is not None:
            with contextlib.suppress(ProcessLookupError, AssertionError):
                self.signal(signal.SIGKILL)
        if self._world is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._init, signal.SIGKILL)
            self._world.wait(10)
        if self._daemon is not None:
            self._daemon.wait(10)
        self._world = self._daemon = None

    @staticmethod
    def _child(pid: int) -> int:
        end = time.monotonic() + 10
        while time.monotonic() < end:
            found = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
            if found:
                return int(found[0])
            time.sleep(0.02)
        raise AssertionError(f"process {pid} has no child")
