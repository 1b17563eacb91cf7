# SPDX-License-Identifier: GPL-2.0-or-later
"""The mailbox of the connected pool, on its master domain: this host's side, and a manager's.

A host that is the manager serves the others; any host may ask.  Both follow the master domain.
"""

from __future__ import annotations

import logging
import threading
from typing import Final

from vdsm_storage.base.clock import Clock
from vdsm_storage.base.lanes import Lanes
from vdsm_storage.domains.domain import Domain
from vdsm_storage.domains.pool import Pools
from vdsm_storage.errors import AgentError, ExtendNotAnswered
from vdsm_storage.monitor.mailbox_file import Mailboxes
from vdsm_storage.monitor.mailbox_host import HostMailbox
from vdsm_storage.monitor.mailbox_spm import Extender, SpmMailbox

log = logging.getLogger("mailbox")

STOP: Final = 5.0  # seconds for a thread to end; the lease is given back after that


class PoolMailbox:
    """Fulfils domains.spm.Role.  `extend` is what a manager does for the others."""

    def __init__(self, pools: Pools, lanes: Lanes, clock: Clock, extend: Extender) -> None:
        self._pools = pools
        self._lanes = lanes
        self._clock = clock
        self._extend = extend
        self._mutex = threading.Lock()
        self._served: SpmMailbox | None = None
        self._asking: tuple[tuple[str, int], HostMailbox] | None = None  # master and host id

    # -- the manager's side --------------------------------------------------------------------

    def begin(self, master: Domain, hosts: int) -> None:
        """Serve the hosts below `hosts`; the caller holds the master's lease, and keeps it."""
        boxes = _boxes(master)
        if boxes is None:
            return
        mailbox = SpmMailbox(boxes, self._extend, self._lanes, self._clock, hosts)
        with self._mutex:
            self._served = mailbox
        mailbox.start()

    def end(self) -> None:
        """Serve no longer; called before the lease is given back, or when it is lost."""
        with self._mutex:
            mailbox, self._served = self._served, None
        if mailbox is not None:
            mailbox.stop(STOP)

    # -- a host's side -------------------------------------------------------------------------

    def ask(self, sd_id: str, volume: str, size: int, timeout: float) -> int:
        """Have the pool's manager extend a volume to `size` bytes; the bytes that it has then.

        Raises MailboxFull, ExtendNotAnswered, ExtendRefused.
        """
        pool = self._pools.connected()
        if pool is None or sd_id not in pool.domains:
            raise ExtendNotAnswered(
                volume=volume, domain=sd_id, size=size, seconds=0,
                reason="its pool is not connected", mailbox="the master domain",
            )  # fmt: skip
        return self._mailbox(pool.master, pool.host_id).request(sd_id, volume, size, timeout)

    def _mailbox(self, master: str, host_id: int) -> HostMailbox:
        domain = self._pools.registry.get(master)
        domain.check_special_files()
        boxes = _boxes(domain)
        if boxes is None:
            raise AgentError(reason=f"master domain {master} is local: no other host manages it")
        with self._mutex:
            asking = self._asking
            if asking is not None and asking[0] == (master, host_id):
                return asking[1]
            mailbox = HostMailbox(boxes, host_id, self._clock)
            self._asking = ((master, host_id), mailbox)
        if asking is not None:
            asking[1].stop(STOP)
        mailbox.start()
        return mailbox

    def close(self) -> None:
        """The pool is disconnected, or the agent stops."""
        self.end()
        with self._mutex:
            asking, self._asking = self._asking, None
        if asking is not None:
            asking[1].stop(STOP)


def _boxes(master: Domain) -> Mailboxes | None:
    if not master.type.leases:
        return None
    inbox, outbox = master.mailboxes
    return Mailboxes(inbox, outbox, master.store.is_block, master.own_lock.verify)
