# SPDX-License-Identifier: GPL-2.0-or-later
"""The registry on a real libvirt: all or nothing, whatever fails and whenever the agent dies."""

from __future__ import annotations

import base64
import itertools
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import libvirt
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from functional.guests.libvirtd import Libvirtd
from tests.secrets.conftest import Direct, ReadableKeyring
from vdsm_storage.base import files
from vdsm_storage.base.clock import SystemClock
from vdsm_storage.base.locks import Locks
from vdsm_storage.base.secret import Secret
from vdsm_storage.errors import SecretRegistrationFailed, SecretUnregistrationFailed
from vdsm_storage.secrets.aead import AesGcm
from vdsm_storage.secrets.key import KeySource
from vdsm_storage.secrets.keyring import Keyring, KeyringError, UnansweredError
from vdsm_storage.secrets.libvirt_keyring import LibvirtKeyring
from vdsm_storage.secrets.model import Entry
from vdsm_storage.secrets.registry import Registry
from vdsm_storage.secrets.request import parse, parse_of_vm
from vdsm_storage.secrets.store import Forgetful, Store

IDS = [str(uuid.UUID(int=number)) for number in range(1, 6)]
FOREIGN = str(uuid.UUID(int=99))
Values = Mapping[str, tuple[str, bytes | None]]


def sent(number: int, usage: str, value: str, kind: str = "ceph") -> dict[str, Any]:
    return {
        "uuid": IDS[number], "usageType": kind, "usageID": f"ovirt/{usage}", "description": "",
        "password": Secret(base64.b64encode(value.encode()).decode()),
    }  # fmt: skip


def foreign(keyring: ReadableKeyring, usage: str = "ceph-admin", private: str = "no") -> None:
    """A secret that somebody else defined."""
    xml = (
        f"<secret ephemeral='no' private='{private}'><uuid>{FOREIGN}</uuid>"
        f"<usage type='ceph'><name>{usage}</name></usage></secret>"
    )
    keyring.connection.secretDefineXML(xml).setValue(b"theirs")


class World:
    def __init__(self, keyring: ReadableKeyring, directory: Path) -> None:
        self.keyring = keyring
        self.file = directory / "state" / "secrets"
        self._key = directory / "key"
        self.dies_at: Callable[[str], None] = lambda _point: None

    def registry(self, keyring: Keyring | None = None, keep: bool = True) -> Registry:
        """As a start of the agent makes it."""
        store = Store(str(self.file), KeySource(str(self._key), None), AesGcm(), "boot")
        kept = store if keep else Forgetful(str(self.file))
        locks = Locks(SystemClock())
        return Registry(keyring or self.keyring, kept, locks, lambda at: self.dies_at(at))

    def values(self) -> Values:
        return self.keyring.values()


@pytest.fixture
def world(keyring: ReadableKeyring, tmp_path: Path) -> World:
    return World(keyring, tmp_path)


# -- the verbs ---------------------------------------------------------------------------------


def test_what_libvirt_is_given(world: World, libvirtd: Libvirtd) -> None:
    """By the real keyring: in memory only, and for nobody's eyes."""
    direct = Direct(libvirtd.uri)
    registry = world.registry(LibvirtKeyring(direct))
    kinds = ("ceph", "volume", "iscsi")
    registry.register([sent(n, "x", "v", kind) for n, kind in enumerate(kinds)], False)
    secrets = {one.UUIDString(): one for one in direct.connection.listAllSecrets()}
    assert sorted(secrets) == IDS[:3]
    for one in secrets.values():
        assert "ephemeral='yes' private='yes'" in one.XMLDesc()
        with pytest.raises(libvirt.libvirtError, match="secret is private"):
            one.value()
    assert [secrets[one].usageType() for one in IDS[:3]] == [
        libvirt.VIR_SECRET_USAGE_TYPE_CEPH, libvirt.VIR_SECRET_USAGE_TYPE_VOLUME,
        libvirt.VIR_SECRET_USAGE_TYPE_ISCSI,
    ]  # fmt: skip
    assert not list((libvirtd.directory / "etc" / "secrets").glob("*"))
    direct.connection.close()


