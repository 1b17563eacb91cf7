# SPDX-License-Identifier: GPL-2.0-or-later
"""How block domains scale with the number of logical volumes, against bare lvm in the same run.

With N volumes in a volume group, on a loop device; with device-mapper where the kernel has it, in
the laboratory for instance (volumes are activated by lvm then, on both sides):

- a look at one volume, or at the whole group, while nothing changed: against `lvs` of the same; on
  a device that is in memory, so that the work is compared, not the disk
- the same after another lvm changed five volumes
- Volume.create and Volume.extendSize through an agent, from the request to the end of its task,
  against the lvm commands that they need, bare and one behind the other:
    a raw volume: lvcreate, lvchange; a cow volume: the same, and the activation and deactivation
    between them; extending: lvextend
  "usual lvm" has the system's configuration and the options that an oVirt host gives it; the same
  commands "as we run them" have the configuration that the agent writes for its own, which saves
  most of their time
- ten of them at once against one
- reading the metadata of 2,000 volumes against one large direct read
- what the agent's memory grows by for a volume

The agent is the pool manager, as an engine's host is, so that the lease of the domain is held.
What is not lvm's work counts against the agent: the request, the journal, the volume's own lease,
its metadata.  That is some milliseconds whatever N is.  A domain has at most 1,947
volumes by its format: where N is larger, the others in its volume group are in no domain.

    benchmarks/block_scale.py [--quick] [--json]
    python -m functional.lab run --timeout 7200 ".venv/bin/python benchmarks/block_scale.py --quick"

--quick stops at 1,000 volumes.  Needs root.
"""

from __future__ import annotations

import functools
import random
import sys
import uuid
from collections.abc import Callable, Sequence
from itertools import product
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1]))

from benchmarks.scale_agent import COW, RAW, Domain, domain_in_use
from benchmarks.scale_group import EXTENT, SIZE, Bench, Volume, loop_device, new_volumes
from benchmarks.table import ROUNDS, Row, Table, conclude, directory, low, options, wall
from vdsm_storage.base.files import read_direct
from vdsm_storage.domains import block_names as names
from vdsm_storage.domains.block_slots import METADATA_SIZE, SLOT_SIZE, Slots, slot_offset
from vdsm_storage.lvm.changes import CreateLv, ExtendLv, RetagLv

SIZES = (10, 350, 1000, 3000, 10000)
QUICK = 1000  # the largest N of --quick
LARGE = 1000  # of this N on a promise is made about looks after changes
LARGEST = (15000, 20000, 30000)  # where one extend is expected to take a second
SLOTS = 2000
ANOTHER_HOST = 99
KIB = 1024
LOOK = ("--noheadings", "-o", "lv_name,lv_size,lv_tags,seg_pe_ranges")

Run = Callable[..., str]  # an lvm command, by its words


def nothing(_name: str) -> None:
    """No volume is activated."""


