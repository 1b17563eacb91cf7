# SPDX-License-Identifier: GPL-2.0-or-later
"""The host that a VM moves to sees the size of a volume that grew here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from vdsm_storage.errors import NoConnectionToPeer, PeerRefused
from vdsm_storage.monitor.thin_moving import Moving
from vdsm_storage.schema.loader import Schema
from vdsm_storage.schema.normalise import Checker
from vdsm_storage.vms.drives import VolumePath
from vdsm_storage.vms.migrations import Migrations

VM = "6d0ee6a1-9b6c-4c6e-8a3f-0d0b7a8f6c11"
VOLUME = VolumePath(
    "1c9a3c3e-3f63-4c5a-9d52-6a7c4b8f1e01", "2c9a3c3e-3f63-4c5a-9d52-6a7c4b8f1e02",
    "3c9a3c3e-3f63-4c5a-9d52-6a7c4b8f1e03",
)  # fmt: skip


class Peer:
    """What the other host was asked for."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, str, Mapping[str, Any]]] = []
        self.error: Exception | None = None

    def __call__(self, peer: str, verb: str, params: Mapping[str, Any], timeout: float) -> None:
        assert 0 < timeout < 60
        self.asked.append((peer, verb, params))
        if self.error is not None:
            raise self.error


def test_the_destination_refreshes_it() -> None:
    peer = Peer()
    migrations = Migrations(peer)
    migrations.begin(VM, "other.example:54321")
    Moving(migrations).refresh(VM, "vda", VOLUME)
    ((where, verb, params),) = peer.asked
    assert where == "other.example:54321"
    accepted: Any = Checker(Schema(), strict=True).check_params(verb, params).values
    assert accepted["vmID"] == VM
    assert accepted["drive"]["volumeID"] == VOLUME.volume
    assert (accepted["drive"]["domainID"], accepted["drive"]["imageID"]) == (
        VOLUME.domain, VOLUME.image,
    )  # fmt: skip


@pytest.mark.parametrize("error", [
    NoConnectionToPeer(peer="x", verb="VM.refresh_disk", reason="no route"),
    PeerRefused(peer="x", verb="VM.refresh_disk", number=1650, reason="it hangs"),
])  # fmt: skip
def test_one_that_cannot_does_not_stop_the_guest(error: Exception) -> None:
    peer = Peer()
    peer.error = error
    migrations = Migrations(peer)
    migrations.begin(VM, "other.example")
    Moving(migrations).refresh(VM, "vda", VOLUME)
    assert len(peer.asked) == 1


def test_nobody_is_asked_about_a_vm_that_stays() -> None:
    peer = Peer()
    migrations = Migrations(peer)
    Moving(migrations).refresh(VM, "vda", VOLUME)
    migrations.begin(VM, "other.example")
    migrations.ended(VM, None)
    Moving(migrations).refresh(VM, "vda", VOLUME)
    assert peer.asked == []