def test_register_again_and_change(world: World) -> None:
    registry = world.registry()
    registry.register([sent(0, "a", "1"), sent(1, "b", "2")], False)
    registry.register([sent(0, "a", "1")], False)
    assert world.values() == {IDS[0]: ("ovirt/a", b"1"), IDS[1]: ("ovirt/b", b"2")}
    registry.register([sent(0, "a", "new"), sent(1, "c", "2")], False)
    assert world.values() == {IDS[0]: ("ovirt/a", b"new"), IDS[1]: ("ovirt/c", b"2")}
    registry.register([sent(0, "c", "1"), sent(1, "a", "2")], False)  # they change places
    assert world.values() == {IDS[0]: ("ovirt/c", b"1"), IDS[1]: ("ovirt/a", b"2")}
    registry.register([sent(0, "c", "1", "iscsi")], False)  # another type is another use
    assert world.values()[IDS[0]] == ("ovirt/c", b"1")


def test_clear(world: World) -> None:
    foreign(world.keyring)
    registry = world.registry()
    registry.register([sent(0, "a", "1"), sent(1, "b", "2")], False)
    registry.register([sent(2, "b", "3")], True)  # also takes over the usage of one that goes
    assert world.values() == {IDS[2]: ("ovirt/b", b"3"), FOREIGN: ("ceph-admin", b"theirs")}
    registry.register([], True)
    assert world.values() == {FOREIGN: ("ceph-admin", b"theirs")}
    assert not world.file.exists()


def test_unregister(world: World) -> None:
    foreign(world.keyring)
    registry = world.registry()
    registry.register([sent(0, "a", "1"), sent(1, "b", "2")], False)
    registry.unregister([IDS[0], IDS[3], FOREIGN])
    assert world.values() == {IDS[1]: ("ovirt/b", b"2"), FOREIGN: ("ceph-admin", b"theirs")}
    registry.unregister([])
    registry.unregister(IDS)
    assert set(world.values()) == {FOREIGN}


def test_others_secrets_are_not_touched(world: World) -> None:
    """Neither by their UUID, nor because their usage looks like ours."""
    foreign(world.keyring, "not-ovirt/a")
    registry = world.registry()
    assert registry.settle()
    with pytest.raises(SecretRegistrationFailed, match="not this agent's") as caught:
        registry.register([sent(0, "a", "1"), {**sent(1, "b", "2"), "uuid": FOREIGN}], True)
    assert caught.value.code == 73
    registry.close()
    assert world.values() == {FOREIGN: ("not-ovirt/a", b"theirs")}


def test_a_usage_has_one_owner(world: World) -> None:
    registry = world.registry()
    registry.register([sent(0, "a", "1")], False)
    with pytest.raises(SecretRegistrationFailed, match=f"that of secret {IDS[0]}"):
        registry.register([sent(2, "c", "3"), sent(1, "a", "2")], False)
    assert world.values() == {IDS[0]: ("ovirt/a", b"1")}


# -- failures ----------------------------------------------------------------------------------


class DiedError(BaseException):
    """As kill -9: nothing is done after it."""


class Failing:
    """A keyring whose change number `at` fails, before or after it was made; or the agent dies.

    With `gone`, all that follows fails as well: the connection is lost.
    """

    def __init__(
        self, keyring: Keyring, at: int, made: bool, gone: bool, error: type[BaseException]
    ) -> None:
        self._keyring = keyring
        self._left = at
        self._made = made
        self._gone = gone
        self._error = error

    def all(self) -> Any:
        return self._keyring.all()

    def backup(self, uuid: str) -> Any:
        return self._keyring.backup(uuid)

    def __getattr__(self, name: str) -> Callable[[Any], None]:
        change = getattr(self._keyring, name)

        def call(what: Any) -> None:
            self._left -= 1
            if self._left == -1 and self._made:
                change(what)
            if self._left == -1 or (self._left < -1 and self._gone):
                raise self._error("libvirt fails")
            change(what)

        return call


