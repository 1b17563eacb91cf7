# SPDX-License-Identifier: GPL-2.0-or-later
"""What a block device is, looked at before it becomes a physical volume.

From sysfs, and by blkid for what stands on it.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterable
from typing import Final

from vdsm_storage.base.run import Command, run
from vdsm_storage.errors import CommandError, CommandTimeout

SYSFS: Final = "/sys/dev/block"
_NOTHING: Final = 2  # blkid's exit codes: nothing found, and several things found
_AMBIVALENT: Final = 8
LVM_MEMBER: Final = "LVM2_member"


def number(device: str) -> int | None:
    """The device number by which two names of a device are the same; None if there is none."""
    try:
        status = os.stat(device)
    except OSError:
        return None
    return status.st_rdev if stat.S_ISBLK(status.st_mode) else None


def same(one: str, other: str) -> bool:
    """Whether two names are one device."""
    first = number(one)
    return one == other or (first is not None and first == number(other))


def sector_size(device: str) -> int:
    """Bytes of a logical sector.  Raises OSError."""
    return int(_read(device, "queue/logical_block_size"))


def size(device: str) -> int:
    """Bytes.  Raises OSError."""
    return int(_read(device, "size")) * 512


def partitions(device: str) -> list[str]:
    """Partitions that the kernel knows, by name.  Raises OSError."""
    directory = _directory(device)
    names = sorted(os.listdir(directory))
    return [name for name in names if os.path.exists(os.path.join(directory, name, "partition"))]


def users(device: str) -> list[str]:
    """Devices that are built on this one.  Raises OSError."""
    return sorted(os.listdir(os.path.join(_directory(device), "holders")))


def in_use(device: str) -> bool:
    """Whether something has it for itself: a mount, device-mapper, md.  Raises OSError."""
    try:
        os.close(os.open(device, os.O_RDONLY | os.O_EXCL | os.O_CLOEXEC))
    except OSError as error:
        if error.errno == errno.EBUSY:
            return True
        raise
    return False


def signatures(device: str, timeout: float) -> dict[str, str]:
    """What blkid finds on the device, empty when nothing.  Raises CommandError, CommandTimeout.

    >>> parse_blkid(["DEVNAME=/dev/loop7", "UUID=38ab6b6f-...", "TYPE=ext4", "USAGE=filesystem"])
    {'TYPE': 'ext4', 'USAGE': 'filesystem'}
    """
    argv = ["blkid", "--probe", "--output", "export", device]
    result = run(Command(argv, timeout, ok=(0, _NOTHING, _AMBIVALENT)))
    found = parse_blkid(result.stdout.decode(errors="replace").splitlines())
    if not found and b"ambivalent" in result.stderr:
        return {"TYPE": "several signatures"}
    return found


def parse_blkid(lines: Iterable[str]) -> dict[str, str]:
    rows = (line.partition("=") for line in lines)
    return {key: value for key, _, value in rows if key in ("TYPE", "PTTYPE", "USAGE")}


def what_is_on(device: str, timeout: float) -> str:
    """In words what is on the device besides LVM's label; "" for nothing."""
    try:
        found = signatures(device, timeout)
    except (CommandError, CommandTimeout) as error:
        return f"what is on it cannot be told: {error}"
    kind = found.get("TYPE", "")
    return "" if kind in ("", LVM_MEMBER) else f"there is {kind} on it"


def partition_table(device: str, timeout: float) -> bool:
    """Whether it has a partition table, even one that the kernel has not read.  Raises OSError."""
    if partitions(device):
        return True
    try:
        return "PTTYPE" in signatures(device, timeout)
    except (CommandError, CommandTimeout):
        return False


def _directory(device: str) -> str:
    rdev = os.stat(device).st_rdev
    return os.path.join(SYSFS, f"{os.major(rdev)}:{os.minor(rdev)}")


def _read(device: str, name: str) -> str:
    with open(os.path.join(_directory(device), name)) as file:
        return file.read().strip()
