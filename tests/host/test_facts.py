# SPDX-License-Identifier: GPL-2.0-or-later
"""Host facts of this very machine, as the schema and an engine's readers want them."""

from __future__ import annotations

import re
import socket
import struct
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from functional.engine import replies
from vdsm_storage.base.clock import SystemClock
from vdsm_storage.host import cpu, hardware, memory, network
from vdsm_storage.host.facts import HostFacts
from vdsm_storage.host.kernel_files import KernelFiles, parse_list
from vdsm_storage.schema.loader import Schema
from vdsm_storage.schema.normalise import Checker

SD = "11111111-2222-4333-8444-555555555555"
HEALTH = {
    "code": 0,
    "lastCheck": "1.2",
    "delay": "0.0003",
    "valid": True,
    "acquired": True,
    "actual": True,
    "version": 5,
}


@pytest.fixture(scope="module")
def facts() -> HostFacts:
    return HostFacts(KernelFiles(), SystemClock(), "1.0", ("/", "/nowhere"), lambda: {SD: HEALTH})


def test_replies_fit_the_schema(facts: HostFacts) -> None:
    checker = Checker(Schema())
    for verb, reply in (
        ("Host.getCapabilities", facts.capabilities("127.0.0.1")),
        ("Host.getStats", facts.stats()),
        ("Host.getHardwareInfo", facts.hardware()),
    ):
        checker.check_reply(verb, reply)  # raises what is wrong


def test_an_engine_can_read_them(facts: HostFacts) -> None:
    capabilities = replies.capabilities(facts.capabilities())
    assert 5 in capabilities.domain_versions
    assert replies.host_stats(facts.stats())[SD].valid


def test_health_of_multipath_is_told() -> None:
    sick = {"360014050": {"valid_paths": 1, "failed_paths": ["8:16"]}}
    facts = HostFacts(KernelFiles(), SystemClock(), "1", ("/",), dict, lambda: sick)
    stats = facts.stats()
    assert stats["multipathHealth"] == sick
    Checker(Schema()).check_reply("Host.getStats", stats)


def test_they_tell_the_truth(facts: HostFacts) -> None:
    reply = facts.capabilities("127.0.0.1")
    assert reply["lastClientIface"] == "lo"
    assert int(reply["cpuThreads"]) == len(reply["onlineCpus"].split(","))
    total = int(re.search(r"MemTotal:\s+(\d+)", Path("/proc/meminfo").read_text())[1])  # type: ignore[index]
    assert int(reply["memSize"]) == total // 1024
    stats = facts.stats()
    assert set(stats["diskStats"]) == {"/"}
    assert stats["network"]["lo"]["state"] == "up"
    assert stats["vmCount"] == 0


def test_programs_run_once(facts: HostFacts, monkeypatch: pytest.MonkeyPatch) -> None:
    first = facts.capabilities()

    def refuse(*_: Any) -> None:
        raise AssertionError("a program was run again")

    monkeypatch.setattr(hardware, "run", refuse)
    again = facts.capabilities()
    assert again["packages2"] == first["packages2"]
    facts.stats()
    facts.hardware()


def test_the_interface_towards_nowhere_is_unknown() -> None:
    assert network.interface_towards("no address") == ""
    assert network.interface_towards("::1") == "lo"


# -- other machines ----------------------------------------------------------------------------


