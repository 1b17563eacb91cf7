# SPDX-License-Identifier: GPL-2.0-or-later
"""The last chapter of make demo: a guest writes many gigabytes into a small logical volume, as fast
as it can, and never waits for space; the picture of it stays.

The kernel may have no device-mapper: then a stand-in makes devices of the volumes.  Run by demo.py.
Exit 0 only if every check holds.
"""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

from functional import demo_guests
from functional.demo import BIN, ROOT, CheckFailedError, check, say, title
from functional.engine.host import FCP, StorageServer
from functional.guests.libvirtd import Libvirtd
from functional.luns import Luns
from functional.processes import AgentProcess
from functional.standin.process import StandInProcess
from functional.thin_lab import (
    CAPACITY,
    GIB,
    PIECE,
    begin,
    check_written,
    lv_size,
    thin,
    thin_disk,
    wait_armed,
    writing,
)
from functional.vm_lab import MIB, Machine, VmLab
from functional.world import World

WRITTEN = 6 * GIB
BEGIN = 512 * MIB  # bytes of the volume
PATIENCE = 900.0  # seconds for the guest, which is emulated
PICTURE = ROOT / "build" / "thin.svg"
MIB_S = 1e6


def boot(lab: VmLab) -> Machine:
    title("A guest with a disk of 16 GiB, on a logical volume of half a GiB")
    machine = lab.machine_of("demo", [thin_disk(lab, BEGIN, CAPACITY)], boots=True)
    begin(machine)
    found = wait_armed(lab, machine)
    check(
        f"QEMU will tell when the guest writes beyond {int(found['threshold']) // MIB} MiB"
        f" of {int(found['size']) // MIB}", found["state"] == "armed",
    )  # fmt: skip
    return machine


def write(lab: VmLab, machine: Machine) -> float:
    """Returns when it began."""
    title(f"It writes {WRITTEN // GIB} GiB as fast as it can")
    began = time.time()
    machine.guest.run(writing(0, WRITTEN // PIECE), timeout=PATIENCE)
    seconds = time.time() - began
    found = wait_armed(lab, machine)
    say(f"   {WRITTEN / seconds / MIB_S:.0f} MB/s for {seconds:.0f} s")
    say(
        f"   {found['extends']} extensions, the last took {float(found['lastLatency']) * 1000:.0f}"
        f" ms and the slowest {float(found['maxLatency']) * 1000:.0f} ms from event to space"
    )
    check("the guest never paused", found["pauses"] == "0")
    say(f"   it was slowed for {float(found['throttleTime']):.1f} s")
    size, allocation = int(found["size"]), int(found["allocation"])
    check(
        f"the volume has {size // MIB} MiB, {(size - WRITTEN) // MIB} more than was written",
        size >= WRITTEN and size < CAPACITY and allocation < size,
    )  # fmt: skip
    check("lvm's metadata on the LUN say so, too", lv_size(lab, machine.disks[0].leaf) == size)
    check_written(lab, machine, 0, WRITTEN // PIECE)
    check("all that the guest wrote is in the image", thin(lab, machine) != {})
    return began


def look(lab: VmLab, machine: Machine, since: float) -> None:
    title("vdsm-client thin top --once, and thin plot")
    agent = ["--dev", str(lab.agent.dir)]
    say(run("thin", "top", "--once", *agent))
    PICTURE.parent.mkdir(exist_ok=True)
    run("thin", "plot", machine.id, "vda", "-o", str(PICTURE), "--since", f"{since:.0f}", *agent)
    check(f"the picture is {PICTURE}", PICTURE.stat().st_size > 0)


def run(*argv: str) -> str:
    done = subprocess.run(
        [BIN / "vdsm-client", *argv], capture_output=True, text=True, timeout=60, check=False
    )
    if done.returncode:
        raise CheckFailedError(f"vdsm-client {' '.join(argv)}: {done.stderr}")
    return done.stdout


def chapter(directory: Path) -> None:
    title("A LUN, a libvirtd, and an agent with a storage domain on the LUN")
    luns = Luns(directory)
    standin = StandInProcess(directory / "standin", sync=False)
    libvirtd = Libvirtd(directory / "v")
    settings = {"libvirt__uri": libvirtd.uri, "lvm__devices": luns.pattern}
    agent = AgentProcess(directory / "agent", True, settings, standin)
    try:
        servers = [StorageServer(FCP, devices=(luns.make(name),)) for name in ("first", "second")]
        standin.start()
        with demo_guests.lab(agent, libvirtd, lambda: World(agent, servers, attach=True)) as lab:
            machine = boot(lab)
            look(lab, machine, write(lab, machine))
            machine.guest.destroy()
    finally:
        standin.stop()
        luns.close()


if __name__ == "__main__":
    sys.exit(demo_guests.run_chapter("thin volumes", chapter))
