# SPDX-License-Identifier: GPL-2.0-or-later
"""Where a snapshot with memory puts it: a volume for the memory, and a small one for the VM's
configuration, which engines name in one string of six UUIDs."""

from __future__ import annotations

import os
import pickle
from dataclasses import dataclass
from typing import Any, Final

from vdsm_storage.base.uuids import is_uuid

PAD: Final = 4096  # bytes: what readers take at once, with direct I/O


@dataclass(frozen=True)
class MemoryVolumes:
    """Both are of the storage domain `domain`."""

    domain: str
    image: str
    volume: str
    conf_image: str
    conf_volume: str

    @classmethod
    def parse(cls, text: str) -> MemoryVolumes:
        """From "domain,pool,image,volume,image,volume".  Raises ValueError."""
        names = [name.strip().lower() for name in text.split(",")]
        if len(names) != 6 or not all(is_uuid(name) for name in names):
            raise ValueError("six UUIDs with commas are expected")
        domain, _pool, image, volume, conf_image, conf_volume = names
        return cls(domain, image, volume, conf_image, conf_volume)


def write_configuration(path: str, xml: str) -> None:
    """Into the configuration's volume: a map, pickled with protocol 2 and padded with zeros.

    Whoever restores the memory needs the XML that the VM had.  Raises OSError.
    """
    conf: dict[str, Any] = {"restoreFromSnapshot": True, "_srcDomXML": xml}
    data = pickle.dumps(conf, protocol=2)
    data += bytes(-len(data) % PAD)
    fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        view = memoryview(data)
        while view:
            view = view[os.write(fd, view) :]
        os.fsync(fd)
    finally:
        os.close(fd)
