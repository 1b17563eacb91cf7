# SPDX-License-Identifier: GPL-2.0-or-later
"""Uploaded images that mean harm, through the verbs that meet them."""

from __future__ import annotations

import os
import struct
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from functional import clients_image
from functional.attacks import attacks, hostile_lab, local, posix, run
from functional.outside import SECRET, Outside
from functional.pool_lab import COW, MIB, RAW, Lab, Volume
from functional.processes import AgentProcess
from vdsm_storage.rpc.client import RemoteError

UNVERIFIED = 484
NO_CHAIN = 262
SIZE = 4 * MIB


@pytest.fixture(scope="module")
def lab(workdir: Path, start_agent: Callable[..., AgentProcess]) -> Iterator[Lab]:
    with hostile_lab(workdir, start_agent) as made:
        yield made


def create(path: Path, *options: str, size: int = SIZE) -> None:
    """What an attacker's own qemu-img makes."""
    argv = ["qemu-img", "create", "-q", "-u", *options, str(path), str(size)]
    subprocess.run(argv, check=True, timeout=60)


def qcow2(path: Path, *options: str) -> None:
    create(path, "-f", "qcow2", *options)


def patched(offset: int, data: bytes) -> Callable[[Path], None]:
    """A sound image with some bytes of its header replaced."""

    def make(path: Path) -> None:
        qcow2(path)
        with path.open("r+b") as file:
            file.seek(offset)
            file.write(data)

    return make


def number(offset: int, value: int, size: int = 4) -> Callable[[Path], None]:
    return patched(offset, value.to_bytes(size, "big"))


def extension(kind: int, data: bytes) -> Callable[[Path], None]:
    """A sound image whose first header extension is this one."""
    return patched(112, struct.pack(">II", kind, len(data)) + data + bytes(-len(data) % 8 + 8))


def with_bytes(data: bytes) -> Callable[[Path], None]:
    def make(path: Path) -> None:
        path.write_bytes(data)

    return make


def with_snapshot(path: Path) -> None:
    qcow2(path)
    subprocess.run(["qemu-img", "snapshot", "-c", "s", str(path)], check=True, timeout=60)


def encrypted(path: Path) -> None:
    options = "encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10"
    key = ("--object", "secret,id=s,data=x")
    clients_image.create(path, "-f", "qcow2", *key, "-o", options, size="4M")


# Of volumes that should be cow images of 4 MiB without a backing file.
BAD_COW: dict[str, Callable[[Path], None]] = {
    "nothing": with_bytes(b""),
    "one byte": with_bytes(b"Q"),
    "magic alone": with_bytes(b"QFI\xfb"),
    "zeros": with_bytes(bytes(65536)),
    "random": with_bytes(os.urandom(65536)),
    "raw": lambda path: create(path, "-f", "raw"),
    "vmdk": lambda path: create(path, "-f", "vmdk"),
    "vdi": lambda path: create(path, "-f", "vdi"),
    "qed": lambda path: create(path, "-f", "qed"),
    "qcow": lambda path: create(path, "-f", "qcow"),
    "vhdx": lambda path: create(path, "-f", "vhdx"),
    "luks": encrypted,
    "snapshot": with_snapshot,
    "backing": lambda path: qcow2(path, "-b", "/etc/passwd", "-F", "raw"),
    "backing relative": lambda path: qcow2(path, "-b", "../../../etc/passwd", "-F", "raw"),
    "backing device": lambda path: qcow2(path, "-b", "/dev/sda", "-F", "raw"),
    "backing url": lambda path: qcow2(path, "-b", "nbd://127.0.0.1:1/x", "-F", "raw"),
    "backing json": lambda path: qcow2(path, "-b", "json:{\"driver\":\"null-co\"}", "-F", "raw"),
    "backing fifo": lambda path: qcow2(path, "-b", "/dev/stdin", "-F", "raw"),
    "other size": lambda path: create(path, "-f", "qcow2", size=8 * MIB),
    "extended L2": lambda path: qcow2(path, "-o", "extended_l2=on"),
    "version 1": number(4, 1),
    "version 4": number(4, 4),
    "clusters of 256 bytes": number(20, 8),
    "clusters of 2 GiB": number(20, 31),
    "huge size": number(24, 2**63 - 1, 8),
    "no L1": number(36, 0),
    "huge L1": number(36, 2**32 - 1),
    "L1 far away": number(40, 2**62, 8),
    "refcounts far away": number(48, 2**62, 8),
    "huge refcount table": number(56, 2**32 - 1),
    "snapshots": number(60, 65535),
    "snapshots huge": number(60, 2**32 - 1),
    "corrupt bit": number(72, 2, 8),
    "data file bit": number(72, 4, 8),
    "unknown bit": number(72, 1 << 40, 8),
    "refcount bits": number(96, 63),
    "header length": number(100, 2**32 - 8),
    "header length odd": number(100, 105),
    "extension without end": patched(112, struct.pack(">II", 0x12345678, 2**32 - 1)),
    "data file name": extension(0x44415441, b"/etc/passwd"),
    "encryption header": extension(0x0537BE77, bytes(16)),
    "backing name too long": patched(8, struct.pack(">QI", 600, 2**31)),
    "backing name far away": patched(8, struct.pack(">QI", 2**62, 8)),
}


