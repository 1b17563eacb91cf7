# SPDX-License-Identifier: GPL-2.0-or-later
"""How lvm's commands are run."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

import pytest

from tests.lvm.conftest import LoopDevices
from vdsm_storage.base.cancel import Cancel
from vdsm_storage.errors import ActionStopped, CommandTimeout, LvmCommandError, ResourceExhausted
from vdsm_storage.lvm.command import Lvm, Watch, own_words

# An lvm that shows how it was called, and sleeps when it is told to.
FAKE = """\
#!/bin/sh
echo "$@"
echo "dir=$LVM_SYSTEM_DIR lang=$LC_ALL quiet=$LVM_SUPPRESS_FD_WARNINGS"
case "$1" in sleep) exec sleep 30;; esac
"""


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Lvm:
    (tmp_path / "lvm").write_text(FAKE)
    (tmp_path / "lvm").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    return Lvm(str(tmp_path / "system"), 10.0, 1)


def test_devices_and_directory_are_named(fake: Lvm) -> None:
    argv = ["lvchange", "--addtag", "T", "vg1/a"]
    out = fake.run(argv, ["/dev/a", "/dev/b"]).stdout.decode().splitlines()
    assert out == [
        "lvchange --devices /dev/a,/dev/b --driverloaded n --addtag T vg1/a",
        f"dir={fake.directory} lang=C quiet=1",
    ]
    out = fake.run(argv, ["/dev/a"], driver=True).stdout.decode().splitlines()
    assert out[0] == "lvchange --devices /dev/a --addtag T vg1/a"


def test_time_out_cancel_and_turn(fake: Lvm) -> None:
    with pytest.raises(CommandTimeout, match="lvm sleep of volume group vg1"):
        fake.run(["sleep"], [], vg="vg1", timeout=0.2)
    cancel = Cancel()
    threading.Timer(0.2, cancel.request).start()
    begun = time.monotonic()
    with pytest.raises(ActionStopped):
        fake.run(["sleep"], [], watch=Watch(cancel, print))
    assert time.monotonic() - begun < 5
    cancel = Cancel()

    def hold() -> None:
        with pytest.raises(ActionStopped):
            fake.run(["sleep"], [], watch=Watch(cancel, print))

    holder = threading.Thread(target=hold)
    holder.start()
    time.sleep(0.2)
    with pytest.raises(ResourceExhausted, match="1 waiting"):
        fake.run(["lvs"], [], timeout=0.1)
    assert fake.run(["pvmove"], [], timeout=100.0).stdout  # work of hours takes no turn
    cancel.request()
    holder.join()
    assert fake.run(["lvs"], []).stdout


def test_lvms_own_words(tmp_path: Path, loops: LoopDevices) -> None:
    lvm = Lvm(str(tmp_path / "system"), 10.0, 1)
    with pytest.raises(LvmCommandError) as caught:
        lvm.run(["lvremove", "nothing/there"], loops(1), vg="nothing")
    assert str(caught.value) == (
        'lvm lvremove of volume group nothing failed: Volume group "nothing" not found; '
        "Cannot process volume group nothing"
    )
    assert caught.value.code == 621
    with pytest.raises(LvmCommandError, match="no-such-command"):
        lvm.run(["no-such-command"], [])
    assert lvm.version() >= (2, 3, 0)


def test_warnings_of_every_command_are_left_out() -> None:
    noise = """\
File descriptor 10 (/dev/null) leaked on lvm invocation. Parent PID 7692: bash
  /dev/mapper/control: open failed: No such device
  Failure to communicate with kernel device-mapper driver.
  Check that device-mapper is available in the kernel.
  Incompatible libdevmapper 1.02.185 (2022-05-18) and kernel driver (unknown version).
  WARNING: Activation disabled. No device-mapper interaction will be attempted.
  WARNING: Logical volume myvg/lva not zeroed.
  Insufficient free space: 7999 extents needed, but only 151 available
  WARNING: PV /dev/a in VG vg1 is missing.
  WARNING: This metadata update is NOT backed up.
"""
    assert own_words(noise) == (
        "Insufficient free space: 7999 extents needed, but only 151 available; "
        "WARNING: PV /dev/a in VG vg1 is missing."
    )


def test_the_directory_is_private_and_the_configuration_our_own(tmp_path: Path) -> None:
    directory = tmp_path / 'a "b" \\c'
    lvm = Lvm(str(directory), 10.0, 1)
    assert (directory / "locks").stat().st_mode & 0o777 == 0o700
    (directory / "lvm.conf").write_text("devices { filter = [ ")
    assert not [name for name in os.listdir(directory) if name not in ("lvm.conf", "locks")]
    lvm = Lvm(str(directory), 10.0, 1)
    shown = lvm.run(["lvmconfig", "--type", "current"], []).stdout.decode()
    assert "use_lvmpolld=0" in shown
    assert 'hints="none"' in shown
    shown = lvm.run(["lvmconfig", "global/locking_dir"], []).stdout.decode().strip()
    assert (
        shown.partition("=")[2]
        == '"' + str(directory / "locks").replace("\\", "\\\\").replace('"', '\\"') + '"'
    )


def test_the_fence_is_asked_when_the_turn_has_come(fake: Lvm) -> None:
    """A command may wait for long behind others; what was true before says nothing then."""
    asked: list[float] = []
    holder = threading.Thread(target=lambda: _hold(fake))
    holder.start()
    time.sleep(0.3)
    begun = time.monotonic()
    fake.run(["lvs"], [], fence=lambda: asked.append(time.monotonic()))
    assert asked[0] - begun > 0.3
    holder.join()

    def lost() -> None:
        raise ActionStopped

    with pytest.raises(ActionStopped):
        fake.run(["lvs"], [], fence=lost)
    assert fake.run(["lvs"], []).stdout


def _hold(fake: Lvm) -> None:
    with pytest.raises(CommandTimeout):
        fake.run(["sleep"], [], timeout=1.0)
