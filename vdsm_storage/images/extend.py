# SPDX-License-Identifier: GPL-2.0-or-later
"""Giving a volume a larger capacity while no guest runs on it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

from vdsm_storage.base.units import round_up
from vdsm_storage.errors import (
    AgentError,
    CommandError,
    NoSpaceLeftOnDomain,
    VolumeExtendingError,
    VolumeNonWritable,
    VolumeResizeValueError,
)
from vdsm_storage.host.qemu_img import Image
from vdsm_storage.host.qemu_img_luks import HEADER
from vdsm_storage.host.qemu_img_output import Info
from vdsm_storage.images import chain, guard, layers
from vdsm_storage.images import metadata as md
from vdsm_storage.images.chain import Member
from vdsm_storage.images.create import CAPACITY_STEP
from vdsm_storage.images.encryption import needs_key
from vdsm_storage.images.metadata import VolumeMetadata
from vdsm_storage.images.qcow2_empty import full_size
from vdsm_storage.images.store import Store
from vdsm_storage.images.workshop import Workshop
from vdsm_storage.jobs.operation import Kind, Operation

log = logging.getLogger("volumes")

GROWN, SAVED = "grown", "saved"


def check(store: Store, image: str, volume: str, size: int) -> VolumeMetadata:
    """The volume's metadata if it can be given `size` bytes.  Raises 201, 213, 232."""
    metadata = store.load(image, volume)
    if metadata.voltype == md.SHARED:
        raise VolumeNonWritable(volume=volume, role="a template")
    if size < metadata.capacity:
        raise VolumeResizeValueError(volume=volume, current=metadata.capacity, size=size)
    return metadata


class ExtendVolume:
    """The operation `volume.extend`: params domain, image, volume, size (the new capacity), and
    secret (of an encrypted volume)."""

    def __init__(self, workshop: Workshop) -> None:
        self._shop = workshop

    def kind(self) -> Kind:
        return Kind("volume.extend", (GROWN, SAVED), self._run, self._recover)

    def _run(self, op: Operation) -> None:
        image, volume = op.params["image"], op.params["volume"]
        size = round_up(op.params["size"], CAPACITY_STEP)
        with self._shop.changing(op.params["domain"], image) as store:
            metadata = check(store, image, volume, size)
            if size == metadata.capacity:
                return
            if not self._grow(op, store, metadata, size):
                return
            op.step(GROWN, abortable=False)
            capacity = self._recorded(store, image, volume, metadata, size)
            store.save(image, volume, metadata.with_(capacity=capacity))
            op.step(SAVED, abortable=False)

    def _grow(self, op: Operation, store: Store, metadata: VolumeMetadata, size: int) -> bool:
        """False if a guest has the volume open: then the capacity is changed through the guest."""
        volume = op.params["volume"]
        try:
            if metadata.is_raw:
                full = metadata.type == md.PREALLOCATED
                self._grow_storage(op, store, size + metadata.overhead, full)
            else:
                self._grow_cow(op, store, size)
        except CommandError as error:
            # Failed to get "write" lock; a wrong key "cannot unlock any keyslot".
            if '" lock' not in str(error.facts["stderr"]):
                raise VolumeExtendingError(volume=volume, size=size, reason=error) from error
            log.info("Volume %s is open in a guest: left to VM.diskSizeExtend", volume)
            return False
        except (NoSpaceLeftOnDomain, VolumeExtendingError):
            raise
        except OSError as error:
            raise VolumeExtendingError(volume=volume, size=size, reason=error.strerror) from error
        return True

    def _grow_storage(self, op: Operation, store: Store, size: int, preallocate: bool) -> None:
        def progress(fraction: float) -> None:
            op.progress(fraction)
            op.cancel.check()

        image, volume = op.params["image"], op.params["volume"]
        if store.sizes(image, volume).apparent < size:
            store.resize(image, volume, size, preallocate, progress)

    def _grow_cow(self, op: Operation, store: Store, size: int) -> None:
        image, volume = op.params["image"], op.params["volume"]
        members = chain.walk(store, image, volume)
        if members[-1].metadata.voltype != md.LEAF:
            raise VolumeNonWritable(volume=volume, role="below another volume")
        names = [member.volume for member in members]
        with guard.active(store, image, names, prepared=False):
            info = layers.check_header(store, self._shop.qemu, members[-1], encrypted=True)
            if info.virtual_size < size:
                resize = self._resizing(op, info, members[:-1])
                if members[-1].metadata.type == md.PREALLOCATED:
                    more = HEADER if info.encrypted else 0
                    self._grow_storage(op, store, full_size(size) + more, preallocate=True)
                store.lock.verify()
                resize(layers.layer(store, members[-1]), size)

    def _resizing(
        self, op: Operation, info: Info, below: Sequence[Member]
    ) -> Callable[[Image, int], None]:
        """What makes the image larger.  Raises 206, 1000, before anything is done."""
        if not info.encrypted:
            return self._shop.qemu.resize
        secret = op.params.get("secret")
        if secret is None:
            raise needs_key(op.params["volume"])
        for member in below:
            if member.metadata.capacity > info.virtual_size:
                reason = f"{member.volume} below it has {member.metadata.capacity} bytes"
                raise VolumeExtendingError(
                    volume=op.params["volume"], size=op.params["size"], reason=reason
                )
        luks, key = self._shop.luks_and_key(secret)
        return lambda image, size: luks.resize(image.path, size, key)

    def _recover(self, op: Operation) -> bool:
        """What has its new size is recorded so; a raw file that grew in part is cut again."""
        image, volume = op.params["image"], op.params["volume"]
        size = round_up(op.params["size"], CAPACITY_STEP)
        store = self._shop.find_store(op.params["domain"])
        try:
            metadata = store.load(image, volume)
            if metadata.capacity >= size or self._actual(store, image, volume) == (
                metadata.capacity
            ):
                return metadata.capacity >= size
        except AgentError as error:
            log.info("Volume %s is not extended further: %s", volume, error)
            return False
        with self._shop.changing(op.params["domain"], image) as store:
            metadata = store.load(image, volume)
            actual = self._actual(store, image, volume)
            if actual >= size:
                capacity = self._recorded(store, image, volume, metadata, size)
                store.save(image, volume, metadata.with_(capacity=capacity))
                return True
            if metadata.is_raw and not store.is_block and actual > metadata.capacity:
                store.resize(image, volume, metadata.capacity + metadata.overhead, False)
        return False

    @staticmethod
    def _recorded(
        store: Store, image: str, volume: str, metadata: VolumeMetadata, size: int
    ) -> int:
        """A raw volume on a device has all of the device, as when it is made."""
        if metadata.is_raw and store.is_block:
            return store.sizes(image, volume).apparent - metadata.overhead
        return size

    def _actual(self, store: Store, image: str, volume: str) -> int:
        """The capacity that a guest would see, bytes."""
        metadata = store.load(image, volume)
        if metadata.is_raw:
            return store.sizes(image, volume).apparent - metadata.overhead
        with guard.active(store, image, [volume], prepared=False):
            member = Member(image, volume, metadata)
            return layers.look(store, self._shop.qemu, member).virtual_size
