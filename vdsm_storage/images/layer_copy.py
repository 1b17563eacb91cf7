# SPDX-License-Identifier: GPL-2.0-or-later
"""One volume's data written into a volume that is not published yet."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from vdsm_storage.base.cancel import Cancel
from vdsm_storage.base.pace import Pace
from vdsm_storage.base.uuids import BLANK
from vdsm_storage.errors import CommandError, CopyImageError
from vdsm_storage.host.qemu_img import QCOW2, Conversion, Image, QemuImg, Watch
from vdsm_storage.images import guard, layers, sizing
from vdsm_storage.images import metadata as md
from vdsm_storage.images.chain import Member
from vdsm_storage.images.metadata import VolumeMetadata
from vdsm_storage.images.store import NewVolume, Store


@dataclass(frozen=True)
class Target:
    """A volume in the making; with a parent (in the same image) only one layer is copied.

    One that is not `fresh` may hold data of an earlier attempt.
    """

    store: Store
    image: str
    volume: str
    metadata: VolumeMetadata
    backing_format: str | None = None
    fresh: bool = True

    def make(self, size: int) -> None:
        """Allocate `size` bytes for it; nothing is listed yet.  Raises 212, 397, 504."""
        raw = self.metadata.format == md.RAW
        full = self.metadata.type == md.PREALLOCATED
        parent = self.metadata.parent
        self.store.make(NewVolume(self.image, self.volume, size, full, raw, parent))

    def made(self) -> VolumeMetadata:
        """Its metadata now that it has its storage: a raw volume on a device has all of that."""
        if not self.store.is_block or self.metadata.format != md.RAW:
            return self.metadata
        size = self.store.sizes(self.image, self.volume).apparent
        return self.metadata.with_(type=md.PREALLOCATED, capacity=size)


@dataclass(frozen=True)
class Following:
    """How the copy is watched: told fractions of the whole, asked to stop, how fast it may go."""

    progress: Callable[[float], None]
    cancel: Cancel
    pace: Pace


def allocation(
    qemu: QemuImg, source_store: Store, source: Sequence[Member], to: Target
) -> int:
    """Bytes that `to` needs for the top of the chain `source`, or all of it without a parent.

    Raises 227, 262.
    """
    capacity = to.metadata.capacity
    if not to.store.is_block or to.metadata.format == md.RAW:
        return capacity
    if to.metadata.type == md.PREALLOCATED:
        return sizing.cow_size(capacity, None, preallocated=True)
    top, below = source[-1], [member.volume for member in source]
    whole = to.metadata.parent == BLANK
    with guard.active(source_store, top.image, below, prepared=False):
        layers.check_headers(source_store, qemu, source)
        needed = qemu.measure(layers.layer(source_store, top), QCOW2, with_backing=whole)
    leaf = to.metadata.voltype == md.LEAF
    return sizing.copied_size(needed.required + needed.bitmaps, capacity, leaf=leaf)


def copy_layer(
    qemu: QemuImg, source_store: Store, source: Sequence[Member], to: Target, how: Following
) -> None:
    """Copy the top of the chain `source`, or all that it shows if `to` has no parent.

    Raises CopyImageError (261), PrepareIllegalVolume (227), ImageIsNotLegalChain (262).
    """
    top = source[-1]
    below = [member.volume for member in source]
    parent = to.metadata.parent if to.backing_format is not None else None
    raw = to.metadata.format == md.RAW
    full = to.metadata.type == md.PREALLOCATED
    conversion = Conversion(
        source=layers.layer(source_store, top),
        target=Image(to.store.path(to.image, to.volume), layers.qemu_format(to.metadata)),
        compat=layers.compat(to.store),
        backing=parent,
        backing_format=to.backing_format,
        create=not raw,
        is_zero=raw and not full and to.fresh and not to.store.is_block,
        sparse=not (raw and full),
    )
    # qemu-img opens what a new layer is based on: volumes of the same names as at the source.
    written = [to.volume] if parent is None else [*below[:-1], to.volume]
    with (
        guard.active(source_store, top.image, below, prepared=False),
        guard.active(to.store, to.image, written, prepared=False),
    ):
        info = layers.check_headers(source_store, qemu, source)
        if not to.fresh:  # else what lies below was made just now, and is not published
            layers.check_below(to.store, to.image, parent)
        keeps = not raw and conversion.compat != "0.10"  # qcow2 0.10 holds no bitmaps
        conversion = replace(conversion, bitmaps=keeps and bool(info.bitmaps))
        try:
            qemu.convert(conversion, Watch(how.progress, how.cancel, how.pace))
        except CommandError as error:
            raise CopyImageError(volume=to.volume, reason=error) from error
