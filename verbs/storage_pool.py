# SPDX-License-Identifier: GPL-2.0-or-later
"""StoragePool.*: storage servers, the pool that this host is connected to, its manager."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from vdsm_storage.domains import san
from vdsm_storage.domains.connection import Connections
from vdsm_storage.domains.masters import NewPool
from vdsm_storage.domains.pool import Pool
from vdsm_storage.domains.san import San
from vdsm_storage.errors import NotABackupDomain
from vdsm_storage.images.guard import VolumeRef
from vdsm_storage.images.merge import MergeRequest
from vdsm_storage.images.sparsify import reduce_task
from vdsm_storage.verbs.context import Context
from vdsm_storage.verbs.table import Verb

# Lanes of their own, so that what hangs keeps its kind of work only.
SERVERS: Final = ":servers"
POLLED: Final = ":pool-polling"
POOL: Final = "storagepoolID"


# -- storage servers -------------------------------------------------------------------------


def connectStorageServer(
    ctx: Context,
    storagepoolID: str,
    domainType: str,
    connectionParams: Sequence[Mapping[str, Any]],
) -> list[dict[str, Any]]:
    return _servers(ctx, domainType).connect(domainType, connectionParams)


def disconnectStorageServer(
    ctx: Context,
    storagepoolID: str,
    domainType: str,
    connectionParams: Sequence[Mapping[str, Any]],
) -> list[dict[str, Any]]:
    return _servers(ctx, domainType).disconnect(domainType, connectionParams)


def _servers(ctx: Context, kind: str) -> San | Connections:
    storage = ctx.services.storage
    return storage.san if kind in san.TYPES else storage.connections


# -- the pool --------------------------------------------------------------------------------


def create(
    ctx: Context,
    storagepoolID: str,
    name: str,
    masterSdUUID: str,
    masterVersion: int,
    domainList: Sequence[str],
    lockRenewalIntervalSec: int,
    leaseTimeSec: int,
    ioOpTimeoutSec: int,
    leaseRetries: int,
) -> None:
    domains = list(dict.fromkeys([masterSdUUID, *domainList]))
    lease = (lockRenewalIntervalSec, leaseTimeSec, ioOpTimeoutSec, leaseRetries)
    new = NewPool(storagepoolID, name, masterSdUUID, masterVersion, domains, lease)
    ctx.services.storage.masters.create(new)


def reconstructMaster(
    ctx: Context,
    storagepoolID: str,
    hostId: int,
    name: str,
    masterSdUUID: str,
    masterVersion: int,
    domainDict: Mapping[str, str],
    lockRenewalIntervalSec: int,
    leaseTimeSec: int,
    ioOpTimeoutSec: int,
    leaseRetries: int,
) -> None:
    domains = list(dict.fromkeys([masterSdUUID, *domainDict]))
    lease = (lockRenewalIntervalSec, leaseTimeSec, ioOpTimeoutSec, leaseRetries)
    new = NewPool(
        storagepoolID, name, masterSdUUID, masterVersion, domains, lease, host_id=hostId
    )
    ctx.services.storage.masters.reconstruct(new)


def connect(
    ctx: Context,
    storagepoolID: str,
    hostID: int,
    scsiKey: str,
    masterSdUUID: str,
    masterVersion: int,
    domainDict: Mapping[str, str] | None = None,
) -> None:
    pool = Pool(storagepoolID, hostID, masterSdUUID, masterVersion, dict(domainDict or {}))
    ctx.services.storage.pools.connect(pool, with_map=bool(domainDict))


def refresh(ctx: Context, storagepoolID: str, masterSdUUID: str, masterVersion: int) -> None:
    pools = ctx.services.storage.pools
    old = pools.get(storagepoolID)
    pool = Pool(storagepoolID, old.host_id, masterSdUUID, masterVersion)
    pools.connect(pool, with_map=False)


def disconnect(
    ctx: Context, storagepoolID: str, hostID: int, scsiKey: str, remove: bool = False
) -> None:
    storage = ctx.services.storage
    storage.spm.require_not(storagepoolID)
    storage.pools.disconnect(storagepoolID)


def destroy(ctx: Context, storagepoolID: str, hostID: int, scsiKey: str) -> None:
    ctx.services.storage.destroy(storagepoolID)


def getInfo(ctx: Context, storagepoolID: str) -> dict[str, Any]:
    storage = ctx.services.storage
    owner, version = storage.spm.cached(storagepoolID)
    return storage.pools.info(storagepoolID, owner, version)


def setDescription(ctx: Context, storagepoolID: str, description: str) -> None:
    ctx.services.storage.members.set_pool_description(storagepoolID, description)


def switchMaster(
    ctx: Context,
    storagepoolID: str,
    oldMasterUUID: str,
    newMasterUUID: str,
    masterVersion: int,
) -> str:
    storage = ctx.services.storage
    return storage.start_switch(storagepoolID, oldMasterUUID, newMasterUUID, masterVersion)


def getDomainsContainingImage(ctx: Context, storagepoolID: str, imageID: str) -> list[str]:
    return ctx.services.storage.pools.containing_image(storagepoolID, imageID)


# -- its manager -----------------------------------------------------------------------------


def getSpmStatus(ctx: Context, storagepoolID: str) -> dict[str, Any]:
    return ctx.services.storage.spm.status(storagepoolID)


def spmStart(
    ctx: Context,
    storagepoolID: str,
    prevID: int,
    prevLver: int,
    enableScsiFencing: bool,
    maxHostID: int | None = None,
    domVersion: int | None = None,
) -> str:
    return ctx.services.storage.spm.start(storagepoolID, domVersion, maxHostID)


def spmStop(ctx: Context, storagepoolID: str) -> None:
    ctx.services.storage.spm.stop(storagepoolID)


# -- cold merge and reduce -------------------------------------------------------------------


def prepareMerge(ctx: Context, storagepoolID: str, subchainInfo: Mapping[str, Any]) -> str:
    """Returns the task."""
    return ctx.services.data.start_task(MergeRequest.from_subchain(subchainInfo).prepare_task())


def finalizeMerge(ctx: Context, storagepoolID: str, subchainInfo: Mapping[str, Any]) -> str:
    """Returns the task."""
    return ctx.services.data.start_task(MergeRequest.from_subchain(subchainInfo).finalize_task())


def reduceVolume(
    ctx: Context,
    storagepoolID: str,
    storagedomainID: str,
    imageID: str,
    volumeID: str,
    allowActive: bool = False,
) -> str:
    """Returns the task."""
    ref = VolumeRef(storagedomainID, imageID, volumeID)
    return ctx.services.data.start_task(reduce_task(ref, allow_active=allowActive))


def upgrade(ctx: Context, storagepoolID: str, targetDomVersion: int) -> str:
    ctx.services.storage.upgrades.start(storagepoolID, targetDomVersion)
    return "started"


# -- export domains: none can be made any more -----------------------------------------------


def getBackedUpVmsList(ctx: Context, storagepoolID: str, storagedomainID: str) -> list[str]:
    ctx.services.storage.registry.get(storagedomainID)
    raise NotABackupDomain(domain=storagedomainID)


def getBackedUpVmsInfo(
    ctx: Context, storagepoolID: str, storagedomainID: str, vmList: Sequence[str]
) -> dict[str, str]:
    ctx.services.storage.registry.get(storagedomainID)
    raise NotABackupDomain(domain=storagedomainID)


VERBS: Final[Mapping[str, Verb]] = {
    "StoragePool.connectStorageServer": Verb(connectStorageServer, lane=SERVERS),
    "StoragePool.disconnectStorageServer": Verb(disconnectStorageServer, lane=SERVERS),
    "StoragePool.create": Verb(create, lane=POOL),
    "StoragePool.reconstructMaster": Verb(reconstructMaster, lane=POOL),
    "StoragePool.connect": Verb(connect, lane=POOL),
    "StoragePool.refresh": Verb(refresh, lane=POOL),
    "StoragePool.disconnect": Verb(disconnect, lane=POOL),
    "StoragePool.destroy": Verb(destroy, lane=POOL),
    "StoragePool.getInfo": Verb(getInfo, lane=POLLED),
    "StoragePool.setDescription": Verb(setDescription, lane=POOL),
    "StoragePool.switchMaster": Verb(switchMaster, lane=POOL),
    "StoragePool.getDomainsContainingImage": Verb(getDomainsContainingImage, lane=POOL),
    "StoragePool.getSpmStatus": Verb(getSpmStatus, lane=POLLED),
    "StoragePool.spmStart": Verb(spmStart, lane=POOL),
    "StoragePool.spmStop": Verb(spmStop, lane=POOL),
    "StoragePool.prepareMerge": Verb(prepareMerge, lane=POOL),
    "StoragePool.finalizeMerge": Verb(finalizeMerge, lane=POOL),
    "StoragePool.reduceVolume": Verb(reduceVolume, lane="storagedomainID"),
    "StoragePool.upgrade": Verb(upgrade, lane=POOL),
    "StoragePool.getBackedUpVmsList": Verb(getBackedUpVmsList, lane="storagedomainID"),
    "StoragePool.getBackedUpVmsInfo": Verb(getBackedUpVmsInfo, lane="storagedomainID"),
}
