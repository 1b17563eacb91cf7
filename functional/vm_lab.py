# SPDX-License-Identifier: GPL-2.0-or-later
"""An agent with storage and a libvirtd of its own, and guests whose disks are managed volumes."""

from __future__ import annotations

import contextlib
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from functional.guests.guest import Disk, Guest, Guests, Plan
from functional.guests.libvirtd import Libvirtd
from functional.guests.ram import boot
from functional.lab.guest import why_not
from functional.processes import AgentProcess
from functional.world import COW, SLOWER, SPARSE, World, new_id
from vdsm_storage.rpc.client import RemoteError

MIB = 1024**2
SIZE = 64 * MIB  # of a disk
PATIENCE = 60.0  # seconds


@dataclass
class VmDisk:
    """A disk of a guest: the image, and its volumes from the bottom up."""

    image: str
    volumes: list[str]

    @property
    def leaf(self) -> str:
        return self.volumes[-1]


@dataclass
class Machine:
    """A guest with what its disks are."""

    guest: Guest
    disks: list[VmDisk] = field(default_factory=list)

    @property
    def id(self) -> str:
        return self.guest.id


class VmLab:
    """`world` has the storage, `guests` what libvirt runs."""

    def __init__(self, libvirtd: Libvirtd, world: World) -> None:
        self.libvirtd = libvirtd
        self.world = world
        self.guests = Guests(libvirtd)

    @property
    def agent(self) -> AgentProcess:
        return self.world.agent

    def call(self, verb: str, **params: Any) -> Any:
        return self.world.call(verb, **params)

    def fails(self, code: int, verb: str, **params: Any) -> str:
        """The verb answers this error; returns its message."""
        with pytest.raises(RemoteError) as caught:
            self.call(verb, **params)
        assert caught.value.code == code, caught.value
        return str(caught.value)

    # -- guests ------------------------------------------------------------------------------

    def machine(self, name: str, disks: int = 1, *, boots: bool = False, **plan: Any) -> Machine:
        """A guest with disks on managed volumes; one that boots has file systems on them."""
        made = [self.disk(filled=boots) for _ in range(disks)]
        return self.machine_of(name, made, boots=boots, **plan)

    def machine_of(
        self, name: str, disks: list[VmDisk], *, boots: bool = False, **plan: Any
    ) -> Machine:
        drives = tuple(Disk(self.prepare(disk), image=disk.image) for disk in disks)
        guest = self.guests.create(Plan(name, drives, boot() if boots else None, **plan))
        return Machine(guest, disks)

    def disk(self, *, filled: bool) -> VmDisk:
        """A qcow2 volume, with a file system if it is `filled`."""
        world = self.world
        image = new_id()
        disk = VmDisk(image, [world.create(image, volFormat=COW, size=str(SIZE))])
        if filled:
            path = self.prepare(disk)
            raw = Path(f"{self.agent.dir}/{image}.raw")
            with raw.open("wb") as file:
                file.truncate(SIZE)
            subprocess.run(["mkfs.ext4", "-q", raw], check=True, timeout=60)
            fill = ["qemu-img", "convert", "-n", "-f", "raw", "-O", "qcow2", str(raw), path]
            subprocess.run(fill, check=True, timeout=60)
            raw.unlink()
        return disk

    def prepare(self, disk: VmDisk) -> str:
        path: str = self.call("Image.prepare", **self.world.ids(disk.image, disk.leaf))["path"]
        return path

    def new_leaf(self, disk: VmDisk) -> str:
        """What an engine makes before VM.snapshot; not yet in `disk.volumes`."""
        return self.world.create(
            disk.image, volFormat=COW, preallocate=SPARSE, size=str(SIZE),
            srcImgUUID=disk.image, srcVolUUID=disk.leaf, sequence=len(disk.volumes) + 1,
        )  # fmt: skip

    def stats(self, vm: str) -> dict[str, Any]:
        (found,) = self.call("VM.getStats", vmID=vm)
        assert isinstance(found, dict)
        return found

    # -- waiting -----------------------------------------------------------------------------

    @staticmethod
    def wait(condition: Callable[[], object], what: str, timeout: float = PATIENCE) -> None:
        end = time.monotonic() + timeout
        while not condition():
            assert time.monotonic() < end, f"waited {timeout} s for {what}"
            time.sleep(0.05 * SLOWER)

    def wait_libvirt(self) -> None:
        """Until the agent has found libvirt again."""

        def answers() -> bool:
            try:
                self.call("Host.getVMList", onlyUUID=True)
            except RemoteError as error:
                if error.code != 59:
                    raise
                return False
            return True

        self.wait(answers, "libvirt to be found again")

    def restart_libvirtd(self) -> None:
        """kill -9 and a new one; guests go on."""
        self.libvirtd.kill_daemon()
        self.libvirtd.start_daemon()
        self.guests.reconnect()

    def close(self) -> None:
        self.guests.close()
        with contextlib.suppress(OSError):
            self.world.client.close()


@contextlib.contextmanager
def vm_lab(
    workdir: Path, start_agent: Callable[..., AgentProcess], make_server: Callable[[str], Any],
    kind: str = "local", **settings: str,
) -> Iterator[VmLab]:  # fmt: skip
    """`make_server(kind)` gives the storage of each domain."""
    if reason := why_not():
        pytest.skip(reason)
    libvirtd = Libvirtd(workdir / "v")
    libvirtd.start()
    try:
        agent = start_agent(
            "agent", tls=False, libvirt__uri=libvirtd.uri, libvirt__retry="0.2",
            libvirt__keepalive_interval="1", libvirt__keepalive_count="2",
            libvirt__timeout="5", **settings,
        )  # fmt: skip
        lab = VmLab(libvirtd, World(agent, [make_server(kind) for _ in range(2)], attach=True))
        try:
            yield lab
        finally:
            lab.close()
    finally:
        libvirtd.stop()
