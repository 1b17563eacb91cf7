# SPDX-License-Identifier: GPL-2.0-or-later
"""What an agent gets in place of device-mapper: lvm/activation.py's interface, by a stand-in."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence

from functional.standin import loops
from functional.standin.process import Channel
from vdsm_storage.errors import (
    CannotActivateLogicalVolume,
    CannotDeactivateLogicalVolume,
    LogicalVolumeRefreshError,
)
from vdsm_storage.lvm.activation import ActiveLv, GroupView
from vdsm_storage.lvm.model import VolumeGroup

Place = tuple[str, int, int]  # device, offset and length in bytes


class StandIn:
    """`socket` is that of the stand-in's daemon, in the directory where it keeps its links."""

    def __init__(self, socket: str) -> None:
        self._socket = socket
        directory = os.path.dirname(socket)
        self._dev = loops.below_dev(directory)
        with contextlib.suppress(FileExistsError):
            os.symlink(os.path.join(directory, "dev"), self._dev)

    def path(self, vg: str, lv: str) -> str:
        return os.path.join(self._dev, vg, lv)

    def activate(self, group: GroupView, lvs: Sequence[str]) -> None:
        wanted = [lv for lv in lvs if not os.path.exists(self.path(group.name, lv))]
        if not wanted:
            return
        vg, devices = group.read(), group.devices()
        with self._channel() as channel:
            for lv in wanted:
                try:
                    channel.call("activate", vg=vg.name, lv=lv, segments=places(vg, devices, lv))
                except (OSError, KeyError) as error:
                    why = f"{error!r}"
                    raise CannotActivateLogicalVolume(vg=vg.name, lv=lv, reason=why) from error

    def deactivate(self, group: GroupView, lvs: Sequence[str]) -> None:
        left = {}
        with self._channel() as channel:
            for lv in lvs:
                try:
                    channel.call("deactivate", vg=group.name, lv=lv)
                except OSError as error:
                    left[lv] = str(error)
        if left:
            raise CannotDeactivateLogicalVolume(
                vg=group.name, lv=", ".join(left), reason="; ".join(left.values())
            )

    def refresh(self, group: GroupView, lvs: Sequence[str]) -> None:
        vg, devices = group.read(), group.devices()
        with self._channel() as channel:
            for lv in lvs:
                if lv not in vg.lvs:
                    continue
                try:
                    channel.call("refresh", vg=vg.name, lv=lv, segments=places(vg, devices, lv))
                except (OSError, KeyError) as error:
                    why = f"{error!r}"
                    raise LogicalVolumeRefreshError(vg=vg.name, lv=lv, reason=why) from error

    def active(self, vg: str, lvs: Sequence[str] = ()) -> Mapping[str, ActiveLv]:
        with self._channel() as channel:
            found = channel.call("active", vg=vg, users=False)
        return {lv: ActiveLv(one["size"]) for lv, one in found.items()}

    @contextlib.contextmanager
    def _channel(self) -> Iterator[Channel]:
        channel = Channel(self._socket)
        try:
            yield channel
        finally:
            channel.close()


def places(vg: VolumeGroup, devices: Mapping[str, str], lv: str) -> list[Place]:
    """Where a volume's bytes are, in their order."""
    found = []
    for segment in sorted(vg.lvs[lv].segments, key=lambda one: one.start):
        pv = vg.pvs[segment.pv]
        start = pv.pe_start + segment.pv_start * vg.extent_size
        found.append((devices[pv.uuid], start, segment.count * vg.extent_size))
    return found
