# SPDX-License-Identifier: GPL-2.0-or-later
"""The host's processors: what they are, and how busy they were since the last look."""

from __future__ import annotations

import fcntl
import os
import threading
import xml.etree.ElementTree as ET  # files of an installed package, not input
from dataclasses import dataclass

from vdsm_storage.base.clock import Clock
from vdsm_storage.host.kernel_files import KernelFiles, parse_fields, parse_list

KVM_GET_API_VERSION = 0xAE00  # linux/kvm.h
KVM_API_VERSION = 12
CPU = "/sys/devices/system/cpu"
CPU_MAP = "/usr/share/libvirt/cpu_map"
# /proc/cpuinfo's names of features that libvirt's cpu_map calls otherwise.
LIBVIRT_NAMES = (
    ("pclmulqdq", "pclmuldq"),
    ("sse4_1", "sse4.1"),
    ("sse4_2", "sse4.2"),
    ("tsc_deadline_timer", "tsc-deadline"),
    ("nonstop_tsc", "invtsc"),
    ("fxsr_opt", "fxsr_opt"),
    ("mmxext", "mmxext"),
    ("avx512_vbmi2", "avx512vbmi2"),
    ("avx512_vnni", "avx512vnni"),
    ("avx512_bitalg", "avx512bitalg"),
    ("avx512_vpopcntdq", "avx512-vpopcntdq"),
    ("avx512_bf16", "avx512-bf16"),
    ("sha_ni", "sha-ni"),
    ("arch_capabilities", "arch-capabilities"),
    ("pni", "sse3"),
)


def kvm_usable(path: str = "/dev/kvm") -> bool:
    """True if the device opens and answers with the one API version that there is."""
    try:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        return fcntl.ioctl(fd, KVM_GET_API_VERSION, 0) == KVM_API_VERSION
    except OSError:
        return False
    finally:
        os.close(fd)


@dataclass(frozen=True)
class Place:
    """Where one logical processor sits."""

    cpu: int
    core: int
    socket: int
    die: int
    node: int


@dataclass(frozen=True)
class Processors:
    """`speed` in MHz; `models` are the CPU models of libvirt's map that this host can be."""

    model: str
    speed: float
    flags: tuple[str, ...]
    models: tuple[str, ...]
    places: tuple[Place, ...]

    @property
    def sockets(self) -> int:
        return len({place.socket for place in self.places}) or 1

    @property
    def cores(self) -> int:
        return len({(p.socket, p.die, p.core) for p in self.places}) or 1


def read_processors(files: KernelFiles) -> Processors:
    info = parse_fields(files.text("/proc/cpuinfo"))
    flags = tuple(info.get("flags", info.get("Features", "")).split())
    speed = info.get("cpu MHz", "")
    top = files.number(f"{CPU}/cpu0/cpufreq/cpuinfo_max_freq") / 1000
    return Processors(
        model=info.get("model name", ""),
        speed=top or (float(speed) if speed else 0.0),
        flags=flags,
        models=usable_models(files, info.get("vendor_id", ""), frozenset(flags)),
        places=tuple(_place(files, cpu) for cpu in online(files)),
    )


def online(files: KernelFiles) -> list[int]:
    return parse_list(files.text(f"{CPU}/online", "0"))


def _place(files: KernelFiles, cpu: int) -> Place:
    topology = f"{CPU}/cpu{cpu}/topology"
    nodes = [n for n in files.names(f"{CPU}/cpu{cpu}") if n.startswith("node") and n[4:].isdigit()]
    return Place(
        cpu=cpu,
        core=files.number(f"{topology}/core_id"),
        socket=files.number(f"{topology}/physical_package_id"),
        die=max(0, files.number(f"{topology}/die_id")),
        node=int(nodes[0][4:]) if nodes else 0,
    )


