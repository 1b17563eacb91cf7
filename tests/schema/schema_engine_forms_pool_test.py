# SPDX-License-Identifier: GPL-2.0-or-later
"""What an engine really sends about pools, domains and hosts, and what the verb's function gets.

Every row is (verb, params as they arrive, part of the canonical values).
"""

from __future__ import annotations

from typing import Any

import pytest

from tests.schema.engine_forms import (
    GUID,
    IMG,
    JOB,
    POOL,
    SD,
    SD2,
    VG,
    VM,
    VOL,
    VOL2,
    ZERO,
    check_form,
    unchanged,
)
from vdsm_storage.base.secret import Secret
from vdsm_storage.schema.loader import Schema
from vdsm_storage.schema.normalise import Checker

NFS = {
    "id": VM,
    "connection": "nas:/e/d",
    "port": "",
    "iqn": "",
    "user": "",
    "password": "",
    "ipv6_enabled": "false",
    "protocol_version": "auto",
}
FLAT = {  # what every connection becomes, before its own values
    "id": VM,
    "connection": "",
    "port": None,
    "iqn": "",
    "user": "",
    "password": Secret(""),
    "tpgt": 1,
    "ipv6_enabled": False,
    "ifaceName": "",
    "netIfaceName": "",
    "vfs_type": "",
    "mnt_options": "",
    "protocol_version": "",
    "timeout": None,
    "retrans": None,
}
ISCSI = {
    "id": VM,
    "connection": "10.0.0.5",
    "port": "3260",
    "iqn": "iqn.2020-01.org.example:t1",
    "tpgt": "1",
    "user": "u",
    "password": "hunter2",
    "ipv6_enabled": "true",
    "ifaceName": "if1",
    "netIfaceName": "eth1",
}


def connection(sent: dict[str, Any], domain_type: object = 1) -> dict[str, Any]:
    return {"storagepoolID": ZERO, "domainType": domain_type, "connectionParams": [sent]}


