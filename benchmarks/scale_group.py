# SPDX-License-Identifier: GPL-2.0-or-later
"""For block_scale.py: a volume group of any number of volumes on a loop device, and lvm bare.

The volumes are put into the group's metadata by one vgcfgrestore, so that ten thousand of them are
there in a second.  Their names are random, as UUIDs are.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from vdsm_storage.base.clock import SystemClock
from vdsm_storage.base.lanes import Lanes
from vdsm_storage.lvm.changes import Change
from vdsm_storage.lvm.command import Lvm
from vdsm_storage.lvm.group import Group
from vdsm_storage.lvm.groups import Groups
from vdsm_storage.lvm.native import natives
from vdsm_storage.lvm.plan import make_plan, new_id

SIZE = 4 * 1024**4  # of the device
EXTENT = 128 * 1024**2
BLANK = str(uuid.UUID(int=0))
TIMEOUT = 300.0  # seconds for one command
FIRST_EXTENT = 64  # of the volumes; the domain's own ones lie before
LAST_SLOT = 1900  # the format of domains allows 1947: the volumes beyond are in no domain
VOLUME = """\
{name} {{
id = "{id}"
status = ["READ", "WRITE", "VISIBLE"]
flags = []
tags = [{tags}]
creation_time = 1700000000
creation_host = "host"
segment_count = 1

segment1 {{
start_extent = 0
extent_count = 1

type = "striped"
stripe_count = 1

stripes = [
"pv0", {place}
]
}}
}}
"""


# What an oVirt host gives each of lvm's commands; only the archive's place is another one here.
OVIRT = (
    'devices {{ ignore_suspended_devices=1 write_cache_state=0 disable_after_error_count=3'
    ' hints="none" obtain_device_list_from_udev=0 }}'
    " global {{ prioritise_write_locks=1 wait_for_locks=1 use_lvmpolld=1 }}"
    ' backup {{ retain_min=50 retain_days=0 archive_dir="{}" }}'
)


@dataclass(frozen=True)
class Volume:
    """A volume of one extent; `slot` is None for one that is in no domain."""

    name: str
    id: str
    image: str
    slot: int | None

    @property
    def tags(self) -> list[str]:
        if self.slot is None:
            return [f"owner_{self.image}", "kind_plain", "rack_12"]
        return [f"IU_{self.image}", f"PU_{BLANK}", f"MD_{self.slot}"]


def new_volumes(count: int) -> list[Volume]:
    """Volumes of a domain, as many as may be, then others."""
    slots = [slot if slot <= LAST_SLOT else None for slot in range(1, count + 1)]
    return [Volume(str(uuid.uuid4()), new_id(), str(uuid.uuid4()), slot) for slot in slots]


@contextlib.contextmanager
def loop_device(directory: Path, size: int, direct: bool) -> Iterator[str]:
    """A loop device on a sparse file.  `direct` I/O reaches the disk; other ends in memory."""
    file = directory / f"lun-{direct}"
    file.touch()
    os.truncate(file, size)
    mode = "on" if direct else "off"
    argv = ["losetup", f"--direct-io={mode}", "--find", "--show", str(file)]
    device = subprocess.run(argv, capture_output=True, text=True, check=True).stdout.strip()
    try:
        yield device
    finally:
        subprocess.run(["losetup", "--detach", device], check=True)
        file.unlink()


@dataclass
class Bench:
    """A volume group `name` on `device`, its tools, and the product's view of it.

    `another` is the configuration of an lvm that is not the product's, as another host has it.
    """

    directory: Path
    device: str
    name: str = field(default_factory=lambda: str(uuid.uuid4()))

    def __post_init__(self) -> None:
        self.another = self.directory / "another-lvm"
        Lvm(str(self.another), TIMEOUT, 1)  # writes the configuration
        self.ours = Lvm(str(self.directory / "our-lvm"), TIMEOUT, 10)
        self.groups = Groups(self.ours, lambda: [self.device], Lanes(SystemClock()).submit, 10.0)

    def create(self, tags: Sequence[str]) -> str:
        """Make the group; its id."""
        return self.groups.create(self.name, [self.device], tags, False)

    @property
    def group(self) -> Group:
        return self.groups.find(self.name)

    def lvm(self, command: str, *argv: str) -> str:
        """One lvm command as anybody starts it, without device-mapper, and with our configuration,
        which makes it quick; its output.
        """
        return self._lvm({"LVM_SYSTEM_DIR": str(self.another)}, command, *argv)

    def usual_lvm(self, command: str, *argv: str) -> str:
        """The same with the system's configuration and an oVirt host's options."""
        return self._lvm({}, command, "--config", OVIRT.format(self.directory / "archive"), *argv)

    def _lvm(self, environment: Mapping[str, str], command: str, *argv: str) -> str:
        given = {**os.environ, **environment, "LC_ALL": "C", "LVM_SUPPRESS_FD_WARNINGS": "1"}
        done = subprocess.run(
            ["lvm", command, "--devices", self.device, "--driverloaded", "n", *argv],
            env=given, capture_output=True, text=True, timeout=TIMEOUT, check=False,
        )  # fmt: skip
        if done.returncode:
            raise SystemExit(f"lvm {command} {' '.join(argv)}: {done.stderr}")
        return done.stdout

    def commands(self, *changes: Change) -> list[Sequence[str]]:
        """The lvm commands that the product runs for changes, one behind the other."""
        group = self.group
        vg = group.read()
        plan = make_plan(vg, [changes])
        return [native.argv for native in natives(plan, group.all_devices(vg), self.ours.version)]

    def text(self) -> str:
        """The group's metadata as it is on the storage."""
        return self.group.metadata.text()[0].rstrip(b"\0").decode()

    def fill(
        self, text: str, volumes: Sequence[Volume], places: Sequence[int] | None = None
    ) -> None:
        """Make the group what a text without volumes of a domain says, with `volumes`; `places` are
        their extents, by default one behind the other."""
        file = self.directory / "restore.vg"
        behind = range(FIRST_EXTENT, FIRST_EXTENT + len(volumes))
        file.write_text(with_volumes(text, volumes, places or behind))
        self.lvm("vgcfgrestore", "--yes", "--file", str(file), self.name)
        file.unlink()


def with_volumes(text: str, volumes: Sequence[Volume], places: Sequence[int]) -> str:
    """The metadata with more volumes of one extent each, on pv0."""
    added = "\n".join(
        VOLUME.format(
            name=volume.name, id=volume.id, place=place,
            tags=", ".join(f'"{tag}"' for tag in volume.tags),
        )
        for place, volume in zip(places, volumes, strict=True)
    )  # fmt: skip
    if "\nlogical_volumes {" in text:
        return text.replace("\nlogical_volumes {\n", f"\nlogical_volumes {{\n\n{added}", 1)
    end = text.rindex("}\n", 0, text.index("# Generated"))
    return f"{text[:end]}\nlogical_volumes {{\n\n{added}}}\n{text[end:]}"
