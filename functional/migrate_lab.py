# SPDX-License-Identifier: GPL-2.0-or-later
"""Two hosts that share storage, each with an agent and a libvirtd, and a guest that tells where its
writes stand.

The agents trust each other's certificates and speak TLS; their libvirtds reach each other by their
sockets.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import socket
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from functional.guests import writer
from functional.guests.libvirtd import Libvirtd
from functional.lab.guest import why_not
from functional.processes import AgentProcess
from functional.vm_create import plan, start
from functional.vm_lab import MIB, Machine, VmDisk, VmLab
from functional.world import COW, World, new_id
from vdsm_storage.rpc.client import RemoteError

NUMBERS = 2 * MIB  # where on its disk the guest writes them


@dataclass
class Two:
    """The guests begin on `first`; their files are below `directory`."""

    first: VmLab
    second: VmLab
    directory: Path
    @property
    def both(self) -> tuple[VmLab, VmLab]:
        return self.first, self.second

    def other(self, lab: VmLab) -> VmLab:
        return self.second if lab is self.first else self.first

    # -- a guest without a system, which counts ------------------------------------------------

    def writer(self, name: str, *more: VmDisk, **params: Any) -> Machine:
        """It runs, and writes to its first disk."""
        disk = self._boot_disk()
        port = f"<serial type='file'><source path='{self.console(name)}' append='on'/></serial>"
        wanted = plan(self.first, name, [disk, *more], devices=port, agent=False)
        machine = start(self.first, wanted, [disk, *more], **params)
        self.writes(machine)
        return machine

    def console(self, name: str) -> Path:
        return self.directory / f"{name}.numbers"

    def _boot_disk(self) -> VmDisk:
        world = self.first.world
        image = new_id()
        made = VmDisk(image, [world.create(image, volFormat=COW, size=str(8 * MIB))])
        raw = self.directory / "boot.raw"
        with raw.open("wb") as file:
            file.write(writer.boot_sector(NUMBERS))
            file.truncate(8 * MIB)
        path = self.first.prepare(made)
        fill = ["qemu-img", "convert", "-n", "-f", "raw", "-O", "qcow2", str(raw), path]
        subprocess.run(fill, check=True, timeout=60)
        self.first.call("Image.teardown", **world.ids(image, made.leaf))
        raw.unlink()
        return made

    def writes(self, machine: Machine) -> None:
        """It goes on: it writes more than it had."""
        path = self.console(machine.guest.plan.name)
        before = writer.told(path)
        VmLab.wait(lambda: writer.told(path) > before + 2, "the guest to write")

    def check(self, machine: Machine, lab: VmLab) -> None:
        """After its end: what it told is there, and it told every number once, wherever it ran."""
        path = self.console(machine.guest.plan.name)
        lines = re.findall(rb"([0-9a-f]{8})\n", path.read_bytes())
        told = [int(line, 16) for line in lines]
        assert told == list(range(1, len(told) + 1))
        disk = machine.disks[0]
        raw = self.directory / "check.raw"
        copy = ["qemu-img", "convert", "-f", "qcow2", "-O", "raw", lab.prepare(disk), str(raw)]
        subprocess.run(copy, check=True, timeout=60)
        lab.call("Image.teardown", **lab.world.ids(disk.image, disk.leaf))
        with raw.open("rb") as file:
            file.seek(NUMBERS)
            writer.check(file.read(writer.SLOTS * writer.SECTOR), told[-1])
        raw.unlink()

    # -- moving --------------------------------------------------------------------------------

    def ask(self, machine: Machine, source: VmLab | None = None, **more: Any) -> None:
        """As engines do."""
        source = source or self.first
        params = {
            "vmId": machine.id, "mode": "remote", "method": "online",
            "dst": f"127.0.0.1:{self.other(source).agent.port}", "dstqemu": "127.0.0.1",
            "tunneled": False, "abortOnError": True, "incomingLimit": 2, **more,
        }  # fmt: skip
        source.call("VM.migrate", vmID=machine.id, params=params)

    def has_moved(self, machine: Machine, source: VmLab | None = None) -> dict[str, Any]:
        """Wait until it did; the status that the source tells."""
        source = source or self.first
        there = self.other(source)
        source.wait(lambda: listed(source, machine.id) != "Migration Source", "the end")
        assert listed(source, machine.id) == "Down", source.call(
            "VM.getMigrationStatus", vmID=machine.id
        )
        source.wait(lambda: listed(there, machine.id) == "Up", "it to be there")
        machine.guest.domain = there.guests.connection.lookupByUUIDString(machine.id)
        found = source.stats(machine.id)
        assert (found["exitCode"], found["exitReason"]) == (0, 4), found
        status = source.call("VM.getMigrationStatus", vmID=machine.id)
        assert status["status"] == "done"
        source.call("VM.destroy", vmID=machine.id)
        assert listed(source, machine.id) == ""
        return dict(status)

    def stays(self, machine: Machine) -> str:
        """Wait until it is known that it did not move; why."""
        lab = self.first
        lab.wait(lambda: listed(lab, machine.id) != "Migration Source", "the end")
        assert listed(lab, machine.id) == "Up"
        with pytest.raises(RemoteError) as caught:
            lab.call("VM.getMigrationStatus", vmID=machine.id)
        assert caught.value.code in (10, 12), caught.value
        self.writes(machine)
        return str(caught.value)

    def end(self, machine: Machine, lab: VmLab) -> None:
        lab.call("VM.destroy", vmID=machine.id)
        assert listed(lab, machine.id) == ""
        self.check(machine, lab)


@contextlib.contextmanager
def shared(directory: Path) -> Iterator[Path]:
    """What is mounted below it is seen in the worlds of libvirtds, too."""

    def mount(*words: str) -> None:
        subprocess.run([*words, str(directory)], check=True, timeout=60)

    mount("mount", "--bind", str(directory))  # on itself
    mount("mount", "--make-shared")
    yield directory
    try:
        mount("umount")
    except subprocess.CalledProcessError:  # something is mounted below it
        mount("umount", "--lazy", "--recursive")
        raise


def listed(lab: VmLab, vm: str) -> str:
    """Its status; "" when it is unknown."""
    return next((one["status"] for one in lab.call("Host.getVMList") if one["vmId"] == vm), "")


@contextlib.contextmanager
def two_hosts(
    workdir: Path, start_agent: Callable[..., AgentProcess], make_server: Callable[[str], Any],
    standins: Any = (None, None), **settings: str,
) -> Iterator[Two]:  # fmt: skip
    if reason := why_not():
        pytest.skip(reason)
    daemons = [Libvirtd(workdir / f"v{number}") for number in (1, 2)]
    labs: list[VmLab] = []
    try:
        for daemon in daemons:
            daemon.start()
        agents = []
        for number, daemon in enumerate(daemons):
            if agents:  # one authority for both
                shutil.copytree(agents[0].dir / "pki", workdir / "h2" / "pki")
            agents.append(start_agent(
                f"h{number + 1}", tls=True, standin=standins[number],
                libvirt__uri=daemon.uri, libvirt__migration_uri=daemons[1 - number].uri,
                libvirt__retry="0.2", libvirt__keepalive_interval="1",
                libvirt__keepalive_count="2", libvirt__timeout="5",
                addresses__management_port=str(free_port()),
                secrets__luks_iteration_time="20", **settings,
            ))  # fmt: skip
        world = World(agents[0], [make_server("bind") for _ in range(2)], attach=True)
        labs.append(VmLab(daemons[0], world))
        labs.append(VmLab(daemons[1], world.seen_by(agents[1], 2)))
        yield Two(labs[0], labs[1], workdir)
    finally:
        for lab in labs:
            lab.close()
        for daemon in daemons:
            daemon.stop()


def free_port() -> int:
    """The other host's agent knows it, so it stays the same when an agent is started again."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def shown(two: Two, *values: str) -> list[str]:
    """Files of both hosts and command lines in which any of the values is."""
    forms = [value.encode() for value in values]
    found = []
    for lab in two.both:
        for top in (lab.agent.dir, lab.libvirtd.directory):
            for path in top.rglob("*"):
                if path.is_file() and not path.is_symlink():
                    data = path.read_bytes()
                    found += [str(path) for form in forms if form in data]
    for number in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError):
            data = Path(f"/proc/{number}/cmdline").read_bytes()
            found += [f"argv of {number}" for form in forms if form in data]
    return found
