# SPDX-License-Identifier: GPL-2.0-or-later
"""A guest: a real kernel with device-mapper, iSCSI and multipath, and this tree at its own path.

    with guest(Settings(disks=(blank_disk(path, 20 * GIB),))) as one:
        one.run("vgcreate", "vg", "/dev/vdb").check()
        agent = one.start(".venv/bin/vdsm-storaged", "--dev", "/var/tmp/agent")   # goes on
        one.kill()      # power cut; one.pause() and one.resume() stop and continue it

The tree is an overlay: the guest may write to it, the host's does not change, and what the host
changes after the guest's start may or may not be seen.  `one.directory` is a directory of the host
that has the same path in the guest, for what goes in and out.  Disks appear as /dev/vdb, /dev/vdc …
in their order.  Nothing reaches a network outside: a port in `forward` is the guest's, reached on
127.0.0.1 at `one.ports[port]`, if the program listens on the guest's address 10.0.2.15 or on all.
"""

from __future__ import annotations

import compileall
import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from functional.lab import rootfs
from functional.lab.accelerator import BARE, KERNEL, QEMU, accelerator
from functional.lab.channel import Channel, Command, Listener, Result
from functional.lab.errors import BootError, CommandTimeoutError
from functional.lab.image import TREE, Image, image
from functional.lab.places import places

GIB = 1024**3
# The Python packages of the system, which .venv builds on: the guest has few of its own.
DIST = Path("/usr/lib/python3/dist-packages")
BOOT = 300.0  # seconds; 10 on a quiet machine
COMMAND = 120.0
END = 30.0
ADDRESS = "10.0.2.15"  # of the guest, where forwarded ports arrive
NINE = "trans=virtio,version=9p2000.L,msize=512000"
COMPILED = ("vdsm_storage", "verbs", "schema", "lvm", "functional")
IN_GUEST = "VDSM_STORAGE_LAB_GUEST"  # the name of the guest, in the environment of its commands


@dataclass(frozen=True)
class Disk:
    """A raw file.  A shared one is for several guests at once and bypasses the page cache."""

    path: Path
    shared: bool = False
    sector: int = 512


@dataclass(frozen=True)
class Settings:
    name: str = "guest"
    memory: int = 1024  # MiB
    disks: Sequence[Disk] = ()
    forward: Sequence[int] = ()  # TCP ports of the guest that the host can reach
    address: str = ""  # on the network of a cluster, as 10.77.0.1/24
    env: Mapping[str, str] = field(default_factory=dict)


def blank_disk(path: Path, size: int, shared: bool = False, sector: int = 512) -> Disk:
    """A sparse file; `size` in bytes."""
    with path.open("wb") as file:
        file.truncate(size)
    return Disk(path, shared, sector)


def why_not() -> str:
    """Why no guest can run on this machine, or an empty string."""
    if os.geteuid() != 0:
        return "the lab needs root"
    missing = [name for name in (QEMU, "setpriv") if not shutil.which(name)]
    missing += rootfs.missing_tools()
    return f"the lab needs {', '.join(missing)}" if missing else ""


@contextlib.contextmanager
def guest(
    settings: Settings | None = None, say: Callable[[str], None] = lambda _: None
) -> Iterator[Guest]:
    """One that is ready.  Waits until this machine has a place for it."""
    made = image(say)
    with places(1), Guest(settings or Settings(), made) as one:
        one.boot()
        one.wait_ready()
        yield one


