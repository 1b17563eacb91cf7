# SPDX-License-Identifier: GPL-2.0-or-later
"""Secrets at rest: nothing in the clear, nothing half written, nothing that stops the agent."""

from __future__ import annotations

import base64
import json
import os
import signal
import stat
import subprocess
import sys
import time
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.secrets.conftest import entry
from vdsm_storage.base import files
from vdsm_storage.base.secret import Secret
from vdsm_storage.secrets.aead import AesGcm
from vdsm_storage.secrets.key import CREDENTIAL, KeySource, KeyUnusableError
from vdsm_storage.secrets.model import Entry
from vdsm_storage.secrets.sealing import Cipher, DoesNotOpenError, SealProcess
from vdsm_storage.secrets.store import MAGIC, Forgetful, Store, StoreError

VALUE = b"a value of thirty-two characters"
OLD = [entry(str(uuid.uuid4()), f"ovirt/old/{n}", base64.b64encode(VALUE).decode()) for n in (1, 2)]
NEW = [entry(str(uuid.uuid4()), "ovirt/new", "bmV3IHZhbHVl", "volume"), OLD[0]]


class Place:
    def __init__(self, directory: Path) -> None:
        self.path = directory / "state" / "secrets"
        self.key = directory / "run" / "secrets.key"
        self.credentials = directory / "credentials"
        self.cipher: Cipher = AesGcm()

    def store(self, boot: str = "boot-1", credentials: bool = False) -> Store:
        given = str(self.credentials) if credentials else None
        return Store(str(self.path), KeySource(str(self.key), given), self.cipher, boot)

    def credential(self, raw: bytes) -> None:
        self.credentials.mkdir(exist_ok=True)
        (self.credentials / CREDENTIAL).write_bytes(raw)


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


def test_kept_and_private(place: Place) -> None:
    store = place.store()
    assert store.load() == []
    assert not place.key.exists()  # a host that has no secrets has no key
    store.save(OLD)
    assert place.store().load() == OLD
    for path in (place.path, place.key):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    store.save(NEW)
    assert place.store().load() == NEW
    store.save([])
    assert list(place.path.parent.iterdir()) == []


def test_nothing_in_the_clear(place: Place) -> None:
    place.store().save(OLD)
    data = place.path.read_bytes() + place.key.read_bytes()
    for one in OLD:
        for text in (one.value(), one.password.reveal().encode(), one.uuid.encode(), b"ovirt"):
            assert text not in data
    first = place.path.read_bytes()
    place.store().save(OLD)
    assert place.path.read_bytes() != first  # never the same nonce


def test_another_boot(place: Place, caplog: pytest.LogCaptureFixture) -> None:
    place.store().save(OLD)
    place.key.unlink()  # as a reboot does
    caplog.set_level("INFO")
    assert place.store("boot-2").load() == []
    assert not place.path.exists()
    assert [record.levelname for record in caplog.records] == ["INFO"]


# -- damage ------------------------------------------------------------------------------------


