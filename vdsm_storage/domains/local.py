# SPDX-License-Identifier: GPL-2.0-or-later
"""Domains in a directory of this host.

No other host sees them, so the format has no leases: `ids` and `leases` stay empty, there are no
`xleases` and no `.lease` files, and a lock on the file `ids` guards the metadata.
"""

from __future__ import annotations

from typing import Final

from vdsm_storage.domains.domain import DomainType

LOCALFS: Final = DomainType("LOCALFS", leases=False, block_sizes=(512, 4096))
