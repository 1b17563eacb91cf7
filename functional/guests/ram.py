# SPDX-License-Identifier: GPL-2.0-or-later
"""What tiny guests boot: the laboratory's kernel, and a RAM disk with busybox and qemu-guest-agent.

They have no root file system, and user space after some seconds under emulation.  Kept beside the
laboratory's images, under a key of all that goes in.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

from functional.lab import initrd
from functional.lab.image import cache, image

HERE = Path(__file__).parent
LEFT = "VDSM_STORAGE_TINY_GUEST"  # where a host of the laboratory left what tiny guests boot
AGENT = Path("/usr/sbin/qemu-ga")
LOADER = Path("/lib64/ld-linux-x86-64.so.2")
FOLDERS = (
    *("bin", "sbin", "proc", "sys", "dev", "run", "mnt", "etc", "var", "tmp", "modules"),
    *("lib", "lib64", "lib/x86_64-linux-gnu"),
)


@dataclass(frozen=True)
class Boot:
    kernel: Path
    ram: Path


def boot() -> Boot:
    """Both files; the laboratory's image is made first if it is not there.  In a guest of the
    laboratory they are those that its host left there (`leave`)."""
    left = os.environ.get(LEFT)
    if left is not None:
        here = Path(tempfile.gettempdir()) / "tiny"  # libvirtd does not see what is shared
        if not here.exists():
            shutil.copytree(left, here)
        return Boot(here / "kernel", here / "ram")
    made = image()
    root = made.kernel.parent
    files = {
        "bin/busybox": root / "busybox",
        "init": HERE / "init.sh",
        "sbin/qemu-ga": AGENT,
        "lib64/ld-linux-x86-64.so.2": LOADER,
        **{f"lib/x86_64-linux-gnu/{path.name}": path for path in _libraries()},
        **{f"modules/{path.name}": path for path in sorted((root / "modules").iterdir())},
    }
    digest = hashlib.sha256(Path(initrd.__file__).read_bytes())
    for name, path in files.items():
        digest.update(name.encode() + path.read_bytes())
    ram = cache() / f"initrd-tiny-{digest.hexdigest()[:16]}" / "initrd"
    if not ram.exists():
        ram.parent.mkdir(exist_ok=True)
        new = ram.with_name(f"new.{os.getpid()}")
        initrd.write(new, FOLDERS, files)
        new.rename(ram)
    os.utime(ram.parent)  # the laboratory removes what nobody uses
    return Boot(made.kernel, ram)


def leave(directory: Path) -> dict[str, str]:
    """Copies of both for a guest of the laboratory that sees `directory`; what its environment
    must have."""
    found = boot()
    directory.mkdir(exist_ok=True)
    for name, path in (("kernel", found.kernel), ("ram", found.ram)):
        shutil.copyfile(path, directory / name)
    return {LEFT: str(directory)}


def _libraries() -> list[Path]:
    """A line of ldd: `libc.so.6 => /lib/x86_64-linux-gnu/libc.so.6 (0x00007f…)`."""
    text = subprocess.run(["ldd", AGENT], check=True, capture_output=True, text=True).stdout
    return [Path(found) for found in re.findall(r"=> (/\S+)", text)]
