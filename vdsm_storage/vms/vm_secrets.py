# SPDX-License-Identifier: GPL-2.0-or-later
"""Secrets that came with a VM: they live as long as it does on this host.

    <directory>/secrets-of-vms.json   {"<VM>": ["<UUID of a secret>", …]}

The values are the secrets' registry's, which keeps them encrypted.  Which VM has which is written
before anything is given to libvirt and removed after it was taken back, in a directory that a boot
empties: a VM may end while no agent looks, and the next one takes its secrets away.
"""

from __future__ import annotations

import json
import logging
import os
import threading
from collections.abc import Iterable, Sequence

from vdsm_storage.base import files
from vdsm_storage.errors import AgentError
from vdsm_storage.secrets.model import Entry
from vdsm_storage.secrets.registry import Registry

log = logging.getLogger("vms.secrets")

NAME = "secrets-of-vms.json"


class VmSecrets:
    """`directory` is made if it is missing.  One change at a time: two VMs may have one secret."""

    def __init__(self, registry: Registry, directory: str) -> None:
        self._registry = registry
        self._path = os.path.join(directory, NAME)
        self._lock = threading.Lock()
        os.makedirs(directory, mode=0o755, exist_ok=True)
        self._of = self._load()

    def vms(self) -> list[str]:
        return list(self._of)

    def of(self, vm: str) -> Sequence[str]:
        """UUIDs."""
        return self._of.get(vm, ())

    def entries(self, vm: str) -> list[Entry]:
        """For the host that the VM moves to; without those whose values nobody knows any more
        (they are not kept, and the agent was restarted)."""
        return self._registry.entries_of_vms(self.of(vm))

    def give(self, vm: str, entries: Iterable[Entry]) -> None:
        """Before the VM starts, or before it comes in from another host; until release().

        After a failure release() is wanted as well.  Raises SecretRegistrationFailed, OSError.
        """
        new = list(entries)
        if not new:
            return
        with self._lock:
            self._of = {**self._of, vm: sorted({*self.of(vm), *(entry.uuid for entry in new)})}
            self._save()
            self._registry.give(new)

    def release(self, vm: str) -> None:
        """The VM has ended here: what no other VM has goes.

        Raises SecretUnregistrationFailed; then it is to be called again.
        """
        if vm not in self._of:
            return
        with self._lock:
            left = {other: uuids for other, uuids in self._of.items() if other != vm}
            self._registry.take(set(self.of(vm)).difference(*left.values()))
            self._of = left
            self._save()
        log.info("Secrets of VM %s are gone", vm)

    def clean(self) -> None:
        """Remove secrets of VMs that nobody is known to have: what told so was lost."""
        with self._lock:
            try:
                strays = self._registry.uuids_of_vms().difference(*self._of.values())
                if strays:
                    self._registry.take(strays)
            except AgentError as error:
                log.info("Secrets of VMs are looked at later: %s", error)

    def _save(self) -> None:
        if self._of:
            files.write_atomic(self._path, json.dumps(self._of).encode(), 0o600)
        else:
            files.unlink_if_there(self._path)

    def _load(self) -> dict[str, list[str]]:
        try:
            found = json.loads(files.read_small(self._path))
            return {str(vm): [str(uuid) for uuid in uuids] for vm, uuids in found.items()}
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, TypeError, AttributeError) as error:
            log.error("%s cannot be read (%s): secrets of VMs are lost", self._path, error)
            return {}
