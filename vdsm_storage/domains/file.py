# SPDX-License-Identifier: GPL-2.0-or-later
"""A domain in a directory, local or shared."""

from __future__ import annotations

import contextlib
import errno
import fnmatch
import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from vdsm_storage.base import files
from vdsm_storage.base.cancel import Cancel
from vdsm_storage.base.owner import Owner
from vdsm_storage.domains import file_upgrade, layout, metadata
from vdsm_storage.domains.domain import ISO_IMAGE, Capacity, DomainType
from vdsm_storage.domains.family import DomainLocks, Leasing
from vdsm_storage.domains.file_store import FileStore
from vdsm_storage.domains.metadata import DomainMetadata
from vdsm_storage.domains.tree import Tree
from vdsm_storage.errors import (
    FileStatsError,
    NoSpaceForDomain,
    StorageDomainAccessError,
    StorageDomainDoesNotExist,
    StorageDomainLayoutError,
    VolumeAccessError,
)
from vdsm_storage.images.store import Progress
from vdsm_storage.leases.lockspace import Lockspace
from vdsm_storage.leases.model import Geometry, LeaseSpec

METADATA_LIMIT = 64 * 1024  # bytes; a sound one has less than 4096


@dataclass(frozen=True)
class Parts:
    """What is built around a domain; `lockspace` and `leasing` are None where it has no leases."""

    store: FileStore
    locks: DomainLocks
    lockspace: Lockspace | None
    leasing: Leasing | None


def read_metadata(root: str, sd_id: str) -> DomainMetadata:
    """From the storage, past the page cache.  Raises 358, 379, 751, 752."""
    tree = Tree(root, None)
    try:
        with tree.directory(layout.DOM_MD) as fd:
            tree.require_file(fd, layout.METADATA)
            text = files.read_direct(f"/proc/self/fd/{fd}/{layout.METADATA}", METADATA_LIMIT)
    except VolumeAccessError as error:
        raise StorageDomainLayoutError(domain=sd_id, reason=error) from error
    except FileNotFoundError as error:
        raise StorageDomainDoesNotExist(domain=sd_id) from error
    except OSError as error:
        raise StorageDomainAccessError(domain=sd_id, reason=error) from error
    found = DomainMetadata(metadata.decode(text, sd_id))
    if found.id != sd_id:
        reason = f"its metadata is that of domain {found.id}"
        raise StorageDomainLayoutError(domain=sd_id, reason=reason)
    return found


def check_special_files(tree: Tree, sd_id: str) -> None:
    """Whether the files that sanlock opens are files of the domain, or missing.

    Whoever can write to the storage could put links in their place.  Raises 358 and
    StorageDomainLayoutError (371).
    """
    try:
        with tree.directory(layout.DOM_MD) as fd:
            for name in (layout.IDS, layout.LEASES, layout.XLEASES):
                tree.require_file(fd, name)
    except FileNotFoundError as error:
        raise StorageDomainDoesNotExist(domain=sd_id) from error
    except VolumeAccessError as error:
        raise StorageDomainLayoutError(domain=sd_id, reason=error) from error


