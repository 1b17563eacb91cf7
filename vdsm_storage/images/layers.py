# SPDX-License-Identifier: GPL-2.0-or-later
"""Volumes as qemu-img sees them, and whether their headers say what the metadata say.

A guest with a raw disk that became cow, or an upload, could have put another file's name into a
header.  Whoever lets qemu-img open a whole chain checks it here first.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from vdsm_storage.base import files
from vdsm_storage.errors import ImageIsNotLegalChain, PrepareIllegalVolume, UnsupportedOperation
from vdsm_storage.host.qemu_img import LUKS, QCOW2, RAW, Image, QemuImg
from vdsm_storage.host.qemu_img_output import Info
from vdsm_storage.images import luks, qcow2_header
from vdsm_storage.images import metadata as md
from vdsm_storage.images.chain import Member, walk
from vdsm_storage.images.metadata import VolumeMetadata
from vdsm_storage.images.qcow2_header import Header, HeaderError
from vdsm_storage.images.store import Store

PROBED = 4096  # bytes by which a file's format is guessed
_QEMU_FORMATS: Mapping[str, str] = {md.COW: QCOW2, md.LUKS: LUKS}


def qemu_format(metadata: VolumeMetadata) -> str:
    """qemu's name of a volume's format."""
    return _QEMU_FORMATS.get(metadata.format, RAW)


def compat(store: Store) -> str:
    """The qcow2 version that every host which may use the domain can read."""
    return "0.10" if store.version < 4 else "1.1"


def layer(store: Store, member: Member) -> Image:
    return Image(store.path(member.image, member.volume), qemu_format(member.metadata))


def opened(store: Store, path: str) -> str:
    """What to open for a store's `path`: the name of a logical volume is a link, and leads to a
    device; that of a file never is."""
    return os.path.realpath(path) if store.is_block else path


def names_parent(backing: str | None, path: str, parent: str | None) -> bool:
    """Whether the header of `path` names the volume `parent` of the same image, or nothing."""
    if backing is None or parent is None:
        return backing is None and parent is None
    directory = os.path.dirname(path)
    return os.path.normpath(os.path.join(directory, backing)) == os.path.join(directory, parent)


def wrong_backing_format(header: Header, parent: VolumeMetadata) -> str | None:
    """What is wrong with how the header tells QEMU to read the backing file; None for nothing.

    A guest decides what a raw disk holds.  Read as qcow2 it could name any file of this host.
    """
    expected = qemu_format(parent)
    found = header.backing_format
    if found == expected or (found is None and expected == QCOW2):
        return None
    return f"it says that its backing file is {found or 'of any format'}, that is {expected}"


def look(store: Store, qemu_img: QemuImg, member: Member) -> Info:
    """What qemu-img says of one layer; it opens no other file.  Raises 262."""
    image = layer(store, member)
    _read_header(store, member)
    return qemu_img.info(image)


def is_encrypted(store: Store, member: Member) -> bool:
    """Whether a guest needs a key for this layer.  Raises 262."""
    return _is_encrypted(member, _read_header(store, member))


def check_headers(store: Store, qemu_img: QemuImg, chain: Sequence[Member]) -> Info:
    """What the top layer's header says, after every layer was found to name its parent.

    `chain` is whole, base first.  Raises PrepareIllegalVolume (227), ImageIsNotLegalChain (262),
    UnsupportedOperation (2009) of an encrypted layer: those who look want to read its data.
    """
    for member in chain:
        if not member.metadata.is_legal:
            raise PrepareIllegalVolume(volume=member.volume)
    return _check_chain(store, qemu_img, chain)


def check_header(
    store: Store, qemu_img: QemuImg, member: Member, *, encrypted: bool = False
) -> Info:
    """The same for a layer and all below it, legal or not: qemu-img opens them, too.

    `encrypted`: layers may be, the caller has the key.
    """
    members = walk(store, member.image, member.volume)
    return _check_chain(store, qemu_img, members, encrypted=encrypted)


def check_below(store: Store, image: str, parent: str | None) -> None:
    """The same of what lies under a volume that is about to be written.  Raises 262."""
    if parent is not None:
        _check_layers(store, walk(store, image, parent))


@dataclass(frozen=True)
class GuestLayer:
    """A layer as a guest's QEMU opens it; `format` is QEMU's name."""

    path: str
    format: str
    encrypted: bool


def guest_layers(store: Store, image: str, volume: str) -> list[GuestLayer]:
    """What a guest opens with a volume: that first, then all below it, checked.  Raises 262."""
    found: list[GuestLayer] = []
    parent: VolumeMetadata | None = None
    for member in walk(store, image, volume):
        header = _check_layer(store, member, parent)
        path, fmt = store.path(member.image, member.volume), qemu_format(member.metadata)
        found.insert(0, GuestLayer(path, fmt, _is_encrypted(member, header)))
        parent = member.metadata
    return found


def _check_chain(
    store: Store, qemu_img: QemuImg, chain: Sequence[Member], *, encrypted: bool = False
) -> Info:
    _check_layers(store, chain, encrypted=encrypted)
    return qemu_img.info(layer(store, chain[-1]))


def _check_layers(store: Store, chain: Sequence[Member], *, encrypted: bool = False) -> None:
    parent: VolumeMetadata | None = None
    for member in chain:
        header = _check_layer(store, member, parent)
        if _is_encrypted(member, header) and not encrypted:
            raise UnsupportedOperation(
                operation="this",
                reason=f"volume {member.volume} is encrypted, and its key is not given",
            )
        parent = member.metadata


def _check_layer(store: Store, member: Member, parent: VolumeMetadata | None) -> Header | None:
    path = store.path(member.image, member.volume)
    header = _read_header(store, member)
    if header is None:
        return None
    if not names_parent(header.backing, path, member.parent):
        reason = f"the header of {member.volume} names {header.backing!r}, not {member.parent}"
        raise ImageIsNotLegalChain(image=member.image, reason=reason)
    wrong = wrong_backing_format(header, parent) if parent is not None else None
    if wrong is not None and not _is_plainly_raw(store, member, header):
        reason = f"the header of {member.volume} is wrong: {wrong}"
        raise ImageIsNotLegalChain(image=member.image, reason=reason)
    return header


def _is_plainly_raw(store: Store, member: Member, header: Header) -> bool:
    """Whether QEMU's guess is harmless: old hosts did not write the format into headers."""
    if header.backing_format is not None or member.parent is None:
        return False
    path = opened(store, store.path(member.image, member.parent))
    data = files.read_direct(path, PROBED)
    return qcow2_header.looks_raw(data)


