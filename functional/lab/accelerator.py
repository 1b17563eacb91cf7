# SPDX-License-Identifier: GPL-2.0-or-later
"""KVM where it really works, emulation else.

A machine may have /dev/kvm and still hang every guest: what counts is that a kernel came up.  The
answer holds until the next boot of this machine and is kept beside the images.
"""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

from functional.lab.image import Image, cache

QEMU = "qemu-system-x86_64"
PROBE = 8.0  # seconds; with KVM the kernel is up after one or two
KVM = ("-accel", "kvm", "-cpu", "host")
# One virtual CPU has twice the speed of one of two; a large translation buffer is never flushed;
# an old CPU tempts no program into wide vectors, which are slow to emulate.
TCG = ("-accel", "tcg,tb-size=512", "-cpu", "Nehalem,+rdrand")
# As little of a PC as boots Linux.
BARE = ("-machine", "q35,hpet=off", "-nodefaults", "-no-user-config", "-display", "none")
KERNEL = (
    "console=ttyS0 quiet panic=-1 mitigations=off nokaslr audit=0 apparmor=0 selinux=0 "
    "random.trust_cpu=on net.ifnames=0"
)


def accelerator(image: Image) -> Sequence[str]:
    """QEMU's arguments.  VDSM_STORAGE_LAB_KVM=0 or 1 decides without a probe."""
    chosen = os.environ.get("VDSM_STORAGE_LAB_KVM")
    if chosen:
        return KVM if chosen == "1" else TCG
    if not os.access("/dev/kvm", os.R_OK | os.W_OK):
        return TCG
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    known = cache() / "kvm-works"
    try:
        when, _, answer = known.read_text().partition(" ")
    except FileNotFoundError:
        when = answer = ""
    if when != boot:
        answer = "yes" if _boots(image) else "no"
        fresh = known.with_name(f"{known.name}.{os.getpid()}")
        fresh.write_text(f"{boot} {answer}")
        fresh.replace(known)
    return KVM if answer == "yes" else TCG


def _boots(image: Image) -> bool:
    """Whether a kernel comes up far enough to say so on its console."""
    argv = (
        *(QEMU, *KVM, *BARE, "-m", "256", "-no-reboot", "-serial", "stdio"),
        *("-kernel", str(image.kernel), "-initrd", str(image.initrd)),
        *("-append", f"{KERNEL} lab.probe"),
    )
    with subprocess.Popen(
        argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    ) as qemu:
        assert qemu.stdout is not None
        os.set_blocking(qemu.stdout.fileno(), False)
        seen = b""
        end = time.monotonic() + PROBE
        while time.monotonic() < end and qemu.poll() is None and b"lab: alive" not in seen:
            seen += qemu.stdout.read() or b""
            time.sleep(0.1)
        qemu.kill()
    return b"lab: alive" in seen
