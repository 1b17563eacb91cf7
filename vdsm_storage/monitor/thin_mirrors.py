# SPDX-License-Identifier: GPL-2.0-or-later
"""Volumes that get, too, what a guest writes: the replica of a disk that moves, the base of an
active merge.  libvirt tells nothing of them, so they grow before the volume that is watched does.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Mapping
from typing import Final

from vdsm_storage.errors import AgentError
from vdsm_storage.monitor.thin_drive import Watched
from vdsm_storage.monitor.thin_tools import ThinTools
from vdsm_storage.vms.drives import VolumePath

EXTEND: Final = 30.0  # seconds; the guest's own volume must not wait for long

log = logging.getLogger("thin")


class Mirrors:
    def __init__(self, tools: ThinTools) -> None:
        self._tools = tools

    def extend(self, wants: Mapping[Watched, int]) -> None:
        """By as many bytes as their sources get.  A failure is logged: it fails the copy or the
        merge, which is reported there, and must not stop the guest."""
        domains: defaultdict[str, dict[str, int]] = defaultdict(dict)
        for each, target in wants.items():
            volume = each.mirrored
            if volume is None:
                continue
            try:
                size = self._wanted(volume, target - each.size)
            except AgentError as error:
                log.warning("VM %s disk %s: %s", each.vm, each.name, error)
                continue
            if size:
                domains[volume.domain][volume.volume] = size
        for domain, sizes in domains.items():
            self._extend(domain, sizes)

    def _wanted(self, volume: VolumePath, more: int) -> int:
        """0 for one that does not grow."""
        limit = self._tools.limit(volume)
        now = self._tools.domain(volume.domain).store.storage_size(volume.volume)
        return min(limit, now + more) if now < limit else 0

    def _extend(self, domain: str, sizes: Mapping[str, int]) -> None:
        try:
            found = self._tools.extender.extend_many(domain, sizes, EXTEND)
        except AgentError as error:
            found = dict.fromkeys(sizes, error)
        for volume, outcome in found.items():
            if isinstance(outcome, AgentError):
                log.error("Volume %s, which a guest's disk is copied to, has no room for what it"
                          " writes: %s", volume, outcome)  # fmt: skip
