# SPDX-License-Identifier: GPL-2.0-or-later
"""Volume groups found by reading the devices themselves, each in a lane of its own.

A device that hangs is waited for once, for a bounded time; until it has answered it is left out
and not asked again, so that it costs the next scan nothing.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass, field
from typing import Any, Final

from vdsm_storage.errors import AgentError
from vdsm_storage.lvm.labels import (
    Area,
    DamageError,
    Header,
    Label,
    find_label,
    read_header,
    read_text,
)
from vdsm_storage.lvm.model import VolumeGroup
from vdsm_storage.lvm.text import TextError, parse_group

Ask = Callable[[str, Callable[[], Any], float], "Future[Any]"]

_VOLUMES: Final = b"\nlogical_volumes {\n"
_REST: Final = b'\n}\ncontents = "Text Format Volume Group"\nversion = 1\n'

log = logging.getLogger("lvm.scan")


@dataclass(frozen=True)
class Seen:
    """What was read from one device; `heads` are the groups of its metadata areas, without their
    logical volumes (of which there may be thousands), `raw` the headers that prove them.
    """

    number: int  # of the device, by which two names of it are known to be one
    label: Label | None
    raw: tuple[bytes, ...] = ()
    heads: tuple[VolumeGroup, ...] = ()


@dataclass(frozen=True)
class Found:
    """A volume group.  `devices` by id of the physical volume, None for one not seen;
    `head` is the group without its logical volumes; `doubles` are several devices that say to be
    one same physical volume.
    """

    name: str
    uuid: str
    seqno: int
    tags: tuple[str, ...]
    devices: Mapping[str, str | None]
    head: VolumeGroup
    doubles: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Asked:
    future: Future[Seen]
    since: float


@dataclass
class Scanner:
    """`ask(key, call, timeout)` runs `call` in the lane `key` (Lanes.submit).  For any number of
    threads: they share a read that began after both of them asked.
    """

    ask: Ask
    timeout: float
    clock: Callable[[], float] = time.monotonic
    _asked: dict[str, _Asked] = field(default_factory=dict, init=False)
    _seen: dict[str, Seen] = field(default_factory=dict, init=False)
    _mutex: threading.Lock = field(default_factory=threading.Lock, init=False)

    def look(self, devices: Sequence[str]) -> dict[str, Seen]:
        """What is on the devices that answer in time; those that cannot be read are left out."""
        begun = self.clock()
        asked: dict[str, Future[Seen]] = {}
        late = dict.fromkeys(devices)
        while late and self.clock() - begun < self.timeout:
            earlier: dict[str, Future[Seen]] = {}
            for device in late:
                answer = self._ask(device, begun)
                if answer is not None:
                    (asked if answer.since >= begun else earlier)[device] = answer.future
            # What others asked before may be older than what the caller knows: ask again then.
            wait(earlier.values(), self._left(begun))
            late = dict.fromkeys(earlier)
        wait(asked.values(), self._left(begun))
        found = {device: self._result(device, asked.get(device)) for device in devices}
        return {device: seen for device, seen in found.items() if seen is not None}

    def _left(self, begun: float) -> float:
        return max(0.0, begun + self.timeout - self.clock())

    def _ask(self, device: str, begun: float) -> _Asked | None:
        """The question that is open or a new one; None if one is open for too long."""
        with self._mutex:
            asked = self._asked.get(device)
            if asked is not None and not asked.future.done():
                overdue = self.clock() - asked.since >= self.timeout
                return None if overdue and asked.since < begun else asked
            known = self._seen.get(device)
            try:
                future = self.ask(f"device {device}", lambda: see(device, known), self.timeout)
            except AgentError as error:
                log.warning("%s cannot be asked: %s", device, error)
                return None
            asked = self._asked[device] = _Asked(future, self.clock())
            return asked

    def _result(self, device: str, future: Future[Seen] | None) -> Seen | None:
        if future is None or not future.done():
            log.warning("%s does not answer; it is left out", device)
            return None
        with self._mutex:
            asked = self._asked.get(device)
            if asked is not None and asked.future is future:
                del self._asked[device]
            try:
                seen = self._seen[device] = future.result(0)
            except (OSError, AgentError) as error:
                log.warning("%s cannot be read: %s", device, error)
                self._seen.pop(device, None)
                return None
            return seen


def see(device: str, known: Seen | None = None) -> Seen:
    """Read a device; what `known` proves is not read again.  Raises OSError."""
    number = os.stat(device).st_rdev
    try:
        label = find_label(device)
    except DamageError as error:
        log.warning("%s", error)
        return Seen(number, None)
    if label is None:
        return Seen(number, None)
    headers: list[tuple[Area, Header]] = []
    for area in label.areas:
        try:
            headers.append((area, read_header(device, area)))
        except DamageError as error:
            log.warning("%s", error)
    raw = tuple(header.raw for _, header in headers)
    if known is not None and known.label == label and known.raw == raw:
        return known
    heads = [_head(device, area, header) for area, header in headers]
    return Seen(number, label, raw, tuple(head for head in heads if head is not None))


def _head(device: str, area: Area, header: Header) -> VolumeGroup | None:
    if header.ignored or header.location is None:
        return None
    try:
        return parse_head(read_text(device, area, header.location))
    except (DamageError, TextError) as error:
        log.warning("%s: %s", device, error)
        return None


def parse_head(text: bytes) -> VolumeGroup:
    """A group's text without its logical volumes.  Raises TextError."""
    begin = text.find(_VOLUMES)
    return parse_group(text if begin < 0 else text[:begin] + _REST)


def groups_of(seen: Mapping[str, Seen]) -> list[Found]:
    """The groups that stand on the devices, by the newest copy of each one's metadata."""
    newest: dict[str, VolumeGroup] = {}
    devices: dict[str, list[str]] = {}
    names = {what.number or device: device for device, what in reversed(list(seen.items()))}
    for device in reversed(list(names.values())):
        what = seen[device]
        if what.label is not None:
            devices.setdefault(what.label.pv_uuid, []).append(device)
        for head in what.heads:
            if head.uuid not in newest or newest[head.uuid].seqno < head.seqno:
                newest[head.uuid] = head
    return [_found(head, devices) for head in newest.values()]


def _found(head: VolumeGroup, devices: Mapping[str, Sequence[str]]) -> Found:
    rows = {pv.uuid: devices.get(pv.uuid, ()) for pv in head.pvs.values()}
    return Found(
        name=head.name,
        uuid=head.uuid,
        seqno=head.seqno,
        tags=head.tags,
        devices={uuid: row[0] if row else None for uuid, row in rows.items()},
        head=head,
        doubles=tuple(device for row in rows.values() if len(row) > 1 for device in row),
    )
