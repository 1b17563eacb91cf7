# SPDX-License-Identifier: GPL-2.0-or-later
"""Secrets as engines give them and as libvirt has them."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final
from xml.etree import ElementTree as Xml

from vdsm_storage.base.secret import Secret

# The first part of the usage id of every secret that is ours.  No other is ever touched.
OURS: Final = "ovirt/"
# The same of those that live as long as a VM: `ovirt/vm/<UUID of the secret>`.
OF_VMS: Final = "ovirt/vm/"
VOLUME: Final = "volume"
# What a secret opens -> the element that names the use (libvirt's formatsecret.html).
USAGES: Final[Mapping[str, str]] = {"ceph": "name", "iscsi": "target", VOLUME: "volume"}


@dataclass(frozen=True)
class Defined:
    """A secret that libvirt has.  Of two with one UUID, the usage is what may not change.

    `usage_type` is one of USAGES, "" for a type that is none of them.
    """

    uuid: str
    usage_type: str
    usage_id: str

    @property
    def ours(self) -> bool:
        return self.usage_id.startswith(OURS)

    @property
    def of_vms(self) -> bool:
        return self.usage_id.startswith(OF_VMS)

    @property
    def usage(self) -> tuple[str, str]:
        """libvirt lets no two secrets have the same."""
        return self.usage_type, self.usage_id


@dataclass(frozen=True)
class Entry:
    """A secret of ours.  `password` is base64, and is decoded for nothing but the call that needs
    the value."""

    uuid: str
    usage_type: str
    usage_id: str
    password: Secret
    description: str = ""

    @property
    def of_vms(self) -> bool:
        """Whether it lives as long as the VMs that were started with it."""
        return self.usage_id.startswith(OF_VMS)

    @property
    def usage(self) -> tuple[str, str]:
        return self.usage_type, self.usage_id

    def value(self) -> bytes:
        """What opens the storage.  Never keep or show it."""
        return base64.b64decode(self.password.reveal())

    def xml(self) -> str:
        """libvirt's definition: kept in libvirt's memory only, given to nobody who asks."""
        root = Xml.Element("secret", ephemeral="yes", private="yes")
        Xml.SubElement(root, "uuid").text = self.uuid
        Xml.SubElement(root, "description").text = self.description
        usage = Xml.SubElement(root, "usage", type=self.usage_type)
        Xml.SubElement(usage, USAGES[self.usage_type]).text = self.usage_id
        return Xml.tostring(root, encoding="unicode")
