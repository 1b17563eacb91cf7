# SPDX-License-Identifier: GPL-2.0-or-later
"""The copies of a group's metadata: as many as areas are in use, two on one volume for VDSM.

lvm commits to one after the other and takes the newest that is whole; so does this.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

from vdsm_storage.lvm.labels import (
    Area,
    HeaderDamaged,
    HeaderReader,
    Label,
    Location,
    TextDamaged,
    parse_header,
    read_text,
    view_text,
)
from vdsm_storage.lvm.text import seqno_of

log = logging.getLogger("lvm.copies")


@dataclass(frozen=True, slots=True)
class Copy:
    """A text that a header names."""

    device: str
    area: Area
    location: Location

    def read(self) -> bytes:
        """Raises OSError, TextDamaged."""
        return read_text(self.device, self.area, self.location)

    def view(self) -> memoryview:
        """Raises OSError, TextDamaged."""
        return view_text(self.device, self.area, self.location)


class NoCopy(Exception):  # noqa: N818 (it says what is so)
    """No header names a text; the message has what is wrong with each, if anything is."""


class Copies:
    """The metadata areas of some physical volumes.  For one thread at a time."""

    def __init__(self, holders: Sequence[Label]) -> None:
        self._places = [(label.device, area) for label in holders for area in label.areas]
        self._readers = [(HeaderReader(label.device, label.areas), label) for label in holders]

    def headers(self) -> list[bytes]:
        """All headers as they are now, b"" where a device fails.  Raises OSError if all fail."""
        found: list[bytes] = []
        failed = None
        for reader, label in self._readers:
            try:
                found += reader.read()
            except OSError as error:
                found += [b""] * len(label.areas)
                failed = error
        if failed is not None and not any(found):
            raise failed
        return found

    def newest(self, headers: Sequence[bytes]) -> tuple[Copy, memoryview]:
        """The newest text that is whole.  Raises NoCopy, TextDamaged, OSError."""
        copies = self._in_use(headers)
        texts: dict[tuple[int, int], tuple[Copy, memoryview]] = {}
        failures: list[TextDamaged | OSError] = []
        for copy in copies:
            key = (copy.location.size, copy.location.checksum)
            if key in texts:
                continue
            try:
                texts[key] = (copy, copy.view())
            except (TextDamaged, OSError) as error:
                log.warning("a copy of the metadata cannot be used: %s", error)
                failures.append(error)
        if not texts:
            raise failures[0]
        return max(texts.values(), key=lambda row: seqno_of(row[1]))

    def _in_use(self, headers: Sequence[bytes]) -> list[Copy]:
        found, wrong = [], []
        for raw, (device, area) in zip(headers, self._places, strict=True):
            if not raw:
                wrong.append(f"{device} cannot be read")
                continue
            try:
                header = parse_header(raw, area, device)
            except HeaderDamaged as error:
                wrong.append(str(error))
                continue
            if header.location is not None and not header.ignored:
                found.append(Copy(device, area, header.location))
        if not found:
            raise NoCopy("; ".join(wrong))
        if wrong:
            log.warning("a copy of the metadata cannot be used: %s", "; ".join(wrong))
        return found
