# SPDX-License-Identifier: GPL-2.0-or-later
"""A lockspace on a real sanlock daemon: joining takes seconds, so it is made once."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from vdsm_storage.base.clock import SystemClock
from vdsm_storage.base.units import MIB
from vdsm_storage.base.uuids import new_uuid
from vdsm_storage.host.sanlock import Sanlock
from vdsm_storage.leases.lease import Leases
from vdsm_storage.leases.lockspace import Lockspace, Lockspaces
from vdsm_storage.leases.model import Geometry, LeaseSpec


@dataclass
class Joined:
    """A lockspace that this host is in, and files for leases."""

    sanlock: Sanlock
    leases: Leases
    lockspace: Lockspace
    directory: Path
    host_id: int
    made: int = 0

    def new_lease(self) -> LeaseSpec:
        """A free lease at a place of its own."""
        self.made += 1
        spec = LeaseSpec(
            self.lockspace.id, new_uuid(), str(self.directory / "leases"), self.made * MIB
        )
        self.leases.write(spec)
        return spec


@pytest.fixture(scope="session")
def joined(sanlock: Sanlock, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Joined]:
    directory = tmp_path_factory.mktemp("lockspace")
    clock = SystemClock()
    leases = Leases(sanlock, clock)
    sd_id = new_uuid()
    (directory / "ids").touch()
    (directory / "leases").touch()
    leases.write_lockspace(sd_id, str(directory / "ids"), Geometry())
    lockspace = Lockspaces(sanlock, clock).open(sd_id, str(directory / "ids"), Geometry())
    lockspace.acquire(7, 60)
    yield Joined(sanlock, leases, lockspace, directory, 7)
    lockspace.release()