class FileDomain:
    """Fulfils domains.domain.Domain.  `mount` is the connected directory."""

    def __init__(
        self, mount: str, kind: DomainType, found: DomainMetadata, owner: Owner, parts: Parts
    ) -> None:
        self.id = found.id
        self.type = kind
        self.mount = mount
        self.path = os.path.join(mount, self.id)
        self.geometry = Geometry(found.block_size, found.alignment)
        self.store = parts.store
        self.lock = parts.locks.all
        self.own_lock = parts.locks.own
        self.lockspace = parts.lockspace
        self._leasing = parts.leasing
        self._owner = owner
        self._tree = Tree(self.path, owner)
        self.last = found  # as of the last reading

    @property
    def version(self) -> int:
        return self.last.version

    @property
    def metadata_path(self) -> str:
        return os.path.join(self.path, layout.DOM_MD, layout.METADATA)

    @property
    def xleases_path(self) -> str | None:
        if not self.type.leases or self.version < layout.XLEASES_VERSION:
            return None
        self.check_special_files()
        return os.path.join(self.path, layout.DOM_MD, layout.XLEASES)

    @property
    def ids_path(self) -> str:
        return os.path.join(self.path, layout.DOM_MD, layout.IDS)

    @property
    def sdm_lease(self) -> LeaseSpec:
        return layout.sdm_lease(self.id, self.path, self.geometry)

    @property
    def mailboxes(self) -> tuple[str, str]:
        dom_md = os.path.join(self.path, layout.DOM_MD)
        inbox, outbox = layout.MAILBOXES
        return os.path.join(dom_md, inbox), os.path.join(dom_md, outbox)

    def volume_leases(self) -> list[LeaseSpec]:
        """Volumes have files of their own for them."""
        return []

    def close(self) -> None:
        """Nothing is open."""

    def metadata(self) -> DomainMetadata:
        self.last = read_metadata(self.path, self.id)
        self.store.version = self.last.version  # it may have been upgraded, here or elsewhere
        return self.last

    def update_metadata(self, changes: Mapping[str, str | None]) -> DomainMetadata:
        old = self.metadata()
        new = old.with_changes(changes)
        if new.values != old.values:
            text = metadata.encode(new.values)
            with self._errors(), self._tree.directory(layout.DOM_MD) as fd:
                self._tree.replace_file(fd, layout.METADATA, text)
            self.last = new
            self.store.version = new.version
        return new

    def check_special_files(self) -> None:
        """Whether what is given to sanlock by name lies in the domain.  Raises 371."""
        check_special_files(self._tree, self.id)

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        """What the kernel says, as errors of this domain: full is not forbidden."""
        try:
            yield
        except FileNotFoundError as error:
            raise StorageDomainDoesNotExist(domain=self.id) from error
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise NoSpaceForDomain(path=self.path) from error
            raise StorageDomainAccessError(domain=self.id, reason=error) from error

    def capacity(self) -> Capacity:
        with self._errors():
            found = os.statvfs(self.path)
        return Capacity(found.f_frsize * found.f_blocks, found.f_frsize * found.f_bavail)

    def info(self) -> dict[str, Any]:
        found = self.metadata()
        return {**found.as_info(self.id), "remotePath": found.remote_path}

    def stats(self) -> dict[str, Any]:
        capacity = self.capacity()
        return {
            "disktotal": str(capacity.total),
            "diskfree": str(capacity.free),
            "mdavalid": True,
            "mdathreshold": True,
            "mdasize": 0,
            "mdafree": 0,
        }

    def self_test(self) -> None:
        self.check_special_files()
        with self._errors():
            with self._tree.directory(layout.IMAGES):
                pass
            read_only = os.statvfs(self.path).f_flag & os.ST_RDONLY
        if read_only:
            raise StorageDomainAccessError(domain=self.id, reason="its file system is read-only")

    def file_stats(self, pattern: str, case_sensitive: bool) -> dict[str, dict[str, int]]:
        """Files among the ISO images whose names match; `status` 0 is readable."""
        flags = 0 if case_sensitive else re.IGNORECASE
        wanted = re.compile(fnmatch.translate(pattern), flags)
        found = {}
        try:
            with self._tree.directory(layout.IMAGES, ISO_IMAGE) as fd, os.scandir(fd) as entries:
                for entry in entries:
                    if wanted.match(entry.name) and entry.is_file(follow_symlinks=False):
                        status = entry.stat(follow_symlinks=False)
                        readable = bool(status.st_mode & 0o444)
                        found[entry.name] = {
                            "size": status.st_size,
                            "ctime": int(status.st_ctime),
                            "status": 0 if readable else 1,
                        }
        except FileNotFoundError:
            return {}
        except OSError as error:
            raise FileStatsError(domain=self.id, reason=error) from error
        return found

    def collect(self, timeout: float, idle: Callable[[], bool]) -> None:
        """Files do not tell who made them; whoever did takes them back when it is restarted."""

    # -- a pool manager's corner -------------------------------------------------------------

    def prepare_master(self) -> None:
        with self._tree.directory() as fd:
            self._tree.make_directory(fd, layout.MASTER)
        with self._tree.directory(layout.MASTER) as fd:
            for name in layout.MASTER_DIRECTORIES:
                self._tree.make_directory(fd, name)

    # -- to another version ------------------------------------------------------------------

    def make_xleases(self) -> None:
        if self._leasing is not None:
            file_upgrade.make_xleases(
                self.path, self.id, self.geometry, self._owner, self._leasing
            )

    def upgrade_volumes(self, version: int, progress: Progress, cancel: Cancel) -> None:
        if version >= 5:
            file_upgrade.rewrite_volumes(self.store, version, progress, cancel)

    def upgrade_changes(self, version: int) -> dict[str, str | None]:
        return layout.upgrade_changes(version, self.geometry)

    def clean_upgrade(self) -> None:
        file_upgrade.clean(self.path)
