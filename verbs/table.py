# SPDX-License-Identifier: GPL-2.0-or-later
"""Which function answers which verb, and where it runs.

The table is written out by hand so that a reader can find every verb by its wire name.  A verb
that the schema knows and that has no row here answers code 44.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Verb:
    """`function(ctx, **params)` answers the verb.

    `lane` names the parameter whose value picks the lane: a storage domain or pool UUID; `a.b` is
    the key b of the map a.  Or it is a fixed lane name starting with `:` (`:host` for work that
    touches no domain).  None means that the function never blocks and is answered on the event
    loop at once.
    """

    function: Callable[..., object]
    lane: str | None = None
    timeout: float = 170.0  # seconds; engines give up on a reply after 180

    def lane_key(self, params: Mapping[str, object]) -> str:
        """The lane for one request; never called when `lane` is None."""
        assert self.lane is not None
        if self.lane.startswith(":"):
            return self.lane
        name, _, key = self.lane.partition(".")
        value = params[name]
        return str(value[key] if isinstance(value, Mapping) else value)
