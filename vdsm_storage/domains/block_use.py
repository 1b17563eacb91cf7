# SPDX-License-Identifier: GPL-2.0-or-later
"""Which logical volumes this host has activated, and for whom.

A volume is active while somebody uses it: an operation of this process, or an image that was
prepared for a guest.  Operations end with the process; preparations outlive it (the guest does),
so they are kept in a file that is gone after a boot, as device-mapper's tables are.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Final

from vdsm_storage.base import files
from vdsm_storage.errors import AgentError

log = logging.getLogger("activation")

OPERATION: Final = ""  # the user that stands for operations of this process
_Key = tuple[str, str]


class Uses:
    """Users of volumes, of all domains.  `directory` is on this host alone and empty after a boot.

    A user is an image's UUID, or OPERATION, which counts.
    """

    def __init__(self, directory: str) -> None:
        self._path = os.path.join(directory, "prepared.json")
        self._mutex = threading.Lock()
        self._users: dict[_Key, dict[str, int]] = {}
        self._changing: dict[_Key, threading.RLock] = {}
        for domain, volumes in self._load().items():
            for volume, images in volumes.items():
                self._users[domain, volume] = dict.fromkeys(images, 1)

    def users(self, domain: str, volume: str) -> list[str]:
        """Who uses it now."""
        with self._mutex:
            return sorted(self._users.get((domain, volume), ()))

    def prepared(self, domain: str, image: str) -> list[str]:
        """The volumes that are prepared for an image."""
        with self._mutex:
            return sorted(
                volume
                for (where, volume), users in self._users.items()
                if where == domain and image in users
            )

    def add(
        self, domain: str, volumes: Sequence[str], user: str, activate: Callable[[], None]
    ) -> None:
        """`activate()` them, and count the user once it is done."""
        with self._held(domain, volumes):
            self._count(domain, volumes, user, 1)
            try:
                activate()
            except BaseException:
                self._count(domain, volumes, user, -1)
                raise
        if user != OPERATION:
            self._save()

    def remove(
        self,
        domain: str,
        volumes: Sequence[str],
        user: str,
        deactivate: Callable[[Sequence[str]], None],
    ) -> None:
        """Count the user off, and `deactivate(those that nobody uses any more)`."""
        with self._held(domain, volumes):
            self._count(domain, volumes, user, -1)
            unused = [volume for volume in volumes if not self.users(domain, volume)]
            if user != OPERATION:
                self._save()
            if unused:
                deactivate(unused)

    def forget(self, domain: str) -> None:
        """The domain is gone."""
        with self._mutex:
            for key in [key for key in self._users if key[0] == domain]:
                del self._users[key]
        self._save()

    @contextlib.contextmanager
    def unused(self, domain: str, volumes: Sequence[str]) -> Iterator[list[str]]:
        """Those of `volumes` that nobody uses; nobody begins to while this is held."""
        with self._held(domain, volumes):
            yield [volume for volume in volumes if not self.users(domain, volume)]

    # -- inside ------------------------------------------------------------------------------

    def _count(self, domain: str, volumes: Sequence[str], user: str, step: int) -> None:
        with self._mutex:
            for volume in volumes:
                users = self._users.setdefault((domain, volume), {})
                now = users.get(user, 0) + step
                if user != OPERATION:  # preparing twice is preparing once
                    now = min(now, 1)
                if now > 0:
                    users[user] = now
                else:
                    users.pop(user, None)
                if not users:
                    del self._users[domain, volume]

    @contextlib.contextmanager
    def _held(self, domain: str, volumes: Sequence[str]) -> Iterator[None]:
        """One activation or deactivation of a volume at a time, always in the same order."""
        with self._mutex:
            locks = [
                self._changing.setdefault((domain, volume), threading.RLock())
                for volume in sorted(set(volumes))
            ]
        with contextlib.ExitStack() as stack:
            for lock in locks:
                stack.enter_context(lock)
            yield

    def _load(self) -> dict[str, dict[str, list[str]]]:
        try:
            with open(self._path, encoding="utf-8") as file:
                found: dict[str, dict[str, list[str]]] = json.load(file)
                return found
        except FileNotFoundError:
            return {}
        except (OSError, ValueError) as error:
            log.error("%s cannot be read (%s): what is active stays so", self._path, error)
            return {}

    def _save(self) -> None:
        with self._mutex:
            kept: dict[str, dict[str, list[str]]] = {}
            for (domain, volume), users in self._users.items():
                images = sorted(user for user in users if user != OPERATION)
                if images:
                    kept.setdefault(domain, {})[volume] = images
            try:
                os.makedirs(os.path.dirname(self._path), mode=0o755, exist_ok=True)
                files.write_atomic(self._path, json.dumps(kept, sort_keys=True).encode())
            except OSError as error:
                raise AgentError(reason=f"{self._path} cannot be written: {error}") from error
