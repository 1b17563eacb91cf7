# SPDX-License-Identifier: GPL-2.0-or-later
"""Making a volume: empty, as a snapshot in its image, or on a template of another image."""

from __future__ import annotations

import contextlib
import errno
import os
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass

from vdsm_storage.base.units import round_up
from vdsm_storage.base.uuids import BLANK
from vdsm_storage.errors import (
    AddBitmapError,
    AgentError,
    CommandError,
    CreateVolumeSizeError,
    IllegalVolumeSnapshot,
    IncorrectFormat,
    InvalidParameter,
    NoSpaceLeftOnDomain,
    VolumeAlreadyExists,
    VolumeCreationError,
    VolumeImageHasChildren,
    VolumeNonShareable,
)
from vdsm_storage.host.qemu_img import QCOW2, NewImage
from vdsm_storage.host.qemu_img_luks import HEADER
from vdsm_storage.images import chain, encryption, layers, roles, sizing
from vdsm_storage.images import luks as luks_header
from vdsm_storage.images import metadata as md
from vdsm_storage.images.metadata import VolumeMetadata
from vdsm_storage.images.qcow2_empty import MAX_SIZE, empty_qcow2, full_size
from vdsm_storage.images.store import NewVolume, Store
from vdsm_storage.images.workshop import Workshop
from vdsm_storage.jobs.operation import Kind, Operation

CAPACITY_STEP = 4096  # bytes; capacities are rounded up to it
MAX_CAPACITY = 2**63 - CAPACITY_STEP

MADE, FORMATTED, MARKED, PUBLISHED = "made", "formatted", "parent_marked", "published"


@dataclass(frozen=True)
class NewVolumeRequest:
    """`capacity` and `initial_size` are bytes; formats and types as in images.metadata.

    `parent` is BLANK or a volume of `parent_image`.  `add_bitmaps` carries the parent's bitmaps
    on; `bitmap` adds one of that name.  With `secret`, the UUID of a registered one, the data are
    encrypted with its value.  `ctime` is given by tests only.
    """

    domain: str
    image: str
    volume: str
    capacity: int
    format: str
    type: str
    disktype: str
    description: str = ""
    parent_image: str = BLANK
    parent: str = BLANK
    initial_size: int | None = None
    legal: bool = True
    sequence: int = 0
    add_bitmaps: bool = False
    bitmap: str | None = None
    secret: str | None = None
    ctime: int | None = None

    def as_params(self) -> dict[str, object]:
        return asdict(self)

    @property
    def shares(self) -> bool:
        """Whether the parent is a template that lives in an image of its own."""
        return self.parent != BLANK and self.parent_image not in (BLANK, self.image)

    @property
    def rounded(self) -> int:
        return round_up(self.capacity, CAPACITY_STEP)

    @property
    def stored_format(self) -> str:
        """What the metadata say; an encrypted raw volume is a container."""
        return md.LUKS if self.format == md.RAW and self.secret is not None else self.format


def check(request: NewVolumeRequest) -> None:
    """What is wrong with a request whatever the storage holds.  Raises 1000, 202, 229."""
    limit = MAX_SIZE if request.format == md.COW else MAX_CAPACITY
    if not 0 < request.capacity <= limit:
        raise CreateVolumeSizeError(volume=request.volume, size=request.capacity)
    if not 0 <= request.sequence <= md.MAX_SEQUENCE:
        raise _wrong("sequence", request.sequence, f"give 0 to {md.MAX_SEQUENCE}")
    initial = request.initial_size or 0
    if initial < 0 or (request.format == md.RAW and initial > request.rounded):
        raise _wrong("initialSize", initial, "it is below zero or above the capacity")
    if request.format == md.RAW and request.parent != BLANK:
        raise IncorrectFormat(volume=request.volume, reason="a raw volume cannot have a parent")
    if request.format == md.RAW and (request.add_bitmaps or request.bitmap):
        raise IncorrectFormat(volume=request.volume, reason="a raw volume cannot hold bitmaps")


def check_kind(store: Store, volume: str, form: str, kind: str) -> None:
    """Whether the domain can have volumes of that format and type.  Raises 202."""
    if store.is_block and (form, kind) == (md.RAW, md.SPARSE):
        reason = "a raw volume on a block domain cannot grow by itself: make it PREALLOCATED"
        raise IncorrectFormat(volume=volume, reason=reason)


def check_parent(store: Store, request: NewVolumeRequest) -> VolumeMetadata | None:
    """The parent's metadata, if it can be the base of this volume.  Raises 201, 214, 226, 1000."""
    if request.parent == BLANK:
        return None
    image = request.parent_image if request.shares else request.image
    parent = store.load(image, request.parent)
    if not parent.is_legal:
        raise IllegalVolumeSnapshot(volume=request.parent)
    if request.shares and parent.voltype != md.SHARED:
        raise VolumeNonShareable(volume=request.parent, role=parent.voltype)
    if request.rounded < parent.capacity:
        reason = f"the parent {request.parent} has {parent.capacity}, a child cannot have less"
        raise _wrong("size", request.capacity, reason)
    return parent


