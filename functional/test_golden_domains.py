# SPDX-License-Identifier: GPL-2.0-or-later
"""Block domains that VDSM made on real LVM, laid out again: an agent opens and changes them."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from functional.block_hosts import BLANK, COW, PREALLOCATED, RAW, SPARSE, Host, new_id, wait_for
from functional.checker.check import check
from functional.golden_domain import PATTERN, GoldenDomain, is_sealed
from functional.luns import Luns
from functional.processes import AgentProcess
from functional.standin.process import StandInProcess

pytestmark = [pytest.mark.sanlock, pytest.mark.slow, pytest.mark.timeout(600)]

MIB = 1024**2


class Opened:
    """A golden domain, and an agent that has its LUNs.  Tests below go on where the one before
    ended."""

    def __init__(self, golden: GoldenDomain, host: Host) -> None:
        self.golden = golden
        self.host = host
        self.call = host.call
        self.domain, self.pool = golden.domain, golden.pool

    def ids(self, image: str, volume: str) -> dict[str, str]:
        return {
            "storagepoolID": self.pool, "storagedomainID": self.domain,
            "imageID": image, "volumeID": volume,
        }  # fmt: skip

    def info(self, image: str, volume: str) -> dict[str, Any]:
        found: dict[str, Any] = self.call("Volume.getInfo", **self.ids(image, volume))
        return found

    def done(self, verb: str, **params: Any) -> None:
        assert self.host.task(verb, **params) == 0

    def create(self, image: str, volume: str, **more: Any) -> None:
        given = {
            "size": str(256 * MIB), "volFormat": RAW, "preallocate": PREALLOCATED,
            "diskType": "DATA", "desc": "made here", "srcImgUUID": BLANK, "srcVolUUID": BLANK,
        }  # fmt: skip
        self.done("Volume.create", **self.ids(image, volume), **{**given, **more})

    def connect(self) -> None:
        self.call(
            "StoragePool.connect", storagepoolID=self.pool, hostID=1, scsiKey=self.pool,
            masterSdUUID=self.domain, masterVersion=1, domainDict={self.domain: "active"},
        )  # fmt: skip

        def usable() -> bool:
            state = self.call("Host.getStats")["storageDomains"].get(self.domain)
            return bool(state and state["valid"] and state["acquired"])

        wait_for(usable, "the domain to be usable")


@pytest.fixture(scope="module", params=["v4", "v5"])
def opened(
    request: pytest.FixtureRequest,
    workdir: Path,
    start_agent: Callable[..., AgentProcess],
) -> Iterator[Opened]:
    version = request.param
    directory = workdir / version
    directory.mkdir()
    luns = Luns(directory)
    standin = StandInProcess(directory / "dm", sync=False)
    standin.start()
    try:
        golden = GoldenDomain(version, luns, standin, io_timeout=0 if version == "v5" else 2)
        agent = start_agent(f"{version}-agent", False, standin, lvm__devices=luns.pattern)
        host = Host(1, agent, standin)
        host.connect()
        yield Opened(golden, host)
        host.client.close()
        assert agent.stop() == ""
        assert check(golden.devices, golden.domain) == []
    finally:
        left = standin.stop()
        luns.close()
    assert left == []


def test_it_is_found_as_it_was(opened: Opened) -> None:
    golden = opened.golden
    assert is_sealed(golden.group)
    assert check(golden.devices, golden.domain) == []
    where = {"storagedomainID": opened.domain}
    assert opened.call("StorageDomain.getInfo", **where) == golden.json("5-sd-info.json")
    stats, expected = opened.call("StorageDomain.getStats", **where), golden.json("5-sd-stats.json")
    free = [int(found.pop("mdafree")) for found in (stats, expected)]
    assert stats == expected
    assert abs(free[0] - free[1]) <= 1024  # the text has another host's name
    opened.call("StorageDomain.validate", **where)


def test_everything_in_it_is_read(opened: Opened) -> None:
    """The dump of all, leases and host ids of other hosts among it."""
    found = opened.call("StorageDomain.dump", sd_id=opened.domain, full=True)
    assert found == opened.golden.json("5-dump-full.json")
    volumes = opened.golden.given["volumes"]
    images = opened.call("StorageDomain.getImages", storagedomainID=opened.domain)
    assert sorted(images) == sorted({volume["img"] for volume in volumes})


def test_every_volume(opened: Opened) -> None:
    opened.connect()
    expected = opened.golden.json("4-volume-info.json")
    for volume, info in expected.items():
        found = opened.info(info["image"], volume)
        assert found["lease"].pop("path").endswith(f"{opened.domain}/leases")
        del info["lease"]["path"]
        assert found == info
        size = opened.call("Volume.getSize", **opened.ids(info["image"], volume))
        assert size == {key: info[key] for key in ("apparentsize", "truesize")}
        qemu = opened.call("Volume.getQemuImageInfo", **opened.ids(info["image"], volume))
        assert qemu["format"] == {"RAW": "raw", "COW": "qcow2"}[info["format"]]
        assert qemu["virtualsize"] == int(info["capacity"])


def test_a_guest_reads_its_disk(opened: Opened) -> None:
    """Through the snapshot, and the base below it."""
    volume = opened.golden.given["volumes"][1]
    ids = opened.ids(volume["img"], volume["vol"])
    path = opened.call("Image.prepare", **ids)["path"]
    argv = ["qemu-io", "-f", "qcow2", "-c", f"read -P {PATTERN} 0 1M", "-c", "read -P 0 1M 1M"]
    done = subprocess.run([*argv, path], capture_output=True, text=True, timeout=60, check=True)
    assert "fail" not in done.stdout
    opened.call("Image.teardown", **ids)
    assert volume["vol"] not in opened.host.standin.active(opened.domain)


def test_a_deleted_images_slot_and_extents_are_used_again(opened: Opened) -> None:
    """By the same requests as then; the group is afterwards as it was then."""
    golden = opened.golden
    doomed, new = golden.given["delete_img"], golden.given["reuse"]
    where = {"storagepoolID": opened.pool, "storagedomainID": opened.domain, "imageID": doomed}
    opened.done("Image.delete", **where, postZero="false", force="false")
    opened.create(new["img"], new["vol"], size=str(new["capacity"]), desc=new["desc"])
    expected = {
        row["lv_name"]: row for row in golden.json("8-slot-reused.lvs.json")["report"][0]["lv"]
    }
    extended = golden.given["extend"]["vol"]
    fields = ["vg_name", "lv_name", "lv_size", "devices", "lv_tags", "segtype"]
    rows = {row["lv_name"]: row for row in golden.luns.report("lvs", fields, opened.domain)}
    assert rows.keys() == expected.keys()
    for name, row in rows.items():
        if name == extended:
            continue
        theirs = expected[name]
        assert row["devices"].rpartition("/")[2] == theirs["devices"].rpartition("/")[2]
        assert set(row["lv_tags"].split(",")) == set(theirs["lv_tags"].split(","))
        assert (row["lv_size"], row["segtype"]) == (theirs["lv_size"], theirs["segtype"])


def test_it_is_worked_on(opened: Opened) -> None:
    given = opened.golden.given
    base, top = given["volumes"][0], given["volumes"][1]
    snapshot = new_id()
    opened.create(
        top["img"], snapshot, size=str(top["capacity"]), volFormat=COW, preallocate=SPARSE,
        srcImgUUID=top["img"], srcVolUUID=top["vol"],
    )  # fmt: skip
    assert opened.info(top["img"], top["vol"])["voltype"] == "INTERNAL"
    size = 2 * 1024 * MIB
    where = opened.ids(top["img"], snapshot)
    opened.done("Volume.extendSize", **where, newSize=str(size))
    assert opened.info(top["img"], snapshot)["capacity"] == str(size)
    opened.call("Volume.setDescription", **where, description="snapshot, ü")
    assert opened.info(top["img"], snapshot)["description"] == "snapshot, ü"
    opened.done("Volume.delete", **where, postZero="false", force="false")
    expected = opened.golden.json("4-volume-info.json")
    for volume in (base, top):  # as if nothing had been
        found, info = opened.info(volume["img"], volume["vol"]), expected[volume["vol"]]
        assert {**found, "lease": 0} == {**info, "lease": 0}


def test_external_leases_go_on(opened: Opened) -> None:
    kept, new = opened.golden.given["xleases"][1], new_id()
    lease = {"sd_id": opened.domain, "lease_id": kept}
    assert opened.call("Lease.info", lease=lease)["offset"] == 4 * MIB
    opened.done("Lease.create", lease={**lease, "lease_id": new})
    assert opened.call("Lease.info", lease={**lease, "lease_id": new})["offset"] == 3 * MIB
    opened.done("Lease.delete", lease=lease)
    found = opened.call("StorageDomain.dump", sd_id=opened.domain, full=True)["xleases"]
    assert found == {new: {"offset": 3 * MIB, "updating": False}}


def test_it_is_managed(opened: Opened) -> None:
    """The role of a pool manager, with the file system that it needs; and upgraded."""
    opened.done(
        "StoragePool.spmStart", storagepoolID=opened.pool, prevID=-1, prevLver="-1",
        enableScsiFencing="false", maxHostID=250, domVersion=opened.golden.version[1:],
    )  # fmt: skip
    status = opened.call("StoragePool.getSpmStatus", storagepoolID=opened.pool)
    assert (status["spmStatus"], status["spmId"]) == ("SPM", 1)
    opened.call("StoragePool.upgrade", storagepoolID=opened.pool, targetDomVersion=5)

    def upgraded() -> bool:
        info = opened.call("StorageDomain.getInfo", storagedomainID=opened.domain)
        return bool(info["version"] == "5")

    wait_for(upgraded, "the upgrade")
    opened.call("StoragePool.spmStop", storagepoolID=opened.pool)
    given = opened.golden.given["volumes"][3]
    info = opened.info(given["img"], given["vol"])
    expected = opened.golden.json("4-volume-info.json")[given["vol"]]
    assert json.dumps({**info, "lease": 0}) == json.dumps({**expected, "lease": 0})
    opened.create(new_id(), new_id())
