# SPDX-License-Identifier: GPL-2.0-or-later
"""Directories of a domain, entered one name at a time and never through a symbolic link.

Whoever can write to the storage could plant a link that leads out of the domain; every open here
is relative to a directory that is already open and refuses links.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Callable, Iterator

from vdsm_storage.base.owner import Owner
from vdsm_storage.base.units import MIB
from vdsm_storage.errors import VolumeAccessError

DIRECTORY_MODE = 0o755
DATA_MODE = 0o660
TEXT_MODE = 0o644

DIRECTORY_FLAGS = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_FILE = os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK

ALLOCATE_STEP = 128 * MIB  # preallocation reports and can be stopped after each step


class Tree:
    """The tree below `root`.  `owner` is given to what is made here; None leaves it the agent's."""

    def __init__(self, root: str, owner: Owner | None) -> None:
        self.root = root
        self._owner = owner if owner is not None and os.geteuid() == 0 else None

    @contextlib.contextmanager
    def directory(self, *names: str) -> Iterator[int]:
        """A descriptor of the directory root/names.  FileNotFoundError if it is not there."""
        fd = self._enter(self.root, None)
        try:
            for name in names:
                inner = self._enter(name, fd)
                os.close(fd)
                fd = inner
            yield fd
        finally:
            os.close(fd)

    def _enter(self, name: str, parent: int | None) -> int:
        try:
            return os.open(name, DIRECTORY_FLAGS, dir_fd=parent)
        except OSError as error:
            if error.errno in (errno.ELOOP, errno.ENOTDIR):
                raise self.refused(name, "it is a link or file, no directory; remove it") from error
            raise

    def refused(self, name: str, reason: str) -> VolumeAccessError:
        path = name if name.startswith("/") else f"{self.root}/.../{name}"
        return VolumeAccessError(path=path, reason=reason)

    def make_directory(self, parent: int, name: str) -> bool:
        """True if it was made, False if it was there."""
        try:
            os.mkdir(name, DIRECTORY_MODE, dir_fd=parent)
        except FileExistsError:
            return False
        fd = self._enter(name, parent)
        try:
            os.fchmod(fd, DIRECTORY_MODE)
            self._own(fd)
        finally:
            os.close(fd)
        sync(parent)
        return True

    def open_file(self, parent: int, name: str, flags: int) -> int:
        """Open a regular file; VolumeAccessError for a link or anything else of that name."""
        try:
            fd = os.open(name, flags | _FILE, dir_fd=parent)
        except OSError as error:
            if error.errno in (errno.ELOOP, errno.ENXIO, errno.EISDIR):
                raise self.refused(name, "it is no regular file; remove it") from error
            raise
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            os.close(fd)
            raise self.refused(name, "it is no regular file; remove it")
        return fd

    def require_file(self, parent: int, name: str) -> None:
        """Whether `name` is a regular file or nothing; VolumeAccessError if it is not."""
        found = status(parent, name)
        if found is not None and not stat.S_ISREG(found.st_mode):
            raise self.refused(name, "it is no regular file; remove it")

    def create_file(self, parent: int, name: str, mode: int) -> int:
        """A new, empty file, in the place of one that may be left over."""
        remove(parent, name)
        fd = os.open(name, os.O_RDWR | os.O_CREAT | os.O_EXCL | _FILE, mode, dir_fd=parent)
        try:
            os.fchmod(fd, mode)  # whatever the umask is
            self._own(fd)
        except BaseException:
            os.close(fd)
            raise
        return fd

    def replace_file(self, parent: int, name: str, data: bytes) -> None:
        """Replace a text file atomically and durably; a crash may leave `name.new`."""
        new = name + ".new"
        fd = self.create_file(parent, new, TEXT_MODE)
        try:
            os.write(fd, data)
            os.fsync(fd)
        finally:
            os.close(fd)
        os.rename(new, name, src_dir_fd=parent, dst_dir_fd=parent)
        sync(parent)

    def link(self, source: int, target: int, name: str) -> None:
        """Make `name` in `target` the same file as in `source`, replacing what is there."""
        theirs = os.stat(name, dir_fd=source, follow_symlinks=False)
        if not stat.S_ISREG(theirs.st_mode):
            raise self.refused(name, "it is no regular file; remove it")
        ours = status(target, name)
        if ours is not None and (ours.st_dev, ours.st_ino) == (theirs.st_dev, theirs.st_ino):
            return
        new = name + ".new"
        remove(target, new)
        os.link(name, new, src_dir_fd=source, dst_dir_fd=target, follow_symlinks=False)
        os.rename(new, name, src_dir_fd=target, dst_dir_fd=target)
        sync(target)

    def read_file(self, parent: int, name: str, limit: int) -> bytes:
        """At most `limit` bytes of a regular file."""
        fd = self.open_file(parent, name, os.O_RDONLY)
        try:
            return os.read(fd, limit)
        finally:
            os.close(fd)

    def _own(self, fd: int) -> None:
        if self._owner is not None:
            self._owner.apply_fd(fd)

    def restore(self, fd: int, mode: int) -> None:
        """Give an open file its mode and owner again if someone changed them."""
        status = os.fstat(fd)
        if stat.S_IMODE(status.st_mode) != mode:
            os.fchmod(fd, mode)
        owner = self._owner
        if owner is not None and (status.st_uid, status.st_gid) != (owner.uid, owner.gid):
            os.fchown(fd, owner.uid, owner.gid)


def status(parent: int, name: str) -> os.stat_result | None:
    """What the directory holds under `name`, links not followed; None for nothing."""
    try:
        return os.stat(name, dir_fd=parent, follow_symlinks=False)
    except FileNotFoundError:
        return None


def remove(parent: int, name: str) -> bool:
    """Remove a file; True if it was there."""
    try:
        os.unlink(name, dir_fd=parent)
    except FileNotFoundError:
        return False
    return True


def remove_directory(parent: int, name: str) -> bool:
    """Remove a directory if it is there and empty; True if it is gone."""
    try:
        os.rmdir(name, dir_fd=parent)
    except FileNotFoundError:
        return True
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
            return False
        raise
    sync(parent)
    return True


def sync(fd: int) -> None:
    """Make a directory's entries durable."""
    try:
        os.fsync(fd)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some FUSE servers have no fsyncdir
            raise


def allocate(fd: int, start: int, end: int, progress: Callable[[float], None]) -> None:
    """Allocate and zero the bytes from `start` to `end`, in steps that are reported.

    Where the file system cannot allocate, the C library writes zeros instead.
    """
    done = start
    while done < end:
        step = min(ALLOCATE_STEP, end - done)
        os.posix_fallocate(fd, done, step)
        done += step
        progress((done - start) / (end - start))