CASES: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    # -- StoragePool
    (
        "StoragePool.connectStorageServer",
        connection(NFS),
        {
            "domainType": "NFS",
            "connectionParams": [FLAT | {"connection": "nas:/e/d", "protocol_version": "auto"}],
        },
    ),
    (
        "StoragePool.connectStorageServer",
        connection({**NFS, "connection": "/data/images"}, 4),
        {"domainType": "LOCALFS"},
    ),
    (
        "StoragePool.connectStorageServer",
        connection({**NFS, "connection": "/dev/sdb1", "vfs_type": "ext4", "mnt_options": "ro"}, 6),
        {
            "domainType": "POSIXFS",
            "connectionParams": [
                FLAT
                | {
                    "connection": "/dev/sdb1",
                    "vfs_type": "ext4",
                    "mnt_options": "ro",
                    "protocol_version": "auto",
                }
            ],
        },
    ),
    (
        "StoragePool.connectStorageServer",
        connection(ISCSI, 3),
        {
            "domainType": "ISCSI",
            "connectionParams": [
                FLAT
                | ISCSI
                | {"port": 3260, "tpgt": 1, "password": Secret("hunter2"), "ipv6_enabled": True}
            ],
        },
    ),
    (
        "StoragePool.connectStorageServer",
        connection({"id": ZERO, "connection": "", "port": "", "iqn": "", "user": ""}, "2"),
        {"domainType": "FCP", "connectionParams": [FLAT | {"id": ZERO}]},
    ),
    (
        "StoragePool.connectStorageServer",
        connection({**NFS, "timeout": "600", "retrans": "6"}),
        {
            "connectionParams": [
                FLAT
                | {
                    "connection": "nas:/e/d",
                    "protocol_version": "auto",
                    "timeout": 600,
                    "retrans": 6,
                }
            ]
        },
    ),
    (
        "StoragePool.connectStorageServer",
        connection({**NFS, "connection": "gl:/v", "vfs_type": "glusterfs"}, 7),
        {"domainType": "GLUSTERFS"},
    ),
    # the published, typed forms
    (
        "StoragePool.disconnectStorageServer",
        connection({"id": VM, "export": "nas:/e", "version": "4"}, "NFS"),
        {"connectionParams": [FLAT | {"connection": "nas:/e", "protocol_version": "4"}]},
    ),
    (
        "StoragePool.disconnectStorageServer",
        connection({"id": VM, "spec": "/dev/x", "vfstype": "xfs", "options": "rw"}, "posixfs"),
        {
            "domainType": "POSIXFS",
            "connectionParams": [
                FLAT | {"connection": "/dev/x", "vfs_type": "xfs", "mnt_options": "rw"}
            ],
        },
    ),
    (
        "StoragePool.disconnectStorageServer",
        connection({"path": "/data"}, "LOCALFS"),
        {"connectionParams": [FLAT | {"connection": "/data", "id": ZERO}]},
    ),
    (
        "StoragePool.connect",
        {
            "storagepoolID": POOL,
            "hostID": 1,
            "scsiKey": POOL,
            "masterSdUUID": SD,
            "masterVersion": 1,
            "domainDict": {SD: "active", SD2: "attached"},
        },
        {"domainDict": {SD: "Active", SD2: "Attached"}, "hostID": 1},
    ),
    (
        "StoragePool.connect",
        {
            "storagepoolID": POOL.upper(),
            "hostID": "7",
            "scsiKey": POOL,
            "masterSdUUID": SD,
            "masterVersion": "3",
        },
        {"storagepoolID": POOL, "hostID": 7, "masterVersion": 3, "domainDict": None},
    ),
    (
        "StoragePool.reconstructMaster",
        {
            "storagepoolID": POOL,
            "hostId": 1,
            "name": "dc",
            "masterSdUUID": SD,
            "masterVersion": 2,
            "domainDict": {SD: "active"},
            "lockRenewalIntervalSec": 5,
            "leaseTimeSec": 60,
            "ioOpTimeoutSec": 10,
            "leaseRetries": 3,
        },
        {"hostId": 1, "domainDict": {SD: "Active"}, "leaseRetries": 3},
    ),
    (
        "StoragePool.spmStart",
        {
            "storagepoolID": POOL,
            "prevID": -1,
            "prevLver": "-1",
            "enableScsiFencing": "false",
            "maxHostID": 250,
            "domVersion": "5",
        },
        {"prevID": -1, "prevLver": -1, "enableScsiFencing": False, "domVersion": 5},
    ),
    (
        "StoragePool.upgrade",
        {"storagepoolID": POOL, "targetDomVersion": "5"},
        {"targetDomVersion": 5},
    ),
    (
        "StoragePool.prepareMerge",
        {
            "storagepoolID": POOL,
            "subchainInfo": {"sd_id": SD, "img_id": IMG, "base_id": VOL, "top_id": VOL2},
        },
        {
            "subchainInfo": {
                "sd_id": SD,
                "img_id": IMG,
                "base_id": VOL,
                "top_id": VOL2,
                "base_generation": None,
            }
        },
    ),
    (
        "StoragePool.updateVMs",
        {"storagepoolID": POOL, "vmList": [{"vm": VM, "ovf": "<x/>", "imglist": f"{IMG},{SD}"}]},
        {"vmList": [{"vm": VM, "ovf": "<x/>", "imglist": f"{IMG},{SD}"}], "storagedomainID": None},
    ),
    # -- StorageDomain
    (
        "StorageDomain.create",
        {
            "storagedomainID": SD,
            "domainType": 4,
            "typeArgs": "/data/images",
            "name": "local",
            "domainClass": 1,
            "version": "5",
            "blockSize": 0,
            "maxHosts": 250,
        },
        {
            "domainType": "LOCALFS",
            "typeArgs": "/data/images",
            "domainClass": "Data",
            "version": 5,
            "blockSize": 0,
            "maxHosts": 250,
        },
    ),
    (
        "StorageDomain.create",
        {
            "storagedomainID": SD,
            "domainType": 3,
            "typeArgs": VG,
            "name": "block",
            "domainClass": "1",
            "version": 5,
        },
        {"domainType": "ISCSI", "typeArgs": VG, "domainClass": "Data", "blockSize": 512},
    ),
    (
        "StorageDomain.create",
        {
            "storagedomainID": SD,
            "domainType": "1",
            "typeArgs": {"remotePath": "nas:/e"},
            "name": "n",
            "domainClass": "Data",
        },
        {"typeArgs": "nas:/e", "version": None},
    ),
    (
        "StorageDomain.detach",
        {"storagedomainID": SD, "storagepoolID": POOL, "force": True},
        {"force": True, "masterSdUUID": None, "masterVersion": 0},
    ),
    (
        "StorageDomain.extend",
        {"storagedomainID": SD, "storagepoolID": POOL, "devlist": [GUID], "force": False},
        {"devlist": [GUID]},
    ),
    (
        "StorageDomain.getFileStats",
        {"storagedomainID": SD, "pattern": "*", "caseSensitive": False},
        {"caseSensitive": False},
    ),
    # -- Host
    (
        "Host.getStorageDomains",
        {"storagepoolID": ZERO, "domainClass": 1, "storageType": "3", "remotePath": ""},
        {"domainClass": "Data", "storageType": "ISCSI", "remotePath": ""},
    ),
    (
        "Host.getStorageDomains",
        {"storagepoolID": ZERO, "domainClass": 3, "storageType": "", "remotePath": "nas:/e"},
        {"domainClass": "Backup", "storageType": None, "remotePath": "nas:/e"},
    ),
    (
        "Host.getDeviceList",
        {"storageType": 0, "checkStatus": False},
        {"storageType": None, "guids": [], "checkStatus": False, "refresh": True},
    ),
    ("Host.getDeviceList", {"storageType": 3, "guids": [GUID]}, {"storageType": "iSCSI"}),
    ("Host.getDeviceList", {"storageType": "2"}, {"storageType": "FCP"}),
    ("Host.getDevicesVisibility", {"guidList": [GUID]}, {"guidList": [GUID]}),
    ("Host.getJobs", {"job_type": "virt", "job_ids": [JOB]}, {"job_type": "virt"}),
    ("Host.getJobs", {}, {"job_type": None, "job_ids": []}),
    (
        "Host.registerSecrets",
        {
            "secrets": [
                {
                    "uuid": VM,
                    "password": "c2VjcmV0",
                    "description": "",
                    "usageType": "ceph",
                    "usageID": "ovirt/p/s",
                }
            ],
            "clear": False,
        },
        {
            "secrets": [
                {
                    "uuid": VM,
                    "password": Secret("c2VjcmV0"),
                    "description": "",
                    "usageType": "ceph",
                    "usageID": "ovirt/p/s",
                }
            ]
        },
    ),
    ("Host.registerSecrets", {"secrets": [], "clear": True}, {"secrets": [], "clear": True}),
    unchanged(
        "Host.add_image_ticket",
        {
            "ticket": {
                "uuid": JOB,
                "timeout": 300,
                "inactivity_timeout": 60,
                "size": 5000000000,
                "url": "file:///x",
                "ops": ["read", "write"],
                "sparse": True,
                "transfer_id": VM,
                "dirty": False,
            }
        },
    ),
    ("Host.getVMList", {"onlyUUID": "true"}, {"onlyUUID": True, "vmList": []}),
    # -- iSCSI, volume groups
    (
        "ISCSIConnection.discoverSendTargets",
        {"host": "10.0.0.5", "port": "3260", "ipv6_enabled": "false"},
        {"port": 3260, "ipv6_enabled": False, "user": "", "password": Secret("")},
    ),
    (
        "LVMVolumeGroup.create",
        {"name": SD, "devlist": [GUID], "force": True},
        {"name": SD, "force": True, "lvmvolumegroupID": None},
    ),
    ("LVMVolumeGroup.getInfo", {"lvmvolumegroupID": VG}, {"lvmvolumegroupID": VG}),
]


@pytest.fixture(scope="module")
def checker() -> Checker:
    return Checker(Schema())


@pytest.mark.parametrize(
    ("verb", "sent", "expected"), CASES, ids=[f"{i}-{case[0]}" for i, case in enumerate(CASES)]
)
def test_form(checker: Checker, verb: str, sent: dict[str, Any], expected: dict[str, Any]) -> None:
    check_form(checker, verb, sent, expected)
