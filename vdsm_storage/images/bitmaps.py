# SPDX-License-Identifier: GPL-2.0-or-later
"""Dirty bitmaps of volumes that no guest uses: SDM.add_bitmap, remove_bitmap, clear_bitmaps.

A bitmap whose writer died is `in-use` in the file: its bits are worthless, and it can only be
removed.  Nothing here fails over such leftovers.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from vdsm_storage.errors import (
    AddBitmapError,
    BitmapDoesNotExist,
    CommandError,
    IncorrectFormat,
    InvalidParameter,
    RemoveBitmapError,
    VolumeDoesNotExist,
)
from vdsm_storage.host.qemu_img import QemuImg
from vdsm_storage.host.qemu_img_output import Bitmap
from vdsm_storage.images import chain, guard, layers
from vdsm_storage.images import metadata as md
from vdsm_storage.images.chain import Member
from vdsm_storage.images.guard import Guard, VolumeRef
from vdsm_storage.images.metadata import VolumeMetadata
from vdsm_storage.images.store import Store
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


@dataclass(frozen=True)
class _Interrupted:
    """A volume as an interrupted job left it."""

    store: Store
    target: VolumeRef
    metadata: VolumeMetadata
    path: str
    names: frozenset[str]

    def raise_generation(self) -> None:
        after = self.metadata.with_(generation=guard.following(self.metadata.generation))
        self.store.save(self.target.image, self.target.volume, after)


class Bitmaps:
    """Jobs on the bitmaps of one volume."""

    def __init__(self, guard: Guard, qemu_img: QemuImg) -> None:
        self._guard = guard
        self._qemu_img = qemu_img

    def kinds(self) -> list[Kind]:
        steps = ("locked", "changed", "done")
        return [
            Kind(ADD, steps, self._add, self._recover_add),
            Kind(REMOVE, steps, self._remove, self._recover_remove),
            Kind(CLEAR, steps, self._clear, self._recover_clear),
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
            op.record(removing=True)
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
        with self._guard.writing(target, cancel=op.cancel) as store:
            op.step("locked")
            found = store.load(target.image, target.volume)
            if found.format != md.COW:
                raise IncorrectFormat(volume=target.volume, reason="only COW holds bitmaps")
            guard.check_generation(target.volume, found.generation, op.params["generation"])
            op.record(generation=found.generation)
            with guard.generation(store, target, found.generation, illegal=False):
                names = chain.opened_with(store, target.image, target.volume)
                with guard.active(store, target.image, names, prepared=False):
                    member = Member(target.image, target.volume, found)
                    info = layers.check_header(store, self._qemu_img, member)
                    change(store.path(target.image, target.volume), info.bitmaps)
                op.step("changed", abortable=False)
        op.step("done", abortable=False)

    # -- recovery ----------------------------------------------------------------------------

    def _recover_add(self, op: Operation) -> bool:
        """A bitmap that was added without the generation saying so is taken away again."""
        if self._ended(op):
            return True
        if op.facts.get("adding"):
            with self._unfinished(op) as found:
                if found is not None and op.params["bitmap"] in found.names:
                    self._qemu_img.bitmap_remove(found.path, op.params["bitmap"])
        return False

    def _recover_remove(self, op: Operation) -> bool:
        """A bitmap that is gone cannot come back: the generation says so now."""
        if self._ended(op):
            return True
        if op.facts.get("removing"):
            with self._unfinished(op) as found:
                if found is not None and op.params["bitmap"] not in found.names:
                    found.raise_generation()
                    return True
        return False

    def _recover_clear(self, op: Operation) -> bool:
        """What is left to remove can be removed by another job: nothing to take back."""
        return self._ended(op)

    @contextlib.contextmanager
    def _unfinished(self, op: Operation) -> Iterator[_Interrupted | None]:
        """The volume of an interrupted job under its locks; None when it is gone, or fenced and
        so somebody else's."""
        target = VolumeRef.from_params(op.params)
        with contextlib.ExitStack() as stack:
            try:
                store = stack.enter_context(self._guard.writing(target))
                now = store.load(target.image, target.volume)
            except VolumeDoesNotExist:
                now = None
            if now is None or now.generation != op.facts["generation"]:
                yield None
                return
            names = chain.opened_with(store, target.image, target.volume)
            stack.enter_context(guard.active(store, target.image, names, prepared=False))
            path = store.path(target.image, target.volume)
            member = Member(target.image, target.volume, now)
            bitmaps = layers.check_header(store, self._qemu_img, member).bitmaps
            found = frozenset(bitmap.name for bitmap in bitmaps)
            yield _Interrupted(store, target, now, path, found)

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
