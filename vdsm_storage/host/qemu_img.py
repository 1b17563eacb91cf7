# SPDX-License-Identifier: GPL-2.0-or-later
"""qemu-img, one method a subcommand.

A format is always given, never probed: a guest may write a qcow2 header into a raw disk.  All
sizes are bytes.  Methods raise CommandError, CommandTimeout, ActionStopped; the caller knows
which storage error that means.
"""

from __future__ import annotations

import errno
import json
import os
import stat
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from vdsm_storage.base.cancel import Cancel
from vdsm_storage.base.pace import Pace
from vdsm_storage.base.run import Command, Limits, Result, run
from vdsm_storage.errors import CommandError
from vdsm_storage.host.qemu_img_output import (
    Check,
    Extent,
    Info,
    Measure,
    parse_chain,
    parse_check,
    parse_info,
    parse_map,
    parse_measure,
    parse_progress,
)

RAW = "raw"
LUKS = "luks"
QCOW2 = "qcow2"
CLUSTER = 65536  # bytes; qemu's default, and what measure() assumes
DIRECT = "none"  # cache mode: past the page cache
BUFFERED = "writeback"


@dataclass(frozen=True)
class Image:
    """A file, device or URL, and the format to read it in."""

    path: str
    format: str


@dataclass(frozen=True)
class NewImage:
    """What `create` makes.  `backing` is written into the header as it stands (a bare volume
    UUID: relative) and is not opened."""

    path: str
    format: str
    size: int
    compat: str = "1.1"
    backing: str | None = None
    backing_format: str | None = None
    preallocation: str | None = None  # off, metadata, falloc, full


@dataclass(frozen=True)
class Conversion:
    """What `convert` does.

    With `backing` only the source's own layer is copied and the target gets that backing file.
    `create=False` writes into a target that stands; `is_zero` then says that it reads as zeros.
    `sparse=False` writes every zero, so that a preallocated target stays allocated.  `bitmaps`
    copies the valid ones; a broken one is no use to anyone.
    """

    source: Image
    target: Image
    compat: str = "1.1"
    backing: str | None = None
    backing_format: str | None = None
    preallocation: str | None = None
    create: bool = True
    is_zero: bool = False
    sparse: bool = True
    unordered: bool = False
    bitmaps: bool = False


def supports_direct(path: str) -> bool:
    """Whether the file system behind an existing `path` does direct I/O (tmpfs does not)."""
    try:
        os.close(os.open(path, os.O_RDONLY | os.O_DIRECT | os.O_CLOEXEC))
    except OSError as error:
        if error.errno == errno.EINVAL:
            return False
        raise
    return True


class _ProgressReader:
    """Collects qemu-img's output pieces, however they are cut, and reports fractions."""

    def __init__(self, report: Callable[[float], None]) -> None:
        self._report = report
        self._tail = b""

    def __call__(self, piece: bytes) -> None:
        self._tail = (self._tail + piece)[-200:]
        fraction = parse_progress(self._tail)
        if fraction is not None:
            self._report(fraction)


@dataclass(frozen=True)
class Watch:
    """How a long command is followed and stopped, and how fast it may go."""

    progress: Callable[[float], None] | None = None  # gets 0.0 to 1.0
    cancel: Cancel | None = None
    pace: Pace | None = None


