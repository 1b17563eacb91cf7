# SPDX-License-Identifier: GPL-2.0-or-later
"""Cold merge: three operations that make `top` part of `base`, its parent.

    prepareMerge   base gets top's capacity and room, and is ILLEGAL from here on
    SDM.merge      top's data are written into base (any host, under base's lease)
    finalizeMerge  top's child is put on base; top is ILLEGAL, to be deleted; base is LEGAL

Until finalize the chain through top shows a guest the same bytes at every moment, because top
covers all that is being written below it.  So each of the three can be repeated after a crash.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from vdsm_storage.base.cancel import Cancel
from vdsm_storage.base.units import MIB, round_up
from vdsm_storage.errors import (
    CommandError,
    MergeSnapshotsError,
    UnexpectedVolumeState,
    VolumeDoesNotExist,
    VolumeNonWritable,
)
from vdsm_storage.host.qemu_img import QCOW2, QemuImg, Watch
from vdsm_storage.host.qemu_img_output import Measure
from vdsm_storage.images import chain, guard, layers, merged
from vdsm_storage.images import metadata as md
from vdsm_storage.images.bitmap_merge import BitmapMerge
from vdsm_storage.images.chain import Subchain
from vdsm_storage.images.encryption import check_clear
from vdsm_storage.images.guard import Guard, VolumeRef
from vdsm_storage.images.sizing import CHUNK
from vdsm_storage.images.store import Store
from vdsm_storage.jobs.operation import MERGING, Kind, Operation
from vdsm_storage.jobs.runner import Request

PREPARE = "merge.prepare"
MERGE = "merge.run"
FINALIZE = "merge.finalize"


@dataclass(frozen=True)
class MergeRequest:
    """`generation` is what base must have (None: any); `bitmaps` of top go into base too."""

    domain: str
    image: str
    base: str
    top: str
    generation: int | None = None
    bitmaps: bool = False

    @classmethod
    def from_subchain(cls, info: Mapping[str, Any], bitmaps: bool = False) -> MergeRequest:
        """From the wire's SubchainInfo."""
        return cls(
            domain=info["sd_id"],
            image=info["img_id"],
            base=info["base_id"],
            top=info["top_id"],
            generation=info.get("base_generation"),
            bitmaps=bitmaps,
        )

    def prepare_task(self) -> Request:
        return self._request(PREPARE, "prepareMerge")

    def merge_job(self) -> Request:
        return self._request(MERGE, "merge")

    def finalize_task(self) -> Request:
        return self._request(FINALIZE, "finalizeMerge")

    def _request(self, kind: str, verb: str) -> Request:
        params = {
            "domain": self.domain,
            "image": self.image,
            "base": self.base,
            "top": self.top,
            "generation": self.generation,
            "bitmaps": self.bitmaps,
        }
        description = f"{verb} {self.top} into {self.base}"
        return Request(kind, params, [self.domain], verb, self.domain, description)


