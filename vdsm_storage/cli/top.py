# SPDX-License-Identifier: GPL-2.0-or-later
"""`vdsm-client thin top`: a table of the disks that grow, always fresh.

A program of its own, because importing rich takes longer than a whole plain call.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

from rich import box
from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from vdsm_storage.cli.options import UsageError, connect, parser, told
from vdsm_storage.cli.points import bytes_text
from vdsm_storage.rpc.client import Client, NoResponse, RemoteError

WIDE: Final = 1000  # characters of a row in a file or a pipe: all of it
SOONEST: Final = 0.25  # seconds between two looks, however many events come
BAR: Final = 12  # characters
SOON: Final = 600.0  # seconds: a volume group that is full by then is worth a word
NEVER: Final = float("inf")

COLOURS: Final[Mapping[str, str]] = {
    "armed": "green", "extending": "cyan", "throttled": "yellow", "full": "bold red",
    "unarmed": "magenta", "polled": "blue", "at limit": "dim",
}  # fmt: skip
# (heading, how soon a narrow terminal does without it; 0 is never)
COLUMNS: Final = (
    ("VM", 0), ("drive", 0), ("state", 0), ("rate", 0), ("written", 2), ("size", 0), ("free", 0),
    ("lasts", 1), ("threshold", 10), ("headroom", 5), ("extends", 6), ("latency", 7), ("worst", 8),
    ("pauses", 3), ("avoided", 11), ("throttle", 9), ("full in", 4),
)  # fmt: skip
GAP: Final = 2  # characters between columns
LEFT: Final = frozenset(("VM", "drive", "state", "written"))
SHORTEST, LONGEST = 6, 32  # characters of a VM's name, which is cut where it does not fit
SHORT_TIMES: Final = (("d", 86400.0), ("h", 3600.0), ("min", 60.0), ("s", 1.0))


@dataclass(frozen=True)
class Disk:
    """A disk that grows, as Host.getAllVmStats tells it (schema: VmDiskThin).  Bytes, seconds."""

    vm: str
    drive: str
    thin: Mapping[str, str]

    def number(self, key: str) -> float:
        return float(self.thin.get(key) or 0)

    @property
    def state(self) -> str:
        return self.thin.get("state", "")

    @property
    def free(self) -> float:
        return max(0.0, self.number("size") - self.number("allocation"))

    @property
    def lasts(self) -> float:
        """Seconds until the guest has used what is free; 0 for one that waits for space."""
        if self.state == "full":
            return 0.0
        rate = self.number("writeRate")
        if rate <= 0 or self.state == "at limit":
            return NEVER
        return self.free / rate


def disks_of(stats: Sequence[Mapping[str, Any]]) -> list[Disk]:
    """Those that will need more space first come first."""
    found = [
        Disk(str(vm.get("vmName") or vm["vmId"]), drive, disk["thin"])
        for vm in stats
        for drive, disk in (vm.get("disks") or {}).items()
        if disk.get("thin")
    ]
    return sorted(found, key=lambda disk: (disk.lasts, disk.vm, disk.drive))


def cells(disk: Disk) -> Iterator[Text]:
    """One a column."""
    number = disk.number
    yield plain(disk.vm)
    yield plain(disk.drive)
    yield Text(disk.state, COLOURS.get(disk.state, ""))
    yield _rate(number("writeRate"))
    yield bar(number("allocation"), number("size"), number("threshold"))
    yield Text(bytes_text(number("size")))
    yield Text(bytes_text(disk.free))
    yield Text(short_time(disk.lasts))
    yield Text(bytes_text(number("threshold")) if number("threshold") else "-")
    yield Text(bytes_text(number("headroom")))
    yield Text(disk.thin.get("extends", ""))
    yield _latency(number("lastLatency"))
    yield _latency(number("maxLatency"))
    yield Text(disk.thin.get("pauses", ""), "bold red" if number("pauses") else "")
    yield Text(disk.thin.get("pausesAvoided", ""))
    yield _throttle(number("throttle"), number("throttleTime"))
    yield _full(disk)


def plain(words: str) -> Text:
    """A name, or an error's text: no escape sequence of it reaches the terminal."""
    shown = "".join(letter if letter.isprintable() else "?" for letter in words)
    return Text(shown if len(shown) <= LONGEST else shown[: LONGEST - 1] + "…")


def bar(written: float, size: float, threshold: float) -> Text:
    """How much of the volume is written, and where the threshold is."""
    part = min(1.0, written / size) if size else 0.0
    done = round(part * BAR)
    text = Text.assemble(("█" * done, "blue"), ("░" * (BAR - done), "dim"))
    if 0 < threshold < size:
        place = min(BAR - 1, int(threshold / size * BAR))
        mark = Text("┃", "red") if written >= threshold else Text("│", "green")
        text = text[:place] + mark + text[place + 1 :]
    return text + f" {100 * part:3.0f} %"


