# SPDX-License-Identifier: GPL-2.0-or-later
"""What a domain's storage holds, looked at behind the agent's back: in files, or on LUNs.

Nothing here is shared with the agent: files are read as they are, LUNs by functional/checker.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Protocol

from functional.checker import slots, tags
from functional.checker.check import REMOVED, SPECIAL, check
from functional.checker.group import EXTENT, Group, Lv, read_group, read_label
from functional.checker.text import BadTextError
from functional.engine.host import LOCALFS, StorageServer
from functional.lab.inner import dm
from functional.processes import AgentProcess

MIB: Final = 1024**2
CHUNK: Final = 2560 * MIB  # what a thin logical volume begins with
TYPES: Final = {2: "FCP", 3: "ISCSI", 4: "LOCALFS", 6: "POSIXFS"}


class Place(Protocol):
    """A volume by its names."""

    image: str
    volume: str


class Backend(Protocol):
    """One domain.  `unit`: raw volumes have multiples of it, in bytes.  `zeroed`: what nobody wrote
    reads as zeros.  `sparse_raw`: raw volumes may be SPARSE."""

    unit: int
    zeroed: bool
    sparse_raw: bool

    def metadata(self) -> dict[str, str]:
        """The domain's."""

    def special(self) -> dict[str, int]:
        """Sizes of the special files or volumes."""

    def meta(self, where: Place) -> dict[str, str]:
        """A volume's metadata, by the format's keys."""

    def images(self) -> dict[str, set[str]]:
        """The images with their own volumes."""

    def read(self, where: Place, length: int) -> bytes:
        """The first bytes of a volume."""

    def check_volume(self, where: Place, info: dict[str, Any]) -> None:
        """Everything that belongs to a volume is there, and nothing else."""

    def check_shared(self, template: Place, image: str) -> None:
        """The image has the template of another image."""

    def check_idle(self) -> None:
        """All is sound, nothing is half made, and no volume is in use on any host."""

    def changed(self, where: Place) -> object:
        """Something that differs when the volume's data was written to since."""

    def gone(self) -> bool:
        """Whether the storage is as it was before the domain."""


@dataclass
class FileBackend:
    """`root` is the domain's directory."""

    root: Path
    shared: bool  # by hosts: there are leases
    unit: int = 4 * MIB
    zeroed: bool = True
    sparse_raw: bool = True

    def metadata(self) -> dict[str, str]:
        return _pairs((self.root / "dom_md" / "metadata").read_text().splitlines())

    def special(self) -> dict[str, int]:
        return {path.name: path.stat().st_size for path in (self.root / "dom_md").iterdir()}

    def meta(self, where: Place) -> dict[str, str]:
        lines = self._path(where, ".meta").read_text().splitlines()
        assert lines.pop() == "EOF"
        return _pairs(lines)

    def images(self) -> dict[str, set[str]]:
        return {
            image.name: {path.stem for path in image.glob("*.meta")}
            for image in (self.root / "images").iterdir()
        }

    def read(self, where: Place, length: int) -> bytes:
        with self._path(where).open("rb") as file:
            return file.read(length)

    def check_volume(self, where: Place, info: dict[str, Any]) -> None:
        """Its three files."""
        if info["format"] == "RAW":
            assert info["apparentsize"] == info["capacity"]
        if info["type"] == "PREALLOCATED":
            assert int(info["truesize"]) >= int(info["capacity"])
        files = {path.name for path in self._path(where).parent.iterdir()}
        suffixes = ("", ".meta", ".lease") if self.shared else ("", ".meta")
        assert files == {where.volume + suffix for suffix in suffixes}
        if self.shared:
            assert info["lease"]["offset"] == 0
            assert self._path(where, ".lease").stat().st_size == MIB

    def check_shared(self, template: Place, image: str) -> None:
        """One file with two names."""
        other = self.root / "images" / image / template.volume
        assert self._path(template).stat().st_ino == other.stat().st_ino

    def check_idle(self) -> None:
        for path in self.root.rglob("*"):
            assert not path.name.endswith(".new"), path
            assert not path.name.startswith("_remove_me_"), path
        for image in (self.root / "images").iterdir():
            files = {path.name for path in image.iterdir()}
            volumes = {name.removesuffix(".meta") for name in files if name.endswith(".meta")}
            known = volumes | {f"{v}.meta" for v in volumes} | {f"{v}.lease" for v in volumes}
            assert files <= known, f"half made in {image}: {files - known}"
            assert volumes <= files, f"without data in {image}: {volumes - files}"
            assert volumes, f"empty image {image}"

    def changed(self, where: Place) -> object:
        return self._path(where).stat().st_mtime_ns

    def gone(self) -> bool:
        names = [name for name in os.listdir(self.root.parent) if name != "lost+found"]
        return not self.root.exists() and names == []

    def _path(self, where: Place, suffix: str = "") -> Path:
        return self.root / "images" / where.image / f"{where.volume}{suffix}"


