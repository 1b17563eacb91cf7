# SPDX-License-Identifier: GPL-2.0-or-later
"""A volume group kept in memory, and proved against the storage at every look.

A look reads the metadata headers, 512 bytes each.  When they are as they were, nothing has
changed, whoever might have changed it; when not, the text is read, and what changed in it parsed.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final

from vdsm_storage.errors import AgentError, UnexpectedVolumeGroupMetadata, VolumeGroupScanError
from vdsm_storage.lvm.copies import Copies, Copy, NoCopy
from vdsm_storage.lvm.labels import Label, TextDamaged
from vdsm_storage.lvm.model import VolumeGroup
from vdsm_storage.lvm.places import Places, locate
from vdsm_storage.lvm.text import IncrementalParser, TextError

ATTEMPTS: Final = 10  # reads that writers may spoil, one behind the other

Report = Callable[[Sequence[str]], VolumeGroup]

log = logging.getLogger("lvm.cache")


@dataclass(frozen=True, slots=True)
class _Known:
    """An answer: `headers` prove that it still holds; `source` is None if lvm's report gave it."""

    headers: Sequence[bytes]
    group: VolumeGroup
    source: Copy | None


@dataclass(frozen=True)
class _Found:
    places: Places
    copies: Copies


class _Changed(Exception):  # noqa: N818 (no error: look again)
    """The group changed while it was looked at."""


class _Moved(Exception):  # noqa: N818 (no error: search again)
    """The group is not where it was; the message says why."""


