# SPDX-License-Identifier: GPL-2.0-or-later
"""VM.migrationCreate: a VM is about to come from another host.

Its secrets are given to libvirt and its images made usable before the answer, so before libvirt
starts the QEMU that receives it; the answer has the VM's XML with the places of this host.  Then it
is waited for: for as long as libvirt receives it, and `patience` seconds for that to begin.  It is
here when its processors may run here.  When it does not come, all that was made for it is let go.

All that is an operation which outlives the agent: libvirt goes on without.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import asdict, dataclass, field
from typing import Any, Final

from vdsm_storage.base.clock import Deadline
from vdsm_storage.base.lanes import Lanes
from vdsm_storage.errors import (
    ActionStopped,
    AgentError,
    CannotCreateVM,
    LibvirtFailure,
    MigrationCancelationFailed,
    MigrationError,
    MigrationLimitExceeded,
    NoSuchVM,
    VMIsDown,
)
from vdsm_storage.host.libvirt_life import LibvirtLife
from vdsm_storage.host.libvirt_migration import ARRIVING
from vdsm_storage.host.libvirt_model import PAUSED, VmError, VmEvent, VmState
from vdsm_storage.jobs.operation import Kind, Operation, SuspendedError
from vdsm_storage.jobs.runner import Request
from vdsm_storage.vms import migrate_xml, start_xml
from vdsm_storage.vms.drives import VolumePath
from vdsm_storage.vms.keeping import DiskTools, Keeping
from vdsm_storage.vms.launches import COMING, Launches
from vdsm_storage.vms.preparing import Preparing
from vdsm_storage.vms.start_xml import Order

INCOMING: Final = "vm.incoming"
BEGIN: Final = 600.0  # seconds that it may wait for its thread
AT_ONCE: Final = 64  # VMs
READY: Final = 150.0  # seconds for its images to be usable
STOP: Final = 60.0  # seconds for it to be let go
ENDED: Final = 10.0  # seconds for libvirt to end what it receives
LOOK: Final = 1.0  # seconds between two looks, unless libvirt tells that something happened
SOON: Final = 0.1

log = logging.getLogger("vms.incoming")


@dataclass(frozen=True)
class Coming:
    libvirt: LibvirtLife
    launches: Launches
    lanes: Lanes
    preparing: Preparing
    patience: float


@dataclass(frozen=True)
class _Announced:
    """`ready` gets the VM's XML when it may come."""

    order: Order
    ready: Future[str] = field(default_factory=Future)


