# SPDX-License-Identifier: GPL-2.0-or-later
"""Verbs of the namespace SDM: jobs that any host of the pool may run.

Each starts a job under the caller's id and returns at once; Host.getJobs tells the rest.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from vdsm_storage.errors import InvalidParams, UnsupportedOperation
from vdsm_storage.images import bitmaps, sparsify, update
from vdsm_storage.images.copy import CopyRequest
from vdsm_storage.images.copy_external import ExternalCopyRequest
from vdsm_storage.images.guard import VolumeRef
from vdsm_storage.images.merge import MergeRequest
from vdsm_storage.verbs.context import Context
from vdsm_storage.verbs.table import Verb

Div = Mapping[str, Any]  # CopyDataDIVEndpoint: sd_id, img_id, vol_id, generation, prepared


def copy_data(
    ctx: Context,
    job_id: str,
    source: Div,
    destination: Div,
    copy_bitmaps: bool = False,
) -> None:
    if _is_external(source) or _is_external(destination):
        job = _external_copy(job_id, source, destination, copy_bitmaps)
        ctx.services.data.start_job(job_id, job.as_job(ctx.services.config.paths.run))
        return
    request = CopyRequest(
        source=_volume(source),
        target=_volume(destination),
        generation=destination.get("generation"),
        source_prepared=bool(source.get("prepared")),
        target_prepared=bool(destination.get("prepared")),
        bitmaps=copy_bitmaps,
    )
    ctx.services.data.start_job(job_id, request.as_job())


def _is_external(endpoint: Div) -> bool:
    return str(endpoint.get("endpoint_type", "div")) != "div"


def _external_copy(
    job_id: str, source: Div, destination: Div, copy_bitmaps: bool
) -> ExternalCopyRequest:
    if copy_bitmaps or (_is_external(source) and _is_external(destination)):
        raise UnsupportedOperation(
            operation="copy_data with an external endpoint",
            reason="the other one is a volume (of type div), and no bitmaps are copied",
        )
    into = _is_external(source)
    volume, external = (destination, source) if into else (source, destination)
    return ExternalCopyRequest(
        job_id=job_id,
        volume=_volume(volume),
        external=external,
        into_volume=into,
        generation=volume.get("generation"),
        prepared=bool(volume.get("prepared")),
    )


def merge(
    ctx: Context, job_id: str, subchain_info: Mapping[str, Any], merge_bitmaps: bool = False
) -> None:
    request = MergeRequest.from_subchain(subchain_info, merge_bitmaps)
    ctx.services.data.start_job(job_id, request.merge_job())


def update_volume(
    ctx: Context, job_id: str, vol_info: Div, vol_attr: Mapping[str, Any]
) -> None:
    request = update.update_job(_volume(vol_info), vol_info.get("generation"), vol_attr)
    ctx.services.data.start_job(job_id, request)


def amend_volume(
    ctx: Context, job_id: str, vol_info: Div, qcow2_attr: Mapping[str, Any]
) -> None:
    request = update.amend_job(
        _volume(vol_info), vol_info.get("generation"), qcow2_attr.get("compat")
    )
    ctx.services.data.start_job(job_id, request)


def sparsify_volume(ctx: Context, job_id: str, vol_info: Div) -> None:
    request = sparsify.sparsify_job(_volume(vol_info), vol_info.get("generation"))
    ctx.services.data.start_job(job_id, request)


def add_bitmap(ctx: Context, job_id: str, vol_info: Div, bitmap: str) -> None:
    _bitmaps(ctx, bitmaps.ADD, job_id, vol_info, bitmap)


def remove_bitmap(ctx: Context, job_id: str, vol_info: Div, bitmap: str) -> None:
    _bitmaps(ctx, bitmaps.REMOVE, job_id, vol_info, bitmap)


def clear_bitmaps(ctx: Context, job_id: str, vol_info: Div) -> None:
    _bitmaps(ctx, bitmaps.CLEAR, job_id, vol_info, None)


def _bitmaps(ctx: Context, kind: str, job_id: str, vol_info: Div, bitmap: str | None) -> None:
    request = bitmaps.bitmap_job(kind, _volume(vol_info), vol_info.get("generation"), bitmap)
    ctx.services.data.start_job(job_id, request)


def move_domain_device(ctx: Context, job_id: str, move_params: Mapping[str, Any]) -> None:
    """Engines call the device `src_guid`, the published schema `guid`."""
    domain, source = move_params["sd_id"], move_params.get("src_guid") or move_params.get("guid")
    if not source:
        raise InvalidParams(
            method="SDM.move_domain_device", parameter="move_params.src_guid", reason="is missing"
        )
    ctx.services.storage.growth.start_move(job_id, domain, source, move_params.get("dst_guids"))


def reduce_domain(ctx: Context, job_id: str, reduce_params: Mapping[str, Any]) -> None:
    domain, device = reduce_params["sd_id"], reduce_params["guid"]
    ctx.services.storage.growth.start_reduce(job_id, domain, device)


def _volume(endpoint: Div) -> VolumeRef:
    return VolumeRef(endpoint["sd_id"], endpoint["img_id"], endpoint["vol_id"])


# The job itself runs in its domain's lane; starting it touches no storage but the journal.
VERBS: Final[Mapping[str, Verb]] = {
    "SDM.add_bitmap": Verb(add_bitmap, lane=":host"),
    "SDM.amend_volume": Verb(amend_volume, lane=":host"),
    "SDM.clear_bitmaps": Verb(clear_bitmaps, lane=":host"),
    "SDM.copy_data": Verb(copy_data, lane=":host"),
    "SDM.merge": Verb(merge, lane=":host"),
    "SDM.move_domain_device": Verb(move_domain_device, lane="move_params.sd_id"),
    "SDM.reduce_domain": Verb(reduce_domain, lane="reduce_params.sd_id"),
    "SDM.remove_bitmap": Verb(remove_bitmap, lane=":host"),
    "SDM.sparsify_volume": Verb(sparsify_volume, lane=":host"),
    "SDM.update_volume": Verb(update_volume, lane=":host"),
}