USAGES = st.sampled_from(["a", "b", "c", "d"])
KINDS = st.sampled_from(["ceph", "volume"])
CONTENT = st.fixed_dictionaries(
    {"usage": USAGES, "value": st.sampled_from("1234567"), "kind": KINDS}
)


@st.composite
def batches(draw: st.DrawFn) -> list[dict[str, Any]]:
    chosen = draw(st.dictionaries(st.integers(0, 3), CONTENT, max_size=4))
    found, seen = [], set()
    for number, content in chosen.items():
        if (content["usage"], content["kind"]) not in seen:
            seen.add((content["usage"], content["kind"]))
            found.append(sent(number, **content))
    return found


FAILURES = st.fixed_dictionaries(
    {"at": st.integers(0, 9), "made": st.booleans(), "gone": st.booleans(),
     "error": st.sampled_from([KeyringError, UnansweredError, DiedError])}
)  # fmt: skip


def expected(batch: list[dict[str, Any]]) -> dict[str, tuple[str, bytes]]:
    return {
        one["uuid"]: (one["usageID"], base64.b64decode(one["password"].reveal())) for one in batch
    }


@settings(
    max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    before=batches(), after=batches(), clear=st.booleans(), gone=st.sets(st.sampled_from(IDS)),
    failure=FAILURES, remove=st.booleans(), keep=st.booleans(),
)  # fmt: skip
def test_all_or_nothing(
    world: World, before: Any, after: Any, clear: bool, gone: set[str], failure: Any,
    remove: bool, keep: bool,
) -> None:  # fmt: skip
    """One failure anywhere: as it was, or (it came too late) as it was asked for."""
    world.keyring.wipe()
    world.file.unlink(missing_ok=True)
    foreign(world.keyring)
    theirs = world.values()
    world.registry().register(before, False)  # with its file, where libvirt's part begins
    old = {**theirs, **expected(before)}
    if remove:
        new: Any = {key: value for key, value in old.items() if key not in gone}
    else:
        new = {**(theirs if clear else old), **expected(after)}
    registry = world.registry()
    registry.settle()
    registry._keyring = Failing(world.keyring, **failure)  # type: ignore[assignment]
    failed = None
    try:
        if remove:
            registry.unregister(gone)
        else:
            registry.register(after, clear)
    except (SecretRegistrationFailed, SecretUnregistrationFailed, DiedError) as error:
        failed = error
    if failed is None:
        assert world.values() == new
    elif failure["error"] is KeyringError and not failure["gone"]:
        assert world.values() == old
    # What the next start, or the next connection, makes of it.
    if isinstance(failed, DiedError):
        registry = world.registry()
    else:
        registry._keyring = world.keyring  # the connection is there again
    assert registry.settle()
    assert world.values() == (old if failed is not None else new)
    if not keep:
        world.registry(keep=False).settle()
        assert world.values() == theirs


@pytest.mark.parametrize("point", ["secrets:begun", "secrets:defined", "secrets:kept"])
@pytest.mark.parametrize("remove", [False, True], ids=["register", "unregister"])
def test_death_at_each_point(world: World, point: str, remove: bool) -> None:
    world.registry().register([sent(0, "a", "1"), sent(1, "b", "2")], False)
    old = world.values()

    def die(reached: str) -> None:
        if reached == point:
            raise DiedError

    world.dies_at = die
    dying = world.registry()
    batch = [sent(0, "b", "1"), sent(2, "a", "2")]
    act = (lambda: dying.unregister(IDS[:2])) if remove else (lambda: dying.register(batch, True))
    with pytest.raises(DiedError):
        act()
    world.dies_at = lambda _point: None
    registry = world.registry()
    registry.settle()
    new: Values = {} if remove else {IDS[0]: ("ovirt/b", b"1"), IDS[2]: ("ovirt/a", b"2")}
    assert world.values() == (new if point == "secrets:kept" else old)


