# SPDX-License-Identifier: GPL-2.0-or-later
"""Host.*: what the host is, how it is, and what it is doing."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any, Final

from vdsm_storage.base.uuids import BLANK
from vdsm_storage.errors import AgentError
from vdsm_storage.verbs.context import Context
from vdsm_storage.verbs.table import Verb
from vdsm_storage.verbs.thin import with_thin

# Lanes of their own: neither a hanging mount nor a transfer that ends slowly may delay the
# statistics by which an engine decides whether this host is alive.
FACTS: Final = ":facts"
TICKETS: Final = ":tickets"
SCAN: Final = ":scan"
DEVICES: Final = ":devices"
SECRETS: Final = ":secrets"
VMS: Final = ":vms"

log = logging.getLogger("verbs.host")


# -- is anybody there ------------------------------------------------------------------------


def ping(_ctx: Context) -> None:
    """The agent answers."""


def confirmConnectivity(_ctx: Context) -> None:
    """The caller could reach this host; no network change waits for that."""


def echo(_ctx: Context, message: str) -> str:
    return message


def setLogLevel(_ctx: Context, level: str, name: str = "") -> None:
    known = {"CRIT": "CRITICAL", "WARN": "WARNING"}
    logging.getLogger(name or None).setLevel(known.get(level, level))


# -- what and how the host is ----------------------------------------------------------------


def getCapabilities(ctx: Context) -> dict[str, Any]:
    return ctx.services.facts.capabilities(_address(ctx.client))


def getHardwareInfo(ctx: Context) -> dict[str, str]:
    return ctx.services.facts.hardware()


def getStats(ctx: Context) -> dict[str, Any]:
    return ctx.services.facts.stats()


def _address(client: str) -> str:
    """The address in a client's name: `192.0.2.1:54321` or `[2001:db8::1]:54321`; else ""."""
    address, colon, port = client.rpartition(":")
    return address.strip("[]") if colon and port.isdigit() else ""


# -- virtual machines: what libvirt runs -----------------------------------------------------


def getAllVmStats(ctx: Context) -> list[dict[str, Any]]:
    return [with_thin(ctx.services.thin, row) for row in ctx.services.vms.all_stats()]


def getVMList(
    ctx: Context, fullStatus: bool = False, vmList: Sequence[str] = (), onlyUUID: bool = False
) -> list[Any]:
    vms = ctx.services.vms
    if onlyUUID:
        return [vm["vmId"] for vm in vms.short_list(vmList or ())]
    return vms.full_list(vmList or ()) if fullStatus else vms.short_list(vmList or ())


def getVMFullList(ctx: Context, vmList: Sequence[str] = ()) -> list[dict[str, Any]]:
    return ctx.services.vms.full_list(vmList or ())


def dumpxmls(ctx: Context, vmList: Sequence[str] = ()) -> dict[str, str]:
    return ctx.services.vms.xmls(vmList or ())


def getAllVmIoTunePolicies(ctx: Context) -> dict[str, Any]:
    return ctx.services.disks.io_tune.all()


# -- storage domains and pools -----------------------------------------------------------------


def getStorageDomains(
    ctx: Context,
    storagepoolID: str | None = None,
    domainClass: str | None = None,
    storageType: str | None = None,
    remotePath: str | None = None,
) -> list[str]:
    """Looks on every connected storage; what is left out or blank does not filter."""
    registry = ctx.services.storage.registry
    found = []
    for sd_id in registry.scan():
        try:
            metadata = registry.get(sd_id).last
        except AgentError as error:
            log.warning("Domain %s is not listed: %s", sd_id, error)
            continue
        wrong = (
            (storagepoolID not in (None, BLANK) and storagepoolID not in metadata.pools)
            or (domainClass not in (None, "Unknown") and domainClass != metadata.klass)
            or (storageType not in (None, "UNKNOWN") and storageType != metadata.type)
            or (remotePath and remotePath != metadata.remote_path)
        )
        if not wrong:
            found.append(sd_id)
    return found


def getConnectedStoragePools(ctx: Context) -> list[str]:
    pool = ctx.services.storage.pools.connected()
    return [pool.id] if pool is not None else []


def getStorageRepoStats(ctx: Context, domains: Sequence[str] = ()) -> dict[str, Any]:
    return ctx.services.health.storage_domains(domains)


def startMonitoringDomain(ctx: Context, sdUUID: str, hostID: int) -> None:
    """Watch a domain, also one that no connected pool has, under this host id."""
    ctx.services.storage.pools.monitor(sdUUID, hostID)


def stopMonitoringDomain(ctx: Context, sdUUID: str) -> None:
    """A pool's domain stays watched."""
    ctx.services.storage.pools.unmonitor(sdUUID)


# -- block devices -----------------------------------------------------------------------------


