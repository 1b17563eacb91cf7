# SPDX-License-Identifier: GPL-2.0-or-later
"""What an engine really sends about volumes, leases and VMs, and what the verb's function gets.

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
    VM,
    VOL,
    VOL2,
    ZERO,
    check_form,
    unchanged,
)
from vdsm_storage import errors
from vdsm_storage.schema.loader import Schema
from vdsm_storage.schema.normalise import Checker

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

CASES: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
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
    unchanged(
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
    ),
    unchanged(
        "ManagedVolume.attach_volume",
        {
            "vol_id": VOL,
            "connection_info": {"driver_volume_type": "rbd", "data": {"name": "p/v", "n": [1]}},
            "sd_id": SD,
        },
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
    check_form(checker, verb, sent, expected)


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
