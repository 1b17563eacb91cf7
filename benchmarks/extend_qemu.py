# SPDX-License-Identifier: GPL-2.0-or-later
"""For extend.py: what QEMU writes into disks that grow.

A guest of libvirt's, whose disk is written a piece at a time; and a QEMU storage daemon that writes
as fast as this machine can, into the qcow2 volume of a domain.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import libvirt

from benchmarks.extend_agent import STORAGE
from benchmarks.extend_group import LOOK, PATIENCE, Subject, progress
from benchmarks.loop_volumes import piece
from benchmarks.scale_group import EXTENT, Volume
from functional.guests.guest import Disk, Guest, Guests, Plan
from functional.guests.libvirtd import Libvirtd
from functional.merge_lab import qemu_io
from functional.vm_lab import Machine

MIB = 1024**2
GIB = 1024**3
CAPACITY = 512 * GIB
CLUSTER = 2 * MIB  # so that all tables are at the begin of the image
TABLES = 32 * MIB  # more than they take
PIECE = 64 * 1024
REQUEST = MIB  # bytes of one write of the fast writer
IN_FLIGHT = 4
PATTERN = 165  # of all bytes that writers write
TIMEOUT = 300.0
NICE = -10  # of the agent, as its unit has it
GUESTS = ("nice", "-n", str(-NICE))  # and of guests: we are as the agent is


def tables(directory: Path) -> tuple[bytes, int]:
    """The begin of a qcow2 image in which every cluster has its place already, one behind the
    other, and where the first one is: writing to a byte of the disk is writing to that byte of the
    volume, however small the volume is."""
    file = directory / "tables"
    how = ["-o", f"preallocation=metadata,cluster_size={CLUSTER}"]
    run("qemu-img", "create", "-q", "-f", "qcow2", *how, str(file), str(CAPACITY))
    first = json.loads(run("qemu-img", "map", "--output=json", str(file)))[0]["offset"]
    with file.open("rb") as image:
        data = image.read(TABLES)
    file.unlink()
    return data, first


def run(*argv: str) -> str:
    return subprocess.run(
        argv, check=True, capture_output=True, text=True, timeout=TIMEOUT
    ).stdout  # fmt: skip


# -- a guest --------------------------------------------------------------------------------------


class EventLoop:
    """libvirt's, in a thread, from now on and for all connections that are opened later."""

    def __init__(self) -> None:
        libvirt.virEventRegisterDefaultImpl()
        threading.Thread(target=self._run, name="libvirt events", daemon=True).start()

    @staticmethod
    def _run() -> None:
        while True:
            libvirt.virEventRunDefaultImpl()


@dataclass(frozen=True)
class Grown:
    """Seconds until the device was larger: from libvirt's event, and from the guest's write."""

    event: float
    write: float


class GuestDisk:
    """A disk of a VM of libvirt's that is paused; QEMU's monitor writes for it.

    libvirt tells us of the same event as the agent, at about the same time.
    """

    def __init__(self, subject: Subject, guest: Guest, volume: Volume, first: int) -> None:
        self._subject, self._guest, self._volume = subject, guest, volume
        self._first = first
        self._threshold = 0
        self._told = 0.0
        self._device = os.open(subject.path(volume.name), os.O_RDONLY)
        guest.domain.connect().domainEventRegisterAny(
            guest.domain, libvirt.VIR_DOMAIN_EVENT_ID_BLOCK_THRESHOLD, self._event, None
        )
        self.wait_armed()

    def _event(self, *_facts: object) -> None:
        self._told = self._told or time.perf_counter()

    def wait_armed(self) -> None:
        end = time.monotonic() + PATIENCE
        while True:
            [stats] = self._subject.domain.call("VM.getStats", {"vmID": self._guest.id})
            thin = stats["disks"].get("vda", {}).get("thin", {})
            if thin.get("state") == "armed" and int(thin["threshold"]) > self._threshold:
                self._threshold = int(thin["threshold"])
                return
            if time.monotonic() > end:
                raise SystemExit(f"the guest's disk is not watched: {thin}")
            time.sleep(0.01)

    def grow(self) -> Grown:
        """By a write that passes the threshold."""
        self._told = 0.0
        before = os.lseek(self._device, 0, os.SEEK_END)
        command = f"write {self._threshold - self._first} {PIECE}"
        writing = threading.Thread(target=qemu_io, args=(Machine(self._guest), command))
        began = time.perf_counter()
        writing.start()
        while os.lseek(self._device, 0, os.SEEK_END) <= before:
            if time.perf_counter() - began > PATIENCE:
                raise SystemExit("the guest's disk does not grow")
            time.sleep(LOOK)
        now = time.perf_counter()
        writing.join()
        self.wait_armed()
        return Grown(now - (self._told or now), now - began)

    def close(self) -> None:
        os.close(self._device)
        self._guest.destroy()


@contextlib.contextmanager
def guest_disk(
    subject: Subject, libvirtd: Libvirtd, volume: Volume, made: tuple[bytes, int]
) -> Iterator[GuestDisk]:
    data, first = made
    guests = Guests(libvirtd)
    subject.grow(volume, 3 * EXTENT)
    try:
        with subject.prepared([volume], "COW", CAPACITY) as [path]:
            with open(path, "r+b", buffering=0) as device:
                device.write(data)
                os.fsync(device.fileno())
            name = f"grows-{volume.name[:8]}"
            guest = guests.create(Plan(name, (Disk(path, image=volume.image),), agent=False))
            disk = GuestDisk(subject, guest, volume, first)
            try:
                yield disk
            finally:
                disk.close()
    finally:
        guests.close()


