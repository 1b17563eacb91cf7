# SPDX-License-Identifier: GPL-2.0-or-later
"""The connection to libvirt: made again whenever it is lost; every call bounded in time.

    libvirt = Libvirt(config, EventLoop(), clock)
    libvirt.when_connected(...)             # wiring, before start
    libvirt.on_event(EVENT_ID, callback)
    libvirt.start()
    libvirt.call("look up a VM", lambda connection: connection.lookupByUUIDString(vm))

One connection brings the events and the signs of life; calls have others, see libvirt_calls.  A
daemon that hangs (or is stopped) is noticed by the missing signs of life; calls that wait then are
answered with an error.  Callers stop waiting earlier: each call runs in a thread that is left
behind when it takes too long, and there are never more than STUCK of these.  A new connection to a
daemon that hangs hangs too: it is one thread that waits, and calls are refused meanwhile.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import queue
import threading
from collections.abc import Callable, Iterable
from typing import Any, Final, TypeVar

import libvirt

from vdsm_storage.base.clock import Clock
from vdsm_storage.config import Libvirt as Settings
from vdsm_storage.errors import LibvirtLost, LibvirtTimeout, LibvirtUnavailable
from vdsm_storage.host.bounded import BoundedCall
from vdsm_storage.host.libvirt_calls import CallConnections, Lost, close
from vdsm_storage.host.libvirt_events import EventLoop

STUCK: Final = 50  # calls at once, those included that nobody waits for any more
CLOSE: Final = 5.0  # seconds for libvirt to close a connection
OPEN: Final = 10.0  # seconds that a first connection is waited for

log = logging.getLogger("libvirt")

T = TypeVar("T")


class Libvirt:
    """`settings.uri` empty: there is no libvirt here, and `call` always answers so."""

    def __init__(self, settings: Settings, loop: EventLoop, clock: Clock) -> None:
        self._settings = settings
        self._loop = loop
        self._clock = clock
        self._lock = threading.Lock()
        self._connection: Any = None
        self._reason = "the connection is being made"  # why there is none
        self._registered: list[int] = []  # what events are sent for, on this connection
        self._calls = CallConnections(settings.uri)
        self._running = 0  # calls, those included that nobody waits for
        self._waiting: set[BoundedCall] = set()  # calls that somebody waits for
        self._closed = threading.Event()
        self._lost = threading.Event()
        self._tried = threading.Event()
        self._greeters: list[Callable[[], None]] = []
        # libvirt takes one callback for each kind of event: (callback, whether it is urgent), ...
        self._handlers: dict[int, list[tuple[Callable[..., None], bool]]] = {}
        self._happened: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()

    @property
    def enabled(self) -> bool:
        return bool(self._settings.uri)

    @property
    def connected(self) -> bool:
        return self._connection is not None

    # -- wiring, before start ----------------------------------------------------------------

    def when_connected(self, callback: Callable[[], None]) -> None:
        """Called whenever a connection was made, before the events that come on it."""
        self._greeters.append(callback)

    def on_event(
        self, event_id: int, callback: Callable[..., None], *, urgent: bool = False
    ) -> None:
        """`callback(domain, *facts)` for each event of the kind (libvirt.VIR_DOMAIN_EVENT_ID_...).

        Callbacks and greeters run one after the other in a thread of their own: they may call
        libvirt, and hold up nothing but each other.  An `urgent` one does not wait for these: it
        runs in the event loop, and must neither wait nor call libvirt.
        """
        self._handlers.setdefault(event_id, []).append((callback, urgent))

    # -- life --------------------------------------------------------------------------------

    def start(self) -> None:
        """Begin to connect; does not wait."""
        if not self.enabled:
            return
        self._loop.start()
        for target in (self._keep_connected, self._deliver):
            threading.Thread(target=target, name=f"libvirt {target.__name__}", daemon=True).start()

    def wait_tried(self, timeout: float = OPEN) -> None:
        """Until the first attempt to connect has ended, however."""
        if self.enabled:
            self._tried.wait(timeout)

    def stop(self) -> None:
        """Close the connection; calls are refused from now on.  The event loop goes on."""
        self._closed.set()
        self._lost.set()
        self._happened.put(None)
        self._drop("the agent stops")

    # -- calls -------------------------------------------------------------------------------

    def call(self, name: str, function: Callable[[Any], T], timeout: float | None = None) -> T:
        """`function(connection)`, at most `timeout` seconds (default: the configured ones).

        Raises LibvirtUnavailable (LibvirtLost when it may have been done), LibvirtTimeout (59), and
        libvirt.libvirtError when libvirt says that it cannot be done.
        """
        seconds = self._settings.timeout if timeout is None else timeout
        bounded = BoundedCall(lambda: self._counted(function), contextlib.nullcontext(), None)
        with self._lock:
            if self._connection is None:
                raise self._unavailable(self._reason)
            if self._running >= STUCK:
                raise self._unavailable(f"{STUCK} calls wait for its answer")
            self._running += 1
            self._waiting.add(bounded)
        try:
            result: T = bounded.run(f"libvirt {name}", seconds)
        except TimeoutError:
            raise LibvirtTimeout(call=name, seconds=seconds) from None
        except Lost as error:
            raise LibvirtLost(uri=self._settings.uri, reason=str(error)) from error
        finally:
            with self._lock:
                self._waiting.discard(bounded)
        return result

    def _counted(self, function: Callable[[Any], T]) -> T:
        try:
            return self._calls.use(function)
        finally:
            with self._lock:
                self._running -= 1

    def _unavailable(self, reason: str) -> LibvirtUnavailable:
        return LibvirtUnavailable(uri=self._settings.uri or "none here", reason=reason)

    # -- connecting --------------------------------------------------------------------------

    def _keep_connected(self) -> None:
        told = ""
        while not self._closed.is_set():
            try:
                self._connect()
            except libvirt.libvirtError as error:
                self._drop(str(error))
                if str(error) != told:  # once, not every other second
                    told = str(error)
                    log.warning("libvirt (%s) cannot be reached: %s", self._settings.uri, told)
            else:
                told = ""
                self._tried.set()
                self._lost.wait()
                self._drop("the connection was lost")
            self._tried.set()
            self._clock.wait(self._closed, self._settings.retry)

    def _connect(self) -> None:
        """May hang as long as the daemon does.  Raises libvirtError."""
        connection = libvirt.open(self._settings.uri)
        lost = self._lost = threading.Event()
        try:
            self._prepare(connection, lost)
        except libvirt.libvirtError:
            _close(connection, ())
            raise
        with self._lock:
            if self._closed.is_set():
                return
            self._connection = connection
        log.info("Connected to libvirt (%s)", self._settings.uri)
        for greeter in self._greeters:
            self._happened.put(greeter)

    def _prepare(self, connection: Any, lost: threading.Event) -> None:
        def ended(_connection: Any, reason: int, _opaque: Any) -> None:
            """From the event loop: the daemon went away, or gives no sign of life."""
            log.warning("The connection to libvirt ended (reason %s)", reason)
            lost.set()

        connection.registerCloseCallback(ended, None)
        self._registered = [
            connection.domainEventRegisterAny(None, event_id, self._take_event, handlers)
            for event_id, handlers in self._handlers.items()
        ]
        # Last: from now on no call is made on it.
        with contextlib.suppress(libvirt.libvirtError):  # a driver in this process has none
            connection.setKeepAlive(
                self._settings.keepalive_interval, self._settings.keepalive_count
            )

    def _drop(self, reason: str) -> None:
        with self._lock:
            connection, self._connection, self._reason = self._connection, None, reason
            waiting, registered = list(self._waiting), self._registered
        if connection is None:
            return
        for call in waiting:
            call.give_up(Lost(reason))

        def end() -> None:
            _close(connection, registered)
            self._calls.renew()

        with contextlib.suppress(TimeoutError):
            BoundedCall(end, contextlib.nullcontext(), None).run("libvirt close", CLOSE)

    # -- events ------------------------------------------------------------------------------

    def _take_event(self, _connection: Any, domain: Any, *facts: Any) -> None:
        """From the event loop, which must not wait: handed over at once, unless it is urgent."""
        *facts_only, handlers = facts
        for callback, urgent in handlers:
            work = functools.partial(callback, domain, *facts_only)
            if not urgent:
                self._happened.put(work)
                continue
            try:
                work()
            except Exception:
                log.exception("An event of libvirt could not be dealt with")

    def _deliver(self) -> None:
        while (work := self._happened.get()) is not None:
            try:
                work()
            except Exception:
                log.exception("An event of libvirt could not be dealt with")


def _close(connection: Any, registered: Iterable[int]) -> None:
    """What is registered on it would keep it."""
    for callback in registered:
        with contextlib.suppress(libvirt.libvirtError):
            connection.domainEventDeregisterAny(callback)
    with contextlib.suppress(libvirt.libvirtError):
        connection.unregisterCloseCallback()
    close(connection)
