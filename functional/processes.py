# SPDX-License-Identifier: GPL-2.0-or-later
"""An agent as a process, and what it may have left behind."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

from functional.engine.host import Host
from functional.standin.process import ROOT, StandInProcess
from vdsm_storage.schema.loader import Schema

BIN = Path(sys.executable).parent
READY = 60.0  # seconds
STOP = 60.0
ANSWER = re.compile(r" ([A-Z]\w+\.\w+) -> (-?\d+) ")


class AgentProcess:
    """`settings` as section__option="value"; replies are checked against the schema.

    With `standin`, which must run, the agent uses that in place of device-mapper.
    """

    def __init__(
        self,
        directory: Path,
        tls: bool,
        settings: dict[str, str],
        standin: StandInProcess | None = None,
    ) -> None:
        self.dir = directory
        self.tls = tls
        self.standin = standin
        self.settings = {
            "rpc__check_replies": "true",
            # One second is too little where several tests fsync on one slow disk: sanlock would
            # count an I/O that takes longer as failed, and take the host's leases away after 8.
            "sanlock__io_timeout": "2",
            "storage__monitor_interval": "1",
            **settings,
        }
        self.port = 0
        self.process: subprocess.Popen[str] | None = None

    def start(self, crash_point: str = "") -> None:
        argv = [*self._program(), "--dev", str(self.dir)]
        for name, value in self.settings.items():
            argv += ["--set", f"{name.replace('__', '.')}={value}"]
        if not self.tls:
            argv.append("--no-tls")
        environment = {**os.environ, "VDSM_STORAGE_TEST_AGENT": str(self.dir)}
        if self.standin is not None:
            environment["PYTHONPATH"] = str(ROOT)
        environment.pop("VDSM_STORAGE_CRASH", None)
        if crash_point:
            environment["VDSM_STORAGE_CRASH"] = crash_point
        self.process = subprocess.Popen(
            argv, stdout=subprocess.PIPE, text=True, env=environment, stdin=subprocess.DEVNULL
        )
        assert self.process.stdout is not None
        words = self.process.stdout.readline().split()
        assert words[:1] == ["ready"], f"no ready line; exit code {self.process.wait(5)}"
        self.port = int(words[1])

    def _program(self) -> list[str]:
        if self.standin is None:
            return [str(BIN / "vdsm-storaged")]
        module = "functional.standin.agent"
        return [sys.executable, "-P", "-m", module, "--standin", self.standin.socket]

    def host(self, name: str, host_id: int) -> Host:
        """What the engine has of it."""
        return Host(name, host_id, self.port, self.dir / "pki" if self.tls else None)

    def kill(self) -> None:
        """kill -9 of the agent; its sanlock lives on."""
        assert self.process is not None
        self.process.send_signal(signal.SIGKILL)
        self.process.wait(STOP)
        self._close()

    def alive(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def wait_dead(self) -> None:
        """After an armed crash point."""
        assert self.process is not None
        assert self.process.wait(STOP) == -signal.SIGKILL
        self._close()

    def kill_host(self) -> None:
        """kill -9 of the agent and its sanlock: what a power cut does to both."""
        self.kill_sanlock()  # first: it would give back what the agent holds
        self.kill()

    def kill_sanlock(self) -> None:
        os.kill(int((self.dir / "sanlock" / "sanlock.pid").read_text()), signal.SIGKILL)

    def stop(self) -> str:
        """SIGTERM; returns what was wrong, "" if it ended cleanly."""
        if self.process is None:
            return ""
        if self.process.poll() is not None:  # it was killed: another run cleans up
            self._close()
            self.start()
        self.process.send_signal(signal.SIGTERM)
        try:
            code = self.process.wait(STOP)
        except subprocess.TimeoutExpired:
            self.process.kill()
            return f"{self.dir.name}: did not end within {STOP} s"
        self._close()
        self.process = None
        if code:
            return f"{self.dir.name}: exit code {code}"
        unlisted = sorted(self.answers() - allowed())
        return f"{self.dir.name}: errors that the schema does not list: {unlisted}" * bool(unlisted)

    def answers(self) -> set[tuple[str, int]]:
        """Verb and code of what the log keeps."""
        found = set()
        for path in self.dir.glob("agent.log*"):
            text = path.read_text(errors="replace")
            found |= {(verb, int(code)) for verb, code in ANSWER.findall(text)}
        return found

    def _close(self) -> None:
        if self.process is not None and self.process.stdout is not None:
            self.process.stdout.close()


def allowed() -> set[tuple[str, int]]:
    """What the schema says that verbs may answer; a mistake of ours is never all right."""
    schema = Schema()
    table = schema.errors()
    anywhere = {0, *(error.code for error in table.values() if error.anywhere)} - {-32603}
    return {
        (verb.name, code)
        for verb in schema.verbs()
        for code in (*anywhere, *(table[error].code for error in verb.errors))
    }


def leftovers(below: Path) -> list[str]:
    """Processes that were started by an agent below a directory, mounts there, loop devices."""
    end = time.monotonic() + 5.0
    while (found := _leftovers(below)) and time.monotonic() < end:
        time.sleep(0.1)
    return found


def _leftovers(below: Path) -> list[str]:
    found = []
    mark = f"VDSM_STORAGE_TEST_AGENT={below}/".encode()
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and mark in (entry / "environ").read_bytes():
                found.append(f"process {entry.name} {(entry / 'comm').read_text().strip()}")
        except OSError:
            continue
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        point = line.split()[4]
        if point.startswith(f"{below}/"):
            found.append(f"mount {point}")
    for backing in Path("/sys/block").glob("loop*/loop/backing_file"):
        try:
            name = backing.read_text().strip()
        except OSError:
            continue
        if name.startswith(f"{below}/"):
            found.append(f"loop {backing.parts[3]} {name}")
    return found
