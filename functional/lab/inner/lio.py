# SPDX-License-Identifier: GPL-2.0-or-later
"""iSCSI targets of the kernel, made by its configuration file system: no daemon, no tool.

with Target(portals=("127.0.0.2", "127.0.0.3"), chap=("user", "secret-secret")) as target:
    lun = target.add_lun("/dev/loop0")
    …log in to target.iqn; the LUN's multipath name is lun.wwid
    target.portal_down("127.0.0.3")         # a controller is gone: sessions end at once
    with cut("127.0.0.2"): …                # a network is gone: nobody says a word
"""

from __future__ import annotations

import contextlib
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from functional.lab.inner.tool import run

CONFIG = Path("/sys/kernel/config/target")
MODULES = ("target_core_mod", "target_core_iblock", "iscsi_target_mod")
PORT = 3260


@dataclass(frozen=True)
class Lun:
    number: int
    name: str
    serial: str

    @property
    def wwid(self) -> str:
        """The kernel's NAA name: type 3, its 6001405, then 25 digits of the serial number."""
        return f"36001405{self.serial.replace('-', '')[:25]}"


class Target:
    """Everyone may log in, with the password if there is one (`chap` = user, password).

    Each portal is a target portal group of its own, numbered from 1, as on arrays with more than
    one controller; all show the same LUNs.
    """

    def __init__(
        self,
        iqn: str = "",
        portals: Sequence[str] = ("127.0.0.2",),
        chap: tuple[str, str] | None = None,
    ) -> None:
        run("modprobe", "-a", *MODULES)
        self.iqn = iqn or f"iqn.2024-01.test.lab:{uuid.uuid4().hex[:8]}"
        self.luns: dict[int, Lun] = {}
        self._chap = chap
        self._target = CONFIG / "iscsi" / self.iqn
        self._target.parent.mkdir(exist_ok=True)
        self._target.mkdir()
        self._groups: dict[str, Path] = {}
        for address in portals:
            self.add_portal(address)

    def __enter__(self) -> Target:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    def add_portal(self, address: str, port: int = PORT) -> None:
        group = self._target / f"tpgt_{len(self._groups) + 1}"
        group.mkdir()
        # Who is not listed gets every LUN, and may write.
        settings = {"generate_node_acls": 1, "demo_mode_write_protect": 0, "cache_dynamic_acls": 1}
        for name, value in {**settings, "authentication": int(self._chap is not None)}.items():
            (group / "attrib" / name).write_text(str(value))
        if self._chap is not None:
            for name, text in zip(("userid", "password"), self._chap, strict=True):
                (group / "auth" / name).write_text(text)
        for lun in self.luns.values():
            _link(group, lun)
        (group / "np" / f"{address}:{port}").mkdir()
        self._groups[address] = group
        self.portal_up(address)

    def portal_down(self, address: str) -> None:
        """Its sessions end, and new ones are refused."""
        (self._groups[address] / "enable").write_text("0")

    def portal_up(self, address: str) -> None:
        (self._groups[address] / "enable").write_text("1")

    def add_lun(self, device: str, serial: str = "") -> Lun:
        number = next(n for n in range(256) if n not in self.luns)
        lun = Lun(number, f"lab-{uuid.uuid4().hex[:8]}", serial or str(uuid.uuid4()))
        store = _store(lun)
        store.parent.mkdir(exist_ok=True)
        store.mkdir()
        (store / "control").write_text(f"udev_path={device}")
        (store / "enable").write_text("1")
        (store / "wwn/vpd_unit_serial").write_text(lun.serial)
        with contextlib.suppress(OSError):  # a device that discards nothing
            (store / "attrib/emulate_tpu").write_text("1")
        for group in self._groups.values():
            _link(group, lun)
        self.luns[number] = lun
        return lun

    def remove_lun(self, number: int) -> None:
        """Also while somebody uses it: the array takes it away."""
        lun = self.luns.pop(number)
        for group in self._groups.values():
            entry = group / f"lun/lun_{number}"
            (entry / lun.name).unlink()
            entry.rmdir()
        _store(lun).rmdir()
        with contextlib.suppress(OSError):  # another target's may be there
            _store(lun).parent.rmdir()

    def remove(self) -> None:
        if not self._target.exists():
            return
        for address in self._groups:
            self.portal_down(address)
        for number in list(self.luns):
            self.remove_lun(number)
        for group in self._groups.values():
            for portal in (group / "np").iterdir():
                portal.rmdir()
            group.rmdir()
        self._target.rmdir()


@contextlib.contextmanager
def cut(address: str) -> Iterator[None]:
    """What is sent to this loopback address is lost, of open connections too."""
    route = ("blackhole", f"{address}/32", "table", "local")
    run("ip", "route", "add", *route)
    try:
        yield
    finally:
        run("ip", "route", "del", *route)


def _link(group: Path, lun: Lun) -> None:
    entry = group / f"lun/lun_{lun.number}"
    entry.mkdir()
    (entry / lun.name).symlink_to(_store(lun))


def _store(lun: Lun) -> Path:
    return CONFIG / "core" / "iblock_0" / lun.name
