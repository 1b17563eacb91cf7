# SPDX-License-Identifier: GPL-2.0-or-later
"""The guest's root file system and kernel, from the packages of the distribution that runs here.

`build(directory)` makes, in an empty directory:

    root.img    ext4 with the packages below; guests never write it
    vmlinux     the bare kernel, which boots by PVH without unpacking itself (10 s under emulation)
    busybox     for the initial RAM disk
    modules/    the kernel modules that lead to the root file system, in the order of modules/order

The package sources are those that apt uses on this machine; only Debian and what it signs.
"""

from __future__ import annotations

import lzma
import os
import shutil
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path

from functional.lab.errors import BuildError

PACKAGES = (
    "linux-image-amd64",
    "udev",
    "kmod",
    "busybox-static",
    "util-linux",
    "mount",
    "procps",
    "psmisc",
    "iproute2",
    "e2fsprogs",
    "xfsprogs",
    "lvm2",
    "dmsetup",
    "multipath-tools",
    "open-iscsi",
    "sg3-utils",
    "sanlock",
    "qemu-utils",
    "openssl",
    # Running VMs; their guests are emulated twice, see functional/guests/writer.py.
    "libvirt-daemon",
    "libvirt-daemon-driver-qemu",
    "qemu-system-x86",
    # The agent and the tests run from the tree's .venv and from what this machine has in
    # dist-packages (guest.py); here is what needs libraries.
    "python3",
    "python3-yaml",
    "python3-sanlock",
    "python3-libvirt",
)
# What the initial RAM disk loads; the rest is loaded from the root file system.
BOOT_MODULES = ("virtio_pci", "virtio_blk", "virtio_console", "crc32c_generic", "ext4")
KEYS = "/usr/share/keyrings/debian-archive-keyring.gpg"  # that sign Debian's packages
SIZE = "12G"  # sparse; loop devices of tests lie there
TIMEOUT = 1200.0

# fmt: off
_UNUSED_MODULES = (
    "sound", "net/bluetooth", "net/mac80211", "net/wireless", "net/can", "net/netfilter",
    "fs/btrfs", "fs/f2fs", "fs/ocfs2", "fs/ceph", "fs/cifs", "fs/gfs2", "fs/jfs", "fs/reiserfs",
    *(
        f"drivers/{name}"
        for name in (
            "ata", "bluetooth", "gpu", "hid", "hwmon", "iio", "infiniband", "input", "isdn", "leds",
            "media", "mmc", "mtd", "net/can", "net/ethernet", "net/usb", "net/wireless", "platform",
            "staging", "thunderbolt", "usb", "video",
        )
    ),
)
# fmt: on
_NOT_INSTALLED = (
    "/usr/share/man/*",
    "/usr/share/doc/*",
    "/usr/share/locale/*",
    "/usr/share/info/*",
    "/boot/System.map*",
    # libvirtd asks every QEMU that it finds what it can, and starts every driver.
    "/usr/bin/qemu-system-i386",
    "/usr/bin/qemu-system-x86_64-microvm",
    "/usr/libexec/qemu-system-i386",
    "/usr/lib/*/libvirt/connection-driver/libvirt_driver_interface.so",
    "/usr/lib/*/libvirt/connection-driver/libvirt_driver_network.so",
    "/usr/lib/*/libvirt/connection-driver/libvirt_driver_nodedev.so",
    "/usr/lib/*/libvirt/connection-driver/libvirt_driver_nwfilter.so",
    "/usr/share/iso-codes/*",
    "/usr/share/xml/iso-codes/*",
    *(f"/lib/modules/*/kernel/{folder}/*" for folder in _UNUSED_MODULES),
)


def missing_tools() -> list[str]:
    return [name for name in ("mmdebstrap", "mke2fs", "apt-get") if not shutil.which(name)]


def build(directory: Path) -> None:
    """Raises BuildError with the end of the tool's output."""
    if missing := missing_tools():
        raise BuildError(f"not installed: {', '.join(missing)}")
    root = directory / "root"
    _install(root)
    version = max(path.name for path in (root / "lib/modules").iterdir())
    _settle(root)
    shutil.copy(root / "bin/busybox", directory / "busybox")
    _kernel(root / f"boot/vmlinuz-{version}", directory / "vmlinux")
    _collect_modules(root / "lib/modules" / version, directory / "modules")
    for path in (root / "boot").iterdir():
        path.unlink()
    options = ("-O", "^has_journal,^metadata_csum", "-E", "lazy_itable_init=1,nodiscard")
    _run("mke2fs", "-q", "-t", "ext4", *options, "-d", str(root), f"{directory}/root.img", SIZE)
    shutil.rmtree(root)


