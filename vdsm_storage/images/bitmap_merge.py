# SPDX-License-Identifier: GPL-2.0-or-later
"""What becomes of bitmaps when a volume is merged into its base.

A bitmap of the chain is the union of its parts in each layer.  A part that is broken makes the
whole worthless: it is removed from base, so that a backup tool sees that the checkpoint is gone
instead of missing changes.  A bitmap that only top has (its checkpoint came after the snapshot)
is added to base after the commit, so that it does not count what the commit wrote.
"""

from __future__ import annotations

from vdsm_storage.errors import CommandError, MergeBitmapError
from vdsm_storage.host.qemu_img import QemuImg
from vdsm_storage.host.qemu_img_output import Bitmap
from vdsm_storage.images import layers
from vdsm_storage.images.chain import Subchain
from vdsm_storage.images.store import Store


class BitmapMerge:
    """Use drop_broken() before the commit and merge() after it; both can be repeated."""

    def __init__(self, qemu_img: QemuImg, store: Store, sub: Subchain) -> None:
        self._qemu_img = qemu_img
        self._sub = sub
        self._base = layers.layer(store, sub.base)
        self._top = layers.layer(store, sub.top)
        self._broken: set[str] = set()

    def _bitmaps(self) -> tuple[dict[str, Bitmap], dict[str, Bitmap]]:
        """Of base and of top, by name; a raw base has none."""
        top = {b.name: b for b in self._qemu_img.info(self._top).bitmaps}
        if not self._sub.base.is_cow:
            return {}, top
        return {b.name: b for b in self._qemu_img.info(self._base).bitmaps}, top

    def drop_broken(self) -> None:
        """Remove from base what is broken there or in top."""
        in_base, in_top = self._bitmaps()
        every = {**in_top, **in_base}
        self._broken = {
            name
            for name in every
            if any(name in part and not part[name].valid for part in (in_base, in_top))
        }
        for name in sorted(self._broken & set(in_base)):
            try:
                self._qemu_img.bitmap_remove(self._base.path, name)
            except CommandError as error:
                raise self._failed(name, error) from error

    def merge(self) -> None:
        """Bring top's bitmaps into base.  Raises MergeBitmapError (1621)."""
        if not self._sub.base.is_cow:
            return
        in_base, in_top = self._bitmaps()
        for name, bitmap in sorted(in_top.items()):
            if name in self._broken or not bitmap.valid:
                continue
            try:
                if name not in in_base:
                    self._qemu_img.bitmap_add(
                        self._base.path, name, bitmap.granularity, enabled=bitmap.enabled
                    )
                self._qemu_img.bitmap_merge(self._top.path, name, self._base.path, name)
            except CommandError as error:
                raise self._failed(name, error) from error

    def _failed(self, name: str, error: CommandError) -> MergeBitmapError:
        sub = self._sub
        return MergeBitmapError(
            bitmap=name, top=sub.top.volume, base=sub.base.volume, reason=error
        )
