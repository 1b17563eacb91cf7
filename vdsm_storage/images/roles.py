# SPDX-License-Identifier: GPL-2.0-or-later
"""A volume's role in its image, kept true when volumes come and go."""

from __future__ import annotations

import logging

from vdsm_storage.base.uuids import BLANK
from vdsm_storage.errors import MetadataCleared, VolumeMetadataReadError
from vdsm_storage.images import chain
from vdsm_storage.images import metadata as md
from vdsm_storage.images.store import Store

log = logging.getLogger("volumes")


def mark_internal(store: Store, image: str, parent: str) -> None:
    """A leaf that gets a child is internal from then on; a template stays what it is."""
    metadata = store.load(image, parent)
    if metadata.voltype == md.LEAF:
        store.save(image, parent, metadata.with_(voltype=md.INTERNAL))


def restore_leaf(store: Store, image: str, parent: str) -> None:
    """An internal volume whose last child went is a leaf again."""
    if parent == BLANK or parent not in store.volumes(image):
        return
    try:
        metadata = store.load(image, parent)
        if metadata.voltype == md.INTERNAL and not chain.children(store, image, parent):
            store.save(image, parent, metadata.with_(voltype=md.LEAF))
    except (MetadataCleared, VolumeMetadataReadError) as error:
        log.warning("Volume %s keeps its role, image %s is damaged: %s", parent, image, error)