def _rate(count: float) -> Text:
    return Text(f"{bytes_text(count)}/s" if count else "-")


def short_time(seconds: float) -> str:
    """
    >>> short_time(0.25), short_time(90), short_time(90000), short_time(NEVER)
    ('0.25 s', '1.5 min', '25 h', '-')
    """
    if seconds == NEVER:
        return "-"
    for name, factor in SHORT_TIMES[:-1]:
        if seconds >= (2 if name == "d" else 1) * factor:
            return f"{seconds / factor:.3g} {name}"
    return f"{seconds:.2g} s"


def _latency(seconds: float) -> Text:
    return Text(f"{1000 * seconds:.0f} ms" if seconds else "-")


def _throttle(rate: float, seconds: float) -> Text:
    """The limit that is in force; for how long there was one."""
    text = _rate(rate)
    text.stylize("yellow")
    return text + f" ({short_time(seconds)})" if seconds else text


def _full(disk: Disk) -> Text:
    left = disk.thin.get("timeToFull")
    if left is None:
        return Text("-")
    return Text(short_time(float(left)), "bold red" if float(left) < SOON else "")


def table(disks: Sequence[Disk], columns: int, caption: str = "") -> Table:
    """As many columns as `columns` characters hold, the less needed ones are left out."""
    rows = [list(cells(disk)) for disk in disks]
    widths = [
        max([len(name), *(len(row[index]) for row in rows)])
        for index, (name, _) in enumerate(COLUMNS)
    ]
    made = Table(
        box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False,
        caption=Text(caption), caption_justify="left",
    )  # fmt: skip
    shown = fitting(widths, columns)
    for index in shown:
        name = COLUMNS[index][0]
        least = min(widths[index], SHORTEST) if name == "VM" else widths[index]
        side: Literal["left", "right"] = "left" if name in LEFT else "right"
        made.add_column(name, justify=side, no_wrap=True, min_width=least)
    for row in rows:
        made.add_row(*(row[index] for index in shown))
    return made


def fitting(widths: Sequence[int], columns: int) -> list[int]:
    """Which columns of these widths are shown, by their places."""
    order = sorted(range(len(COLUMNS)), key=lambda index: COLUMNS[index][1])
    shown: list[int] = []
    used = GAP
    for index in order:
        used += widths[index] + GAP
        if used > columns and COLUMNS[index][1] > 0:
            break
        shown.append(index)
    return sorted(shown)


def view(disks: Sequence[Disk], columns: int, trouble: str = "") -> Table:
    words = [trouble] if trouble else []
    if not disks and not trouble:
        words.append("No disk of a running VM grows")
    words += [
        f"{disk.vm} {disk.drive}: {disk.thin['error']}" for disk in disks if disk.thin.get("error")
    ]
    safe = ["".join(letter if letter.isprintable() else " " for letter in each) for each in words]
    return table(disks, columns, "\n".join(safe))


def once(client: Client, console: Console, flow_id: str) -> int:
    found = disks_of(client.call("Host.getAllVmStats", flow_id=flow_id))
    if not console.is_terminal:
        console.width = WIDE
    console.print(view(found, console.width))
    return 0


def follow(client: Client, live: Live, interval: float, flow_id: str) -> None:
    """Until interrupted."""
    client.subscribe()
    found: Sequence[Disk] = ()
    while True:
        trouble = ""
        try:
            for _ in client.events(0):
                pass  # what came up to now is in the answer
            found = disks_of(client.call("Host.getAllVmStats", flow_id=flow_id))
        except RemoteError as error:
            trouble = f"{error.message}; trying again"
        live.update(view(found, live.console.width, trouble), refresh=True)
        time.sleep(SOONEST)
        wait(client, interval - SOONEST)


def wait(client: Client, seconds: float) -> None:
    """Until the agent tells of anything, or for `seconds`."""
    if seconds <= 0:
        return
    try:
        for _ in client.events(seconds):
            break
    except NoResponse:
        time.sleep(seconds)


def run(arguments: argparse.Namespace, console: Console) -> int:
    if len(arguments.words) != 2:
        raise UsageError(f"thin top takes no {' '.join(arguments.words[2:])}")
    with connect(arguments) as client:
        if arguments.once or not console.is_terminal:
            return once(client, console, arguments.flow_id)
        try:
            with Live(console=console, auto_refresh=False, screen=True) as live:
                follow(client, live, arguments.interval, arguments.flow_id)
        except KeyboardInterrupt:
            return 0
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    words = sys.argv[1:] if argv is None else argv
    return told(lambda: run(parser().parse_intermixed_args(words), Console()))


if __name__ == "__main__":
    sys.exit(main())
