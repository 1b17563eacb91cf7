# SPDX-License-Identifier: GPL-2.0-or-later
"""Making an image usable on this host, and the links that tell where it is.

<run>/storage/<domain>/<image> leads to the directory that has the image's volumes, whatever kind
of storage they are on; programs that do not know mounts find a volume there.
"""

from __future__ import annotations

import contextlib
import os

from vdsm_storage.base.uuids import is_uuid
from vdsm_storage.errors import (
    AgentError,
    ImageIsNotLegalChain,
    PrepareIllegalVolume,
    VolumeDoesNotExist,
)
from vdsm_storage.images import chain
from vdsm_storage.images import metadata as md
from vdsm_storage.images.chain import Member
from vdsm_storage.images.store import Store
from vdsm_storage.images.workshop import Workshop, domain_lock, image_lock


class RunLinks:
    """Links below `directory`, which is on this host alone and empty after a boot."""

    def __init__(self, directory: str) -> None:
        self._directory = directory

    def path(self, domain: str, image: str) -> str:
        if not (is_uuid(domain) and is_uuid(image)):
            raise ValueError(f"{domain}/{image} cannot name a link")
        return os.path.join(self._directory, domain, image)

    def link(self, domain: str, image: str, target: str) -> str:
        """Let the image's link lead to the directory `target`; returns the link's path."""
        path = self.path(domain, image)
        if os.path.islink(path) and os.readlink(path) == target:
            return path
        os.makedirs(os.path.dirname(path), mode=0o755, exist_ok=True)
        new = path + ".new"
        with contextlib.suppress(FileNotFoundError):
            os.unlink(new)
        os.symlink(target, new)
        os.rename(new, path)
        return path

    def unlink(self, domain: str, image: str) -> None:
        """Remove the image's link and the domain's directory with the last of them."""
        path = self.path(domain, image)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)
        with contextlib.suppress(OSError):  # others are left, or it is gone
            os.rmdir(os.path.dirname(path))

    def clear(self, domain: str) -> None:
        """Remove all links of a domain that is disconnected."""
        directory = os.path.join(self._directory, domain)
        with contextlib.suppress(FileNotFoundError):
            for image in os.listdir(directory):
                os.unlink(os.path.join(directory, image))
            os.rmdir(directory)


class Preparing:
    """Image.prepare and Image.teardown."""

    def __init__(self, workshop: Workshop, links: RunLinks) -> None:
        self._shop = workshop
        self._links = links

    def prepare(
        self, domain: str, image: str, volume: str, *, allow_illegal: bool
    ) -> dict[str, str]:
        """Returns {path}: of the volume, with everything below it usable.

        Raises 201, 207, 227 (unless `allow_illegal`), 262, 757, 851.
        """
        store = self._shop.find_store(domain)
        shared = [domain_lock(domain), image_lock(domain, image, exclusive=False)]
        with self._shop.locks.held(shared, self._shop.lock_timeout):
            members = chain.walk(store, image, volume)
            for member in members:
                _check_member(store, member, allow_illegal=allow_illegal)
            store.prepare(image, [member.volume for member in members])
            path = store.path(image, volume)
            self._links.link(domain, image, os.path.dirname(path))
        return {"path": path}

    def teardown(self, domain: str, image: str, volume: str | None) -> None:
        """Undo prepare; nothing happens when it was undone already."""
        store = self._shop.find_store(domain)
        self._links.unlink(domain, image)
        volumes = store.volumes(image)
        if volume is not None and volume in volumes:
            with contextlib.suppress(AgentError):  # a chain that is damaged: all of the image
                volumes = [member.volume for member in chain.walk(store, image, volume)]
        store.release(image, volumes)


def _check_member(store: Store, member: Member, *, allow_illegal: bool) -> None:
    if not member.metadata.is_legal and not allow_illegal:
        raise PrepareIllegalVolume(volume=member.volume)
    if member.metadata.legality == md.FAKE:
        reason = f"volume {member.volume} stands for a template that is elsewhere"
        raise ImageIsNotLegalChain(image=member.image, reason=reason)
    try:
        store.sizes(member.image, member.volume)
    except VolumeDoesNotExist as error:
        reason = f"volume {member.volume} has metadata but no data"
        raise ImageIsNotLegalChain(image=member.image, reason=reason) from error
