# SPDX-License-Identifier: GPL-2.0-or-later
"""What another host is told of a VM that moves there; and what makes one move that does not want
to come to an end."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from vdsm_storage.errors import AgentError, MigrationError
from vdsm_storage.host.libvirt_migration import LibvirtMigration, Progress
from vdsm_storage.host.libvirt_model import VmError
from vdsm_storage.vms import migrate_xml
from vdsm_storage.vms.keeping import Keeping
from vdsm_storage.vms.vm_secrets import VmSecrets

DOWNTIME: Final = "setDowntime"
ABORT: Final = "abort"

log = logging.getLogger("vms.migrate")


@dataclass(frozen=True)
class Packing:
    """`frozen(vm)` are the seconds since a guest was frozen, None when it is not."""

    keeping: Keeping
    libvirt: LibvirtMigration
    secrets: VmSecrets
    frozen: Callable[[str], float | None]

    def pack(self, vm: str) -> dict[str, Any]:
        """Parameters for VM.migrationCreate.  Raises MigrationError, 1, 6, 59."""
        definition = self.keeping.running(vm)
        reason = migrate_xml.why_not(definition.xml, definition.drives)
        if self.frozen(vm) is not None:
            reason = "its guest is frozen, and nobody there would know; VM.thaw comes first"
        if reason:
            raise MigrationError(vm=vm, reason=reason)
        xml = migrate_xml.to_send(self.libvirt.saved_xml(vm), definition.drives)
        return {"vmId": vm, "status": "Up", "xml": xml, "secrets": self._secrets(vm)}

    def _secrets(self, vm: str) -> list[dict[str, Any]]:
        known = self.secrets.entries(vm)
        lost = set(self.secrets.of(vm)) - {entry.uuid for entry in known}
        if lost:
            reason = (
                f"the values of its secrets {', '.join(sorted(lost))} are not kept (secrets.keep) "
                "and were forgotten when the agent was restarted"
            )
            raise MigrationError(vm=vm, reason=reason)
        return [
            {"uuid": entry.uuid, "usageType": entry.usage_type, "password": entry.password}
            for entry in known
        ]


class Convergence:
    """Takes the steps of an engine's schedule: the first ones at once, then one whenever a round of
    sending has left more to send than the best one before, and that more often than its limit.

    Each is {"name": "setDowntime" | "abort" | …, "params": […]}; what is not known is passed over.
    """

    def __init__(
        self, libvirt: LibvirtMigration, vm: str, schedule: Mapping[str, Any] | None
    ) -> None:
        self._libvirt = libvirt
        self._vm = vm
        self._init: list[Mapping[str, Any]] = list((schedule or {}).get("init") or ())
        self._steps: list[Mapping[str, Any]] = list((schedule or {}).get("stalling") or ())
        self._round = 0
        self._least: int | None = None
        self._stalls = 0

    def look(self, progress: Progress) -> None:
        """Raises VmError, 59."""
        while self._init:
            self._take(self._init.pop(0))
        least = self._least
        self._least = progress.remaining if least is None else min(progress.remaining, least)
        if progress.rounds == self._round:
            return
        self._round = progress.rounds
        if least is not None and progress.remaining > least:
            self._stalls += 1
        if self._steps and int(self._steps[0].get("limit", 0)) < self._stalls:
            self._take(self._steps.pop(0).get("action") or {})

    def _take(self, action: Mapping[str, Any]) -> None:
        name, params = str(action.get("name")), _words(action.get("params"))
        log.info("VM %s: after %s stalls: %s %s", self._vm, self._stalls, name, " ".join(params))
        if name == DOWNTIME and params[:1] and params[0].isdigit():
            self._libvirt.allow_downtime(self._vm, int(params[0]))
        elif name == ABORT:
            self._libvirt.abort_job(self._vm)


def _words(params: object) -> Sequence[str]:
    return [str(each) for each in params] if isinstance(params, list | tuple) else []


def quietly(work: Callable[[], None]) -> None:
    """The VM may be gone by now, or libvirt be away."""
    try:
        work()
    except (VmError, AgentError) as error:
        log.info("%s", error)