def with_bitmaps(path: Path) -> None:
    """It says that there are as many bitmaps as there can be, and has them."""
    qcow2(path)
    names = [f"b{n:07}".encode() for n in range(65535)]
    directory = b"".join(
        struct.pack(">QIIBBHI", 65536 * 4, 1, 0, 1, 16, len(name), 0) + name for name in names
    )
    with path.open("r+b") as file:
        file.seek(65536 * 16)
        file.write(directory)
        file.seek(88)  # autoclear features: the bitmaps are valid
        file.write((1).to_bytes(8, "big"))
        file.seek(112)
        body = struct.pack(">IIQQ", len(names), 0, len(directory), 65536 * 16)
        file.write(struct.pack(">II", 0x23852875, len(body)) + body + bytes(8))


BAD_COW["bitmaps"] = with_bitmaps


def upload(lab: Lab, fmt: int, make: Callable[[Path], None]) -> Volume:
    """As engines do: a volume, prepared, and its bytes from a stranger."""
    where = lab.create(posix(lab), SIZE, fmt)
    path = lab.prepare(where)
    path.unlink()
    make(path)
    path.chmod(0o660)
    return where


class Peak:
    """The largest resident memory of the agent and of each of its children, meanwhile."""

    def __init__(self, lab: Lab) -> None:
        self._lab = lab
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self.agent = 0
        self.child = 0

    def __enter__(self) -> Peak:
        self._thread.start()
        return self

    def __exit__(self, *_args: object) -> None:
        self._end.set()
        self._thread.join()

    def _watch(self) -> None:
        pid = self._lab.pid
        while not self._end.wait(0.005):
            self.agent = max(self.agent, self._lab.memory())
            try:
                for task in Path(f"/proc/{pid}/task").iterdir():
                    for child in (task / "children").read_text().split():
                        pages = int(Path(f"/proc/{child}/statm").read_text().split()[1])
                        name = Path(f"/proc/{child}/comm").read_text()
                        if name.startswith("qemu"):
                            self.child = max(self.child, pages * 4096)
            except (OSError, IndexError):
                continue


def answer(lab: Lab, verb: str, where: Volume, **more: Any) -> tuple[int, str]:
    try:
        lab.call(verb, **lab.ids(where), **more)
    except RemoteError as error:
        return error.code, error.message
    return 0, ""