def test_a_file_that_cannot_be_written(world: World) -> None:
    registry = world.registry()
    registry.register([sent(0, "a", "1")], False)
    old = world.values()
    (world.file.parent / "secrets.new").mkdir()
    with pytest.raises(SecretRegistrationFailed, match=r"cannot be kept in .*: Is a directory"):
        registry.register([sent(0, "a", "2"), sent(1, "b", "3")], True)
    assert world.values() == old
    (world.file.parent / "secrets.new").rmdir()
    restarted = world.registry()
    assert restarted.settle()
    assert world.values() == old


def test_a_file_that_is_not_known_to_be_durable(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is in place already; were the agent to die then, it must not be what counts."""
    registry = world.registry()
    registry.register([sent(0, "a", "1")], False)
    old = world.values()
    sync, left = files.sync_directory, [True]

    def fail_once(path: str) -> None:
        if left.pop() if left else False:
            raise OSError(5, "Input/output error")
        sync(path)

    monkeypatch.setattr(files, "sync_directory", fail_once)
    with pytest.raises(SecretRegistrationFailed, match="Input/output error"):
        registry.register([sent(0, "a", "2"), sent(1, "b", "3")], True)
    assert world.values() == old
    assert world.registry().settle()
    assert world.values() == old


def test_a_stray_of_our_prefix_is_restored(world: World) -> None:
    """Somebody else's under ovirt/, with a value that libvirt tells."""
    registry = world.registry()
    registry.settle()
    foreign(world.keyring, "ovirt/stray")
    old = world.values()
    for at in itertools.count():
        failing = Failing(world.keyring, at, True, False, KeyringError)
        registry._keyring = failing  # type: ignore[assignment]
        try:
            registry.register([sent(0, "a", "1"), sent(1, "stray", "2")], True)
        except SecretRegistrationFailed:
            assert world.values() == old
        else:
            break
    assert at >= 3
    assert world.values() == {IDS[0]: ("ovirt/a", b"1"), IDS[1]: ("ovirt/stray", b"2")}


def test_a_stray_whose_value_nobody_knows(world: World, caplog: pytest.LogCaptureFixture) -> None:
    registry = world.registry()
    registry.settle()
    foreign(world.keyring, "ovirt/stray", private="yes")
    registry._keyring = Failing(world.keyring, 1, False, False, KeyringError)  # type: ignore[assignment]
    with pytest.raises(SecretRegistrationFailed):
        registry.register([sent(1, "stray", "2")], False)
    assert "its value is lost" in caplog.text
    assert world.values() == {FOREIGN: ("ovirt/stray", None)}


def test_libvirt_that_hangs_is_asked_once_more_only(world: World) -> None:
    """Not once for each of many secrets: every answer is waited for."""
    registry = world.registry()
    batch = [sent(n, str(n), "1") for n in range(5)]
    registry.register(batch, False)
    registry.settle()
    asked = []

    class Hanging:
        def all(self) -> Any:
            return world.keyring.all()

        def __getattr__(self, name: str) -> Callable[[Any], None]:
            def call(_what: Any) -> None:
                asked.append(name)
                if len(asked) > 3:
                    raise UnansweredError("no answer in 10 s")

            return call

    registry._keyring = Hanging()  # type: ignore[assignment]
    with pytest.raises(SecretRegistrationFailed, match="no answer"):
        registry.register(batch, False)
    assert len(asked) == 5  # the fourth, and one way back
    assert not registry.settle()
    assert len(asked) == 6
    registry.close()
    assert len(asked) == 7


# -- libvirt comes and goes --------------------------------------------------------------------


@pytest.fixture
def own_libvirtd(libvirtd: Libvirtd) -> Iterator[Libvirtd]:
    """May be killed; it runs again afterwards."""
    yield libvirtd
    libvirtd.kill_daemon()
    libvirtd.start_daemon()


def test_libvirt_forgets(tmp_path: Path, own_libvirtd: Libvirtd) -> None:
    """Killed and started again, it is given all that it lost."""
    world = World(ReadableKeyring(Direct(own_libvirtd.uri)), tmp_path)
    registry = world.registry()
    registry.register([sent(0, "a", "1"), sent(1, "b", "2")], False)
    old = world.values()
    own_libvirtd.kill_daemon()
    with pytest.raises(SecretRegistrationFailed):
        registry.register([sent(2, "c", "3")], True)
    with pytest.raises(SecretUnregistrationFailed):
        registry.unregister(IDS)
    assert not registry.settle()
    own_libvirtd.start_daemon()
    world.keyring = registry._keyring = ReadableKeyring(Direct(own_libvirtd.uri))
    assert world.values() == {}
    assert registry.settle()
    assert world.values() == old


def test_start_clears_what_an_earlier_run_left(world: World) -> None:
    foreign(world.keyring)
    for number in (0, 1):
        world.keyring.define(parse([sent(number, f"left/{number}", "x")])[0])
    assert world.registry().settle()
    assert set(world.values()) == {FOREIGN}


def test_later_looks_add_only(world: World) -> None:
    registry = world.registry()
    registry.register([sent(0, "a", "1"), sent(1, "b", "2")], False)
    registry.settle()
    foreign(world.keyring, "ovirt/stray")
    world.keyring.undefine(IDS[0])
    assert registry.settle()
    assert set(world.values()) == {IDS[0], IDS[1], FOREIGN}


def test_stop_clears_libvirt_and_the_file(world: World) -> None:
    foreign(world.keyring)
    registry = world.registry()
    registry.register([sent(0, "a", "1")], False)
    registry.close()
    assert set(world.values()) == {FOREIGN}
    assert not world.file.exists()
    assert registry.settle()
    with pytest.raises(SecretRegistrationFailed, match="the agent is stopping"):
        registry.register([sent(0, "a", "1")], False)
    assert set(world.values()) == {FOREIGN}


def test_stop_without_libvirt(world: World, caplog: pytest.LogCaptureFixture) -> None:
    world.registry().register([sent(0, "a", "1")], False)
    world.registry(Failing(world.keyring, 0, False, True, KeyringError)).close()  # type: ignore[arg-type]
    assert "may be left in libvirt until the next start" in caplog.text
    assert not world.file.exists()
    world.registry().settle()
    assert world.values() == {}


# -- secrets of VMs ----------------------------------------------------------------------------


def of_vm(number: int, value: str, kind: str = "volume") -> list[Entry]:
    return parse_of_vm([sent(number, "unused", value, kind)])


def test_secrets_of_vms_are_nobody_elses(world: World) -> None:
    registry = world.registry()
    assert registry.settle()
    registry.register([sent(1, "one", "1")], clear=False)
    registry.give(of_vm(2, "2"))
    both = {IDS[1]: ("ovirt/one", b"1"), IDS[2]: (f"ovirt/vm/{IDS[2]}", b"2")}
    assert world.values() == both
    registry.register([sent(1, "one", "1")], clear=True)
    registry.unregister([IDS[2]])
    registry.take([IDS[1]])
    assert world.values() == both
    for wrong in (of_vm(1, "1"), of_vm(2, "other"), of_vm(2, "2", "ceph")):
        with pytest.raises(SecretRegistrationFailed):
            registry.give(wrong)
    with pytest.raises(SecretRegistrationFailed):
        registry.register([sent(2, "two", "2")], clear=False)
    registry.give(of_vm(2, "2"))  # by another VM
    assert world.values() == both
    assert registry.uuids_of_vms() == {IDS[2]}
    registry.take([IDS[2]])
    assert world.values() == {IDS[1]: both[IDS[1]]}


@pytest.mark.parametrize("keep", [True, False])
def test_secrets_of_vms_outlive_agents(world: World, keep: bool) -> None:
    """A stop leaves them in libvirt, and in the file; without one nobody touches libvirt's."""
    registry = world.registry(keep=keep)
    registry.register([sent(1, "one", "1")], clear=False)
    registry.give(of_vm(2, "2"))
    registry.close()
    left = {IDS[2]: (f"ovirt/vm/{IDS[2]}", b"2")}
    assert world.values() == left
    registry = world.registry(keep=keep)
    assert registry.settle()
    assert world.values() == left
    if keep:  # libvirt is restarted
        world.keyring.wipe()
        assert registry.settle()
        assert world.values() == left
    registry.take([IDS[2]])
    assert world.values() == {}
    assert not world.file.exists()
