# SPDX-License-Identifier: GPL-2.0-or-later
"""Volumes as files: <domain>/images/<image>/{<volume>,<volume>.meta,<volume>.lease}.

A volume exists from the moment its `.meta` stands: that file is written last, by rename, and
removed first.  A template in use is hard-linked into every image that is based on it.  An image
is deleted by renaming its directory to `_remove_me_<image>`, and emptied after.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Iterator, Sequence
from typing import Protocol

from vdsm_storage.base.owner import Owner
from vdsm_storage.base.uuids import is_uuid
from vdsm_storage.domains import file_listing, tree
from vdsm_storage.domains.file_listing import IMAGES, META, REMOVED
from vdsm_storage.domains.tree import DATA_MODE, Tree
from vdsm_storage.errors import (
    AgentError,
    CannotShareVolume,
    ImageDoesNotExistInSD,
    ImagePathError,
    InvalidParameter,
    NoSpaceLeftOnDomain,
    VolumeAlreadyExists,
    VolumeDoesNotExist,
)
from vdsm_storage.images import metadata as md
from vdsm_storage.images.metadata import VolumeMetadata
from vdsm_storage.images.store import Examined, NewVolume, Progress, Sizes, Wipe, no_progress
from vdsm_storage.leases.model import ClusterLock, Geometry, LeaseSpec

LEASE = ".lease"
META_LIMIT = 4096  # bytes that are read of a .meta; a sound one has 512 at most
FIRST_BLOCK = 4096  # a sparse raw file has its first block: qemu probes the alignment there


class LeaseWriter(Protocol):
    """The part of leases.lease.Leases that is used here."""

    def write(self, spec: LeaseSpec) -> None:
        """Write a free lease."""


class FileStore:
    """Fulfils images.store.Store in the directory `root` (`<mount>/<domain's UUID>`).

    `leases` writes volume leases, None where the format has none (local directories); `owner` is
    the owner of volumes, None leaves them the agent's.
    """

    is_block = False

    def __init__(
        self,
        root: str,
        sd_id: str,
        version: int,
        geometry: Geometry,
        lock: ClusterLock,
        leases: LeaseWriter | None,
        owner: Owner | None = None,
    ) -> None:
        self.root = root
        self.id = sd_id
        self.version = version
        self.geometry = geometry
        self.lock = lock
        self._leases = leases
        self._tree = Tree(root, owner)

    # -- what is there -----------------------------------------------------------------------

    def images(self) -> list[str]:
        return file_listing.images(self._tree)

    def volumes(self, image: str) -> list[str]:
        try:
            with self._image(image) as fd:
                return file_listing.published(fd)
        except FileNotFoundError:
            return []

    def all_volumes(self) -> dict[str, list[str]]:
        return file_listing.all_volumes(self._tree)

    def removed_images(self) -> dict[str, list[str]]:
        return file_listing.removed_images(self._tree)

    def images_of_volume(self, volume: str) -> list[str]:
        return file_listing.images_of_volume(self._tree, _check(volume))

    # -- one volume --------------------------------------------------------------------------

    def load(self, image: str, volume: str) -> VolumeMetadata:
        return md.decode(self._read(image, volume), volume)

    def parse(self, image: str, volume: str) -> md.Parsed:
        return md.parse(self._read(image, volume))

    def examine(self, image: str, volume: str) -> tuple[VolumeMetadata, Sizes]:
        _check(volume)
        try:
            with self._tree.directory(IMAGES, _check(image)) as fd:
                data = self._tree.read_file(fd, volume + META, META_LIMIT)
                status = os.stat(volume, dir_fd=fd, follow_symlinks=False)
        except FileNotFoundError:
            raise self._missing(image, volume) from None
        return md.decode(data, volume), Sizes(status.st_size, status.st_blocks * 512)

    def examine_all(self) -> Iterator[Examined]:
        """What cannot be read has no metadata, or no sizes."""
        for volume, (image, *_) in self.all_volumes().items():
            parsed, sizes = None, None
            with contextlib.suppress(AgentError, OSError):
                parsed = self.parse(image, volume)
                sizes = self.sizes(image, volume)
            yield Examined(volume, image, parsed, sizes)
        for image, volumes in self.removed_images().items():
            for volume in volumes:
                yield Examined(volume, image, None, None, removed=True)

    def _read(self, image: str, volume: str) -> bytes:
        _check(volume)
        try:
            with self._image(image) as fd:
                return self._tree.read_file(fd, volume + META, META_LIMIT)
        except FileNotFoundError:
            raise self._missing(image, volume) from None

    def save(self, image: str, volume: str, metadata: VolumeMetadata) -> None:
        _check(volume)
        text = metadata.encode(self.version, volume)
        try:
            with self._image(image) as fd:
                if tree.status(fd, volume + META) is None:
                    raise self._missing(image, volume)
                data_file = tree.status(fd, volume)
                self._tree.replace_file(fd, volume + META, text)
        except FileNotFoundError:
            raise self._missing(image, volume) from None
        if data_file is not None and data_file.st_nlink > 1:  # a template in use: one .meta too
            for other in self.images_of_volume(volume):
                if other != image:
                    self._link(image, other, volume + META)

    def save_for_guest(self, image: str, volume: str, metadata: VolumeMetadata) -> None:
        self.save(image, volume, metadata)

    def agree(self, image: str) -> None:
        """A parent's name is in one place only."""

    def path(self, image: str, volume: str) -> str:
        return self._safe_path(image, volume, "")

    def sizes(self, image: str, volume: str) -> Sizes:
        _check(volume)
        try:
            with self._image(image) as fd:
                status = tree.status(fd, volume)
        except FileNotFoundError:
            status = None
        if status is None:
            raise self._missing(image, volume)
        return Sizes(status.st_size, status.st_blocks * 512)

    def lease(self, image: str, volume: str) -> LeaseSpec | None:
        if self._leases is None:
            return None
        path = self._safe_path(image, volume, LEASE)
        return LeaseSpec(self.id, volume, path, 0, self.geometry)

    # -- changes -----------------------------------------------------------------------------

    def make(self, new: NewVolume, progress: Progress = no_progress) -> str:
        """As the protocol says; a raw volume is complete then; a cow one is empty, or has
        all the space that it will need.

        Raises VolumeAlreadyExists for a published volume, NoSpaceLeftOnDomain.
        """
        _check(new.volume)
        with self._tree.directory(IMAGES) as images_fd:
            self._tree.make_directory(images_fd, _check(new.image))
        with self._image(new.image) as fd:
            if tree.status(fd, new.volume + META) is not None:
                raise VolumeAlreadyExists(volume=new.volume, image=new.image, domain=self.id)
            try:
                self._make_data(fd, new, progress)
                self._make_lease(fd, new)
            except BaseException as error:
                tree.remove(fd, new.volume)
                tree.remove(fd, new.volume + LEASE)
                if isinstance(error, OSError):
                    raise self._no_space(error, new.size) from error
                raise
        return self.path(new.image, new.volume)

    def _make_data(self, image_fd: int, new: NewVolume, progress: Progress) -> None:
        fd = self._tree.create_file(image_fd, new.volume, DATA_MODE)
        try:
            if new.preallocated:
                tree.allocate(fd, 0, new.size, progress)
            elif new.raw:
                os.pwrite(fd, bytes(min(FIRST_BLOCK, new.size)), 0)
                os.ftruncate(fd, new.size)
        finally:
            os.close(fd)

    def _make_lease(self, image_fd: int, new: NewVolume) -> None:
        spec = self.lease(new.image, new.volume)
        if spec is None or self._leases is None:
            return
        os.close(self._tree.create_file(image_fd, new.volume + LEASE, DATA_MODE))
        self._leases.write(spec)

    def publish(self, image: str, volume: str, metadata: VolumeMetadata) -> None:
        _check(volume)
        data = metadata.encode(self.version, volume)
        with self._image(image) as fd:
            data_fd = self._tree.open_file(fd, volume, os.O_RDONLY)
            try:
                os.fdatasync(data_fd)
            finally:
                os.close(data_fd)
            self._tree.replace_file(fd, volume + META, data)

    def unpublish(self, image: str, volume: str) -> None:
        _check(volume)
        with contextlib.suppress(FileNotFoundError), self._image(image) as fd:
            if tree.remove(fd, volume + META):
                tree.sync(fd)

    def wipe(self, image: str, volume: str, how: Wipe, progress: Progress = no_progress) -> None:
        """File systems give freed blocks back zeroed."""

    def unmake(self, image: str, volume: str) -> None:
        self.unpublish(image, volume)
        try:
            with self._image(image) as fd:
                for name in (volume + META + ".new", volume + LEASE, volume):
                    tree.remove(fd, name)
                tree.sync(fd)
        except FileNotFoundError:
            return
        with self._tree.directory(IMAGES) as images_fd:
            tree.remove_directory(images_fd, image)

    def has_remains(self, image: str, volume: str) -> bool:
        _check(volume)
        try:
            with self._image(image) as fd:
                names = os.listdir(fd)
        except FileNotFoundError:
            return False
        ours = {volume, volume + LEASE, volume + META + ".new"}
        return not names or (volume + META not in names and not ours.isdisjoint(names))

    def resize(
        self,
        image: str,
        volume: str,
        size: int,
        preallocate: bool,
        progress: Progress = no_progress,
    ) -> None:
        """As the protocol says; when it fails the volume has its old size."""
        _check(volume)
        try:
            with self._image(image) as image_fd:
                fd = self._tree.open_file(image_fd, volume, os.O_RDWR)
        except FileNotFoundError:
            raise self._missing(image, volume) from None
        try:
            old = os.fstat(fd).st_size
            try:
                if preallocate and size > old:
                    tree.allocate(fd, old, size, progress)
                else:
                    os.ftruncate(fd, size)
                os.fsync(fd)
            except BaseException as error:
                os.ftruncate(fd, old)
                if isinstance(error, OSError):
                    raise self._no_space(error, size - old) from error
                raise
        finally:
            os.close(fd)

    def share(self, image: str, volume: str, into: str) -> None:
        _check(volume)
        with self._tree.directory(IMAGES) as images_fd:
            self._tree.make_directory(images_fd, _check(into))
        try:
            self._link(image, into, volume)
            with contextlib.suppress(FileNotFoundError):
                self._link(image, into, volume + LEASE)
            self._link(image, into, volume + META)
        except FileNotFoundError:
            raise self._missing(image, volume) from None

    def _link(self, image: str, into: str, name: str) -> None:
        with self._image(image) as source, self._image(into) as target:
            try:
                self._tree.link(source, target, name)
            except OSError as error:
                if error.errno not in (errno.EPERM, errno.EMLINK, errno.EXDEV, errno.ENOTSUP):
                    raise
                raise CannotShareVolume(volume=name, image=into, reason=error.strerror) from error

    def mark_removed(self, image: str, zero: bool = False) -> None:
        """As the protocol says.  Raises ImageDoesNotExistInSD (268)."""
        marked = REMOVED + _check(image)
        with self._tree.directory(IMAGES) as fd:
            there = tree.status(fd, image)
            if tree.status(fd, marked) is not None:
                if there is None:
                    return
                self.purge(image)  # what an earlier deletion of the same image left
            if there is None:
                raise ImageDoesNotExistInSD(image=image, domain=self.id)
            if not stat.S_ISDIR(there.st_mode):
                raise ImagePathError(path=f"{self.root}/{IMAGES}/{image}", reason="no directory")
            os.rename(image, marked, src_dir_fd=fd, dst_dir_fd=fd)
            tree.sync(fd)

    def purge(
        self, image: str, discard: bool = False, progress: Progress = no_progress
    ) -> None:
        marked = REMOVED + _check(image)
        try:
            with self._tree.directory(IMAGES, marked) as fd:
                for name in os.listdir(fd):
                    tree.remove(fd, name)
        except FileNotFoundError:
            return
        with self._tree.directory(IMAGES) as fd:
            tree.remove_directory(fd, marked)

    # -- use on this host --------------------------------------------------------------------

    def activate(self, image: str, volumes: Sequence[str]) -> None:
        """Nothing to activate; modes and owners that someone changed are put right."""
        with self._image(image) as image_fd:
            for volume in volumes:
                fd = self._tree.open_file(image_fd, _check(volume), os.O_RDONLY)
                try:
                    self._tree.restore(fd, DATA_MODE)
                finally:
                    os.close(fd)

    def deactivate(self, image: str, volumes: Sequence[str]) -> None:
        """Nothing to do for files."""

    def prepare(self, image: str, volumes: Sequence[str]) -> None:
        self.activate(image, volumes)

    def release(self, image: str, volumes: Sequence[str]) -> None:
        """Nothing to do for files."""

    def evict(self, image: str, volumes: Sequence[str]) -> None:
        """Nothing to do for files."""

    def refresh(self, image: str, volume: str) -> None:
        self.activate(image, [volume])

    # -- inside ------------------------------------------------------------------------------

    def _safe_path(self, image: str, volume: str, suffix: str) -> str:
        """For a program that opens files by name: the name leads to a file here, or to nothing."""
        name = _check(volume) + suffix
        with contextlib.suppress(FileNotFoundError), self._image(image) as fd:
            self._tree.require_file(fd, name)
        return f"{self.root}/{IMAGES}/{image}/{name}"

    @contextlib.contextmanager
    def _image(self, image: str) -> Iterator[int]:
        with self._tree.directory(IMAGES, _check(image)) as fd:
            yield fd

    def _missing(self, image: str, volume: str) -> VolumeDoesNotExist:
        return VolumeDoesNotExist(volume=volume, image=image, domain=self.id)

    def _no_space(self, error: OSError, size: int) -> Exception:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            return NoSpaceLeftOnDomain(domain=self.id, size=size)
        return error


def _check(name: str) -> str:
    if not is_uuid(name):
        raise InvalidParameter(parameter="UUID", value=repr(name), reason="not a lower-case UUID")
    return name
