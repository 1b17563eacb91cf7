# SPDX-License-Identifier: GPL-2.0-or-later
"""A change of libvirt's secrets that can be taken back, step by step."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from vdsm_storage.secrets.keyring import Keyring, KeyringError, UnansweredError
from vdsm_storage.secrets.model import Defined, Entry


class Change:
    """`known` are the secrets whose values we have: what they were before the change.

    How a step is taken back is noted before the step is made, because one that failed, or was not
    answered in time, may have been done; all ways back can be gone twice.
    """

    def __init__(self, keyring: Keyring, known: Mapping[str, Entry]) -> None:
        self._keyring = keyring
        self._known = known
        self._back: list[Callable[[], None]] = []

    def remove(self, old: Defined) -> None:
        """Raises KeyringError."""
        self._back.append(self._redefine(old))
        self._keyring.undefine(old.uuid)

    def put(self, entry: Entry, old: Defined | None) -> None:
        """`old` is the secret of the same UUID and usage, if there is one.  Raises KeyringError."""
        if old is None:
            self._back.append(lambda: self._keyring.undefine(entry.uuid))
        else:
            self._back.append(self._redefine(old))
        self._keyring.define(entry)

    def take_back(self) -> list[str]:
        """Undo all steps, the last one first; what could not be undone, in words.

        libvirt that does not answer is not asked again: each step would have to wait for it.
        """
        problems = []
        while self._back:
            try:
                self._back.pop()()
            except KeyringError as error:
                problems.append(str(error))
                if isinstance(error, UnansweredError):
                    break
        return problems

    def _redefine(self, old: Defined) -> Callable[[], None]:
        entry = self._known.get(old.uuid)
        if entry is not None and entry.usage == old.usage:
            return lambda: self._keyring.define(entry)
        backup = self._keyring.backup(old.uuid)  # somebody else defined it under our prefix
        if backup is None:
            return _nothing

        def restore() -> None:
            self._keyring.restore(backup)
            if backup.value is None:
                raise KeyringError(f"secret {old.uuid} was not registered here: its value is lost")

        return restore


def _nothing() -> None:
    """It is gone already."""