def check_covered(store: Store, request: NewVolumeRequest, parent: VolumeMetadata | None) -> None:
    """Nothing in the clear upon what is encrypted.  Raises 1000."""
    if parent is not None:
        image = request.parent_image if request.shares else request.image
        member = chain.Member(image, request.parent, parent)
        encryption.check_covered(store, member, request.secret)


def _wrong(parameter: str, value: object, reason: str) -> InvalidParameter:
    return InvalidParameter(parameter=parameter, value=value, reason=reason)


class CreateVolume:
    """The operation `volume.create`; its params are NewVolumeRequest.as_params()."""

    def __init__(self, workshop: Workshop) -> None:
        self._shop = workshop

    def kind(self) -> Kind:
        steps = (MADE, FORMATTED, MARKED, PUBLISHED)
        return Kind("volume.create", steps, self._run, self._recover, self._revert)

    def _run(self, op: Operation) -> None:
        request = NewVolumeRequest(**op.params)
        check(request)
        source = request.parent_image if request.shares else None
        with (
            self._shop.images(request.domain, request.image, source) as store,
            contextlib.ExitStack() as hold,
        ):
            hold.enter_context(self._shop.domain(store))
            _check_absent(store, request)
            check_kind(store, request.volume, request.format, request.type)
            check_covered(store, request, check_parent(store, request))
            metadata = _metadata(request)
            metadata.encode(store.version, request.volume)  # 756 before anything is made
            if _takes_long(store, request):
                # Minutes on some servers: other hosts may go on, nobody else wants this file.
                hold.close()
                self._make(op, store, request)
                hold.enter_context(self._shop.domain(store))
                _check_absent(store, request)
            else:
                self._make(op, store, request)
            op.step(MADE)
            self._complete(op, store, request, metadata)
            op.step(PUBLISHED, abortable=False)

    def _complete(
        self, op: Operation, store: Store, request: NewVolumeRequest, metadata: VolumeMetadata
    ) -> None:
        parent = check_parent(store, request)
        if request.shares:
            store.share(request.parent_image, request.parent, request.image)
        if request.stored_format != md.RAW:
            self._format(store, request, parent)
        op.step(FORMATTED)
        if parent is not None and not request.shares:
            roles.mark_internal(store, request.image, request.parent)
        op.step(MARKED)
        if request.format == md.RAW and store.is_block:
            size = store.sizes(request.image, request.volume).apparent
            metadata = metadata.with_(capacity=size - metadata.overhead)
        store.publish(request.image, request.volume, metadata)

    def _changing(self, request: NewVolumeRequest) -> AbstractContextManager[Store]:
        source = request.parent_image if request.shares else None
        return self._shop.changing(request.domain, request.image, source)

    def _make(self, op: Operation, store: Store, request: NewVolumeRequest) -> None:
        def progress(fraction: float) -> None:
            op.progress(fraction)
            op.cancel.check()

        raw = request.format == md.RAW
        full = request.type == md.PREALLOCATED
        size = _allocation(store, request)
        new = NewVolume(request.image, request.volume, size, full, raw, request.parent)
        try:
            store.make(new, progress)
        except OSError as error:
            raise VolumeCreationError(volume=request.volume, reason=error.strerror) from error

    def _format(
        self, store: Store, request: NewVolumeRequest, parent: VolumeMetadata | None
    ) -> None:
        """Write the header; that of qcow2 names the backing file relative to the image."""
        image = self._empty(store, request, parent)
        names = [request.volume]
        if parent is not None and (request.add_bitmaps or request.bitmap):
            names += chain.opened_with(store, request.image, request.parent)
        store.activate(request.image, names)
        try:
            # Another host that took this one for dead may have given the extents away.
            store.lock.verify()
            _write(store, store.path(request.image, request.volume), image)
            self._add_bitmaps(store, request, parent)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise NoSpaceLeftOnDomain(domain=store.id, size=len(image)) from error
            raise VolumeCreationError(volume=request.volume, reason=error.strerror) from error
        finally:
            store.deactivate(request.image, names)

    def _empty(
        self, store: Store, request: NewVolumeRequest, parent: VolumeMetadata | None
    ) -> bytes:
        compat = layers.compat(store)
        backing = request.parent if parent is not None else None
        backing_format = layers.qemu_format(parent) if parent is not None else None
        if request.secret is None:
            return empty_qcow2(request.rounded, compat, backing, backing_format)
        luks, key = self._shop.luks_and_key(request.secret)
        try:
            if request.format == md.RAW:
                return _container(request, luks.container(key))
            new = NewImage("", QCOW2, request.rounded, compat, backing, backing_format)
            return luks.empty(new, key)
        except CommandError as error:
            raise VolumeCreationError(volume=request.volume, reason=error) from error

    def _add_bitmaps(
        self, store: Store, request: NewVolumeRequest, parent: VolumeMetadata | None
    ) -> None:
        qemu = self._shop.qemu
        path = store.path(request.image, request.volume)
        wanted: dict[str, int | None] = {}
        if request.add_bitmaps and parent is not None and parent.format == md.COW:
            member = chain.Member(request.image, request.parent, parent)
            info = layers.check_header(store, qemu, member, encrypted=True)
            wanted = {b.name: b.granularity for b in info.bitmaps if b.valid and b.enabled}
        if request.bitmap:
            wanted[request.bitmap] = None
        for name, granularity in wanted.items():
            try:
                if request.secret is None:
                    qemu.bitmap_add(path, name, granularity)
                else:
                    luks, key = self._shop.luks_and_key(request.secret)
                    luks.bitmap_add(path, name, granularity, key)
            except AgentError as error:
                raise AddBitmapError(bitmap=name, volume=request.volume, reason=error) from error

    # -- taking back -------------------------------------------------------------------------

    def _recover(self, op: Operation) -> bool:
        """A published volume is kept and its parent made internal; anything less is removed."""
        request = NewVolumeRequest(**op.params)
        store = self._shop.find_store(request.domain)
        published = request.volume in store.volumes(request.image)
        if not published and not store.has_remains(request.image, request.volume):
            return False
        with self._changing(request) as store:
            if request.volume in store.volumes(request.image):
                parent = store.load(request.image, request.volume).parent
                if parent != BLANK and parent == request.parent and not request.shares:
                    roles.mark_internal(store, request.image, parent)
                return True
            self._remove(store, request)
        return False

    def _revert(self, op: Operation) -> None:
        """Remove the finished volume, unless something was built on it since."""
        request = NewVolumeRequest(**op.params)
        with self._changing(request) as store:
            if found := chain.children(store, request.image, request.volume):
                kids = ", ".join(child.volume for child in found)
                raise VolumeImageHasChildren(volume=request.volume, children=kids)
            self._remove(store, request)

    def _remove(self, store: Store, request: NewVolumeRequest) -> None:
        """Parent, template links, then the volume: its data file goes last and marks the rest."""
        if request.volume in store.volumes(request.image):
            store.unpublish(request.image, request.volume)
        if request.shares and not chain.children(store, request.image, request.parent):
            store.unmake(request.image, request.parent)
        elif request.parent != BLANK:
            roles.restore_leaf(store, request.image, request.parent)
        store.unmake(request.image, request.volume)