class Activation(Protocol):
    """What a host's kernel, or a stand-in for it, knows."""

    def active(self, group: str, /) -> Collection[str]:
        """Volumes of a volume group that are active there."""


@dataclass
class BlockBackend:
    """`hosts` are all that use the domain."""

    devices: Sequence[str]
    domain: str
    hosts: Sequence[Activation]
    unit: int = EXTENT
    zeroed: bool = False
    sparse_raw: bool = False

    def group(self) -> Group:
        problems: list[str] = []
        found = read_group(self.devices, self.domain, problems)
        assert found is not None, problems
        assert problems == []
        return found

    def metadata(self) -> dict[str, str]:
        problems: list[str] = []
        values = tags.values_of(self.group(), problems)
        assert problems == []
        return values

    def special(self) -> dict[str, int]:
        group = self.group()
        return {name: group.size(name) for name in group.lvs if name in SPECIAL}

    def meta(self, where: Place) -> dict[str, str]:
        version, group = int(self.metadata()["VERSION"]), self.group()
        slot = int(_tag(group.lvs[where.volume], "MD_"))
        data = group.read("metadata", slots.offset(version, slot), slots.SIZE)
        values, problems = slots.parse(data, version)
        assert problems == []
        return values

    def images(self) -> dict[str, set[str]]:
        found: dict[str, set[str]] = {}
        for lv in self.group().lvs.values():
            if lv.name not in SPECIAL:
                found.setdefault(_tag(lv, "IU_"), set()).add(lv.name)
        return found

    def read(self, where: Place, length: int) -> bytes:
        return self.group().read(where.volume, 0, length)

    def check_volume(self, where: Place, info: dict[str, Any]) -> None:
        """Its logical volume, tags, and the place of its lease."""
        group = self.group()
        lv, size = group.lvs[where.volume], group.size(where.volume)
        slot = int(_tag(lv, "MD_"))
        names = {f"IU_{where.image}", f"PU_{info['parent']}", f"MD_{slot}"}
        assert set(lv.tags) == names
        assert (info["apparentsize"], info["truesize"]) == (str(size), str(size))
        assert info["lease"]["offset"] == (100 + slot) * MIB
        capacity = int(info["capacity"])
        if info["format"] == "RAW":
            assert size == capacity
        elif info["type"] == "PREALLOCATED":
            assert size >= capacity
        else:
            assert EXTENT <= size <= -(-min(CHUNK, capacity) // EXTENT) * EXTENT

    def check_shared(self, template: Place, image: str) -> None:
        """No second name: a volume of the image is based on it."""
        lvs = self.group().lvs
        users = [lv for lv in lvs.values() if f"PU_{template.volume}" in lv.tags]
        assert image in {_tag(lv, "IU_") for lv in users}
        assert _tag(lvs[template.volume], "IU_") == template.image

    def check_idle(self) -> None:
        """By functional/checker; only special volumes are active."""
        problems = check(self.devices, self.domain)
        assert problems == [], problems
        for host in self.hosts:
            active = set(host.active(self.domain))
            assert active <= set(SPECIAL) - {"master"}, active

    def changed(self, where: Place) -> object:
        """Of the headers only."""
        return hashlib.sha256(self.read(where, MIB)).digest()

    def gone(self) -> bool:
        return all(is_blank(device) for device in self.devices) and not any(
            host.active(self.domain) for host in self.hosts
        )


def look(agent: AgentProcess, server: StorageServer, domain: str, directory: Path) -> Backend:
    """What the domain's storage holds; `directory` has it if it is a file domain."""
    if server.is_block:
        return BlockBackend(server.devices, domain, [agent.standin or dm])
    return FileBackend(directory, shared=server.type != LOCALFS)


def _pairs(lines: Sequence[str]) -> dict[str, str]:
    return dict(line.split("=", 1) for line in lines)


def _tag(lv: Lv, prefix: str) -> str:
    """The value of the tag that begins so; an image's without the mark of its deletion."""
    (value,) = (tag.removeprefix(prefix) for tag in lv.tags if tag.startswith(prefix))
    for mark in REMOVED:
        value = value.removeprefix(mark)
    return value


def is_blank(device: str) -> bool:
    """Whether it is no physical volume."""
    try:
        read_label(device)
    except BadTextError:
        return True
    return False
