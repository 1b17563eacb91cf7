# SPDX-License-Identifier: GPL-2.0-or-later
"""VM.migrate as it is asked for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vdsm_storage.errors import MigrationError
from vdsm_storage.host.libvirt_migration import Way


@dataclass(frozen=True)
class Routes:
    """How libvirt and QEMU of a host are reached: URIs with {host} in them."""

    libvirt: str
    data: str


@dataclass(frozen=True)
class MigrateRequest:
    """`peer` is the other agent, host:port; `limit` are the VMs that may arrive there at a time,
    `outgoing` those that may leave from here, 0 for no limit."""

    vm: str
    peer: str
    way: Way
    limit: int = 0
    outgoing: int = 0
    schedule: Mapping[str, Any] | None = None  # what to do when it does not come to an end


def parse(vm: str, params: Mapping[str, Any], routes: Routes) -> MigrateRequest:
    """Raises MigrationError (12)."""
    if params.get("mode", "remote") != "remote":
        raise _bad(vm, "params.mode is file; only moving to another host is built")
    peer = str(params.get("dst") or "")
    host = host_of(peer)
    if not host:
        raise _bad(vm, "params.dst is missing; name the other host and its port")
    data = str(params.get("dstqemu") or host).strip("[]")
    way = Way(
        uri=routes.libvirt.format(host=host),
        data=routes.data.format(host=f"[{data}]" if ":" in data else data),
        bandwidth=max(0, int(params.get("maxBandwidth") or 0)),
        parallel=int(params.get("parallel") or 0),
        tunneled=bool(params.get("tunneled")),
        encrypted=bool(params.get("encrypted")),
        compressed=bool(params.get("compressed")),
        converge=bool(params.get("autoConverge")),
        abort_on_error=bool(params.get("abortOnError")),
    )
    incoming, outgoing = (
        int(params.get(key) or 0) for key in ("incomingLimit", "outgoingLimit")
    )
    schedule = params.get("convergenceSchedule")
    return MigrateRequest(vm, peer, way, incoming, outgoing, schedule)


def host_of(peer: str) -> str:
    """Of host, host:port or [address]:port; an address with colons keeps its brackets."""
    if peer.startswith("["):
        return peer.partition("]")[0] + "]"
    return peer.partition(":")[0] if peer.count(":") == 1 else peer


def _bad(vm: str, reason: str) -> MigrationError:
    return MigrationError(vm=vm, reason=reason)
