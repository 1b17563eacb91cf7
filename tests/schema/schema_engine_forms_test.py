# SPDX-License-Identifier: GPL-2.0-or-later
"""What an engine really sends, and what the verb's function gets.

Every row is (verb, params as they arrive, part of the canonical values).
"""

from __future__ import annotations

from typing import Any

import pytest

from vdsm_storage import errors
from vdsm_storage.base.secret import Secret
from vdsm_storage.schema.loader import Schema
from vdsm_storage.schema.normalise import Checker

ZERO = "00000000-0000-0000-0000-000000000000"
POOL = "5849b030-626e-47cb-ad90-3ce782d831b3"
SD = "6513270e-269e-4d37-b2a7-4de452e6b438"
SD2 = "089632e3-f678-4941-8fd2-6ec4b372c56b"
IMG = "d23f0824-128b-4f33-8c5c-7fd0a6a3a450"
VOL = "9531985d-5d9d-49f8-9818-e811892f902b"
VOL2 = "36f675cc-81e7-4ef5-a8e2-5d940ed90475"
JOB = "2129d338-b425-4188-bcb5-d0e3bcb1cec4"
VM = "57740511-ea3d-4be7-b6a0-0758cb138653"
GUID = "360014052d05b1f3670a40e0ae4637e4f"
VG = "Dxzv10-gMnm-EsIZ-vUO9-q8LQ-uNT6-h1IWoQ"

