# SPDX-License-Identifier: GPL-2.0-or-later
"""A host with SCSI disks, iSCSI sessions and multipath maps, as sysfs shows them: files and links.

What stands in a real sysfs was looked at in a guest of the laboratory (kernel 6.1).
"""

from __future__ import annotations

import shutil
from pathlib import Path

from vdsm_storage.host.device_mapper import DmInterface, Target
from vdsm_storage.host.kernel_files import KernelFiles

GIB = 1024**3


class SanTree:
    """`root` becomes the root of a `KernelFiles`."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.files = KernelFiles(str(root))
        self.dm = FakeDm()

    def write(self, path: str, text: str | bytes) -> None:
        full = self.root / path.lstrip("/")
        full.parent.mkdir(parents=True, exist_ok=True)
        full.write_bytes(text if isinstance(text, bytes) else f"{text}\n".encode())

    def read(self, path: str) -> str:
        return (self.root / path.lstrip("/")).read_text()

    def link(self, path: str, target: str) -> None:
        full = self.root / path.lstrip("/")
        full.parent.mkdir(parents=True, exist_ok=True)
        full.symlink_to(self.root / target.lstrip("/"))

    # -- disks and maps ----------------------------------------------------------------------

    def disk(
        self,
        name: str,
        number: str,
        place: str,
        size: int = GIB,
        serial: str = "",
        **more: str,
    ) -> None:
        """`place` is below /sys/devices and ends in H:C:T:L."""
        device = f"/sys/devices/{place}"
        self.write(f"{device}/vendor", more.get("vendor", "LIO-ORG "))
        self.write(f"{device}/model", f"{more.get('model', 'lun0'):16}")
        self.write(f"{device}/rev", "4.0 ")
        self.write(f"{device}/state", more.get("state", "running"))
        if serial:
            page = serial.encode() + b"\0"
            self.write(f"{device}/vpd_pg80", b"\0\x80" + len(page).to_bytes(2, "big") + page)
        self.block(name, number, size)
        self.link(f"/sys/block/{name}/device", device)
        host = place.rpartition("/")[2].partition(":")[0]
        self.write(f"/sys/class/scsi_host/host{host}/scan", "")

    def block(self, name: str, number: str, size: int, sector: int = 512) -> None:
        base = f"/sys/block/{name}"
        self.write(f"{base}/dev", number)
        self.write(f"{base}/size", str(size // 512))
        self.write(f"{base}/queue/logical_block_size", str(sector))
        self.write(f"{base}/queue/physical_block_size", str(sector))
        self.write(f"{base}/queue/discard_max_bytes", "0")
        (self.root / base.lstrip("/") / "holders").mkdir(exist_ok=True)

    def map(self, name: str, kernel: str, disks: dict[str, str], size: int = GIB) -> None:
        """`disks` are the numbers of its paths, by name."""
        self.block(kernel, f"253:{kernel.removeprefix('dm-')}", size)
        self.write(f"/sys/block/{kernel}/dm/name", name)
        self.write(f"/sys/block/{kernel}/dm/uuid", f"mpath-{name}")
        (self.root / f"sys/block/{kernel}/slaves").mkdir(exist_ok=True)
        for disk in disks:
            self.link(f"/sys/block/{kernel}/slaves/{disk}", f"/sys/block/{disk}")
            self.link(f"/sys/block/{disk}/holders/{kernel}", f"/sys/block/{kernel}")
        self.states(name, dict.fromkeys(disks.values(), True))

    def states(self, name: str, paths: dict[str, bool]) -> None:
        """How the paths of a map are, by number, in the map's order."""
        words = " ".join(f"{n} {'A' if ok else 'F'} 0 0 1" for n, ok in paths.items())
        text = f"2 0 1 0 1 1 A 0 {len(paths)} 2 {words}" if paths else "2 0 0 0 0 0"
        self.dm.targets[name] = [Target(0, 2097152, "multipath", text)]

    # -- sessions ----------------------------------------------------------------------------

    def session(
        self,
        number: int,
        address: str,
        target: str = "iqn.2020-01.org.example:t1",
        **more: str,
    ) -> str:
        """The place of its targets, for `disk`; its host has the number before."""
        host = number - 1
        place = f"platform/host{host}/session{number}"
        (self.root / "sys/devices" / place).mkdir(parents=True)
        base = f"/sys/class/iscsi_session/session{number}"
        self.link(f"{base}/device", f"/sys/devices/{place}")
        self.write(f"{base}/targetname", target)
        self.write(f"{base}/tpgt", more.get("tpgt", "1"))
        self.write(f"{base}/ifacename", more.get("interface", "default"))
        self.write(f"{base}/state", more.get("state", "LOGGED_IN"))
        self.write(f"{base}/username", more.get("user", "(null)"))
        self.write(f"{base}/password", more.get("password", "(null)"))
        connection = f"/sys/class/iscsi_connection/connection{number}:0"
        self.write(f"{connection}/persistent_address", address)
        self.write(f"{connection}/persistent_port", more.get("port", "3260"))
        self.write(f"/sys/class/scsi_host/host{host}/scan", "")
        return f"{place}/target{host}:0:0"

    def end_session(self, number: int) -> None:
        """With its disks."""
        for path in (self.root / "sys/block").glob("sd*"):
            if f"session{number}/" in str((path / "device").resolve()):
                for holder in (path / "holders").iterdir():
                    (self.root / f"sys/block/{holder.name}/slaves/{path.name}").unlink()
                shutil.rmtree(path)
        shutil.rmtree(self.root / f"sys/class/iscsi_session/session{number}")
        shutil.rmtree(self.root / f"sys/class/iscsi_connection/connection{number}:0")


class FakeDm(DmInterface):
    """What device-mapper would say; this kernel may have none."""

    def __init__(self) -> None:
        super().__init__()
        self.targets: dict[str, list[Target]] = {}
        self.opened: set[str] = set()

    def status(self, name: str) -> list[Target]:
        return self.targets.get(name, [])

    def open_count(self, name: str) -> int:
        return int(name in self.opened)


def golden_tree(root: Path) -> SanTree:
    """The host on which the golden device lists were made: two LUNs, two portals."""
    tree = SanTree(root)
    names = {"127.0.0.2": ("sda", "sdc"), "127.0.0.3": ("sdb", "sdd")}
    serials = ("692aa9c0-a9d1-407a-b8d7-bd06c36b9bde", "2d05b1f3-670a-40e0-ae46-37e4fb7e1102")
    numbers = {"sda": "8:0", "sdb": "8:16", "sdc": "8:32", "sdd": "8:48"}
    for session, (address, disks) in enumerate(names.items(), 1):
        place = tree.session(session, address)
        for lun, (disk, serial) in enumerate(zip(disks, serials, strict=True)):
            where = f"{place}/{session - 1}:0:0:{lun}"
            more = {"model": f"lun{lun}"}
            tree.disk(disk, numbers[disk], where, 20 * GIB, serial, **more)
    for number, (name, disks) in enumerate(
        (
            ("36001405692aa9c0a9d1407ab8d7bd06c", ("sdb", "sda")),
            ("360014052d05b1f3670a40e0ae4637e4f", ("sdd", "sdc")),
        )
    ):
        tree.map(name, f"dm-{number}", {disk: numbers[disk] for disk in disks}, 20 * GIB)
    return tree
