# SPDX-License-Identifier: GPL-2.0-or-later
"""Files: replaced atomically, read past the page cache, made durable."""

from __future__ import annotations

import contextlib
import errno
import grp
import mmap
import os
from collections.abc import Iterator

DIRECT_ALIGN = 4096  # serves devices with sectors of 512 and of 4096 bytes


def write_volatile(path: str, data: bytes, mode: int = 0o644) -> None:
    """Replace `path` with `data` in one step, for what outlives this process but not the boot:
    nothing waits for the storage.  Raises OSError."""
    new = path + ".new"
    fd = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW, mode)
    try:
        _write_all(fd, data)
    finally:
        os.close(fd)
    os.rename(new, path)


def write_atomic(path: str, data: bytes, mode: int = 0o644, suffix: str = ".new") -> None:
    """Replace `path` with `data`: write `path + suffix`, fsync, rename, fsync the directory.

    A reader sees the old bytes or the new ones.  A crash may leave `path + suffix` behind; the
    next write takes it over.  Raises OSError.
    """
    new = path + suffix
    with _making(new, os.O_TRUNC, mode) as fd:
        _write_all(fd, data)
        os.fsync(fd)
    os.rename(new, path)
    sync_directory(os.path.dirname(path))


def write_new(path: str, data: bytes, mode: int = 0o644) -> None:
    """Make the file `path`, durable when this returns: in one commit of the file system, where
    `write_atomic` needs two.  A crash before that may leave it behind empty or cut off.

    Raises FileExistsError, and other OSError.
    """
    with _making(path, os.O_EXCL, mode) as fd:
        _write_all(fd, data)
        os.fsync(fd)
        sync_directory(os.path.dirname(path))


@contextlib.contextmanager
def _making(path: str, flags: int, mode: int) -> Iterator[int]:
    """A descriptor to write the file by; after an error in the block the file is gone."""
    flags |= os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
    fd = os.open(path, flags, mode)
    try:
        os.fchmod(fd, mode)
        yield fd
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(path)
        raise
    finally:
        os.close(fd)


def sync_directory(path: str) -> None:
    """Make creations, renames and removals in the directory `path` durable."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some FUSE servers have no fsyncdir
            raise
    finally:
        os.close(fd)


def make_shared_directory(path: str, group: str) -> None:
    """Make `path`, for this process and for the daemon that alone is in `group`.

    Where there is no such group, or this process may not give it away, it is its own.
    """
    os.makedirs(path, mode=0o700, exist_ok=True)
    with contextlib.suppress(KeyError, PermissionError):
        os.chown(path, -1, grp.getgrnam(group).gr_gid)
        os.chmod(path, 0o770)  # noqa: S103 - the group is the daemon alone


def _write_all(fd: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


@contextlib.contextmanager
def _direct(path: str, flags: int) -> Iterator[int]:
    """An O_DIRECT descriptor; plain where the file system has no direct I/O (tmpfs, some FUSE).

    A link is refused (ELOOP): on shared storage anyone may have put it there.  Below /dev the
    names of logical volumes are links.
    """
    flags |= os.O_CLOEXEC | (0 if path.startswith("/dev/") else os.O_NOFOLLOW)
    try:
        fd = os.open(path, flags | os.O_DIRECT)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        fd = os.open(path, flags)
    try:
        yield fd
    finally:
        os.close(fd)


def read_direct(path: str, length: int, offset: int = 0) -> bytes:
    """Up to `length` bytes at `offset` (a multiple of 4096), read from the storage itself."""
    size = max(DIRECT_ALIGN, -(-length // DIRECT_ALIGN) * DIRECT_ALIGN)
    with mmap.mmap(-1, size) as buffer, _direct(path, os.O_RDONLY) as fd:
        done = 0
        while done < length:
            with memoryview(buffer)[done:] as rest:
                count = os.preadv(fd, [rest], offset + done)
            if count == 0:
                break
            done += count
            if count % DIRECT_ALIGN:
                break  # end of file
        return buffer[: min(done, length)]


class DirectReader:
    """Many reads past the page cache, by one descriptor and one buffer of `size` bytes.

    A context manager; may block, raises OSError.
    """

    def __init__(self, path: str, size: int) -> None:
        self._path = path
        self._size = max(DIRECT_ALIGN, -(-size // DIRECT_ALIGN) * DIRECT_ALIGN)
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> DirectReader:
        with contextlib.ExitStack() as stack:
            self._buffer = stack.enter_context(mmap.mmap(-1, self._size))
            self._fd = stack.enter_context(_direct(self._path, os.O_RDONLY))
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def read(self, offset: int, length: int) -> bytes:
        """Up to `length` bytes at `offset`, both multiples of 4096; shorter at the end only."""
        if length > self._size:
            raise ValueError(f"{length} bytes do not fit into a buffer of {self._size}")
        done = 0
        while done < length:
            with memoryview(self._buffer)[done:length] as rest:
                count = os.preadv(self._fd, [rest], offset + done)
            done += count
            if count == 0 or count % DIRECT_ALIGN:
                break  # end of file
        return self._buffer[:done]


def write_direct(path: str, data: bytes, offset: int, align: int = 512) -> None:
    """Write `data` (whole sectors of `align` bytes) at `offset`, to the storage itself."""
    if len(data) % align or offset % align:
        raise ValueError(f"direct write of {len(data)} bytes at {offset} is not aligned to {align}")
    with mmap.mmap(-1, max(DIRECT_ALIGN, len(data))) as buffer, _direct(path, os.O_RDWR) as fd:
        buffer[: len(data)] = data
        done = 0
        while done < len(data):
            with memoryview(buffer)[done : len(data)] as rest:
                done += os.pwritev(fd, [rest], offset + done)
        os.fdatasync(fd)


def read_small(path: str, limit: int = 1024 * 1024) -> bytes:
    """A small file's bytes, symlinks refused; OSError EFBIG past `limit`."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        data = os.read(fd, limit + 1)
    finally:
        os.close(fd)
    if len(data) > limit:
        raise OSError(errno.EFBIG, os.strerror(errno.EFBIG), path)
    return data


def unlink_if_there(path: str) -> bool:
    """Remove a file; True if it was there."""
    try:
        os.unlink(path)
    except FileNotFoundError:
        return False
    return True
