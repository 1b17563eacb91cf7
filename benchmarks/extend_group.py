# SPDX-License-Identifier: GPL-2.0-or-later
"""For extend.py: a domain with N volumes, disks that want more all at once, and lvm bare."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import socket
import statistics
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.loop_volumes import Pieces, piece
from benchmarks.scale_agent import Domain
from benchmarks.scale_group import EXTENT, FIRST_EXTENT, Volume, new_volumes
from benchmarks.table import wall
from functional.processes import AgentProcess
from functional.standin.process import ROOT
from vdsm_storage.domains.block_slots import slot_offset
from vdsm_storage.images.metadata import VolumeMetadata
from vdsm_storage.lvm.changes import ExtendLv

PATIENCE = 60.0  # seconds until what was wanted must be there
LOOK = 0.0002  # seconds between two looks at the devices of a few disks
REST = 0.05  # seconds
CONTROL = "bench.sock"
SINGLES = 3
# Extents from one volume to the next: what they may grow to.
SINGLE_GAP, STORM_GAP, WRITER_GAP = 1024, 24, 256
# One extent after the other, so that any number of rounds has the same work to do.
STEADY = {
    "headroom_min": EXTENT, "headroom_max": EXTENT, "chunk_min": EXTENT, "chunk_max": EXTENT
}  # fmt: skip


class BenchProcess(AgentProcess):
    """The agent of extend_agent.py; `pieces` is the directory of loop_volumes.py, if any."""

    pieces: Path | None = None

    @property
    def control(self) -> str:
        return f"{self.dir}-{CONTROL}"

    def _program(self) -> list[str]:
        code = (
            f"import sys; sys.path.append({str(ROOT)!r})\n"
            "from benchmarks.extend_agent import main; sys.exit(main())"
        )
        pieces = [] if self.pieces is None else ["--pieces", str(self.pieces)]
        return [sys.executable, "-P", "-c", code, "--control", self.control, *pieces]


class Control:
    """What extend_agent.py is told; `begin` does not wait for the answer."""

    def __init__(self, path: str) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.settimeout(PATIENCE)
        self._socket.connect(path)
        self._file = self._socket.makefile("rwb")

    def begin(self, do: str, **arguments: Any) -> None:
        self._file.write(json.dumps({"do": do, **arguments}).encode() + b"\n")
        self._file.flush()

    def end(self) -> Any:
        answer = json.loads(self._file.readline())
        if not answer["ok"]:
            raise SystemExit(f"the agent says: {answer['error']}")
        return answer["result"]

    def call(self, do: str, **arguments: Any) -> Any:
        self.begin(do, **arguments)
        return self.end()

    def watch(
        self, drives: Sequence[Sequence[str]], policy: dict[str, Any],
        qmp: Mapping[str, str] | None = None, latencies: Sequence[float] = (),
    ) -> None:  # fmt: skip
        """`qmp`: by VM, the monitor of what writes its disk."""
        self.call("watch", drives=drives, policy=policy, qmp=qmp or {}, latencies=list(latencies))
        self.wait_settled()

    def wait_settled(self) -> None:
        end = time.monotonic() + PATIENCE
        while not self.call("settled"):
            if time.monotonic() > end:
                raise SystemExit(f"disks are not watched: {self.call('facts')}")
            time.sleep(0.002)

    def close(self) -> None:
        self._file.close()
        self._socket.close()


@dataclass
class Times:
    """Seconds; of one kind of extension."""

    name: str
    count: int  # volumes in the group
    seconds: list[float] = field(default_factory=list)

    def at(self, share: float) -> float:
        ordered = sorted(self.seconds)
        return ordered[min(len(ordered) - 1, int(len(ordered) * share))]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    def shown(self) -> dict[str, Any]:
        return {
            "what": self.name, "volumes": self.count, "times": len(self.seconds),
            "p50": self.median, "p99": self.at(0.99), "max": max(self.seconds),
        }  # fmt: skip


@dataclass
class Storm:
    """One round: seconds of each disk, and what the agent did for all of them."""

    seconds: list[float]
    commits: int


@dataclass(frozen=True)
class Volumes:
    """Those of a group, by what they are for: all grow in one piece."""

    all: Sequence[Volume]
    places: Sequence[int]  # extents

    @classmethod
    def new(cls, count: int, storm: int, writers: int) -> Volumes:
        gaps = [SINGLE_GAP] * SINGLES + [STORM_GAP] * storm + [WRITER_GAP] * writers
        gaps += [1] * (count - len(gaps))
        places = itertools.accumulate(gaps[:-1], initial=FIRST_EXTENT)
        return cls(new_volumes(count), list(places))

    @property
    def ours(self) -> Volume:
        return self.all[0]

    @property
    def bare(self) -> Volume:
        return self.all[1]

    @property
    def guest(self) -> Volume:
        return self.all[2]

    def storm(self, count: int) -> Sequence[Volume]:
        return self.all[SINGLES : SINGLES + count]

    def writers(self, storm: int, count: int) -> Sequence[Volume]:
        return self.all[SINGLES + storm : SINGLES + storm + count]


class Subject:
    """The domain with volumes in its group, which none are in at first."""

    def __init__(self, domain: Domain, control: Control) -> None:
        self.domain, self.control = domain, control
        self.bench = domain.bench
        self._text = self.bench.text()
        self._sizes: dict[str, int] = {}

    def fill(self, volumes: Volumes) -> None:
        """None of those that were there before may be active."""
        self.bench.fill(self._text, volumes.all, volumes.places)
        self._sizes = {volume.name: EXTENT for volume in volumes.all}
        self.domain.see_changes()

    def write_slots(self, volumes: Sequence[Volume], fmt: str, capacity: int) -> None:
        """The metadata of volumes, as the format wants it."""
        kind = "SPARSE" if fmt == "COW" else "PREALLOCATED"
        with open(self.path("metadata"), "r+b", buffering=0) as file:
            for volume in volumes:
                assert volume.slot is not None
                metadata = VolumeMetadata(
                    domain=self.domain.id, image=volume.image, capacity=capacity, format=fmt,
                    type=kind, voltype="LEAF", disktype="DATA", ctime=1700000000,
                )  # fmt: skip
                file.seek(slot_offset(volume.slot, 5))
                file.write(metadata.encode_slot(5, volume.name))

    def path(self, volume: str) -> str:
        return self.domain.activation.path(self.domain.id, volume)

    @contextlib.contextmanager
    def prepared(
        self, volumes: Sequence[Volume], fmt: str = "RAW", capacity: int = EXTENT
    ) -> Iterator[list[str]]:
        """Usable on this host, as guests that start make them; gives the paths for them."""
        self.write_slots(volumes, fmt, capacity)
        client = self.domain.client
        ids = [self.domain.ids(volume.image, volume.name) for volume in volumes]
        asked = [client.submit("Image.prepare", each) for each in ids]
        try:
            yield [pending.result(PATIENCE)["path"] for pending in asked]
        finally:
            for pending in [client.submit("Image.teardown", each) for each in ids]:
                pending.result(PATIENCE)

    def drive(self, volume: Volume) -> list[str]:
        """Of a VM of its own."""
        return [str(uuid.uuid4()), self.domain.id, volume.image, volume.name]

    # -- growing -----------------------------------------------------------------------------

    def grow(self, volume: Volume, size: int) -> None:
        """By lvm; not active."""
        self._sizes[volume.name] = size
        self.bench.lvm(*self._extend(volume))
        self.domain.see_changes()

    def _extend(self, volume: Volume) -> Sequence[str]:
        [argv] = self.bench.commands(ExtendLv(volume.name, self._sizes[volume.name]))
        return argv

    def bare(self, volume: Volume) -> float:
        """Seconds that lvm takes for one extent more, and for the device to have it."""
        self._sizes[volume.name] += EXTENT
        argv = self._extend(volume)
        time.sleep(REST)  # or lvm would pay for the CPU that we have just used
        took = wall(lambda: self.bench.lvm(*argv))
        took += wall(self._refresh(volume))
        if self.size(volume) != self._sizes[volume.name]:
            raise SystemExit(f"{volume.name} has {self.size(volume)} bytes")
        return took

    def _refresh(self, volume: Volume) -> Callable[[], object]:
        """What is found out before it is not counted."""
        activation, bench = self.domain.activation, self.bench
        if isinstance(activation, Pieces):
            size = piece(bench.group.read(), bench.group.devices(), volume.name)[2]
            return lambda: activation.resize(bench.name, volume.name, size)
        name = f"{bench.name}/{volume.name}"
        argv = ["lvchange", "--yes", "--autobackup", "n", "--refresh", name]
        return lambda: bench.ours.run(argv, [bench.device], vg=bench.name, driver=True)

    def size(self, volume: Volume) -> int:
        with open(self.path(volume.name), "rb") as device:
            return device.seek(0, os.SEEK_END)

    def storm(self, fds: Sequence[int]) -> Storm:
        """Guests of all disks that are watched write past their thresholds at once; `fds` are
        their devices.  Everything is done when it returns."""
        before = self.bench.group.read().seqno
        sizes = [os.lseek(fd, 0, os.SEEK_END) for fd in fds]
        pause = LOOK * max(1, len(fds) // 25)
        seconds = [0.0] * len(fds)
        began = time.perf_counter()
        self.control.begin("cross")
        left = list(range(len(fds)))
        while left:
            now = time.perf_counter() - began
            if now > PATIENCE:
                raise SystemExit(f"{len(left)} disks do not grow: {self.control.call('facts')}")
            still = [each for each in left if os.lseek(fds[each], 0, os.SEEK_END) <= sizes[each]]
            if len(still) < len(left):
                for each in set(left) - set(still):
                    seconds[each] = now
                left = still
            time.sleep(pause)
        self.control.end()
        self.control.wait_settled()
        return Storm(seconds, self.bench.group.read().seqno - before)


@contextlib.contextmanager
def opened(paths: Sequence[str]) -> Iterator[list[int]]:
    fds: list[int] = []
    try:
        fds += [os.open(path, os.O_RDONLY) for path in paths]
        yield fds
    finally:
        for fd in fds:
            os.close(fd)


def progress(text: str) -> None:
    if "-v" in sys.argv:
        print(text, file=sys.stderr, flush=True)
