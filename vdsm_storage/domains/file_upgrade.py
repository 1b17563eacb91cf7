# SPDX-License-Identifier: GPL-2.0-or-later
"""What becomes of a file domain's files when its format goes from version 3 or 4 to 5.

A volume's text in the new form is understood by readers of the old format too, so an upgrade that
was cut off is simply gone through again.
"""

from __future__ import annotations

import copy
import logging
import os
from typing import Final

from vdsm_storage.base import files
from vdsm_storage.base.cancel import Cancel
from vdsm_storage.base.owner import Owner
from vdsm_storage.domains import layout
from vdsm_storage.domains.file_store import FileStore
from vdsm_storage.errors import AgentError
from vdsm_storage.images.store import Progress
from vdsm_storage.leases.model import Geometry

log = logging.getLogger("upgrade")

NEW: Final = layout.XLEASES + ".new"


def make_xleases(
    root: str, sd_id: str, geometry: Geometry, owner: Owner, leases: layout.LeaseWriter
) -> None:
    """The file for external leases, complete before it has its name."""
    dom_md = os.path.join(root, layout.DOM_MD)
    path = os.path.join(dom_md, layout.XLEASES)
    if os.path.lexists(path):
        return
    new = layout.make_file(root, NEW, 0, owner)
    leases.format_xleases(new, sd_id, geometry)
    os.rename(new, path)
    files.sync_directory(dom_md)


def rewrite_volumes(old: FileStore, version: int, progress: Progress, cancel: Cancel) -> None:
    """Save every volume's metadata in the new form."""
    new = copy.copy(old)
    new.version = version
    images = old.images()
    done: set[str] = set()
    for count, image in enumerate(images):
        cancel.check()
        for volume in old.volumes(image):
            if volume in done:  # a template in use is one file in many images
                continue
            done.add(volume)
            try:
                new.save(image, volume, old.load(image, volume))
            except AgentError as error:
                log.warning("Volume %s stays as it is: %s", volume, error)
        progress((count + 1) / len(images))


def clean(root: str) -> None:
    files.unlink_if_there(os.path.join(root, layout.DOM_MD, NEW))
