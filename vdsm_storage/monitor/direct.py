# SPDX-License-Identifier: GPL-2.0-or-later
"""Asking the pool's manager for space over JSON-RPC, where it runs this agent and its address is
known: there is no mailbox between them that somebody has to look into."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from vdsm_storage.errors import (
    ExtendRefused,
    InvalidConfiguration,
    PeerRefused,
    VolumeGroupSizeError,
)
from vdsm_storage.monitor.extend import Ask

VERB = "Volume.extendStorage"
# (host:port, verb, parameters, seconds) -> the answer of the agent there.  Raises
# NoConnectionToPeer (10), PeerRefused.
Call = Callable[[str, str, Mapping[str, Any], float], Any]


def managers(text: str, call: Call) -> dict[int, Ask]:
    """From the configuration, "1=host-a.example, 2=host-b.example:54321": by host id.

    Raises InvalidConfiguration.
    """
    found = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        number, equals, address = (piece.strip() for piece in part.partition("="))
        if not equals or not number.isdigit() or not address:
            raise InvalidConfiguration(
                source="", section="thin", option="managers",
                reason=f"{part!r} is not of the form HOST ID=ADDRESS",
            )  # fmt: skip
        found[int(number)] = _asking(address, call)
    return found


def _asking(address: str, call: Call) -> Ask:
    def ask(domain: str, volume: str, size: int, timeout: float) -> int:
        names = {"storagedomainID": domain, "volumeID": volume, "size": str(size)}
        try:
            return int(call(address, VERB, names, timeout))
        except PeerRefused as error:
            if error.facts["number"] == VolumeGroupSizeError.code:
                raise ExtendRefused(volume=volume, domain=domain, size=size) from error
            raise

    return ask
