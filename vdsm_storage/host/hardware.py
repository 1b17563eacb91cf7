# SPDX-License-Identifier: GPL-2.0-or-later
"""What the machine and its software are: firmware tables, HBAs, packages, QEMU's machine types."""

from __future__ import annotations

import os
import re
import shutil
import uuid

from vdsm_storage.base.run import Command, run
from vdsm_storage.errors import AgentError
from vdsm_storage.host.kernel_files import KernelFiles, parse_fields

DMI = "/sys/class/dmi/id"
FC_HOSTS = "/sys/class/fc_host"
TIMEOUT = 20.0  # seconds for one query of the package database or of QEMU
# Wire name -> the distributions' package names, the first installed one counts.
PACKAGES = (
    ("qemu-kvm", ("qemu-kvm-core", "qemu-kvm", "qemu-system-x86")),
    ("qemu-img", ("qemu-img", "qemu-utils")),
    ("libvirt", ("libvirt-daemon", "libvirt0", "libvirt-libs")),
    ("librbd1", ("librbd1",)),
    ("spice-server", ("spice-server", "libspice-server1")),
    ("glusterfs-cli", ("glusterfs-cli",)),
    ("mom", ("mom",)),
)
QEMU_BINARIES = ("/usr/libexec/qemu-kvm", "/usr/bin/qemu-kvm", "/usr/bin/qemu-system-x86_64")
OS_FAMILIES = (
    ("debian", "Debian"),
    ("ubuntu", "Debian"),
    ("fedora", "Fedora"),
    ("rhel", "RHEL"),
    ("centos", "RHEL"),
)


def host_uuid(files: KernelFiles) -> str:
    """What an administrator wrote to /etc/vdsm/vdsm.id, the firmware's UUID, or the machine id.

    A host without any of them gets one that is made of its name and its network adapters.
    """
    candidates = (
        files.text("/etc/vdsm/vdsm.id"),
        files.text(f"{DMI}/product_uuid"),
        files.text("/etc/machine-id"),
    )
    for text in candidates:
        digits = text.lower().replace("-", "")
        if re.fullmatch(r"[0-9a-f]{32}", digits) and len(set(digits)) > 1:
            parts = (digits[:8], digits[8:12], digits[12:16], digits[16:20], digits[20:])
            return "-".join(parts)
    net = "/sys/class/net"
    adapters = sorted(files.text(f"{net}/{name}/address") for name in files.names(net))
    return str(uuid.uuid5(uuid.NAMESPACE_OID, " ".join([os.uname().nodename, *adapters])))


def hardware(files: KernelFiles) -> dict[str, str]:
    """The firmware's names; a key is left out where there is nothing to say."""
    names = (
        ("systemManufacturer", "sys_vendor"),
        ("systemProductName", "product_name"),
        ("systemVersion", "product_version"),
        ("systemSerialNumber", "product_serial"),
        ("systemFamily", "product_family"),
    )
    found = {key: files.text(f"{DMI}/{name}") for key, name in names}
    found["systemUUID"] = host_uuid(files)
    return {key: value for key, value in found.items() if value}


def initiator_name(files: KernelFiles) -> str:
    """The iSCSI initiator's IQN, or ""."""
    text = files.text("/etc/iscsi/initiatorname.iscsi")
    return parse_fields(text, "=").get("InitiatorName", "")


def fibre_channel(files: KernelFiles) -> list[dict[str, str]]:
    """The host bus adapters; WWNs as 16 hexadecimal digits."""
    found = []
    for name in files.names(FC_HOSTS):
        base = f"{FC_HOSTS}/{name}"
        model = files.text(f"{base}/symbolic_name") or files.text(f"{base}/device/model_name")
        found.append(
            {
                "wwpn": files.text(f"{base}/port_name").removeprefix("0x"),
                "wwnn": files.text(f"{base}/node_name").removeprefix("0x"),
                "model": model,
            }
        )
    return found


def operating_system(files: KernelFiles) -> dict[str, str]:
    text = files.text("/etc/os-release") or files.text("/usr/lib/os-release")
    release = {key: value.strip("\"'") for key, value in parse_fields(text, "=").items()}
    ids = [release.get("ID", ""), *release.get("ID_LIKE", "").split()]
    family = next((name for key, name in OS_FAMILIES if key in ids), "unknown")
    if release.get("VARIANT_ID") == "ovirt-node":
        family = "oVirt Node"
    version, _, minor = release.get("VERSION_ID", "").partition(".")
    return {
        "name": family,
        "version": version,
        "release": minor,
        "pretty_name": release.get("PRETTY_NAME", ""),
    }


