# SPDX-License-Identifier: GPL-2.0-or-later
"""UUIDs as names of objects: the only strings that ever become part of a path."""

from __future__ import annotations

import re
import uuid

BLANK = "00000000-0000-0000-0000-000000000000"
_PATTERN = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}")


def is_uuid(text: str) -> bool:
    """True for the lower-case form with dashes; nothing else may become a file name."""
    return _PATTERN.fullmatch(text) is not None


def new_uuid() -> str:
    return str(uuid.uuid4())
