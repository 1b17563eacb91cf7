# SPDX-License-Identifier: GPL-2.0-or-later
"""qemu-img on images whose data are encrypted: in qcow2, or all of a raw one (LUKS).

The key goes in by standard input, base64, so that neither a command line nor a file has it.  qemu
takes it as UTF-8 text.  Methods raise what QemuImg's do.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import stat
import tempfile
import threading
from collections.abc import Sequence

from vdsm_storage.base.run import Command, run
from vdsm_storage.base.secret import Secret
from vdsm_storage.errors import CommandError
from vdsm_storage.host.qemu_img import LUKS, QCOW2, NewImage

# What the header takes at most: eight key slots of 252 KiB and a header, in clusters of 64 KiB.
HEADER = 4 * 1024 * 1024
KEY = ("--object", "secret,id=key,format=base64,file=/dev/stdin")
# It measures how fast this CPU is, and gives up where clocks are too coarse for its first try.
_COARSE = "accurate CPU usage"
_TRIES = 20


class QemuImgLuks:
    """`directory` is on this host alone; images are made there (headers only) and then copied.

    `iteration_time` is how many milliseconds this CPU shall take to try one key, and so each
    opening of a volume.  `timeout` is seconds.
    """

    def __init__(self, directory: str, iteration_time: int, timeout: float = 120.0) -> None:
        self._directory = directory
        self._iteration_time = iteration_time
        self._timeout = timeout
        self._lock = threading.Lock()
        self._used = False

    def empty(self, new: NewImage, key: Secret) -> bytes:
        """The whole file of an image without data; `new.path` is not used."""
        options = (
            f"compat={new.compat},encrypt.format=luks,encrypt.key-secret=key,"
            f"encrypt.iter-time={self._iteration_time}"
        )
        backing = ["-u"]
        if new.backing is not None:
            backing += ["-b", new.backing, "-F", new.backing_format or QCOW2]
        return self._made(["-f", QCOW2, *backing, "-o", options], new.size, key)

    def container(self, key: Secret) -> bytes:
        """What stands in front of the data of a raw image, however large that is."""
        options = f"key-secret=key,iter-time={self._iteration_time}"
        return self._made(["-f", LUKS, "-o", options], 0, key)

    def _made(self, options: Sequence[str], size: int, key: Secret) -> bytes:
        self._make_directory()
        with tempfile.TemporaryDirectory(dir=self._directory) as directory:
            path = os.path.join(directory, "image")
            self._run_again(["create", "-q", *KEY, *options, path, str(size)], key)
            with open(path, "rb") as file:
                return file.read()

    def resize(self, path: str, size: int, key: Secret) -> None:
        """Grow the image to `size` bytes.  No layer below may have more than it has now, for what
        is there would be seen."""
        self._run(["resize", "-q", *KEY, *_opened(path), str(size)], key)

    def bitmap_add(self, path: str, name: str, granularity: int | None, key: Secret) -> None:
        """Add an empty bitmap that records from now on."""
        how = ["-g", str(granularity)] if granularity else []
        self._run(["bitmap", "--add", "--enable", *how, *KEY, *_opened(path), name], key)

    def _make_directory(self) -> None:
        with self._lock:
            if not self._used:
                with contextlib.suppress(FileNotFoundError):
                    shutil.rmtree(self._directory)  # of a run that was killed
                os.makedirs(self._directory, mode=0o700)
                self._used = True

    def _run_again(self, argv: Sequence[str], key: Secret) -> None:
        for left in reversed(range(_TRIES)):
            try:
                self._run(argv, key)
                return
            except CommandError as error:
                if left == 0 or _COARSE not in str(error.facts["stderr"]):
                    raise

    def _run(self, argv: Sequence[str], key: Secret) -> None:
        text = key.reveal().encode("ascii")
        run(Command(["qemu-img", *argv], timeout=self._timeout, input=text))


def _opened(path: str) -> list[str]:
    """This layer alone: those below may have other keys."""
    driver = "host_device" if stat.S_ISBLK(os.stat(path).st_mode) else "file"
    node = {
        "driver": QCOW2,
        "encrypt": {"format": LUKS, "key-secret": "key"},
        "backing": None,
        "file": {"driver": driver, "filename": path},
    }
    return [f"json:{json.dumps(node)}"]
