# SPDX-License-Identifier: GPL-2.0-or-later
"""What volumes a file domain has, told from the names in its directories alone."""

from __future__ import annotations

import contextlib
import os

from vdsm_storage.base.uuids import is_uuid
from vdsm_storage.domains import tree
from vdsm_storage.domains.tree import Tree

IMAGES = "images"
META = ".meta"
REMOVED = "_remove_me_"


def published(image_fd: int) -> list[str]:
    """The volumes of one image directory: those whose metadata stands."""
    end = len(META)
    names = [name[:-end] for name in os.listdir(image_fd) if name.endswith(META)]
    return [name for name in names if is_uuid(name)]


def all_volumes(where: Tree) -> dict[str, list[str]]:
    """Every published volume, and the images that have it."""
    found: dict[str, list[str]] = {}
    with where.directory(IMAGES) as images_fd:
        for image in _image_names(images_fd):
            try:
                fd = os.open(image, tree.DIRECTORY_FLAGS, dir_fd=images_fd)
            except OSError:  # deleted, or replaced by something else, since it was listed
                continue
            try:
                for volume in published(fd):
                    found.setdefault(volume, []).append(image)
            finally:
                os.close(fd)
    return found


def images(where: Tree) -> list[str]:
    """Every image that has a published volume."""
    found = []
    with where.directory(IMAGES) as images_fd:
        for image in _image_names(images_fd):
            try:
                fd = os.open(image, tree.DIRECTORY_FLAGS, dir_fd=images_fd)
            except OSError:  # deleted, or replaced by something else, since it was listed
                continue
            try:
                names = os.listdir(fd)
            finally:
                os.close(fd)
            for name in names:
                if name.endswith(META) and is_uuid(name[: -len(META)]):
                    found.append(image)
                    break
    return found


def images_of_volume(where: Tree, volume: str) -> list[str]:
    """Every image that has the volume; the data file's link count tells when all are found."""
    found: list[str] = []
    links = 0
    with where.directory(IMAGES) as fd:
        for image in _image_names(fd):
            if tree.status(fd, f"{image}/{volume}{META}") is None:
                continue
            found.append(image)
            data = tree.status(fd, f"{image}/{volume}")
            links = max(links, data.st_nlink if data is not None else 0)
            if len(found) == links:
                break
    return found


def removed_images(where: Tree) -> dict[str, list[str]]:
    """Images marked for removal, and the volumes that they still have."""
    removed = {}
    with where.directory(IMAGES) as fd:
        names = [name for name in os.listdir(fd) if name.startswith(REMOVED)]
    for name in names:
        if is_uuid(image := name.removeprefix(REMOVED)):
            with contextlib.suppress(FileNotFoundError), where.directory(IMAGES, name) as fd:
                removed[image] = published(fd)
    return removed


def _image_names(images_fd: int) -> list[str]:
    with os.scandir(images_fd) as entries:
        return [e.name for e in entries if is_uuid(e.name) and e.is_dir(follow_symlinks=False)]