def getDeviceList(
    ctx: Context,
    storageType: str | None = None,
    guids: Sequence[str] = (),
    checkStatus: bool = True,
    refresh: bool = True,
) -> list[dict[str, Any]]:
    devices = ctx.services.storage.devices
    return devices.listing(storageType, guids or (), check=checkStatus, refresh=refresh)


def getDevicesVisibility(ctx: Context, guidList: Sequence[str]) -> dict[str, bool]:
    return ctx.services.storage.devices.visibility(guidList)


def getLVMVolumeGroups(ctx: Context, storageType: str | None = None) -> list[dict[str, Any]]:
    return ctx.services.storage.devices.list_groups(storageType)


# -- tasks and jobs --------------------------------------------------------------------------


def getAllTasks(ctx: Context) -> dict[str, Any]:
    return ctx.services.tasks.details()


def getAllTasksInfo(ctx: Context) -> dict[str, Any]:
    return ctx.services.tasks.infos()


def getAllTasksStatuses(ctx: Context) -> dict[str, Any]:
    return ctx.services.tasks.statuses()


def getJobs(
    ctx: Context, job_type: str | None = None, job_ids: Sequence[str] = ()
) -> dict[str, Any]:
    return ctx.services.jobs.get(job_type, job_ids or ())


def setJobBandwidth(ctx: Context, job_id: str, bandwidth: int) -> None:
    ctx.services.jobs.limit(job_id, bandwidth)


# -- secrets ---------------------------------------------------------------------------------


def registerSecrets(
    ctx: Context, secrets: Sequence[Mapping[str, Any]], clear: bool = False
) -> None:
    ctx.services.secrets.register(secrets, clear)


def unregisterSecrets(ctx: Context, uuids: Sequence[str]) -> None:
    ctx.services.secrets.unregister(uuids)


# -- image transfers -------------------------------------------------------------------------


def add_image_ticket(ctx: Context, ticket: Mapping[str, Any]) -> None:
    ctx.services.tickets.add(ticket)


def get_image_ticket(ctx: Context, uuid: str) -> dict[str, Any]:
    return ctx.services.tickets.get(uuid)


def extend_image_ticket(ctx: Context, uuid: str, timeout: int) -> None:
    ctx.services.tickets.extend(uuid, timeout)


def remove_image_ticket(ctx: Context, uuid: str) -> None:
    ctx.services.tickets.remove(uuid)


VERBS: Final[Mapping[str, Verb]] = {
    "Host.ping": Verb(ping),
    "Host.ping2": Verb(ping),
    "Host.echo": Verb(echo),
    "Host.confirmConnectivity": Verb(confirmConnectivity),
    "Host.setLogLevel": Verb(setLogLevel),
    "Host.getCapabilities": Verb(getCapabilities, lane=FACTS),
    "Host.getHardwareInfo": Verb(getHardwareInfo, lane=FACTS),
    "Host.getStats": Verb(getStats, lane=FACTS),
    "Host.getAllVmStats": Verb(getAllVmStats, lane=VMS),
    "Host.getVMList": Verb(getVMList, lane=VMS),
    "Host.getVMFullList": Verb(getVMFullList, lane=VMS),
    "Host.dumpxmls": Verb(dumpxmls, lane=VMS),
    "Host.getAllVmIoTunePolicies": Verb(getAllVmIoTunePolicies, lane=VMS),
    "Host.getStorageDomains": Verb(getStorageDomains, lane=SCAN),
    "Host.getConnectedStoragePools": Verb(getConnectedStoragePools),
    "Host.getStorageRepoStats": Verb(getStorageRepoStats),
    "Host.startMonitoringDomain": Verb(startMonitoringDomain, lane="sdUUID"),
    "Host.stopMonitoringDomain": Verb(stopMonitoringDomain, lane="sdUUID"),
    "Host.getDeviceList": Verb(getDeviceList, lane=DEVICES),
    "Host.getDevicesVisibility": Verb(getDevicesVisibility, lane=DEVICES),
    "Host.getLVMVolumeGroups": Verb(getLVMVolumeGroups, lane=DEVICES),
    "Host.getAllTasks": Verb(getAllTasks),
    "Host.getAllTasksInfo": Verb(getAllTasksInfo),
    "Host.getAllTasksStatuses": Verb(getAllTasksStatuses),
    "Host.getJobs": Verb(getJobs, lane=":host"),
    "Host.setJobBandwidth": Verb(setJobBandwidth, lane=":host"),
    "Host.registerSecrets": Verb(registerSecrets, lane=SECRETS),
    "Host.unregisterSecrets": Verb(unregisterSecrets, lane=SECRETS),
    "Host.add_image_ticket": Verb(add_image_ticket, lane=TICKETS),
    "Host.get_image_ticket": Verb(get_image_ticket, lane=TICKETS),
    "Host.extend_image_ticket": Verb(extend_image_ticket, lane=TICKETS),
    "Host.remove_image_ticket": Verb(remove_image_ticket, lane=TICKETS),
}
