# SPDX-License-Identifier: GPL-2.0-or-later
"""Volume.copy: a volume, with everything below it, as one new volume; so templates are made."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from vdsm_storage.base.uuids import BLANK
from vdsm_storage.errors import InvalidParameter
from vdsm_storage.images import chain, delete
from vdsm_storage.images import metadata as md
from vdsm_storage.images.layer_copy import Following, Target, allocation, copy_layer
from vdsm_storage.images.metadata import VolumeMetadata
from vdsm_storage.images.store import Store
from vdsm_storage.images.workshop import Workshop
from vdsm_storage.jobs.operation import COPYING, Kind, Operation

MADE, COPIED, PUBLISHED = "made", "copied", "published"


@dataclass(frozen=True)
class CopyVolumeRequest:
    """`voltype` is SHARED for a template, else LEAF."""

    source_domain: str
    source_image: str
    source: str
    domain: str
    image: str
    volume: str
    description: str
    voltype: str
    format: str
    type: str

    def as_params(self) -> dict[str, object]:
        return asdict(self)


def check(store: Store, request: CopyVolumeRequest) -> None:
    """Raises 1000; 201, 227, 262 of the source."""
    if request.voltype not in (md.SHARED, md.LEAF):
        raise InvalidParameter(
            parameter="volType", value=request.voltype, reason="a copy is SHARED or LEAF"
        )
    chain.walk(store, request.source_image, request.source)


class CopyVolume:
    """The operation `volume.copy`; its params are CopyVolumeRequest.as_params()."""

    def __init__(self, workshop: Workshop) -> None:
        self._shop = workshop

    def kind(self) -> Kind:
        steps = (MADE, COPIED, PUBLISHED)
        return Kind("volume.copy", steps, self._run, self._recover, self._revert, work=COPYING)

    def _run(self, op: Operation) -> None:
        request = CopyVolumeRequest(**op.params)
        sides = (request.source_domain, request.source_image), (request.domain, request.image)
        with self._shop.copying(*sides) as (source, target):
            check(source, request)
            members = chain.walk(source, request.source_image, request.source)
            metadata = _metadata(request, members[-1].metadata)
            metadata.encode(target.version, request.volume)
            to = Target(target, request.image, request.volume, metadata)
            size = allocation(self._shop.qemu, source, members, to)
            with target.lock.held(self._shop.lock_timeout):
                to.make(size)
            op.step(MADE)
            following = Following(op.progress, op.cancel, op.pace)
            copy_layer(self._shop.qemu, source, members, to, following)
            op.step(COPIED)
            with target.lock.held(self._shop.lock_timeout):
                target.publish(request.image, request.volume, to.made())
            op.step(PUBLISHED, abortable=False)

    def _recover(self, op: Operation) -> bool:
        """A published copy is whole; anything less is removed."""
        request = CopyVolumeRequest(**op.params)
        store = self._shop.find_store(request.domain)
        if request.volume in store.volumes(request.image):
            return True
        if store.has_remains(request.image, request.volume):
            with self._shop.changing(request.domain, request.image):
                store.unmake(request.image, request.volume)
        return False

    def _revert(self, op: Operation) -> None:
        """Remove the copy, unless something was built on it since.  Raises 204, 223."""
        request = CopyVolumeRequest(**op.params)
        with self._shop.changing(request.domain, request.image) as store:
            if request.volume in store.volumes(request.image):
                delete.check_volumes(store, request.image, [request.volume], force=False)
                store.unpublish(request.image, request.volume)
            store.unmake(request.image, request.volume)


def _metadata(request: CopyVolumeRequest, source: VolumeMetadata) -> VolumeMetadata:
    return VolumeMetadata(
        domain=request.domain,
        image=request.image,
        parent=BLANK,
        capacity=source.capacity,
        format=request.format,
        type=request.type,
        voltype=request.voltype,
        disktype=source.disktype,
        description=request.description,
        ctime=md.new_ctime(),
    )
