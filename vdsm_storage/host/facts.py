# SPDX-License-Identifier: GPL-2.0-or-later
"""The host as engines see it: capabilities, hardware, statistics.

Engines ask for capabilities every three seconds while a host comes up, and for statistics every
fifteen.  What needs a program (package versions, QEMU's machine types) is asked once; the rest is
a few dozen small files.  The types matter: a wrong one sets the host to the status Error.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from vdsm_storage.base.clock import Clock
from vdsm_storage.host import cpu, hardware, memory, network
from vdsm_storage.host.kernel_files import KernelFiles
from vdsm_storage.host.network import Network

# The release of the language that this agent speaks; engines refuse a host that names another.
COMPATIBLE: Final = "4.50.5"
CLUSTER_LEVELS: Final = ("4.2", "4.3", "4.4", "4.5", "4.6", "4.7", "4.8")
ENGINES: Final = ("4.2", "4.3", "4.4", "4.5")
DOMAIN_VERSIONS: Final = (3, 4, 5)  # an engine asks for the version of the pool
# Sector sizes a domain of each type may have; 0 lets the agent find out.
BLOCK_SIZES: Final[Mapping[str, tuple[int, ...]]] = {
    "FCP": (512,),
    "GLUSTERFS": (0, 512, 4096),
    "ISCSI": (512,),
    "LOCALFS": (0, 512, 4096),
    "NFS": (512,),
    "POSIXFS": (512,),
}
RESERVED_MEMORY: Final = 321  # MiB kept for the host: what engines' schedulers reckon with
GUEST_OVERHEAD: Final = 65  # MiB of QEMU itself a guest
KDUMP_UNKNOWN: Final = -1


@dataclass(frozen=True)
class _Fixed:
    """What does not change while the agent runs."""

    processors: cpu.Processors
    packages: dict[str, dict[str, str]]
    machines: list[str]
    hardware: dict[str, str]
    system: dict[str, str]


VM_COUNTS: Final = (
    "vmCount", "vmActive", "vmMigrating", "incomingVmMigrations", "outgoingVmMigrations",
)  # fmt: skip


class HostFacts:
    """`storage_domains` gives the health of every monitored domain, `multipath_health` the maps
    with failed paths, both without I/O.  `vms` counts those that run, and those not paused.

    `version` is the agent's own, shown beside the release that it is compatible with.
    """

    def __init__(
        self,
        files: KernelFiles,
        clock: Clock,
        version: str,
        watched_paths: tuple[str, ...],
        storage_domains: Callable[[], Mapping[str, Any]],
        multipath_health: Callable[[], Mapping[str, Any]] = dict,
        vms: Callable[[], Mapping[str, int]] = dict,
    ) -> None:
        self._files = files
        self._clock = clock
        self._version = version
        self._watched = watched_paths
        self._storage_domains = storage_domains
        self._multipath_health = multipath_health
        self._vms = vms
        self._network = Network(files)
        self._meter = cpu.UsageMeter(files, clock)
        self._started = clock.monotonic()
        self._lock = threading.Lock()
        self._fixed: _Fixed | None = None

    def capabilities(self, peer: str = "") -> dict[str, Any]:
        """Everything an engine wants before it uses the host; `peer` is the engine's address."""
        fixed = self._known()
        nets = self._network.inventory()
        interface = network.interface_towards(peer) if peer else ""
        address = next(
            (nic["addr"] for kind in nets.values() for nic in kind.values() if nic["addr"]), ""
        )
        initiator = hardware.initiator_name(self._files)
        return {
            **self._identity(fixed),
            **self._processors(fixed.processors),
            **self._memory(),
            **nets,
            "nameservers": self._network.nameservers(),
            "netConfigDirty": "false",
            "supportsIPv6": self._files.exists("/proc/net/if_inet6"),
            "lastClientIface": interface,
            "HBAInventory": {
                "iSCSI": [{"InitiatorName": initiator}] if initiator else [],
                "FC": hardware.fibre_channel(self._files),
            },
            "ISCSIInitiatorName": initiator,
            "connector_info": hardware.connector(self._files, address),
            **self._virtualisation(fixed),
            **_storage(),
        }

    def hardware(self) -> dict[str, str]:
        return dict(self._known().hardware)

    def stats(self) -> dict[str, Any]:
        """What engines poll; no storage is touched."""
        usage = self._meter.usage()
        interfaces = self._network.counters(self._clock.time())
        load = float(self._files.text("/proc/loadavg", "0").split()[0])
        return {
            "storageDomains": dict(self._storage_domains()),
            "multipathHealth": dict(self._multipath_health()),
            **dict.fromkeys(VM_COUNTS, 0),
            **self._vms(),
            "cpuUser": _percent(usage.total.user),
            "cpuSys": _percent(usage.total.system),
            "cpuIdle": _percent(usage.total.idle),
            "cpuLoad": f"{load:.2f}",
            "cpuUserVdsmd": _percent(usage.own.user),
            "cpuSysVdsmd": _percent(usage.own.system),
            "cpuStatistics": self._each_processor(usage),
            **self._memory_use(),
            "network": interfaces,
            "rxDropped": str(sum(int(nic["rxDropped"]) for nic in interfaces.values())),
            "txDropped": str(sum(int(nic["txDropped"]) for nic in interfaces.values())),
            "netConfigDirty": "false",
            "diskStats": self._free_space(),
            "dateTime": time.strftime("%Y-%m-%dT%H:%M:%S GMT", time.gmtime(self._clock.time())),
            "elapsedTime": str(int(self._clock.monotonic() - self._started)),
            "bootTime": str(self._boot_time()),
            "momStatus": "inactive",
            "haScore": 0,
            "haStats": {
                "active": False,
                "configured": False,
                "score": 0,
                "localMaintenance": False,
                "globalMaintenance": False,
            },
        }

    # -- parts of the capabilities -----------------------------------------------------------

    def _known(self) -> _Fixed:
        with self._lock:
            if self._fixed is None:
                self._fixed = _Fixed(
                    processors=cpu.read_processors(self._files),
                    packages=hardware.packages(),
                    machines=hardware.machine_types(),
                    hardware=hardware.hardware(self._files),
                    system=hardware.operating_system(self._files),
                )
            return self._fixed

    def _identity(self, fixed: _Fixed) -> dict[str, Any]:
        own = {"version": COMPATIBLE, "release": f"storage.{self._version}"}
        return {
            "clusterLevels": list(CLUSTER_LEVELS),
            "supportedENGINEs": list(ENGINES),
            "software_version": COMPATIBLE,
            "software_revision": self._version,
            "version_name": "vdsm-storage",
            "build_name": f"vdsm-storage-{self._version}",
            "packages2": {**fixed.packages, "vdsm": own},
            "operatingSystem": fixed.system,
            "uuid": fixed.hardware.get("systemUUID", ""),
            "boot_uuid": self._files.text("/proc/sys/kernel/random/boot_id"),
            "bootTime": self._boot_time(),
            "kernelArgs": self._files.text("/proc/cmdline"),
            "selinux": {"mode": self._files.text("/sys/fs/selinux/enforce", "-1")},
            "fipsEnabled": self._files.number("/proc/sys/crypto/fips_enabled") == 1,
            "kdumpStatus": KDUMP_UNKNOWN,
            "additionalFeatures": [],
            "hooks": {},
        }

    def _processors(self, processors: cpu.Processors) -> dict[str, Any]:
        nodes = memory.numa_nodes(self._files)
        online = [place.cpu for place in processors.places]
        return {
            "cpuModel": processors.model,
            "cpuSpeed": f"{processors.speed:.3f}",
            "cpuFlags": ",".join([*processors.flags, *(f"model_{m}" for m in processors.models)]),
            "cpuCores": str(processors.cores),
            "cpuSockets": str(processors.sockets),
            "cpuThreads": str(len(online)),
            "onlineCpus": ",".join(str(number) for number in online),
            "cpuTopology": [
                {
                    "cpu_id": place.cpu,
                    "core_id": place.core,
                    "die_id": place.die,
                    "socket_id": place.socket,
                    "numa_cell_id": place.node,
                }
                for place in processors.places
            ],
            "vdsmToCpusAffinity": sorted(os.sched_getaffinity(0)),
            "numaNodes": {
                str(node): {"cpus": cpus, "totalMemory": str(info.get("MemTotal", 0) // 1024)}
                for node, (cpus, info) in nodes.items()
            },
            "numaNodeDistance": memory.node_distances(self._files),
            "autoNumaBalancing": self._files.number("/proc/sys/kernel/numa_balancing"),
        }

    def _memory(self) -> dict[str, Any]:
        total = memory.meminfo(self._files).get("MemTotal", 0)
        return {
            "memSize": str(total // 1024),
            "reservedMem": str(RESERVED_MEMORY),
            "guestOverhead": str(GUEST_OVERHEAD),
            "hugepages": memory.huge_page_sizes(self._files),
        }

    def _virtualisation(self, fixed: _Fixed) -> dict[str, Any]:
        nested = ("kvm_intel", "kvm_amd")
        allowed = [self._files.text(f"/sys/module/{name}/parameters/nested") for name in nested]
        return {
            "kvmEnabled": "true" if cpu.kvm_usable() else "false",
            "emulatedMachines": list(fixed.machines),
            "vmTypes": ["kvm"],
            "rngSources": ["random", "hwrng"] if self._files.exists("/dev/hwrng") else ["random"],
            "hostdevPassthrough": "false",
            "nestedVirtualization": any(value in ("1", "Y") for value in allowed),
            "realtimeKernel": self._files.text("/sys/kernel/realtime") == "1",
            "vncEncrypted": False,
            "ovnConfigured": False,
            "hostedEngineDeployed": self._files.exists(
                "/etc/ovirt-hosted-engine/hosted-engine.conf"
            ),
        }

    # -- parts of the statistics -------------------------------------------------------------

    def _each_processor(self, usage: cpu.Usage) -> dict[str, dict[str, Any]]:
        nodes = {place.cpu: place.node for place in self._known().processors.places}
        return {
            str(number): {
                "cpuUser": _percent(shares.user),
                "cpuSys": _percent(shares.system),
                "cpuIdle": _percent(shares.idle),
                "nodeIndex": nodes.get(number, 0),
            }
            for number, shares in usage.each.items()
        }

    def _memory_use(self) -> dict[str, Any]:
        info = memory.meminfo(self._files)
        total = max(1, info.get("MemTotal", 1))
        free = info.get("MemAvailable", info.get("MemFree", 0))
        nodes = memory.numa_nodes(self._files)
        return {
            "memFree": free // 1024,
            "memUsed": str(100 * (total - free) // total),
            "swapTotal": info.get("SwapTotal", 0) // 1024,
            "swapFree": info.get("SwapFree", 0) // 1024,
            "anonHugePages": str(info.get("AnonHugePages", 0) // 1024),
            "thpState": memory.transparent_huge_pages(self._files),
            "hugepages": memory.huge_pages(self._files),
            **memory.same_page_merging(self._files),
            "numaNodeMemFree": {
                str(node): {
                    "memFree": str(part.get("MemFree", 0) // 1024),
                    "memPercent": 100
                    - 100 * part.get("MemFree", 0) // max(1, part.get("MemTotal", 1)),
                }
                for node, (_, part) in nodes.items()
            },
        }

    def _free_space(self) -> dict[str, dict[str, str]]:
        """MiB that are free on the agent's own, local file systems."""
        found = {}
        for path in self._watched:
            try:
                room = os.statvfs(path)
            except OSError:
                continue
            found[path] = {"free": str(room.f_bavail * room.f_frsize // 1024**2)}
        return found

    def _boot_time(self) -> int:
        """Seconds since the epoch when the kernel started."""
        for line in self._files.text("/proc/stat").splitlines():
            if line.startswith("btime "):
                return int(line.split()[1])
        return 0


def _storage() -> dict[str, Any]:
    """What the storage side offers.  Live operations on guests are not built."""
    return {
        "domain_versions": list(DOMAIN_VERSIONS),
        "supported_block_size": {name: list(sizes) for name, sizes in BLOCK_SIZES.items()},
        "coldBackupEnabled": True,
        "clearBitmapsEnabled": True,
        "backupEnabled": False,
        "cd_change_pdiv": True,
        "liveSnapshot": "false",
        "liveMerge": "false",
        "measure_subchain": True,
    }


def _percent(value: float) -> str:
    return f"{value:.2f}"
