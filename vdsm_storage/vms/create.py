# SPDX-License-Identifier: GPL-2.0-or-later
"""VM.create.

The answer comes at once, and the VM is listed as WaitForLaunch; a thread of its own looks at every
volume and lease that is wanted, before anything is touched.  Then its secrets are given to libvirt,
its images made usable, and libvirt starts it with its processors stopped.  A start whose end nobody
saw, because libvirt did not answer or the agent died, so has changed nothing on any disk: it is
looked at, and the VM goes on if it is there, and else all that was made for it is let go.

Neither the XML nor secrets are in the journal: nothing is started after a restart.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import asdict, dataclass
from typing import Any, Final

from vdsm_storage.base.clock import Deadline
from vdsm_storage.base.lanes import Lanes
from vdsm_storage.errors import (
    ActionStopped,
    AgentError,
    CannotCreateVM,
    LibvirtTimeout,
    LibvirtUnavailable,
    NoSuchVM,
    VMIsDown,
)
from vdsm_storage.host.libvirt_life import LibvirtLife
from vdsm_storage.host.libvirt_model import PAUSED, Change, VmError, VmEvent
from vdsm_storage.jobs.operation import Kind, Operation
from vdsm_storage.jobs.runner import Request
from vdsm_storage.vms import start_xml
from vdsm_storage.vms.drives import VolumePath
from vdsm_storage.vms.keeping import BRIEFLY, DiskTools, Keeping
from vdsm_storage.vms.launches import UP, WAITING, Exit, Launches
from vdsm_storage.vms.preparing import Preparing
from vdsm_storage.vms.registry import Definition
from vdsm_storage.vms.start_xml import Order

CREATE: Final = "vm.create"
BEGIN: Final = 600.0  # seconds that a start may wait for its thread
AT_ONCE: Final = 8  # starts
STOP: Final = 60.0  # seconds for a start to come to an end that was asked for
ENDED: Final = 10.0  # seconds for libvirt to end a VM
LOOK: Final = 0.1  # seconds between two looks

log = logging.getLogger("vms.create")


@dataclass(frozen=True)
class Starting:
    libvirt: LibvirtLife
    launches: Launches
    lanes: Lanes
    preparing: Preparing
    moving: Callable[[str], bool]  # whether a VM is on its way to another host


class Creation:
    """`connected` and `event` are the registry's to call."""

    def __init__(self, tools: DiskTools, keeping: Keeping, starting: Starting) -> None:
        self._tools = tools
        self._keeping = keeping
        self._libvirt = starting.libvirt
        self._launches = starting.launches
        self._lanes = starting.lanes
        self._preparing = starting.preparing
        self._moving = starting.moving
        self._never = threading.Event()
        self._orders: dict[str, Order] = {}
        self._going: dict[str, Operation] = {}

    def kinds(self) -> tuple[Kind, ...]:
        steps = ("begun", "secrets", "prepared", "started", "resumed")
        return (Kind(CREATE, steps, self._create, self._recover),)

    # -- what callers ask --------------------------------------------------------------------

    def create(self, vm: str, params: Mapping[str, Any]) -> dict[str, Any]:
        """Begin; returns the VM as it is listed.

        Raises VMExists (4), CannotCreateVM (9), BadSecretRequest (72), 59.
        """
        order = start_xml.parse_order(vm, params)
        if not self._tools.registry.enabled:
            raise CannotCreateVM(vm=vm, reason="this host has no libvirt: libvirt.uri is empty")
        self._preparing.check_free(vm)
        self._launches.begin(vm, order.name)
        self._orders[vm] = order
        try:
            future = self._lanes.submit("create", lambda: self._run(order), BEGIN, AT_ONCE)
        except AgentError:
            self._orders.pop(vm, None)
            self._launches.drop(vm)
            raise
        future.add_done_callback(lambda done: self._done(vm, done))
        return {"vmId": vm, "vmName": order.name, "status": WAITING}

    def stop(self, vm: str) -> None:
        """Should it be about to start: give that up; returns when it did or did not."""
        end = Deadline(self._tools.clock, STOP)
        while vm in self._orders and not end.passed():
            operation = self._going.get(vm)
            if operation is not None:
                operation.cancel.request()
            self._tools.clock.wait(self._never, LOOK)

    def start(self) -> None:
        """After the journal was read: what an agent of before had not even begun is given up."""
        begun = {each.params.get("vm") for each in self._tools.runner.interrupted()
                 if each.kind == CREATE}  # fmt: skip
        for vm in self._launches.of_status(WAITING):
            if vm not in begun:
                self._launches.down(vm, Exit.GENERIC_ERROR, "The agent ended before it was begun")

    def _run(self, order: Order) -> None:
        volumes = order.volumes
        request = Request(
            kind=CREATE,
            params={
                "vm": order.vm,
                "volumes": [asdict(volume) for volume in volumes],
                "paused": order.paused,
            },
            domains=sorted({volume.domain for volume in volumes}),
            verb="VM.create",
            lane=order.vm,
            description=f"Start VM {order.vm}",
        )
        self._tools.runner.run(request)

    def _done(self, vm: str, done: Future[Any]) -> None:
        """In the thread that ran it.  A failed one may have come up all the same."""
        error = None if done.cancelled() else done.exception()
        if self._launches.waiting(vm):
            stopped = error is None or isinstance(error, ActionStopped)
            reason = Exit.DESTROYED_ON_STARTUP if stopped else Exit.START_FAILED
            self._launches.down(vm, reason, str(error or "The agent is stopping"))
        self._going.pop(vm, None)
        self._orders.pop(vm, None)

    # -- the operation -----------------------------------------------------------------------

    def _create(self, op: Operation) -> None:
        vm = str(op.params["vm"])
        order = self._orders[vm]
        self._going[vm] = op
        with self._keeping.turn(vm, *order.volumes):
            self._preparing.make_ready(op, order)
            op.step("prepared")
            self._start(order, op.id)
            op.step("started", abortable=False)
            self._go(vm, paused=order.paused)
            op.step("resumed", abortable=False)
        self._is_up(vm)
        log.info("VM %s (%s) runs with %s disks", vm, order.name, len(order.disks))

    def _start(self, order: Order, launch: str) -> None:
        """Raises CannotCreateVM (9), and what settled() does."""
        vm = order.vm
        start_xml.put_launch(order, launch)
        try:
            self._libvirt.create(order.text)
        except VmError as error:
            raise CannotCreateVM(vm=vm, reason=error.text) from error
        except (LibvirtTimeout, LibvirtUnavailable) as error:
            log.warning("VM %s: not known yet whether it starts: %s", vm, error)
            try:
                ours = self._is_ours(self._keeping.settled(vm), launch)
            except (NoSuchVM, VMIsDown):
                ours = False
            if not ours:
                raise CannotCreateVM(vm=vm, reason=str(error)) from error
        finally:
            self._tools.registry.changed(vm)

    def _go(self, vm: str, *, paused: bool) -> None:
        """Raises CannotCreateVM (9), 59."""
        if paused:
            return
        try:
            if self._libvirt.state(vm).state == PAUSED:
                self._libvirt.resume(vm)
        except VmError as error:
            raise CannotCreateVM(vm=vm, reason=error.text) from error

    @staticmethod
    def _is_ours(definition: Definition, launch: str) -> bool:
        return start_xml.launch_of(definition.xml) == launch

    # -- after a failure or a restart --------------------------------------------------------

    def _recover(self, op: Operation) -> bool:
        vm = str(op.params["vm"])
        volumes = [VolumePath(**volume) for volume in op.params["volumes"]]
        runs = False
        if op.facts.get("begun"):
            with self._keeping.turn(vm, *volumes):
                runs = self._goes_on(vm, op)
                if not runs:
                    # Should libvirt have been told to start it, and not have come to that yet.
                    self._launches.give_up(vm, op.id)
                    self._preparing.let_go(vm, volumes)
        if runs:
            self._is_up(vm)
        elif vm not in self._orders and self._launches.waiting(vm):  # from before a restart
            text = "The agent was restarted while the VM was being started"
            self._launches.down(vm, Exit.GENERIC_ERROR, text)
        return runs

    def _goes_on(self, vm: str, op: Operation) -> bool:
        """Whether libvirt has the VM, and it goes on.  Raises 59, VMDestroyFailed."""
        try:
            if not self._is_ours(self._keeping.settled(vm, BRIEFLY), op.id):
                return False
        except (NoSuchVM, VMIsDown):
            return False
        try:
            # Whoever was told that it is down may have started it elsewhere.
            if op.cancel.event.is_set() or not self._launches.waiting(vm):
                raise CannotCreateVM(vm=vm, reason="it was given up")
            self._go(vm, paused=bool(op.params["paused"]))
        except CannotCreateVM as error:
            log.warning("VM %s is ended again: %s", vm, error)
            self._end(vm)
            return False
        return True

    def _is_up(self, vm: str) -> None:
        """Ends that libvirt tells of while it is being started are not listened to."""
        self._launches.up(vm)
        try:
            self._tools.registry.state(vm)
        except (NoSuchVM, VMIsDown):
            self._launches.down(vm, Exit.LOST_QEMU, "The VM ended as soon as it had started")
        except AgentError as error:  # a new connection will tell
            log.info("VM %s: %s", vm, error)

    def _end(self, vm: str) -> None:
        """Raises VmError, 59."""
        self._libvirt.destroy(vm, gracefully=False)
        end = Deadline(self._tools.clock, ENDED)
        while self._preparing.runs(vm) and not end.passed():
            self._tools.clock.wait(self._never, LOOK)

    # -- what libvirt tells ------------------------------------------------------------------

    def event(self, event: VmEvent) -> None:
        if event.change is Change.STARTED and event.vm in self._launches.given_up():
            self._look_late(event.vm)

    def connected(self) -> None:
        """What happened meanwhile is not known."""
        running = {state.id for state in self._tools.registry.running()}
        for vm in running & self._launches.given_up().keys():
            self._look_late(vm)
        for vm in self._launches.of_status(UP):
            if vm not in running and not self._moving(vm):
                text = "The VM ended while nobody looked"
                self._launches.down(vm, Exit.MISSING, text)

    def _look_late(self, vm: str) -> None:
        self._lanes.submit(f"late {vm}", functools.partial(self._end_late, vm), BEGIN)

    def _end_late(self, vm: str) -> None:
        """libvirt started it after all; its images are let go, and it has not run."""
        with self._keeping.turn(vm):
            launch = self._launches.given_up().get(vm)
            with contextlib.suppress(NoSuchVM, VMIsDown):
                if launch is not None and self._is_ours(self._keeping.running(vm), launch):
                    log.warning("VM %s was started too late, and is ended", vm)
                    self._end(vm)
                    self._launches.forgive(vm)