class CachedGroup:
    """One volume group; for any number of threads.

    `candidates` gives the devices that may belong to it.  `report` asks lvm's tools, and is
    called with the devices when the metadata is not understood here.
    """

    def __init__(self, name: str, candidates: Callable[[], Sequence[str]], report: Report) -> None:
        self.name = name
        self._candidates = candidates
        self._report = report
        self._stale = False  # `forget` was called
        self._lock = threading.Lock()  # of all below
        self._begun = 0  # reads so far
        self._answer: VolumeGroup | None = None  # of the last of them, None if it failed
        self._found: _Found | None = None
        self._known: _Known | None = None
        self._looked = 0.0  # when the last look began at which it was found so
        self._absent: frozenset[str] = frozenset()  # volumes of it that no search found
        self._parser = IncrementalParser()

    def read(self, within: float = 0.0) -> VolumeGroup:
        """The group as it is on the storage now; the same object while it does not change.

        What was read in the last `within` seconds will do, too.

        Raises VolumeGroupDoesNotExist, VolumeGroupScanError, InaccessiblePhysDev,
        UnexpectedVolumeGroupMetadata.
        """
        begun = self._begun
        if (recent := self._recent(within)) is not None:  # whoever looks meanwhile
            return recent
        with self._lock:
            # A read that began after this call, while this thread waited, answers for it too.
            if self._begun > begun and self._answer is not None:
                return self._answer
            if (recent := self._recent(within)) is not None:
                return recent
            self._begun += 1
            self._answer = None
            self._answer = self._look()[1].group
            return self._answer

    def _recent(self, within: float) -> VolumeGroup | None:
        """What is known, if it was looked at in the last `within` seconds."""
        looked = self._looked  # first: what is known is of that look then, or of a later one
        known = self._known
        if known is None or self._stale or time.monotonic() - looked >= within:
            return None
        return known.group

    def text(self) -> tuple[bytes, VolumeGroup]:
        """The metadata text as it is now, and the group that it describes.

        Raises as `read` does.
        """
        with self._lock:
            for _ in range(ATTEMPTS):
                _, known = self._look()
                if known.source is None:
                    raise self._unexpected("its text is not understood")
                try:
                    return known.source.read(), known.group
                except (TextDamaged, OSError) as error:
                    log.info("group %s changed while it was read: %s", self.name, error)
                    self._known = None
            raise self._unexpected("it changes faster than it can be read")

    def devices(self, group: VolumeGroup | None = None) -> Mapping[str, str]:
        """PV uuid -> device path; without those that are not there.  Raises as `read` does.

        With `group`, which `read` gave a moment ago, it is not looked at the storage again.
        """
        with self._lock:
            found, known = self._found, self._known
            if self._stale or found is None or known is None or known.group is not group:
                found, known = self._look()
            return found.places.devices(pv.uuid for pv in known.group.pvs.values())

    def holders(self) -> Sequence[Label]:
        """The physical volumes whose metadata areas hold the text.  Raises as `read` does."""
        with self._lock:
            return self._look()[0].places.holders

    def forget(self) -> None:
        """Devices came or went: look for the physical volumes at the next call.  Never blocks."""
        self._stale = True

    # -- with the lock held ------------------------------------------------------------------

    def _lose(self) -> None:
        self._found = self._known = None

    def _unexpected(self, reason: str) -> UnexpectedVolumeGroupMetadata:
        return UnexpectedVolumeGroupMetadata(vg=self.name, reason=reason)

    def _look(self) -> tuple[_Found, _Known]:
        """What is so now, from memory if the headers say that it may be."""
        reason = "it changes faster than it can be read"
        if self._stale:
            self._stale = False
            self._lose()
            self._absent = frozenset()
        for _ in range(ATTEMPTS):
            began = time.monotonic()
            found = self._found
            fresh = found is None
            if found is None:
                places = locate(self.name, self._candidates())
                found = self._found = _Found(places, Copies(places.holders))
            try:
                headers = found.copies.headers()
                if self._known is None or headers != self._known.headers:
                    self._known = self._learn(found, headers, fresh)
                self._looked = began
                return found, self._known
            except OSError as error:
                self._lose()
                if fresh:
                    devices = ", ".join(label.device for label in found.places.holders)
                    raise VolumeGroupScanError(device=devices, reason=error.strerror) from error
            except _Changed:
                reason = "it changes faster than it can be read"
            except _Moved as moved:
                log.info("group %s is searched for again: %s", self.name, moved)
                reason = str(moved)
                self._lose()
            except AgentError:
                self._lose()
                raise
        raise self._unexpected(reason)

    def _learn(self, found: _Found, headers: Sequence[bytes], fresh: bool) -> _Known:
        """Read and parse what the headers name.  Raises _Changed, _Moved, OSError."""
        try:
            source, text = found.copies.newest(headers)
        except NoCopy as error:
            raise _Moved(str(error) or "its metadata areas are not in use now") from None
        except (TextDamaged, OSError) as error:
            if found.copies.headers() != headers:
                raise _Changed from error
            if not fresh:
                raise _Moved(str(error)) from error
            return _Known(headers, self._ask(found, str(error)), None)
        try:
            known = _Known(headers, self._parser.parse(text), source)
        except TextError as error:
            known = _Known(headers, self._ask(found, str(error)), None)
        group = self._checked(found, known.group)
        # A text is what the headers name: its checksum says so.  A report may be of a later state.
        if known.source is None and found.copies.headers() != headers:
            raise _Changed
        return replace(known, group=group)

    def _ask(self, found: _Found, reason: str) -> VolumeGroup:
        """What lvm's own tools say."""
        log.warning("lvm is asked about group %s: %s", self.name, reason)
        devices = [label.device for row in found.places.labels.values() for label in row]
        try:
            return self._report(devices)
        except AgentError as error:
            raise self._unexpected(f"{reason}; and lvm says: {error}") from error

    def _checked(self, found: _Found, group: VolumeGroup) -> VolumeGroup:
        """The group with those volumes marked missing that were not found."""
        if group.name != self.name:
            raise _Moved(f"its metadata areas belong to {group.name} now")
        uuids = {pv.uuid for pv in group.pvs.values()}
        doubles = found.places.doubles(uuids)
        if doubles:
            raise self._unexpected(f"{' and '.join(doubles)} say to be the same physical volume")
        absent = uuids - found.places.labels.keys()
        if absent - self._absent:
            self._absent = frozenset(absent)
            raise _Moved(f"it has volumes that were not seen: {', '.join(sorted(absent))}")
        if not absent:
            return group
        pvs = {
            name: replace(pv, missing=True) if pv.uuid in absent else pv
            for name, pv in group.pvs.items()
        }
        return replace(group, pvs=pvs)
