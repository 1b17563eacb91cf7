# SPDX-License-Identifier: GPL-2.0-or-later
"""Verbs of the namespace Image."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from vdsm_storage.errors import InvalidParameter
from vdsm_storage.images.store import Wipe
from vdsm_storage.verbs.context import Context
from vdsm_storage.verbs.table import Verb

DOMAIN = "storagedomainID"


def cloneStructure(
    ctx: Context, imageID: str, storagepoolID: str, storagedomainID: str, dstSdUUID: str
) -> str:
    """Returns the task."""
    return ctx.services.images.clone_structure(storagedomainID, imageID, dstSdUUID)


def syncData(
    ctx: Context,
    imageID: str,
    storagepoolID: str,
    storagedomainID: str,
    dstSdUUID: str,
    syncType: str,
) -> str:
    """Returns the task."""
    return ctx.services.images.sync_data(storagedomainID, imageID, dstSdUUID, syncType)


def delete(
    ctx: Context,
    imageID: str,
    storagepoolID: str,
    storagedomainID: str,
    postZero: bool,
    force: bool,
    discard: bool = False,
) -> str:
    """Returns the task."""
    return ctx.services.images.delete(
        storagedomainID, imageID, Wipe(bool(postZero), bool(discard))
    )


def deleteVolumes(
    ctx: Context,
    imageID: str,
    storagepoolID: str,
    storagedomainID: str,
    volumeList: list[str],
    postZero: bool = False,
    force: bool = False,
    discard: bool = False,
) -> str:
    """Returns the task."""
    return ctx.services.images.delete_volumes(
        storagedomainID,
        imageID,
        volumeList,
        force=bool(force),
        wipe=Wipe(bool(postZero), bool(discard)),
    )


def getVolumes(
    ctx: Context, imageID: str, storagepoolID: str, storagedomainID: str
) -> list[str]:
    return ctx.services.images.volumes(storagedomainID, imageID)


def move(
    ctx: Context,
    imageID: str,
    storagepoolID: str,
    storagedomainID: str,
    dstSdUUID: str,
    operation: str,
    postZero: bool,
    force: bool,
    discard: bool = False,
) -> str:
    """Returns the task."""
    if operation not in ("COPY", "MOVE"):
        raise InvalidParameter(parameter="operation", value=operation, reason="COPY or MOVE")
    return ctx.services.images.move(
        storagedomainID,
        imageID,
        dstSdUUID,
        move=operation == "MOVE",
        wipe=Wipe(bool(postZero), bool(discard)),
    )


def prepare(
    ctx: Context,
    storagepoolID: str,
    storagedomainID: str,
    imageID: str,
    volumeID: str,
    allowIllegal: bool = False,
) -> dict[str, str]:
    return ctx.services.images.prepare(
        storagedomainID, imageID, volumeID, allow_illegal=bool(allowIllegal)
    )


def teardown(
    ctx: Context,
    storagepoolID: str,
    storagedomainID: str,
    imageID: str,
    volumeID: str | None = None,
) -> None:
    ctx.services.images.teardown(storagedomainID, imageID, volumeID)


def reconcileVolumeChain(
    ctx: Context, storagepoolID: str, storagedomainID: str, imageID: str, leafVolID: str
) -> list[str]:
    return ctx.services.images.reconcile(storagedomainID, imageID, leafVolID)


VERBS: Final[Mapping[str, Verb]] = {
    "Image.cloneStructure": Verb(cloneStructure, lane=DOMAIN),
    "Image.delete": Verb(delete, lane=DOMAIN),
    "Image.deleteVolumes": Verb(deleteVolumes, lane=DOMAIN),
    "Image.getVolumes": Verb(getVolumes, lane=DOMAIN),
    "Image.move": Verb(move, lane=DOMAIN),
    "Image.prepare": Verb(prepare, lane=DOMAIN),
    "Image.reconcileVolumeChain": Verb(reconcileVolumeChain, lane=DOMAIN),
    "Image.syncData": Verb(syncData, lane=DOMAIN),
    "Image.teardown": Verb(teardown, lane=DOMAIN),
}
