# SPDX-License-Identifier: GPL-2.0-or-later
"""What can go wrong with the laboratory itself, as opposed to what is tested in it."""

from __future__ import annotations


class LabError(Exception):
    pass


class BuildError(LabError):
    """The guest image could not be made."""


class BootError(LabError):
    """A guest did not come up, or never found a free place on this machine."""


class GuestGoneError(LabError):
    """The guest's QEMU ended, or does not answer any more."""


class CommandTimeoutError(LabError):
    """A command inside a guest took longer than it had."""
