# SPDX-License-Identifier: GPL-2.0-or-later
"""Sizes in bytes and how they are rounded."""

from __future__ import annotations

KIB = 1024
MIB = 1024 * KIB
GIB = 1024 * MIB


def round_up(value: int, step: int) -> int:
    """The smallest multiple of `step` that is not below `value`."""
    return -(-value // step) * step
