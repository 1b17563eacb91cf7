# SPDX-License-Identifier: GPL-2.0-or-later
"""One volume group in use: cheap reads, and changes of many callers in few commits.

Callers of `apply` that come while a commit is under way wait together; one of them then carries
out the changes of all.  One difference is one of lvm's commands; more are one vgcfgrestore of the
text with all of them in it (editor.py), which is one write and one commit, whatever their number.

What a command did is never guessed: the metadata is read again, and what it says is answered.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, Protocol

from vdsm_storage.errors import (
    AgentError,
    CommandTimeout,
    InaccessiblePhysDev,
    LvmCommandError,
    ResourceExhausted,
    ResourceTimeout,
    UnexpectedVolumeGroupMetadata,
)
from vdsm_storage.lvm.archive import Archive
from vdsm_storage.lvm.changes import Change
from vdsm_storage.lvm.command import Lvm
from vdsm_storage.lvm.editor import NotEditable, Stamp, edit
from vdsm_storage.lvm.labels import Label, free_bytes
from vdsm_storage.lvm.model import VolumeGroup
from vdsm_storage.lvm.native import Native, natives
from vdsm_storage.lvm.plan import Plan, make_plan
from vdsm_storage.lvm.turn import Turn

log = logging.getLogger("lvm.group")

TRIES: Final = 3  # times that a plan is made anew because the group changed under it
TURN_COMMANDS: Final = 3  # commands at their time-out that a caller waits for others
GATHERING: Final = (0.0002, 0.010)  # seconds, at least and at most
GATHERING_SHARE: Final = 0.03  # of what the last commit took
PEERS_SHARE: Final = 0.2  # the same for one that is about to come
PEERS: Final = (0.002, 0.020)  # seconds
UNKNOWN_OUTCOME: Final = (LvmCommandError, CommandTimeout)


class Metadata(Protocol):
    """Where the group is read from (lvm.cache.CachedGroup)."""

    def read(self, within: float = 0.0) -> VolumeGroup: ...

    def text(self) -> tuple[bytes, VolumeGroup]: ...

    def devices(self, group: VolumeGroup | None = None) -> Mapping[str, str]: ...

    def holders(self) -> Sequence[Label]: ...

    def forget(self) -> None: ...


class _Changed(Exception):  # noqa: N818 - no error: plan anew
    """The group is not any more what the plan was made for."""


@dataclass(eq=False)
class _Request:
    changes: Sequence[Change]
    done: bool = False
    outcome: AgentError | VolumeGroup | None = None

    def end(self, end: AgentError | VolumeGroup) -> None:
        self.outcome = end
        self.done = True  # last: its caller may look at any time


@dataclass
class Group:
    """One object a volume group and process: what it keeps apart are its own callers."""

    name: str
    metadata: Metadata
    lvm: Lvm
    archive: Archive
    clock: Callable[[], float] = time.time
    # Called right before every command that changes the group; raises when the lock under which
    # the change was asked for may belong to another host by now.
    fence: Callable[[], None] = lambda: None
    # How many are at work that may have changes to make, those that wait here included; 0 if it
    # is not known.
    peers: Callable[[], int] = lambda: 0
    # How old, in seconds, what is read may be, because nobody else can have changed it since.
    unchanged: Callable[[], float] = lambda: 0.0
    _lasted: float = field(default=0.0, init=False)
    _turn: Turn = field(default_factory=Turn, init=False)
    _waiting: list[_Request] = field(default_factory=list, init=False)
    _mutex: threading.Lock = field(default_factory=threading.Lock, init=False)

    def read(self, within: float = 0.0) -> VolumeGroup:
        """As it is now, or was `within` that many seconds; cheap while nothing changed.

        Raises VolumeGroupDoesNotExist (506).
        """
        return self.metadata.read(within)

    def devices(self) -> Mapping[str, str]:
        """Device by id of the physical volume."""
        return self.metadata.devices()

    def all_devices(self, group: VolumeGroup) -> Mapping[str, str]:
        """Device by id of the physical volume, none missing: the group can be changed.

        Raises InaccessiblePhysDev (606), UnexpectedVolumeGroupMetadata (616) if it is exported.
        """
        if group.exported:
            raise UnexpectedVolumeGroupMetadata(vg=self.name, reason="it is exported")
        devices = self.metadata.devices(group)
        missing = [pv for pv in group.pvs.values() if pv.uuid not in devices]
        if missing:
            self.forget()
            devices = self.devices()
        gone = [f"{pv.device} ({pv.uuid})" for pv in missing if pv.uuid not in devices]
        gone += [f"{pv.device} ({pv.uuid})" for pv in group.pvs.values() if pv.missing]
        if gone:
            raise InaccessiblePhysDev(devices=", ".join(dict.fromkeys(gone)))
        return {pv.uuid: devices[pv.uuid] for pv in group.pvs.values()}

    def metadata_device(self) -> str:
        """The device whose metadata areas are in use."""
        return self.metadata.holders()[0].device

    def metadata_area(self) -> tuple[int, int]:
        """Bytes of the smallest metadata area, and how many of them are free: as lvm's
        vg_mda_size and vg_mda_free say.
        """
        size = min(area.size for label in self.metadata.holders() for area in label.areas)
        return size, free_bytes(size, self.read().text_size)

    def forget(self) -> None:
        """Read everything anew next time: devices came or went."""
        self.metadata.forget()

    @contextlib.contextmanager
    def exclusive(self) -> Iterator[None]:
        """No change is made to the group by others in this process meanwhile."""
        self._turn.take()
        try:
            yield
        finally:
            self._turn.release()

    def apply(self, *changes: Change) -> VolumeGroup:
        """Make all the changes, or none; gives the group as it is then.

        The caller holds the lock of the domain between hosts.  The error is that of the change
        that cannot be made: 604 exists, 610 no such volume, 504 no space, 606 a device is not
        there, 550/551/554/572 lvm failed to create, remove, resize, retag.
        """
        (result,) = self.apply_each([changes])
        if isinstance(result, AgentError):
            raise result
        return result

    def apply_each(self, wanted: Sequence[Sequence[Change]]) -> list[AgentError | VolumeGroup]:
        """The same for several callers at once, in one commit: what one asked for may fail, and
        the rest is made."""
        requests = [_Request(changes) for changes in wanted]
        with self._mutex:
            self._waiting += requests
        if self._has_turn(requests):
            try:
                self._commit_all(self._gathered())
            finally:
                self._turn.release()
        return [request.outcome for request in requests if request.outcome is not None]

    # -- one commit --------------------------------------------------------------------------

    def _has_turn(self, requests: Sequence[_Request]) -> bool:
        """Wait for the turn; False if another who had it has dealt with the requests, which it
        does with all or none.

        Raises ResourceTimeout (851) when the group is being worked on for very long.
        """
        longest = TURN_COMMANDS * self.lvm.timeout
        while True:
            try:
                return self._turn.take(lambda: all(r.done for r in requests), longest)
            except TimeoutError:
                with self._mutex:
                    if requests[0] in self._waiting:  # nobody has begun with them
                        self._waiting = [r for r in self._waiting if r not in requests]
                        raise ResourceTimeout(
                            namespace="volume group", name=self.name, seconds=longest
                        ) from None

    def _gathered(self) -> Sequence[_Request]:
        """All that wait, after a moment in which who comes at the same time can join: a commit
        saved is worth far more.  As long as others come and more are at work, they are waited for.
        """
        if self.peers() != 1:  # not known to be alone
            time.sleep(_clamp(self._lasted * GATHERING_SHARE, GATHERING))
        before, now = 0, len(self._waiting)
        while before < now < self.peers():
            time.sleep(_clamp(self._lasted * PEERS_SHARE, PEERS))
            before, now = now, len(self._waiting)
        with self._mutex:
            batch, self._waiting = self._waiting, []
        return batch

    def _commit_all(self, batch: Sequence[_Request]) -> None:
        begun = time.monotonic()
        try:
            self._commit(batch)
            self._lasted = time.monotonic() - begun
        except AgentError as error:
            for request in batch:
                if not request.done:
                    request.end(_copy(error))
        except BaseException as error:
            for request in batch:
                if not request.done:
                    request.end(AgentError(reason=f"volume group {self.name}: {error}"))
            raise

    def _commit(self, batch: Sequence[_Request]) -> None:
        for number in range(TRIES):
            group = self.read(0.0 if number else self.unchanged())
            devices = self.all_devices(group)
            open_ones = [request for request in batch if not request.done]
            plan = make_plan(group, [request.changes for request in open_ones])
            with contextlib.suppress(_Changed):
                self._carry_out(plan, devices, open_ones)
                return
        raise UnexpectedVolumeGroupMetadata(
            vg=self.name, reason="something else changes it without the domain's lock; try again"
        )

    def _carry_out(
        self,
        plan: Plan,
        devices: Mapping[str, str],
        requests: Sequence[_Request],
    ) -> None:
        failure: AgentError | None = None
        group = plan.before
        if plan.changes:
            failure = self._write(plan, devices)
            group = self._read_again()
            if not failure and group.seqno != plan.before.seqno + 1:
                log.error(
                    "volume group %s: from %d to %d in one commit; someone else changes it",
                    *(self.name, plan.before.seqno, group.seqno),
                )
        left: list[_Request] = []
        for number, (request, error) in enumerate(zip(requests, plan.errors, strict=True)):
            if error is not None:
                request.end(error)
            elif plan.reached(group, number):
                request.end(group)
            else:
                left.append(request)
        for request in left:
            request.end(self._singly(request.changes, failure))

    def _write(self, plan: Plan, devices: Mapping[str, str]) -> AgentError | None:
        """The failure of lvm, after which nothing or everything may have happened."""
        commands = natives(plan, devices, self.lvm.version)
        wanted = len(commands) > 1 or _takes_away(plan)
        text = self._text(plan.before) if wanted else None
        if text is not None:
            self.archive.keep(self.name, plan.before.seqno, text)
        try:
            if len(commands) == 1:
                self._run(commands[0].argv, devices)
            elif text is None:
                return LvmCommandError(command="-", vg=self.name, reason="there is no text")
            else:
                self._restore(plan, text, devices)
        except NotEditable as error:
            log.warning("volume group %s: %s; changes are made one by one", self.name, error)
            return LvmCommandError(command="vgcfgrestore", vg=self.name, reason=error)
        except UNKNOWN_OUTCOME as error:
            log.warning("volume group %s: %s", self.name, error)
            return _meaning(error, commands[0]) if len(commands) == 1 else error
        return None

    def _restore(self, plan: Plan, text: bytes, devices: Mapping[str, str]) -> None:
        stamp = Stamp(os.uname().nodename, int(self.clock()))
        new = edit(text, plan, stamp)
        if self.read().seqno != plan.before.seqno:
            raise _Changed
        path = os.path.join(self.lvm.directory, f"{self.name}.restore")
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o600)
        try:
            with open(fd, "wb") as file:
                file.write(new)
            self._run(["vgcfgrestore", "--yes", "--file", path, self.name], devices)
        finally:
            os.unlink(path)

    def _run(self, argv: Sequence[str], devices: Mapping[str, str]) -> None:
        self.lvm.run(argv, sorted(devices.values()), vg=self.name, fence=self.fence)

    # -- the other way -----------------------------------------------------------------------

    def _singly(
        self, changes: Sequence[Change], failure: AgentError | None
    ) -> AgentError | VolumeGroup:
        """One caller's changes by lvm's single commands, after the commit of all failed.

        What was made is taken back when a later one fails.
        """
        if isinstance(failure, CommandTimeout | ResourceExhausted):
            return failure  # the storage hangs: more commands would only hang as well
        self.forget()  # a device may have another name now
        group = self.read()
        devices = self.all_devices(group)
        plan = make_plan(group, [changes])
        if plan.errors[0] is not None:
            return plan.errors[0]
        error = self._run_all(plan, devices)
        now = self._read_again()
        if plan.reached(now, 0):
            return now
        if error is None:
            reason = "lvm reports success, but the change is not in it"
            error = UnexpectedVolumeGroupMetadata(vg=self.name, reason=reason)
        back = Plan(now, group, plan.errors, plan.touched)
        if back.changes and (undo := self._run_all(back, devices)):
            log.error("volume group %s: half a change stays: %s", self.name, undo)
        return error

    def _run_all(self, plan: Plan, devices: Mapping[str, str]) -> AgentError | None:
        for native in natives(plan, devices, self.lvm.version):
            try:
                self._run(native.argv, devices)
            except UNKNOWN_OUTCOME as error:
                return _meaning(error, native)
        return None

    # -- reading -----------------------------------------------------------------------------

    def _text(self, group: VolumeGroup) -> bytes | None:
        """The group's metadata; None when it is not understood.  Raises _Changed."""
        try:
            text, now = self.metadata.text()
        except UnexpectedVolumeGroupMetadata as error:
            log.warning("%s", error)
            return None
        if now.seqno != group.seqno:
            raise _Changed
        return text

    def _read_again(self) -> VolumeGroup:
        try:
            return self.read()
        except AgentError:
            self.forget()
            return self.read()


def _clamp(seconds: float, bounds: tuple[float, float]) -> float:
    return min(max(seconds, bounds[0]), bounds[1])


def _takes_away(plan: Plan) -> bool:
    """Whether someone might want the earlier metadata back: volumes go or shrink, or the text is
    written by us, not by lvm's own command.
    """
    differences = list(plan.differences())
    return len(differences) + plan.retags_group > 1 or any(
        new is None or (old is not None and new.extents < old.extents) for old, new in differences
    )


def _meaning(error: AgentError, native: Native) -> AgentError:
    """What lvm's failure means to who asked for the change; a timeout stays one."""
    if isinstance(error, LvmCommandError):
        meaning = native.failed(str(error.facts["reason"]))
        meaning.__cause__ = error
        return meaning
    return error


def _copy(error: AgentError) -> AgentError:
    """Each thread raises an error of its own: a traceback grows with each."""
    copy = type(error)(**error.facts)
    copy.__cause__ = error
    return copy
