# SPDX-License-Identifier: GPL-2.0-or-later
"""ISCSIConnection.*: what iSCSI portals offer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from vdsm_storage.base.secret import Secret
from vdsm_storage.verbs.context import Context
from vdsm_storage.verbs.table import Verb


def discoverSendTargets(
    ctx: Context,
    host: str,
    port: int,
    user: str = "",
    password: Secret | str = "",
    ipv6_enabled: bool = False,
) -> list[str]:
    """The form of the address says whether it is IPv6."""
    return ctx.services.storage.san.discover(host, port, user, password)


VERBS: Final[Mapping[str, Verb]] = {
    "ISCSIConnection.discoverSendTargets": Verb(discoverSendTargets, lane=":discovery"),
}