# -- a writer -------------------------------------------------------------------------------------


@contextlib.contextmanager
def storage_daemon(
    directory: Path, name: str, path: str, pace: int = 0
) -> Iterator[tuple[str, str]]:
    """A QEMU that has a qcow2 disk in `path`, and lets `pace` requests a second write to it, or any
    number; its monitor's socket, and that of the disk."""
    qmp, disk = (str(directory / f"{name}.{what}") for what in ("qmp", "disk"))
    storage = f"driver=host_device,filename={path},node-name={STORAGE},cache.direct=on"
    node, throttle = "image", list[str]()
    if pace:
        node = "paced"
        throttle = [
            "--object", f"throttle-group,id=pace,x-iops-write={pace}",
            "--blockdev", f"driver=throttle,throttle-group=pace,file=image,node-name={node}",
        ]  # fmt: skip
    daemon = subprocess.Popen([
        *GUESTS, "qemu-storage-daemon",
        "--chardev", f"socket,id=monitor,path={qmp},server=on,wait=off",
        "--monitor", "chardev=monitor",
        "--blockdev", storage,
        "--blockdev", f"driver=qcow2,file={STORAGE},node-name=image,detect-zeroes=off",
        *throttle,
        "--nbd-server", f"addr.type=unix,addr.path={disk}",
        "--export", f"type=nbd,id=e,node-name={node},name=disk,writable=on",
    ], stderr=subprocess.DEVNULL)  # fmt: skip
    try:
        end = time.monotonic() + PATIENCE
        while not (os.path.exists(qmp) and os.path.exists(disk)):
            if daemon.poll() is not None or time.monotonic() > end:
                raise SystemExit("qemu-storage-daemon does not start")
            time.sleep(0.01)
        yield qmp, disk
    finally:
        daemon.terminate()
        daemon.wait(PATIENCE)
        for each in (qmp, disk):
            Path(each).unlink(missing_ok=True)


@dataclass
class Trial:
    """What became of one writer.  `rate` in bytes a second."""

    policy: dict[str, int]
    rate: float
    failed: str  # by what, or ""
    facts: dict[str, Any]

    @property
    def good(self) -> bool:
        """It never had to wait for space, and was not slowed for it."""
        return not self.failed and not self.facts.get("slowed")


class Writers:
    """Each gets a volume of its own, which it writes to from begin to end, `size` bytes."""

    def __init__(self, subject: Subject, directory: Path, volumes: Sequence[Volume], size: int):
        self._subject = subject
        self._directory = directory
        self._volumes = list(volumes)
        self.size = size

    def free_run(self) -> float:
        """Bytes a second into a volume that has all the space that it needs."""
        with self._volume(self.size + GIB) as (path, _volume), self._daemon(path) as (_, disk):
            rate, failed = self._write(disk)
        if failed:
            raise SystemExit(f"the writer fails: {failed}")
        return rate

    def trial(self, policy: dict[str, int], latencies: Sequence[float]) -> Trial:
        """`latencies` in seconds: what the agent knows of the domain when the guest begins."""
        free = policy["headroom_min"] + policy["chunk_min"]
        control = self._subject.control
        with self._volume(free) as (path, volume), self._daemon(path) as (qmp, disk):
            drive = self._subject.drive(volume)
            control.watch([drive], policy, {drive[0]: qmp}, latencies)
            rate, failed = self._write(disk)
            facts = control.call("facts")
            control.call("forget")
        found = Trial(policy, rate, failed, facts)
        progress(f"{found}")
        return found

    @contextlib.contextmanager
    def _volume(self, size: int) -> Iterator[tuple[str, Volume]]:
        subject, volume = self._subject, self._volumes.pop()
        subject.grow(volume, -(-size // EXTENT) * EXTENT)
        with subject.prepared([volume], "COW", CAPACITY) as [path]:
            run("qemu-img", "create", "-q", "-f", "qcow2", path, str(CAPACITY))
            yield path, volume
        self._discard(volume)

    def _discard(self, volume: Volume) -> None:
        """The storage need not have it any more."""
        group = self._subject.bench.group
        device, start, length = piece(group.read(), group.devices(), volume.name)
        run("blkdiscard", "--force", "--offset", str(start), "--length", str(length), device)

    def _daemon(self, path: str) -> contextlib.AbstractContextManager[tuple[str, str]]:
        return storage_daemon(self._directory, "writer", path)

    def _write(self, disk: str) -> tuple[float, str]:
        """At full speed, no zeroes, no flushes; bytes a second, and why it ended early."""
        return write(disk, self.size // REQUEST, REQUEST, IN_FLIGHT)


def write(
    disk: str, count: int, size: int, in_flight: int, step: int = 0, first: int = 0
) -> tuple[float, str]:
    """`count` requests of `size` bytes each, one `step` (or `size`) after the other from `first`
    on; bytes of the disk that were passed a second, and why it ended early."""
    step = step or size
    done = subprocess.run(
        [*GUESTS, "qemu-img", "bench", "-w", "--pattern", str(PATTERN), "-f", "raw", "-c",
         str(count), "-d", str(in_flight), "-s", str(size), "-S", str(step), "-o", str(first),
         f"nbd+unix:///disk?socket={disk}"],
        check=False, capture_output=True, text=True, timeout=TIMEOUT,
    )  # fmt: skip
    if done.returncode:
        return 0.0, done.stderr.strip()
    found = re.search(r"completed in ([\d.]+) seconds", done.stdout)
    if found is None:
        raise SystemExit(done.stdout)
    return count * step / float(found[1]), ""
