# SPDX-License-Identifier: GPL-2.0-or-later
"""StorageDomain.*: making, looking at, and moving domains in and out of a pool."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from vdsm_storage.domains.new_domain import CreateRequest
from vdsm_storage.verbs.context import Context
from vdsm_storage.verbs.table import Verb

DOMAIN: Final = "storagedomainID"


def create(
    ctx: Context,
    storagedomainID: str,
    domainType: str,
    typeArgs: str,
    name: str,
    domainClass: str,
    version: int | None = None,
    blockSize: int = 512,
    maxHosts: int = 2000,
) -> None:
    request = CreateRequest(
        id=storagedomainID,
        type=domainType,
        remote_path=typeArgs,
        name=name,
        klass=domainClass,
        version=version,
        block_size=blockSize,
        max_hosts=maxHosts,
    )
    ctx.services.storage.create(request)


def format(ctx: Context, storagedomainID: str, autoDetach: bool) -> None:
    ctx.services.storage.format(storagedomainID, autoDetach)


def attach(ctx: Context, storagedomainID: str, storagepoolID: str) -> None:
    ctx.services.storage.members.attach(storagedomainID, storagepoolID)


def detach(
    ctx: Context,
    storagedomainID: str,
    storagepoolID: str,
    masterSdUUID: str | None = None,
    masterVersion: int = 0,
    force: bool = False,
) -> None:
    members = ctx.services.storage.members
    if force:
        members.force_detach(storagedomainID, storagepoolID)
    else:
        members.detach(storagedomainID, storagepoolID)


def activate(ctx: Context, storagedomainID: str, storagepoolID: str) -> None:
    ctx.services.storage.members.activate(storagedomainID, storagepoolID)


def deactivate(
    ctx: Context, storagedomainID: str, storagepoolID: str, masterSdUUID: str, masterVersion: int
) -> None:
    members = ctx.services.storage.members
    members.deactivate(storagedomainID, storagepoolID, masterSdUUID, masterVersion)


def setDescription(ctx: Context, storagedomainID: str, description: str) -> None:
    ctx.services.storage.members.set_description(storagedomainID, description)


def extend(
    ctx: Context,
    storagedomainID: str,
    storagepoolID: str,
    devlist: Sequence[str],
    force: bool = False,
) -> None:
    ctx.services.storage.growth.extend(storagedomainID, devlist, force)


def resizePV(ctx: Context, storagedomainID: str, storagepoolID: str, guid: str) -> str:
    return ctx.services.storage.growth.resize(storagedomainID, guid)


# -- looking ---------------------------------------------------------------------------------


def getInfo(ctx: Context, storagedomainID: str) -> dict[str, Any]:
    return ctx.services.storage.registry.get(storagedomainID).info()


def getStats(ctx: Context, storagedomainID: str) -> dict[str, Any]:
    return ctx.services.storage.registry.get(storagedomainID).stats()


def getFileStats(
    ctx: Context, storagedomainID: str, pattern: str, caseSensitive: bool
) -> dict[str, Any]:
    domain = ctx.services.storage.registry.get(storagedomainID)
    return domain.file_stats(pattern, caseSensitive)


def getImages(ctx: Context, storagedomainID: str) -> list[str]:
    return ctx.services.storage.registry.get(storagedomainID).store.images()


def getVolumes(
    ctx: Context, storagedomainID: str, storagepoolID: str, imageID: str
) -> list[str]:
    return ctx.services.storage.registry.get(storagedomainID).store.volumes(imageID)


def validate(ctx: Context, storagedomainID: str) -> None:
    domain = ctx.services.storage.registry.get(storagedomainID)
    domain.metadata()
    domain.self_test()


def dump(ctx: Context, sd_id: str, full: bool = False) -> dict[str, Any]:
    return ctx.services.storage.dump(sd_id, full)


VERBS: Final[Mapping[str, Verb]] = {
    "StorageDomain.create": Verb(create, lane=DOMAIN),
    "StorageDomain.format": Verb(format, lane=DOMAIN),
    "StorageDomain.attach": Verb(attach, lane=DOMAIN),
    "StorageDomain.detach": Verb(detach, lane=DOMAIN),
    "StorageDomain.activate": Verb(activate, lane=DOMAIN),
    "StorageDomain.deactivate": Verb(deactivate, lane=DOMAIN),
    "StorageDomain.setDescription": Verb(setDescription, lane=DOMAIN),
    "StorageDomain.extend": Verb(extend, lane=DOMAIN),
    "StorageDomain.resizePV": Verb(resizePV, lane=DOMAIN),
    "StorageDomain.getInfo": Verb(getInfo, lane=DOMAIN),
    "StorageDomain.getStats": Verb(getStats, lane=DOMAIN),
    "StorageDomain.getFileStats": Verb(getFileStats, lane=DOMAIN),
    "StorageDomain.getImages": Verb(getImages, lane=DOMAIN),
    "StorageDomain.getVolumes": Verb(getVolumes, lane=DOMAIN),
    "StorageDomain.validate": Verb(validate, lane=DOMAIN),
    "StorageDomain.dump": Verb(dump, lane="sd_id"),
}
