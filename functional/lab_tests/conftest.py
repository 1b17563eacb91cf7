# SPDX-License-Identifier: GPL-2.0-or-later
"""Tests that need more than files: device-mapper, iSCSI, multipath.

Where this kernel has device-mapper they run here; else each file runs in a guest of the laboratory
(functional/lab) and every test is reported here.  Their marks say what they need beside
device-mapper.  Storage is made of loop devices, so that both ways are the same.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from functional.lab.delegate import Delegate, hand_over
from functional.lab.guest import IN_GUEST, why_not
from functional.lab.inner import services
from functional.lab.inner.dm import Layer, Loops
from functional.lab.inner.lio import MODULES, Target

HERE = Path(__file__).parent
DELEGATE = pytest.StashKey[Delegate]()
NEEDS = {
    "iscsi": (("iscsi_tcp", *MODULES), ("iscsid", "iscsiadm")),
    "multipath": (("dm_multipath",), ("multipathd",)),
    "scsi": (("scsi_debug",), ()),
    "vms": ((), ("libvirtd", "qemu-system-x86_64")),
}


# -- where they run


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """First what takes longest, so that no process has a long file left when the others are done;
    then the files with the most tests, which xdist would do too."""
    counts = Counter(item.path for item in items)
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(
        key=lambda item: (not _needs_guests(item), item.path not in slow, -counts[item.path])
    )
    mine = [item for item in items if item.path.is_relative_to(HERE)]
    if not mine:
        return
    if os.environ.get(IN_GUEST) or _device_mapper():
        for item in mine:
            if reason := _missing(item):
                item.add_marker(pytest.mark.skip(reason=reason))
    elif reason := why_not():
        for item in mine:
            item.add_marker(pytest.mark.skip(reason=f"no device-mapper here, and {reason}"))
    else:
        config.stash[DELEGATE] = Delegate(config)
        for item in mine:
            hand_over(item)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item, nextitem: pytest.Item | None) -> bool | None:
    delegate = item.config.stash.get(DELEGATE, None)
    if delegate is None or not item.path.is_relative_to(HERE):
        return None
    last = nextitem is None or nextitem.path != item.path
    keep = nextitem is not None and nextitem.path.is_relative_to(HERE)
    delegate.protocol(item, keep, last)
    return True


def pytest_sessionfinish(session: pytest.Session) -> None:
    if (delegate := session.config.stash.get(DELEGATE, None)) is not None:
        delegate.close()


def _needs_guests(item: pytest.Item) -> bool:
    return item.path.is_relative_to(HERE) or item.path.name.startswith(("test_cluster", "test_lab"))


def _device_mapper() -> bool:
    if os.geteuid() != 0 or not shutil.which("dmsetup"):
        return False
    done = subprocess.run(("dmsetup", "version"), capture_output=True, timeout=30, check=False)
    return done.returncode == 0


def _missing(item: pytest.Item) -> str:
    for mark, (modules, programs) in NEEDS.items():
        if item.get_closest_marker(mark) is None:
            continue
        for program in programs:
            if not shutil.which(program):
                return f"{program} is not installed"
        for module in modules:
            done = subprocess.run(
                ("modprobe", "--dry-run", module), capture_output=True, timeout=30, check=False
            )
            if done.returncode:
                return f"this kernel has no module {module}"
    return ""


# -- storage


@pytest.fixture(scope="module")
def loops(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Loops]:
    """loops.make(size, sector=512): blank devices, gone after the last test of the file."""
    made = Loops(tmp_path_factory.mktemp("loops"))
    yield made
    made.remove_all()


@pytest.fixture
def layer(loops: Loops) -> Iterator[Callable[..., Layer]]:
    """layer(device): a device on it that can be slowed, failed and hung."""
    made: list[Layer] = []

    def make(device: str) -> Layer:
        made.append(Layer(device))
        return made[-1]

    yield make
    for one in reversed(made):
        one.remove()


@pytest.fixture
def target(loops: Loops) -> Iterator[Callable[..., Target]]:
    """target(portals=(…), chap=(user, password)): an iSCSI target of this host."""
    made: list[Target] = []

    def make(**settings: object) -> Target:
        made.append(Target(**settings))  # type: ignore[arg-type]
        return made[-1]

    yield make
    for one in reversed(made):
        one.remove()


@pytest.fixture(scope="module")
def iscsid() -> Iterator[None]:
    with services.iscsid():
        yield


@pytest.fixture(scope="module")
def multipathd(iscsid: None) -> Iterator[None]:
    with services.multipathd():
        yield


@pytest.fixture(scope="module", autouse=True)
def _nothing_left() -> Iterator[None]:
    """A file leaves no device of ours behind: the next one runs on the same kernel."""
    before = _devices()
    yield
    assert _devices() - before == set()


def _devices() -> set[str]:
    """Device-mapper devices by name, loop devices with a file, SCSI disks."""
    block = Path("/sys/block")
    found = {path.read_text().strip() for path in block.glob("dm-*/dm/name")}
    found |= {path.parts[3] for path in block.glob("loop*/loop/backing_file")}
    return found | {path.name for path in block.glob("sd*")}
