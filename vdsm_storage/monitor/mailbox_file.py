# SPDX-License-Identifier: GPL-2.0-or-later
"""The two mailboxes of a master domain on the storage."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass

from vdsm_storage.base import files
from vdsm_storage.monitor.mailbox_format import BLOCK


@dataclass(frozen=True)
class Mailboxes:
    """`devices`: they are logical volumes, whose names may be links; files must not be links.

    `fence()` is called before a manager writes; it raises when another host may be the manager.
    """

    inbox: str
    outbox: str
    devices: bool = False
    fence: Callable[[], None] = lambda: None

    def read_inbox(self, first: int, count: int) -> bytes:
        """The blocks of `count` hosts from host `first` on, past the page cache."""
        return self._read(self.inbox, first, count)

    def read_outbox(self, host: int) -> bytes:
        return self._read(self.outbox, host, 1)

    def write_inbox(self, host: int, block: bytes) -> None:
        """Durable when it returns."""
        files.write_direct(self._real(self.inbox), block, host * BLOCK)

    def write_outbox(self, host: int, blocks: bytes) -> None:
        """The blocks of host `host` and of those after it; durable when it returns."""
        self.fence()
        files.write_direct(self._real(self.outbox), blocks, host * BLOCK)

    def _read(self, path: str, first: int, count: int) -> bytes:
        data = files.read_direct(self._real(path), count * BLOCK, first * BLOCK)
        return data.ljust(count * BLOCK, b"\0")

    def _real(self, path: str) -> str:
        return os.path.realpath(path) if self.devices else path
