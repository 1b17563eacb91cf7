# SPDX-License-Identifier: GPL-2.0-or-later
"""What StorageDomain.create asks for."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class CreateRequest:
    """StorageDomain.create's parameters in canonical form; `block_size` 0 is "find out".

    `remote_path` is the connection's; the UUID of a volume group for block domains.
    """

    id: str
    type: str
    remote_path: str
    name: str
    klass: str = "Data"
    version: int | None = None
    block_size: int = 512
    max_hosts: int = 250
