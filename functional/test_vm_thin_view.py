# SPDX-License-Identifier: GPL-2.0-or-later
"""How disks grew, asked of a real agent by its verb and by vdsm-client; the points are written by
the class that the agent writes them with, into its run directory."""

from __future__ import annotations

import subprocess
import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from functional.processes import BIN, AgentProcess
from functional.vm_lab import Machine, VmLab, vm_lab
from functional.world import new_id
from vdsm_storage.cli.plot import plot
from vdsm_storage.monitor.thin_history import KINDS, History, Point
from vdsm_storage.rpc.client import Client

MIB = 1 << 20
T0 = 1_700_000_000.0

# The laboratory's image, whose kernel the guests have, may have to be made first.
pytestmark = pytest.mark.timeout(1500)


@pytest.fixture(scope="module")
def lab(
    workdir: Path, start_agent: Callable[..., AgentProcess], make_server: Callable[[str], Any]
) -> Iterator[VmLab]:
    with vm_lab(workdir, start_agent, make_server) as one:
        yield one


@pytest.fixture(scope="module")
def history(lab: VmLab) -> History:
    return History(str(lab.agent.dir / "run" / "thin"))


@pytest.fixture(scope="module")
def vm(lab: VmLab, history: History) -> Machine:
    """Without a guest; its first disk has a history."""
    machine = lab.machine("grows", disks=2)
    for point in points():
        history.note(machine.id, "vda", point)
    return machine


def points() -> list[Point]:
    return [
        Point(T0 + n / 4, n * MIB, 2 * n * MIB, 3 * n * MIB, what) for n, what in enumerate(KINDS)
    ]


def shown() -> list[dict[str, Any]]:
    return [
        {
            "when": point.when, "allocation": str(point.allocation), "size": str(point.size),
            "threshold": str(point.threshold), "what": point.what,
        }
        for point in points()
    ]  # fmt: skip


def client(lab: VmLab, *words: str) -> subprocess.CompletedProcess[str]:
    command = [str(BIN / "vdsm-client"), "--dev", str(lab.agent.dir), *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def test_the_history_of_a_disk(lab: VmLab, vm: Machine) -> None:
    """A disk without one has no points; since a time, of one disk or of all."""
    call = lab.call
    assert call("VM.getThinHistory", vmID=vm.id) == {"vda": shown()}
    assert call("VM.getThinHistory", vmID=vm.id, drive="vda") == {"vda": shown()}
    assert call("VM.getThinHistory", vmID=vm.id, drive="vdb") == {"vdb": []}
    since = T0 + 1
    assert call("VM.getThinHistory", vmID=vm.id, since=since) == {"vda": shown()[4:]}
    assert call("VM.getThinHistory", vmID=vm.id, drive="vda", since=str(since + 99)) == {"vda": []}


@pytest.mark.parametrize("drive", ["vdc", "../vda", "vda/../vda", "VDA"])
def test_a_disk_that_the_vm_does_not_have(lab: VmLab, vm: Machine, drive: str) -> None:
    text = lab.fails(13, "VM.getThinHistory", vmID=vm.id, drive=drive)
    assert drive in text
    assert vm.id in text
    assert "vda, vdb" in text


def test_vms_that_do_not_run(lab: VmLab, history: History) -> None:
    assert "VM.getThinHistory" not in lab.fails(1, "VM.getThinHistory", vmID=new_id())
    ended = lab.machine("ended")
    history.note(ended.id, "vda", points()[0])
    ended.guest.domain.destroy()
    lab.wait(lambda: not is_listed(lab, ended), "the end to be noticed")
    lab.fails(6, "VM.getThinHistory", vmID=ended.id)


def is_listed(lab: VmLab, machine: Machine) -> bool:
    return machine.id in lab.call("Host.getVMList", onlyUUID=True)


def test_a_disk_that_nothing_watches_has_no_word_of_it(lab: VmLab, vm: Machine) -> None:
    """It is on a file: the storage needs nobody's help to grow it."""
    assert "thin" not in lab.stats(vm.id)["disks"]["vda"]
    done = client(lab, "thin", "top", "--once")
    assert (done.returncode, done.stderr) == (0, "")
    assert "No disk of a running VM grows" in done.stdout


def test_the_picture(lab: VmLab, vm: Machine, tmp_path: Path) -> None:
    done = client(lab, "thin", "plot", "grows", "vda", "-o", str(tmp_path / "a.svg"))
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    svg = (tmp_path / "a.svg").read_text()
    assert svg == plot(shown(), "VM grows, drive vda")
    assert ET.fromstring(svg).tag == "{http://www.w3.org/2000/svg}svg"
    done = client(lab, "thin", "plot", vm.id, "vdb", "-o", str(tmp_path / "b.svg"))
    assert done.returncode == 2
    assert "nothing was recorded" in done.stderr
    assert not (tmp_path / "b.svg").exists()


def test_it_outlives_the_agent(lab: VmLab, vm: Machine) -> None:
    lab.agent.kill()
    lab.agent.start()
    lab.world.client = Client.dev(str(lab.agent.dir))
    lab.world.settle()
    assert lab.call("VM.getThinHistory", vmID=vm.id) == {"vda": shown()}
