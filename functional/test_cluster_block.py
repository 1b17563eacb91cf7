# SPDX-License-Identifier: GPL-2.0-or-later
"""One block domain on a disk that three hosts share, each a guest with a kernel and a sanlock of
its own: two change it without a manager; one loses its storage, one is killed, while it manages it.
VMs on all three write to volumes that must grow, before and after that.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator, Sequence
from typing import Any

import pytest

from functional.guests.spread import STRIDE
from functional.lab.agent import DIRECTORY, PORT, GuestAgent
from functional.lab.cluster import cluster
from functional.lab.guest import Guest, why_not
from functional.onward_hosts import Place, Writer, check_all, start_libvirt
from vdsm_storage.rpc.client import Client, NoResponse, RemoteError

GIB = 1024**3
EXTENT = 128 * 1024**2
BLANK = str(uuid.UUID(int=0))
DISK = "/dev/vdb"
LAYER = "lun-a"  # of host a, over the disk: it can hang and fail there alone
IO_TIMEOUT = 2
FIRST = 4  # extents that their volumes begin with
PACE = 6  # numbers a second that guests write, of 2 MiB
LOG = f"{DIRECTORY}/agent.log"
ANSWERED = 10  # seconds after which nothing comes any more that a host did before it was killed
THIN = {
    "headroom_min": 3 * EXTENT, "headroom_max": 6 * EXTENT, "chunk_min": EXTENT,
    "chunk_max": EXTENT, "first_latency": 4, "throttle_floor": 2 * 1024**2,
}  # fmt: skip
# A dead host's leases are free after eight I/O time-outs and a minute (sanlock); an emulated one is
# slow at everything else.
TAKEOVER = 8 * IO_TIMEOUT + 60 + 120

pytestmark = [
    pytest.mark.skipif(bool(why_not()), reason=why_not() or "-"),
    pytest.mark.timeout(0),  # the laboratory has time limits of its own
]


class Host:
    """A guest with an agent that uses `device`."""

    def __init__(self, guest: Guest, number: int, device: str) -> None:
        self.guest = guest
        self.number = number
        self.device = device
        self.agent = GuestAgent(guest)
        self.client: Client | None = None

    def start(self) -> None:
        settings = {
            "lvm__devices": self.device, "storage__lock_timeout": "20",
            "libvirt__uri": "qemu:///system", "libvirt__timeout": "60", "libvirt__retry": "1",
            **{f"thin__{name}": str(value) for name, value in THIN.items()},
        }  # fmt: skip
        self.agent.start(sanlock__io_timeout=str(IO_TIMEOUT), **settings)
        self.client = self.agent.client()

    def call(self, verb: str, **params: Any) -> Any:
        assert self.client is not None
        return self.client.call(verb, params)

    def code(self, verb: str, **params: Any) -> int:
        try:
            self.call(verb, **params)
        except RemoteError as error:
            return error.code
        return 0

    def finished(self, task: str) -> int:
        """The code with which a task ended."""
        end = time.monotonic() + 300
        while (status := self.call("Task.getStatus", taskID=task))["taskState"] != "finished":
            assert time.monotonic() < end, status
            time.sleep(0.2)
        self.call("Task.clear", taskID=task)
        return int(status["code"])

    def lvm(self, command: str, *words: str) -> str:
        """The guest's own lvm, which knows nothing of the agent's."""
        run = self.guest.run(command, "--devices", self.device, *words, timeout=60)
        return run.check().out


class Pool:
    """A domain on the shared disk, made by host a; all are connected to its pool."""

    def __init__(self, a: Host, b: Host, c: Host) -> None:
        self.a, self.b, self.c = a, b, c
        self.id, self.domain = str(uuid.uuid4()), str(uuid.uuid4())
        group = a.call("LVMVolumeGroup.create", name=self.domain, devlist=[LAYER], force=False)
        a.call(
            "StorageDomain.create", storagedomainID=self.domain, domainType=3, typeArgs=group,
            name="shared", domainClass=1, version="5", blockSize=512, maxHosts=250,
        )  # fmt: skip
        a.call(
            "StoragePool.create", storagepoolID=self.id, name="shared", masterSdUUID=self.domain,
            masterVersion=1, domainList=[self.domain], lockRenewalIntervalSec=5, leaseTimeSec=60,
            ioOpTimeoutSec=10, leaseRetries=3,
        )  # fmt: skip
        for host in (a, b, c):
            self.connect(host)

    def connect(self, host: Host) -> None:
        host.call(
            "StoragePool.connect", storagepoolID=self.id, hostID=host.number, scsiKey=self.id,
            masterSdUUID=self.domain, masterVersion=1, domainDict={self.domain: "active"},
        )  # fmt: skip
        wait_for("the host id", lambda: self.health(host).get("acquired"), 180)

    def health(self, host: Host) -> dict[str, Any]:
        found: dict[str, Any] = host.call("Host.getStats")["storageDomains"].get(self.domain, {})
        return found

    def new(self) -> dict[str, Any]:
        return {
            "storagepoolID": self.id, "storagedomainID": self.domain,
            "imageID": str(uuid.uuid4()), "volumeID": str(uuid.uuid4()),
        }  # fmt: skip

    def begin(self, host: Host, ids: dict[str, Any]) -> str:
        task: str = host.call(
            "Volume.create", **ids, size=str(EXTENT), volFormat=5, preallocate=1, diskType="DATA",
            desc="", srcImgUUID=BLANK, srcVolUUID=BLANK,
        )  # fmt: skip
        return task

    def create(self, host: Host) -> dict[str, Any]:
        ids = self.new()
        assert host.finished(self.begin(host, ids)) == 0
        return ids

    def become_manager(self, host: Host, tries: int = 1) -> None:
        """Others may have the lease for a moment, again and again."""
        where = {"storagepoolID": self.id}
        codes: list[int] = []
        while 0 not in codes and len(codes) < tries:
            task = host.call("StoragePool.spmStart", **where, prevID=-1, prevLver="-1",
                             enableScsiFencing="false", maxHostID=250, domVersion="5")  # fmt: skip
            codes.append(host.finished(task))
        assert codes[-1] == 0, codes
        assert host.call("StoragePool.getSpmStatus", **where)["spmStatus"] == "SPM"

    def volumes(self, host: Host) -> set[str]:
        """By lvm, on the storage as the host sees it."""
        out = host.lvm("lvs", "--noheadings", "-o", "lv_name", self.domain)
        return {name for name in out.split() if len(name) == 36}

    def seqno(self, host: Host) -> int:
        return int(host.lvm("vgs", "--noheadings", "-o", "vg_seqno", self.domain))

    def create_when_free(self, host: Host) -> tuple[dict[str, Any], float]:
        """Try until the lease is free; the volume, and the seconds that it took."""
        began = time.monotonic()
        while True:
            ids = self.new()
            task = self.begin_if_free(host, ids)
            if task:
                assert host.finished(task) == 0
                return ids, time.monotonic() - began
            assert time.monotonic() - began < TAKEOVER

    def begin_if_free(self, host: Host, ids: dict[str, Any]) -> str:
        """The task, or "" when another host has the lease."""
        try:
            return self.begin(host, ids)
        except RemoteError as error:
            if error.code != 654:
                raise
            return ""


def wait_for(what: str, condition: Any, timeout: float) -> None:
    end = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < end, f"still not after {timeout:g} s: {what}"
        time.sleep(0.5)


def table(guest: Guest, kind: str) -> None:
    """What is asked of host a's disk from now on; what hangs is done, or fails, by that too."""
    sectors = guest.run("blockdev", "--getsz", DISK).check().out.strip()
    target = f"linear {DISK} 0" if kind == "linear" else kind
    for argv in (
        ("dmsetup", "load", LAYER, "--table", f"0 {sectors} {target}"),
        ("dmsetup", "suspend", "--noflush", "--nolockfs", LAYER),
        ("dmsetup", "resume", "--noudevsync", LAYER),
    ):
        guest.run(*argv).check()


