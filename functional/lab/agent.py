# SPDX-License-Identifier: GPL-2.0-or-later
"""The agent in a guest of a cluster, with a sanlock of its own, asked from here.

agent = GuestAgent(guest)          # the guest forwards PORT
agent.start(sanlock__io_timeout="2")
agent.client().call("Host.ping2", {})
agent.host(1)                      # what functional/engine has of it
"""

from __future__ import annotations

import shutil
import signal
import time
from pathlib import Path

from functional.engine.host import Host
from functional.lab.channel import Command
from functional.lab.errors import LabError
from functional.lab.guest import Guest
from vdsm_storage.rpc import tls
from vdsm_storage.rpc.client import Client

PORT = 54321
DIRECTORY = "/var/tmp/agent"  # in the guest
READY = 120.0  # seconds
STOP = 60.0
DEFAULTS = {
    "rpc__check_replies": "true",
    "sanlock__io_timeout": "2",
    "storage__monitor_interval": "1",
}


class GuestAgent:
    def __init__(self, guest: Guest) -> None:
        self.guest = guest
        self._command: Command | None = None

    def start(self, crash_point: str = "", **settings: str) -> None:
        """`settings` as section__option="value".  Returns when it is ready."""
        argv = [".venv/bin/vdsm-storaged", "--dev", DIRECTORY]
        listen = {"addresses__management_ip": "::", "addresses__management_port": str(PORT)}
        for name, value in {**DEFAULTS, **listen, **settings}.items():
            argv += ["--set", f"{name.replace('__', '.')}={value}"]
        env = {"VDSM_STORAGE_CRASH": crash_point} if crash_point else {}
        self._command = self.guest.start(*argv, env=env)
        end = time.monotonic() + READY
        while "ready " not in self._command.output():
            if self._command.ended() or time.monotonic() > end:
                raise LabError(f"no ready line from the agent:\n{self._command.output()}")
            time.sleep(0.1)
        shutil.rmtree(self._pki, ignore_errors=True)
        self.guest.run("cp", "-r", f"{DIRECTORY}/pki", str(self._pki)).check()

    def client(self, timeout: float = 120.0) -> Client:
        context = tls.client_context(tls.client_files(str(self._pki)))
        return Client("127.0.0.1", self.guest.ports[PORT], context, timeout)

    def host(self, host_id: int) -> Host:
        return Host(self.guest.name, host_id, self.guest.ports[PORT], self._pki)

    def kill(self) -> None:
        """kill -9 of the agent alone; its sanlock lives on."""
        assert self._command is not None
        self._command.kill()

    def stop(self) -> None:
        assert self._command is not None
        self._command.signal(signal.SIGTERM)
        self._command.wait(STOP).check()

    def log(self) -> str:
        return self.guest.run("tail", "-n", "200", f"{DIRECTORY}/agent.log").out

    @property
    def _pki(self) -> Path:
        return self.guest.directory / "pki"
