# SPDX-License-Identifier: GPL-2.0-or-later
"""Network interfaces, as far as an engine wants to know them.  The agent configures none.

Names and counters come from /sys/class/net, addresses and routes from one netlink dump each.
"""

from __future__ import annotations

import ipaddress
import socket
import struct
from dataclasses import dataclass, field
from typing import Any

from vdsm_storage.host.kernel_files import KernelFiles

NET = "/sys/class/net"
# linux/rtnetlink.h, linux/netlink.h
RTM_GETADDR = 22
RTM_GETROUTE = 26
NLM_F_DUMP_REQUEST = 0x301
NLMSG_ERROR = 2
NLMSG_DONE = 3
IFA_ADDRESS = 1
IFA_LOCAL = 2
RTA_OIF = 4
RTA_GATEWAY = 5
MAIN_TABLE = 254
HEADER = struct.Struct("=IHHII")
ATTRIBUTE = struct.Struct("=HH")
RECEIVE = 256 * 1024
TIMEOUT = 2.0  # seconds; the kernel answers at once


@dataclass
class Addresses:
    """`v4` and `v6` as address/prefix; the gateways of the default routes or ""."""

    v4: list[str] = field(default_factory=list)
    v6: list[str] = field(default_factory=list)
    gateway4: str = ""
    gateway6: str = ""


def addresses() -> dict[str, Addresses]:
    """By interface name."""
    found: dict[str, Addresses] = {}
    names = dict(socket.if_nameindex())
    for body in _dump(RTM_GETADDR):
        family, prefix, _, _, index = struct.unpack_from("=BBBBI", body)
        attributes = parse_attributes(body[8:])
        raw = attributes.get(IFA_LOCAL) or attributes.get(IFA_ADDRESS)
        if raw is None or index not in names:
            continue
        entry = found.setdefault(names[index], Addresses())
        target = entry.v6 if family == socket.AF_INET6 else entry.v4
        target.append(f"{ipaddress.ip_address(raw)}/{prefix}")
    for body in _dump(RTM_GETROUTE):
        family, to_length, _, _, table = struct.unpack_from("=BBBBB", body)
        attributes = parse_attributes(body[12:])
        if to_length or table != MAIN_TABLE or RTA_OIF not in attributes:
            continue
        name = names.get(struct.unpack("=I", attributes[RTA_OIF])[0], "")
        gateway = attributes.get(RTA_GATEWAY)
        entry = found.setdefault(name, Addresses())
        if gateway and family == socket.AF_INET6:
            entry.gateway6 = entry.gateway6 or str(ipaddress.ip_address(gateway))
        elif gateway:
            entry.gateway4 = entry.gateway4 or str(ipaddress.ip_address(gateway))
    return found


def _dump(kind: int) -> list[bytes]:
    """The bodies of all answers to one netlink dump request; [] where netlink is refused."""
    bodies: list[bytes] = []
    try:
        with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE) as netlink:
            netlink.settimeout(TIMEOUT)
            length = HEADER.size + 16
            request = HEADER.pack(length, kind, NLM_F_DUMP_REQUEST, 1, 0) + bytes(16)
            netlink.send(request)
            while True:
                for message, body in split_messages(netlink.recv(RECEIVE)):
                    if message in (NLMSG_DONE, NLMSG_ERROR):
                        return bodies
                    bodies.append(body)
    except OSError:
        return bodies


