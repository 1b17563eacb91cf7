# SPDX-License-Identifier: GPL-2.0-or-later
"""The lock of a local domain's metadata: flock on one of the domain's files.

One host sees a local directory, so the kernel can keep its writers apart.
"""

from __future__ import annotations

import errno
import fcntl
import os
import threading
from typing import Final

from vdsm_storage.base.clock import Clock, Deadline
from vdsm_storage.errors import AcquireLockFailure, SpmStatusError
from vdsm_storage.leases.cluster_lock import CountedLock
from vdsm_storage.leases.model import LeaseState

POLL: Final = 0.02  # seconds
LOCAL_HOST_ID: Final = 1  # what a local domain calls its only host


class _Flock:
    def __init__(self, domain: str, path: str, clock: Clock) -> None:
        self._domain = domain
        self.path = path
        self._clock = clock
        self._fd: int | None = None

    def acquire(self, timeout: float) -> None:
        deadline = Deadline(self._clock, timeout)
        try:
            fd = os.open(self.path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
        except OSError as error:
            raise self._failure(error) from error
        try:
            while not self._try(fd):
                if deadline.passed():
                    raise SpmStatusError(
                        domain=self._domain, owner="another agent here", seconds=round(timeout, 1)
                    )
                self._clock.wait(threading.Event(), POLL)
        except BaseException:
            os.close(fd)
            raise
        self._fd = fd

    def release(self) -> None:
        assert self._fd is not None
        os.close(self._fd)
        self._fd = None

    def lost(self) -> AcquireLockFailure:
        return self._failure(OSError(errno.EIO, "the lock was lost"))

    def fresh(self) -> bool:
        """The kernel keeps it as long as the descriptor is open."""
        return True

    def is_free(self) -> bool:
        """Whether nobody has it, this process included."""
        try:
            fd = os.open(self.path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
        except OSError as error:
            raise self._failure(error) from error
        try:
            return self._try(fd)
        finally:
            os.close(fd)

    def _try(self, fd: int) -> bool:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EWOULDBLOCK, errno.EINTR):
                return False
            raise self._failure(error) from error
        return True

    def _failure(self, error: OSError) -> AcquireLockFailure:
        return AcquireLockFailure(
            lockspace=self._domain,
            resource="file lock",
            path=self.path,
            offset=0,
            reason=error.strerror,
        )


class FileLock(CountedLock):
    """Fulfils leases.model.ClusterLock for the domain `domain` with the file `path`."""

    def __init__(self, domain: str, path: str, clock: Clock) -> None:
        self._flock = _Flock(domain, path, clock)
        super().__init__(domain, self._flock, clock)

    def inquire(self) -> LeaseState:
        if self._flock.is_free():
            return LeaseState(owners=(), version=None)
        return LeaseState(owners=(LOCAL_HOST_ID,), version=0)
