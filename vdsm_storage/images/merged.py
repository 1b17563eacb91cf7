# SPDX-License-Identifier: GPL-2.0-or-later
"""Whether a volume's data are in its base already: a look at samples before the volume goes.

finalizeMerge takes the upper volume out of the chain.  Asked for too early it would lose all that
a guest wrote there, so pieces of the upper layer are compared with what the base holds.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from vdsm_storage.base import files
from vdsm_storage.host.qemu_img import QCOW2, RAW, Image, QemuImg
from vdsm_storage.host.qemu_img_output import Extent

SAMPLES = 32
PIECE = 4096  # bytes compared of each sample


def missing_at(
    qemu_img: QemuImg, top: Image, base: Image, opened: Callable[[str], str]
) -> int | None:
    """The guest's offset of a sample of the layer `top` that the layer `base` does not hold.

    None when all samples are there.  Compressed clusters are not looked at.  `opened` gives the
    path to open for the path of a layer.
    """
    extents = [e for e in qemu_img.map_layer(top) if e.data and e.offset is not None]
    if not extents:
        return None
    below = qemu_img.map_layer(base) if base.format != RAW else None
    step = max(1, len(extents) // SAMPLES)
    above, under = opened(top.path), opened(base.path)
    for extent in extents[::step]:
        assert extent.offset is not None
        length = min(PIECE, extent.length)
        there = files.read_direct(above, length, extent.offset)
        if below is None:
            found = files.read_direct(under, length, extent.start)
        else:
            held = _holder(below, extent.start)
            if held is None or not held.present:
                return extent.start
            if held.zero:
                found = bytes(length)
            elif held.offset is None:
                continue
            else:
                place = held.offset + extent.start - held.start
                found = files.read_direct(under, length, place)
        if found.ljust(length, b"\0") != there.ljust(length, b"\0"):
            return extent.start
    return None


def absent_at(qemu_img: QemuImg, top: Image, base: Image) -> int | None:
    """The guest's offset of data in the layer `top` for which the layer `base` has no place at all.

    None when there is none, as in a raw base, encrypted or not.  Content is not looked at.
    """
    if base.format != QCOW2:
        return None
    holes = [e for e in qemu_img.map_layer(base) if not e.present]
    number = 0
    for extent in (e for e in qemu_img.map_layer(top) if e.data):
        end = extent.start + extent.length
        while number < len(holes) and holes[number].start + holes[number].length <= extent.start:
            number += 1
        if number < len(holes) and holes[number].start < end:
            return max(extent.start, holes[number].start)
    return None


def _holder(extents: Sequence[Extent], start: int) -> Extent | None:
    for extent in extents:
        if extent.start <= start < extent.start + extent.length:
            return extent
    return None
