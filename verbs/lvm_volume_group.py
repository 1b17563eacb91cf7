# SPDX-License-Identifier: GPL-2.0-or-later
"""LVMVolumeGroup.*: volume groups on LUNs, before and below their domains."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from vdsm_storage.verbs.context import Context
from vdsm_storage.verbs.table import Verb

GROUPS: Final = ":groups"


def create(
    ctx: Context,
    name: str,
    devlist: Sequence[str],
    force: bool = False,
    lvmvolumegroupID: str | None = None,
) -> str:
    return ctx.services.storage.devices.create_group(name, devlist, force)


def getInfo(ctx: Context, lvmvolumegroupID: str) -> dict[str, Any]:
    return ctx.services.storage.devices.group_info(lvmvolumegroupID)


def remove(ctx: Context, lvmvolumegroupID: str) -> None:
    ctx.services.storage.devices.remove_group(lvmvolumegroupID)


VERBS: Final[Mapping[str, Verb]] = {
    "LVMVolumeGroup.create": Verb(create, lane=GROUPS),
    "LVMVolumeGroup.getInfo": Verb(getInfo, lane=GROUPS),
    "LVMVolumeGroup.remove": Verb(remove, lane=GROUPS),
}
