# SPDX-License-Identifier: GPL-2.0-or-later
"""Which disk of a VM is meant: callers name it by its volume, LUN, path or target."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from collections.abc import Mapping, Sequence
from typing import Any

from vdsm_storage.vms.disk_xml import MAPPER
from vdsm_storage.vms.drives import Drive, VolumePath, parse, volume_of


def named(drives: Sequence[Drive], name: str) -> Drive | None:
    """The drive with this target."""
    return next((drive for drive in drives if drive.name == name), None)


def element(xml: str, name: str) -> ET.Element | None:
    """libvirt's <disk> with this target."""
    for disk in parse(xml).iterfind("./devices/disk"):
        target = disk.find("target")
        if target is not None and target.get("dev") == name:
            return disk
    return None


def shown(drive: Drive) -> VolumePath | None:
    """The managed volume that a guest sees: of a transient disk the one below its own file."""
    if drive.transient and drive.volume is None and len(drive.chain) > 1:
        return volume_of(drive.chain[1])
    return drive.volume


def matches(drive: Drive, spec: Mapping[str, Any]) -> bool:
    """Whether a drive is the one that a caller names.  Of a volume its image decides: a snapshot
    or a merge may have changed the volume meanwhile."""
    volume = shown(drive)
    if spec.get("imageID"):
        domain = spec.get("domainID")
        return (
            volume is not None
            and volume.image == spec["imageID"]
            and domain in (None, "", volume.domain)
        )
    if spec.get("GUID"):
        return drive.path == f"{MAPPER}/{spec['GUID']}"
    if spec.get("path"):
        path = str(spec["path"])
        there = volume_of(path)
        if there is not None and volume is not None:  # by whichever tree of links
            return (there.domain, there.image) == (volume.domain, volume.image)
        return drive.path == path
    return bool(spec.get("name")) and drive.name == str(spec["name"])


def describe(spec: Mapping[str, Any]) -> str:
    keys = ("imageID", "volumeID", "GUID", "path", "name")
    return ", ".join(f"{key} {spec[key]}" for key in keys if spec.get(key)) or "no name given"
