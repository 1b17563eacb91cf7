# SPDX-License-Identifier: GPL-2.0-or-later
"""Volumes of one block domain made usable on this host, and no longer when nobody needs them."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from typing import Final

from vdsm_storage.domains import block_names as names
from vdsm_storage.domains.block_special import Specials
from vdsm_storage.domains.block_use import OPERATION, Uses
from vdsm_storage.errors import (
    AgentError,
    CannotActivateLogicalVolume,
    CannotDeactivateLogicalVolume,
    CannotRemoveLogicalVolume,
    VolumesZeroingError,
)
from vdsm_storage.host import block_device
from vdsm_storage.images.store import Progress, Wipe

log = logging.getLogger("activation")

SELDOM: Final = 60  # looks at the domain between two tries to deactivate what stays open


class ActiveVolumes:
    """Needs the domain's special volumes (for its group) and what counts users."""

    def __init__(self, specials: Specials, uses: Uses) -> None:
        self._specials = specials
        self._group = specials.group
        self._activation = specials.activation
        self._uses = uses
        self._domain = specials.group.name
        self._left = True  # whether volumes may be active that nobody uses
        self._pause = self._skip = 0  # looks at the domain between two tries to deactivate them

    # -- for operations, and for guests --------------------------------------------------------

    def activate(self, image: str, volumes: Sequence[str]) -> None:
        self._uses.add(
            self._domain, volumes, OPERATION, lambda: self._activate(image, volumes)
        )

    def deactivate(self, image: str, volumes: Sequence[str]) -> None:
        self._uses.remove(
            self._domain, volumes, OPERATION, lambda unused: self._deactivate(image, unused)
        )

    def prepare(self, image: str, volumes: Sequence[str]) -> None:
        self._uses.add(self._domain, volumes, image, lambda: self._activate(image, volumes))

    def release(self, image: str, volumes: Sequence[str]) -> None:
        """Of volumes that left the image meanwhile (a merge), too."""
        prepared = self._uses.prepared(self._domain, image)
        gone = set(prepared) - set(self._group.read().lvs)
        wanted = list(dict.fromkeys([*volumes, *gone]))
        self._uses.remove(
            self._domain, wanted, image, lambda unused: self._deactivate(image, unused)
        )

    def _activate(self, image: str, volumes: Sequence[str]) -> None:
        group = self._group.read(self._group.unchanged())
        active = self._activation.active(self._domain, volumes)
        missing = [volume for volume in volumes if volume not in group.lvs]
        if missing:
            raise CannotActivateLogicalVolume(
                vg=self._domain, lv=missing[0], reason="there is no such volume"
            )
        inactive = [volume for volume in volumes if volume not in active]
        grown = [v for v in volumes if v in active and active[v].size != group.size_of(v)]
        if inactive:
            self._activation.activate(self._group, inactive)
            self._specials.own(inactive)
        if grown:
            self._activation.refresh(self._group, grown)
        self._specials.link(image, volumes)

    def _deactivate(self, image: str, unused: Sequence[str]) -> None:
        self._specials.unlink(image, unused)
        active = self._activation.active(self._domain, unused)
        wanted = [volume for volume in unused if volume in active]
        if not wanted:
            return
        try:
            self._activation.deactivate(self._group, wanted)
        except CannotDeactivateLogicalVolume as error:
            # Somebody whom this agent does not know has it open; tidy() tries again.
            log.warning("Volumes of domain %s stay active: %s", self._domain, error)
            self._left, self._pause, self._skip = True, 0, 0

    def refresh(self, volumes: Sequence[str]) -> None:
        """Those that are active get the size that they have in the group now."""
        wanted = [volume for volume in volumes if os.path.exists(self._specials.device(volume))]
        if wanted:
            self._activation.refresh(self._group, wanted)

    def grow(self, volumes: Sequence[str]) -> None:
        """The same for those only that have another size here."""
        group = self._group.read(self._group.unchanged())
        active = self._activation.active(self._domain, volumes)
        wanted = [v for v in volumes if v in active and active[v].size != group.size_of(v)]
        if wanted:
            self._activation.refresh(self._group, wanted)

    # -- before they go ------------------------------------------------------------------------

    def drop(self, volumes: Sequence[str]) -> None:
        """Deactivate what is to be removed, prepared or not.

        Raises CannotRemoveLogicalVolume (551) for one that an operation or a guest uses.
        """
        for volume in volumes:
            for user in self._uses.users(self._domain, volume):
                if user == OPERATION:
                    raise CannotRemoveLogicalVolume(
                        vg=self._domain, lv=volume, reason="an operation uses it; try again"
                    )
        there = self._activation.active(self._domain, volumes)
        active = [volume for volume in volumes if volume in there]
        if active:
            try:
                self._activation.deactivate(self._group, active)
            except CannotDeactivateLogicalVolume as error:
                self._activation.activate(self._group, active)  # as they were, all of them
                self._specials.own(active)
                raise CannotRemoveLogicalVolume(
                    vg=self._domain, lv=", ".join(active), reason=error
                ) from error
        for volume in volumes:
            for user in self._uses.users(self._domain, volume):
                self._uses.remove(self._domain, [volume], user, lambda unused: None)

    def wipe(self, volume: str, how: Wipe, progress: Progress) -> None:
        """Zero or discard the whole of a volume that is in no image any more.

        No lock is held that long.  If this host is taken for dead meanwhile, another one removes
        the volume, and its extents may be another volume's soon: it is looked for all the time.
        """

        def watch(fraction: float) -> None:
            progress(fraction)
            if volume not in self._group.read().lvs:
                raise VolumesZeroingError(
                    device=self._specials.device(volume), reason="another host has removed it"
                )

        with self._uses.unused(self._domain, [volume]):
            self._uses.add(
                self._domain, [volume], OPERATION, lambda: self._activate_alone(volume)
            )
            try:
                device = self._specials.device(volume)
                if how.zero:
                    block_device.zero(device, watch)
                if how.discard:
                    self._discard(device, watch)
            finally:
                self._uses.remove(
                    self._domain,
                    [volume],
                    OPERATION,
                    lambda unused: self._activation.deactivate(self._group, unused),
                )

    def _activate_alone(self, volume: str) -> None:
        self._activation.activate(self._group, [volume])

    def _discard(self, device: str, progress: Progress) -> None:
        """A courtesy to the storage: one that cannot take it does not keep the volume."""
        try:
            block_device.discard(device, progress)
        except AgentError as error:
            if error.code == 443:
                raise
            log.warning("%s", error)

    # -- after a restart -----------------------------------------------------------------------

    def settle(self) -> None:
        """Deactivate volumes that nobody uses: those of operations that died, of guests that are
        gone.  One that is open stays."""
        self._left = False
        candidates = sorted(set(self._activation.active(self._domain)) - names.SPECIAL)
        if not candidates:
            return
        with self._uses.unused(self._domain, candidates) as unused:
            for volume in unused:
                try:
                    self._activation.deactivate(self._group, [volume])
                except CannotDeactivateLogicalVolume as error:
                    log.info("%s", error)
                    self._left = True

    def tidy(self) -> None:
        """settle() when the domain is first looked at; again, ever more seldom, while something
        that nobody uses is open."""
        if not self._left:
            return
        if self._skip > 0:
            self._skip -= 1
            return
        self.settle()
        self._pause = self._skip = min(2 * self._pause + 1, SELDOM)

    def volumes(self) -> list[str]:
        """Active volumes of the domain, its special ones left out."""
        return sorted(set(self._activation.active(self._domain)) - names.SPECIAL)
