# SPDX-License-Identifier: GPL-2.0-or-later
"""The special volumes of a block domain on this host, and the tree of links to its devices.

    <data_center>/mnt/blockSD/<domain>/dom_md/{metadata,ids,leases,...}  -> /dev/<domain>/...
    <data_center>/mnt/blockSD/<domain>/images/<image>/<volume>           -> /dev/<domain>/<volume>

All but `master` are active as long as the domain is in use here.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import threading
from collections.abc import Sequence
from typing import Final

from vdsm_storage.base.owner import Owner
from vdsm_storage.domains import block_names as names
from vdsm_storage.domains import layout
from vdsm_storage.errors import CannotActivateLogicalVolume, StorageDomainLayoutError
from vdsm_storage.lvm.activation import Activation
from vdsm_storage.lvm.group import Group

log = logging.getLogger("domain.block")

DIRECTORY: Final = "blockSD"  # below <data_center>/mnt


class Specials:
    """One domain's.  `root` is <data_center>/mnt/blockSD/<domain>; `owner` owns the devices."""

    def __init__(self, group: Group, activation: Activation, root: str, owner: Owner) -> None:
        self.group = group
        self.activation = activation
        self.root = root
        self._owner = owner
        self._mutex = threading.Lock()
        self._open = False

    def device(self, lv: str) -> str:
        """Path of a volume's device, active or not."""
        return self.activation.path(self.group.name, lv)

    def open(self, needed: str = names.LEASES) -> None:
        """Activate them, and make their links; quick when that was done and `needed` is there.

        Raises 371, 506, 558.
        """
        if self._is_open(needed):  # as nearly always: nobody waits for anybody then
            return
        with self._mutex:
            if self._is_open(needed):
                return
            wanted = self._wanted()
            self.activation.activate(self.group, wanted)
            directory = os.path.join(self.root, layout.DOM_MD)
            for path in (self.root, directory, os.path.join(self.root, layout.IMAGES)):
                os.makedirs(path, mode=0o755, exist_ok=True)
            for lv in (*wanted, names.MASTER):
                link(os.path.join(directory, lv), self.device(lv))
            self.own(wanted)
            self._open = True

    def _is_open(self, needed: str) -> bool:
        return self._open and os.path.exists(self.device(needed))

    def _wanted(self) -> list[str]:
        there = self.group.read().lvs
        missing = names.SPECIAL - {names.XLEASES} - set(there)
        if missing:
            raise StorageDomainLayoutError(
                domain=self.group.name, reason=f"it has no volumes {', '.join(sorted(missing))}"
            )
        return sorted((names.SPECIAL & set(there)) - {names.MASTER})

    def own(self, volumes: Sequence[str]) -> None:
        """Give devices to the owner of volumes; udev does it too, and later."""
        for lv in volumes:
            path = self.device(lv)
            try:
                self._owner.apply(path)
                os.chmod(path, layout.MODE)
            except OSError as error:
                raise CannotActivateLogicalVolume(
                    vg=self.group.name, lv=lv, reason=f"{path}: {error.strerror}"
                ) from error

    def close(self, volumes: Sequence[str] = ()) -> None:
        """Deactivate them, with `volumes`, and remove the links.  Raises 552."""
        with self._mutex:
            active = set(self.activation.active(self.group.name))
            wanted = sorted(active & (names.SPECIAL | set(volumes)))
            if wanted:
                self.activation.deactivate(self.group, wanted)
            self._open = False
            self._remove_links()

    def _remove_links(self) -> None:
        """All but those to volumes that are still active: guests look for them there."""
        special = os.path.join(self.root, layout.DOM_MD)
        with contextlib.suppress(FileNotFoundError):
            shutil.rmtree(special)
        for path, _, names_there in os.walk(self.root, topdown=False):
            for name in names_there:
                if not os.path.exists(one := os.path.join(path, name)):
                    os.unlink(one)
            with contextlib.suppress(OSError):  # others are in use
                os.rmdir(path)

    # -- links of volumes ----------------------------------------------------------------------

    def directory(self, image: str) -> str:
        return os.path.join(self.root, layout.IMAGES, image)

    def link(self, image: str, volumes: Sequence[str]) -> None:
        """Links in the image's directory, through which QEMU finds backing volumes too."""
        directory = self.directory(image)
        os.makedirs(directory, mode=0o755, exist_ok=True)
        for volume in volumes:
            link(os.path.join(directory, volume), self.device(volume))

    def unlink(self, image: str, volumes: Sequence[str]) -> None:
        directory = self.directory(image)
        for volume in volumes:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(os.path.join(directory, volume))
        with contextlib.suppress(OSError):  # others are in use
            os.rmdir(directory)


def link(path: str, target: str) -> None:
    """Make or move a symbolic link; never absent in between."""
    with contextlib.suppress(OSError):
        if os.readlink(path) == target:
            return
    new = f"{path}.{threading.get_ident()}.new"
    with contextlib.suppress(FileNotFoundError):
        os.unlink(new)
    os.symlink(target, new)
    os.rename(new, path)