def usable_models(files: KernelFiles, vendor: str, flags: frozenset[str]) -> tuple[str, ...]:
    """Models of libvirt's cpu_map whose features this host has, and whose vendor is this one's.

    Engines compare `model_NAME` in the flags with the cluster's CPU type.  [] without the map.
    """
    have = flags | {new for old, new in LIBVIRT_NAMES if old in flags}
    found = []
    for name in files.names(CPU_MAP):
        if not name.startswith("x86_") or name in ("x86_features.xml", "x86_vendors.xml"):
            continue
        try:
            models = ET.fromstring(files.text(f"{CPU_MAP}/{name}")).findall("model")  # noqa: S314
        except ET.ParseError:
            continue
        for model in models:
            made_by = model.find("vendor")
            if made_by is not None and _vendor(made_by.get("name", "")) != vendor:
                continue
            features = {
                feature.get("name", "")
                for feature in model.findall("feature")
                if feature.get("removed") != "yes"
            }
            if features and features <= have:
                found.append(model.get("name", ""))
    return tuple(sorted(found))


def _vendor(name: str) -> str:
    known = {"Intel": "GenuineIntel", "AMD": "AuthenticAMD", "Hygon": "HygonGenuine"}
    return known.get(name, name)


@dataclass(frozen=True)
class Shares:
    """How time was spent, in percent."""

    user: float = 0.0
    system: float = 0.0
    idle: float = 100.0


@dataclass(frozen=True)
class Usage:
    """Percent of all processors, of each one, and of one processor by this process."""

    total: Shares
    each: dict[int, Shares]
    own: Shares


class UsageMeter:
    """Measures between two looks; looks that follow each other quickly get the same answer."""

    FRESH = 1.0  # seconds

    def __init__(self, files: KernelFiles, clock: Clock) -> None:
        self._files = files
        self._clock = clock
        self._lock = threading.Lock()
        self._taken = float("-inf")
        self._before: dict[str, list[int]] = {}
        self._own_before = (0.0, 0.0, 0.0)
        self._usage = Usage(Shares(), {}, Shares(0.0, 0.0, 100.0))

    def usage(self) -> Usage:
        with self._lock:
            now = self._clock.monotonic()
            if now - self._taken >= self.FRESH:
                self._usage = self._measure(now)
                self._taken = now
            return self._usage

    def _measure(self, now: float) -> Usage:
        after = parse_stat(self._files.text("/proc/stat"))
        shares = {
            name: _shares(self._before.get(name, [0] * len(ticks)), ticks)
            for name, ticks in after.items()
        }
        own = os.times()
        user, system, then = self._own_before
        passed = max(0.001, now - then)
        mine = Shares(
            100.0 * (own.user - user) / passed, 100.0 * (own.system - system) / passed, 0.0
        )
        first = not self._before
        self._before = after
        self._own_before = (own.user, own.system, now)
        each = {int(name[3:]): share for name, share in shares.items() if name != "cpu"}
        return Usage(shares.get("cpu", Shares()), each, Shares() if first else mine)


def parse_stat(text: str) -> dict[str, list[int]]:
    """The processors' lines of /proc/stat: user, nice, system, idle, iowait, irq, softirq, steal.

        cpu  2255 34 2290 22625563 6290 127 456 0 0 0
        cpu0 1132 34 1441 11311718 3675 127 438 0 0 0
    """
    found = {}
    for line in text.splitlines():
        name, *ticks = line.split()
        if name.startswith("cpu"):
            found[name] = [int(tick) for tick in ticks[:8]]
    return found


def _shares(before: list[int], after: list[int]) -> Shares:
    spent = [max(0, new - old) for old, new in zip(before, after, strict=False)]
    total = sum(spent)
    if len(spent) < 5 or not total:
        return Shares()
    return Shares(
        user=100.0 * (spent[0] + spent[1]) / total,
        system=100.0 * (total - spent[0] - spent[1] - spent[3] - spent[4]) / total,
        idle=100.0 * (spent[3] + spent[4]) / total,
    )
