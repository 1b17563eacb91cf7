# SPDX-License-Identifier: GPL-2.0-or-later
"""Lease.*: leases of virtual machines and of jobs, in a domain's index of external leases."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from vdsm_storage.leases.external import LeaseRef
from vdsm_storage.verbs.context import Context
from vdsm_storage.verbs.table import Verb


def create(
    ctx: Context, lease: Mapping[str, str], metadata: Mapping[str, Any] | None = None
) -> str:
    return ctx.services.leases.start_create(_ref(lease), metadata)


def delete(ctx: Context, lease: Mapping[str, str]) -> str:
    return ctx.services.leases.start_delete(_ref(lease))


def rebuild_leases(ctx: Context, sd_id: str) -> str:
    return ctx.services.leases.start_rebuild(sd_id)


def info(ctx: Context, lease: Mapping[str, str]) -> dict[str, Any]:
    return ctx.services.leases.info(_ref(lease))


def status(ctx: Context, lease: Mapping[str, str]) -> dict[str, Any]:
    return ctx.services.leases.status(_ref(lease))


def fence(ctx: Context, lease: Mapping[str, str], metadata: Mapping[str, Any]) -> None:
    ctx.services.leases.fence(_ref(lease), metadata)


def _ref(lease: Mapping[str, str]) -> LeaseRef:
    return LeaseRef(lease["sd_id"], lease["lease_id"])


VERBS: Final[Mapping[str, Verb]] = {
    "Lease.create": Verb(create, lane="lease.sd_id"),
    "Lease.delete": Verb(delete, lane="lease.sd_id"),
    "Lease.fence": Verb(fence, lane="lease.sd_id"),
    "Lease.info": Verb(info, lane="lease.sd_id"),
    "Lease.rebuild_leases": Verb(rebuild_leases, lane="sd_id"),
    "Lease.status": Verb(status, lane="lease.sd_id"),
}