class Scale:
    """The measurements at one N, in a group that holds `volumes`."""

    def __init__(self, table: Table, bench: Bench, volumes: Sequence[Volume]) -> None:
        self.table, self.bench, self.volumes = table, bench, volumes
        self.count = len(volumes)
        self._sizes = {volume.name: EXTENT for volume in volumes}

    def row(self, name: str, limit: float | None, at_least: bool = False) -> Row:
        return Row(name, self.count, 0.0, limit, at_least)

    def if_large(self, limit: float) -> float | None:
        return limit if self.count >= LARGE else None

    # -- looking -----------------------------------------------------------------------------

    def looks(self) -> None:
        bench, group = self.bench, self.bench.group
        name = self.volumes[self.count // 2].name
        group.read()
        self.table.compare(
            self.row("a look at one volume: lvs / ours", 100, at_least=True),
            lambda: wall(lambda: group.read().lvs[name]),
            lambda: wall(lambda: bench.lvm("lvs", *LOOK, f"{bench.name}/{name}")),
            repeat=20,
        )
        self.table.compare(
            self.row("a look at the whole group: lvs / ours", 100, at_least=True),
            lambda: wall(lambda: list(group.read().lvs.values())),
            lambda: wall(lambda: bench.lvm("lvs", *LOOK, bench.name)),
            repeat=20,
        )

    def look_after_changes(self) -> None:
        bench, group = self.bench, self.bench.group

        def ours() -> float:
            tag = f"changed_{uuid.uuid4().hex[:8]}"
            some = [f"{bench.name}/{v.name}" for v in random.sample(list(self.volumes), 5)]
            bench.lvm("lvchange", "--autobackup", "n", "--addtag", tag, *some)
            took = wall(group.read)
            found = [lv for lv in group.read().lvs.values() if tag in lv.tags]
            if len(found) != 5:
                raise SystemExit(f"{len(found)} of 5 changes were seen")
            return took

        self.table.compare(
            self.row("the same after 5 changes: lvs / ours", self.if_large(10), at_least=True),
            ours,
            lambda: wall(lambda: bench.lvm("lvs", *LOOK, bench.name)),
        )

    # -- changing ----------------------------------------------------------------------------

    def bare_lvms(self) -> tuple[tuple[str, Run], ...]:
        return ("usual lvm", self.bench.usual_lvm), ("lvm as we run it", self.bench.lvm)

    def grown(self, volume: Volume) -> int:
        """One extent more than the last time."""
        self._sizes[volume.name] += EXTENT
        return self._sizes[volume.name]

    def bare_extend(self, lvm: Run) -> float:
        volume = self.volumes[1]
        [argv] = self.bench.commands(ExtendLv(volume.name, self.grown(volume)))
        return wall(lambda: lvm(*argv))

    def bare_create(self, lvm: Run, activate: Callable[[str], None] = nothing) -> float:
        """A volume of one extent, tagged as half made, then not any more.

        Of a host that there is none of: the agent would remove what its own one left.
        """
        bench, name = self.bench, str(uuid.uuid4())
        half_made = (names.INITIALIZING, f"{names.OWNER}{ANOTHER_HOST}")
        tags = (f"IU_{uuid.uuid4()}", f"PU_{uuid.UUID(int=0)}", "MD_1", *half_made)
        [argv] = bench.commands(CreateLv(name, EXTENT, tags))
        took = wall(lambda: lvm(*argv)) + wall(lambda: activate(name))
        [argv] = bench.commands(RetagLv(name, (), half_made))
        took += wall(lambda: lvm(*argv))
        bench.lvm("lvremove", "--yes", "--autobackup", "n", f"{bench.name}/{name}")
        return took

    def extends(self, domain: Domain) -> None:
        first = self.volumes[0]

        def one() -> float:
            size = self.grown(first)
            return domain.wall(lambda: [domain.extend(first, size)])

        for words, lvm in self.bare_lvms():
            row = self.row(f"Volume.extendSize / {words}", 1.25)
            self.table.compare(row, one, functools.partial(self.bare_extend, lvm))
        row = self.row("ten extendSize at once / one", 2.5)
        self.table.compare(row, lambda: self.together(domain), one)

    def together(self, domain: Domain) -> float:
        """Ten volumes at once."""
        wanted = [(volume, self.grown(volume)) for volume in self.volumes[:10]]
        return domain.wall(lambda: [domain.extend(*each) for each in wanted])

    def creates(self, domain: Domain) -> None:
        def activate(name: str) -> None:
            domain.activation.activate(self.bench.group, [name])
            domain.activation.deactivate(self.bench.group, [name])

        kinds = (("raw", RAW, nothing), ("cow", COW, activate))
        for (name, kind, meanwhile), (words, lvm) in product(kinds, self.bare_lvms()):
            self.table.compare(
                self.row(f"Volume.create, {name} / {words}", 1.25),
                functools.partial(domain.wall, lambda kind=kind: [domain.create(kind)]),
                functools.partial(self.bare_create, lvm, meanwhile),
            )


def reading_slots(table: Table, directory: Path) -> None:
    """The metadata volume is a file here: the format is what is measured, not the device."""
    path = directory / "metadata"
    path.write_bytes(random.randbytes(METADATA_SIZE))
    slots, start = Slots(str(path), 5), slot_offset(1, 5)
    length = slot_offset(SLOTS, 5) + SLOT_SIZE - start
    wanted = range(1, SLOTS + 1)
    row = Row(f"reading {SLOTS:,} metadata slots / one direct read", SLOTS, 0.0, 3)
    begin = start // 4096 * 4096
    table.compare(
        row,
        lambda: wall(lambda: slots.read_all(wanted)),
        lambda: wall(lambda: read_direct(str(path), length, begin)),
    )
    path.unlink()


def looks_at_scale(table: Table, directory: Path, sizes: Sequence[int]) -> None:
    with loop_device(directory, SIZE, direct=False) as device:
        bench = Bench(directory, device)
        bench.create(["scale"])
        text = bench.text()
        for count in sizes:
            volumes = new_volumes(count)
            bench.fill(text, volumes)
            scale = Scale(table, bench, volumes)
            scale.looks()
            scale.look_after_changes()


def at_scale(table: Table, directory: Path, sizes: Sequence[int]) -> None:
    """What is measured with an agent, one for all `sizes`."""
    with loop_device(directory, SIZE, direct=True) as device:
        bench = Bench(directory, device)
        with domain_in_use(bench) as domain:
            text, volumes = bench.text(), new_volumes(SIZES[-1])
            few = (0, 0)
            for count in sizes:
                scale = filled(table, domain, text, volumes[:count])
                scale.extends(domain)
                scale.creates(domain)
                few = few if few[0] else (count, domain.rss())
            memory(filled(table, domain, text, volumes), domain, few)


def filled(table: Table, domain: Domain, text: str, volumes: Sequence[Volume]) -> Scale:
    """The domain with `volumes`; its group's metadata was `text` without any."""
    domain.bench.fill(text, volumes)
    domain.write_slots(volumes)
    domain.see_changes()
    return Scale(table, domain.bench, volumes)


def memory(scale: Scale, domain: Domain, few: tuple[int, int]) -> None:
    """`few` are a number of volumes, and the agent's bytes with them after all sorts of work."""
    for _ in range(2):
        scale.together(domain)
    growth = (domain.rss() - few[1]) / (scale.count - few[0])
    row = scale.row("the agent's memory, KiB for a volume", 1)
    row.value = growth / KIB
    scale.table.add(row)


# -- one second -----------------------------------------------------------------------------------


def one_second(directory: Path) -> list[str]:
    """At how many volumes one extend passes one second, and what it is spent on; no promise."""
    lines, before = [], (0, 0.0)
    with loop_device(directory, SIZE, direct=True) as device:
        bench = Bench(directory, device)
        bench.create(["scale"])
        text = bench.text()
        for count in (SIZES[-1], *LARGEST):
            volumes = new_volumes(count)
            bench.fill(text, volumes)
            scale = Scale(Table(), bench, volumes)
            took, parts = _spent(scale)
            lines.append(f"one extend with {count:,} volumes: {took * 1000:.0f} ms ({parts})")
            if took > 1:
                share = (1 - before[1]) / (took - before[1])
                at = round(before[0] + share * (count - before[0]), -2)
                return [*lines, f"one extend passes one second at about {at:,.0f} volumes"]
            before = (count, took)
    return lines


def _spent(scale: Scale) -> tuple[float, str]:
    """Seconds that one extend takes, and on what."""
    bench, group, first = scale.bench, scale.bench.group, scale.volumes[0]
    extend, bare, read = [], [], []
    for _ in range(ROUNDS):
        group.read()
        change = ExtendLv(first.name, scale.grown(first))
        extend.append(wall(functools.partial(group.apply, change)))
        bare.append(scale.bare_extend(bench.lvm))
        read.append(wall(lambda: bench.lvm("vgs", bench.name)))
    took = low(extend)
    parts = {
        "lvm reads and parses": low(read),
        "lvm checks and writes": low(bare) - low(read),
        "ours": took - low(bare),
    }
    return took, ", ".join(f"{name} {value / took:.0%}" for name, value in parts.items())


# -- all of it ------------------------------------------------------------------------------------


def main() -> int:
    chosen = options()
    sizes = [size for size in SIZES if size <= QUICK] if chosen.quick else SIZES
    table, remarks = Table(), []
    with directory() as place:
        reading_slots(table, place)
        looks_at_scale(table, place, sizes)
        at_scale(table, place, sizes)
        if not chosen.quick:
            remarks = one_second(place)
    return conclude(table.rows, remarks, chosen.json)


if __name__ == "__main__":
    sys.exit(main())