class QemuImg:
    """`quick` seconds for what reads or writes metadata, `long` for what moves data.

    `memory` (bytes) and `cpu` (seconds) bound qemu-img while it reads an untrusted image.
    """

    def __init__(
        self,
        quick: float = 120.0,
        long: float = 7 * 24 * 3600.0,
        memory: int = 1024 * 1024 * 1024,
        cpu: int = 30,
    ) -> None:
        self._quick = quick
        self._long = long
        self._limits = Limits(memory=memory, cpu=cpu)

    # -- metadata ----------------------------------------------------------------------------

    def create(self, new: NewImage) -> None:
        """Make an image in one run of the program; a file that stands is overwritten."""
        options = _options(new.format, new.compat, new.preallocation)
        backing = ["-u"]
        if new.backing is not None:
            backing += ["-b", new.backing, "-F", new.backing_format or QCOW2]
        self._run(["create", "-q", "-f", new.format, *backing, *options, new.path, str(new.size)])

    def info(self, image: Image) -> Info:
        """One layer; works while a guest writes to it."""
        return parse_info(self._run(_info_argv(image, "-U")).stdout)

    def chain_info(self, image: Image) -> list[Info]:
        """All layers, top first.  Opens every backing file: for chains that we made only."""
        return parse_chain(self._run(_info_argv(image, "-U", "--backing-chain")).stdout)

    def info_untrusted(self, image: Image) -> Info:
        """One layer of an image that a stranger wrote, under limits of memory and CPU time."""
        return parse_info(self._run(_info_argv(image), limits=self._limits).stdout)

    def measure(self, image: Image, target_format: str, with_backing: bool = True) -> Measure:
        """What a copy needs: of the whole chain, or (with_backing=False) of the top layer.

        A qcow2 target's `bitmaps` is what copying the source's bitmaps adds.
        """
        argv = ["measure", "--output", "json", "-O", target_format, "-U"]
        if with_backing or image.format == RAW:
            argv += ["-f", image.format, image.path]
        else:
            return self.measure_layers([image], target_format)
        return parse_measure(self._run(argv).stdout)

    def measure_layers(self, layers: Sequence[Image], target_format: str) -> Measure:
        """What the `layers` need as one image, the lowest first; what is below them is left out."""
        node: dict[str, object] | None = None
        for layer in layers:
            above = _node(layer)
            if layer.format != RAW:
                above["backing"] = node
            node = above
        filename = "json:" + json.dumps(node)
        argv = ["measure", "--output", "json", "-O", target_format, "-U", filename]
        return parse_measure(self._run(argv).stdout)

    def measure_empty(self, size: int, target_format: str) -> Measure:
        """What an image of `size` bytes without data needs."""
        argv = ["measure", "--output", "json", "-O", target_format, "--size", str(size)]
        return parse_measure(self._run(argv).stdout)

    def check(self, image: Image) -> Check:
        """Read all of the metadata.  Defects are in the answer; nothing is repaired."""
        argv = ["check", "--output", "json", "-f", image.format, image.path]
        return parse_check(self._run(argv, ok=(0, 2, 3)).stdout)

    def repair_leaks(self, image: Image) -> Check:
        """Free clusters that nothing uses (an interrupted commit leaves some)."""
        argv = ["check", "--output", "json", "-r", "leaks", "-f", image.format, image.path]
        return parse_check(self._run(argv, ok=(0, 2, 3), timeout=self._long).stdout)

    def map(self, image: Image) -> list[Extent]:
        """Where data is, over the whole chain."""
        argv = ["map", "--output", "json", "-U", "-f", image.format, image.path]
        return parse_map(self._run(argv).stdout)

    def map_layer(self, image: Image) -> list[Extent]:
        """The same of the top layer alone: what it does not hold is not `present`."""
        node = _node(image)
        if image.format != RAW:
            node["backing"] = None
        argv = ["map", "--output", "json", "-U", "json:" + json.dumps(node)]
        return parse_map(self._run(argv).stdout)

    def read(self, image: Image, offset: int, length: int) -> bytes:
        """What a guest would read; both in bytes, multiples of 512.  Opens the whole chain."""
        with tempfile.TemporaryDirectory(prefix="vdsm-storage-") as directory:
            path = os.path.join(directory, "data")
            end = (offset + length) // 512
            where = ["bs=512", f"skip={offset // 512}", f"count={end}"]
            files = [f"if={image.path}", f"of={path}"]
            self._run(["dd", "-U", "-f", image.format, "-O", RAW, *where, *files])
            with open(path, "rb") as file:
                return file.read(length)

    def resize(self, image: Image, size: int, preallocation: str | None = None) -> None:
        """Grow the image to `size` bytes."""
        how = [f"--preallocation={preallocation}"] if preallocation else []
        self._run(["resize", "-q", "-f", image.format, *how, image.path, str(size)])

    def amend(self, path: str, compat: str, watch: Watch | None = None) -> None:
        """Change a qcow2 image's version: 0.10 or 1.1."""
        argv = ["amend", "-p", "-f", QCOW2, "-o", f"compat={compat}", path]
        self._follow(argv, watch)

    def rebase_unsafe(self, image: Image, backing: str | None, backing_format: str) -> None:
        """Write another backing file into the header; no data is moved, nothing is opened."""
        argv = ["rebase", "-u", "-q", "-f", image.format, "-b", backing or "", "-F", backing_format]
        self._run([*(argv if backing else argv[:-2]), image.path])

    # -- data --------------------------------------------------------------------------------

    def convert(self, conversion: Conversion, watch: Watch | None = None) -> None:
        """Copy an image."""
        self._follow(convert_argv(conversion), watch)

    def commit(self, top: Image, base_path: str, watch: Watch | None = None) -> None:
        """Write what `top` and the layers below it hold into `base_path`; top stays as it is."""
        cache = DIRECT if supports_direct(base_path) else BUFFERED
        argv = ["commit", "-p", "-d", "-t", cache, "-f", top.format, "-b", base_path, top.path]
        self._follow(argv, watch)

    def compare(self, one: Image, other: Image, watch: Watch | None = None) -> bool:
        """Whether two images show a guest the same bytes."""
        argv = ["compare", "-q", "-U", "-f", one.format, "-F", other.format, one.path, other.path]
        cancel = watch.cancel if watch else None
        try:
            run(Command(["qemu-img", *argv], timeout=self._long, cancel=cancel))
        except CommandError as error:
            if error.status == "exit code 1":
                return False
            raise
        return True

    # -- bitmaps -----------------------------------------------------------------------------

    def bitmap_add(
        self, path: str, name: str, granularity: int | None = None, *, enabled: bool = True
    ) -> None:
        """Add an empty bitmap that records from now on (`enabled`) or stands still."""
        how = ["-g", str(granularity)] if granularity else []
        state = "--enable" if enabled else "--disable"
        self._run(["bitmap", "--add", state, *how, "-f", QCOW2, path, name])

    def bitmap_remove(self, path: str, name: str) -> None:
        self._run(["bitmap", "--remove", "-f", QCOW2, path, name])

    def bitmap_clear(self, path: str, name: str) -> None:
        """Forget the dirty bits; the bitmap stays."""
        self._run(["bitmap", "--clear", "-f", QCOW2, path, name])

    def bitmap_enable(self, path: str, name: str) -> None:
        self._run(["bitmap", "--enable", "-f", QCOW2, path, name])

    def bitmap_merge(self, source: str, source_name: str, path: str, name: str) -> None:
        """Add the bits of `source_name` in the image `source` to `name` in `path`."""
        argv = ["bitmap", "--merge", source_name, "-b", source, "-F", QCOW2]
        self._run([*argv, "-f", QCOW2, path, name], timeout=self._long)

    # -- running -----------------------------------------------------------------------------

    def _run(
        self,
        argv: Sequence[str],
        *,
        timeout: float | None = None,
        ok: Sequence[int] = (0,),
        limits: Limits | None = None,
    ) -> Result:
        return run(
            Command(["qemu-img", *argv], timeout=timeout or self._quick, ok=ok, limits=limits)
        )

    def _follow(self, argv: Sequence[str], watch: Watch | None) -> None:
        watch = watch or Watch()
        run(
            Command(
                ["qemu-img", *argv],
                timeout=self._long,
                cancel=watch.cancel,
                on_output=_ProgressReader(watch.progress or (lambda fraction: None)),
                pace=watch.pace,
            )
        )


