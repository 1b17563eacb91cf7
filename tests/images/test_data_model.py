# SPDX-License-Identifier: GPL-2.0-or-later
"""Random histories of a disk: whatever was done to its chain, a guest reads what it wrote."""

from __future__ import annotations

import random
import subprocess

import pytest

from vdsm_storage.images import chain
from vdsm_storage.images import metadata as md
from vdsm_storage.images.copy import CopyRequest
from vdsm_storage.images.merge import MergeRequest
from vdsm_storage.images.sparsify import sparsify_job

MIB = 1024 * 1024
BLOCK = 65536


class Disk:
    """A chain on storage and, beside it, the bytes that its leaf must show."""

    def __init__(self, lab, seed, raw_base):
        self.lab, self.random = lab, random.Random(seed)
        self.store = lab.domain()
        self.refs = [lab.volume(self.store, cow=not raw_base)]
        self.data = bytearray(2 * MIB)

    @property
    def size(self):
        return len(self.data)

    def write(self):
        start = self.random.randrange(self.size // BLOCK) * BLOCK
        length = min(self.random.randrange(1, 12) * BLOCK, self.size - start)
        pattern = self.random.choice([0, 1, 2, 255])
        self.lab.write(self.refs[-1], start, length, pattern)
        self.data[start : start + length] = bytes([pattern]) * length

    def snapshot(self):
        size = self.size + self.random.choice([0, 0, MIB])
        self.refs.append(self.lab.volume(self.store, parent=self.refs[-1], size=size))
        self.data += bytes(size - self.size)

    def merge(self):
        if len(self.refs) == 1:
            return
        place = self.random.randrange(len(self.refs) - 1)
        low, top = self.refs[place], self.refs[place + 1]
        bitmaps = self.random.random() < 0.5
        asked = MergeRequest(low.domain, low.image, low.volume, top.volume, None, bitmaps)
        for request in (asked.prepare_task(), asked.merge_job(), asked.finalize_task()):
            if self.random.random() < 0.2:
                points = self.lab.points(request.kind)
                if place == len(self.refs) - 2:  # nothing is above top
                    points = [p for p in points if not p.endswith((":rebased", ":child"))]
                running = self.lab.crash(request, self.random.choice(points))
                if running.entry.outcome == "success":
                    continue
                if request.kind == "merge.run":
                    self.check()
            self.lab.run(request)
        self.store.unmake(top.image, top.volume)
        del self.refs[place + 1]

    def copy(self):
        """Go on with a copy of all of it, in one volume."""
        copy = self.lab.volume(self.store, size=self.size, cow=self.random.random() < 0.7)
        self.lab.run(CopyRequest(self.refs[-1], copy).as_job())
        self.refs = [copy]

    def sparsify(self):
        self.lab.run(sparsify_job(self.refs[-1], None))

    def check(self):
        raw = self.lab.root / "model.raw"
        argv = ["qemu-img", "dd", "-f", self.lab.format(self.refs[-1]), "-O", "raw", "bs=1M"]
        subprocess.run([*argv, f"if={self.lab.path(self.refs[-1])}", f"of={raw}"], check=True)
        assert raw.read_bytes() == self.data
        walked = chain.walk(self.store, self.refs[-1].image, self.refs[-1].volume)
        assert [member.volume for member in walked] == [ref.volume for ref in self.refs]
        assert self.lab.leftovers(self.store) == []


@pytest.mark.parametrize("raw_base", [True, False])
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_history(datalab, seed, raw_base):
    disk = Disk(datalab, seed, raw_base)
    for _ in range(25):
        step = disk.random.choices(
            [disk.write, disk.snapshot, disk.merge, disk.copy, disk.sparsify], [8, 5, 4, 1, 1]
        )[0]
        step()
        disk.check()
    legal = [datalab.metadata(ref).legality for ref in disk.refs]
    assert set(legal) == {md.LEGAL}