def _is_encrypted(member: Member, header: Header | None) -> bool:
    inside = header is not None and header.encryption != 0
    return inside or member.metadata.format == md.LUKS


def _check_container(store: Store, member: Member) -> None:
    path = opened(store, store.path(member.image, member.volume))
    wrong = luks.problem(files.read_direct(path, luks.READ_LENGTH))
    if wrong is not None:
        reason = f"{member.volume} is to be a LUKS container, but {wrong}"
        raise ImageIsNotLegalChain(image=member.image, reason=reason)


def _read_header(store: Store, member: Member) -> Header | None:
    """By our own code: qemu-img would open the data file that a header names.  None for raw."""
    if member.metadata.format == md.LUKS:
        _check_container(store, member)
    if not member.is_cow:
        return None
    try:
        path = opened(store, store.path(member.image, member.volume))
        header = qcow2_header.parse(files.read_direct(path, qcow2_header.READ_LENGTH))
    except HeaderError as error:
        reason = f"{member.volume} cannot be read: {error}"
        raise ImageIsNotLegalChain(image=member.image, reason=reason) from error
    if header.crowded is not None:
        reason = f"{member.volume} is not looked at: {header.crowded}"
        raise ImageIsNotLegalChain(image=member.image, reason=reason)
    if header.external_data:
        reason = f"the header of {member.volume} names a data file; remove the volume"
        raise ImageIsNotLegalChain(image=member.image, reason=reason)
    return header
