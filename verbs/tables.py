# SPDX-License-Identifier: GPL-2.0-or-later
"""All verbs that are built, by wire name.  Run as a program it prints their names as JSON."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from typing import Final

from vdsm_storage.verbs import (
    host,
    image,
    iscsi_connection,
    lease,
    lvm_volume_group,
    sdm,
    storage_domain,
    storage_pool,
    task,
    vm,
    volume,
)
from vdsm_storage.verbs.table import Verb

VERBS: Final[Mapping[str, Verb]] = {
    **host.VERBS,
    **image.VERBS,
    **iscsi_connection.VERBS,
    **lease.VERBS,
    **lvm_volume_group.VERBS,
    **sdm.VERBS,
    **storage_domain.VERBS,
    **storage_pool.VERBS,
    **task.VERBS,
    **vm.VERBS,
    **volume.VERBS,
}
# The agent answers rpc.discover itself, out of the schema.
BUILT: Final = frozenset((*VERBS, "rpc.discover"))


def main() -> int:
    json.dump(sorted(BUILT), sys.stdout, indent=1)
    sys.stdout.write("\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