class Incoming:
    """`event` is the registry's to call."""

    def __init__(self, tools: DiskTools, keeping: Keeping, coming: Coming) -> None:
        self._tools = tools
        self._keeping = keeping
        self._libvirt = coming.libvirt
        self._launches = coming.launches
        self._lanes = coming.lanes
        self._preparing = coming.preparing
        self._patience = coming.patience
        self._lock = threading.Lock()
        self._announced: dict[str, _Announced] = {}
        self._going: dict[str, Operation] = {}
        self._happened = threading.Condition()

    def kinds(self) -> tuple[Kind, ...]:
        steps = ("begun", "secrets", "prepared", "arrived")
        return (Kind(INCOMING, steps, self._run, self._recover, resume=self._resume),)

    # -- what callers ask --------------------------------------------------------------------

    def prepare(self, vm: str, params: Mapping[str, Any], limit: int) -> dict[str, Any]:
        """Returns when it may come: the VM as it is to be started here.

        Raises VMExists (4), CannotCreateVM (9), CannotPrepareImage (1630), NoSuchLease (936),
        BadSecretRequest (72), SecretRegistrationFailed (73), MigrationLimitExceeded (82), 59.
        """
        told = {key: params[key] for key in ("vmId", "xml", "secrets") if key in params}
        order = migrate_xml.without_volume_leases(start_xml.parse_order(vm, told))
        if not self._tools.registry.enabled:
            raise CannotCreateVM(vm=vm, reason="this host has no libvirt: libvirt.uri is empty")
        self._preparing.check_free(vm)
        mine = _Announced(order)
        with self._lock:
            others = len(self._launches.of_status(COMING))
            if 0 < limit <= others:
                raise MigrationLimitExceeded(vm=vm, count=others, limit=limit)
            self._launches.begin(vm, order.name, COMING)
            self._announced[vm] = mine
        try:
            future = self._lanes.submit("incoming", lambda: self._start(order), BEGIN, AT_ONCE)
        except AgentError:
            self._forget(vm, mine)
            raise
        future.add_done_callback(lambda done: self._done(vm, mine, done))
        try:
            xml = mine.ready.result(READY)
        except TimeoutError as error:
            self._ask_to_stop(vm)
            reason = f"its images were not usable within {READY:g} seconds"
            raise CannotCreateVM(vm=vm, reason=reason) from error
        return {"vmId": vm, "vmName": order.name, "status": COMING, "xml": xml}

    def stop(self, vm: str) -> bool:
        """Should it be on its way: give that up.  Returns when it did, or did come; whether it
        was on its way."""
        end = Deadline(self._tools.clock, STOP)
        if not self._launches.coming(vm):
            return False
        while self._launches.coming(vm) and not end.passed():
            self._ask_to_stop(vm)
            self._tools.clock.wait(threading.Event(), SOON)
        return True

    def cancel(self, vm: str) -> bool:
        """The same for who must know: raises MigrationCancelationFailed (47)."""
        stopped = self.stop(vm)
        if stopped and self._launches.coming(vm):
            reason = f"libvirt still has it after {STOP:g} seconds"
            raise MigrationCancelationFailed(vm=vm, reason=reason)
        return stopped

    def load(self) -> None:
        """After the journal was read: what an agent of before had not even begun is unknown."""
        begun = {each.params.get("vm") for each in self._tools.runner.interrupted()
                 if each.kind == INCOMING}  # fmt: skip
        for vm in self._launches.of_status(COMING):
            if vm not in begun:
                self._launches.drop(vm)

    def event(self, _event: VmEvent) -> None:
        with self._happened:
            self._happened.notify_all()

    def _ask_to_stop(self, vm: str) -> None:
        operation = self._going.get(vm)
        if operation is not None:
            operation.cancel.request()
            self._wake()

    def _wake(self) -> None:
        with self._happened:
            self._happened.notify_all()

    def _start(self, order: Order) -> None:
        volumes = order.volumes
        self._tools.runner.run(
            Request(
                kind=INCOMING,
                params={"vm": order.vm, "volumes": [asdict(volume) for volume in volumes]},
                domains=[],  # it is at work on none of them while it waits
                verb="VM.migrationCreate",
                lane=order.vm,
                description=f"Receive VM {order.vm}",
            )
        )

    def _done(self, vm: str, mine: _Announced, done: Future[Any]) -> None:
        """In the thread that ran it; the same VM may have been announced anew by now."""
        error = None if done.cancelled() else done.exception()
        if error is None or isinstance(error, ActionStopped | SuspendedError):
            error = MigrationError(vm=vm, reason="it was stopped")
        if not mine.ready.done():
            mine.ready.set_exception(error)
        self._forget(vm, mine)

    def _forget(self, vm: str, mine: _Announced) -> None:
        """It has come, or nothing is left of it."""
        with self._lock:
            if self._announced.get(vm) is not mine:
                return
            del self._announced[vm]
            if self._launches.coming(vm) and vm not in self._going:
                self._launches.drop(vm)

    # -- the operation -----------------------------------------------------------------------

    def _run(self, op: Operation) -> None:
        vm = str(op.params["vm"])
        mine = self._announced[vm]
        order = mine.order
        self._going[vm] = op
        with self._keeping.turn(vm, *order.volumes):
            self._preparing.make_ready(op, order)
            self._see_sizes(order)
            op.record(prepared=True)
            op.step("prepared")
        mine.ready.set_result(order.text)
        log.info("VM %s (%s) may come", vm, order.name)
        self._wait(op, vm)

    def _resume(self, op: Operation) -> None:
        vm = str(op.params["vm"])
        self._going[vm] = op
        if not op.facts.get("prepared") or not self._launches.coming(vm):
            raise MigrationError(vm=vm, reason="the agent was restarted before it could come")
        self._wait(op, vm)

    def _see_sizes(self, order: Order) -> None:
        """Volumes that were in use here may have grown on the host that it comes from."""
        for volume in order.volumes:
            self._tools.find_store(volume.domain).refresh(volume.image, volume.volume)

    def _wait(self, op: Operation, vm: str) -> None:
        """Until it is here.  Raises MigrationError, ActionStopped."""
        end = Deadline(self._tools.clock, self._patience)
        while not self._has_come(op, vm, end):
            op.check()
            with self._happened:
                self._happened.wait(LOOK)
        op.step("arrived", abortable=False)
        self._is_here(vm)

    def _has_come(self, op: Operation, vm: str, end: Deadline) -> bool:
        """Raises MigrationError when it will not come."""
        try:
            state = self._state(vm)
        except AgentError as error:  # libvirt is away, and will tell
            log.info("VM %s: %s", vm, error)
            return False
        seen = bool(op.facts.get("seen"))
        if state is None:
            if seen:
                raise MigrationError(vm=vm, reason="libvirt had begun to receive it")
            if end.passed():
                reason = f"the other host did not begin within {self._patience:g} seconds"
                raise MigrationError(vm=vm, reason=reason)
            return False
        if _arrives(state) and not seen:
            op.record(seen=True)
        return not _arrives(state)

    def _is_here(self, vm: str) -> None:
        self._going.pop(vm, None)
        self._tools.registry.changed(vm)
        self._launches.up(vm)
        log.info("VM %s has come", vm)

    def _state(self, vm: str) -> VmState | None:
        """None when libvirt has none of it.  Raises 59."""
        try:
            return self._tools.registry.state(vm)
        except (NoSuchVM, VMIsDown):
            return None

    # -- after a failure or a restart --------------------------------------------------------

    def _recover(self, op: Operation) -> bool:
        """If it is not here nothing stays of it."""
        vm = str(op.params["vm"])
        volumes = [VolumePath(**volume) for volume in op.params["volumes"]]
        here = False
        if op.facts.get("begun"):
            with self._keeping.turn(vm, *volumes):
                here = self._is_or_ends(vm)
                if not here:
                    self._preparing.let_go(vm, volumes)
        self._going.pop(vm, None)
        if here:
            self._is_here(vm)
        elif self._launches.coming(vm):
            self._launches.drop(vm)
            log.info("VM %s does not come; all that was made for it is let go", vm)
        return here

    def _is_or_ends(self, vm: str) -> bool:
        """Whether it is here; what libvirt has received in part is ended.  Raises 59."""
        state = self._state(vm)
        if state is None:
            return False
        if not _arrives(state):
            return True
        log.warning("VM %s: what libvirt receives of it is ended", vm)
        try:
            self._libvirt.destroy(vm, gracefully=False)
        except VmError as error:
            log.info("VM %s: %s", vm, error)
        end = Deadline(self._tools.clock, ENDED)
        while (state := self._state(vm)) is not None and _arrives(state):
            if end.passed():
                raise LibvirtFailure(call=f"end VM {vm}", reason="it is still being received")
            self._tools.clock.wait(threading.Event(), SOON)
        return state is not None


def _arrives(state: VmState) -> bool:
    """Whether libvirt has not received all of it."""
    return state.state == PAUSED and state.reason in ARRIVING
