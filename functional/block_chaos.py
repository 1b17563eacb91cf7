# SPDX-License-Identifier: GPL-2.0-or-later
"""Hosts that are killed and stopped while they work, and looked after."""

from __future__ import annotations

import random
import signal
import threading
import time
from collections import Counter
from collections.abc import Sequence
from typing import Final

from functional.block_hosts import Cluster, Host
from vdsm_storage.rpc.client import RemoteError

LIFE: Final = (4.0, 12.0)  # seconds that an agent has
ARMED_LIFE: Final = 15.0  # that one has which is armed to die, and does not
PAUSE: Final = (1.0, 6.0)  # seconds that one is stopped; its sanlock goes on
POLL: Final = 0.1


class Keeper:
    """Ends the life of a host's agent in many ways, and starts the next one.

    `points` are crash points: most agents are armed to die at one of them, at those first at which
    none has died yet.
    """

    def __init__(self, cluster: Cluster, host: Host, points: Sequence[str], seed: int) -> None:
        self._cluster = cluster
        self._host = host
        self._chance = random.Random(seed)
        self._points = self._chance.sample(points, len(points))
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name=f"keeper {host.id}")
        self.deaths: Counter[str] = Counter()
        self.problem: BaseException | None = None

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """The host is well when this returns, and nothing is armed."""
        self._stop.set()
        self._thread.join()
        if self.problem is not None:
            raise self.problem

    def _run(self) -> None:
        try:
            while not self._stop.is_set():
                self._life()
            self._cluster.revive(self._host)
        except BaseException as error:
            self.problem = error
            raise

    def _life(self) -> None:
        how = self._chance.choices(("point", "kill", "host", "pause"), (10, 2, 1, 2))[0]
        if how == "pause" and self._host.up.is_set():
            self._wait(self._chance.uniform(*LIFE))
            self._pause()
            return
        point = self._points[0] if how == "point" else ""
        if not self._revive(point):
            return
        self._wait(ARMED_LIFE if point else self._chance.uniform(*LIFE))
        if self._stop.is_set():
            return
        self._host.up.clear()
        if not self._host.agent.alive():
            self._host.agent.wait_dead()
            self._points.append(self._points.pop(0))
            self.deaths[point] += 1
        elif how == "host":
            self._host.agent.kill_host()
            self.deaths["host"] += 1
        else:
            self._host.agent.kill()
            self.deaths["kill"] += 1
            if point:  # it is not reached any time soon
                self._points.insert(5, self._points.pop(0))

    def _revive(self, point: str) -> bool:
        """False when it died before it was well."""
        try:
            self._cluster.revive(self._host, point)
        except RemoteError:
            if self._host.agent.alive():
                raise
            self._host.agent.wait_dead()
            self._points.append(self._points.pop(0))
            self.deaths[f"{point} while it recovered"] += 1
            return False
        return True

    def _pause(self) -> None:
        if self._host.agent.alive():
            self._host.signal(signal.SIGSTOP)
            self._wait(self._chance.uniform(*PAUSE))
            self._host.signal(signal.SIGCONT)
            self.deaths["pause"] += 1

    def _wait(self, seconds: float) -> None:
        """Or until the agent dies, or nobody wants more."""
        end = time.monotonic() + seconds
        while time.monotonic() < end and self._host.agent.alive() and not self._stop.is_set():
            time.sleep(POLL)
