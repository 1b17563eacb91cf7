# SPDX-License-Identifier: GPL-2.0-or-later
"""Verbs of the namespace VM: running virtual machines.

Each VM has a lane of its own: one whose QEMU or guest agent hangs delays nobody else.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from vdsm_storage.verbs.context import Context
from vdsm_storage.verbs.table import Verb

VM = "vmID"


def getStats(ctx: Context, vmID: str) -> list[dict[str, Any]]:
    return [ctx.services.vms.stats.one(vmID)]


def freeze(ctx: Context, vmID: str) -> None:
    ctx.services.vms.freezing.freeze(vmID)


def thaw(ctx: Context, vmID: str) -> None:
    ctx.services.vms.freezing.thaw(vmID)


VERBS: Final[Mapping[str, Verb]] = {
    "VM.getStats": Verb(getStats, lane=VM),
    "VM.freeze": Verb(freeze, lane=VM),
    "VM.thaw": Verb(thaw, lane=VM),
}