def tree(root: Path, files: dict[str, str]) -> KernelFiles:
    for name, text in files.items():
        path = root / name.lstrip("/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return KernelFiles(str(root))


def test_bridges_bonds_and_vlans(tmp_path: Path) -> None:
    net = "/sys/class/net"
    files = tree(
        tmp_path,
        {
            f"{net}/ovirtmgmt/bridge/stp_state": "0\n",
            f"{net}/ovirtmgmt/brif/bond0": "",
            f"{net}/ovirtmgmt/mtu": "9000\n",
            f"{net}/bond0/bonding/slaves": "ens1 ens2\n",
            f"{net}/bond0/bonding/active_slave": "ens1\n",
            f"{net}/bond0/bonding/mode": "active-backup 1\n",
            f"{net}/bond0/address": "52:54:00:00:00:01\n",
            f"{net}/ens1/device/vendor": "",
            f"{net}/ens1/address": "52:54:00:00:00:02\n",
            f"{net}/ens1/speed": "10000\n",
            f"{net}/ens1.7/mtu": "1500\n",
            "/proc/net/vlan/ens1.7": "ens1.7  VID: 7\t REORDER_HDR: 1\n\nDevice: ens1\n",
        },
    )
    found = network.Network(files).inventory()
    assert found["networks"]["ovirtmgmt"]["ports"] == ["bond0"]
    assert found["bridges"]["ovirtmgmt"]["mtu"] == "9000"
    assert found["bondings"]["bond0"]["slaves"] == ["ens1", "ens2"]
    assert found["bondings"]["bond0"]["opts"] == {"mode": "1"}
    assert found["nics"]["ens1"]["speed"] == 10000
    assert (found["vlans"]["ens1.7"]["vlanid"], found["vlans"]["ens1.7"]["iface"]) == (7, "ens1")


def test_adapters_and_firmware(tmp_path: Path) -> None:
    files = tree(
        tmp_path,
        {
            "/sys/class/fc_host/host4/port_name": "0x500143802426baf4\n",
            "/sys/class/fc_host/host4/node_name": "0x500143802426baf5\n",
            "/sys/class/fc_host/host4/symbolic_name": "QLE2672 FW:v8.05\n",
            "/etc/iscsi/initiatorname.iscsi": "# a comment\nInitiatorName=iqn.1994-05.a:b\n",
            "/sys/class/dmi/id/product_uuid": "4C4C4544-0038-5310-8051-B4C04F4B3132\n",
            "/sys/class/dmi/id/sys_vendor": "Vendor Inc.\n",
            "/etc/os-release": 'ID="centos"\nVERSION_ID="9.4"\nPRETTY_NAME="CentOS Stream 9"\n',
        },
    )
    assert hardware.initiator_name(files) == "iqn.1994-05.a:b"
    adapters = hardware.fibre_channel(files)
    assert adapters == [
        {"wwpn": "500143802426baf4", "wwnn": "500143802426baf5", "model": "QLE2672 FW:v8.05"}
    ]
    connector = hardware.connector(files, "192.0.2.1")
    assert connector["initiator"] == "iqn.1994-05.a:b"
    assert connector["wwpns"] == ["500143802426baf4"]
    known = hardware.hardware(files)
    assert known["systemUUID"] == "4c4c4544-0038-5310-8051-b4c04f4b3132"
    assert known["systemManufacturer"] == "Vendor Inc."
    system = hardware.operating_system(files)
    assert (system["name"], system["version"], system["release"]) == ("RHEL", "9", "4")


def test_a_host_without_any_id_gets_a_lasting_one(tmp_path: Path) -> None:
    files = tree(tmp_path, {"/etc/machine-id": "", "/sys/class/net/eth0/address": "52:54:00:1"})
    first = hardware.hardware(files)["systemUUID"]
    assert re.fullmatch(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", first)
    assert hardware.host_uuid(files) == first


def test_cpu_models_need_their_features_and_vendor(tmp_path: Path) -> None:
    base = "/usr/share/libvirt/cpu_map"
    model = '<cpus><model name="{}"><vendor name="{}"/><feature name="sse4.2"/>{}</model></cpus>'
    files = tree(
        tmp_path,
        {
            f"{base}/x86_Old.xml": model.format("Old", "Intel", ""),
            f"{base}/x86_New.xml": model.format("New", "Intel", '<feature name="amx"/>'),
            f"{base}/x86_Other.xml": model.format("Other", "AMD", ""),
        },
    )
    models = cpu.usable_models(files, "GenuineIntel", frozenset(["sse4_2"]))
    assert models == ("Old",)


def test_usage_between_two_looks(tmp_path: Path) -> None:
    class Clock(SystemClock):
        now = 0.0

        def monotonic(self) -> float:
            return self.now

    clock = Clock()
    files = tree(tmp_path, {"/proc/stat": "cpu 100 0 100 800 0 0 0 0\ncpu0 100 0 100 800 0 0 0 0"})
    meter = cpu.UsageMeter(files, clock)
    meter.usage()
    tree(tmp_path, {"/proc/stat": "cpu 150 0 125 825 0 0 0 0\ncpu0 150 0 125 825 0 0 0 0"})
    clock.now = 5.0
    usage = meter.usage()
    assert (usage.total.user, usage.total.system, usage.total.idle) == (50.0, 25.0, 25.0)
    assert usage.each[0] == usage.total


def test_package_queries() -> None:
    debian = (
        "qemu-utils 1:7.2+dfsg-7+deb12u18 installed\n"
        "libvirt0 9.0.0-4 not-installed\n"
        "mom 1 installed\n"
    )
    assert hardware.parse_debian(debian) == {
        "qemu-utils": {"version": "7.2+dfsg", "release": "7+deb12u18"},
        "mom": {"version": "1", "release": "1"},
    }
    rpm = "qemu-img 8.2.0 11.el9\npackage mom is not installed\n"
    assert hardware.parse_rpm(rpm) == {"qemu-img": {"version": "8.2.0", "release": "11.el9"}}


def test_machine_types() -> None:
    text = "Supported machines are:\npc   Standard PC (alias of q)\nnone  empty machine\n"
    assert hardware.parse_machines(text) == ["pc"]


def test_numa_nodes(tmp_path: Path) -> None:
    files = tree(
        tmp_path,
        {
            "/sys/devices/system/cpu/online": "0-2",
            "/sys/devices/system/node/node0/cpulist": "0-1,3",
            "/sys/devices/system/node/node0/meminfo": (
                "Node 0 MemTotal:  2048 kB\nNode 0 MemFree: 1 kB"
            ),
            "/sys/devices/system/node/node0/distance": "10 20",
        },
    )
    assert memory.numa_nodes(files) == {0: ([0, 1], {"MemTotal": 2048, "MemFree": 1})}
    assert memory.node_distances(files) == {"0": [10, 20]}


@given(st.lists(st.integers(0, 300), unique=True).map(sorted))
def test_lists_of_numbers(numbers: list[int]) -> None:
    assert parse_list(",".join(str(number) for number in numbers)) == numbers


@given(st.binary(max_size=200))
def test_netlink_bytes_never_break_the_parsers(data: bytes) -> None:
    bodies = [body for _, body in network.split_messages(data)]
    assert sum(map(len, bodies)) <= len(data)
    assert sum(map(len, network.parse_attributes(data).values())) <= len(data)


def test_netlink_attributes() -> None:
    body = struct.pack("=HH", 8, network.IFA_LOCAL) + socket.inet_aton("192.0.2.7")
    assert network.parse_attributes(body) == {network.IFA_LOCAL: socket.inet_aton("192.0.2.7")}
