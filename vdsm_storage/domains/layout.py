# SPDX-License-Identifier: GPL-2.0-or-later
"""The directory of a new file domain, byte for byte as other hosts make it.

    <domain>/dom_md/{metadata,ids,inbox,outbox,leases,xleases}
    <domain>/images/

It is built under a hidden name beside its place and renamed when it is complete, so that nobody
ever sees half a domain.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final, Protocol

from vdsm_storage.base import files
from vdsm_storage.base.owner import Owner
from vdsm_storage.base.units import MIB
from vdsm_storage.base.uuids import is_uuid
from vdsm_storage.domains import metadata as md
from vdsm_storage.domains.domain import DomainType
from vdsm_storage.errors import (
    InvalidName,
    NoSpaceForDomain,
    StorageDomainBlockSizeMismatch,
    StorageDomainCreationError,
    StorageDomainDescriptionTooLong,
    StorageDomainPermission,
    StorageDomainUnsupportedTarget,
)
from vdsm_storage.leases.model import Geometry, LeaseSpec

DOM_MD: Final = "dom_md"
IMAGES: Final = "images"
METADATA: Final = "metadata"
IDS: Final = "ids"
LEASES: Final = "leases"
XLEASES: Final = "xleases"
MASTER: Final = "master"  # a pool manager's corner, beside dom_md
MASTER_DIRECTORIES: Final = ("vms", "tasks")
MAILBOXES: Final = ("inbox", "outbox")
MAILBOX_SIZE: Final = 16 * MIB
XLEASES_VERSION: Final = 4  # the first format that has xleases
SDM: Final = "SDM"  # the lease that guards the metadata
MODE: Final = 0o660
DIRECTORY_MODE: Final = 0o755
AUTO: Final = 0  # block size: find out
# Alignment for a number of hosts with sectors of 4096 bytes; 512-byte sectors hold 2000 in 1 MiB.
_ALIGNMENTS_4K: Final = ((250, MIB), (500, 2 * MIB), (1000, 4 * MIB), (2000, 8 * MIB))


class LeaseWriter(Protocol):
    """What making a domain needs of the leases floor."""

    def write_lockspace(self, lockspace: str, path: str, geometry: Geometry) -> None: ...

    def write(self, spec: LeaseSpec) -> None: ...

    def format_xleases(self, path: str, lockspace: str, geometry: Geometry) -> None: ...


@dataclass(frozen=True)
class NewDomain:
    """What StorageDomain.create asks for, checked; `remote_path` is the connection's."""

    id: str
    type: DomainType
    name: str
    version: int
    remote_path: str
    geometry: Geometry

    def metadata(self) -> dict[str, str]:
        """The metadata of a domain that is attached to nothing."""
        values = common_metadata(self.id, self.type.name, self.name, self.version)
        values["REMOTE_PATH"] = self.remote_path
        if self.version >= 5:
            values["BLOCK_SIZE"] = str(self.geometry.block_size)
            values["ALIGNMENT"] = str(self.geometry.alignment)
        return values


def check_name(name: str) -> str:
    """A domain's name as it is stored.  Raises 387, 1001."""
    name = name.strip()
    if len(name) > md.DESCRIPTION_LIMIT:
        raise StorageDomainDescriptionTooLong(name=name, limit=md.DESCRIPTION_LIMIT)
    if not name.isprintable():
        raise InvalidName(what="The name", name=name, reason="it has characters without a shape")
    return name


def common_metadata(sd_id: str, kind: str, name: str, version: int) -> dict[str, str]:
    """What the metadata of a new domain of any type says; it is attached to nothing."""
    return {
        "CLASS": "Data",
        "DESCRIPTION": name,
        "IOOPTIMEOUTSEC": "10",
        "LEASERETRIES": "3",
        "LEASETIMESEC": "60",
        "LOCKPOLICY": "",
        "LOCKRENEWALINTERVALSEC": "5",
        "POOL_UUID": "",
        "ROLE": md.REGULAR,
        "SDUUID": sd_id,
        "TYPE": kind,
        "VERSION": str(version),
    }


def alignment(block_size: int, hosts: int) -> int:
    """Bytes between two leases for `hosts` hosts (at most 2000)."""
    if block_size == 512:
        return MIB
    return next((size for most, size in _ALIGNMENTS_4K if hosts <= most), 8 * MIB)


def hidden(sd_id: str, purpose: str) -> str:
    """Name of a domain's directory while it is `new` or `removed`: no host takes it for one."""
    return f".{sd_id}.{purpose}"


def domains_in(mount: str) -> list[str]:
    """UUIDs of the domains in a connected directory.  May block; raises OSError."""
    return [
        name
        for name in os.listdir(mount)
        if is_uuid(name) and os.path.isdir(os.path.join(mount, name, DOM_MD))
    ]


def sdm_lease(sd_id: str, root: str, geometry: Geometry) -> LeaseSpec:
    path = os.path.join(root, DOM_MD, LEASES)
    return LeaseSpec(sd_id, SDM, path, geometry.alignment, geometry)