@settings(
    max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_a_damaged_file_is_a_warning(
    place: Place, caplog: pytest.LogCaptureFixture, data: st.DataObject
) -> None:
    place.store().save(OLD)
    good = place.path.read_bytes()
    at = data.draw(st.integers(0, len(good) - 1))
    how = data.draw(st.sampled_from(["flip", "cut", "insert", "replace"]))
    if how == "flip":
        bad = good[:at] + bytes([good[at] ^ data.draw(st.integers(1, 255))]) + good[at + 1 :]
    elif how == "cut":
        bad = good[:at]
    elif how == "insert":
        bad = good[:at] + data.draw(st.binary(min_size=1, max_size=20)) + good[at:]
    else:
        bad = data.draw(st.binary(max_size=200))
    if bad == good:
        return
    place.path.write_bytes(bad)
    caplog.clear()
    caplog.set_level("INFO")
    assert place.store().load() == []
    other_boot = "Secrets of an earlier boot are dropped" in caplog.text
    assert other_boot or "must be registered again" in caplog.text
    assert OLD[0].password.reveal() not in caplog.text
    place.store().save(NEW)
    assert place.store().load() == NEW


@pytest.mark.parametrize(
    "header", [b"[" * 100_000, b"[]", b"{}", b'{"boot": "boot-1"}', b"5", b"\xff", b'"boot-1"']
)
def test_a_strange_header(place: Place, header: bytes, caplog: pytest.LogCaptureFixture) -> None:
    place.path.parent.mkdir()
    place.path.write_bytes(MAGIC + header + b"\n" + b"x" * 100)
    assert place.store().load() == []
    assert "is damaged" in caplog.text


def test_the_boot_cannot_be_changed(place: Place, caplog: pytest.LogCaptureFixture) -> None:
    """The header is readable, and authenticated."""
    place.store("boot-1").save(OLD)
    place.path.write_bytes(place.path.read_bytes().replace(b"boot-1", b"boot-2"))
    assert place.store("boot-2").load() == []
    assert "is damaged" in caplog.text


def test_another_key(place: Place, caplog: pytest.LogCaptureFixture) -> None:
    place.store().save(OLD)
    place.key.write_bytes(os.urandom(32))
    assert place.store().load() == []
    assert "was encrypted with another key: the secrets in it must be" in caplog.text
    assert place.path.exists()  # the right key may come back


def test_no_file_at_all(place: Place, caplog: pytest.LogCaptureFixture) -> None:
    for make in (Path.mkdir, lambda path: path.symlink_to("/etc/passwd")):
        place.path.parent.mkdir(exist_ok=True)
        make(place.path)
        caplog.clear()
        assert place.store().load() == []
        assert "must be registered again" in caplog.text
        if place.path.is_symlink():
            place.path.unlink()
        else:
            place.path.rmdir()


def test_what_cannot_be_kept(place: Place) -> None:
    place.store().save(OLD)
    place.path.with_name("secrets.new").mkdir()
    with pytest.raises(StoreError, match=r"state/secrets: Is a directory"):
        place.store().save(NEW)
    assert place.store().load() == []  # .new is in the way of reading too, and said so


# -- the key -----------------------------------------------------------------------------------


def test_a_credential_comes_first(place: Place) -> None:
    place.credential(b"k" * 32)
    place.store(credentials=True).save(OLD)
    assert not place.key.exists()
    assert place.store(credentials=True).load() == OLD
    assert place.store().load() == []


def test_no_such_credential(place: Place) -> None:
    place.credentials.mkdir()
    place.store(credentials=True).save(OLD)
    assert place.key.exists()


def test_a_short_credential_is_refused(place: Place, caplog: pytest.LogCaptureFixture) -> None:
    """Rather than used, or passed over without a word."""
    place.store().save(OLD)
    place.credential(b"short secret")
    assert place.store(credentials=True).load() == []
    with pytest.raises(StoreError, match="fewer than 32 bytes") as caught:
        place.store(credentials=True).save(NEW)
    assert "short secret" not in str(caught.value) + caplog.text
    assert place.store().load() == OLD


@pytest.mark.parametrize("how", ["group", "owner", "link", "short", "pipe"])
def test_a_key_that_others_may_know(
    place: Place, how: str, caplog: pytest.LogCaptureFixture
) -> None:
    place.store().save(OLD)
    if how == "group":
        place.key.chmod(0o640)
    elif how == "owner":
        os.chown(place.key, 65534, 65534)
    elif how == "short":
        place.key.write_bytes(b"x")
    else:
        place.key.unlink()
        if how == "pipe":
            os.mkfifo(place.key)
        else:
            other = place.key.with_name("elsewhere")
            other.write_bytes(b"x" * 32)
            place.key.symlink_to(other)
    assert place.store().load() == []
    assert "it is replaced by a new key" in caplog.text
    found = place.key.lstat()
    assert (found.st_uid, found.st_mode) == (os.geteuid(), stat.S_IFREG | 0o600)
    place.store().save(NEW)
    assert place.store().load() == NEW


def test_no_place_for_a_key(place: Place) -> None:
    place.key.parent.write_bytes(b"")
    with pytest.raises(KeyUnusableError):
        KeySource(str(place.key), None).get()
    with pytest.raises(StoreError, match="there is no key to keep them with"):
        place.store().save(OLD)


# -- the process that encrypts -------------------------------------------------------------------


def test_by_the_process(place: Place, caplog: pytest.LogCaptureFixture) -> None:
    """What the agent uses, and what the other tests use, are the same."""
    place.store().save(OLD)
    place.cipher = SealProcess()
    assert place.store().load() == OLD
    place.store().save(NEW)
    place.cipher = AesGcm()
    assert place.store().load() == NEW
    place.path.write_bytes(place.path.read_bytes()[:-1])
    place.cipher = SealProcess()
    assert place.store().load() == []
    assert "is damaged" in caplog.text


def test_large_and_binary() -> None:
    key, head, data = os.urandom(32), b"head\n\0", os.urandom(3_000_000)
    sealed = SealProcess().seal(key, head, data)
    assert AesGcm().open(key, head, sealed) == data
    assert SealProcess().open(key, head, sealed) == data
    for other in ((os.urandom(32), head, sealed), (key, b"", sealed), (key, head, b"")):
        with pytest.raises(DoesNotOpenError):
            SealProcess().open(*other)


def test_the_process_cannot_run(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    place.cipher = SealProcess()
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    with pytest.raises(StoreError, match="they cannot be encrypted"):
        place.store().save(OLD)
    assert not place.path.exists()


# -- switched off ------------------------------------------------------------------------------


def test_switched_off_removes_what_is_there(place: Place) -> None:
    place.store().save(OLD)
    off = Forgetful(str(place.path))
    assert off.load() == []
    off.save(OLD)
    assert list(place.path.parent.iterdir()) == []


# -- death -------------------------------------------------------------------------------------


class DiedError(BaseException):
    """Nothing that is not a root catches it."""


class DyingOs:
    """The module os, which a process that dies at its call number `left` can use no longer."""

    def __init__(self, left: int) -> None:
        self._left = left

    def __getattr__(self, name: str) -> Any:
        found = getattr(os, name)
        if not callable(found):
            return found

        def call(*args: Any, **kwargs: Any) -> Any:
            self._left -= 1
            if self._left < 0:
                raise DiedError
            if name == "write":  # some of the bytes
                return found(args[0], bytes(args[1])[: max(1, len(args[1]) // 3)])
            return found(*args, **kwargs)

        return call


@pytest.mark.parametrize("after", [NEW, []], ids=["new", "none"])
def test_death_at_every_call(
    place: Place, monkeypatch: pytest.MonkeyPatch, after: Sequence[Entry]
) -> None:
    """Before: the old secrets; from the rename on: the new ones; never anything else."""
    seen = []
    for calls in range(100):
        place.store().save(OLD)
        with monkeypatch.context() as patch:
            patch.setattr(files, "os", DyingOs(calls))
            try:
                place.store().save(after)
            except DiedError:
                died = True
            else:
                died = False
        seen.append(place.store().load())
        assert seen[-1] in (OLD, after)
        assert [p.name for p in place.path.parent.iterdir()] in (["secrets"], [])
        if not died:
            break
    assert seen[0] == OLD
    assert seen[-1] == after
    assert seen == sorted(seen, key=lambda found: found == after)


CHILD = """
import json, sys
from tests.secrets.test_store import Place, entry
from pathlib import Path
store = Place(Path(sys.argv[1])).store()
for number in range(10**9):
    store.save([entry("0", "ovirt/x", "%08d" % number) for _ in range(200)])
    if number == 0:
        print("ready", flush=True)
"""


@pytest.mark.slow
def test_kill_9_at_any_time(place: Place, caplog: pytest.LogCaptureFixture) -> None:
    root = Path(__file__).parents[2]
    for turn in range(12):
        child = subprocess.Popen(
            [sys.executable, "-P", "-c", CHILD, str(place.path.parents[1])],
            env={**os.environ, "PYTHONPATH": str(root)}, stdout=subprocess.PIPE,
        )  # fmt: skip
        assert child.stdout is not None
        assert child.stdout.readline() == b"ready\n"
        time.sleep(0.01 + turn * 0.0137)
        child.send_signal(signal.SIGKILL)
        child.wait(10)
        child.stdout.close()
        found = place.store().load()
        assert len(found) == 200
        assert len({one.password for one in found}) == 1
    assert caplog.text == ""


def test_a_secret_is_no_json() -> None:
    """What turns an entry into text must ask for the value."""
    with pytest.raises(TypeError):
        json.dumps(OLD[0].password)
    assert "YSB2YWx1" not in repr(OLD)
    assert str(Secret("x")) == "***"
