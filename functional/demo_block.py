# SPDX-License-Identifier: GPL-2.0-or-later
"""The block chapter of make demo: a domain on a LUN, on a kernel with device-mapper.

Run by demo.py, here or in a guest of the laboratory.  Exit 0 only if every check holds.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from pathlib import Path
from typing import Any

from functional.demo import BLANK, GIB, CheckFailedError, Demo, check, say, title, tool
from vdsm_storage.rpc.client import Client, RemoteError

MIB = 1024**2
EXTENT = 128 * MIB
SPECIAL = ("metadata", "ids", "inbox", "outbox", "leases", "xleases", "master")


class BlockDemo(Demo):
    """One agent, one pool, one block domain on one LUN."""

    def make_lun(self) -> None:
        disk = self.dir / "lun.img"
        with open(disk, "wb") as file:
            file.truncate(8 * GIB)
        self.loop = tool("losetup", "--find", "--show", str(disk)).strip()
        self.guid = os.path.basename(self.loop)
        self.settings = [f"lvm.devices={self.loop}"]

    def start(self, crash_point: str = "") -> None:
        argv = [sys.executable, "-P", "-m", "vdsm_storage", "--dev", str(self.dir / "agent")]
        for setting in ("sanlock.io_timeout=2", "storage.monitor_interval=1", *self.settings):
            argv += ["--set", setting]
        env = {**os.environ, "VDSM_STORAGE_CRASH": crash_point}
        self.agent = subprocess.Popen(argv, stdout=subprocess.PIPE, text=True, env=env)
        assert self.agent.stdout is not None
        check("the agent serves", self.agent.stdout.readline().startswith("ready "))
        self.client = Client.dev(str(self.dir / "agent"), timeout=170)

    # -- what the installed lvm says, with a configuration of its own ----------------------------

    def lvm(self, command: str, *words: str) -> str:
        return tool(command, "--devices", self.loop, *words)

    def lvs(self) -> dict[str, dict[str, str]]:
        fields = "lv_name,lv_size,lv_tags,seg_start_pe,devices"
        text = self.lvm("lvs", "--reportformat", "json", "--units", "b", "--nosuffix",
                        "-o", fields, self.domain)  # fmt: skip
        return {row["lv_name"]: row for row in json.loads(text)["report"][0]["lv"]}

    def seqno(self) -> int:
        return int(self.lvm("vgs", "--noheadings", "-o", "vg_seqno", self.domain))

    # -- verbs -----------------------------------------------------------------------------------

    def connect(self) -> None:
        self.call(
            "StoragePool.connect", storagepoolID=self.pool, hostID=1, scsiKey=self.pool,
            masterSdUUID=self.domain, masterVersion=1, domainDict={self.domain: "active"},
        )  # fmt: skip
        self.settle()

    def settle(self) -> None:
        """Until this host can take leases."""
        end = time.monotonic() + 120
        while time.monotonic() < end:
            found = self.call("Host.getStats")["storageDomains"].get(self.domain, {})
            if found.get("acquired"):
                return
            time.sleep(0.5)
        raise CheckFailedError("no host id on the domain after 120 s")

    def ids(self, image: str, volume: str) -> dict[str, str]:
        return {
            "storagepoolID": self.pool, "storagedomainID": self.domain, "imageID": image,
            "volumeID": volume,
        }  # fmt: skip

    def request(self, ids: dict[str, str], parent: str = BLANK) -> dict[str, Any]:
        """A raw disk of one extent, or a snapshot upon `parent`."""
        kind = (
            {"volFormat": 5, "preallocate": 1}
            if parent == BLANK
            else {"volFormat": 4, "preallocate": 2}
        )
        return {
            **ids, **kind, "size": str(EXTENT), "diskType": "DATA", "desc": "demo",
            "srcImgUUID": ids["imageID"] if parent != BLANK else BLANK, "srcVolUUID": parent,
        }  # fmt: skip


def make_domain(demo: BlockDemo) -> None:
    title("A volume group on a LUN becomes a storage domain")
    group = demo.call("LVMVolumeGroup.create", name=demo.domain, devlist=[demo.guid], force=False)
    demo.call(
        "StorageDomain.create", storagedomainID=demo.domain, domainType=3, typeArgs=group,
        name="demo", domainClass=1, version="5", blockSize=512, maxHosts=250,
    )  # fmt: skip
    found = demo.lvs()
    order = sorted(found, key=lambda lv: int(found[lv]["devices"].split("(")[1].rstrip(")")))
    check(f"its special volumes follow each other: {', '.join(order)}", tuple(order) == SPECIAL)
    demo.call(
        "StoragePool.create", storagepoolID=demo.pool, name="demo", masterSdUUID=demo.domain,
        masterVersion=1, domainList=[demo.domain], lockRenewalIntervalSec=5, leaseTimeSec=60,
        ioOpTimeoutSec=10, leaseRetries=3,
    )  # fmt: skip
    demo.connect()
    tags = demo.lvm("vgs", "--noheadings", "-o", "vg_tags", demo.domain)
    check("the group's tags are the domain's metadata", "MDT_ROLE=Master" in tags)


def use_volumes(demo: BlockDemo) -> tuple[dict[str, str], dict[str, str]]:
    title("A disk and a snapshot of it, one logical volume each")
    image = str(uuid.uuid4())
    base, top = (demo.ids(image, str(uuid.uuid4())) for _ in range(2))
    demo.task("Volume.create", **demo.request(base))
    demo.task("Volume.create", **demo.request(top, base["volumeID"]))
    for name in (base["volumeID"], top["volumeID"]):
        say(f"   {name}  {demo.lvs()[name]['lv_tags']}")
    path = demo.call("Image.prepare", **top)["path"]
    tool("qemu-io", "-f", "qcow2", "-c", "write -P 0x5a 0 1M", path)
    device = os.path.realpath(path)
    check(f"a guest would open {device}", device.startswith("/dev/dm-"))
    demo.task("Volume.extendSize", **top, newSize=str(2 * EXTENT))
    tool("qemu-io", "-f", "qcow2", "-c", "read -P 0x5a 0 1M", "-c", "write 200M 1M", path)
    demo.call("Image.teardown", **top)
    check("after teardown no device is left", not os.path.exists(device))
    lease = demo.call("Volume.getInfo", **top)["lease"]
    dump = tool("sanlock", "direct", "dump", f"{lease['path']}:{MIB}:{200 * MIB}")
    check("sanlock shows the domain's lease and the volumes'",
          "SDM" in dump and base["volumeID"] in dump and top["volumeID"] in dump)  # fmt: skip
    return base, top


def storm(demo: BlockDemo, base: dict[str, str]) -> None:
    title("Ten disks are made at once")
    before = demo.seqno()
    requests = [demo.request(demo.ids(str(uuid.uuid4()), str(uuid.uuid4()))) for _ in range(10)]
    began = time.monotonic()
    tasks = [demo.call("Volume.create", **request) for request in requests]
    for task in tasks:
        while (status := demo.call("Task.getStatus", taskID=task))["taskState"] != "finished":
            time.sleep(0.05)
        check(f"task {task[:8]} is done", status["code"] == 0)
        demo.call("Task.clear", taskID=task)
    commits = demo.seqno() - before
    say(f"   {time.monotonic() - began:.1f} s, {commits} commits of LVM for 20 changes")
    check("they shared their commits", commits < 20)
    for request in requests:
        demo.task("Image.delete", storagepoolID=demo.pool, storagedomainID=demo.domain,
                  imageID=request["imageID"], postZero="false", force="false")  # fmt: skip


def crash(demo: BlockDemo, base: dict[str, str]) -> None:
    title("kill -9 between a volume's making and its publishing")
    demo.kill()
    demo.start("volume.create:made")
    demo.settle()
    lost = demo.ids(str(uuid.uuid4()), str(uuid.uuid4()))
    demo.call("Volume.create", **demo.request(lost))
    assert demo.agent is not None
    check("the agent died there", demo.agent.wait(60) == -signal.SIGKILL)
    check(
        "a volume is half made", "OVIRT_VOL_INITIALIZING" in demo.lvs()[lost["volumeID"]]["lv_tags"]
    )
    assert demo.client is not None
    demo.client.close()
    demo.start()
    end = time.monotonic() + 120
    while lost["volumeID"] in demo.lvs() and time.monotonic() < end:
        time.sleep(0.5)
    check("the restarted agent took it back", lost["volumeID"] not in demo.lvs())
    check("the other volumes are whole", base["volumeID"] in demo.lvs())


def end(demo: BlockDemo) -> None:
    title("The domain goes, the LUN is free again")
    where = {"storagedomainID": demo.domain, "storagepoolID": demo.pool}
    demo.call("StoragePool.destroy", storagepoolID=demo.pool, hostID=1, scsiKey=demo.pool)
    until = time.monotonic() + 60
    while time.monotonic() < until:
        try:
            demo.call(
                "StorageDomain.format", storagedomainID=where["storagedomainID"], autoDetach=False
            )
            break
        except RemoteError as error:
            if error.code not in (391, 392, 654, 661):
                raise
            time.sleep(1)
    check("nothing is on it", demo.lvm("pvs", "--noheadings").strip() == "")
    demo.stop()
    left = [row for row in tool("dmsetup", "ls").splitlines() if demo.domain[:8] in row]
    check("no device is left", left == [])


def main() -> int:
    directory = Path(tempfile.mkdtemp(prefix="vdsm-demo-block-", dir="/var/tmp"))
    demo = BlockDemo(directory)
    try:
        demo.make_lun()
        demo.start()
        make_domain(demo)
        base, _ = use_volumes(demo)
        storm(demo, base)
        crash(demo, base)
        end(demo)
    except (CheckFailedError, RemoteError) as error:
        say(f"\nThe block chapter failed: {error}")
        log = directory / "agent" / "agent.log"
        say("\n".join(log.read_text(errors="replace").splitlines()[-40:]) if log.exists() else "")
        return 1
    finally:
        if demo.agent is not None and demo.agent.poll() is None:
            demo.agent.terminate()
            demo.agent.wait(60)
        if demo.loop:
            subprocess.run(["losetup", "--detach", demo.loop], check=False, timeout=20)
    shutil.rmtree(directory)
    return 0


if __name__ == "__main__":
    sys.exit(main())
