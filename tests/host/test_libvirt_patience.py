# SPDX-License-Identifier: GPL-2.0-or-later
"""How long libvirt waits for a guest agent is set whenever libvirt may not know it, and not again:
it takes as long as a thaw.  And what is read from an agent's words, beside what real agents say in
functional/test_vm_freeze.py."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import libvirt
import pytest

from vdsm_storage.errors import LibvirtTimeout
from vdsm_storage.host.libvirt import Libvirt
from vdsm_storage.host.libvirt_model import VmError, Why
from vdsm_storage.host.libvirt_vms import LibvirtVms

VM = "11111111-1111-4111-8111-111111111111"


class Domain:
    def __init__(self) -> None:
        self.number = 1
        self.given: list[int] = []
        self.says = ""

    def UUIDString(self) -> str:
        return VM

    def ID(self) -> int:
        return self.number

    def agentSetResponseTimeout(self, seconds: int, _flags: int) -> None:
        self.given.append(seconds)

    def fsFreeze(self) -> int:
        if self.says:
            raise refusal(self.says)
        return 2

    def fsThaw(self) -> int:
        return self.fsFreeze()


def refusal(text: str) -> libvirt.libvirtError:
    """The library would take the last error of this thread for it."""
    error = libvirt.libvirtError(text)
    error.args = (text,)
    error.err = (libvirt.VIR_ERR_INTERNAL_ERROR, 0, text)
    return error


class Daemon:
    """In the place of Libvirt."""

    def __init__(self, domain: Domain) -> None:
        self.domain = domain
        self.hangs = False
        self.greeters: list[Callable[[], None]] = []
        self.handlers: dict[int, Callable[..., None]] = {}

    def lookupByUUIDString(self, _vm: str) -> Domain:
        return self.domain

    def call(self, name: str, function: Callable[[Any], Any], timeout: float) -> Any:
        if self.hangs:
            raise LibvirtTimeout(call=name, seconds=timeout)
        return function(self)

    def on_event(self, event: int, callback: Callable[..., None]) -> None:
        self.handlers[event] = callback

    def when_connected(self, callback: Callable[[], None]) -> None:
        self.greeters.append(callback)


@pytest.fixture
def domain() -> Domain:
    return Domain()


@pytest.fixture
def daemon(domain: Domain) -> Daemon:
    return Daemon(domain)


@pytest.fixture
def vms(daemon: Daemon) -> LibvirtVms:
    made = LibvirtVms(cast(Libvirt, daemon))
    made.watch(lambda _event: None, lambda: None)
    return made


def test_it_is_set_once(domain: Domain, vms: LibvirtVms) -> None:
    assert (vms.freeze(VM, 8), vms.thaw(VM, 8)) == (2, 2)
    assert domain.given == [8]
    vms.freeze(VM, 2)
    assert domain.given == [8, 2]


def test_it_is_set_again(domain: Domain, daemon: Daemon, vms: LibvirtVms) -> None:
    vms.freeze(VM, 8)
    domain.number = 2  # the VM was started anew
    vms.thaw(VM, 8)
    assert len(domain.given) == 2
    for greet in daemon.greeters:  # another libvirtd
        greet()
    vms.thaw(VM, 8)
    assert len(domain.given) == 3
    daemon.hangs = True
    with pytest.raises(LibvirtTimeout):
        vms.thaw(VM, 8)
    daemon.hangs = False
    vms.thaw(VM, 8)
    assert len(domain.given) == 4
    daemon.handlers[libvirt.VIR_DOMAIN_EVENT_ID_LIFECYCLE](
        domain, libvirt.VIR_DOMAIN_EVENT_STOPPED, 0
    )
    vms.thaw(VM, 8)
    assert len(domain.given) == 5


SAID = "unable to execute QEMU agent command 'guest-fsfreeze-freeze': "


@pytest.mark.parametrize(
    ("words", "why"),
    [
        ("Command guest-fsfreeze-freeze has been disabled", Why.UNSUPPORTED),
        ("The command guest-fsfreeze-freeze has not been found", Why.UNSUPPORTED),
        ("this feature or command is not currently supported", Why.UNSUPPORTED),
        ("Command guest-fsfreeze-freeze has been disabled: the agent is in frozen state",
         Why.OTHER),
        ("failed to freeze /mnt: Input/output error", Why.OTHER),
    ],
    ids=("disabled", "not-found", "unsupported", "frozen", "failed"),
)  # fmt: skip
def test_what_an_agent_says(domain: Domain, vms: LibvirtVms, words: str, why: Why) -> None:
    domain.says = SAID + words
    with pytest.raises(VmError) as caught:
        vms.freeze(VM, 8)
    assert caught.value.why is why


def test_windows_that_thawed_by_itself(domain: Domain, vms: LibvirtVms) -> None:
    domain.says = SAID + "couldn't hold writes: fsfreeze is limited up to 10 seconds: "
    assert vms.thaw(VM, 8) == 0