def test_every_bad_cow_upload_is_refused(lab: Lab) -> None:
    accepted, took = [], []
    before = lab.memory()
    with Peak(lab) as peak:
        for name, make in BAD_COW.items():
            where = upload(lab, COW, make)
            started = time.monotonic()
            code, message = answer(lab, "Volume.verify_untrusted", where)
            took.append(time.monotonic() - started)
            if code != UNVERIFIED or len(message.partition("must not be used: ")[2]) < 10:
                accepted.append((name, code, message))
            for verb, more in (
                ("Volume.getQemuImageInfo", {}), ("Volume.measure", {"dstVolFormat": RAW}),
                ("Volume.getInfo", {}), ("Image.teardown", {}),
            ):  # fmt: skip
                code, message = answer(lab, verb, where, **more)
                assert code != -32603, (name, verb, message)
    assert accepted == []
    assert peak.agent - before < 50 * MIB
    assert peak.child < 200 * MIB
    assert max(took) < 50 * sorted(took)[len(took) // 2] + 5


def test_good_uploads_are_taken(lab: Lab) -> None:
    for fmt, make in (
        (COW, qcow2),
        (COW, lambda path: qcow2(path, "-o", "compat=0.10")),
        (COW, lambda path: qcow2(path, "-o", "cluster_size=2M")),
        (COW, lambda path: qcow2(path, "-o", "preallocation=falloc,lazy_refcounts=on")),
        (RAW, lambda path: create(path, "-f", "raw")),
    ):
        where = upload(lab, fmt, make)
        lab.call("Volume.verify_untrusted", **lab.ids(where))
        lab.call("Volume.getQemuImageInfo", **lab.ids(where))


@pytest.mark.parametrize("fmt", ["qcow2", "vmdk", "qed", "vhdx"])
def test_a_raw_upload_that_is_something_else(lab: Lab, fmt: str) -> None:
    where = upload(lab, RAW, lambda path: create(path, "-f", fmt))
    os.truncate(lab.directory(where) / where.volume, SIZE)
    assert lab.code("Volume.verify_untrusted", **lab.ids(where)) == UNVERIFIED


def secret_disk(outside: Outside) -> Path:
    path = outside.file("secret", (SECRET + "\n").encode() * (SIZE // (len(SECRET) + 1)))
    os.truncate(path, SIZE)
    return path


def test_no_verb_opens_the_backing_file_of_a_stranger(lab: Lab, outside: Outside) -> None:
    secret = secret_disk(outside)
    for name in (str(secret), f'json:{{"driver":"file","filename":"{secret}"}}'):
        for domain in (posix(lab), local(lab)):
            where = lab.create(domain, SIZE)
            path = lab.directory(where) / where.volume
            path.unlink()
            qcow2(path, "-b", name, "-F", "raw")
            outside.watch()
            answers = run(attacks(lab, where), outside)
            assert answers["extend"] == NO_CHAIN
            assert answers["copy from"] == NO_CHAIN


def test_no_verb_opens_the_data_file_of_a_stranger(lab: Lab, outside: Outside) -> None:
    secret = secret_disk(outside)
    for domain in (posix(lab), local(lab)):
        where = lab.create(domain, SIZE)
        path = lab.directory(where) / where.volume
        path.unlink()
        qcow2(path, "-o", f"data_file={secret},data_file_raw=on")
        outside.watch()
        answers = run(attacks(lab, where), outside)
        assert answers["extend"] == NO_CHAIN
        assert str(NO_CHAIN) in answers["Volume.getQemuImageInfo"]


def test_what_lies_below_a_sound_layer_is_checked_too(lab: Lab, outside: Outside) -> None:
    """The leaf's header is right; its base was changed into something that leads outside."""
    secret = secret_disk(outside)
    base = lab.create(posix(lab), SIZE)
    leaf = lab.snapshot(base, size=SIZE)
    path = lab.directory(base) / base.volume
    path.unlink()
    qcow2(path, "-b", str(secret), "-F", "raw")
    outside.watch()
    answers = run(attacks(lab, leaf), outside)
    for name in ("extend", "copy from", "add_bitmap"):
        assert answers[name] == NO_CHAIN, name


def guest_writes_a_header(lab: Lab, where: Volume, secret: Path) -> None:
    """A guest may write anything into its raw disk: an image that names a file of the host."""
    path = lab.directory(where) / where.volume
    trap = path.with_suffix(".trap")
    qcow2(trap, "-b", str(secret), "-F", "raw")
    with path.open("r+b") as file:
        file.write(trap.read_bytes())
    trap.unlink()


def set_backing(path: Path, name: str, fmt: str | None) -> None:
    """Write the header again, as an uploader may; without `fmt` QEMU would guess."""
    path.unlink()
    qcow2(path, "-b", name, "-F", fmt or "raw")
    if fmt is None:
        data = bytearray(path.read_bytes()[:65536])
        at = data.index(struct.pack(">I", 0xE2792ACA))
        data[at : at + 4] = struct.pack(">I", 0x12345678)  # an extension that QEMU passes over
        with path.open("r+b") as file:
            file.write(data)


@pytest.mark.parametrize("fmt", ["qcow2", None])
def test_a_raw_disk_is_never_read_as_an_image(
    lab: Lab, outside: Outside, fmt: str | None
) -> None:
    secret = secret_disk(outside)
    base = lab.create(posix(lab), SIZE, RAW)
    leaf = lab.snapshot(base, size=SIZE)
    set_backing(lab.directory(leaf) / leaf.volume, base.volume, fmt)
    guest_writes_a_header(lab, base, secret)
    outside.watch()
    answers = run(attacks(lab, leaf), outside)
    assert str(UNVERIFIED) in answers["Volume.verify_untrusted"]
    assert answers["copy from"] == NO_CHAIN


def test_a_sound_chain_on_a_raw_disk_with_a_header_in_it(lab: Lab, outside: Outside) -> None:
    """The format that the agent writes into its own headers keeps QEMU from guessing."""
    secret = secret_disk(outside)
    base = lab.create(posix(lab), SIZE, RAW)
    leaf = lab.snapshot(base, size=SIZE)
    guest_writes_a_header(lab, base, secret)
    outside.watch()
    answers = run(attacks(lab, leaf), outside)
    assert answers["copy from"] == 0
    assert answers["extend"] == 0
