# SPDX-License-Identifier: GPL-2.0-or-later
"""What the agent asks of libvirt about VMs: each call bounded, its errors in our own words.

Every method raises LibvirtUnavailable or LibvirtTimeout (59), and VmError.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Final, TypeVar

import libvirt
import libvirt_qemu

from vdsm_storage.errors import LibvirtTimeout
from vdsm_storage.host.libvirt import Libvirt
from vdsm_storage.host.libvirt_model import BulkStats, Change, VmError, VmEvent, VmState, Why

# Seconds of libvirt's own synchronisation with an agent, before a command is sent.
SYNC: Final = 5.0
STATS: Final = 10.0  # seconds for all VMs: what hangs is left out
MARGIN: Final = 3.0  # seconds in which libvirt must tell that a guest agent's time is over

log = logging.getLogger("libvirt.vms")

T = TypeVar("T")

_WHY: Final[Mapping[int, Why]] = {
    libvirt.VIR_ERR_NO_DOMAIN: Why.NO_VM,
    libvirt.VIR_ERR_OPERATION_INVALID: Why.NOT_RUNNING,
    libvirt.VIR_ERR_AGENT_UNRESPONSIVE: Why.AGENT,
    libvirt.VIR_ERR_AGENT_UNSYNCED: Why.AGENT,
    libvirt.VIR_ERR_NO_SUPPORT: Why.UNSUPPORTED,
}
# libvirt 9.0 has one number for all that an agent answers; these words are QEMU's.
_UNSUPPORTED: Final = ("has been disabled", "has not been found", "is not currently supported")
_WHILE_FROZEN: Final = "frozen state"  # then its agent obeys little, and says that it is disabled
# A Windows guest does not stay frozen for longer than ten seconds, and says so when it is thawed.
_BY_ITSELF: Final = "fsfreeze is limited up to"
_STATS: Final = (
    libvirt.VIR_DOMAIN_STATS_STATE
    | libvirt.VIR_DOMAIN_STATS_CPU_TOTAL
    | libvirt.VIR_DOMAIN_STATS_BALLOON
    | libvirt.VIR_DOMAIN_STATS_VCPU
    | libvirt.VIR_DOMAIN_STATS_INTERFACE
    | libvirt.VIR_DOMAIN_STATS_BLOCK
)
# A VM whose QEMU hangs is told without what only its QEMU knows, and holds up nobody.
_STATS_FLAGS: Final = (
    libvirt.VIR_CONNECT_GET_ALL_DOMAINS_STATS_RUNNING
    | libvirt.VIR_CONNECT_GET_ALL_DOMAINS_STATS_PAUSED
    | libvirt.VIR_CONNECT_GET_ALL_DOMAINS_STATS_OTHER
    | libvirt.VIR_CONNECT_GET_ALL_DOMAINS_STATS_NOWAIT
)
_LIFECYCLE: Final[Mapping[int, Change]] = {
    libvirt.VIR_DOMAIN_EVENT_STARTED: Change.STARTED,
    libvirt.VIR_DOMAIN_EVENT_STOPPED: Change.STOPPED,
    libvirt.VIR_DOMAIN_EVENT_CRASHED: Change.STOPPED,
    libvirt.VIR_DOMAIN_EVENT_SUSPENDED: Change.PAUSED,
    libvirt.VIR_DOMAIN_EVENT_RESUMED: Change.RESUMED,
}


class LibvirtVms:
    """Names of VMs are their UUIDs."""

    def __init__(self, libvirt_: Libvirt) -> None:
        self._libvirt = libvirt_
        # By VM: its number in libvirtd, and the seconds that its agent has to answer.
        self._patience: dict[str, tuple[int, int]] = {}

    @property
    def enabled(self) -> bool:
        return self._libvirt.enabled

    # -- looking -----------------------------------------------------------------------------

    def all(self) -> list[VmState]:
        """All VMs that libvirt knows, those that do not run included."""

        def call(connection: Any) -> list[VmState]:
            found = []
            for domain in connection.listAllDomains(0):
                try:
                    found.append(_state(domain))
                except libvirt.libvirtError as error:  # it may have ended since it was listed
                    if error.get_error_code() != libvirt.VIR_ERR_NO_DOMAIN:
                        raise
            return found

        return self._call("list VMs", call)

    def state(self, vm: str) -> VmState:
        return self._on(vm, "state of a VM", _state)

    def xml(self, vm: str) -> str:
        """As it runs now, without passwords."""
        return self._on(vm, "definition of a VM", lambda domain: str(domain.XMLDesc(0)))

    def saved_xml(self, vm: str) -> str:
        """As it is kept with a VM's memory, and wanted when that is restored."""
        flags = libvirt.VIR_DOMAIN_XML_MIGRATABLE
        return self._on(vm, "definition of a VM", lambda domain: str(domain.XMLDesc(flags)))

    def stats(self, vms: Sequence[str] = ()) -> list[BulkStats]:
        """Of the VMs that run, or of some of them; one that is gone is left out."""

        def call(connection: Any) -> list[BulkStats]:
            if vms:
                domains = [connection.lookupByUUIDString(vm) for vm in vms]
                found = connection.domainListGetStats(domains, _STATS, _STATS_FLAGS)
            else:
                found = connection.getAllDomainStats(_STATS, _STATS_FLAGS)
            return [BulkStats(each.UUIDString(), each.name(), values) for each, values in found]

        return self._call("statistics of VMs", call, STATS)

    def disk_errors(self, vm: str) -> dict[str, str]:
        """Why disks have stopped, ENOSPC or EOTHER, by target; disks in order are left out."""

        def call(domain: Any) -> dict[str, str]:
            no_space = libvirt.VIR_DOMAIN_DISK_ERROR_NO_SPACE
            errors = domain.diskErrors(0)
            return {name: "ENOSPC" if e == no_space else "EOTHER" for name, e in errors.items()}

        return self._on(vm, "disk errors of a VM", call)

    # -- life --------------------------------------------------------------------------------

    def suspend(self, vm: str) -> None:
        """Stop its processors."""
        self._on(vm, "pause a VM", lambda domain: domain.suspend())

    def resume(self, vm: str) -> None:
        self._on(vm, "continue a VM", lambda domain: domain.resume())

    def reset(self, vm: str) -> None:
        self._on(vm, "reset a VM", lambda domain: domain.reset(0))

    def destroy(self, vm: str, *, gracefully: bool) -> None:
        """End its QEMU; `gracefully` gives up when that does not flush and end in time."""
        flags = libvirt.VIR_DOMAIN_DESTROY_GRACEFUL if gracefully else 0
        self._on(vm, "end a VM", lambda domain: domain.destroyFlags(flags))

    # -- the guest's file systems ------------------------------------------------------------

    def freeze(self, vm: str, timeout: float) -> int:
        """Returns how many were frozen.  The agent has `timeout` seconds, rounded up, to answer.

        VmError with Why.AGENT does not tell whether the guest will freeze yet.
        """
        return self._ask_agent(vm, "freeze", timeout, lambda domain: domain.fsFreeze())

    def thaw(self, vm: str, timeout: float) -> int:
        """Returns how many were thawed; none when the guest was not frozen any more."""
        try:
            return self._ask_agent(vm, "thaw", timeout, lambda domain: domain.fsThaw())
        except VmError as error:
            if _BY_ITSELF in error.text:
                return 0
            raise

    def _ask_agent(self, vm: str, what: str, timeout: float, command: Callable[[Any], int]) -> int:
        seconds = max(1, round(timeout + 0.5))

        def call(domain: Any) -> int:
            # Else libvirt waits for the agent without end, long after its caller has left.  It
            # remembers this as long as the VM runs, and takes as long for it as for a thaw.
            wanted = (domain.ID(), seconds)
            if self._patience.get(vm) != wanted:
                domain.agentSetResponseTimeout(seconds, 0)
                self._patience[vm] = wanted
            return int(command(domain))

        try:
            return self._on(vm, f"{what} the guest", call, seconds + min(seconds, SYNC) + MARGIN)
        except LibvirtTimeout:  # somebody else may have changed it
            self._patience.pop(vm, None)
            raise
        except VmError as error:
            if error.why is Why.OTHER and _is_unsupported(error.text):
                raise VmError(Why.UNSUPPORTED, error.text) from error
            raise

    # -- disks -------------------------------------------------------------------------------

    def snapshot(self, vm: str, xml: str, *, disks_only: bool, timeout: float) -> None:
        """Switch disks to new files, which are there already: all of them or none.

        The guest is not asked to be quiet: the caller did that.
        """
        flags = (
            libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_REUSE_EXT
            | libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_NO_METADATA
            | libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_ATOMIC
        )
        if disks_only:
            flags |= libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_DISK_ONLY

        def call(domain: Any) -> None:
            domain.snapshotCreateXML(xml, flags)

        self._on(vm, "snapshot a VM", call, timeout)

    def busy(self, vm: str) -> bool:
        """Whether libvirt is still at work on the VM: a call of ours that nobody waits for."""

        def call(domain: Any) -> bool:
            state, _details, _milliseconds = domain.controlInfo(0)
            return bool(state != libvirt.VIR_DOMAIN_CONTROL_OK)

        return self._on(vm, "what is done to a VM", call)

    def job_fraction(self, vm: str) -> float | None:
        """How far libvirt is with saving a VM's memory; None while it cannot be told."""

        def call(domain: Any) -> float | None:
            stats = domain.jobStats(0)
            total = int(stats.get("data_total", 0))
            return 1.0 - int(stats.get("data_remaining", 0)) / total if total else None

        return self._on(vm, "progress of a VM's job", call)

    def abort_job(self, vm: str) -> None:
        """Ask libvirt to stop what it does to a VM; the call that began it then fails."""
        self._on(vm, "abort a VM's job", lambda domain: domain.abortJob())

    def set_metadata(self, vm: str, xml: str, prefix: str, uri: str) -> None:
        """Replace the element of the name space `uri` in the VM's <metadata>, as it runs.

        `xml` has no name spaces: libvirt puts all of it into this one, and refuses its prefix.
        """
        kind, live = libvirt.VIR_DOMAIN_METADATA_ELEMENT, libvirt.VIR_DOMAIN_AFFECT_LIVE

        def call(domain: Any) -> None:
            domain.setMetadata(kind, xml, prefix, uri, live)

        self._on(vm, "metadata of a VM", call)

    def close_files(self, vm: str, paths: Collection[str]) -> list[str]:
        """Let QEMU close files that it has open for nothing; returns QEMU's names of these.

        libvirt 9.0 leaves a file open that it could not open as a layer.  There is no call for it
        but QEMU's monitor, which libvirt notes in the VM's log.  QEMU refuses for what is in use.
        """

        def call(domain: Any) -> list[str]:
            def ask(command: str, arguments: Mapping[str, object]) -> dict[str, Any]:
                line = json.dumps({"execute": command, "arguments": arguments})
                answer: dict[str, Any] = json.loads(
                    libvirt_qemu.qemuMonitorCommand(domain, line, 0)
                )
                return answer

            # {"return": [{"node-name": "libvirt-3-storage", "file": "/path", "drv": "file", …}, …]}
            nodes = ask("query-named-block-nodes", {"flat": True}).get("return", [])
            names = [{"node-name": one["node-name"]} for one in nodes if one.get("file") in paths]
            # The newest first: those above use the ones below.
            closed = [name for name in names if "return" in ask("blockdev-del", name)]
            return [name["node-name"] for name in closed]

        return self._on(vm, "close files", call)

    # -- events ------------------------------------------------------------------------------

    def watch(self, callback: Callable[[VmEvent], None], connected: Callable[[], None]) -> None:
        """Before start: `callback` for every event, `connected` after every new connection."""

        def lifecycle(domain: Any, event: int, detail: int, _opaque: Any = None) -> None:
            change = _LIFECYCLE.get(event)
            if change is Change.STOPPED:
                self._patience.pop(domain.UUIDString(), None)
            if change is not None:
                crashed = event == libvirt.VIR_DOMAIN_EVENT_CRASHED
                facts = {"detail": detail, "crashed": crashed}
                callback(VmEvent(domain.UUIDString(), change, facts))

        def devices(domain: Any, *_facts: Any) -> None:
            callback(VmEvent(domain.UUIDString(), Change.DEVICES))

        def limits(domain: Any, *_facts: Any) -> None:
            callback(VmEvent(domain.UUIDString(), Change.LIMITS))

        def io_error(domain: Any, path: str, alias: str, _action: int, reason: str) -> None:
            facts = {"path": path, "alias": alias, "reason": reason}
            callback(VmEvent(domain.UUIDString(), Change.IO_ERROR, facts))

        def agent(domain: Any, state: int, _reason: int) -> None:
            callback(VmEvent(domain.UUIDString(), Change.AGENT, {"connected": state == 1}))

        def rebooted(domain: Any, *_facts: Any) -> None:
            callback(VmEvent(domain.UUIDString(), Change.REBOOTED))

        on = self._libvirt.on_event
        on(libvirt.VIR_DOMAIN_EVENT_ID_LIFECYCLE, lifecycle)
        on(libvirt.VIR_DOMAIN_EVENT_ID_IO_ERROR_REASON, io_error)
        on(libvirt.VIR_DOMAIN_EVENT_ID_AGENT_LIFECYCLE, agent)
        on(libvirt.VIR_DOMAIN_EVENT_ID_REBOOT, rebooted)
        on(libvirt.VIR_DOMAIN_EVENT_ID_TUNABLE, limits)
        for event in (
            libvirt.VIR_DOMAIN_EVENT_ID_DEVICE_ADDED,
            libvirt.VIR_DOMAIN_EVENT_ID_DEVICE_REMOVED,
            libvirt.VIR_DOMAIN_EVENT_ID_DISK_CHANGE,
            libvirt.VIR_DOMAIN_EVENT_ID_TRAY_CHANGE,
            libvirt.VIR_DOMAIN_EVENT_ID_METADATA_CHANGE,
            libvirt.VIR_DOMAIN_EVENT_ID_BLOCK_JOB_2,
        ):
            on(event, devices)
        self._libvirt.when_connected(self._patience.clear)  # it may be another daemon
        self._libvirt.when_connected(connected)

    # -- how it is asked ---------------------------------------------------------------------

    def _on(
        self, vm: str, name: str, function: Callable[[Any], T], timeout: float | None = None
    ) -> T:
        return self._call(name, lambda c: function(c.lookupByUUIDString(vm)), timeout)

    def _call(self, name: str, function: Callable[[Any], T], timeout: float | None = None) -> T:
        try:
            return self._libvirt.call(name, function, timeout)
        except libvirt.libvirtError as error:
            raise VmError(_WHY.get(error.get_error_code(), Why.OTHER), str(error)) from error


def _is_unsupported(text: str) -> bool:
    """Whether a guest agent has no such command, or may not obey it.

        unable to execute QEMU agent command 'guest-fsfreeze-freeze': Command
        guest-fsfreeze-freeze has been disabled
    """
    return _WHILE_FROZEN not in text and any(words in text for words in _UNSUPPORTED)


def _state(domain: Any) -> VmState:
    state, reason = domain.state()
    return VmState(domain.UUIDString(), domain.name(), state, reason)
