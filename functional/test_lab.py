# SPDX-License-Identifier: GPL-2.0-or-later
"""The laboratory's own promises: what a guest shows of this tree, and how commands run in it."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator

import pytest

from functional.lab.errors import CommandTimeoutError, GuestGoneError
from functional.lab.guest import Guest, Settings, blank_disk, guest, say, why_not
from functional.lab.image import TREE

MIB = 1024**2

pytestmark = [
    pytest.mark.skipif(bool(why_not()), reason=why_not() or "-"),
    pytest.mark.timeout(0),  # the laboratory has time limits of its own
]


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guest]:
    directory = tmp_path_factory.mktemp("disks")
    disks = [
        blank_disk(directory / "plain", 64 * MIB),
        blank_disk(directory / "large-sectors", 64 * MIB, sector=4096),
    ]
    with guest(Settings(disks=disks, env={"COLOUR": "green"}), say) as made:
        yield made


def test_command_brings_back_all_that_it_says(one: Guest) -> None:
    done = one.run("sh", "-c", "echo out; echo err >&2; exit 7")
    assert (done.rc, done.out, done.err) == (7, "out\n", "err\n")
    assert one.run("sh", "-c", "kill -9 $$").rc == -signal.SIGKILL
    assert one.run("no-such-program").rc == 127
    many = one.run("sh", "-c", "yes 0123456789abcde | head -c 4000000").check()
    assert len(many.out) == 4_000_000


def test_command_has_its_place_and_environment(one: Guest) -> None:
    shown = one.run("sh", "-c", "pwd; echo $COLOUR $SIZE; id -u", env={"SIZE": "tall"}).check()
    assert shown.out.split() == [str(TREE), "green", "tall", "0"]
    assert one.run("pwd", cwd="/etc").out == "/etc\n"


def test_command_that_takes_too_long_is_killed(one: Guest) -> None:
    with pytest.raises(CommandTimeoutError, match="so far"):
        one.run("sh", "-c", "echo so far; sleep 999", timeout=2)
    assert one.run("pgrep", "-x", "sleep").out == ""


def test_daemon_does_not_hold_up_the_command_that_starts_it(one: Guest) -> None:
    started = time.monotonic()
    one.run("sh", "-c", "sleep 600 & echo $!").check()
    assert time.monotonic() - started < 60
    one.run("pkill", "-x", "sleep").check()


def test_commands_run_side_by_side(one: Guest) -> None:
    sleeper = one.start("sleep", "600")
    assert one.run("pgrep", "-x", "sleep").check().out
    assert not sleeper.ended()
    sleeper.signal(signal.SIGTERM)
    assert sleeper.wait(60).rc == -signal.SIGTERM


def test_tree_is_there_and_cannot_be_changed_from_inside(one: Guest) -> None:
    name = f"{os.getpid()}.written-inside"
    assert one.python("import functional.lab.guest as g; print(g.TREE)").strip() == str(TREE)
    one.run("sh", "-ec", f"echo new >{name}; echo more >>README.md; rm Makefile").check()
    assert not (TREE / name).exists()
    assert (TREE / "Makefile").exists()
    assert "Makefile" not in one.run("ls").out.split()


def test_directory_is_common_to_both(one: Guest) -> None:
    (one.directory / "in").write_text("from outside")
    assert one.run("cat", f"{one.directory}/in").out == "from outside"
    one.run("sh", "-c", f"echo from inside >{one.directory}/out").check()
    assert (one.directory / "out").read_text() == "from inside\n"


def test_disks_are_as_asked_for(one: Guest) -> None:
    sizes = one.run("lsblk", "-bdno", "SIZE,LOG-SEC", "/dev/vdb", "/dev/vdc").check().out.split()
    assert sizes == [str(64 * MIB), "512", str(64 * MIB), "4096"]


def test_killed_guest_is_gone_and_comes_back(one: Guest) -> None:
    """The last test of this file: after it the guest is a fresh one."""
    one.run("touch", "/root/here").check()
    sleeper = one.start("sleep", "600")
    one.kill()
    assert not one.alive()
    with pytest.raises(GuestGoneError):
        sleeper.wait(60)
    one.boot()
    one.wait_ready()
    assert one.run("ls", "/root/here").rc != 0
