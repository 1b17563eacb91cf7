# SPDX-License-Identifier: GPL-2.0-or-later
"""SDM.copy_data: the data of one volume into another that stands.

A target with a parent gets the source's own layer; one without gets all that the source's chain
shows.  The target is ILLEGAL until everything is there.
"""

from __future__ import annotations

from dataclasses import dataclass

from vdsm_storage.errors import (
    CommandError,
    CopyImageError,
    DestinationVolumeTooSmall,
    UnsupportedOperation,
    VolumeDoesNotExist,
    VolumeNonWritable,
)
from vdsm_storage.host.qemu_img import Conversion, QemuImg, Watch
from vdsm_storage.host.qemu_img_output import Info
from vdsm_storage.images import chain, guard, layers
from vdsm_storage.images import metadata as md
from vdsm_storage.images.chain import Member
from vdsm_storage.images.encryption import check_clear
from vdsm_storage.images.guard import Guard, VolumeRef
from vdsm_storage.images.store import Store
from vdsm_storage.jobs.operation import COPYING, Kind, Operation
from vdsm_storage.jobs.runner import Request

COPY = "volume.copy_data"


@dataclass(frozen=True)
class CopyRequest:
    """`generation` is what the target must have (None: any).  A prepared side is activated on
    this host by someone else, who keeps it so."""

    source: VolumeRef
    target: VolumeRef
    generation: int | None = None
    source_prepared: bool = False
    target_prepared: bool = False
    bitmaps: bool = False

    def as_job(self) -> Request:
        params = {
            "source": self.source.as_params(),
            "target": self.target.as_params(),
            "generation": self.generation,
            "source_prepared": self.source_prepared,
            "target_prepared": self.target_prepared,
            "bitmaps": self.bitmaps,
        }
        return Request(
            kind=COPY,
            params=params,
            domains=[self.target.domain],
            verb="copy_data",
            lane=self.target.domain,
            description=f"Copy volume {self.source.volume} to {self.target.volume}",
        )


class Copying:
    """Copies between volumes of any two domains."""

    def __init__(self, guard: Guard, qemu_img: QemuImg) -> None:
        self._guard = guard
        self._qemu_img = qemu_img

    def kinds(self) -> list[Kind]:
        steps = ("locked", "marked", "copied", "published")
        return [Kind(COPY, steps, self._run, self._recover, work=COPYING)]

    def _run(self, op: Operation) -> None:
        source = VolumeRef.from_params(op.params["source"])
        target = VolumeRef.from_params(op.params["target"])
        with self._guard.writing(target, source, cancel=op.cancel) as target_store:
            op.step("locked")
            source_store = self._guard.store(source.domain)
            found = target_store.load(target.image, target.volume)
            guard.check_generation(target.volume, found.generation, op.params["generation"])
            copy = _Copy(self._qemu_img, op, source_store, target_store)
            copy.open(source, Member(target.image, target.volume, found))
            op.record(generation=found.generation)
            with guard.generation(target_store, target, found.generation, illegal=True):
                op.step("marked")
                copy.run()
                op.step("copied", abortable=False)
        op.step("published", abortable=False)

    def _recover(self, op: Operation) -> bool:
        return is_copied(self._guard, op)


def is_copied(guarded: Guard, op: Operation) -> bool:
    """The target tells: its next generation, and it is whole.  Else it stays ILLEGAL."""
    before = op.facts.get("generation")
    target = VolumeRef.from_params(op.params["target"])
    if before is None:
        return False
    try:
        now = guarded.store(target.domain).load(target.image, target.volume)
    except VolumeDoesNotExist:
        return False
    return now.is_legal and now.generation == guard.following(before)


class _Copy:
    """One copy: what is copied, and how."""

    def __init__(
        self, qemu_img: QemuImg, op: Operation, source_store: Store, target_store: Store
    ) -> None:
        self._qemu_img = qemu_img
        self._op = op
        self._source_store = source_store
        self._target_store = target_store
        self._source: list[Member] = []
        self._target: Member | None = None

    def open(self, source: VolumeRef, target: Member) -> None:
        """Look at both sides before anything is touched."""
        if target.is_shared:
            raise VolumeNonWritable(volume=target.volume, role="a template (SHARED)")
        prepared = self._op.params["target_prepared"]
        check_clear(self._target_store, [target], prepared=prepared)
        self._source = chain.walk(self._source_store, source.image, source.volume)
        self._target = target
        if self._op.params["bitmaps"] and not (self._source[-1].is_cow and target.is_cow):
            raise UnsupportedOperation(
                operation=f"copying bitmaps to volume {target.volume}",
                reason="only COW volumes have bitmaps",
            )
        if self._op.params["bitmaps"] and layers.compat(self._target_store) == "0.10":
            raise UnsupportedOperation(
                operation=f"copying bitmaps to volume {target.volume}",
                reason=f"domains of version {self._target_store.version} hold none; upgrade it",
            )

    def run(self) -> None:
        assert self._target is not None
        target, params = self._target, self._op.params
        read = [member.volume for member in self._source]
        write = [m.volume for m in chain.walk(self._target_store, target.image, target.volume)]
        with (
            guard.active(
                self._source_store,
                self._source[-1].image,
                read,
                prepared=params["source_prepared"],
            ),
            guard.active(
                self._target_store, target.image, write, prepared=params["target_prepared"]
            ),
        ):
            try:
                self._convert(target)
            except CommandError as error:
                raise CopyImageError(volume=target.volume, reason=error) from error

    def _convert(self, target: Member) -> None:
        source = layers.check_headers(self._source_store, self._qemu_img, self._source)
        layers.check_below(self._target_store, target.image, target.parent)
        size = target.metadata.capacity
        if source.virtual_size > size:
            raise DestinationVolumeTooSmall(
                volume=target.volume, size=size, needed=source.virtual_size
            )
        watch = Watch(self._op.progress, self._op.cancel, self._op.pace)
        self._qemu_img.convert(self._conversion(target, source), watch)
        if source.virtual_size < size and not (self._target_store.is_block and not target.is_cow):
            image = layers.layer(self._target_store, target)
            self._qemu_img.resize(image, size, preallocation(self._target_store, target))

    def _conversion(self, target: Member, source: Info) -> Conversion:
        store = self._target_store
        raw_device = store.is_block and not target.is_cow
        backing_format = None
        if target.parent is not None:
            backing_format = layers.qemu_format(store.load(target.image, target.parent))
        return Conversion(
            source=layers.layer(self._source_store, self._source[-1]),
            target=layers.layer(store, target),
            compat=layers.compat(store),
            backing=target.parent,
            backing_format=backing_format,
            preallocation=preallocation(store, target),
            create=not raw_device,
            unordered=raw_device,
            bitmaps=self._op.params["bitmaps"] and bool(source.bitmaps),
        )


def preallocation(store: Store, target: Member) -> str | None:
    """How a file is made anew when it is written; a device is what it is."""
    if store.is_block or target.metadata.type != md.PREALLOCATED or target.parent is not None:
        return None
    return "falloc"
