# SPDX-License-Identifier: GPL-2.0-or-later
"""Which disks are to be watched: found at the VMs, after everything that may have changed them.

A VM is looked at when libvirt or an operation says that it changed; all of them when libvirt was
connected anew, which is also how an agent begins, and every few minutes for what no event told.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Final

from vdsm_storage.errors import (
    AgentError,
    NoSuchVM,
    StorageDomainDoesNotExist,
    UnsupportedOnFileDomain,
    VMIsDown,
)
from vdsm_storage.host.libvirt_model import ENOSPC, IO_ERROR, PAUSED, VmError, VmState
from vdsm_storage.host.libvirt_thresholds import Extent
from vdsm_storage.monitor import thin_drive as td
from vdsm_storage.monitor import thin_history as th
from vdsm_storage.monitor.crew import Crew
from vdsm_storage.monitor.thin_drive import Watched
from vdsm_storage.monitor.thin_extend import Extending
from vdsm_storage.monitor.thin_tools import ThinTools
from vdsm_storage.vms.drives import Drive, volume_of
from vdsm_storage.vms.registry import Definition

ALL: Final = ""  # in place of a VM
WORKERS: Final = 16
RETRY: Final = 5.0  # seconds after a look that failed
# After one that a busy QEMU did not answer, twice as long each further time, up to RETRY: libvirt
# tells that a VM has started before it can be asked about its disks.
SOON: Final = 0.1

log = logging.getLogger("thin")


class Looking:
    def __init__(self, tools: ThinTools) -> None:
        self._tools = tools
        self._crew: Crew[str] = Crew(tools.lanes, "thin look", WORKERS, str, self._look)
        self._silent: dict[str, float] = {}  # VMs whose QEMU did not answer: the last wait
        self.extending = Extending(tools, self.vm)

    def vm(self, vm: str) -> None:
        """Look at a VM soon.  Does not wait."""
        self._crew.put(vm)

    def all(self) -> None:
        self._crew.put(ALL)

    # -- looking -----------------------------------------------------------------------------

    def _look(self, work: Sequence[str]) -> None:
        (vm,) = work
        try:
            if vm == ALL:
                self._look_at_all()
            else:
                self._look_at(vm)
        except (NoSuchVM, VMIsDown):
            self.forget(vm)
        except (AgentError, VmError) as error:
            log.warning("%s: looked at again later: %s", f"VM {vm}" if vm else "All VMs", error)
            self._tools.alarms.after(RETRY, lambda: self._crew.put(vm))

    def _look_at(self, vm: str) -> None:
        tools = self._tools
        state = tools.registry.state(vm)
        definition = tools.registry.definition(vm)
        extents = tools.libvirt.extents((vm,)).get(vm, {}) if definition.drives else {}
        if not _agree(_thin(definition, extents), extents):
            definition = tools.registry.definition(vm, fresh=True)
        drives = _thin(definition, extents)
        self._compare(state, drives, extents, fresh=True)

    def _look_at_all(self) -> None:
        """Two calls for all VMs; one more for those that changed since they were looked at."""
        tools = self._tools
        states = {state.id: state for state in tools.registry.running()}
        for vm in {*tools.board.vms(), *tools.history.vms()} - states.keys():
            self.forget(vm)
        extents = tools.libvirt.extents() if states else {}
        for vm, state in states.items():
            known = {each.name for each in tools.board.of(vm)}
            there = extents.get(vm, {})
            drives = _thin(self._definition(vm), there)
            if not _agree(drives, there) or known != {drive.name for drive in drives.values()}:
                self.vm(vm)
            else:
                self._compare(state, drives, there, fresh=False)

    def _definition(self, vm: str) -> Definition | None:
        try:
            return self._tools.registry.definition(vm)
        except (NoSuchVM, VMIsDown):
            return None

    def _compare(
        self, state: VmState, drives: Mapping[str, Drive], extents: Mapping[str, Extent],
        *, fresh: bool,
    ) -> None:  # fmt: skip
        """`fresh`: what is known of the volumes is read again, too."""
        tools, vm = self._tools, state.id
        paused = self._without_space(state) if drives else set()
        watched, silent = [], False
        for key, drive in drives.items():
            each, name = self._found(vm, drive, fresh=fresh), drive.name
            if each is None:
                continue
            watched.append(name)
            extent = extents.get(key)
            if extent is None:  # its QEMU is busy, or hangs
                silent = True
                continue
            found_paused = name in paused and not each.paused
            each.paused = each.paused or found_paused
            self._consider(each, extent)
            if found_paused:
                tools.note(each, th.PAUSED)
        self._ask_again(vm, silent)
        for each in tools.board.keep(vm, watched):
            log.info("VM %s disk %s is not watched any more", vm, each.name)
        if not watched and not tools.board.of(vm):
            return
        for name in watched:
            self._release(vm, name)

    def _ask_again(self, vm: str, silent: bool) -> None:
        if not silent:
            self._silent.pop(vm, None)
            return
        wait = self._silent[vm] = min(RETRY, 2 * self._silent.get(vm, SOON / 2))
        self._tools.alarms.after(wait, lambda: self._crew.put(vm))

    def _found(self, vm: str, drive: Drive, *, fresh: bool) -> Watched | None:
        """None for one that does not grow."""
        tools, volume = self._tools, drive.volume
        assert volume is not None
        each = tools.board.get(vm, drive.name)
        same = each is not None and (each.node, each.volume) == (drive.node, volume)
        limit = each.limit if each is not None else 0
        if fresh or not same:
            try:
                limit = tools.limit(volume)
            except UnsupportedOnFileDomain:
                return None
            except StorageDomainDoesNotExist as error:  # looked at again when it is connected
                log.info("VM %s disk %s is not watched: %s", vm, drive.name, error)
                return None
        if not limit:
            return None
        if each is None:
            each = Watched(vm, drive.name, drive.alias, tools.policy.half_life)
        if not same:
            each = each.successor(drive.node, volume)
            tools.board.add(each)
        each.mirrored = drive.mirrored if drive.mirrors_qcow2 else None
        each.limit = max(limit, each.limit) if same else limit
        return each

    def _consider(self, each: Watched, extent: Extent) -> None:
        """Whether it has room, and is watched where it should be."""
        tools = self._tools
        now = tools.clock.monotonic()
        before = each.standing
        each.size = extent.physical or each.size
        each.saw(now, extent.allocation)
        planned = each.plan(tools.policy, now, tools.tail(each.volume.domain))
        if planned.target is not None or each.paused:
            self.extending.want(each)
        elif planned.threshold is None and not extent.threshold:
            each.state, each.threshold = td.AT_LIMIT, 0
        elif each.allocation < extent.threshold <= (planned.threshold or 0):
            each.state, each.threshold = td.ARMED, extent.threshold  # by an agent before us
        else:
            self.extending.arm_again(each)
        if each.standing != before:  # an idle disk costs no system call
            tools.note(each, th.LOOKED)

    def _without_space(self, state: VmState) -> set[str]:
        """Targets of disks that made a guest pause."""
        if state.state != PAUSED or state.reason != IO_ERROR:
            return set()
        errors = self._tools.libvirt.disk_errors(state.id)
        return {name for name, error in errors.items() if error == ENOSPC}

    def _release(self, vm: str, name: str) -> None:
        """An agent that is gone may have slowed it."""
        each = self._tools.board.get(vm, name)
        if each is not None and not each.throttle and not each.started:
            try:
                self._tools.throttles.lift(vm, name)
            except (VmError, OSError) as error:
                log.warning("VM %s disk %s stays slowed: %s", vm, name, error)

    def forget(self, vm: str) -> None:
        """It has ended."""
        self._silent.pop(vm, None)
        self._tools.board.keep(vm, ())
        self._tools.throttles.forget(vm)
        self._tools.history.forget(vm)


def _thin(definition: Definition | None, extents: Mapping[str, Extent]) -> dict[str, Drive]:
    """Disks that may have to grow, by the names that extents have: what their VM's definition
    tells, and what a backup writes to, which it does not."""
    drives = definition.drives if definition is not None else ()
    found = {d.name: d for d in drives if d.is_thin and d.node and d.volume is not None}
    return {**found, **{scratch.node: scratch for scratch in _scratches(drives, extents)}}


def _scratches(drives: Sequence[Drive], extents: Mapping[str, Extent]) -> Iterator[Drive]:
    """Layers that libvirt reports beside a disk's chain and its mirror."""
    disks = {drive.name: drive for drive in drives}
    for layer, extent in extents.items():
        disk = disks.get(layer.partition("[")[0])
        if not layer.endswith("]") or disk is None or volume_of(extent.path) is None:
            continue
        if extent.path not in (*disk.chain, disk.replica_path, disk.commit_path):
            name = layer.replace("[", "_").removesuffix("]")
            yield Drive(name, "disk", "block", "qcow2", extent.path, (extent.path,), node=layer)


def _agree(drives: Mapping[str, Drive], extents: Mapping[str, Extent]) -> bool:
    """Whether QEMU writes to those layers that the definition names."""
    return all(
        name not in extents or extents[name].path in ("", drive.path)
        for name, drive in drives.items()
    )
