# SPDX-License-Identifier: GPL-2.0-or-later
"""Volume.verify_untrusted: whether an uploaded image may be used by a VM.

The header is read by this agent's own code first; only one without any danger is given to
qemu-img, in the format that the metadata say, with its memory and CPU time limited.
"""

from __future__ import annotations

from vdsm_storage.base import files
from vdsm_storage.base.locks import Lock, Locks
from vdsm_storage.base.units import round_up
from vdsm_storage.errors import CommandError, CommandTimeout, ImageVerificationError
from vdsm_storage.host.qemu_img import Image, QemuImg
from vdsm_storage.host.qemu_img_output import Info
from vdsm_storage.images import guard, layers, luks, qcow2_header
from vdsm_storage.images import metadata as md
from vdsm_storage.images.chain import Member
from vdsm_storage.images.guard import DOMAINS, VolumeRef, image_lock
from vdsm_storage.images.qcow2_header import HeaderError
from vdsm_storage.images.store import Store

CAPACITY_STEP = 4096  # capacities are rounded up to it; an upload's size may be between


class Verifier:
    """`timeout` is seconds to wait for a job that works on the image."""

    def __init__(self, qemu_img: QemuImg, locks: Locks, timeout: float) -> None:
        self._qemu_img = qemu_img
        self._locks = locks
        self._timeout = timeout

    def verify(self, store: Store, ref: VolumeRef) -> None:
        """The volume is prepared, as engines leave it after an upload.

        Raises ImageVerificationError (484) with all that is wrong; 201, 207, 851."""
        held = [
            Lock(DOMAINS, ref.domain, exclusive=False),
            image_lock(ref.domain, ref.image, exclusive=False),
        ]
        with self._locks.held(held, self._timeout):
            member = Member(ref.image, ref.volume, store.load(ref.image, ref.volume))
            image = layers.layer(store, member)
            with guard.active(store, ref.image, [ref.volume], prepared=False):
                problems = self._problems(store, member, image)
        if problems:
            raise ImageVerificationError(volume=ref.volume, reason="; ".join(problems))

    def _problems(self, store: Store, member: Member, image: Image) -> list[str]:
        try:
            path = layers.opened(store, image.path)
            data = files.read_direct(path, qcow2_header.READ_LENGTH)
        except OSError as error:
            return [f"it cannot be read: {error.strerror}"]
        if not member.is_cow:
            return raw_problems(data, store, member)
        problems = cow_problems(data, store, member, image.path)
        if problems:
            return problems
        try:
            info = self._qemu_img.info_untrusted(image)
        except CommandTimeout:
            return ["qemu-img did not come to an end with it"]
        except CommandError as error:
            return [f"qemu-img cannot read it ({error.stderr})"]
        return info_problems(info, member, image.path)


def raw_problems(data: bytes, store: Store, member: Member) -> list[str]:
    """A raw volume holds anything but an image of another format."""
    problems = []
    if member.metadata.format == md.LUKS:
        found = luks.problem(data)
        if found is not None:
            problems.append(f"the volume is encrypted, but {found}")
    else:
        found = qcow2_header.foreign_format(data)
        if found is not None:
            problems.append(f"the volume is RAW, the upload is a {found} image")
    size = store.sizes(member.image, member.volume).apparent - member.metadata.overhead
    capacity = member.metadata.capacity
    if size < capacity or (not store.is_block and round_up(size, CAPACITY_STEP) > capacity):
        problems.append(f"it has {size} bytes, the volume's capacity is {capacity}")
    return problems


def cow_problems(data: bytes, store: Store, member: Member, path: str) -> list[str]:
    """What is wrong with the header; qemu-img must not see the image if anything is."""
    try:
        header = qcow2_header.parse(data)
    except HeaderError as error:
        return [f"the volume is COW, but {error}"]
    length = store.sizes(member.image, member.volume).apparent
    problems = qcow2_header.dangers(header, length)
    if not layers.names_parent(header.backing, path, member.parent):
        expected = member.parent or "none"
        problems.append(f"its backing file is {header.backing!r}, the volume's parent {expected}")
    if member.parent is not None:
        parent = store.load(member.image, member.parent)
        if (wrong := layers.wrong_backing_format(header, parent)) is not None:
            problems.append(wrong)
    if header.version == 3 and layers.compat(store) == "0.10":
        problems.append(f"qcow2 1.1 needs a domain of version 4, this one has {store.version}")
    capacity = member.metadata.capacity
    if round_up(header.size, CAPACITY_STEP) != capacity:
        problems.append(f"it has {header.size} bytes, the volume's capacity is {capacity}")
    return problems


def info_problems(info: Info, member: Member, path: str) -> list[str]:
    """The same rules on what qemu-img reads, should the two readings ever differ."""
    problems = []
    if info.format != layers.qemu_format(member.metadata):
        problems.append(f"it is a {info.format} image")
    if not layers.names_parent(info.backing, path, member.parent):
        problems.append(f"its backing file is {info.backing!r}")
    if info.data_file is not None or info.encrypted or info.corrupt or info.snapshots:
        problems.append("it has a data file, encryption, internal snapshots or is corrupt")
    if round_up(info.virtual_size, CAPACITY_STEP) != member.metadata.capacity:
        problems.append(f"it has {info.virtual_size} bytes")
    return problems
