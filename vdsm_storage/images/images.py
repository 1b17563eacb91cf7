# SPDX-License-Identifier: GPL-2.0-or-later
"""Images: whole disks, each a chain of volumes or several that share their lower part."""

from __future__ import annotations

import logging
import os

from vdsm_storage.base.uuids import BLANK
from vdsm_storage.errors import ImageIsNotLegalChain
from vdsm_storage.images import chain, clone_image, guard, layers, move_image, roles
from vdsm_storage.images import metadata as md
from vdsm_storage.images.chain import Member
from vdsm_storage.images.prepare import Preparing, RunLinks
from vdsm_storage.images.store import NO_WIPE, Store, Wipe
from vdsm_storage.images.volumes import Volumes
from vdsm_storage.images.workshop import domain_lock, image_lock
from vdsm_storage.jobs.runner import Request

log = logging.getLogger("images")


class Images:
    """`run_directory` holds the links of prepared images."""

    def __init__(self, volumes: Volumes, run_directory: str) -> None:
        self._volumes = volumes
        self._shop = volumes.shop
        self.links = RunLinks(run_directory)
        self._preparing = Preparing(self._shop, self.links)

    def prepare(
        self, domain: str, image: str, volume: str, *, allow_illegal: bool = False
    ) -> dict[str, str]:
        """Returns {path}.  Raises what Preparing.prepare does."""
        return self._preparing.prepare(domain, image, volume, allow_illegal=allow_illegal)

    def teardown(self, domain: str, image: str, volume: str | None = None) -> None:
        self._preparing.teardown(domain, image, volume)

    def delete(self, domain: str, image: str, wipe: Wipe = NO_WIPE) -> str:
        """Start deleting an image; returns the task.  Raises 268, 223, 654."""
        return self._volumes.delete_image(domain, image, wipe)

    def delete_volumes(
        self,
        domain: str,
        image: str,
        volumes: list[str],
        *,
        force: bool,
        wipe: Wipe = NO_WIPE,
    ) -> str:
        """Start deleting some volumes of an image; returns the task.  Raises 201, 204, 223."""
        self._volumes.of_image(domain, image)
        return self._volumes.delete(domain, image, volumes, force=force, wipe=wipe)

    def move(
        self, domain: str, image: str, target: str, *, move: bool, wipe: Wipe = NO_WIPE
    ) -> str:
        """Start copying an image to another domain, or moving it there; returns the task.

        `wipe` tells what becomes of the data at the source when it is moved.

        Raises 268, 265, 263, 654.
        """
        store = self._shop.find_store(target)
        move_image.plan(self._shop.find_store(domain), store, image)
        request = Request(
            kind="image.move",
            params={
                "domain": domain,
                "image": image,
                "target": target,
                "move": move,
                "zero": wipe.zero,
                "discard": wipe.discard,
            },
            domains=[domain, target],
            verb="moveImage" if move else "copyImage",
            lane=target,
            description=f"{'Move' if move else 'Copy'} image {image} to domain {target}",
        )
        return self._volumes.start(store, request)

    def clone_structure(self, domain: str, image: str, target: str) -> str:
        """Start making the image's volumes, without data, in another domain; returns the task.

        Raises 268, 265, 263, 654.
        """
        store = self._shop.find_store(target)
        move_image.plan(self._shop.find_store(domain), store, image)
        request = Request(
            kind="image.clone",
            params={"domain": domain, "image": image, "target": target},
            domains=[domain, target],
            verb="cloneImageStructure",
            lane=target,
            description=f"Make the volumes of image {image} in domain {target}",
        )
        return self._volumes.start(store, request)

    def sync_data(self, domain: str, image: str, target: str, what: str) -> str:
        """Start copying the data of volumes that cloneStructure made; returns the task.

        `what` is INTERNAL, LEAF or ALL.  Raises 268, 1000, 654.
        """
        store = self._shop.find_store(target)
        clone_image.select(self._shop.find_store(domain), store, image, what)
        request = Request(
            kind="image.sync",
            params={"domain": domain, "image": image, "target": target, "what": what},
            domains=[domain, target],
            verb="syncImageData",
            lane=target,
            description=f"Copy the data of image {image} to domain {target}",
        )
        return self._volumes.start(store, request)

    def volumes(self, domain: str, image: str) -> list[str]:
        """Raises ImageDoesNotExistInSD (268)."""
        return self._volumes.of_image(domain, image)

    # -- after a merge whose end nobody saw ----------------------------------------------------

    def reconcile(self, domain: str, image: str, leaf: str) -> list[str]:
        """Make the metadata say what the qcow2 headers say; returns the real chain, base first.

        A volume that dropped out of the chain stays, for deleteVolumes to remove.  So does a leaf
        that is ILLEGAL: a live merge marks it so before the guest goes on with the volume below.
        Raises 201, 262, 654.
        """
        store = self._shop.find_store(domain)
        shared = [domain_lock(domain), image_lock(domain, image, exclusive=False)]
        with self._shop.locks.held(shared, self._shop.lock_timeout):
            actual, recorded = self._both_chains(store, image, leaf)
        if actual == recorded:
            return actual  # also while a live merge goes on
        held = [domain_lock(domain), image_lock(domain, image)]
        with self._shop.locks.held(held, self._shop.lock_timeout):
            actual, recorded = self._both_chains(store, image, leaf)
            if actual != recorded:
                log.warning("Image %s: metadata says %s, qemu %s", image, recorded, actual)
                with store.lock.held(self._shop.lock_timeout):
                    self._rewrite(store, image, actual)
        return actual

    def _both_chains(self, store: Store, image: str, leaf: str) -> tuple[list[str], list[str]]:
        """As the headers have it, and as the metadata do; the lowest first."""
        actual = self._actual_chain(store, image, leaf)
        if len(actual) > 1 and not store.load(image, leaf).is_legal:
            actual.pop()
        return actual, [member.volume for member in chain.walk(store, image, actual[-1])]

    def _actual_chain(self, store: Store, image: str, leaf: str) -> list[str]:
        """What the headers say, walked inside the image only."""
        there = store.volumes(image)
        found: list[str] = []
        volume: str | None = leaf
        while volume is not None:
            if volume in found:
                raise ImageIsNotLegalChain(image=image, reason=f"{volume} is its own ancestor")
            found.insert(0, volume)
            metadata = store.load(image, volume)
            if metadata.format != md.COW:
                break
            with guard.active(store, image, [volume], prepared=False):
                info = layers.look(store, self._shop.qemu, Member(image, volume, metadata))
            volume = os.path.basename(info.backing) if info.backing is not None else None
            if volume is not None and volume not in there:
                reason = f"the header of {found[0]} names {info.backing!r}, which is not in it"
                raise ImageIsNotLegalChain(image=image, reason=reason)
        return found

    def _rewrite(self, store: Store, image: str, actual: list[str]) -> None:
        parent = BLANK
        for volume in actual:
            metadata = store.load(image, volume)
            if metadata.parent != parent:
                store.save(image, volume, metadata.with_(parent=parent))
            if parent != BLANK:
                roles.mark_internal(store, image, parent)
            parent = volume