def connector(files: KernelFiles, address: str) -> dict[str, object]:
    """What a volume service needs to attach a volume here, with os-brick's names."""
    found: dict[str, object] = {
        "platform": os.uname().machine,
        "os_type": "linux",
        "ip": address,
        "host": os.uname().nodename,
        "multipath": files.exists("/run/multipathd.pid") or files.exists("/run/multipathd.socket"),
        "do_local_attach": False,
        "system uuid": host_uuid(files),
    }
    if initiator := initiator_name(files):
        found["initiator"] = initiator
    if nqn := files.text("/etc/nvme/hostnqn"):
        found["nqn"] = nqn
    if adapters := fibre_channel(files):
        found["wwpns"] = [hba["wwpn"] for hba in adapters]
        found["wwnns"] = [hba["wwnn"] for hba in adapters]
    return found


# -- what needs a program (asked once) ---------------------------------------------------------


def packages() -> dict[str, dict[str, str]]:
    """Installed versions of what engines look at; one query of the package database."""
    versions = _debian_versions() if shutil.which("dpkg-query") else {}
    if not versions and shutil.which("rpm"):
        versions = _rpm_versions()
    found = {
        key: versions[next(name for name in names if name in versions)]
        for key, names in PACKAGES
        if any(name in versions for name in names)
    }
    version, _, release = os.uname().release.partition("-")
    found["kernel"] = {"version": version, "release": release}
    return found


def _wanted() -> list[str]:
    return [name for _, names in PACKAGES for name in names]


def _debian_versions() -> dict[str, dict[str, str]]:
    form = "${Package} ${Version} ${db:Status-Status}\n"
    # Exit code 1: some of the names are not known here.
    command = Command(["dpkg-query", "-W", "-f", form, *_wanted()], timeout=TIMEOUT, ok=(0, 1))
    try:
        return parse_debian(run(command).stdout.decode())
    except AgentError:
        return {}


def parse_debian(text: str) -> dict[str, dict[str, str]]:
    """Lines such as `qemu-utils 1:7.2+dfsg-7+deb12u18 installed`."""
    found = {}
    for line in text.splitlines():
        words = line.split()
        if len(words) == 3 and words[2] == "installed":
            version, _, release = words[1].partition(":")[2 if ":" in words[1] else 0].rpartition(
                "-"
            )
            found[words[0]] = {"version": version or release, "release": release}
    return found


def _rpm_versions() -> dict[str, dict[str, str]]:
    form = "%{NAME} %{VERSION} %{RELEASE}\n"
    # The exit code counts the names that are not installed.
    command = Command(
        ["rpm", "-q", "--queryformat", form, *_wanted()], timeout=TIMEOUT, ok=range(100)
    )
    try:
        return parse_rpm(run(command).stdout.decode())
    except AgentError:
        return {}


def parse_rpm(text: str) -> dict[str, dict[str, str]]:
    """Lines such as `qemu-img 7.2.0 14.el9`; others say that a package is not installed."""
    words = [line.split() for line in text.splitlines()]
    return {
        word[0]: {"version": word[1], "release": word[2]}
        for word in words
        if len(word) == 3 and word[0] in _wanted()
    }


def machine_types() -> list[str]:
    """QEMU's machine types, from the binary itself; [] where no QEMU is installed."""
    binary = next((name for name in QEMU_BINARIES if os.access(name, os.X_OK)), None)
    if binary is None:
        return []
    try:
        result = run(Command([binary, "-machine", "help"], timeout=TIMEOUT))
    except AgentError:
        return []
    return parse_machines(result.stdout.decode())


def parse_machines(text: str) -> list[str]:
    """From `qemu-system-x86_64 -machine help`:

    Supported machines are:
    pc                   Standard PC (i440FX + PIIX, 1996) (alias of pc-i440fx-7.2)
    pc-i440fx-7.2        Standard PC (i440FX + PIIX, 1996) (default)
    none                 empty machine
    """
    names = [line.split()[0] for line in text.splitlines()[1:] if line.split()]
    return sorted(name for name in names if name != "none")


