# SPDX-License-Identifier: GPL-2.0-or-later
"""Guests that write ever onward on the hosts of a cluster, which are guests themselves.

See guests/spread.py.  All is asked from outside: of the agents, and of the disk's file.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from functional.checker.check import HALF_MADE, MARKED, Expected, Promised, check
from functional.checker.group import Group, read_group
from functional.guests import spread, writer
from functional.guests.guest import Disk, Plan, definition
from functional.guests.libvirtd import ACCOUNT, FOLDERS, QEMU_CONF
from functional.lab.agent import GuestAgent
from functional.lab.guest import Guest
from functional.vm_disks import ENGINE
from vdsm_storage.rpc.client import Client

EXTENT = 128 * 1024**2
BLANK = str(uuid.UUID(int=0))
COW, SPARSE = 4, 2
PATIENCE = 300.0  # seconds
LIBVIRTD = f"""
grep -q ^{ACCOUNT}: /etc/passwd || echo {ACCOUNT}:x:64055:64055::/:/bin/false >>/etc/passwd
grep -q ^{ACCOUNT}: /etc/group || echo {ACCOUNT}:x:64055: >>/etc/group
mkdir -p {" ".join(FOLDERS.values())}
echo '{QEMU_CONF}' >/etc/libvirt/qemu.conf
echo 'auth_unix_rw = "none"
unix_sock_group = "root"' >/etc/libvirt/libvirtd.conf
libvirtd --daemon
"""


def start_libvirt(guest: Guest) -> None:
    """Returns at once: the first time it asks QEMU what that can."""
    guest.run("sh", "-ec", LIBVIRTD, cwd="/").check()


@dataclass(frozen=True)
class Place:
    pool: str
    domain: str
    file: str  # the shared disk, outside


class Writer:
    """A VM of `agent`'s host that runs when it `started`."""

    def __init__(self, place: Place, agent: GuestAgent, client: Client, extents: int) -> None:
        self.place = place
        self.guest = agent.guest
        self.client = client
        self.id, self.image, self.volume = (str(uuid.uuid4()) for _ in range(3))
        self.serial = f"/var/tmp/{self.id}.numbers"
        self.known = 0  # the last number that we know to be written
        self.promised = 0  # bytes that its volume was seen to have
        ids = {"storagepoolID": place.pool, "storagedomainID": place.domain,
               "imageID": self.image, "volumeID": self.volume}  # fmt: skip
        task = self._call(
            "Volume.create", **ids, size=str(spread.CAPACITY), volFormat=COW, preallocate=SPARSE,
            diskType="DATA", desc="", srcImgUUID=BLANK, srcVolUUID=BLANK,
            initialSize=str(extents * EXTENT * 10 // 11),
        )  # fmt: skip
        while (status := self._call("Task.getStatus", taskID=task))["taskState"] != "finished":
            time.sleep(0.2)
        assert status["code"] == 0, status
        path = self._call("Image.prepare", **ids)["path"]
        sector = self.guest.directory / "sector"
        sector.write_bytes(spread.boot_sector())
        for argv in spread.commands(path, str(sector)):
            self.guest.run(*argv).check()
        self._call("Image.teardown", **ids)

    def start(self, pace: int) -> None:
        """So many numbers a second at most.  Returns before the VM runs."""
        ids = {"poolID": self.place.pool, "domainID": self.place.domain, "imageID": self.image,
               "volumeID": self.volume}  # fmt: skip
        record = "".join(f"<ovirt-vm:{key}>{value}</ovirt-vm:{key}>" for key, value in ids.items())
        tune = f"<iotune><write_iops_sec>{pace}</write_iops_sec></iotune>"
        hint = f"/rhev/data-center/{self.place.pool}/{self.place.domain}/images/{self.image}"
        plan = Plan(
            f"writer-{self.guest.name}", (Disk(f"{hint}/{self.volume}", "raw", self.image, tune),),
            agent=False, id=self.id, devices=writer.serial_xml(self.serial),
            metadata=f'<ovirt-vm:vm xmlns:ovirt-vm="{ENGINE}"><ovirt-vm:device devtype="disk"'
            f' name="vda">{record}</ovirt-vm:device></ovirt-vm:vm>',
        )  # fmt: skip
        xml = definition(plan, self.guest.directory)
        self._call("VM.create", vmID=self.id, vmParams={"vmId": self.id, "xml": xml})

    def destroy(self) -> None:
        self._call("VM.destroy", vmID=self.id)

    def _call(self, verb: str, **params: Any) -> Any:
        return self.client.call(verb, params)

    def told(self) -> int:
        """The last number that is known to be on the storage."""
        out = self.guest.run("tail", "-c", str(writer.TAIL), self.serial).out
        self.known = max(self.known, writer.last(out.encode()))
        return self.known

    def thin(self) -> dict[str, Any]:
        """{} when it is not known just now."""
        (stats,) = self._call("VM.getStats", vmID=self.id)
        found: dict[str, Any] = stats.get("disks", {}).get("vda", {}).get("thin", {})
        self.promised = max(self.promised, int(found.get("size", 0)))
        return found

    def wait_thin(self) -> dict[str, Any]:
        end = time.monotonic() + PATIENCE
        while not (found := self.thin()):
            assert time.monotonic() < end, "nothing is known of the disk"
            time.sleep(0.5)
        return found

    def extends(self) -> int:
        return int(self.wait_thin()["extends"])

    def wait_extends(self, wanted: int, timeout: float = PATIENCE) -> None:
        end = time.monotonic() + timeout
        while self.extends() < wanted:
            assert time.monotonic() < end, (self.guest.name, self.thin())
            time.sleep(0.5)

    def wait_told(self, more: int = 1) -> None:
        wanted, end = self.told() + more, time.monotonic() + PATIENCE
        while self.told() < wanted:
            assert time.monotonic() < end, (self.guest.name, self.thin())
            time.sleep(0.5)


def check_all(place: Place, writers: Sequence[Writer]) -> None:
    """While none of them runs: the domain is sound, no extent is in two volumes, each volume has
    what it was said to have, and the numbers in it are those that were told."""
    promised = {
        each.volume: Promised(each.image, spread.CAPACITY, each.promised) for each in writers
    }
    group = _group(place)
    unsure = frozenset(group.lvs) - set(promised)
    assert check(
        [place.file], place.domain, Expected(promised, unsure), allow=(HALF_MADE, MARKED)
    ) == []  # fmt: skip
    for each in writers:
        assert spread.check(group, each.volume, each.known) >= each.known


def _group(place: Place) -> Group:
    problems: list[str] = []
    group = read_group([place.file], place.domain, problems)
    assert problems == []
    assert group is not None
    return group