def upgrade_changes(version: int, geometry: Geometry) -> dict[str, str | None]:
    """How the metadata of an older domain changes to be that of `version`."""
    changes: dict[str, str | None] = {"VERSION": str(version)}
    if version >= 5:
        changes.update(
            BLOCK_SIZE=str(geometry.block_size),
            ALIGNMENT=str(geometry.alignment),
            LOGBLKSIZE=None,
            PHYBLKSIZE=None,
        )
    return changes


# -- making one ------------------------------------------------------------------------------


def make_directories(root: str, owner: Owner) -> None:
    for path in (root, os.path.join(root, DOM_MD), os.path.join(root, IMAGES)):
        os.mkdir(path, DIRECTORY_MODE)
        os.chmod(path, DIRECTORY_MODE)
        owner.apply(path)


def make_special_files(root: str, new: NewDomain, owner: Owner, leases: LeaseWriter | None) -> None:
    """The files beside the metadata; `leases` is None where the type has none."""
    for name in MAILBOXES:
        make_file(root, name, MAILBOX_SIZE, owner)
    for name in (IDS, LEASES):
        make_file(root, name, 0, owner)
    if leases is None:
        return
    dom_md = os.path.join(root, DOM_MD)
    step = new.geometry.alignment
    os.truncate(os.path.join(dom_md, IDS), step)
    os.truncate(os.path.join(dom_md, LEASES), 2 * step)
    leases.write_lockspace(new.id, os.path.join(dom_md, IDS), new.geometry)
    leases.write(sdm_lease(new.id, root, new.geometry))
    if new.version >= XLEASES_VERSION:
        make_xleases(root, new.id, new.geometry, owner, leases)


def make_xleases(
    root: str, sd_id: str, geometry: Geometry, owner: Owner, leases: LeaseWriter
) -> None:
    path = make_file(root, XLEASES, 0, owner)
    leases.format_xleases(path, sd_id, geometry)


def write_metadata(root: str, new: NewDomain, owner: Owner) -> None:
    path = os.path.join(root, DOM_MD, METADATA)
    files.write_atomic(path, md.encode(new.metadata()))
    owner.apply(path)
    for directory in (os.path.join(root, DOM_MD), root):
        files.sync_directory(directory)


def make_file(root: str, name: str, size: int, owner: Owner) -> str:
    """A special file in dom_md; returns its path."""
    path = os.path.join(root, DOM_MD, name)
    flags = os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW
    fd = os.open(path, flags, MODE)
    try:
        os.fchmod(fd, MODE)
        owner.apply_fd(fd)
        os.ftruncate(fd, size)
        os.fsync(fd)
    finally:
        os.close(fd)
    return path


def move(mount: str, old: str, new: str) -> None:
    """Rename within the connection, durably."""
    os.rename(os.path.join(mount, old), os.path.join(mount, new))
    files.sync_directory(mount)


def remove(mount: str, name: str) -> bool:
    """Remove a directory with all it holds, never following a link; True if it was there."""
    path = os.path.join(mount, name)
    if not os.path.lexists(path):
        return False
    if os.path.islink(path):
        os.unlink(path)
    else:
        shutil.rmtree(path)
    files.sync_directory(mount)
    return True


# -- what the storage can do -----------------------------------------------------------------


@contextlib.contextmanager
def storage_errors(sd_id: str, path: str, user: str) -> Iterator[None]:
    """Turn the kernel's answers into errors that say what to do: full is not forbidden."""
    try:
        yield
    except OSError as error:
        reason = f"{error.strerror} ({error.filename or path})"
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise NoSpaceForDomain(path=path) from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise StorageDomainPermission(path=path, user=user, reason=reason) from error
        raise StorageDomainCreationError(domain=sd_id, path=path, reason=reason) from error


def probe_block_size(directory: str, sd_id: str) -> int | None:
    """The smallest direct write that the storage takes, 512 or 4096; None without direct I/O."""
    path = os.path.join(directory, hidden(sd_id, "probe"))
    flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
    try:
        fd = os.open(path, flags, 0o600)
        try:
            os.ftruncate(fd, 8192)
        finally:
            os.close(fd)
        for size in (512, 4096):
            try:
                files.write_direct(path, bytes(size), size)
                return size if _takes_direct(path) else None
            except OSError as error:
                if error.errno != errno.EINVAL:
                    raise
        return None
    finally:
        files.unlink_if_there(path)


def _takes_direct(path: str) -> bool:
    try:
        os.close(os.open(path, os.O_RDWR | os.O_DIRECT | os.O_CLOEXEC))
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        return False
    return True


def choose_block_size(
    found: int | None, asked: int, kind: DomainType, version: int, path: str
) -> int:
    """The domain's block size.  Raises 348 where asked, found and format do not agree."""
    if found is None:
        if kind.leases:
            raise StorageDomainUnsupportedTarget(path=path, reason="it has no direct I/O")
        found = 512
    supported = kind.block_sizes if version >= 5 else (512,)
    size = found if asked == AUTO else asked
    if size not in supported or size != found:
        raise StorageDomainBlockSizeMismatch(
            path=path, found=found, asked=asked, type=kind.name, version=version,
            supported=" or ".join(map(str, supported)),
        )  # fmt: skip
    return size
