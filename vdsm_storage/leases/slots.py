# SPDX-License-Identifier: GPL-2.0-or-later
"""The index of external leases in its file: read and written past the page cache, block by block.

The caller holds the domain's lock around every change.
"""

from __future__ import annotations

import os
from collections.abc import Callable

from vdsm_storage.base.files import read_direct, write_direct
from vdsm_storage.errors import LeasesIndexUnusable
from vdsm_storage.leases import index as ix
from vdsm_storage.leases.leader import LEADER_SIZE, parse_leader
from vdsm_storage.leases.model import Geometry, LeaseSpec


class Slots:
    """The file or device `path` of the domain `lockspace`.

    `fence()` is called before every write; it raises when the domain's lock was lost.
    """

    def __init__(
        self,
        path: str,
        lockspace: str,
        geometry: Geometry,
        fence: Callable[[], None] = lambda: None,
    ) -> None:
        self.fence = fence
        self.path = path
        self.lockspace = lockspace
        self.geometry = geometry

    @property
    def _start(self) -> int:
        return self.geometry.alignment

    def spec(self, number: int, lease: str) -> LeaseSpec:
        """Where lease `number` is."""
        offset = ix.lease_offset(number, self.geometry.alignment)
        return LeaseSpec(self.lockspace, lease, self.path, offset, self.geometry)

    def load(self) -> ix.Index:
        """Raises LeasesIndexUnusable (749)."""
        try:
            return ix.decode(read_direct(self.path, ix.INDEX_SIZE, self._start), self.lockspace)
        except ix.IndexDamagedError as error:
            raise self._unusable(str(error)) from error
        except OSError as error:
            raise self._unusable(str(error)) from error

    def write(self, index: ix.Index) -> None:
        """Replace the whole index: marked as being written, then, by one block, as ready."""
        block = self.geometry.block_size
        alignment = self.geometry.alignment
        self.fence()
        write_direct(self.path, ix.encode(index, alignment, updating=True), self._start, block)
        ready = ix.encode(index, alignment)
        write_direct(self.path, ready[:block], self._start, block)

    def set(self, number: int, lease: str) -> None:
        """Put a lease into record `number`; "" frees it.  Writes the one block that holds it."""
        block = self.geometry.block_size
        offset = ix.lease_offset(number, self.geometry.alignment) if lease else 0
        position = ix.record_position(number)
        first = position - position % block
        data = bytearray(read_direct(self.path, ix.INDEX_SIZE, self._start)[first : first + block])
        record = ix.encode_record(lease, offset)
        data[position - first : position - first + len(record)] = record
        self.fence()
        write_direct(self.path, bytes(data), self._start + first, block)

    def scan(self) -> list[ix.Record]:
        """The leases that are really there, read from their own records.  Raises OSError."""
        alignment = self.geometry.alignment
        fd = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            size = os.lseek(fd, 0, os.SEEK_END)
        finally:
            os.close(fd)
        found = []
        for number in range(min(ix.RECORDS, size // alignment - ix.FIRST_SLOT)):
            offset = ix.lease_offset(number, alignment)
            leader = parse_leader(read_direct(self.path, LEADER_SIZE, offset))
            if leader is not None and leader.resource and leader.lockspace == self.lockspace:
                found.append(ix.Record(number, leader.resource))
        return found

    def _unusable(self, reason: str) -> LeasesIndexUnusable:
        return LeasesIndexUnusable(domain=self.lockspace, path=self.path, reason=reason)
