# SPDX-License-Identifier: GPL-2.0-or-later
"""Guests of a private libvirtd, defined by the tests themselves.

One that boots (see ram.py) has a guest agent, and a port by which tests run commands in it also
when the agent hangs.  One that is `paused` never runs: QEMU without a kernel, in a moment.
"""

from __future__ import annotations

import base64
import contextlib
import os
import re
import socket
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from xml.sax.saxutils import quoteattr

import libvirt
import libvirt_qemu

from functional.guests.libvirtd import Libvirtd
from functional.guests.ram import Boot

# In a guest of the laboratory all is emulated twice.
_TWICE = bool(os.environ.get("VDSM_STORAGE_LAB_GUEST"))
_SLOWER = 10.0 if _TWICE else 1.0
# A kernel that is so slow would do little more than count its own ticks.  Its time follows what it
# does, 31 million instructions a second, and the clock on the wall only while it does nothing.
_ITS_OWN_TIME = "<qemu:arg value='-icount'/><qemu:arg value='shift=5'/>" if _TWICE else ""
BOOT = 120.0 * _SLOWER  # seconds; five on a quiet machine
COMMAND = 60.0 * _SLOWER
AGENT_PORT = "/dev/virtio-ports/org.qemu.guest_agent.0"
AGENT = f"-m virtio-serial -p {AGENT_PORT} -t /run -f /run/qemu-ga.pid"
NOTICE = 1.0  # in which a guest sees that somebody listens
KERNEL = "console=ttyS0 quiet panic=-1 mitigations=off nokaslr random.trust_cpu=on"


@dataclass(frozen=True)
class Disk:
    """A disk as it stands in the guest's XML; `image` is its serial."""

    path: str
    format: str = "qcow2"
    image: str = ""
    more: str = ""  # inside of <disk>


@dataclass(frozen=True)
class Plan:
    name: str
    disks: Sequence[Disk] = ()
    boot: Boot | None = None  # None: it stays paused
    agent: bool = True
    memory: int = 128  # MiB
    id: str = field(default_factory=lambda: str(uuid.uuid4()))
    metadata: str = ""
    devices: str = ""  # more XML


class Guest:
    """Made by Guests.create."""

    def __init__(self, domain: libvirt.virDomain, plan: Plan, directory: Path) -> None:
        self.domain = domain
        self.plan = plan
        self.id = plan.id
        self.console = directory / f"{plan.name}.console"
        self._port = directory / f"{plan.name}.shell"
        self._shell: socket.socket | None = None
        self._read = b""

    def wait_ready(self) -> None:
        """Until its init has come to the end, and the agent answers."""
        end = time.monotonic() + BOOT
        while not self.console.exists() or b"tiny: ready" not in self.console.read_bytes():
            assert time.monotonic() < end, self.console.read_text()
            time.sleep(0.1)
        self.run("true")
        while self.plan.agent:
            with contextlib.suppress(libvirt.libvirtError):
                self.domain.fsInfo()
                return
            assert time.monotonic() < end, "the agent does not answer"
            time.sleep(0.1)

    def stop_agent(self) -> None:
        """kill -9; what it froze stays frozen."""
        self.run("kill -9 $(pidof qemu-ga); while pidof qemu-ga >/dev/null; do sleep 0.1; done")

    def start_agent(self, options: str = "") -> None:
        """Another one in its place, with options of its own; returns when it answers."""
        self.run(f"rm -f /run/qemu-ga.pid; qemu-ga -d {AGENT} {options}")
        end = time.monotonic() + COMMAND
        while True:
            with contextlib.suppress(libvirt.libvirtError):
                libvirt_qemu.qemuAgentCommand(self.domain, '{"execute": "guest-ping"}', 2, 0)
                return
            assert time.monotonic() < end, "the agent does not answer"
            time.sleep(0.05)

    # -- commands by the port test.shell, not by the agent

    def run(self, command: str, timeout: float = COMMAND) -> str:
        """What a line of shell wrote; it must succeed."""
        self.send(command)
        lines = []
        while not re.fullmatch(r"=\d+", line := self.line(timeout)):
            lines.append(line)
        assert line == "=0", f"{command}: {line}: {lines}"
        return "\n".join(lines)

    def write_script(self, path: str, text: str) -> None:
        data = base64.b64encode(f"#!/bin/sh\n{text}\n".encode()).decode()
        self.run(f"echo {data} | base64 -d >{path}; chmod 755 {path}")

    def send(self, command: str) -> None:
        """Without waiting for the end."""
        if self._shell is None:
            self._shell = socket.socket(socket.AF_UNIX)
            self._shell.connect(str(self._port))
            # A guest that saw nobody there closes its end and opens it again: what comes in between
            # is lost.
            time.sleep(NOTICE)
        self._shell.sendall(command.encode() + b"\n")

    def line(self, timeout: float = COMMAND) -> str:
        """The next line that the guest writes.  Raises TimeoutError."""
        assert self._shell is not None
        self._shell.settimeout(timeout)
        while b"\n" not in self._read:
            piece = self._shell.recv(65536)
            assert piece, "the guest is gone"
            self._read += piece
        line, _, self._read = self._read.partition(b"\n")
        return line.decode().rstrip("\r")

    def close(self) -> None:
        if self._shell is not None:
            self._shell.close()
            self._shell = None

    def destroy(self) -> None:
        self.close()
        with contextlib.suppress(libvirt.libvirtError):
            self.domain.destroy()


