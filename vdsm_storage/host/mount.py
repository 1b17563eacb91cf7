# SPDX-License-Identifier: GPL-2.0-or-later
"""mount(8), umount(8) and what the kernel says is mounted."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass

from vdsm_storage.base.owner import Owner
from vdsm_storage.base.run import Command, run
from vdsm_storage.errors import (
    AgentError,
    CommandError,
    CommandTimeout,
    ConnectionInvalid,
    ConnectionPermission,
    DisconnectionFailed,
    MountFailed,
)

SPEC_LIMIT = 1024  # bytes
ANSWER = 5.0  # seconds for a file system to say how full it is
_LAZY = ("--lazy", "--no-canonicalize", "--internal-only")
_ALWAYS = ("nosuid", "nodev")  # appended, because the last one wins
_OPTION = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.:/@%+=~^!\[\]-]*")
_VFS_TYPE = re.compile(r"[a-z0-9][a-z0-9_.+-]{0,63}")
# What changes more than this one mount, or what the agent decides itself.
_REFUSED = frozenset(
    {
        "remount", "move", "shared", "slave", "private", "unbindable", "rshared", "rslave",
        "rprivate", "runbindable", "rbind", "suid", "dev", "user", "users", "owner", "group",
    }
)
_SECRET = frozenset(
    {
        "password", "password2", "pass", "passwd", "secret", "key",
    }
)
_USER = frozenset({"user", "username"})  # CIFS takes name%password there
# Not storage: mounting one of these is never what an engine means.
_PSEUDO = frozenset(
    {
        "proc", "sysfs", "devtmpfs", "devpts", "cgroup", "cgroup2", "securityfs", "debugfs",
        "tracefs", "bpf", "configfs", "mqueue", "binfmt_misc", "pstore", "efivarfs", "autofs",
        "rpc_pipefs", "fusectl", "hugetlbfs", "nsfs",
    }
)


@dataclass(frozen=True)
class MountPoint:
    """One line of /proc/self/mountinfo; `root` is the directory of the file system shown there."""

    target: str
    source: str
    fstype: str
    root: str
    options: tuple[str, ...]


def parse_mountinfo(text: str) -> list[MountPoint]:
    """The mount points, oldest first.  A line reads:

    36 35 98:0 /dir /mnt/a\\040b rw,nosuid shared:1 - ext4 /dev/sdb1 rw,errors=continue
    """
    points = []
    for line in text.splitlines():
        before, dash, after = line.partition(" - ")
        first, second = before.split(" "), after.split(" ")
        if not dash or len(first) < 6 or len(second) < 2:
            continue
        points.append(
            MountPoint(
                target=_unescape(first[4]),
                source=_unescape(second[1]),
                fstype=second[0],
                root=_unescape(first[3]),
                options=tuple(first[5].split(",")),
            )
        )
    return points


def _unescape(text: str) -> str:
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match.group(1), 8)), text)


def check_options(text: str) -> list[str]:
    """The options of a comma list, refusing what could smuggle.  Raises ConnectionInvalid (453)."""
    options = [option.strip() for option in text.split(",") if option.strip()]
    for option in options:
        name, _, value = option.partition("=")
        reason = _wrong_option(option, name.lower(), value)
        if reason:  # the name alone is shown: any value may be a secret
            shown = f"mount option {name[:60]!r}"
            raise ConnectionInvalid(connection=shown, reason=reason)
    return options


def _wrong_option(option: str, name: str, value: str) -> str:
    """Why mount(8) must not be given this option, or ""."""
    if name in _SECRET or (name in _USER and "%" in value):
        return "every user could read the secret; name a file that holds it"
    if not _OPTION.fullmatch(option):
        return "it has characters that no mount option has"
    if name in _REFUSED or name.startswith(("x-", "helper")):
        return "it is refused here"
    return ""


def check_spec(spec: str, vfs_type: str) -> None:
    """Whether mount(8) may be given this.  Raises ConnectionInvalid (453)."""

    def bad(reason: str) -> ConnectionInvalid:
        return ConnectionInvalid(connection=spec[:200], reason=reason)

    if not spec or len(spec.encode()) > SPEC_LIMIT:
        raise bad(f"it must have 1 to {SPEC_LIMIT} bytes")
    if any(ord(c) < 32 or ord(c) == 127 for c in spec):
        raise bad("it holds a control character")
    if not _VFS_TYPE.fullmatch(vfs_type) or vfs_type in _PSEUDO:
        raise bad(f"vfs_type {vfs_type!r} is no file system for storage")
    if spec.startswith("-") or "/../" in f"{spec}/":
        raise bad("it must not start with a dash or step upwards with ..")
    if not (spec.startswith("/") or ":" in spec or vfs_type.startswith("fuse")):
        raise bad("it must be an absolute path, or host:path")


class Mounts:
    """Mounts and unmounts; each call ends within `timeout` seconds."""

    def __init__(self, timeout: float, mountinfo: str = "/proc/self/mountinfo") -> None:
        self._timeout = timeout
        self._mountinfo = mountinfo

    def points(self) -> list[MountPoint]:
        with open(self._mountinfo, encoding="utf-8", errors="surrogateescape") as file:
            return parse_mountinfo(file.read())

    def find(self, target: str) -> MountPoint | None:
        """What is mounted on `target` (the topmost), without touching the file system there."""
        found = [point for point in self.points() if point.target == target]
        return found[-1] if found else None

    def mount(self, spec: str, target: str, vfs_type: str, options: Sequence[str]) -> None:
        """Mount.  Raises MountFailed (477), ConnectionPermission (469)."""
        check_spec(spec, vfs_type)
        words = [*check_options(",".join(options)), *_ALWAYS]
        argv = ["mount", "-t", vfs_type, "-o", ",".join(words), "--", spec, target]
        try:
            run(Command(argv, self._timeout))
        except CommandError as error:
            reason = str(error.stderr)
            if re.search(r"(permission|access) denied", reason, re.IGNORECASE):
                raise ConnectionPermission(
                    path=spec, user="the agent", reason=f"the server refuses: {reason}"
                ) from error
            raise MountFailed(spec=spec, target=target, reason=reason) from error
        except AgentError as error:
            raise MountFailed(spec=spec, target=target, reason=str(error)) from error

    def unmount(self, target: str, lazy: bool = False) -> None:
        """Unmount; nothing happens when nothing is mounted.  Raises DisconnectionFailed (452).

        `lazy` takes the mount out of the tree even when it is busy or its server is dead.  Not by
        force: that would fail the I/O of virtual machines, which may go on when the server does.
        """
        if self.find(target) is None:
            return
        argv = ["umount", *(_LAZY if lazy else []), "--", target]
        try:
            run(Command(argv, self._timeout))
        except AgentError as error:
            if self.find(target) is None:
                return
            raise DisconnectionFailed(connection=target, reason=str(error)) from error

    def answers(self, target: str) -> bool:
        """Whether the file system there does; a program that can be left behind asks it."""
        try:
            run(Command(["stat", "--file-system", "--", target], ANSWER))
        except CommandTimeout:
            return False
        except AgentError:
            return True
        return True

    def backing_file(self, device: str) -> str | None:
        """The file behind a loop device that mount(8) made, or None."""
        name = os.path.basename(device)
        try:
            with open(f"/sys/block/{name}/loop/backing_file", encoding="utf-8") as file:
                return file.read().rstrip("\n")
        except OSError:
            return None

    def unusable_by(self, path: str, owner: Owner) -> str | None:
        """Why `owner` cannot read, write and enter `path`; None when it can."""
        if not os.path.isdir(path):
            return "it is no directory"
        if owner.is_process():
            usable = os.access(path, os.R_OK | os.W_OK | os.X_OK)
            return None if usable else "no permission to read, write and enter it"
        argv = ["setpriv", f"--reuid={owner.uid}", f"--regid={owner.gid}", "--clear-groups"]
        argv += ["test", "-r", path, "-a", "-w", path, "-a", "-x", path]
        try:
            run(Command(argv, self._timeout))
        except CommandError:
            return "no permission to read, write and enter it"
        return None