def _allocation(store: Store, request: NewVolumeRequest) -> int:
    """Bytes of storage that the volume gets."""
    if request.format == md.RAW:
        return request.rounded + _metadata(request).overhead
    full = request.type == md.PREALLOCATED
    more = HEADER if request.secret is not None else 0
    if store.is_block:
        return sizing.cow_size(request.rounded, request.initial_size, preallocated=full) + more
    return (request.initial_size or full_size(request.rounded)) + more


def _container(request: NewVolumeRequest, header: bytes) -> bytes:
    """The header, if the room that is left for it is right."""
    wrong = luks_header.problem(header)
    if wrong is not None or len(header) != luks_header.PAYLOAD:
        reason = f"qemu-img made another container than expected: {wrong or len(header)}"
        raise VolumeCreationError(volume=request.volume, reason=reason)
    return header


def _takes_long(store: Store, request: NewVolumeRequest) -> bool:
    """Whether the storage is made by writing or reserving all of it."""
    return request.type == md.PREALLOCATED and not store.is_block


def _check_absent(store: Store, request: NewVolumeRequest) -> None:
    if request.volume in store.volumes(request.image):
        raise VolumeAlreadyExists(
            volume=request.volume, image=request.image, domain=request.domain
        )


def _write(store: Store, path: str, data: bytes) -> None:
    """Fill a new volume from its start.  publish() makes a file durable."""
    fd = os.open(layers.opened(store, path), os.O_WRONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        view = memoryview(data)
        while view:
            view = view[os.write(fd, view) :]
        if store.is_block:
            os.fdatasync(fd)  # it is inactive when publish() comes
    finally:
        os.close(fd)


def _metadata(request: NewVolumeRequest) -> VolumeMetadata:
    return VolumeMetadata(
        domain=request.domain,
        image=request.image,
        parent=request.parent,
        capacity=request.rounded,
        format=request.stored_format,
        type=request.type,
        voltype=md.LEAF,
        disktype=request.disktype,
        description=request.description,
        legality=md.LEGAL if request.legal else md.ILLEGAL,
        ctime=request.ctime if request.ctime is not None else md.new_ctime(),
        sequence=request.sequence,
    )
