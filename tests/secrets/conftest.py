# SPDX-License-Identifier: GPL-2.0-or-later
"""A real libvirt, whose secrets can be read back."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import libvirt
import pytest

from functional.guests.libvirtd import Libvirtd
from vdsm_storage.base.secret import Secret
from vdsm_storage.secrets.libvirt_keyring import LibvirtKeyring
from vdsm_storage.secrets.model import Entry

T = TypeVar("T")


class Direct:
    """A connection without a loop of its own; for one thread."""

    def __init__(self, uri: str) -> None:
        self.connection = libvirt.open(uri)

    def call(self, _name: str, function: Callable[[Any], T], _timeout: float | None = None) -> T:
        return function(self.connection)


class ReadableKeyring(LibvirtKeyring):
    """Defines secrets that libvirt gives out again, so that values can be compared."""

    def __init__(self, direct: Direct) -> None:
        super().__init__(direct)
        self.connection = direct.connection

    def define(self, entry: Entry) -> None:
        xml = entry.xml().replace('private="yes"', 'private="no"')
        self._call("define", lambda it: it.secretDefineXML(xml, 0).setValue(entry.value(), 0))

    def values(self) -> dict[str, tuple[str, bytes | None]]:
        """UUID -> usage id and value of every secret there is."""
        found = {}
        for secret in self.connection.listAllSecrets(0):
            try:
                value = secret.value(0)
            except libvirt.libvirtError:
                value = None
            found[secret.UUIDString()] = (secret.usageID(), value)
        return found

    def wipe(self) -> None:
        for secret in self.connection.listAllSecrets(0):
            secret.undefine()


@pytest.fixture(scope="session")
def libvirtd() -> Iterator[Libvirtd]:
    base = os.environ.get("TMPDIR", "/var/tmp")
    directory = Path(tempfile.mkdtemp(prefix="k", dir=base))
    daemon = Libvirtd(directory)
    daemon.start()
    yield daemon
    daemon.stop()
    shutil.rmtree(directory)


@pytest.fixture
def keyring(libvirtd: Libvirtd) -> Iterator[ReadableKeyring]:
    """Empty."""
    made = ReadableKeyring(Direct(libvirtd.uri))
    made.wipe()
    yield made
    made.wipe()
    made.connection.close()


def entry(uuid: str, usage: str, password: str = "dmFsdWU=", kind: str = "ceph") -> Entry:
    return Entry(uuid, kind, usage, Secret(password), "a <description> & more")