class Merging:
    """The three operations.  `lock_timeout` is seconds to wait for the domain's lock."""

    def __init__(self, guard: Guard, qemu_img: QemuImg, lock_timeout: float) -> None:
        self._guard = guard
        self._qemu_img = qemu_img
        self._lock_timeout = lock_timeout

    def kinds(self) -> list[Kind]:
        return [
            Kind(PREPARE, ("locked", "marked", "extended"), self._prepare, self._recover_prepare),
            Kind(
                MERGE,
                ("locked", "started", "committed", "bitmaps", "done"),
                self._merge,
                self._recover_merge,
                work=MERGING,
            ),
            Kind(
                FINALIZE,
                ("locked", "recorded", "rebased", "child", "top", "done"),
                self._finalize,
                self._recover_finalize,
            ),
        ]

    @contextlib.contextmanager
    def _locked(self, base: VolumeRef, cancel: Cancel | None = None) -> Iterator[Store]:
        """Base's image, and its domain, for a change to the chain."""
        with (
            self._guard.writing(base, lease=False, cancel=cancel) as store,
            store.lock.held(self._lock_timeout),
        ):
            yield store

    # -- prepare -----------------------------------------------------------------------------

    def _prepare(self, op: Operation) -> None:
        base = _base(op)
        with self._locked(base, op.cancel) as store:
            sub = _subchain(store, op)
            op.step("locked")
            check_clear(store, [sub.base, sub.top])
            metadata = store.load(base.image, base.volume)
            guard.check_generation(base.volume, metadata.generation, op.params["generation"])
            capacity = max(metadata.capacity, sub.top.metadata.capacity)
            op.record(
                legality=metadata.legality,
                capacity=metadata.capacity,
                generation=metadata.generation,
            )
            store.save(
                base.image,
                base.volume,
                metadata.with_(legality=md.ILLEGAL, capacity=capacity),
            )
            op.step("marked")
            self._extend(op, store, sub, capacity)
            op.step("extended", abortable=False)

    def _extend(self, op: Operation, store: Store, sub: Subchain, capacity: int) -> None:
        """Room in base for what top brings."""
        base, size = sub.base, store.sizes(sub.base.image, sub.base.volume).apparent
        preallocate = base.metadata.type == md.PREALLOCATED
        if not base.is_cow:
            if capacity > size:
                store.resize(base.image, base.volume, capacity, preallocate, op.progress)
            return
        if not store.is_block:
            return  # a file grows when it is written; commit gives the image its new capacity
        names = [member.volume for member in (*sub.below, base, sub.top)]
        with guard.active(store, base.image, names, prepared=False):
            both = [layers.layer(store, base), layers.layer(store, sub.top)]
            needed = self._qemu_img.measure_layers(both, QCOW2)
        wanted = room(needed, leaf=sub.child is None)
        if wanted > size:
            store.resize(base.image, base.volume, wanted, False, op.progress)

    def _recover_prepare(self, op: Operation) -> bool:
        """Give base its legality and capacity back; room that it got stays, it does no harm."""
        if "legality" not in op.facts:
            return False
        base = _base(op)
        with self._locked(base) as store:
            now = store.load(base.image, base.volume)
            if now.generation != op.facts["generation"]:
                return True  # someone prepared it again and merged
            capacity, legality = op.facts["capacity"], op.facts["legality"]
            if now.format == md.RAW and not store.is_block:
                size = store.sizes(base.image, base.volume).apparent
                if size > capacity:
                    store.resize(base.image, base.volume, capacity, False)
            store.save(
                base.image, base.volume, now.with_(legality=legality, capacity=capacity)
            )
        return False

    # -- merge -------------------------------------------------------------------------------

    def _merge(self, op: Operation) -> None:
        base = _base(op)
        with self._guard.writing(base, cancel=op.cancel) as store:
            op.step("locked")
            sub = _subchain(store, op)
            if sub.base.metadata.is_legal:
                raise UnexpectedVolumeState(
                    volume=base.volume, actual="LEGAL", expected="prepareMerge before"
                )
            found = sub.base.metadata.generation
            guard.check_generation(base.volume, found, op.params["generation"])
            op.record(generation=found)
            with guard.generation(store, base, found, illegal=False):
                op.step("started")
                names = [member.volume for member in (*sub.below, sub.base, sub.top)]
                with guard.active(store, base.image, names, prepared=False):
                    self._commit(op, store, sub)
        op.step("done", abortable=False)

    def _commit(self, op: Operation, store: Store, sub: Subchain) -> None:
        layers.check_header(store, self._qemu_img, sub.top)
        top = layers.layer(store, sub.top)
        bitmaps = BitmapMerge(self._qemu_img, store, sub) if op.params["bitmaps"] else None
        if bitmaps is not None:
            bitmaps.drop_broken()
        try:
            path = store.path(sub.base.image, sub.base.volume)
            self._qemu_img.commit(top, path, Watch(op.progress, op.cancel, op.pace))
        except CommandError as error:
            raise MergeSnapshotsError(
                top=sub.top.volume, base=sub.base.volume, reason=error
            ) from error
        op.step("committed")
        if bitmaps is not None:
            bitmaps.merge()
        op.step("bitmaps", abortable=False)

    def _recover_merge(self, op: Operation) -> bool:
        """Whether base has its next generation.  If not, it is merged again from the start."""
        before = op.facts.get("generation")
        if before is None:
            return False
        base = _base(op)
        try:
            now = self._guard.store(base.domain).load(base.image, base.volume)
        except VolumeDoesNotExist:
            return False
        return now.generation == guard.following(before)

    # -- finalize ----------------------------------------------------------------------------

    def _finalize(self, op: Operation) -> None:
        base = _base(op)
        with self._locked(base, op.cancel) as store:
            sub = _subchain(store, op)
            op.step("locked")
            self._check_merged(store, sub)
            op.record(child=sub.child.volume if sub.child else None)
            op.step("recorded", abortable=False)
            self._finish(op, store)

    def _check_merged(self, store: Store, sub: Subchain) -> None:
        """An engine that skipped the merge would lose top's data here."""
        base = sub.base
        if base.metadata.is_legal:
            raise UnexpectedVolumeState(
                volume=base.volume, actual="LEGAL", expected="prepareMerge and merge before"
            )
        names = [member.volume for member in (*sub.below, base, sub.top)]
        with guard.active(store, base.image, names, prepared=False):
            layers.check_header(store, self._qemu_img, sub.top)
            below, above = layers.layer(store, base), layers.layer(store, sub.top)
            size = self._qemu_img.info(below).virtual_size
            hole = merged.missing_at(
                self._qemu_img, above, below, lambda path: layers.opened(store, path)
            )
        expected = f"the data of {sub.top.volume} merged into it"
        if size < sub.top.metadata.capacity:
            raise UnexpectedVolumeState(
                volume=base.volume, actual=f"of {size} bytes", expected=expected
            )
        if hole is not None:
            raise UnexpectedVolumeState(
                volume=base.volume, actual=f"without them at {hole}", expected=expected
            )

    def _finish(self, op: Operation, store: Store) -> None:
        """From `recorded` on: all of it can be done again."""
        image, base, top = op.params["image"], op.params["base"], op.params["top"]
        child = op.facts["child"]
        if child is not None:
            self._rebase(store, image, child, base)
            op.step("rebased", abortable=False)
            metadata = store.load(image, child)
            store.save(image, child, metadata.with_(parent=base))
            op.step("child", abortable=False)
        metadata = store.load(image, top)
        store.save(image, top, metadata.with_(legality=md.ILLEGAL))
        op.step("top", abortable=False)
        metadata = store.load(image, base)
        voltype = metadata.voltype if child is not None else md.LEAF
        store.save(image, base, metadata.with_(legality=md.LEGAL, voltype=voltype))
        op.step("done", abortable=False)

    def _rebase(self, store: Store, image: str, child: str, base: str) -> None:
        member = chain.Member(image, child, store.load(image, child))
        below = store.load(image, base)
        with guard.active(store, image, [child], prepared=False):
            layers.look(store, self._qemu_img, member)
            self._qemu_img.rebase_unsafe(
                layers.layer(store, member), base, layers.qemu_format(below)
            )

    def _recover_finalize(self, op: Operation) -> bool:
        """Once the intent is recorded it is carried through."""
        if "child" not in op.facts:
            return False
        base = _base(op)
        with self._locked(base) as store:
            if op.params["top"] in store.volumes(base.image):
                self._finish(op, store)
        return True


def room(needed: Measure, *, leaf: bool) -> int:
    """Bytes for a qcow2 volume that shall hold what was measured; a leaf is written to later."""
    wanted = needed.required + needed.bitmaps + (CHUNK if leaf else 0)
    return min(wanted, round_up(needed.fully_allocated + needed.bitmaps, MIB))


def _base(op: Operation) -> VolumeRef:
    return VolumeRef(op.params["domain"], op.params["image"], op.params["base"])


def _subchain(store: Store, op: Operation) -> Subchain:
    """The two volumes, if they can be merged.  Raises 201, 213, 262, 920, 921, 922."""
    sub = chain.subchain(store, op.params["image"], op.params["base"], op.params["top"])
    if sub.base.is_shared or sub.top.is_shared:
        shared = sub.base if sub.base.is_shared else sub.top
        raise VolumeNonWritable(volume=shared.volume, role="a template (SHARED)")
    if not sub.top.metadata.is_legal:
        raise UnexpectedVolumeState(
            volume=sub.top.volume, actual=sub.top.metadata.legality, expected=md.LEGAL
        )
    return sub