def _install(root: Path) -> None:
    """All the packages.  No initial RAM disk of the distribution's is made (INITRD=No)."""
    suite = _os_release()["VERSION_CODENAME"]
    settings = root.with_name("apt.conf")
    settings.write_text(_output("apt-config", "dump", "Acquire"))
    _run(
        *("mmdebstrap", "--mode=root", "--variant=essential", "--format=directory"),
        *("--skip=check/empty,check/signed-by", f"--keyring={KEYS}"),
        *(f"--aptopt={settings}", "--aptopt=Acquire::Languages none"),
        *(
            "--dpkgopt=force-unsafe-io",
            *(f"--dpkgopt=path-exclude={path}" for path in _NOT_INSTALLED),
        ),
        *(f"--include={','.join(PACKAGES)}", suite, str(root), *_sources()),
    )
    settings.unlink()


def _sources() -> list[str]:
    """This machine's own sources of Debian packages, as one-line entries.

    A line asked of apt-get: `Debian|bookworm|main|http://…`.
    """
    wanted = "$(ORIGIN)|$(RELEASE)|$(COMPONENT)|$(REPO_URI)"
    argv = ("apt-get", "indextargets", "--format", wanted, "Created-By: Packages")
    lines = _output(*argv).splitlines()
    if not any(line.startswith("Debian|") for line in lines):
        _run("apt-get", "update", "-q")
        lines = _output(*argv).splitlines()
    entries: dict[str, None] = {}
    for line in lines:
        origin, release, component, uri = line.split("|")
        if origin == "Debian":
            entries[f"deb {uri} {release} {component}"] = None
    if not entries:
        raise BuildError("apt has no sources of Debian packages here")
    return list(entries)


def _settle(root: Path) -> None:
    """What no package does for a machine without an installer."""
    for name in ("etc/fstab", "etc/resolv.conf"):
        (root / name).unlink(missing_ok=True)
    (root / "etc/fstab").touch()
    (root / "etc/hosts").write_text("127.0.0.1 localhost\n")
    (root / "etc/hostname").write_text("guest\n")
    shutil.rmtree(root / "var/cache/apt", ignore_errors=True)
    shutil.rmtree(root / "var/lib/apt/lists", ignore_errors=True)
    # Device nodes come from devtmpfs.
    shutil.rmtree(root / "dev")
    (root / "dev").mkdir()


def _kernel(compressed: Path, target: Path) -> None:
    """The ELF inside a bzImage: header fields setup_sects (0x1f1), payload_offset (0x248)."""
    image = compressed.read_bytes()
    offset, size = struct.unpack_from("<II", image, 0x248)
    start = (image[0x1F1] + 1) * 512 + offset
    payload = image[start : start + size]
    if not payload.startswith(b"\xfd7zXZ\0"):
        raise BuildError(f"{compressed.name} is not compressed by xz: {payload[:6].hex()}")
    target.write_bytes(lzma.LZMADecompressor().decompress(payload))


def _collect_modules(tree: Path, target: Path) -> None:
    target.mkdir()
    order = []
    for path in _with_dependencies(tree, BOOT_MODULES):
        shutil.copy(path, target)
        order.append(path.name)
    (target / "order").write_text("\n".join(order) + "\n")


def _with_dependencies(tree: Path, names: tuple[str, ...]) -> Iterator[Path]:
    """Each module after those that it needs.  Names that are built into the kernel have no file.

    A line of modules.dep, the nearest dependency first:
    kernel/fs/ext4/ext4.ko: kernel/fs/jbd2/jbd2.ko kernel/lib/crc16.ko
    """
    needs: dict[str, list[str]] = {}
    for line in (tree / "modules.dep").read_text().splitlines():
        path, _, others = line.partition(":")
        needs[Path(path).name.partition(".")[0].replace("-", "_")] = [path, *others.split()]
    seen: set[str] = set()
    for name in names:
        for path in reversed(needs.get(name, [])):
            if path not in seen:
                seen.add(path)
                yield tree / path


def _os_release() -> dict[str, str]:
    rows = (row.partition("=") for row in Path("/etc/os-release").read_text().splitlines())
    return {name: value.strip('"') for name, _, value in rows}


def _output(*argv: str) -> str:
    return subprocess.run(argv, check=True, capture_output=True, text=True, timeout=60).stdout


def _run(*argv: str) -> None:
    environment = {**os.environ, "INITRD": "No", "DEBIAN_FRONTEND": "noninteractive"}
    done = subprocess.run(
        argv,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=TIMEOUT,
    )
    if done.returncode:
        tail = "\n".join(done.stdout.splitlines()[-30:])
        raise BuildError(f"{argv[0]} ended with {done.returncode}:\n{tail}")
