# SPDX-License-Identifier: GPL-2.0-or-later
"""A device that can be made slow, failing or hanging while others use it.

    with Layer("/dev/loop0") as layer:
        lvm("vgcreate", "vg", layer.path)
        layer.hang()        # what is asked of it waits
        layer.heal()        # and is done now

Each call replaces what the one before did.
"""

from __future__ import annotations

import itertools
import os
import uuid
from pathlib import Path

from functional.lab.inner.tool import run, wait_for

SECTOR = 512


class Layer:
    """`path` is a device of its own, as large as `device`, and at first the same."""

    def __init__(self, device: str, name: str = "") -> None:
        self.device = device
        self.name = name or f"lab-{uuid.uuid4().hex[:8]}"
        self.path = f"/dev/mapper/{self.name}"
        self._sectors = int(run("blockdev", "--getsz", device))
        run("dmsetup", "create", self.name, "--table", self._linear(0, self._sectors))
        wait_for(self.path, lambda: os.path.exists(self.path))

    def __enter__(self) -> Layer:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    def heal(self) -> None:
        self._become(self._linear(0, self._sectors))

    def slow(self, read_ms: int, write_ms: int | None = None, length: int = 0) -> None:
        """Each request waits so long before it goes on; they wait side by side.  `length`: only
        those to the first so many bytes, and no flushes, for these are the whole device's."""
        write_ms = read_ms if write_ms is None else write_ms
        waits = (read_ms, write_ms, 0 if length else write_ms)
        count = length // SECTOR or self._sectors
        rows = [" ".join([f"0 {count} delay", *(f"{self.device} 0 {ms}" for ms in waits)])]
        if count < self._sectors:
            rows.append(self._linear(count, self._sectors - count))
        self._become("\n".join(rows))

    def fail(self) -> None:
        """EIO for everything."""
        self._become(f"0 {self._sectors} error")

    def fail_range(self, start: int, length: int) -> None:
        """EIO for what touches these bytes (multiples of 512)."""
        first, count = start // SECTOR, length // SECTOR
        after = first + count
        rows = [
            self._linear(0, first),
            f"{first} {count} error",
            self._linear(after, self._sectors - after),
        ]
        self._become("\n".join(row for row in rows if row.split()[1] != "0"))

    def fail_writes(self) -> None:
        """EIO for writes; reads go on."""
        self._become(self._flakey("error_writes"))

    def lose_writes(self) -> None:
        """Writes are answered as done and are not: a cache that loses its power."""
        self._become(self._flakey("drop_writes"))

    def hang(self) -> None:
        """Requests are neither done nor refused until another call here."""
        run("dmsetup", "suspend", "--noflush", "--nolockfs", self.name)

    def grow(self) -> None:
        """Take the present size of the device below."""
        self._sectors = int(run("blockdev", "--getsz", self.device))
        self.heal()

    def remove(self) -> None:
        """Requests that hang fail first, so that who waits for them lets go."""
        if Path(self.path).exists():
            self.fail()
            run("dmsetup", "remove", "--retry", self.name)

    def _become(self, table: str) -> None:
        replace_table(self.name, table)

    def _linear(self, first: int, count: int) -> str:
        return f"{first} {count} linear {self.device} {first}"

    def _flakey(self, feature: str) -> str:
        """Up for 0 seconds, down for 1, and so on: always down."""
        return f"0 {self._sectors} flakey {self.device} 0 0 1 1 {feature}"


class Mapped:
    """A mapped device that others made and use, as an active logical volume; made of linear rows.

    It must be healed before its owner changes it.
    """

    def __init__(self, path: str) -> None:
        self._name = run("dmsetup", "info", "-c", "--noheadings", "-o", "name", path).strip()
        self._table = run("dmsetup", "table", self._name)

    def fail_writes(self) -> None:
        """EIO for writes; reads go on."""
        rows = []
        for row in self._table.splitlines():
            first, count, _linear, device, start = row.split()
            rows.append(f"{first} {count} flakey {device} {start} 0 1 1 error_writes")
        replace_table(self._name, "\n".join(rows))

    def hang(self) -> None:
        """As Layer.hang."""
        run("dmsetup", "suspend", "--noflush", "--nolockfs", self._name)

    def heal(self) -> None:
        replace_table(self._name, self._table)


def replace_table(name: str, table: str) -> None:
    """Not waiting for udev, which looks at the device as it is now, slow or failing."""
    run("dmsetup", "load", name, "--table", table)
    run("dmsetup", "suspend", "--noflush", "--nolockfs", name)
    run("dmsetup", "resume", "--noudevsync", name)


def active(group: str) -> set[str]:
    """Volumes of a volume group that the kernel has."""
    start = group.replace("-", "--") + "-"
    rows = [row.split()[0] for row in run("dmsetup", "ls").splitlines()]
    return {row.removeprefix(start).replace("--", "-") for row in rows if row.startswith(start)}


class Loops:
    """Loop devices over sparse files of one directory."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._files: dict[str, Path] = {}
        self._numbers = itertools.count()

    def make(self, size: int, sector: int = SECTOR) -> str:
        """The path of a blank device of `size` bytes."""
        file = self._directory / f"loop{next(self._numbers)}.img"
        with file.open("wb") as opened:
            opened.truncate(size)
        options = ("--find", "--show", "--sector-size", str(sector), "--direct-io=on")
        device = run("losetup", *options, str(file)).strip()
        self._files[device] = file
        return device

    def grow(self, device: str, size: int) -> None:
        os.truncate(self._files[device], size)
        run("losetup", "--set-capacity", device)

    def remove(self, device: str) -> None:
        run("losetup", "--detach", device)
        self._files.pop(device).unlink()

    def remove_all(self) -> None:
        for device in list(self._files):
            self.remove(device)
