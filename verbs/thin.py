# SPDX-License-Identifier: GPL-2.0-or-later
"""What VM.getStats and Host.getAllVmStats say of disks that grow."""

from __future__ import annotations

from typing import Any

from vdsm_storage.verbs.context import Thin


def with_thin(thin: Thin, row: dict[str, Any]) -> dict[str, Any]:
    """A VM's statistics, with `thin` of each disk that is watched.

    What was written is as old there as the last event; libvirt was asked just now.
    """
    disks = row.get("disks")
    if disks:
        for drive, watched in thin.stats(row["vmId"]).items():
            if drive in disks:
                written = max(int(watched["allocation"]), int(disks[drive].get("written", 0)))
                disks[drive]["thin"] = {**watched, "allocation": str(written)}
    return row
