# SPDX-License-Identifier: GPL-2.0-or-later
"""A volume that grew while its VM is on its way to another host: that host must see its size, too.

The VM may arrive at any moment, and goes on to write there.
"""

from __future__ import annotations

import logging
from typing import Final

from vdsm_storage.base.uuids import BLANK
from vdsm_storage.errors import AgentError
from vdsm_storage.vms.drives import VolumePath
from vdsm_storage.vms.migrations import Migrations

REFRESH: Final = 10.0  # seconds for the other host

log = logging.getLogger("thin")


class Moving:
    """`migrations` tells what is leaving, and for where."""

    def __init__(self, migrations: Migrations) -> None:
        self._migrations = migrations

    def refresh(self, vm: str, drive: str, volume: VolumePath) -> None:
        """Before the guest here goes on.  A failure is logged: the other host looks at what it
        gets when it is there, and a guest that had to pause for that is continued."""
        destination = self._migrations.destination_of(vm)
        if destination is None:
            return
        names = {
            "domainID": volume.domain, "imageID": volume.image, "volumeID": volume.volume,
            "device": "disk", "poolID": BLANK,
        }  # fmt: skip
        try:
            destination.call("VM.refresh_disk", {"vmID": vm, "drive": names}, REFRESH)
        except AgentError as error:
            log.warning("VM %s disk %s, on its way to %s: %s", vm, drive, destination.peer, error)