@pytest.fixture(scope="module")
def pool() -> Iterator[Pool]:
    with cluster(3, shared=(16 * GIB,), forward=(PORT,), memory=1536) as (one, two, three):
        for guest in (one, two, three):
            start_libvirt(guest)
        sectors = one.run("blockdev", "--getsz", DISK).check().out.strip()
        linear = f"0 {sectors} linear {DISK} 0"
        one.run("dmsetup", "create", LAYER, "--table", linear).check()
        a, b, c = Host(one, 1, f"/dev/mapper/{LAYER}"), Host(two, 2, DISK), Host(three, 3, DISK)
        for host in (a, b, c):
            host.start()
        yield Pool(a, b, c)


@pytest.fixture(scope="module")
def writers(pool: Pool) -> Sequence[Writer]:
    """On each host a guest whose volume must grow, of 2 MiB for each number that it writes."""
    place = Place(pool.id, pool.domain, str(pool.a.guest.settings.disks[0].path))
    made = []
    for host in (pool.a, pool.b, pool.c):
        assert host.client is not None
        made.append(Writer(place, host.agent, host.client, FIRST))
    for each in made:
        each.start(PACE)
    return made


def test_both_change_it_without_a_manager(pool: Pool) -> None:
    mine = [(host, pool.new()) for _ in range(3) for host in (pool.a, pool.b)]
    tasks = [(host, begin_patiently(pool, host, ids)) for host, ids in mine]
    assert [host.finished(task) for host, task in tasks] == [0] * len(tasks)
    names = {ids["volumeID"] for _, ids in mine}
    assert names <= pool.volumes(pool.a) == pool.volumes(pool.b)
    slots = pool.b.lvm("lvs", "--noheadings", "-o", "lv_tags", pool.domain).split()
    numbers = [tag for row in slots for tag in row.split(",") if tag.startswith("MD_")]
    assert len(numbers) == len(set(numbers)) == len(names)
    ids = mine[0][1]  # made by a, written by b, read by a
    for host, command in ((pool.b, "write -P 0x5a 0 1M"), (pool.a, "read -P 0x5a 0 1M")):
        path = host.call("Image.prepare", **ids)["path"]
        host.guest.run("qemu-io", "-f", "raw", "-n", "-c", command, path).check()
        host.call("Image.teardown", **ids)


