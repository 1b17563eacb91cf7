# SPDX-License-Identifier: GPL-2.0-or-later
"""Giving space back: SDM.sparsify_volume, and reduceVolume for logical volumes.

virt-sparsify discards what the file systems in the volume do not use.  Where it is not installed,
a file is written anew without its zeros beside the old one and takes its place by rename: at
every moment the volume is the old file or the new one.
"""

from __future__ import annotations

import logging
import os
import stat

from vdsm_storage.base import files
from vdsm_storage.base.units import MIB, round_up
from vdsm_storage.errors import (
    CommandError,
    IncorrectFormat,
    InvalidVolumeUpdate,
    UnsupportedOperation,
    VolumeDoesNotExist,
    VolumeNonWritable,
)
from vdsm_storage.host.qemu_img import QCOW2, Conversion, Image, QemuImg, Watch
from vdsm_storage.host.qemu_img_output import Info
from vdsm_storage.host.virt_sparsify import VirtSparsify
from vdsm_storage.images import chain, guard, layers
from vdsm_storage.images import metadata as md
from vdsm_storage.images.chain import Member
from vdsm_storage.images.guard import Guard, VolumeRef
from vdsm_storage.images.sizing import CHUNK
from vdsm_storage.images.store import Store
from vdsm_storage.jobs.operation import Kind, Operation
from vdsm_storage.jobs.runner import Request

SPARSIFY = "volume.sparsify"
REDUCE = "volume.reduce"
SPARE_FILE = ".sparse"  # suffix of the new file while it is written

log = logging.getLogger("images.sparsify")


def sparsify_job(target: VolumeRef, generation: int | None) -> Request:
    return Request(
        kind=SPARSIFY,
        params={**target.as_params(), "generation": generation},
        domains=[target.domain],
        verb="sparsify_volume",
        lane=target.domain,
        description=f"Sparsify volume {target.volume}",
    )


def reduce_task(target: VolumeRef, allow_active: bool) -> Request:
    return Request(
        kind=REDUCE,
        params={**target.as_params(), "allow_active": allow_active},
        domains=[target.domain],
        verb="reduceImage",
        lane=target.domain,
        description=f"Reduce volume {target.volume}",
    )