def split_messages(data: bytes) -> list[tuple[int, bytes]]:
    """(type, body) of each netlink message in one datagram."""
    found = []
    while len(data) >= HEADER.size:
        length, kind, _, _, _ = HEADER.unpack_from(data)
        if length < HEADER.size:
            break
        found.append((kind, data[HEADER.size : length]))
        data = data[-(-length // 4) * 4 :]
    return found


def parse_attributes(data: bytes) -> dict[int, bytes]:
    """Type -> value of the attributes behind a message's fixed part."""
    found: dict[int, bytes] = {}
    while len(data) >= ATTRIBUTE.size:
        length, kind = ATTRIBUTE.unpack_from(data)
        if length < ATTRIBUTE.size:
            break
        found.setdefault(kind, data[ATTRIBUTE.size : length])
        data = data[-(-length // 4) * 4 :]
    return found


class Network:
    """The inventory and the counters of the host's interfaces."""

    def __init__(self, files: KernelFiles) -> None:
        self._files = files

    def inventory(self) -> dict[str, dict[str, Any]]:
        """nics, bridges, bondings, vlans; each bridge is also offered as a network."""
        known = addresses()
        found: dict[str, dict[str, Any]] = {
            kind: {} for kind in ("nics", "bridges", "bondings", "vlans", "networks")
        }
        for name in self._files.names(NET):
            base = self._base(name, known.get(name, Addresses()))
            if self._files.exists(f"{NET}/{name}/bridge"):
                found["bridges"][name] = self._bridge(name, base)
                found["networks"][name] = {
                    **found["bridges"][name],
                    "bridged": True,
                    "iface": name,
                    "switch": "legacy",
                }
            elif self._files.exists(f"{NET}/{name}/bonding"):
                found["bondings"][name] = self._bond(name, base)
            elif vlan := self._files.text(f"/proc/net/vlan/{name}"):
                found["vlans"][name] = _vlan(vlan, base)
            elif self._files.exists(f"{NET}/{name}/device"):
                found["nics"][name] = {
                    **base,
                    "hwaddr": self._files.text(f"{NET}/{name}/address"),
                    "speed": self._speed(name),
                }
        return found

    def counters(self, now: float) -> dict[str, dict[str, Any]]:
        """Bytes and errors of each interface; `now` is the sample's time."""
        found = {}
        for name in self._files.names(NET):
            statistics = f"{NET}/{name}/statistics"
            if not self._files.exists(statistics):
                continue

            def count(what: str, where: str = statistics) -> str:
                return str(self._files.number(f"{where}/{what}"))

            found[name] = {
                "name": name,
                "state": self._state(name),
                "speed": str(self._speed(name) or 1000),
                "rx": count("rx_bytes"),
                "tx": count("tx_bytes"),
                "rxErrors": count("rx_errors"),
                "txErrors": count("tx_errors"),
                "rxDropped": count("rx_dropped"),
                "txDropped": count("tx_dropped"),
                "sampleTime": float(now),
            }
        return found

    def nameservers(self) -> list[str]:
        lines = self._files.text("/etc/resolv.conf").splitlines()
        words = [line.split() for line in lines]
        return [word[1] for word in words if len(word) > 1 and word[0] == "nameserver"]

    def _base(self, name: str, known: Addresses) -> dict[str, Any]:
        first = ipaddress.ip_interface(known.v4[0]) if known.v4 else None
        return {
            "addr": str(first.ip) if first else "",
            "netmask": str(first.netmask) if first else "",
            "ipv4addrs": known.v4,
            "ipv6addrs": known.v6,
            "gateway": known.gateway4,
            "ipv6gateway": known.gateway6 or "::",
            "ipv4defaultroute": bool(known.gateway4),
            "dhcpv4": False,
            "dhcpv6": False,
            "ipv6autoconf": self._files.number(f"/proc/sys/net/ipv6/conf/{name}/autoconf") == 1,
            "mtu": str(self._files.number(f"{NET}/{name}/mtu", 1500)),
        }

    def _bridge(self, name: str, base: dict[str, Any]) -> dict[str, Any]:
        options = f"{NET}/{name}/bridge"
        return {
            **base,
            "ports": self._files.names(f"{NET}/{name}/brif"),
            "stp": "on" if self._files.number(f"{options}/stp_state") else "off",
            "opts": {
                option: self._files.text(f"{options}/{option}")
                for option in self._files.names(options)
                if option not in ("flush", "brforward")
            },
        }

    def _bond(self, name: str, base: dict[str, Any]) -> dict[str, Any]:
        options = f"{NET}/{name}/bonding"
        return {
            **base,
            "hwaddr": self._files.text(f"{NET}/{name}/address"),
            "slaves": self._files.text(f"{options}/slaves").split(),
            "active_slave": self._files.text(f"{options}/active_slave"),
            "opts": {"mode": (self._files.text(f"{options}/mode").split() or [""])[-1]},
            "switch": "legacy",
        }

    def _state(self, name: str) -> str:
        state = self._files.text(f"{NET}/{name}/operstate")
        if state in ("up", "down"):
            return state
        # Loopback and tunnels say "unknown"; a carrier tells whether they carry.
        return "up" if self._files.text(f"{NET}/{name}/carrier") == "1" else "down"

    def _speed(self, name: str) -> int:
        """Mbit/s; 0 where the driver does not tell."""
        return max(0, self._files.number(f"{NET}/{name}/speed"))


def _vlan(text: str, base: dict[str, Any]) -> dict[str, Any]:
    """From /proc/net/vlan/NAME:

    eth0.5  VID: 5  REORDER_HDR: 1  dev->priv_flags: 1
    ...
    Device: eth0
    """
    words = text.split()
    tag = words[words.index("VID:") + 1] if "VID:" in words else "0"
    device = words[words.index("Device:") + 1] if "Device:" in words else ""
    return {**base, "mtu": int(base["mtu"]), "vlanid": int(tag), "iface": device}


def interface_towards(peer: str) -> str:
    """The interface that packets to the address `peer` leave by; "" if nobody knows."""
    try:
        info = socket.getaddrinfo(peer, 9, type=socket.SOCK_DGRAM, flags=socket.AI_NUMERICHOST)
        family, kind, protocol, _, target = info[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.connect(target)  # sends nothing: it only picks the route
            own = probe.getsockname()[0].partition("%")[0]
    except OSError:
        return ""
    for name, known in addresses().items():
        if any(address.partition("/")[0] == own for address in known.v4 + known.v6):
            return name
    return ""
