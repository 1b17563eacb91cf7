# SPDX-License-Identifier: GPL-2.0-or-later
"""The storage's side of a live merge: room in the base, and metadata that tell the truth.

A leaf that the guest leaves is marked ILLEGAL before it does: a host that dies then leaves no
volume behind that looks like the guest's last state and is not.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from vdsm_storage.base.cancel import Cancel
from vdsm_storage.errors import AgentError, CommandError, ImageIsNotLegalChain, SpmStatusError
from vdsm_storage.host.qemu_img import QCOW2, QemuImg
from vdsm_storage.images import chain, guard, layers, merge, merged
from vdsm_storage.images import metadata as md
from vdsm_storage.images.chain import Member
from vdsm_storage.images.guard import Guard
from vdsm_storage.images.metadata import VolumeMetadata
from vdsm_storage.images.store import Store
from vdsm_storage.vms.merge_request import MergeRequest

BRIEF: Final = 5.0  # seconds to wait for hosts that hold a domain's lock for one change
EXTEND: Final = 60.0  # seconds for a volume to get more storage

log = logging.getLogger("vms.merge")

# extend(domain, volume, size, timeout in seconds) -> the bytes that a volume on LUNs has then
Extend = Callable[[str, str, int, float], int]
Save = Callable[[str, str, VolumeMetadata], None]


@dataclass(frozen=True)
class MergeStorage:
    """`lock_timeout` is seconds for the domain's lock; it is not waited for longer than BRIEF,
    because a manager elsewhere keeps it."""

    guard: Guard
    qemu_img: QemuImg
    extend_block: Extend
    lock_timeout: float

    @contextlib.contextmanager
    def held(self, asked: MergeRequest, cancel: Cancel | None = None) -> Iterator[None]:
        """The image against whoever would change its chain, for as long as the merge lasts.

        Shared: it can be prepared and read meanwhile.
        """
        with self.guard.reading(asked.target, cancel):
            yield

    # -- before ------------------------------------------------------------------------------

    def check(self, asked: MergeRequest, child: str | None) -> Sequence[Member]:
        """The chain up to top, base first, if the metadata allow the merge.

        `child` is what the VM has above top.  Raises MergeFailed (52), 358.
        """
        store = self.guard.store(asked.domain)
        try:
            members = chain.walk(store, asked.image, asked.top)
            users = {name: chain.children(store, asked.image, name) for name in _names(asked)}
        except AgentError as error:
            raise asked.failed(error) from error
        if [member.volume for member in members[-2:]] != _names(asked):
            raise asked.failed(f"the metadata have volume {members[-1].parent} below {asked.top}")
        for member in members[-2:]:
            if member.is_shared:
                raise asked.failed(f"volume {member.volume} is a template (SHARED)")
        if not members[-2].metadata.is_legal:
            raise asked.failed(f"volume {asked.base} is {members[-2].metadata.legality}")
        for name, expected in zip(_names(asked), (asked.top, child), strict=True):
            for user in users[name]:
                # One that was merged before and waits for its deletion may be there.
                if user.volume != expected and user.metadata.is_legal:
                    raise asked.failed(f"volume {user.volume}, too, is based on {name}")
        return members

    def check_merged(self, asked: MergeRequest) -> None:
        """Whether top may be what was merged into base before.  Raises MergeFailed (52), 358."""
        store = self.guard.store(asked.domain)
        try:
            metadata = store.load(asked.image, asked.top)
        except AgentError as error:
            raise asked.failed(error) from error
        if metadata.parent != asked.base:
            raise asked.failed(f"the VM does not use volume {asked.top}")

    def extend(self, asked: MergeRequest, child: str | None) -> None:
        """Room in the base for what comes from top: as much as is measured, and for a guest's
        own layer what it may write meanwhile.  Raises 52, 504, 206."""
        store = self.guard.store(asked.domain)
        if not store.is_block:
            return  # a file grows when it is written, and QEMU makes it as long as top
        members = self.check(asked, child)
        size = store.sizes(asked.image, asked.base).apparent
        wanted = self._wanted(store, members, leaf=child is None)
        if wanted > size:
            log.info("Volume %s gets %d bytes for a merge, it has %d", asked.base, wanted, size)
            self.extend_block(asked.domain, asked.base, wanted, EXTEND)

    def _wanted(self, store: Store, members: Sequence[Member], *, leaf: bool) -> int:
        base, top = members[-2:]
        if not base.is_cow:
            capacity = max(base.metadata.capacity, top.metadata.capacity)
            return capacity + base.metadata.overhead
        names = [member.volume for member in members]
        with guard.active(store, base.image, names, prepared=False):
            both = [layers.layer(store, member) for member in (base, top)]
            needed = self.qemu_img.measure_layers(both, QCOW2)
        return merge.room(needed, leaf=leaf)

    # -- marks and metadata ------------------------------------------------------------------

    def mark(self, asked: MergeRequest) -> None:
        """The leaf is about to be left by the guest."""
        self._set_legality(asked, md.ILLEGAL)

    def unmark(self, asked: MergeRequest) -> None:
        """The guest stays on its leaf; nothing happens when it was not marked."""
        self._set_legality(asked, md.LEGAL)

    def is_marked(self, asked: MergeRequest) -> bool:
        store = self.guard.store(asked.domain)
        return not store.load(asked.image, asked.top).is_legal

    def _set_legality(self, asked: MergeRequest, legality: str) -> None:
        store = self.guard.store(asked.domain)
        metadata = store.load(asked.image, asked.top)
        if metadata.legality != legality:
            store.save(asked.image, asked.top, metadata.with_(legality=legality))

    def is_written(self, asked: MergeRequest) -> bool:
        """Whether all that was in top is on the storage, in base, and stays there.

        A QEMU whose base failed once keeps what it has to write there in its memory.
        """
        store, image = self.guard.store(asked.domain), asked.image
        names = [asked.base, asked.top]
        if asked.top not in store.volumes(image):
            return True  # it was deleted since
        with guard.active(store, image, names, prepared=False):
            members = [Member(image, name, store.load(image, name)) for name in names]
            base, top = (layers.layer(store, member) for member in members)
            fd = os.open(layers.opened(store, base.path), os.O_RDONLY | os.O_CLOEXEC)
            try:
                os.fsync(fd)
            finally:
                os.close(fd)
            where = merged.absent_at(self.qemu_img, top, base)
        if where is not None:
            log.warning("Volume %s has not got all of %s yet, at %d", asked.base, asked.top, where)
        return where is None

    def synchronise(self, asked: MergeRequest, child: str | None) -> None:
        """Let the metadata say what the guest uses: base without top.  Can be repeated.

        Raises 208, 651.
        """
        store = self.guard.store(asked.domain)
        try:
            with store.lock.held(min(BRIEF, self.lock_timeout)):
                self._rewrite(store, store.save, asked, child)
        except SpmStatusError as error:
            log.info("Volume %s: written without the lock: %s", asked.base, error)
            self._rewrite(store, store.save_for_guest, asked, child)
        store.release(asked.image, [asked.top])

    @staticmethod
    def _rewrite(store: Store, save: Save, asked: MergeRequest, child: str | None) -> None:
        image = asked.image
        base = store.load(image, asked.base)
        if child is not None:
            above = store.load(image, child)
            if above.parent == asked.top:
                save(image, child, above.with_(parent=asked.base))
        capacity = base.capacity
        if asked.top in store.volumes(image):
            top = store.load(image, asked.top)
            capacity = max(capacity, top.capacity)
            if top.is_legal:
                save(image, asked.top, top.with_(legality=md.ILLEGAL))
        voltype = base.voltype if child is not None else md.LEAF
        now = base.with_(voltype=voltype, capacity=capacity)
        if now != base:
            save(image, asked.base, now)

    # -- when there is no VM to ask ----------------------------------------------------------

    def has_merged(self, asked: MergeRequest, child: str | None) -> bool:
        """What the volumes say of a merge whose VM is gone.

        A child's header is changed when all is in base.  A guest's own layer has been left only
        if it was marked, and surely if base shows the same bytes without it; if it does not, the
        layer is what the guest wrote to.  Raises 262.
        """
        store = self.guard.store(asked.domain)
        if child is not None:
            metadata = store.load(asked.image, child)
            with guard.active(store, asked.image, [child], prepared=False):
                member = Member(asked.image, child, metadata)
                info = layers.look(store, self.qemu_img, member)
            path = store.path(asked.image, child)
            return layers.names_parent(info.backing, path, asked.base)
        return self.is_marked(asked) and self._are_equal(store, asked)

    def _are_equal(self, store: Store, asked: MergeRequest) -> bool:
        members = chain.walk(store, asked.image, asked.top)
        names = [member.volume for member in members]
        with guard.active(store, asked.image, names, prepared=False):
            try:
                layers.check_header(store, self.qemu_img, members[-1])
                top, base = (layers.layer(store, member) for member in members[:-3:-1])
                return self.qemu_img.compare(top, base)
            except (CommandError, ImageIsNotLegalChain) as error:
                log.warning("Volume %s cannot be compared with its base: %s", asked.top, error)
                return False


def _names(asked: MergeRequest) -> list[str]:
    return [asked.base, asked.top]