class Guests:
    """Guests of one daemon; `close` ends them all."""

    def __init__(self, libvirtd: Libvirtd) -> None:
        self.libvirtd = libvirtd
        self._made: list[Guest] = []
        self.reconnect()

    def reconnect(self) -> None:
        """After the daemon was killed."""
        self.connection = libvirt.open(self.libvirtd.uri)
        for guest in self._made:
            with contextlib.suppress(libvirt.libvirtError):  # it has ended
                guest.domain = self.connection.lookupByUUIDString(guest.id)

    def create(self, plan: Plan) -> Guest:
        """Returns at once; wait_ready() waits."""
        directory = self.libvirtd.directory
        flags = 0 if plan.boot is not None else libvirt.VIR_DOMAIN_START_PAUSED
        return self._add(self.connection.createXML(definition(plan, directory), flags), plan)

    def adopt(self, plan: Plan) -> Guest:
        """One that somebody else started."""
        return self._add(self.connection.lookupByUUIDString(plan.id), plan)

    def _add(self, domain: libvirt.virDomain, plan: Plan) -> Guest:
        guest = Guest(domain, plan, self.libvirtd.directory)
        self._made.append(guest)
        return guest

    def close(self) -> None:
        for guest in self._made:
            guest.destroy()
        with contextlib.suppress(libvirt.libvirtError):
            self.connection.close()


def definition(plan: Plan, directory: Path) -> str:
    """The XML.  No KVM: emulation works everywhere, and these guests have little to do."""
    boot, ports = "", ""
    if plan.boot is not None:
        boot = (
            f"<kernel>{plan.boot.kernel}</kernel><initrd>{plan.boot.ram}</initrd>"
            f"<cmdline>{KERNEL}</cmdline>"
        )
        ports = (
            f"<channel type='unix'><source mode='bind' path='{directory}/{plan.name}.shell'/>"
            "<target type='virtio' name='test.shell'/></channel>"
            f"<serial type='file'><source path='{directory}/{plan.name}.console'/></serial>"
        )
    if plan.agent:
        ports += (
            "<channel type='unix'><target type='virtio' name='org.qemu.guest_agent.0'/></channel>"
        )
    disks = "".join(disk_xml(disk, number) for number, disk in enumerate(plan.disks))
    return f"""
        <domain type='qemu' xmlns:qemu='http://libvirt.org/schemas/domain/qemu/1.0'>
          <name>{plan.name}</name><uuid>{plan.id}</uuid>
          <metadata>{plan.metadata}</metadata>
          <memory unit='MiB'>{plan.memory if boot else 16}</memory><vcpu>1</vcpu>
          <os><type arch='x86_64' machine='pc'>hvm</type>{boot}</os>
          <features><acpi/></features>
          <cpu mode='custom' match='exact'><model fallback='allow'>Nehalem</model></cpu>
          <on_reboot>destroy</on_reboot><on_crash>destroy</on_crash>
          <devices>{disks}{ports}{plan.devices}<memballoon model='none'/></devices>
          <qemu:commandline>{_ITS_OWN_TIME if boot else ""}</qemu:commandline>
        </domain>"""


def disk_xml(disk: Disk, number: int) -> str:
    kind, where = ("block", "dev") if Path(disk.path).is_block_device() else ("file", "file")
    serial = f"<serial>{disk.image}</serial>" if disk.image else ""
    return (
        f"<disk type='{kind}' device='disk'>"
        f"<driver name='qemu' type='{disk.format}' cache='none' io='threads' error_policy='stop'/>"
        f"<source {where}={quoteattr(disk.path)}/><target dev='vd{'abcdefgh'[number]}'"
        f" bus='virtio'/>{serial}{disk.more}</disk>"
    )
