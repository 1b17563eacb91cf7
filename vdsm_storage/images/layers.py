# SPDX-License-Identifier: GPL-2.0-or-later
"""Volumes as qemu-img sees them, and whether their headers say what the metadata say.

A guest with a raw disk that became cow, or an upload, could have put another file's name into a
header.  Whoever lets qemu-img open a whole chain checks it here first.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

from vdsm_storage.errors import ImageIsNotLegalChain, PrepareIllegalVolume
from vdsm_storage.host.qemu_img import QCOW2, RAW, Image, QemuImg
from vdsm_storage.host.qemu_img_output import Info
from vdsm_storage.images import metadata as md
from vdsm_storage.images.chain import Member
from vdsm_storage.images.metadata import VolumeMetadata
from vdsm_storage.images.store import Store


def qemu_format(metadata: VolumeMetadata) -> str:
    """qemu's name of a volume's format."""
    return QCOW2 if metadata.format == md.COW else RAW


def compat(store: Store) -> str:
    """The qcow2 version that every host which may use the domain can read."""
    return "0.10" if store.version < 4 else "1.1"


def layer(store: Store, member: Member) -> Image:
    return Image(store.path(member.image, member.volume), qemu_format(member.metadata))


def names_parent(backing: str | None, path: str, parent: str | None) -> bool:
    """Whether the header of `path` names the volume `parent` of the same image, or nothing."""
    if backing is None or parent is None:
        return backing is None and parent is None
    directory = os.path.dirname(path)
    return os.path.normpath(os.path.join(directory, backing)) == os.path.join(directory, parent)


def check_headers(store: Store, qemu_img: QemuImg, chain: Sequence[Member]) -> Info:
    """What the top layer's header says, after every layer was found to name its parent.

    Raises PrepareIllegalVolume (227), ImageIsNotLegalChain (262).
    """
    info: Info | None = None
    for member in chain:
        if not member.metadata.is_legal:
            raise PrepareIllegalVolume(volume=member.volume)
        image = layer(store, member)
        info = qemu_img.info(image)
        _check_header(member, image.path, info)
    assert info is not None
    return info


def check_header(store: Store, qemu_img: QemuImg, member: Member) -> Info:
    """The same for one layer, legal or not."""
    image = layer(store, member)
    info = qemu_img.info(image)
    _check_header(member, image.path, info)
    return info


def _check_header(member: Member, path: str, info: Info) -> None:
    if not names_parent(info.backing, path, member.parent):
        reason = f"the header of {member.volume} names {info.backing!r}, not {member.parent}"
        raise ImageIsNotLegalChain(image=member.image, reason=reason)
    if info.data_file is not None:
        reason = f"the header of {member.volume} names the data file {info.data_file!r}"
        raise ImageIsNotLegalChain(image=member.image, reason=reason)
