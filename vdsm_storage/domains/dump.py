# SPDX-License-Identifier: GPL-2.0-or-later
"""StorageDomain.dump: all that a domain says of itself, what is broken included."""

from __future__ import annotations

from typing import Any, Final

from vdsm_storage.base import files
from vdsm_storage.domains.domain import Domain
from vdsm_storage.images.store import Examined
from vdsm_storage.leases import index
from vdsm_storage.leases.leader import DELTA_MAGIC, Leader, parse_leader

OK: Final = "OK"
INVALID: Final = "INVALID"
REMOVED: Final = "REMOVED"
HOSTS: Final = 2000  # records of a lockspace


def dump(domain: Domain, full: bool) -> dict[str, Any]:
    """Metadata and volumes; with `full` the leases, host ids and external leases, if any."""
    answer: dict[str, Any] = {"metadata": domain.info(), "volumes": volumes(domain)}
    if full and domain.type.leases:
        domain.check_special_files()
        answer["leases"] = leases(domain)
        answer["lockspace"] = lockspace(domain)
        if domain.xleases_path is not None:
            answer["xleases"] = external_leases(domain, domain.xleases_path)
    return answer


def volumes(domain: Domain) -> dict[str, dict[str, Any]]:
    return {found.volume: _volume(found) for found in domain.store.examine_all()}


def _volume(found: Examined) -> dict[str, Any]:
    entry: dict[str, Any] = {"image": found.image}
    if found.parsed is not None:
        entry.update(found.parsed.as_dump())
    good = found.parsed is not None and not found.parsed.errors and found.sizes is not None
    entry["status"] = REMOVED if found.removed else OK if good else INVALID
    if found.sizes is not None:
        entry.update(truesize=found.sizes.allocated, apparentsize=found.sizes.apparent)
    if found.slot is not None:
        entry["mdslot"] = found.slot
    return entry


def leases(domain: Domain) -> list[dict[str, Any]]:
    """The domain's own lease, and on block domains those of its volumes, by their places."""
    found = []
    specs = [domain.sdm_lease, *domain.volume_leases()]
    for spec in specs:
        leader = parse_leader(files.read_direct(spec.path, domain.geometry.block_size, spec.offset))
        if leader is not None:
            found.append({**_common(leader, spec.offset), "lver": leader.version})
    return found


def lockspace(domain: Domain) -> list[dict[str, Any]]:
    """The host ids that are or were in use."""
    size = domain.geometry.block_size
    data = files.read_direct(domain.ids_path, HOSTS * size)
    found = []
    for offset in range(0, len(data), size):
        leader = parse_leader(data[offset : offset + size], DELTA_MAGIC)
        if leader is not None and leader.owner_id:
            found.append(_common(leader, offset))
    return found


def _common(leader: Leader, offset: int) -> dict[str, Any]:
    return {
        "offset": offset,
        "lockspace": leader.lockspace,
        "resource": leader.resource,
        "timestamp": leader.timestamp,
        "own": leader.owner_id,
        "gen": leader.owner_generation,
    }


def external_leases(domain: Domain, path: str) -> dict[str, dict[str, Any]]:
    step = domain.geometry.alignment
    try:
        found = index.decode(files.read_direct(path, index.INDEX_SIZE, step), domain.id)
    except index.IndexDamagedError:
        return {}
    return {
        record.lease: {
            "offset": index.lease_offset(record.number, step),
            "updating": record.updating,
        }
        for record in found.records
    }