DIV = {"storagepoolID": POOL, "storagedomainID": SD, "imageID": IMG, "volumeID": VOL}
PDIV = {"poolID": POOL, "domainID": SD, "imageID": IMG, "volumeID": VOL}
CREATE = {
    **DIV,
    "size": "1073741824",
    "volFormat": 4,
    "preallocate": 2,
    "diskType": "DATA",
    "desc": '{"DiskAlias":"d1","DiskDescription":""}',
    "srcImgUUID": ZERO,
    "srcVolUUID": ZERO,
    "sequence": 1,
    "addBitmaps": False,
    "legal": True,
}
SERVER = {"storagepoolID": ZERO, "domainType": 1}
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
BACKUP = {
    "backup_id": JOB,
    "disks": [
        {
            "domainID": SD,
            "imageID": IMG,
            "volumeID": VOL,
            "checkpoint": True,
            "backup_mode": "incremental",
            "scratch_disk": {
                "path": "/run/x",
                "type": "block",
                "domainID": SD,
                "imageID": IMG,
                "volumeID": VOL2,
            },
        }
    ],
    "from_checkpoint_id": None,
    "to_checkpoint_id": VOL2,
    "parent_checkpoint_id": None,
    "require_consistency": False,
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
    (
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
    # -- Volume, Image
    (
        "Volume.create",
        CREATE,
        {
            "size": 1073741824,
            "volFormat": "COW",
            "preallocate": "SPARSE",
            "initialSize": None,
            "bitmap": None,
            "sequence": 1,
        },
    ),
    (
        "Volume.create",
        {**CREATE, "volFormat": "5", "preallocate": "1", "initialSize": "2048", "bitmap": VOL2},
        {"volFormat": "RAW", "preallocate": "PREALLOCATED", "initialSize": 2048, "bitmap": VOL2},
    ),
    (
        "Volume.create",
        {**CREATE, "volFormat": "cow", "preallocate": "Sparse", "size": 4096, "initialSize": ""},
        {"volFormat": "COW", "preallocate": "SPARSE", "size": 4096, "initialSize": None},
    ),
    *[
        ("Volume.create", {**CREATE, "diskType": disk_type}, {"diskType": disk_type})
        for disk_type in ("DATA", "OVFS", "MEMD", "MEMM", "ISOF", "SCRD", "HEVD", "HESD", "HEMD")
    ],
    *[
        (
            "Volume.copy",
            {
                **DIV,
                "dstSdUUID": SD,
                "dstImgUUID": IMG,
                "dstVolUUID": VOL2,
                "desc": "",
                "volType": number,
                "volFormat": 4,
                "preallocate": 2,
                "postZero": "false",
                "force": "true",
            },
            {"volType": name, "postZero": False, "force": True, "discard": False},
        )
        for number, name in ((6, "SHARED"), (7, "INTERNAL"), (8, "LEAF"))
    ],
    ("Volume.extendSize", {**DIV, "newSize": "2147483648"}, {"newSize": 2147483648}),
    (
        "Volume.measure",
        {**DIV, "dstVolFormat": 5, "backing_chain": False},
        {"dstVolFormat": "RAW", "backing_chain": False, "baseID": None},
    ),
    ("Volume.setLegality", {**DIV, "legality": "ILLEGAL"}, {"legality": "ILLEGAL"}),
    *[
        (
            "Image.move",
            {
                "imageID": IMG,
                "storagepoolID": POOL,
                "storagedomainID": SD,
                "dstSdUUID": SD2,
                "operation": sent,
                "postZero": "false",
                "force": "false",
            },
            {"operation": name, "postZero": False, "force": False},
        )
        for sent, name in ((1, "COPY"), (2, "MOVE"), ("1", "COPY"), ("move", "MOVE"))
    ],
    (
        "Image.delete",
        {
            "imageID": IMG,
            "storagepoolID": POOL,
            "storagedomainID": SD,
            "postZero": "False",
            "force": "TRUE",
        },
        {"postZero": False, "force": True, "discard": False},
    ),
    (
        "Image.deleteVolumes",
        {
            "imageID": IMG,
            "storagepoolID": POOL,
            "storagedomainID": SD,
            "volumeList": [VOL, VOL2],
            "postZero": "false",
            "force": "false",
            "discard": True,
        },
        {"volumeList": [VOL, VOL2], "discard": True},
    ),
    (
        "Image.teardown",
        {"storagepoolID": POOL, "storagedomainID": SD, "imageID": IMG, "leafVolID": VOL},
        {"storagepoolID": POOL, "storagedomainID": SD, "imageID": IMG, "volumeID": None},
    ),
    (
        "Image.syncData",
        {
            "imageID": IMG,
            "storagepoolID": POOL,
            "storagedomainID": SD,
            "dstSdUUID": SD2,
            "syncType": "INTERNAL",
        },
        {"syncType": "INTERNAL"},
    ),
    (
        "Image.download",
        {
            "methodArgs": {"method": "http", "url": "http://x/y", "headers": {"a": "b"}},
            "storagepoolID": POOL,
            "storagedomainID": SD,
            "imageID": IMG,
        },
        {"methodArgs": {"method": "http", "url": "http://x/y", "headers": {"a": "b"}}},
    ),
    # -- SDM
    (
        "SDM.copy_data",
        {
            "job_id": JOB,
            "source": {
                "endpoint_type": "div",
                "sd_id": SD,
                "img_id": IMG,
                "vol_id": VOL,
                "prepared": False,
            },
            "destination": {
                "endpoint_type": "external",
                "url": "file:///x",
                "lease": {"sd_id": SD, "lease_id": VM},
                "generation": 3,
                "format": "cow",
                "is_zero": True,
            },
            "copy_bitmaps": False,
            "legal": True,
        },
        {
            "source": {
                "endpoint_type": "div",
                "sd_id": SD,
                "img_id": IMG,
                "vol_id": VOL,
                "generation": None,
                "prepared": False,
            },
            "destination": {
                "endpoint_type": "external",
                "url": "file:///x",
                "lease": {"sd_id": SD, "lease_id": VM},
                "generation": 3,
                "format": "COW",
                "sparse": False,
                "create": False,
                "is_zero": True,
            },
        },
    ),
    (
        "SDM.update_volume",
        {
            "job_id": JOB,
            "vol_info": {
                "endpoint_type": "div",
                "sd_id": SD,
                "img_id": IMG,
                "vol_id": VOL,
                "generation": 4,
                "prepared": False,
            },
            "vol_attr": {"generation": 7, "type": "SHARED"},
        },
        {
            "vol_attr": {
                "legality": None,
                "description": None,
                "generation": 7,
                "type": "SHARED",
            }
        },
    ),
    (
        "SDM.clear_bitmaps",
        {
            "job_id": JOB,
            "vol_info": {"sd_id": SD, "img_id": IMG, "vol_id": VOL, "generation": None},
        },
        {
            "vol_info": {
                "endpoint_type": "div",
                "sd_id": SD,
                "img_id": IMG,
                "vol_id": VOL,
                "generation": None,
                "prepared": False,
            }
        },
    ),
    (
        "SDM.amend_volume",
        {
            "job_id": JOB,
            "vol_info": {"sd_id": SD, "img_id": IMG, "vol_id": VOL, "generation": 1},
            "qcow2_attr": {"compat": "0.10"},
        },
        {"qcow2_attr": {"compat": "0.10"}},
    ),
    (
        "SDM.move_domain_device",
        {"job_id": JOB, "move_params": {"sd_id": SD, "src_guid": GUID, "guid": GUID}},
        {},
    ),
    # -- Lease, NBD, ManagedVolume
    (
        "Lease.create",
        {"lease": {"lease_id": VM, "sd_id": SD}, "metadata": None},
        {"lease": {"lease_id": VM, "sd_id": SD}, "metadata": None},
    ),
    (
        "Lease.create",
        {
            "lease": {"lease_id": VM, "sd_id": SD},
            "metadata": {"type": "JOB", "generation": 0, "job_id": JOB, "job_status": "PENDING"},
        },
        {
            "metadata": {
                "type": "JOB",
                "job_id": JOB,
                "job_status": "PENDING",
                "generation": 0,
                "created": None,
                "modified": None,
                "host_hardware_id": None,
            }
        },
    ),
    (
        "NBD.start_server",
        {
            "server_id": JOB,
            "config": {
                "sd_id": SD,
                "img_id": IMG,
                "vol_id": VOL,
                "readonly": True,
                "discard": False,
                "detect_zeroes": True,
                "backing_chain": False,
                "bitmap": None,
            },
        },
        {
            "config": {
                "sd_id": SD,
                "img_id": IMG,
                "vol_id": VOL,
                "readonly": True,
                "discard": False,
                "detect_zeroes": True,
                "backing_chain": False,
                "bitmap": None,
            }
        },
    ),
    (
        "ManagedVolume.attach_volume",
        {
            "vol_id": VOL,
            "connection_info": {"driver_volume_type": "rbd", "data": {"name": "p/v", "n": [1]}},
            "sd_id": SD,
        },
        {"connection_info": {"driver_volume_type": "rbd", "data": {"name": "p/v", "n": [1]}}},
    ),
    # -- VM
    (
        "VM.snapshot",
        {
            "vmID": VM,
            "snapDrives": [
                {"domainID": SD, "imageID": IMG, "baseVolumeID": VOL, "volumeID": VOL2}
            ],
            "frozen": False,
            "jobUUID": JOB,
            "freeze_timeout": 8,
        },
        {"snapMemory": None, "timeout": 30, "freeze_timeout": 8},
    ),
    (
        "VM.snapshot",
        {"vmID": VM, "snapDrives": [], "snapMemory": "a,b,c,d,e,f", "timeout": 30},
        {"snapDrives": [], "snapMemory": "a,b,c,d,e,f"},
    ),
    (
        "VM.merge",
        {
            "vmID": VM,
            "drive": PDIV,
            "baseVolUUID": VOL,
            "topVolUUID": VOL2,
            "bandwidth": "0",
            "jobUUID": JOB,
        },
        {"bandwidth": 0, "drive": {**PDIV, "device": "disk", "diskType": None}},
    ),
    (
        "VM.diskReplicateStart",
        {
            "vmID": VM,
            "srcDisk": {**PDIV, "device": "disk"},
            "dstDisk": {**PDIV, "device": "disk", "diskType": "network"},
            "needExtend": False,
        },
        {"dstDisk": {**PDIV, "device": "disk", "diskType": "network"}, "needExtend": False},
    ),
    (
        "VM.diskSizeExtend",
        {"vmID": ZERO, "driveSpecs": PDIV, "newSize": "2147483648"},
        {"newSize": 2147483648},
    ),
    (
        "VM.diskSizeExtend",
        {"vmID": VM, "driveSpecs": {"GUID": GUID}, "newSize": "1"},
        {"driveSpecs": {"GUID": GUID, "device": "disk"}},
    ),
    ("VM.changeCD", {"vmID": VM, "driveSpec": "/iso/x.iso"}, {"driveSpec": "/iso/x.iso"}),
    (
        "VM.changeCD",
        {"vmID": VM, "driveSpec": {"iface": "sata", "index": "2", "drive_spec": PDIV}},
        {
            "driveSpec": {
                "iface": "sata",
                "index": 2,
                "path": None,
                "drive_spec": {**PDIV, "device": "disk", "diskType": None},
            }
        },
    ),
    (
        "VM.changeCD",
        {"vmID": VM, "driveSpec": {"iface": "sata", "index": "2", "path": ""}},
        {"driveSpec": {"iface": "sata", "index": 2, "path": "", "drive_spec": None}},
    ),
    (
        "VM.hotplugLease",
        {"vmID": VM, "lease": {"type": "lease", "sd_id": SD, "lease_id": VM}},
        {"lease": {"type": "lease", "sd_id": SD, "lease_id": VM}},
    ),
    (
        "VM.hotplugDisk",
        {"vmID": VM, "params": {"vmId": VM, "xml": "<hotplug/>"}},
        {"params": {"vmId": VM, "xml": "<hotplug/>"}},
    ),
    (
        "VM.start_backup",
        {"vmID": VM, "config": BACKUP},
        {
            "config": {
                **BACKUP,
                "creation_time": None,
                "disks": [
                    {
                        **BACKUP["disks"][0],  # type: ignore[index]
                        "scratch_disk": {
                            "path": "/run/x",
                            "type": "BLOCK",
                            "domainID": SD,
                            "imageID": IMG,
                            "volumeID": VOL2,
                        },
                    }
                ],
            }
        },
    ),
    (
        "VM.redefine_checkpoints",
        {
            "vmID": VM,
            "checkpoints": [{"id": VOL2, "config": {**BACKUP, "creation_time": 1700000000}}],
        },
        {},
    ),
    (
        "VM.create",
        {
            "vmID": VM,
            "vmParams": {"vmId": VM, "xml": "<domain/>", "memoryDumpVolume": PDIV},
        },
        {"vmParams": {"vmId": VM, "xml": "<domain/>", "memoryDumpVolume": PDIV}},
    ),
]


@pytest.fixture(scope="module")
def checker() -> Checker:
    return Checker(Schema())


@pytest.mark.parametrize(
    ("verb", "sent", "expected"), CASES, ids=[f"{i}-{case[0]}" for i, case in enumerate(CASES)]
)
def test_form(checker: Checker, verb: str, sent: dict[str, Any], expected: dict[str, Any]) -> None:
    checked = checker.check_params(verb, sent)
    assert {name: checked.values[name] for name in expected} == expected
    for name, value in expected.items():
        assert type(checked.values[name]) is type(value), name
    # what came in is left alone, and what comes out goes in again
    again = checker.check_params(verb, checked.values)
    assert again.values == checked.values
    assert again.warnings == []


@pytest.mark.parametrize(
    ("verb", "extra"), [("SDM.copy_data", {"legal": True}), ("Image.teardown", {"leafVolID": VOL})]
)
def test_known_extras_are_silent_even_when_strict(verb: str, extra: dict[str, object]) -> None:
    sent = next(case[1] for case in CASES if case[0] == verb) | extra
    checked = Checker(Schema(), strict=True).check_params(verb, sent)
    assert checked.warnings == []
    assert not extra.keys() & checked.values.keys()


def test_unknown_parameter_is_a_warning_or_when_strict_an_error(checker: Checker) -> None:
    sent = {**CREATE, "initialsize": "1"}
    checked = checker.check_params("Volume.create", sent)
    assert "initialsize" not in checked.values
    assert checked.warnings == [
        "unknown parameter 'initialsize' was ignored; did you mean initialSize?"
    ]
    with pytest.raises(errors.InvalidParams) as caught:
        checker.check_params("Volume.create", sent, strict=True)
    assert caught.value.parameter == "initialsize"


def test_unknown_key_of_an_object_is_dropped_with_a_warning(checker: Checker) -> None:
    checked = checker.check_params(
        "Lease.info", {"lease": {"sd_id": SD, "lease_id": VM, "type": "lease"}}
    )
    assert checked.values == {"lease": {"sd_id": SD, "lease_id": VM}}
    assert checked.warnings == ["unknown Lease key 'type' was ignored"]


def test_positions(checker: Checker) -> None:
    checked = checker.check_params("Volume.getInfo", [VOL, POOL, SD, IMG])
    assert checked.values == {**DIV}
    checked = checker.check_params("Host.startMonitoringDomain", [SD, "3"])
    assert checked.values == {"sdUUID": SD, "hostID": 3}
    with pytest.raises(errors.InvalidParams) as caught:
        checker.check_params("Host.ping", [1])
    assert caught.value.parameter == "number 1"


def test_no_parameters_at_all(checker: Checker) -> None:
    assert checker.check_params("Host.ping", None).values == {}
    assert checker.check_params("Host.ping", []).values == {}


def test_lists_of_defaults_are_fresh(checker: Checker) -> None:
    first = checker.check_params("Host.getJobs", {}).values["job_ids"]
    assert isinstance(first, list)
    first.append("x")
    assert checker.check_params("Host.getJobs", {}).values["job_ids"] == []


def test_unknown_verb(checker: Checker) -> None:
    assert not checker.knows("SDM.wipeVolume")
    assert checker.knows("Volume.create")
    with pytest.raises(errors.MethodNotFound):
        checker.check_params("SDM.wipeVolume", {})
