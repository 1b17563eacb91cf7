# SPDX-License-Identifier: GPL-2.0-or-later
"""Replies: what upstream answered passes, what an engine's reader breaks on does not.

tests/data/schema/replies holds replies that were captured from a host that engines work with.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from vdsm_storage import errors
from vdsm_storage.base.secret import Secret
from vdsm_storage.schema.loader import Schema
from vdsm_storage.schema.normalise import Checker

CAPTURED = Path(__file__).parents[1] / "data/schema/replies"
SD = "6513270e-269e-4d37-b2a7-4de452e6b438"
JOB = "2129d338-b425-4188-bcb5-d0e3bcb1cec4"
VERB_OF = {
    "sd-info": "StorageDomain.getInfo",
    "sd-stats": "StorageDomain.getStats",
    "volume-info": "Volume.getInfo",
    "dump": "StorageDomain.dump",
    "getDeviceList": "Host.getDeviceList",
    "getVGInfo": "LVMVolumeGroup.getInfo",
}


@pytest.fixture(scope="module")
def checker() -> Checker:
    return Checker(Schema())


@pytest.mark.parametrize("path", sorted(CAPTURED.iterdir()), ids=lambda path: path.stem)
def test_captured(checker: Checker, path: Path) -> None:
    verb = next(verb for part, verb in VERB_OF.items() if part in path.stem)
    reply = json.loads(path.read_text())
    for one in reply.values() if verb == "Volume.getInfo" else [reply]:
        assert checker.reply_problems(verb, one) == []


VITALS = {
    "code": 0, "lastCheck": "1.2", "delay": "0.0003", "valid": True, "version": 5,
    "acquired": True, "actual": True,
}  # fmt: skip
STATS = {"storageDomains": {SD: VITALS}, "multipathHealth": {}, "vmCount": 0}
JOB_INFO = {
    "id": JOB, "job_type": "storage", "status": "running", "description": "", "progress": 1.0,
}  # fmt: skip
FAILED_PATH = {"3600": {"valid_paths": 1, "failed_paths": ["8:16"]}}
STATUS = {"taskID": JOB, "taskState": "running", "taskResult": "", "code": 0, "message": ""}
DOMINFO = {"status": "Active", "diskfree": "1", "disktotal": "2", "alerts": []}
POOL = {
    "info": {
        "name": "dc", "type": "NFS", "master_uuid": SD, "master_ver": 1, "lver": 3, "spm_id": 1,
        "domains": f"{SD}:Active", "version": "5", "isoprefix": "", "pool_status": "connected",
    },
    "dominfo": {SD: DOMINFO},
}  # fmt: skip
VOLUME = next(
    iter(json.loads((CAPTURED / "file-domain-posix-v5-3-volume-info.json").read_text()).values())
)

GOOD: list[tuple[str, Any]] = [
    ("Host.ping", True),
    ("Host.getStats", STATS),
    ("Host.getStats", {**STATS, "multipathHealth": FAILED_PATH}),
    ("Host.getJobs", {JOB: JOB_INFO}),
    ("Host.getJobs", {JOB: {k: v for k, v in JOB_INFO.items() if k != "progress"}}),
    ("Host.getJobs", {JOB: {**JOB_INFO, "error": {"code": 911, "message": "m"}}}),
    ("Host.getAllTasksStatuses", {JOB: STATUS}),
    ("Host.getAllTasksInfo", {JOB: {"id": JOB, "verb": "createVolume"}}),
    ("Task.getStatus", STATUS),
    ("StoragePool.getInfo", POOL),
    ("StoragePool.getSpmStatus", {"spmStatus": "Free", "spmLver": -1, "spmId": -1}),
    ("StoragePool.connectStorageServer", [{"id": SD, "status": 0}]),
    ("StoragePool.spmStart", JOB),
    ("StoragePool.upgrade", "started"),
    ("Volume.getInfo", VOLUME),
    ("Volume.getSize", {"apparentsize": "1", "truesize": "1"}),
    ("Volume.measure", {"required": 5_000_000_000}),
    ("Image.prepare", {"path": "/x"}),
    ("StorageDomain.resizePV", "21474836480"),
    ("VM.diskSizeExtend", "21474836480"),
    ("Host.dumpxmls", {JOB: "<domain/>"}),
    ("StorageDomain.getFileStats", {"/x.iso": {"status": 0, "size": "1", "ctime": 1700000000}}),
    ("Lease.info", {"sd_id": SD, "lease_id": JOB, "path": "/x", "offset": 3145728}),
    ("Lease.status", {"owners": [], "version": None}),
    ("Host.getVMList", [SD]),
    ("Host.getVMList", [{"vmId": SD, "status": "Up"}]),
    ("ISCSIConnection.discoverSendTargets", ["10.0.0.5:3260,1 iqn.2020-01.org.example:t1"]),
    ("GlusterVolume.start", True),
]


@pytest.mark.parametrize(("verb", "reply"), GOOD)
def test_good(checker: Checker, verb: str, reply: Any) -> None:
    assert checker.reply_problems(verb, reply) == []
    checker.check_reply(verb, reply)


# (verb, a good reply, where in it, what an engine cannot read there)
TRAPS: list[tuple[str, Any, list[Any], Any]] = [
    ("Host.ping", True, [], None),
    ("Host.ping", True, [], {}),
    ("Host.getStats", STATS, ["storageDomains", SD, "lastCheck"], 1.2),
    ("Host.getStats", STATS, ["storageDomains", SD, "delay"], 0),
    ("Host.getStats", STATS, ["storageDomains", SD, "code"], "0"),
    ("Host.getStats", STATS, ["storageDomains", SD, "valid"], "true"),
    ("Host.getStats", STATS, ["storageDomains", SD, "actual"], 1),
    ("Host.getStats", STATS, ["storageDomains", SD, "code"], 2**31),
    ("Host.getStats", STATS, ["multipathHealth"], None),
    ("Host.getJobs", {JOB: JOB_INFO}, [JOB, "progress"], 5),
    ("Host.getJobs", {JOB: JOB_INFO}, [JOB, "progress"], None),
    ("Host.getJobs", {JOB: JOB_INFO}, [JOB, "status"], "DONE"),
    ("Task.getStatus", STATUS, ["message"], None),
    ("Task.getStatus", STATUS, ["taskState"], "Finished"),
    ("StoragePool.getInfo", POOL, ["dominfo", SD, "diskfree"], 1),
    ("StoragePool.getInfo", POOL, ["info", "master_ver"], "1"),
    ("StoragePool.getInfo", POOL, ["info", "type"], 1),
    ("Volume.getInfo", VOLUME, ["capacity"], 1073741824),
    ("Volume.getInfo", VOLUME, ["generation"], "0"),
    ("Volume.getInfo", VOLUME, ["parent"], ""),
    ("Volume.getInfo", VOLUME, ["parent"], SD.upper()),
    ("Volume.getInfo", VOLUME, ["status"], "LEGAL"),
    ("Volume.getInfo", VOLUME, ["disktype"], "FLOPPY"),
    ("Volume.getInfo", VOLUME, ["allocType"], "SPARSE"),
    ("StoragePool.spmStart", JOB, [], None),
    ("StoragePool.spmStart", JOB, [], True),
    ("StorageDomain.resizePV", "1", [], 21474836480),
    ("Host.dumpxmls", {JOB: "<domain/>"}, [], [{JOB: "<domain/>"}]),
    ("StoragePool.connectStorageServer", [{"id": SD, "status": 0}], [0, "status"], "0"),
]


@pytest.mark.parametrize(("verb", "good", "where", "bad"), TRAPS)
def test_trap(checker: Checker, verb: str, good: Any, where: list[Any], bad: Any) -> None:
    assert checker.reply_problems(verb, good) == []
    reply = bad
    if where:
        reply = inner = copy.deepcopy(good)
        for step in where[:-1]:
            inner = inner[step]
        inner[where[-1]] = bad
    problems = checker.reply_problems(verb, reply)
    assert len(problems) == 1
    if where:
        assert str(where[-1]) in problems[0]
    with pytest.raises(errors.InternalError) as caught:
        checker.check_reply(verb, reply)
    assert verb in caught.value.message


@pytest.mark.parametrize("key", ["pool", "version", "class"])
def test_a_missing_key_is_told(checker: Checker, key: str) -> None:
    reply = json.loads((CAPTURED / "file-domain-posix-v5-1-sd-info.json").read_text())
    del reply[key]
    problems = checker.reply_problems("StorageDomain.getInfo", reply)
    assert problems == [f"result.{key}: missing"]


def test_a_wrapped_password_is_a_string_on_its_way_out(checker: Checker) -> None:
    path = {
        "connection": "10.0.0.5", "port": "3260", "iqn": "i", "portal": "1",
        "initiatorname": "default", "user": "u", "password": Secret("x"),
    }  # fmt: skip
    devices = json.loads((CAPTURED / "device-list-getDeviceList-free.json").read_text())
    devices[0]["pathlist"] = [path]
    assert checker.reply_problems("Host.getDeviceList", devices) == []


def test_every_verb_can_be_checked(checker: Checker) -> None:
    for verb in Schema().verbs():
        assert isinstance(checker.reply_problems(verb.name, True), list)
