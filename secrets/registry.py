# SPDX-License-Identifier: GPL-2.0-or-later
"""Which secrets this host has been given, and that libvirt has them.

What is registered is in memory and, if configured, encrypted in a file.  libvirt keeps these
secrets in its memory only, so that they are defined again whenever it was restarted (`settle`).

A change is made in libvirt first, then in the file, then here.  A failure takes back what was done
in libvirt; a death in between leaves the file as it was, and the next start makes libvirt agree
with it.  So the file and its one replacement decide.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any, Final, Protocol

from vdsm_storage.base.locks import Lock, Locks
from vdsm_storage.base.secret import Secret
from vdsm_storage.errors import (
    ResourceTimeout,
    SecretRegistrationFailed,
    SecretUnregistrationFailed,
)
from vdsm_storage.secrets import request
from vdsm_storage.secrets.change import Change
from vdsm_storage.secrets.keyring import Keyring, KeyringError, UnansweredError
from vdsm_storage.secrets.model import VOLUME, Defined, Entry
from vdsm_storage.secrets.store import StoreError

log = logging.getLogger("secrets")

_TURN: Final = (Lock("secrets", "libvirt"),)
TURN_SECONDS: Final = 60.0  # that a change may wait for another one
LAST_TURN_SECONDS: Final = 5.0  # the same when the agent stops
# Where a test can have the agent die: the first step made in libvirt, all of them, and kept.
BEGUN: Final = "secrets:begun"
DEFINED: Final = "secrets:defined"
KEPT: Final = "secrets:kept"


class Kept(Protocol):
    """store.Store, or one that keeps nothing."""

    def load(self) -> list[Entry]:
        """What was kept; what cannot be had is told in the log."""

    def save(self, entries: Iterable[Entry]) -> None:
        """Keep these and no others.  Raises StoreError."""


class Registry:
    """`reach(point)` is called at the points above, for tests that kill the agent there."""

    def __init__(
        self, keyring: Keyring, kept: Kept, locks: Locks, reach: Callable[[str], None]
    ) -> None:
        self._keyring = keyring
        self._kept = kept
        self._locks = locks
        self._reach = reach
        self._entries = {entry.uuid: entry for entry in kept.load()}
        # How many times libvirt is still to be given everything anew, for it may have secrets of
        # ours that are not registered, or other values.
        self._doubts = 1
        self._closed = False

    def register(self, secrets: Iterable[Mapping[str, Any]], clear: bool) -> None:
        """Define all, or change nothing.  With `clear`, all others of ours are removed.

        `secrets` as request.parse takes them.  Raises BadSecretRequest, SecretRegistrationFailed.
        """
        new = {entry.uuid: entry for entry in request.parse(secrets)}
        with self._one_at_a_time(SecretRegistrationFailed):
            others = self._of_vms() if clear else self._entries
            target = {**others, **new}

            def make(change: Change, present: Mapping[str, Defined]) -> None:
                self._refuse_conflicts(new, target, present)
                self._define(change, new, present, clear)

            self._commit(target, make, SecretRegistrationFailed)
        log.info("Registered %s secrets, %s in all", len(new), len(target))

    # -- secrets that live as long as VMs ----------------------------------------------------

    def give(self, entries: Iterable[Entry]) -> None:
        """Define secrets of a VM, or change nothing.  One that another VM has, too, must be the
        same.  Raises SecretRegistrationFailed."""
        new = {entry.uuid: entry for entry in entries}
        with self._one_at_a_time(SecretRegistrationFailed):
            target = {**self._entries, **new}

            def make(change: Change, present: Mapping[str, Defined]) -> None:
                self._refuse_other_values(new)
                self._refuse_conflicts(new, target, present)
                self._define(change, new, present, clear=False)

            self._commit(target, make, SecretRegistrationFailed)
        log.info("%s secrets came with a VM", len(new))

    def take(self, uuids: Iterable[str]) -> None:
        """No VM has these any more; what is not a secret of VMs is ignored.

        Raises SecretUnregistrationFailed, and none is gone then.
        """
        self._remove(frozenset(uuids), of_vms=True)

    def uuids_of_vms(self) -> set[str]:
        """Of the secrets that came with VMs, known here or left in libvirt by an agent of before.

        Raises SecretUnregistrationFailed.
        """
        try:
            left = {old.uuid for old in self._present().values() if old.of_vms}
        except KeyringError as error:
            raise SecretUnregistrationFailed(reason=error) from error
        return left | self._of_vms().keys()

    def entries_of_vms(self, uuids: Collection[str]) -> list[Entry]:
        """Those whose values are known here."""
        return [entry for uuid, entry in self._of_vms().items() if uuid in uuids]

    def _of_vms(self) -> dict[str, Entry]:
        return {uuid: entry for uuid, entry in self._entries.items() if entry.of_vms}

    def _refuse_other_values(self, new: Mapping[str, Entry]) -> None:
        for entry in new.values():
            known = self._entries.get(entry.uuid)
            if known is None or (known.usage, known.password) == (entry.usage, entry.password):
                continue
            where = "another VM has it" if known.of_vms else "it is registered on this host"
            raise KeyringError(f"secret {entry.uuid} is another one here: {where}")

    # -- removing ----------------------------------------------------------------------------

    def unregister(self, uuids: Iterable[str]) -> None:
        """Remove all of these, or none.  Unknown ones are ignored, and such as are not ours, or
        came with a VM.

        Raises SecretUnregistrationFailed.
        """
        self._remove(frozenset(uuids), of_vms=False)

    def _remove(self, gone: Collection[str], *, of_vms: bool) -> None:
        with self._one_at_a_time(SecretUnregistrationFailed):
            target = {
                uuid: entry
                for uuid, entry in self._entries.items()
                if uuid not in gone or entry.of_vms != of_vms
            }

            def make(change: Change, present: Mapping[str, Defined]) -> None:
                for uuid in sorted(present.keys() & gone):
                    if present[uuid].ours and present[uuid].of_vms == of_vms:
                        change.remove(present[uuid])
                        self._reach(BEGUN)

            self._commit(target, make, SecretUnregistrationFailed)
        log.info("Unregistered secrets, %s are left", len(target))

    def volume_key(self, uuid: str) -> Secret | None:
        """The value, base64, of a registered secret that opens volumes."""
        entry = self._entries.get(uuid)
        return entry.password if entry is not None and entry.usage_type == VOLUME else None

    def settle(self) -> bool:
        """Make libvirt agree with what is registered; True if it does.

        At first, and after a change that could not be taken back, everything is defined anew and
        whatever else is ours is removed.  Later only what libvirt lost is defined again.
        Raises SecretRegistrationFailed when other changes took too long.
        """
        with self._one_at_a_time(SecretRegistrationFailed):
            if self._closed:
                return True
            try:
                present = self._present()
            except KeyringError as error:
                log.debug("libvirt's secrets are not known: %s", error)
                return False
            anew = self._doubts > 0
            try:
                agreed = not anew or self._remove_strays(present)
                agreed = self._define_missing(present, anew) and agreed
            except UnansweredError as error:
                log.warning("libvirt's secrets may not be as registered: %s", error)
                return False
            if anew and agreed:
                self._doubts -= 1
            return agreed

    def close(self) -> None:
        """The clean stop: nothing is kept, and libvirt has none of ours, if it answers.

        Secrets of VMs stay as long as these run.  Other guests go on: QEMU was given the values
        that they use.
        """
        self._closed = True  # a change that is being made is taken back
        level = logging.WARNING if self._entries else logging.DEBUG  # a host may have no libvirt
        try:
            with self._locks.held(_TURN, LAST_TURN_SECONDS):
                self._entries = self._of_vms()
                # First: who dies behind this line leaves nothing that would come back.
                self._forget()
                for old in self._present().values():
                    if old.ours and not old.of_vms:
                        self._keyring.undefine(old.uuid)
        except ResourceTimeout:
            self._forget()
            log.warning("libvirt hangs; secrets may be left in it until the next start")
        except KeyringError as error:
            log.log(level, "Secrets may be left in libvirt until the next start: %s", error)

    def _forget(self) -> None:
        try:
            self._kept.save(self._of_vms().values())
        except StoreError as error:
            log.warning("Secrets stay in their file: %s", error)

    # -- steps -------------------------------------------------------------------------------

    def _commit(
        self,
        target: Mapping[str, Entry],
        make: Callable[[Change, Mapping[str, Defined]], None],
        failed: type[SecretRegistrationFailed | SecretUnregistrationFailed],
    ) -> None:
        """libvirt, then the file, then the memory."""
        change = Change(self._keyring, self._entries)
        try:
            make(change, self._present())
            self._reach(DEFINED)
            if self._closed:
                raise KeyringError("the agent is stopping")
            self._kept.save(target.values())
        except (KeyringError, StoreError) as error:
            for problem in change.take_back():
                log.warning("A secret could not be restored: %s", problem)
                # settle() sees to it; twice, since libvirt may still be at a step that it was
                # not waited for.
                self._doubts = 2
            if isinstance(error, StoreError):
                # The new file may be in place already, and only not be known to be durable.
                with contextlib.suppress(StoreError):
                    self._kept.save(self._entries.values())
            raise failed(reason=error) from error
        self._reach(KEPT)
        self._entries = dict(target)

    def _refuse_conflicts(
        self,
        new: Mapping[str, Entry],
        target: Mapping[str, Entry],
        present: Mapping[str, Defined],
    ) -> None:
        owners = {entry.usage: entry.uuid for entry in target.values() if entry.uuid not in new}
        for entry in new.values():
            known = self._entries.get(entry.uuid)
            if known is not None and known.of_vms != entry.of_vms:
                raise KeyringError(f"{entry.uuid} is the UUID of a secret that a VM came with")
            owner = owners.get(entry.usage)
            if owner is not None:
                raise KeyringError(
                    f"usage {entry.usage_id} is that of secret {owner}; unregister it first"
                )
            old = present.get(entry.uuid)
            if old is not None and not old.ours:
                raise KeyringError(
                    f"{entry.uuid} is the UUID of a secret that is not this agent's "
                    f"({old.usage_id or 'without a usage'}); give the new one another UUID"
                )

    def _define(
        self,
        change: Change,
        new: Mapping[str, Entry],
        present: Mapping[str, Defined],
        clear: bool,
    ) -> None:
        """First what is in the way goes, then the new ones come, then the rest goes."""
        usages = {entry.usage for entry in new.values()}
        same: dict[str, Defined] = {}
        rest: list[Defined] = []
        for old in present.values():
            entry = new.get(old.uuid)
            if not old.ours:
                continue
            if entry is not None and entry.usage == old.usage:
                same[old.uuid] = old
            elif entry is not None or old.usage in usages:
                change.remove(old)
                self._reach(BEGUN)
            elif not old.of_vms:
                rest.append(old)
        for entry in new.values():
            change.put(entry, same.get(entry.uuid))
            self._reach(BEGUN)
        for old in rest if clear else ():
            change.remove(old)
            self._reach(BEGUN)

    def _remove_strays(self, present: Mapping[str, Defined]) -> bool:
        """Remove what is ours and not registered as it is; True if all of it is gone.

        Raises UnansweredError.
        """
        agreed = True
        for old in present.values():
            entry = self._entries.get(old.uuid)
            if not old.ours or (entry is not None and entry.usage == old.usage):
                continue
            if old.of_vms and entry is None:  # take() sees to it, also when no values are kept
                continue
            try:
                self._keyring.undefine(old.uuid)
                log.info("Secret %s (%s) is removed from libvirt", old.uuid, old.usage_id)
            except UnansweredError:
                raise
            except KeyringError as error:
                log.warning("Secret %s (%s) cannot be removed: %s", old.uuid, old.usage_id, error)
                agreed = False
        return agreed

    def _define_missing(self, present: Mapping[str, Defined], anew: bool) -> bool:
        """Define what libvirt has not got, or with `anew` everything; True if it has all then.

        Raises UnansweredError.
        """
        agreed = True
        for entry in self._entries.values():
            old = present.get(entry.uuid)
            if old is not None and old.usage == entry.usage and not anew:
                continue
            try:
                if old is not None and not old.ours:
                    raise KeyringError("somebody else's secret has its UUID")
                self._keyring.define(entry)
                log.info("Secret %s (%s) is registered again", entry.uuid, entry.usage_id)
            except UnansweredError:
                raise
            except KeyringError as error:
                log.warning("Secret %s is not registered: %s", entry.uuid, error)
                agreed = False
        return agreed

    def _present(self) -> dict[str, Defined]:
        return {defined.uuid: defined for defined in self._keyring.all()}

    @contextlib.contextmanager
    def _one_at_a_time(
        self, failed: type[SecretRegistrationFailed | SecretUnregistrationFailed]
    ) -> Iterator[None]:
        try:
            with self._locks.held(_TURN, TURN_SECONDS):
                yield
        except ResourceTimeout as error:
            raise failed(reason=error) from error
