# SPDX-License-Identifier: GPL-2.0-or-later
"""Domains on file systems that several hosts mount: guarded by sanlock, sectors of 512 bytes.

NFS and GlusterFS domains have the same layout; one that is reached through a POSIX connection
can be used as it is.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from vdsm_storage.domains.domain import DomainType
from vdsm_storage.domains.local import LOCALFS

POSIXFS: Final = DomainType("POSIXFS", leases=True, block_sizes=(512,))
NFS: Final = DomainType("NFS", leases=True, block_sizes=(512,))
GLUSTERFS: Final = DomainType("GLUSTERFS", leases=True, block_sizes=(512, 4096))

# By the name in the metadata.
FILE_TYPES: Final[Mapping[str, DomainType]] = {
    found.name: found for found in (LOCALFS, POSIXFS, NFS, GLUSTERFS)
}