class Guest:
    """The calls of one guest come from one thread, the one that boots it: it ends with that."""

    def __init__(self, settings: Settings, made: Image, network: socket.socket | None = None):
        self.settings = settings
        self.name = settings.name
        base = os.environ.get("TMPDIR", "/var/tmp")
        self.directory = Path(tempfile.mkdtemp(prefix=f"{settings.name}.", dir=base))
        self.address = settings.address.partition("/")[0]
        self.ports = {port: _free_port() for port in settings.forward}
        self._image = made
        self._network = network
        self._qemu: subprocess.Popen[bytes] | None = None
        self._channel: Channel | None = None

    def __enter__(self) -> Guest:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
        shutil.rmtree(self.directory, ignore_errors=True)

    # -- power

    def boot(self) -> None:
        """Returns at once; wait_ready() waits.  Also after kill(): the root file system is new."""
        assert self._qemu is None
        for folder in COMPILED:  # a second here, half a minute in the guest
            compileall.compile_dir(TREE / folder, quiet=2)
        ours, theirs = socket.socketpair()
        passed = [theirs.fileno()]
        argv = [*self._machine(), *_control(theirs.fileno()), *self._drives(), *self._shares()]
        if self.ports:
            argv += _forwards(self.ports)
        if self._network is not None:
            argv += _cluster_port(self._network.fileno(), self.settings.address)
            passed.append(self._network.fileno())
        with theirs, (self.directory / "qemu.log").open("wb") as log:
            self._qemu = subprocess.Popen(
                # The root image's changes go to a nameless file in TMPDIR.
                ("setpriv", "--pdeathsig", "KILL", "--", *argv),
                pass_fds=passed,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, "TMPDIR": str(self.directory)},
            )
        self._channel = Channel(ours)

    def wait_ready(self, timeout: float = BOOT) -> None:
        assert self._channel is not None
        if not self._channel.wait_ready(timeout):
            raise BootError(f"{self.name} is not up after {timeout:g} s:\n{self.console()}")
        self.run("sh", "-ec", self._preparation(), cwd="/").check()

    def kill(self) -> None:
        """What a power cut does; also to a paused guest."""
        if self._qemu is not None:
            self._qemu.kill()
            self._qemu.wait(END)
        if self._channel is not None:
            self._channel.close()
        self._qemu = self._channel = None

    def pause(self) -> None:
        """SIGSTOP: its clock stands still, its disks get nothing."""
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        self._signal(signal.SIGCONT)

    def alive(self) -> bool:
        return self._qemu is not None and self._qemu.poll() is None

    def console(self, lines: int = 40) -> str:
        """The end of what QEMU and the kernel said."""
        text = ""
        for name in ("qemu.log", "console.log"):
            path = self.directory / name
            if path.exists():
                text += path.read_text(errors="replace")
        return "\n".join(text.splitlines()[-lines:])

    # -- commands, as root; relative programs are of the tree

    def start(
        self, *argv: str, cwd: str = str(TREE), env: Mapping[str, str] | None = None
    ) -> Command:
        """Does not wait for its end."""
        assert self._channel is not None, f"{self.name} does not run"
        environment = {**self.settings.env, IN_GUEST: self.name, **(env or {})}
        return self._channel.start(argv, cwd, environment)

    def run(
        self,
        *argv: str,
        timeout: float = COMMAND,
        listener: Listener = lambda _: None,
        cwd: str = str(TREE),
        env: Mapping[str, str] | None = None,
    ) -> Result:
        """Raises CommandTimeoutError, after an attempt to kill it."""
        command = self.start(*argv, cwd=cwd, env=env)
        try:
            return command.wait(timeout, listener)
        except CommandTimeoutError:
            with contextlib.suppress(CommandTimeoutError):
                command.kill()
            raise

    def python(self, source: str, *args: str, timeout: float = COMMAND) -> str:
        """Standard output of a piece of Python that may import the tree; it takes 1.5 s and up."""
        return self.run(".venv/bin/python", "-c", source, *args, timeout=timeout).check().out

    # -- how it is started

    def _machine(self) -> list[str]:
        made = self._image
        return [
            *(QEMU, "-name", self.name, *accelerator(made), *BARE, "-no-reboot"),
            *("-smp", "1", "-m", str(self.settings.memory)),
            *("-kernel", str(made.kernel), "-initrd", str(made.initrd), "-append", KERNEL),
            *("-serial", f"file:{self.directory}/console.log", "-device", "virtio-rng-pci"),
        ]

    def _drives(self) -> Iterator[str]:
        yield from ("-device", "virtio-blk-pci,drive=root", "-drive")
        yield f"file={self._image.root},if=none,id=root,format=raw,snapshot=on,cache=unsafe"
        for number, disk in enumerate(self.settings.disks):
            how = "cache=none,file.locking=off" if disk.shared else "cache=unsafe"
            yield "-drive"
            yield f"file={disk.path},if=none,id=d{number},format=raw,discard=unmap,{how}"
            sectors = f"logical_block_size={disk.sector},physical_block_size={disk.sector}"
            share = ",share-rw=on" if disk.shared else ""
            yield "-device"
            yield f"virtio-blk-pci,drive=d{number},serial=disk{number},{sectors}{share}"

    def _shares(self) -> Iterator[str]:
        shares = (("tree", TREE, ",readonly=on"), ("dist", DIST, ",readonly=on"))
        for tag, path, how in (*shares, ("out", self.directory, "")):
            yield from ("-fsdev", f"local,id={tag},path={path},security_model=none{how}")
            yield from ("-device", f"virtio-9p-pci,fsdev={tag},mount_tag={tag}")

    def _preparation(self) -> str:
        """A shell script."""
        script = f"""
            hostname {self.name}
            echo "127.0.1.1 {self.name}" >>/etc/hosts
            mkdir -p /run/lab/tree /run/lab/over /run/lab/dist {TREE} {self.directory}
            mount -t 9p -o {NINE},cache=loose,ro dist /run/lab/dist
            echo /run/lab/dist >{DIST}/of-the-host.pth
            mount -t 9p -o {NINE},cache=loose,ro tree /run/lab/tree
            mount -t tmpfs over /run/lab/over
            cd /run/lab
            mkdir over/upper over/work
            mount -t overlay -o lowerdir=tree,upperdir=over/upper,workdir=over/work tree {TREE}
            mount -t 9p -o {NINE},cache=none out {self.directory}
            udevadm settle -t 60
        """
        if self.ports:
            script += f"\nip addr add {ADDRESS}/24 dev eth0; ip link set eth0 up"
        if self._network is not None:
            card = f"eth{len(self.ports) and 1}"
            script += f"\nip addr add {self.settings.address} dev {card}; ip link set {card} up"
        return script

    def _signal(self, number: int) -> None:
        assert self._qemu is not None, f"{self.name} does not run"
        self._qemu.send_signal(number)


def _control(fd: int) -> list[str]:
    return [
        *("-device", "virtio-serial-pci", "-chardev", f"socket,id=control,fd={fd}"),
        *("-device", "virtserialport,chardev=control,name=lab.control"),
    ]


def _forwards(ports: Mapping[int, int]) -> list[str]:
    rules = ",".join(f"hostfwd=tcp:127.0.0.1:{ours}-:{port}" for port, ours in ports.items())
    return [
        *("-netdev", f"user,id=forward,restrict=on,{rules}"),
        *("-device", "virtio-net-pci,romfile=,netdev=forward"),
    ]


def _cluster_port(fd: int, address: str) -> list[str]:
    last = int(address.partition("/")[0].rpartition(".")[2])
    return [
        *("-netdev", f"socket,id=cluster,fd={fd}"),
        *("-device", f"virtio-net-pci,romfile=,netdev=cluster,mac=52:54:00:77:00:{last:02x}"),
    ]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def say(text: str) -> None:
    print(f"lab: {text}", file=sys.stderr, flush=True)
