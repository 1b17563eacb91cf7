# SPDX-License-Identifier: GPL-2.0-or-later
"""Dirty bitmaps of volumes that no guest uses: SDM.add_bitmap, remove_bitmap, clear_bitmaps.

A bitmap whose writer died is `in-use` in the file: its bits are worthless, and it can only be
removed.  Nothing here fails over such leftovers.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

from vdsm_storage.errors import (
    AddBitmapError,
    BitmapDoesNotExist,
    CommandError,
    IncorrectFormat,
    InvalidParameter,
    RemoveBitmapError,
    VolumeDoesNotExist,
)
from vdsm_storage.host.qemu_img import QCOW2, Image, QemuImg
from vdsm_storage.host.qemu_img_output import Bitmap
from vdsm_storage.images import guard, layers
from vdsm_storage.images import metadata as md
from vdsm_storage.images.chain import Member
from vdsm_storage.images.guard import Guard, VolumeRef
from vdsm_storage.jobs.operation import Kind, Operation
from vdsm_storage.jobs.runner import Request

ADD = "volume.add_bitmap"
REMOVE = "volume.remove_bitmap"
CLEAR = "volume.clear_bitmaps"
_NAME = re.compile(r"[0-9A-Za-z_.:+][0-9A-Za-z_.:+\-]{0,1022}")
_Change = Callable[[str, tuple[Bitmap, ...]], None]
_VERBS: Mapping[str, str] = {ADD: "add_bitmap", REMOVE: "remove_bitmap", CLEAR: "clear_bitmaps"}


def bitmap_job(
    kind: str, target: VolumeRef, generation: int | None, bitmap: str | None = None
) -> Request:
    """`kind` is ADD, REMOVE or CLEAR (all bitmaps).  Raises InvalidParameter (1000)."""
    if bitmap is not None and not _NAME.fullmatch(bitmap):
        raise InvalidParameter(
            parameter="bitmap", value=repr(bitmap), reason="use letters, digits, - _ . : and +"
        )
    verb = _VERBS[kind]
    return Request(
        kind=kind,
        params={**target.as_params(), "generation": generation, "bitmap": bitmap},
        domains=[target.domain],
        verb=verb,
        lane=target.domain,
        description=f"{verb} {bitmap or ''} on volume {target.volume}",
    )


class Bitmaps:
    """Jobs on the bitmaps of one volume."""

    def __init__(self, guard: Guard, qemu_img: QemuImg) -> None:
        self._guard = guard
        self._qemu_img = qemu_img

    def kinds(self) -> list[Kind]:
        steps = ("locked", "changed", "done")
        return [
            Kind(ADD, steps, self._add, self._recover_add),
            Kind(REMOVE, steps, self._remove, self._recover),
            Kind(CLEAR, steps, self._clear, self._recover),
        ]

    def _add(self, op: Operation) -> None:
        def add(path: str, found: tuple[Bitmap, ...]) -> None:
            if any(bitmap.name == op.params["bitmap"] for bitmap in found):
                raise AddBitmapError(
                    bitmap=op.params["bitmap"], volume=op.params["volume"], reason="it exists"
                )
            op.record(adding=True)
            try:
                self._qemu_img.bitmap_add(path, op.params["bitmap"])
            except CommandError as error:
                raise AddBitmapError(
                    bitmap=op.params["bitmap"], volume=op.params["volume"], reason=error
                ) from error

        self._change(op, add)

    def _remove(self, op: Operation) -> None:
        def remove(path: str, found: tuple[Bitmap, ...]) -> None:
            if all(bitmap.name != op.params["bitmap"] for bitmap in found):
                raise BitmapDoesNotExist(volume=op.params["volume"], bitmap=op.params["bitmap"])
            self._drop(op, path, op.params["bitmap"])

        self._change(op, remove)

    def _clear(self, op: Operation) -> None:
        def clear(path: str, found: tuple[Bitmap, ...]) -> None:
            for number, bitmap in enumerate(found):
                op.cancel.check()
                self._drop(op, path, bitmap.name)
                op.progress((number + 1) / len(found))

        self._change(op, clear)

    def _drop(self, op: Operation, path: str, name: str) -> None:
        try:
            self._qemu_img.bitmap_remove(path, name)
        except CommandError as error:
            raise RemoveBitmapError(
                bitmap=name, volume=op.params["volume"], reason=error
            ) from error

    def _change(self, op: Operation, change: _Change) -> None:
        """Run `change(path, bitmaps)` under the generation protocol; legality is not touched."""
        target = VolumeRef.from_params(op.params)
        with self._guard.writing(target) as store:
            op.step("locked")
            found = store.load(target.image, target.volume)
            if found.format != md.COW:
                raise IncorrectFormat(volume=target.volume, reason="only COW holds bitmaps")
            guard.check_generation(target.volume, found.generation, op.params["generation"])
            op.record(generation=found.generation)
            with guard.generation(store, target, found.generation, illegal=False):
                with guard.active(store, target.image, [target.volume], prepared=False):
                    member = Member(target.image, target.volume, found)
                    info = layers.check_header(store, self._qemu_img, member)
                    change(store.path(target.image, target.volume), info.bitmaps)
                op.step("changed", abortable=False)
        op.step("done", abortable=False)

    # -- recovery ----------------------------------------------------------------------------

    def _recover(self, op: Operation) -> bool:
        """What is left to remove can be removed by another job: nothing to take back."""
        return self._ended(op)

    def _recover_add(self, op: Operation) -> bool:
        """A bitmap that was added without the generation saying so is taken away again."""
        if self._ended(op):
            return True
        if not op.facts.get("adding"):
            return False
        target = VolumeRef.from_params(op.params)
        try:
            with self._guard.writing(target) as store:
                now = store.load(target.image, target.volume)
                if now.generation != op.facts["generation"]:
                    return False  # fenced: it belongs to someone else now
                path = store.path(target.image, target.volume)
                with guard.active(store, target.image, [target.volume], prepared=False):
                    bitmaps = self._qemu_img.info(Image(path, QCOW2)).bitmaps
                    if any(bitmap.name == op.params["bitmap"] for bitmap in bitmaps):
                        self._qemu_img.bitmap_remove(path, op.params["bitmap"])
        except VolumeDoesNotExist:
            return False
        return False

    def _ended(self, op: Operation) -> bool:
        """Whether the volume's generation says that the job came to its end."""
        before = op.facts.get("generation")
        if before is None:
            return False
        target = VolumeRef.from_params(op.params)
        try:
            now = self._guard.store(target.domain).load(target.image, target.volume)
        except VolumeDoesNotExist:
            return False
        return now.generation == guard.following(before)
