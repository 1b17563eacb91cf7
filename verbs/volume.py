# SPDX-License-Identifier: GPL-2.0-or-later
"""Verbs of the namespace Volume."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from vdsm_storage.images.copy_volume import CopyVolumeRequest
from vdsm_storage.images.create import NewVolumeRequest
from vdsm_storage.images.guard import VolumeRef
from vdsm_storage.images.store import Wipe
from vdsm_storage.verbs.context import Context
from vdsm_storage.verbs.table import Verb

DOMAIN = "storagedomainID"


def copy(
    ctx: Context,
    volumeID: str,
    storagepoolID: str,
    storagedomainID: str,
    imageID: str,
    dstSdUUID: str,
    dstImgUUID: str,
    dstVolUUID: str,
    desc: str,
    volType: str,
    volFormat: str,
    preallocate: str,
    postZero: bool,
    force: bool,
    discard: bool = False,
) -> str:
    """Returns the task."""
    request = CopyVolumeRequest(
        source_domain=storagedomainID,
        source_image=imageID,
        source=volumeID,
        domain=dstSdUUID,
        image=dstImgUUID,
        volume=dstVolUUID,
        description=desc,
        voltype=volType,
        format=volFormat,
        type=preallocate,
    )
    return ctx.services.volumes.copy(request)


def create(
    ctx: Context,
    volumeID: str,
    storagepoolID: str,
    storagedomainID: str,
    imageID: str,
    size: int,
    volFormat: str,
    preallocate: str,
    diskType: str,
    desc: str,
    srcImgUUID: str,
    srcVolUUID: str,
    initialSize: int | None = None,
    addBitmaps: bool = False,
    legal: bool = True,
    sequence: int = 0,
    bitmap: str | None = None,
    secretID: str | None = None,
) -> str:
    """Returns the task."""
    request = NewVolumeRequest(
        domain=storagedomainID,
        image=imageID,
        volume=volumeID,
        capacity=int(size),
        format=volFormat,
        type=preallocate,
        disktype=diskType,
        description=desc,
        parent_image=srcImgUUID,
        parent=srcVolUUID,
        initial_size=int(initialSize) if initialSize else None,
        legal=legal,
        sequence=sequence or 0,
        add_bitmaps=bool(addBitmaps),
        bitmap=bitmap or None,
        secret=secretID or None,
    )
    return ctx.services.volumes.create(request)


def delete(
    ctx: Context,
    volumeID: str,
    storagepoolID: str,
    storagedomainID: str,
    imageID: str,
    postZero: bool,
    force: bool,
    discard: bool = False,
) -> str:
    """Returns the task.  File systems give freed blocks back zeroed: postZero has no work there."""
    return ctx.services.volumes.delete(
        storagedomainID,
        imageID,
        [volumeID],
        force=force,
        wipe=Wipe(bool(postZero), bool(discard)),
    )


def extendSize(
    ctx: Context,
    storagepoolID: str,
    storagedomainID: str,
    imageID: str,
    volumeID: str,
    newSize: int,
    secretID: str | None = None,
) -> str:
    """Returns the task."""
    return ctx.services.volumes.extend(
        storagedomainID, imageID, volumeID, int(newSize), secretID or None
    )


def getInfo(
    ctx: Context, volumeID: str, storagepoolID: str, storagedomainID: str, imageID: str
) -> dict[str, Any]:
    return ctx.services.volumes.info(storagedomainID, imageID, volumeID)


def getSize(
    ctx: Context, volumeID: str, storagepoolID: str, storagedomainID: str, imageID: str
) -> dict[str, str]:
    return ctx.services.volumes.size(storagedomainID, imageID, volumeID)


def getQemuImageInfo(
    ctx: Context, volumeID: str, storagepoolID: str, storagedomainID: str, imageID: str
) -> dict[str, Any]:
    return ctx.services.volumes.qemu_info(storagedomainID, imageID, volumeID)


def refresh(
    ctx: Context, volumeID: str, storagepoolID: str, storagedomainID: str, imageID: str
) -> None:
    ctx.services.volumes.refresh(storagedomainID, imageID, volumeID)


def setDescription(
    ctx: Context,
    volumeID: str,
    storagepoolID: str,
    storagedomainID: str,
    imageID: str,
    description: str,
) -> None:
    ctx.services.volumes.set_description(storagedomainID, imageID, volumeID, description)


def setLegality(
    ctx: Context,
    volumeID: str,
    storagepoolID: str,
    storagedomainID: str,
    imageID: str,
    legality: str,
) -> None:
    ctx.services.volumes.set_legality(storagedomainID, imageID, volumeID, legality)


def teardown(ctx: Context, storagedomainID: str, imageID: str, volumeID: str) -> None:
    ctx.services.volumes.teardown(storagedomainID, imageID, volumeID)


def measure(
    ctx: Context,
    volumeID: str,
    storagepoolID: str,
    storagedomainID: str,
    imageID: str,
    dstVolFormat: str,
    backing_chain: bool = True,
    baseID: str | None = None,
) -> dict[str, int]:
    ref = VolumeRef(storagedomainID, imageID, volumeID)
    required = ctx.services.data.measure(ref, dstVolFormat, baseID, with_backing=backing_chain)
    return {"required": required}


def verify_untrusted(
    ctx: Context, storagepoolID: str, storagedomainID: str, imageID: str, volumeID: str
) -> None:
    ctx.services.data.verify(VolumeRef(storagedomainID, imageID, volumeID))


def extendStorage(ctx: Context, storagedomainID: str, volumeID: str, size: int) -> str:
    """Bytes that it has then."""
    return str(ctx.services.extender.extend_here(storagedomainID, volumeID, size))


VERBS: Final[Mapping[str, Verb]] = {
    "Volume.copy": Verb(copy, lane=DOMAIN),
    "Volume.create": Verb(create, lane=DOMAIN),
    "Volume.delete": Verb(delete, lane=DOMAIN),
    "Volume.extendSize": Verb(extendSize, lane=DOMAIN),
    "Volume.extendStorage": Verb(extendStorage, lane=DOMAIN),
    "Volume.getInfo": Verb(getInfo, lane=DOMAIN),
    "Volume.getQemuImageInfo": Verb(getQemuImageInfo, lane=DOMAIN),
    "Volume.getSize": Verb(getSize, lane=DOMAIN),
    "Volume.measure": Verb(measure, lane=DOMAIN),
    "Volume.refresh": Verb(refresh, lane=DOMAIN),
    "Volume.setDescription": Verb(setDescription, lane=DOMAIN),
    "Volume.setLegality": Verb(setLegality, lane=DOMAIN),
    "Volume.teardown": Verb(teardown, lane=DOMAIN),
    "Volume.verify_untrusted": Verb(verify_untrusted, lane=DOMAIN),
}
