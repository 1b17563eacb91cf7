# SPDX-License-Identifier: GPL-2.0-or-later
"""The host's memory: totals, use, huge pages, NUMA nodes, same-page merging."""

from __future__ import annotations

import re
from typing import Any

from vdsm_storage.host.kernel_files import KernelFiles, parse_fields, parse_list

NODES = "/sys/devices/system/node"
HUGE_PAGES = "/sys/kernel/mm/hugepages"
KSM = "/sys/kernel/mm/ksm"


def meminfo(files: KernelFiles) -> dict[str, int]:
    """/proc/meminfo in KiB, by its own names."""
    fields = parse_fields(files.text("/proc/meminfo"))
    return {name: int(value.split()[0]) for name, value in fields.items() if value}


def huge_page_sizes(files: KernelFiles) -> list[int]:
    """Sizes in KiB that the kernel offers."""
    names = files.names(HUGE_PAGES)
    return sorted(int(m.group(1)) for n in names if (m := re.fullmatch(r"hugepages-(\d+)kB", n)))


def huge_pages(files: KernelFiles) -> dict[str, dict[str, Any]]:
    """Pages of each size (KiB, a string as JSON wants it)."""
    found = {}
    for size in huge_page_sizes(files):
        base = f"{HUGE_PAGES}/hugepages-{size}kB"
        total = files.number(f"{base}/nr_hugepages")
        free = files.number(f"{base}/free_hugepages")
        found[str(size)] = {
            "nr_hugepages": total,
            "nr_overcommit_hugepages": files.number(f"{base}/nr_overcommit_hugepages"),
            "free_hugepages": free,
            "resv_hugepages": files.number(f"{base}/resv_hugepages"),
            "surplus_hugepages": files.number(f"{base}/surplus_hugepages"),
            "vm.free_hugepages": free,
        }
    return found


def numa_nodes(files: KernelFiles) -> dict[int, tuple[list[int], dict[str, int]]]:
    """Node -> (its online processors, its meminfo in KiB).  {} on a kernel without NUMA."""
    online = set(parse_list(files.text("/sys/devices/system/cpu/online", "0")))
    found = {}
    for name in files.names(NODES):
        if not re.fullmatch(r"node\d+", name):
            continue
        cpus = [c for c in parse_list(files.text(f"{NODES}/{name}/cpulist")) if c in online]
        found[int(name[4:])] = (cpus, parse_node(files.text(f"{NODES}/{name}/meminfo")))
    return found


def parse_node(text: str) -> dict[str, int]:
    """A node's meminfo in KiB: lines such as `Node 0 MemTotal:  24684084 kB`."""
    found = {}
    for line in text.splitlines():
        words = line.split()
        if len(words) >= 4 and words[0] == "Node":
            found[words[2].rstrip(":")] = int(words[3])
    return found


def node_distances(files: KernelFiles) -> dict[str, list[int]]:
    """Node -> its distance to each node."""
    return {
        str(node): [int(word) for word in files.text(f"{NODES}/node{node}/distance").split()]
        for node in numa_nodes(files)
    }


def transparent_huge_pages(files: KernelFiles) -> str:
    """always, madvise or never: the word in brackets of `always [madvise] never`."""
    text = files.text("/sys/kernel/mm/transparent_hugepage/enabled")
    chosen = re.search(r"\[(\w+)\]", text)
    return chosen.group(1) if chosen else "never"


def same_page_merging(files: KernelFiles) -> dict[str, Any]:
    return {
        "ksmState": files.number(f"{KSM}/run") == 1,
        "ksmPages": files.number(f"{KSM}/pages_to_scan"),
        "ksmMergeAcrossNodes": files.number(f"{KSM}/merge_across_nodes", 1) == 1,
        "ksmCpu": 0 if files.number(f"{KSM}/run") != 1 else _ksmd_cpu(files),
        "memShared": files.number(f"{KSM}/pages_sharing") * 4096 // 1024**2,
    }


def _ksmd_cpu(files: KernelFiles) -> int:
    """ksmd's share of one processor in percent since it was started."""
    uptime = float(files.text("/proc/uptime", "0 0").split()[0])
    for name in files.names("/proc"):
        if name.isdigit() and files.text(f"/proc/{name}/comm") == "ksmd":
            words = files.text(f"/proc/{name}/stat").rpartition(")")[2].split()
            alive = uptime - int(words[19]) / 100
            return int((int(words[11]) + int(words[12])) / max(1.0, alive))
    return 0