def begin_patiently(pool: Pool, host: Host, ids: dict[str, Any]) -> str:
    """Hosts that meet at the lease may have to try again."""
    for _ in range(10):
        if task := pool.begin_if_free(host, ids):
            return task
    raise AssertionError("the lease was never free")


def test_a_host_whose_storage_hung_writes_no_more(pool: Pool) -> None:
    """Its disk hangs while it is the manager, with a creation under way, and fails afterwards, as
    multipath makes it.  Then the other host works alone, and the first can come back."""
    a, b = pool.a, pool.b
    pool.become_manager(a)
    assert b.code("Volume.create", **creation(pool)) == 654
    table_hangs(a.guest)
    lost = pool.new()
    assert a.client is not None
    pending = a.client.submit("Volume.create", {**creation(pool), **lost})
    _, seconds = pool.create_when_free(b)
    assert seconds > 8 * IO_TIMEOUT  # it kept the lease as long as it could be alive
    before = (pool.seqno(b), pool.volumes(b))
    table(a.guest, "error")
    with pytest.raises((RemoteError, NoResponse)):
        raise_if_failed(a, pending.result(120))
    time.sleep(5)
    assert (pool.seqno(b), pool.volumes(b)) == before
    assert lost["volumeID"] not in before[1]
    table(a.guest, "linear")
    wait_for("the domain on a", lambda: pool.health(a).get("valid"), 120)
    wait_for("its host id", lambda: pool.health(a).get("acquired"), 240)
    status = a.call("StoragePool.getSpmStatus", storagepoolID=pool.id)
    assert status["spmStatus"] != "SPM"
    found, _ = pool.create_when_free(a)
    assert found["volumeID"] in pool.volumes(b)
    assert lost["volumeID"] not in pool.volumes(b)


def table_hangs(guest: Guest) -> None:
    guest.run("dmsetup", "suspend", "--noflush", "--nolockfs", LAYER).check()


def creation(pool: Pool) -> dict[str, Any]:
    return {
        **pool.new(), "size": str(EXTENT), "volFormat": 5, "preallocate": 1, "diskType": "DATA",
        "desc": "", "srcImgUUID": BLANK, "srcVolUUID": BLANK,
    }  # fmt: skip


def raise_if_failed(host: Host, task: str) -> None:
    """A task that was begun counts as failed when it ends so."""
    if code := host.finished(task):
        raise RemoteError(code, "the task failed")


def test_volumes_of_three_hosts_grow_at_once(writers: Sequence[Writer]) -> None:
    """Without a manager.  No guest waits for space that writes less than what is kept free for it
    while its volume is extended; after a slow extension the next one begins at once, with what is
    left of headroom and chunk, which this chunk is too small for."""
    headroom, chunk = THIN["headroom_min"], THIN["chunk_min"]
    kept = min(headroom, (headroom + chunk) / 2) / (PACE * STRIDE)  # seconds
    for each in writers:
        each.wait_told()
    for each in writers:
        each.wait_extends(2)
    for each in writers:
        each.wait_told()
        found = each.wait_thin()
        assert found["pauses"] == "0" or float(found["maxLatency"]) > kept


def test_a_manager_lets_volumes_of_other_hosts_grow(pool: Pool, writers: Sequence[Writer]) -> None:
    """It is asked by the mailbox; its own guest is one of them."""
    pool.become_manager(pool.a, tries=5)
    before = [each.extends() for each in writers]
    for each, extends in zip(writers, before, strict=True):
        each.wait_extends(extends + 1)
    for host in (pool.b, pool.c):
        host.guest.run("grep", "-q", "asking the manager", LOG).check()
    status = pool.a.call("StoragePool.getSpmStatus", storagepoolID=pool.id)
    assert status["spmStatus"] == "SPM"  # all the time


def test_a_killed_managers_lease_goes_to_the_next(pool: Pool, writers: Sequence[Writer]) -> None:
    """Guests of the others may have to wait for it, and go on with all that they wrote."""
    a, b = pool.a, pool.b
    lost, *others = writers
    lost.told()
    a.guest.kill()
    killed = time.monotonic()
    time.sleep(ANSWERED)
    before = [each.extends() for each in others]
    for each, extends in zip(others, before, strict=True):
        each.wait_extends(extends + 1, TAKEOVER)
    assert time.monotonic() - killed > 60
    for each in others:
        each.wait_told(10)
        each.destroy()
    found, _ = pool.create_when_free(b)
    assert found["volumeID"] in pool.volumes(b)
    pool.become_manager(b)
    check_all(lost.place, writers)
