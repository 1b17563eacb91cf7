# SPDX-License-Identifier: GPL-2.0-or-later
"""What an engine takes out of each reply; a shape that it could not read raises."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from functional.engine import readers as r

NO_UUID = "00000000-0000-0000-0000-000000000000"
TASK_STATES = ("unknown", "init", "running", "finished", "aborting", "cleaning")
TASK_RESULTS = ("success", "failure", "cleanSuccess", "cleanFailure", "unknown")
# fmt: off
TASK_VERBS = (
    "copyImage", "moveImage", "createVolume", "deleteVolume", "deleteImage", "reduceImage",
    "cloneImageStructure", "syncImageData", "extendImageSize", "downloadImage",
    "uploadImageToStream", "downloadImageFromStream", "prepareMerge", "finalizeMerge", "addLease",
    "removeLease", "switchMaster",
    # Read as "unknown", with a line in the engine's log.
    "spmStart", "extendVolumeSize", "reduceVolume", "rebuildLeases",
)
# fmt: on
JOB_STATES = ("pending", "running", "done", "aborted", "failed", "aborting")
VM_STATES = (
    "Up", "Down", "WaitForLaunch", "Powering up", "Powering down", "Paused", "Rebooting",
    "Saving State", "Restoring state", "Migration Source", "Migration Destination",
)  # fmt: skip
PAUSE_CODES = ("NOERR", "EIO", "ENOSPC", "EPERM", "EOTHER", "NONE")
DISK_TYPES = ("DATA", "OVFS", "MEMD", "MEMM", "ISOF", "SCRD", "HEVD", "HESD", "HEMD", "HECI")


@dataclass(frozen=True)
class Capabilities:
    levels: list[str]
    domain_versions: list[int]
    initiator: str | None


def capabilities(reply: Any) -> Capabilities:
    """Every key without which a host does not come up (engine's 2.2), with its type."""
    inventory = r.cast(reply, "HBAInventory", dict)
    for hba in r.cast(inventory, "iSCSI", list):
        r.cast(hba, "InitiatorName", str)
    for hba in r.cast(inventory, "FC", list):
        for key in ("wwpn", "wwnn", "model"):
            r.cast(hba, key, str)
    levels = r.string_list(reply["clusterLevels"], "clusterLevels")
    r.string_list(reply["supportedENGINEs"], "supportedENGINEs")
    for key in ("software_version", "version_name", "build_name", "cpuFlags", "cpuModel"):
        r.cast(reply, key, str)
    _packages(r.cast(reply, "packages2", dict))
    system = r.cast(reply, "operatingSystem", dict)
    for key in ("name", "version", "release"):
        r.cast(system, key, str)
    _sizing(reply)
    for key in ("networks", "bridges", "nics", "bondings", "vlans"):
        r.cast(reply, key, dict)
    for nic in reply["nics"].values():
        r.assign_int(nic, "mtu")
        r.assign_int(nic, "speed")
    versions = r.cast(reply, "domain_versions", list)
    sizes = r.cast(reply, "supported_block_size", dict)
    for name, numbers in [("domain_versions", versions), *sizes.items()]:
        if any(type(number) is not int for number in numbers):
            raise r.WrongTypeError(name, numbers, "JSON ints")
    _numa(reply)
    return Capabilities(levels, versions, r.assign_string(reply, "ISCSIInitiatorName"))


def _packages(reply: Mapping[str, Any]) -> None:
    for name, package in reply.items():
        if not package["version"] or type(package["release"]) is not str:
            raise r.WrongTypeError(name, package, "version and release")
    version = reply["vdsm"]["version"]
    if not all(part.isdigit() for part in version.split(".")):
        raise r.WrongTypeError("packages2.vdsm.version", version, "a dotted version")


def _sizing(reply: Mapping[str, Any]) -> None:
    for key in ("cpuCores", "cpuThreads", "cpuSockets", "memSize", "reservedMem", "guestOverhead"):
        if r.assign_int(reply, key, -1) < 0:
            raise r.WrongTypeError(key, reply.get(key), "a number")
    if r.assign_double(reply, "cpuSpeed") is None:
        raise r.WrongTypeError("cpuSpeed", None, "a float")
    r.string_list(reply["emulatedMachines"], "emulatedMachines")
    r.string_list(reply["rngSources"], "rngSources")
    r.assign_bool(reply, "kvmEnabled")
    r.assign_bool(reply, "fipsEnabled")
    r.assign_int(r.cast(reply, "selinux", dict), "mode")


def _numa(reply: Mapping[str, Any]) -> None:
    for node in reply.get("numaNodes", {}).values():
        if any(type(cpu) is not int for cpu in r.cast(node, "cpus", list)):
            raise r.WrongTypeError("numaNodes.cpus", node, "ints")
        r.cast(node, "totalMemory", str)
    for cpu in reply.get("cpuTopology", []):
        for key in ("cpu_id", "core_id", "socket_id", "numa_cell_id"):
            r.cast(cpu, key, int)


@dataclass(frozen=True)
class DomainHealth:
    """`actual` is false until the first measurement: the engine skips such a report."""

    code: int
    last_check: float
    delay: float
    valid: bool
    acquired: bool
    actual: bool


def host_stats(reply: Any) -> dict[str, DomainHealth]:
    """The health of each domain; the other statistics are read for their types."""
    for key in ("cpuUser", "cpuSys", "cpuIdle", "cpuLoad"):
        r.assign_double(reply, key)
    for key in ("memFree", "memShared", "swapFree", "swapTotal", "vmActive", "vmMigrating"):
        r.assign_int(reply, key)
    r.cast(reply, "vmCount", int)
    for nic in reply.get("network", {}).values():
        r.cast(nic, "sampleTime", float)
        for key in ("rx", "tx", "rxDropped", "txDropped"):
            r.assign_long(nic, key)
        r.one_of(nic, "state", "up", "down")
    for health in r.cast(reply, "multipathHealth", dict).values():
        r.cast(health, "valid_paths", int)
        r.cast(health, "failed_paths", list)
    for core in reply.get("cpuStatistics", {}).values():
        for key in ("cpuUser", "cpuSys", "cpuIdle"):
            if r.assign_double(core, key) is None:
                raise r.WrongTypeError(key, None, "a float")
    found = {}
    for domain, health in r.cast(reply, "storageDomains", dict).items():
        found[domain] = DomainHealth(
            code=r.cast(health, "code", int),
            last_check=float(r.cast(health, "lastCheck", str)),
            delay=float(r.cast(health, "delay", str)),
            valid=r.cast(health, "valid", bool),
            acquired=r.cast(health, "acquired", bool),
            actual=r.cast(health, "actual", bool),
        )
    return found


def connection_statuses(reply: Any) -> dict[str, int]:
    """Connection id -> status."""
    if type(reply) is not list:
        raise r.WrongTypeError("connectStorageServer", reply, "a list")
    return {r.cast(item, "id", str): r.assign_int(item, "status", -1) for item in reply}


@dataclass(frozen=True)
class DomainInfo:
    name: str
    type: str
    domain_class: str
    version: str
    remote_path: str
    group: str
    pools: list[str]
    master: bool


def domain_info(reply: Any) -> DomainInfo:
    """`remotePath` of file domains; of block domains the group and two devices."""
    block = reply["type"].upper() in ("FCP", "ISCSI")
    if block:
        r.one_of(reply, "state", "OK", "PARTIAL")
        for key in ("metadataDevice", "vgMetadataDevice"):
            r.cast(reply, key, str)
    return DomainInfo(
        name=r.cast(reply, "name", str),
        type=r.cast(reply, "type", str).upper(),
        domain_class=r.one_of(reply, "class", "Data", "Iso", "Backup"),
        version=str(reply["version"]),
        remote_path="" if block else r.cast(reply, "remotePath", str),
        group=r.cast(reply, "vguuid", str) if block else "",
        pools=r.string_list(reply.get("pool"), "pool"),
        master=r.one_of(reply, "role", "Master", "Regular") == "Master",
    )


def domain_stats(reply: Any) -> tuple[int, int]:
    """(free, total) bytes; the engine reads them from strings only."""
    free, total = r.assign_long_irs(reply, "diskfree"), r.assign_long_irs(reply, "disktotal")
    if free is None or total is None:
        raise r.WrongTypeError("diskfree/disktotal", reply, "both")
    return free, total


@dataclass(frozen=True)
class Device:
    """A LUN; sizes in bytes.  `pv_size` is None for what is no physical volume."""

    guid: str
    status: str
    group: str
    capacity: int
    pv_size: int | None
    extents: int | None


def _device(reply: Any) -> Device:
    """As Host.getDeviceList and LVMVolumeGroup.getInfo tell of it."""
    if type(reply["discard_max_bytes"]) is not int:
        raise r.WrongTypeError("discard_max_bytes", reply["discard_max_bytes"], "a number")
    for key in ("serial", "vendorID", "productID", "devtype"):
        r.cast(reply, key, str)
    for path in r.cast(reply, "pathstatus", list):
        r.one_of(path, "state", "active", "failed")
        r.cast(path, "physdev", str)
        r.assign_int(path, "lun")
    r.cast(reply, "pathlist", list)
    size = r.assign_long_irs(reply, "capacity")
    if size is None:
        raise r.WrongTypeError("capacity", None, "a size")
    return Device(
        guid=r.cast(reply, "GUID", str),
        status=r.one_of(reply, "status", "free", "used", "unknown", "unusable")
        if "status" in reply
        else "unknown",
        group=r.assign_string(reply, "vgUUID") or "",
        capacity=size,
        pv_size=r.assign_long_irs(reply, "pvsize") if reply.get("pvsize") else None,
        extents=r.assign_int(reply, "pe_count") if "pe_count" in reply else None,
    )


def devices(reply: Any) -> dict[str, Device]:
    """By GUID."""
    return {device["GUID"]: _device(device) for device in reply}


@dataclass(frozen=True)
class GroupInfo:
    """A volume group and its LUNs by GUID."""

    name: str
    devices: dict[str, Device]


def group_info(reply: Any) -> GroupInfo:
    for device in r.cast(reply, "pvlist", list):
        for key in ("capacity", "devcapacity", "pe_count", "pe_alloc_count"):
            r.cast(device, key, str)
    return GroupInfo(r.cast(reply, "name", str), devices(reply["pvlist"]))


@dataclass(frozen=True)
class PoolInfo:
    name: str
    type: str
    master: str
    master_version: int
    domains: dict[str, str]


def pool_info(reply: Any) -> PoolInfo:
    """A domain that is missing in `dominfo` is removed from the engine's database."""
    info, domains = r.cast(reply, "info", dict), r.cast(reply, "dominfo", dict)
    for domain in domains.values():
        if "diskfree" in domain:
            domain_stats(domain)
        for alert in domain.get("alerts", []):
            r.cast(alert, "code", int)
    return PoolInfo(
        name=r.cast(info, "name", str),
        type=r.cast(info, "type", str),
        master=r.uuid(info, "master_uuid"),
        master_version=r.cast(info, "master_ver", int),
        domains={
            sd: r.one_of(domain, "status", "Active", "Attached", "Unattached", "Locked", "Unknown")
            for sd, domain in domains.items()
        },
    )


@dataclass(frozen=True)
class SpmStatus:
    status: str
    version: str
    id: int


def spm_status(reply: Any) -> SpmStatus:
    status = r.one_of(reply, "spmStatus", "SPM", "Contend", "Free")
    return SpmStatus(status, str(reply["spmLver"]), r.assign_int(reply, "spmId", -2))


@dataclass(frozen=True)
class TaskStatus:
    """`result` is "" only while the task runs."""

    state: str
    result: str
    code: int
    message: str

    @property
    def finished(self) -> bool:
        return self.state == "finished"

    @property
    def succeeded(self) -> bool:
        return self.finished and self.code == 0 and self.result == "success"


def task_status(reply: Any) -> TaskStatus:
    state = r.cast(reply, "taskState", str)
    if state not in TASK_STATES:
        raise r.WrongTypeError("taskState", state, " or ".join(TASK_STATES))
    result = r.cast(reply, "taskResult", str)
    if result not in TASK_RESULTS and (result or state == "finished"):
        raise r.WrongTypeError("taskResult", result, " or ".join(TASK_RESULTS))
    return TaskStatus(state, result, r.assign_int(reply, "code"), r.cast(reply, "message", str))


def all_tasks(reply: Any) -> dict[str, TaskStatus]:
    return {task: task_status(status) for task, status in reply.items()}


def task_verbs(reply: Any) -> dict[str, str]:
    """getAllTasksInfo: what each task does; the engine knows a fixed set of names."""
    return {task: r.one_of(info, "verb", *TASK_VERBS) for task, info in reply.items()}


@dataclass(frozen=True)
class Job:
    id: str
    status: str
    progress: float | None
    code: int
    message: str


def jobs(reply: Any) -> dict[str, Job]:
    """`progress` is a float or absent; an int or null breaks the engine's whole poll."""
    found = {}
    for key, job in reply.items():
        error = r.cast(job, "error", dict) if "error" in job else {}
        r.cast(job, "description", str)
        r.one_of(job, "job_type", "storage", "virt", "v2v")
        found[key] = Job(
            id=r.uuid(job, "id"),
            status=r.one_of(job, "status", *JOB_STATES),
            progress=r.cast(job, "progress", float) if "progress" in job else None,
            code=r.cast(error, "code", int) if error else 0,
            message=str(error.get("message", "")),
        )
    return found


@dataclass(frozen=True)
class VolumeInfo:
    """`owners` are the host ids that hold the volume's lease."""

    volume: str
    parent: str
    status: str
    capacity: int
    true_size: int
    apparent_size: int
    type: str
    format: str
    voltype: str
    description: str
    generation: int
    sequence: int
    owners: list[int]
    has_lease: bool


def volume_info(reply: Any) -> VolumeInfo:
    """A status that the engine does not know drops the whole reply."""
    r.one_of(reply, "disktype", *DISK_TYPES)
    lease = r.cast(reply, "lease", dict) if reply.get("lease") else {}
    owners = r.cast(lease, "owners", list) if lease else []
    if any(type(owner) is not int for owner in owners):
        raise r.WrongTypeError("lease.owners", owners, "ints")
    sizes = {key: r.assign_long(reply, key) for key in ("capacity", "truesize", "apparentsize")}
    if None in sizes.values():
        raise r.WrongTypeError("sizes", sizes, "all of them")
    for key in ("ctime", "domain", "image"):
        if key not in reply:
            raise r.WrongTypeError(key, None, "this key")
    return VolumeInfo(
        volume=r.uuid(reply, "uuid"),
        parent=r.uuid(reply, "parent"),
        status=r.one_of(reply, "status", "OK", "ILLEGAL", "LOCKED"),
        capacity=sizes["capacity"] or 0,
        true_size=sizes["truesize"] or 0,
        apparent_size=sizes["apparentsize"] or 0,
        type=r.one_of(reply, "type", "SPARSE", "PREALLOCATED"),
        format=r.one_of(reply, "format", "COW", "RAW"),
        voltype=r.one_of(reply, "voltype", "LEAF", "INTERNAL", "SHARED"),
        description=r.cast(reply, "description", str),
        generation=r.cast(reply, "generation", int),
        sequence=r.cast(reply, "sequence", int),
        owners=list(owners),
        has_lease=bool(lease),
    )


@dataclass(frozen=True)
class VmStats:
    """`jobs` are the images that block jobs work on, by job; `images` those of its disks."""

    status: str
    pause_code: str
    hash: str
    jobs: dict[str, str]
    images: list[str]
    frozen: float | None


def vm_stats(reply: Any) -> dict[str, VmStats]:
    """By VM.  A VM that is missing is taken for one that has ended."""
    if type(reply) is not list:
        raise r.WrongTypeError("getAllVmStats", reply, "a list")
    return {r.uuid(one, "vmId"): _vm(one) for one in reply}


def _vm(reply: Any) -> VmStats:
    status = r.one_of(reply, "status", *VM_STATES)
    if float(r.cast(reply, "statusTime", str)) <= 0:
        raise r.WrongTypeError("statusTime", reply["statusTime"], "milliseconds")
    for key in ("cpuUser", "cpuSys"):
        float(r.cast(reply, key, str))
    r.one_of(reply, "monitorResponse", "0", "-1")
    r.assign_int(reply, "memUsage")
    # Without the key nothing is known of jobs; an empty map says that all have ended.
    jobs = {r.uuid(job, "id"): _block_job(job) for job in r.cast(reply, "vmJobs", dict).values()}
    if set(jobs) != set(reply["vmJobs"]):
        raise r.WrongTypeError("vmJobs", reply["vmJobs"], "jobs by their ids")
    disks = r.cast(reply, "disks", dict)
    frozen = reply.get("freezeAge")
    return VmStats(
        status=status,
        pause_code=r.one_of(reply, "pauseCode", *PAUSE_CODES),
        hash=r.cast(reply, "hash", str),
        jobs=jobs,
        images=[image for disk in disks.values() if (image := _vm_disk(disk))],
        frozen=None if frozen is None else float(frozen),
    )


def _block_job(reply: Any) -> str:
    r.one_of(reply, "jobType", "block")
    r.one_of(reply, "blockJobType", "commit", "unknown")
    for key in ("cur", "end"):
        int(r.cast(reply, key, str))
    r.cast(reply, "bandwidth", int)
    return r.uuid(reply, "imgUUID")


def _vm_disk(reply: Any) -> str:
    for key in ("truesize", "apparentsize", "readLatency", "writeLatency", "flushLatency"):
        int(r.cast(reply, key, str))
    for key in ("readRate", "writeRate"):
        float(r.cast(reply, key, str))
    for key in ("readOps", "writeOps"):
        r.assign_long(reply, key)
    return r.assign_string(reply, "imageID") or ""


def chains(xml: Any) -> dict[str, list[str]]:
    """The volumes of each image, base first, out of a running VM's XML.

    A disk is found by its alias; image and volume are the last two names of each path.
    """
    if type(xml) is not str:
        raise r.WrongTypeError("dumpxmls", xml, "XML")
    found: dict[str, list[str]] = {}
    for disk in ET.fromstring(xml).iterfind("./devices/disk"):
        alias = disk.find("alias")
        name = "" if alias is None else alias.get("name", "")
        if not name.startswith("ua-"):
            raise r.WrongTypeError("alias", name, "ua- and the disk's id")
        paths = [path.split("/")[-2:] for path in _layers(disk)]
        (image,) = {path[0] for path in paths}
        found[image] = [path[1] for path in reversed(paths)]
    return found


def _layers(disk: ET.Element) -> Iterator[str]:
    """Paths from the top down."""
    layer: ET.Element | None = disk
    while layer is not None:
        source = layer.find("source")
        if source is not None:
            yield source.get("file") or source.get("dev") or ""
        layer = layer.find("backingStore")