class Sparsifying:
    """`lock_timeout` is seconds to wait for the domain's lock (reduceVolume)."""

    def __init__(
        self, guard: Guard, qemu_img: QemuImg, tool: VirtSparsify, lock_timeout: float
    ) -> None:
        self._guard = guard
        self._qemu_img = qemu_img
        self._tool = tool
        self._lock_timeout = lock_timeout

    def kinds(self) -> list[Kind]:
        steps = ("locked", "marked", "written", "replaced", "done")
        return [
            Kind(SPARSIFY, steps, self._sparsify, self._recover_sparsify),
            Kind(REDUCE, ("locked", "reduced"), self._reduce, self._recover_reduce),
        ]

    # -- sparsify ----------------------------------------------------------------------------

    def _sparsify(self, op: Operation) -> None:
        target = VolumeRef.from_params(op.params)
        with self._guard.writing(target, cancel=op.cancel) as store:
            op.step("locked")
            member = Member(target.image, target.volume, store.load(target.image, target.volume))
            self._check(store, member)
            found = member.metadata
            guard.check_generation(target.volume, found.generation, op.params["generation"])
            op.record(generation=found.generation, legality=found.legality)
            with guard.generation(store, target, found.generation, illegal=True):
                op.step("marked")
                names = [m.volume for m in chain.walk(store, target.image, target.volume)]
                with guard.active(store, target.image, names, prepared=False):
                    info = layers.check_header(store, self._qemu_img, member)
                    self._work(op, store, member, info)
        op.step("done", abortable=False)

    def _check(self, store: Store, member: Member) -> None:
        if member.is_shared or chain.children(store, member.image, member.volume):
            raise VolumeNonWritable(volume=member.volume, role="a base of other volumes")
        if not member.metadata.is_legal:
            raise VolumeNonWritable(volume=member.volume, role="ILLEGAL")
        if member.metadata.type == md.PREALLOCATED and not member.is_cow:
            raise UnsupportedOperation(
                operation=f"sparsifying volume {member.volume}", reason="it is preallocated"
            )
        if store.is_block and not self._tool.available():
            raise UnsupportedOperation(
                operation=f"sparsifying volume {member.volume}",
                reason="virt-sparsify is not installed, and a device cannot be replaced",
            )

    def _work(self, op: Operation, store: Store, member: Member, info: Info) -> None:
        image = layers.layer(store, member)
        try:
            if self._tool.available():
                self._tool.in_place(image.path, image.format, op.cancel)
                op.step("written", abortable=False)
            else:
                self._rewrite(op, store, member, info)
        except CommandError as error:
            reason = f"it could not be made sparse: {error}"
            raise InvalidVolumeUpdate(volume=member.volume, reason=reason) from error
        op.step("replaced", abortable=False)

    def _rewrite(self, op: Operation, store: Store, member: Member, info: Info) -> None:
        image = layers.layer(store, member)
        new = image.path + SPARE_FILE
        old = os.lstat(image.path)
        if not stat.S_ISREG(old.st_mode):
            raise VolumeNonWritable(volume=member.volume, role="no regular file")
        files.unlink_if_there(new)
        backing_format = None
        if member.parent is not None:
            backing_format = layers.qemu_format(store.load(member.image, member.parent))
        conversion = Conversion(
            source=image,
            target=Image(new, image.format),
            compat=info.compat or layers.compat(store),
            backing=member.parent,
            backing_format=backing_format,
            bitmaps=bool(info.bitmaps),
        )
        self._qemu_img.convert(conversion, Watch(op.progress, op.cancel))
        op.step("written")
        os.chown(new, old.st_uid, old.st_gid)
        os.chmod(new, stat.S_IMODE(old.st_mode))
        _sync(new)
        os.rename(new, image.path)
        files.sync_directory(os.path.dirname(image.path))

    def _recover_sparsify(self, op: Operation) -> bool:
        """The volume is whole either way: remove the new file, give the legality back."""
        before = op.facts.get("generation")
        if before is None:
            return False
        target = VolumeRef.from_params(op.params)
        try:
            with self._guard.writing(target) as store:
                if not store.is_block:
                    path = store.path(target.image, target.volume)
                    files.unlink_if_there(path + SPARE_FILE)
                now = store.load(target.image, target.volume)
                if now.generation != before:
                    return now.generation == guard.following(before)
                store.save(target.image, target.volume, now.with_(legality=op.facts["legality"]))
        except VolumeDoesNotExist:
            return False
        return False

    # -- reduce ------------------------------------------------------------------------------

    def _reduce(self, op: Operation) -> None:
        target = VolumeRef.from_params(op.params)
        with (
            self._guard.writing(target, lease=False, cancel=op.cancel) as store,
            store.lock.held(self._lock_timeout),
        ):
            op.step("locked")
            found = store.load(target.image, target.volume)
            if found.format != md.COW:
                raise IncorrectFormat(volume=target.volume, reason="only COW can be reduced")
            if store.is_block:
                self._shrink(store, target, leaf=found.voltype == md.LEAF)
            op.step("reduced", abortable=False)

    def _shrink(self, store: Store, target: VolumeRef, *, leaf: bool) -> None:
        """Cut what lies behind the last cluster in use; a leaf keeps a chunk to write into.

        Not of a volume that a guest here writes to: clusters that its QEMU has in use may be in
        its memory only.
        """
        path = store.path(target.image, target.volume)
        names = chain.opened_with(store, target.image, target.volume)
        with guard.active(store, target.image, names, prepared=False):
            try:
                end = self._qemu_img.check(Image(path, QCOW2)).end
            except CommandError as error:
                if '" lock' not in str(error.facts["stderr"]):
                    raise
                log.info("Volume %s is open in a guest: it keeps its size", target.volume)
                return
        if end is None:
            return
        wanted = round_up(end, MIB) + (CHUNK if leaf else 0)
        if wanted < store.sizes(target.image, target.volume).apparent:
            store.resize(target.image, target.volume, wanted, False)

    def _recover_reduce(self, op: Operation) -> bool:
        """Reduced or not, the volume is whole."""
        return False


def _sync(path: str) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
