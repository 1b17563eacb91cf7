# SPDX-License-Identifier: GPL-2.0-or-later
"""Run lvm's commands: a configuration of our own, devices named one by one, few at a time.

No command looks at a device that it was not given, so that other volume groups of the host are
neither touched nor waited for.  lvm's configuration, locks and archive are below one directory:
what an administrator wrote into /etc/lvm does not change what is done here.
"""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from vdsm_storage.base.cancel import Cancel
from vdsm_storage.base.files import write_atomic
from vdsm_storage.base.run import Command, Process, Result, run, start
from vdsm_storage.errors import CommandError, CommandTimeout, LvmCommandError, ResourceExhausted

CONFIGURATION: Final = """\
# Written at each start of the agent.
devices {{
  dir="/dev" scan=["/dev"] use_devicesfile=0 obtain_device_list_from_udev=0
  external_device_info_source="none" hints="none" scan_lvs=0 md_component_detection=0
  ignore_suspended_devices=1
}}
global {{
  use_aio=0 event_activation=0 use_lvmpolld=0 use_lvmlockd=0 notify_dbus=0
  locking_dir="{locks}" wait_for_locks=1 prioritise_write_locks=1
}}
backup {{ backup=0 archive=0 }}
log {{ syslog=0 }}
activation {{ monitoring=0 udev_sync=1 udev_rules=1 }}
"""
NOISE: Final = re.compile(
    r"WARNING: Activation disabled\. No device-mapper"
    r"|WARNING: This metadata update is NOT backed up"
    r"|WARNING: Logical volume \S+ not zeroed"
    r"|File descriptor \d+ .* leaked"
    r"|\S*/mapper/control: open failed"
    r"|Failure to communicate with kernel device-mapper"
    r"|Check that device-mapper is available"
    r"|Incompatible libdevmapper"
)
Start = Callable[[Command], Process]
_VERSION: Final = re.compile(rb"LVM version:\s*(\d+)\.(\d+)\.(\d+)")


@dataclass(frozen=True)
class Watch:
    """Following a command of hours: stop it, get its output as it comes."""

    cancel: Cancel | None
    on_output: Callable[[bytes], None]


class Lvm:
    """`directory` holds lvm.conf, locks and archive; it is made here, and private.

    `timeout` seconds for a command that names no other; `commands` run at once, others wait.
    One that may take longer than `timeout` moves data for hours and is not counted.  `start` is
    how a command is started.
    """

    def __init__(
        self, directory: str, timeout: float, commands: int, start: Start = start
    ) -> None:
        self.directory = directory
        self.timeout = timeout
        self._commands = commands
        self._start = start
        self._turn = threading.BoundedSemaphore(commands)
        self._version: tuple[int, ...] | None = None
        locks = os.path.join(directory, "locks")
        for made in (directory, locks):
            os.makedirs(made, mode=0o700, exist_ok=True)
        text = CONFIGURATION.format(locks=locks.replace("\\", "\\\\").replace('"', '\\"'))
        write_atomic(os.path.join(directory, "lvm.conf"), text.encode())

    def run(
        self,
        argv: Sequence[str],
        devices: Sequence[str],
        *,
        vg: str = "",
        driver: bool = False,
        timeout: float | None = None,
        watch: Watch | None = None,
        fence: Callable[[], None] | None = None,
    ) -> Result:
        """Run `lvm argv` on `devices`.  `driver` lets it talk to device-mapper; without, a
        command changes metadata only.  `fence` is called when the command's turn has come, right
        before it starts; when it raises, the command does not.

        Raises LvmCommandError (621) with lvm's own words, CommandTimeout, and ActionStopped when
        cancelled.  What a command did that failed or was stopped is for the caller to find out.
        """
        command, *rest = argv
        limit = self.timeout if timeout is None else timeout
        where = ["--devices", ",".join(devices)] if devices else []
        mapper = [] if driver else ["--driverloaded", "n"]
        order = Command(
            ["lvm", command, *where, *mapper, *rest],
            timeout=limit,
            cancel=watch.cancel if watch is not None else None,
            on_output=watch.on_output if watch is not None else None,
            env={"LVM_SYSTEM_DIR": self.directory, "LVM_SUPPRESS_FD_WARNINGS": "1"},
        )
        turn = self._turn if limit <= self.timeout else threading.Semaphore()
        if not turn.acquire(timeout=limit):
            raise ResourceExhausted(resource="The queue of lvm commands", limit=self._commands)
        try:
            if fence is not None:
                fence()
            return run(order, self._start)
        except CommandError as error:
            text = str(error.facts["stderr"])
            reason = own_words(text) or f"{error.facts['status']}: {text}"
            raise LvmCommandError(command=command, vg=vg or "-", reason=reason) from error
        except CommandTimeout as error:
            program = f"lvm {command} of volume group {vg or '-'}"
            raise CommandTimeout(program=program, seconds=limit, stderr="no answer") from error
        finally:
            turn.release()

    def version(self) -> tuple[int, ...]:
        """Of the tools, (2, 3, 16) for 2.03.16; asked once."""
        if self._version is None:
            found = _VERSION.search(self.run(["version"], []).stdout)
            self._version = tuple(map(int, found.groups())) if found else (0,)
        return self._version


def own_words(stderr: str) -> str:
    """What lvm says itself, in one line, without the warnings that every command gives.

    >>> own_words('  WARNING: Activation disabled. No device-mapper interaction will be ...\\n'
    ...           '  Insufficient free space: 7999 extents needed, but only 151 available\\n')
    'Insufficient free space: 7999 extents needed, but only 151 available'
    """
    lines = (line.strip() for line in stderr.splitlines())
    return "; ".join(line for line in lines if line and not NOISE.search(line))
