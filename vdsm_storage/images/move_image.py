# SPDX-License-Identifier: GPL-2.0-or-later
"""Image.move: all volumes of an image into another domain, and gone from the first if moved."""

from __future__ import annotations

from dataclasses import dataclass

from vdsm_storage.errors import (
    ImageDoesNotExistInSD,
    OverwriteImageError,
    TemplateNotOnTarget,
)
from vdsm_storage.images import chain, delete, layers
from vdsm_storage.images import metadata as md
from vdsm_storage.images.chain import Member
from vdsm_storage.images.encryption import check_clear
from vdsm_storage.images.layer_copy import Following, Target, allocation, copy_layer
from vdsm_storage.images.store import Store
from vdsm_storage.images.workshop import Workshop
from vdsm_storage.jobs.operation import COPYING, Kind, Operation

MADE, COPIED, PUBLISHED, REMOVED = "made", "copied", "published", "source_removed"


@dataclass(frozen=True)
class _Plan:
    """`own` are the image's volumes, parents first; `template` is the base from another image."""

    own: list[Member]
    template: Member | None


def plan(source: Store, target: Store, image: str) -> _Plan:
    """What is to be copied.  Raises 268, 265, 263, 262."""
    names = source.volumes(image)
    if not names:
        raise ImageDoesNotExistInSD(image=image, domain=source.id)
    if target.volumes(image):
        raise OverwriteImageError(image=image, domain=target.id)
    own: dict[str, Member] = {}
    template = None
    for name in names:
        for member in chain.walk(source, image, name):
            if member.is_shared and member.metadata.image != image:
                template = member
            else:
                own.setdefault(member.volume, member)
    if template is not None and not target.images_of_volume(template.volume):
        raise TemplateNotOnTarget(image=image, volume=template.volume, domain=target.id)
    return _Plan(list(own.values()), template)


class MoveImage:
    """The operation `image.move`: params domain, image, target, move (False: copy),
    zero and discard (of the source, when it was moved)."""

    def __init__(self, workshop: Workshop) -> None:
        self._shop = workshop

    def kind(self) -> Kind:
        steps = (MADE, COPIED, PUBLISHED, REMOVED)
        return Kind("image.move", steps, self._run, self._recover, work=COPYING)

    def _run(self, op: Operation) -> None:
        image = op.params["image"]
        sides = (op.params["domain"], image), (op.params["target"], image)
        with self._shop.copying(*sides, moving=op.params["move"]) as (source, target):
            todo = plan(source, target, image)
            check_clear(source, todo.own)
            if op.params["move"]:
                delete.check_image(source, image)
            template = todo.template.volume if todo.template is not None else None
            op.record(volumes=[member.volume for member in todo.own], template=template)
            for number, member in enumerate(todo.own):
                self._copy(op, source, target, member, (number, len(todo.own)))
            op.record(copied=True)
            op.step(COPIED)
            self._publish(source, target, todo)
            op.step(PUBLISHED, abortable=False)
            if op.params["move"]:
                self._remove_source(op, source)
            op.step(REMOVED, abortable=False)

    def _copy(
        self, op: Operation, source: Store, target: Store, member: Member, part: tuple[int, int]
    ) -> None:
        backing_format = None
        if member.parent is not None:
            parent = source.load(member.image, member.parent)
            backing_format = layers.qemu_format(parent)
        metadata = member.metadata.with_(domain=target.id)
        to = Target(target, member.image, member.volume, metadata, backing_format)
        members = chain.walk(source, member.image, member.volume)
        size = allocation(self._shop.qemu, source, members, to)
        with target.lock.held(self._shop.lock_timeout):
            to.make(size)
            if member.parent is not None:
                share_template(target, member)
        op.step(MADE)
        following = Following(op.progress_of(*part), op.cancel, op.pace)
        copy_layer(self._shop.qemu, source, members, to, following)

    def _publish(self, source: Store, target: Store, todo: _Plan) -> None:
        with target.lock.held(self._shop.lock_timeout):
            for member in todo.own:
                arrived = Target(
                    target, member.image, member.volume, member.metadata.with_(domain=target.id)
                )
                target.publish(member.image, member.volume, arrived.made())

    def _remove_source(self, op: Operation, source: Store) -> None:
        image = op.params["image"]
        with source.lock.held(self._shop.lock_timeout):
            source.mark_removed(image, bool(op.params.get("zero")))
        source.purge(image, bool(op.params.get("discard")))

    def _recover(self, op: Operation) -> bool:
        """All data copied: the rest is done.  Less: what there is on the target goes."""
        volumes: list[str] | None = op.facts.get("volumes")
        if volumes is None:
            return False
        image = op.params["image"]
        sides = (op.params["domain"], image), (op.params["target"], image)
        with self._shop.copying(*sides, moving=op.params["move"]) as (source, target):
            there = target.volumes(image)
            whole = set(volumes) <= set(there)
            if not whole and op.facts.get("copied") and not op.cancel.requested:
                members = [Member(image, v, source.load(image, v)) for v in volumes]
                self._publish(source, target, _Plan(members, None))
                whole = True
            if not whole:
                with target.lock.held(self._shop.lock_timeout):
                    unmake(target, image, volumes, op.facts.get("template"))
                return False
            if op.params["move"] and (source.volumes(image) or image in source.removed_images()):
                self._remove_source(op, source)
        return True


def share_template(target: Store, member: Member) -> None:
    """Make the template that `member` is based on part of its image, if that is its parent."""
    assert member.parent is not None
    for other in target.images_of_volume(member.parent):
        if other != member.image and target.load(other, member.parent).voltype == md.SHARED:
            target.share(other, member.parent, member.image)
            return


def unmake(target: Store, image: str, volumes: list[str], template: str | None) -> None:
    """Remove what there is of an image that did not arrive whole."""
    if template is not None:
        target.unmake(image, template)
    for volume in reversed(volumes):
        target.unmake(image, volume)
