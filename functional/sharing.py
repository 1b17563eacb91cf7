# SPDX-License-Identifier: GPL-2.0-or-later
"""How test files are shared out among pytest's processes.

Most tests wait: for leases to run out, for storage that hangs.  Those that need guests of the
laboratory compute all the time, and no more than two guests run at once (lab/places.py).  So there
are more processes than cores, and two of them at most have tests with guests; were there more, they
would only wait for a place.
"""

from __future__ import annotations

from pathlib import PurePath
from typing import Final

from xdist.scheduler import LoadFileScheduling

from functional.lab.places import needs_guests

LONGEST: Final = "test_block_domain.py"  # of those in a guest; as long as all the others together


class Sharing(LoadFileScheduling):
    """A process gets whole files."""

    def _split_scope(self, nodeid: str) -> str:
        file = super()._split_scope(nodeid)
        path = PurePath(file)
        if needs_guests(path):
            return "guests 1" if path.name == LONGEST else "guests 2"
        return file
