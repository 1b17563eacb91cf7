# SPDX-License-Identifier: GPL-2.0-or-later
"""Image.cloneStructure and Image.syncData: a moving image's volumes first, their data after."""

from __future__ import annotations

import os

from vdsm_storage.errors import ImageDoesNotExistInSD, InvalidParameter
from vdsm_storage.images import chain, layers, move_image
from vdsm_storage.images import metadata as md
from vdsm_storage.images.chain import Member
from vdsm_storage.images.encryption import check_clear
from vdsm_storage.images.layer_copy import Following, Target, allocation, copy_layer
from vdsm_storage.images.qcow2_empty import empty_qcow2
from vdsm_storage.images.store import Store
from vdsm_storage.images.workshop import Workshop
from vdsm_storage.jobs.operation import COPYING, Kind, Operation

MADE, COMPLETE, PUBLISHED = "made", "complete", "published"
MARKED, COPIED = "marked", "copied"
INTERNAL, LEAF, ALL = "INTERNAL", "LEAF", "ALL"


class CloneStructure:
    """The operation `image.clone`: params domain, image, target.

    The target gets the same volumes without data, all at once.
    """

    def __init__(self, workshop: Workshop) -> None:
        self._shop = workshop

    def kind(self) -> Kind:
        return Kind("image.clone", (MADE, COMPLETE, PUBLISHED), self._run, self._recover)

    def _run(self, op: Operation) -> None:
        image = op.params["image"]
        sides = (op.params["domain"], image), (op.params["target"], image)
        with self._shop.copying(*sides) as (source, target):
            todo = move_image.plan(source, target, image)
            template = todo.template.volume if todo.template is not None else None
            check_clear(source, todo.own)
            op.record(volumes=[member.volume for member in todo.own], template=template)
            with self._shop.domain(target):
                for member in todo.own:
                    self._make(source, target, member)
                    op.step(MADE)
                op.record(complete=True)
                op.step(COMPLETE, abortable=False)
                self._publish(target, todo.own)
            op.step(PUBLISHED, abortable=False)

    def _make(self, source: Store, target: Store, member: Member) -> None:
        metadata = member.metadata.with_(domain=target.id)
        to = Target(target, member.image, member.volume, metadata)
        members = chain.walk(source, member.image, member.volume)
        to.make(allocation(self._shop.qemu, source, members, to))
        if member.parent is not None:
            move_image.share_template(target, member)
        if not member.is_cow:
            return
        backing_format = None
        if member.parent is not None:
            backing_format = layers.qemu_format(source.load(member.image, member.parent))
        data = empty_qcow2(
            metadata.capacity, layers.compat(target), member.parent, backing_format
        )
        target.activate(member.image, [member.volume])
        try:
            path = layers.opened(target, target.path(member.image, member.volume))
            fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
            with open(fd, "wb") as file:
                file.write(data)
                file.flush()
                os.fdatasync(file.fileno())
        finally:
            target.deactivate(member.image, [member.volume])

    def _publish(self, target: Store, members: list[Member]) -> None:
        for member in members:
            metadata = member.metadata.with_(domain=target.id)
            made = Target(target, member.image, member.volume, metadata).made()
            target.publish(member.image, member.volume, made)

    def _recover(self, op: Operation) -> bool:
        volumes: list[str] | None = op.facts.get("volumes")
        if volumes is None:
            return False
        image = op.params["image"]
        sides = (op.params["domain"], image), (op.params["target"], image)
        with self._shop.copying(*sides) as (source, target), self._shop.domain(target):
            if set(volumes) <= set(target.volumes(image)):
                return True
            if op.facts.get("complete") and set(volumes) <= set(source.volumes(image)):
                members = [Member(image, v, source.load(image, v)) for v in volumes]
                self._publish(target, members)
                return True
            move_image.unmake(target, image, volumes, op.facts.get("template"))
        return False


def select(source: Store, target: Store, image: str, what: str) -> list[Member]:
    """The volumes whose data is to be copied, parents first.  Raises 268, 262, 1000."""
    if what not in (INTERNAL, LEAF, ALL):
        raise InvalidParameter(parameter="syncType", value=what, reason="INTERNAL, LEAF or ALL")
    for store in (source, target):
        if not store.volumes(image):
            raise ImageDoesNotExistInSD(image=image, domain=store.id)
    own: dict[str, Member] = {}
    for name in source.volumes(image):
        for member in chain.walk(source, image, name):
            if not (member.is_shared and member.metadata.image != image):
                own.setdefault(member.volume, member)
    wanted = {INTERNAL: (md.INTERNAL, md.SHARED), LEAF: (md.LEAF,)}.get(what)
    return [m for m in own.values() if wanted is None or m.metadata.voltype in wanted]


class SyncData:
    """The operation `image.sync`: params domain, image, target, what (INTERNAL, LEAF, ALL).

    A target volume is ILLEGAL until it has its data, and stays so if that fails.
    """

    def __init__(self, workshop: Workshop) -> None:
        self._shop = workshop

    def kind(self) -> Kind:
        return Kind("image.sync", (MARKED, COPIED), self._run, self._recover, work=COPYING)

    def _run(self, op: Operation) -> None:
        image = op.params["image"]
        sides = (op.params["domain"], image), (op.params["target"], image)
        with self._shop.copying(*sides) as (source, target):
            todo = select(source, target, image, op.params["what"])
            check_clear(source, todo)
            names = [member.volume for member in todo]
            check_clear(target, [Member(image, one, target.load(image, one)) for one in names])
            for number, member in enumerate(todo):
                self._copy(op, source, target, member, (number, len(todo)))

    def _copy(
        self, op: Operation, source: Store, target: Store, member: Member, part: tuple[int, int]
    ) -> None:
        image, volume = member.image, member.volume
        self._set_legality(target, image, volume, md.ILLEGAL)
        op.step(MARKED)
        metadata = target.load(image, volume)
        backing_format = None
        if member.parent is not None:
            backing_format = layers.qemu_format(target.load(image, member.parent))
        to = Target(target, image, volume, metadata, backing_format, fresh=False)
        members = chain.walk(source, image, volume)
        following = Following(op.progress_of(*part), op.cancel, op.pace)
        copy_layer(self._shop.qemu, source, members, to, following)
        op.step(COPIED)
        self._set_legality(target, image, volume, md.LEGAL)

    def _set_legality(self, store: Store, image: str, volume: str, legality: str) -> None:
        with self._shop.domain(store):
            store.save(image, volume, store.load(image, volume).with_(legality=legality))

    def _recover(self, op: Operation) -> bool:
        """Nothing to take back: what has no data yet says so by being ILLEGAL."""
        return False
