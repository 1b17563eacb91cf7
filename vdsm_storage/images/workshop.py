# SPDX-License-Identifier: GPL-2.0-or-later
"""What every operation on volumes needs, and the locks that it holds."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass

from vdsm_storage.base.locks import Lock, Locks
from vdsm_storage.base.secret import Secret
from vdsm_storage.errors import InvalidParameter
from vdsm_storage.host.qemu_img import QemuImg
from vdsm_storage.host.qemu_img_luks import QemuImgLuks
from vdsm_storage.images.encryption import Encryption
from vdsm_storage.images.store import Store


def image_lock(sd_id: str, image: str, *, exclusive: bool = True) -> Lock:
    return Lock("01_img_" + sd_id, image, exclusive)


def domain_lock(sd_id: str, *, exclusive: bool = False) -> Lock:
    """Shared for work on images, exclusive for what concerns the whole domain."""
    return Lock("00_storage", sd_id, exclusive)


@dataclass(frozen=True)
class Workshop:
    """`lock_timeout` is seconds."""

    find_store: Callable[[str], Store]
    qemu: QemuImg
    locks: Locks
    lock_timeout: float
    encryption: Encryption | None = None

    def luks_and_key(self, secret: str) -> tuple[QemuImgLuks, Secret]:
        """What works on encrypted volumes, and a secret's value.  Raises 1000."""
        if self.encryption is None:
            raise InvalidParameter(parameter="secretID", value=secret, reason="no secrets here")
        return self.encryption.luks, self.encryption.key(secret)

    @contextlib.contextmanager
    def images(self, sd_id: str, image: str, source: str | None = None) -> Iterator[Store]:
        """Hold `image`, and the image `source` shared, inside this process.

        Raises ResourceTimeout (851).
        """
        store = self.find_store(sd_id)
        group = [domain_lock(sd_id), image_lock(sd_id, image)]
        if source is not None and source != image:
            group.append(image_lock(sd_id, source, exclusive=False))
        with self.locks.held(group, self.lock_timeout):
            yield store

    def domain(self, store: Store) -> AbstractContextManager[None]:
        """Hold the domain's lock between hosts.  Raises SpmStatusError (654)."""
        return store.lock.held(self.lock_timeout)

    @contextlib.contextmanager
    def changing(self, sd_id: str, image: str, source: str | None = None) -> Iterator[Store]:
        """Hold all that a change of `image` needs: images() and domain()."""
        with self.images(sd_id, image, source) as store, self.domain(store):
            yield store

    @contextlib.contextmanager
    def copying(
        self, source: tuple[str, str], target: tuple[str, str], *, moving: bool = False
    ) -> Iterator[tuple[Store, Store]]:
        """Hold two images, (domain, image) each: the source shared unless it is to go.

        The domains' locks are not held: a copy takes long; take them for each change.
        """
        group = [
            domain_lock(source[0]),
            domain_lock(target[0]),
            image_lock(*source, exclusive=moving),
            image_lock(*target),
        ]
        stores = self.find_store(source[0]), self.find_store(target[0])
        with self.locks.held(group, self.lock_timeout):
            yield stores
