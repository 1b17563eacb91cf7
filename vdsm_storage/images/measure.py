# SPDX-License-Identifier: GPL-2.0-or-later
"""Volume.measure: how much storage a copy of a volume needs."""

from __future__ import annotations

from vdsm_storage.errors import CommandError, UnsupportedOperation, VolumeIsNotInChain
from vdsm_storage.host.qemu_img import QCOW2, RAW, QemuImg
from vdsm_storage.host.qemu_img_output import Measure
from vdsm_storage.images import chain, guard, layers
from vdsm_storage.images import metadata as md
from vdsm_storage.images.chain import Member
from vdsm_storage.images.guard import VolumeRef
from vdsm_storage.images.store import Store


def measure(
    qemu_img: QemuImg,
    store: Store,
    ref: VolumeRef,
    target_format: str,
    base: str | None = None,
    *,
    with_backing: bool = True,
) -> int:
    """Bytes that a copy in `target_format` (RAW or COW) takes, with room for its bitmaps.

    Of the whole chain; of the volume's own layer without `with_backing`; of the layers from
    `base` (its UUID) to the volume when that is given.  Raises 201, 227, 262, 920, 2009.
    """
    members = chain.walk(store, ref.image, ref.volume)
    names = [member.volume for member in members]
    if base is not None and base not in names:
        raise VolumeIsNotInChain(volume=base, image=ref.image, chain=", ".join(names))
    with guard.active(store, ref.image, names, prepared=False):
        layers.check_headers(store, qemu_img, members)
        try:
            found = _measure(qemu_img, store, members, target_format, base, with_backing)
        except CommandError as error:
            raise UnsupportedOperation(
                operation=f"measuring volume {ref.volume}", reason=error
            ) from error
    return found.required + (found.bitmaps if target_format == md.COW else 0)


def _measure(
    qemu_img: QemuImg,
    store: Store,
    members: list[Member],
    target_format: str,
    base: str | None,
    with_backing: bool,
) -> Measure:
    top, target = layers.layer(store, members[-1]), QCOW2 if target_format == md.COW else RAW
    if base is not None and with_backing:
        volumes = [member.volume for member in members]
        part = [layers.layer(store, member) for member in members[volumes.index(base) :]]
        return qemu_img.measure_layers(part, target)
    return qemu_img.measure(top, target, with_backing)