def _info_argv(image: Image, *flags: str) -> list[str]:
    return ["info", "--output", "json", *flags, "-f", image.format, image.path]


def _node(image: Image) -> dict[str, object]:
    """The image as qemu's block layer describes one of its own devices."""
    driver = "host_device" if stat.S_ISBLK(os.stat(image.path).st_mode) else "file"
    return {"driver": image.format, "file": {"driver": driver, "filename": image.path}}


def _options(image_format: str, compat: str, preallocation: str | None) -> list[str]:
    options = []
    if image_format == QCOW2:
        options.append(f"compat={compat}")
    if preallocation is not None:
        options.append(f"preallocation={preallocation}")
    return ["-o", ",".join(options)] if options else []


def convert_argv(what: Conversion) -> list[str]:
    """The command line of a conversion; direct I/O wherever the file system knows it."""
    argv = ["convert", "-p"]
    target_there = os.path.exists(what.target.path)
    probe = what.target.path if target_there else os.path.dirname(what.target.path) or "."
    if _is_local(what.target.path) and (target_there and supports_direct(probe)):
        argv += ["-t", DIRECT]
    else:
        argv += ["-t", BUFFERED]
    if _is_local(what.source.path) and supports_direct(what.source.path):
        argv += ["-T", DIRECT]
    if not what.create:
        argv.append("-n")
        if what.is_zero:
            argv.append("--target-is-zero")
    if not what.sparse:
        argv += ["-S", "0"]
    if what.unordered:
        argv.append("-W")
    if what.bitmaps:
        argv += ["--bitmaps", "--skip-broken-bitmaps"]
    argv += ["-f", what.source.format, "-O", what.target.format]
    if what.create:
        argv += _options(what.target.format, what.compat, what.preallocation)
        if what.backing is not None:
            argv += ["-B", what.backing, "-F", what.backing_format or QCOW2]
    return [*argv, what.source.path, what.target.path]


def _is_local(path: str) -> bool:
    return path.startswith("/")
