# SPDX-License-Identifier: GPL-2.0-or-later
"""make demo: an agent in a temporary directory, driven over TLS, on a real file system.

Creates a pool and a POSIX domain, makes a volume from a file system image, snapshots it, writes
through the chain, extends, measures, copies, verifies checksums, shows leases with their owners,
kills the agent in the middle of a copy and shows the recovery.  Then come the chapters on block
domains, on running VMs and on volumes that grow.  Exit 0 only if every check holds.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vdsm_storage.rpc.client import Client, RemoteError

MIB = 1024 * 1024
GIB = 1024 * MIB
BLANK = str(uuid.UUID(int=0))
BIN = Path(sys.executable).parent
ROOT = Path(__file__).resolve().parents[1]


class CheckFailedError(Exception):
    """A check did not hold."""


def say(text: str) -> None:
    print(text, flush=True)


def title(text: str) -> None:
    say(f"\n\033[1m{text}\033[0m" if sys.stdout.isatty() else f"\n== {text}")


def check(what: str, holds: bool) -> None:
    say(f"   {'ok  ' if holds else 'FAIL'}  {what}")
    if not holds:
        raise CheckFailedError(what)


def tool(*argv: str) -> str:
    done = subprocess.run(argv, capture_output=True, text=True, timeout=120, check=False)
    if done.returncode:
        raise CheckFailedError(f"{' '.join(argv)}: {done.stderr.strip()}")
    return done.stdout


class Demo:
    """One agent, one pool, one POSIX domain."""

    def __init__(self, directory: Path) -> None:
        self.dir = directory
        self.pool, self.domain = str(uuid.uuid4()), str(uuid.uuid4())
        self.agent: subprocess.Popen[str] | None = None
        self.client: Client | None = None
        self.loop = ""

    # -- the agent ---------------------------------------------------------------------------

    def start(self) -> None:
        began = time.monotonic()
        self.agent = subprocess.Popen(
            [BIN / "vdsm-storaged", "--dev", self.dir / "agent", "--set", "sanlock.io_timeout=2"],
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self.agent.stdout is not None
        line = self.agent.stdout.readline().split()
        check("the agent says that it serves", line[:1] == ["ready"])
        self.client = Client.dev(str(self.dir / "agent"))
        say(f"   port {line[1]}, ready after {time.monotonic() - began:.1f} s")

    def kill(self) -> None:
        assert self.agent is not None
        self.agent.send_signal(signal.SIGKILL)
        self.agent.wait(30)
        if self.client is not None:
            self.client.close()

    def stop(self) -> None:
        if self.client is not None:
            self.client.close()
        if self.agent is not None and self.agent.poll() is None:
            self.agent.terminate()
            check("the agent ends cleanly on SIGTERM", self.agent.wait(60) == 0)

    def call(self, verb: str, **params: Any) -> Any:
        assert self.client is not None
        return self.client.call(verb, params)

    def task(self, verb: str, **params: Any) -> None:
        """An SPM-style verb: a task to wait for and to clear."""
        task = self.call(verb, **params)
        while (status := self.call("Task.getStatus", taskID=task))["taskState"] != "finished":
            time.sleep(0.05)
        self.call("Task.clear", taskID=task)
        if status["code"] != 0:
            raise CheckFailedError(f"{verb}: {status}")

    def job(self, job: str) -> dict[str, Any]:
        """Wait for the end of a job."""
        while True:
            state: dict[str, Any] = self.call("Host.getJobs", job_ids=[job])[job]
            if state["status"] not in ("pending", "running", "aborting"):
                return state
            time.sleep(0.05)

    # -- storage -----------------------------------------------------------------------------

    def make_storage(self) -> None:
        disk = self.dir / "disk.img"
        with open(disk, "wb") as file:
            file.truncate(4 * GIB)
        tool("mkfs.ext4", "-q", str(disk))
        self.loop = tool("losetup", "--find", "--show", str(disk)).strip()
        connection = {
            "id": str(uuid.uuid4()), "connection": self.loop, "vfs_type": "ext4", "port": "",
            "iqn": "", "user": "", "password": "", "ipv6_enabled": "false",
        }  # fmt: skip
        status = self.call(
            "StoragePool.connectStorageServer",
            storagepoolID=BLANK, domainType=6, connectionParams=[connection],
        )  # fmt: skip
        check(f"{self.loop} (ext4) is mounted", status[0]["status"] == 0)
        self.call(
            "StorageDomain.create", storagedomainID=self.domain, domainType=6, domainClass=1,
            typeArgs=self.loop, name="demo", version="5", blockSize=512, maxHosts=250,
        )  # fmt: skip
        self.call(
            "StoragePool.create", storagepoolID=self.pool, name="demo", masterVersion=1,
            masterSdUUID=self.domain, domainList=[self.domain], lockRenewalIntervalSec=5,
            leaseTimeSec=60, ioOpTimeoutSec=10, leaseRetries=3,
        )  # fmt: skip
        self.call(
            "StoragePool.connect", storagepoolID=self.pool, hostID=1, scsiKey=self.pool,
            masterSdUUID=self.domain, masterVersion=1, domainDict={self.domain: "active"},
        )  # fmt: skip
        self.wait_host_id()
        info = self.call("StorageDomain.getInfo", storagedomainID=self.domain)
        say("   " + json.dumps(info, sort_keys=True))
        check("the domain is this pool's master", info["role"] == "Master")

    def wait_host_id(self) -> None:
        while True:
            state = self.call("Host.getStats")["storageDomains"].get(self.domain, {})
            if state.get("acquired"):
                break
            time.sleep(0.2)
        check("host id 1 is held (sanlock)", state["valid"])

    def create(self, image: str, size: int, **more: Any) -> str:
        volume = str(uuid.uuid4())
        request = {
            "volumeID": volume, "storagepoolID": self.pool, "storagedomainID": self.domain,
            "imageID": image, "size": str(size), "volFormat": 5, "preallocate": 2,
            "diskType": "DATA", "desc": "demo", "srcImgUUID": BLANK, "srcVolUUID": BLANK,
        }  # fmt: skip
        self.task("Volume.create", **{**request, **more})
        return volume

    def ids(self, image: str, volume: str) -> dict[str, str]:
        return {
            "storagepoolID": self.pool, "storagedomainID": self.domain,
            "imageID": image, "volumeID": volume,
        }  # fmt: skip

    def info(self, image: str, volume: str) -> dict[str, Any]:
        result: dict[str, Any] = self.call("Volume.getInfo", **self.ids(image, volume))
        return result

    @contextlib.contextmanager
    def prepared(self, image: str, volume: str) -> Iterator[str]:
        yield self.call("Image.prepare", **self.ids(image, volume))["path"]
        self.call("Image.teardown", **self.ids(image, volume))

    def content(self, image: str, volume: str) -> str:
        """SHA-256 of what a guest would read."""
        flat = self.dir / "flat.raw"
        with self.prepared(image, volume) as path:
            fmt = "qcow2" if self.info(image, volume)["format"] == "COW" else "raw"
            tool("qemu-img", "convert", "-f", fmt, "-O", "raw", path, str(flat))
        with open(flat, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        flat.unlink()
        return digest

    def start_copy(self, source: tuple[str, str], target: tuple[str, str]) -> str:
        job = str(uuid.uuid4())
        ends = [
            {"endpoint_type": "div", "sd_id": self.domain, "img_id": image, "vol_id": volume}
            for image, volume in (source, target)
        ]
        ends[1]["generation"] = self.info(*target)["generation"]
        self.call("SDM.copy_data", job_id=job, source=ends[0], destination=ends[1])
        return job


def volumes(demo: Demo) -> tuple[str, str]:
    """A volume with a real file system, a snapshot of it, and writes through the chain."""
    title("A volume from a file system image")
    tree = demo.dir / "tree"
    tree.mkdir()
    (tree / "hello").write_text("written before the snapshot\n")
    (tree / "random").write_bytes(os.urandom(48 * MIB))
    source = demo.dir / "fs.raw"
    tool("mke2fs", "-q", "-t", "ext4", "-d", str(tree), str(source), "128M")
    image = str(uuid.uuid4())
    base = demo.create(image, 128 * MIB)
    with demo.prepared(image, base) as path:
        tool("qemu-img", "convert", "-n", "-f", "raw", "-O", "raw", str(source), path)
    before = demo.content(image, base)
    with open(source, "rb") as file:
        same = hashlib.file_digest(file, "sha256").hexdigest() == before
    check("the volume holds the image, byte for byte", same)

    title("A snapshot, and writes through the chain")
    leaf = demo.create(image, 128 * MIB, volFormat=4, srcImgUUID=image, srcVolUUID=base, sequence=2)
    check("the base became internal", demo.info(image, base)["voltype"] == "INTERNAL")
    check("the snapshot reads as the base", demo.content(image, leaf) == before)
    with demo.prepared(image, leaf) as path:
        tool("qemu-io", "-f", "qcow2", "-c", "write -P 0x5a 1M 2M", path)
    check("the snapshot changed", demo.content(image, leaf) != before)
    check("the base did not", demo.content(image, base) == before)
    return image, leaf


def sizes(demo: Demo, image: str, leaf: str) -> None:
    title("Extend and measure")
    demo.task("Volume.extendSize", **demo.ids(image, leaf), newSize=str(256 * MIB))
    check("the capacity is 256 MiB", demo.info(image, leaf)["capacity"] == str(256 * MIB))
    needed = demo.call(
        "Volume.measure", **demo.ids(image, leaf), dstVolFormat=5, backing_chain=True
    )
    say("   " + json.dumps(needed, sort_keys=True))
    check("a raw copy needs just that", needed["required"] == 256 * MIB)


def copy(demo: Demo, image: str, leaf: str) -> tuple[str, str]:
    title("Copy the chain to one raw volume")
    target = str(uuid.uuid4())
    copied = demo.create(target, 256 * MIB)
    state = demo.job(demo.start_copy((image, leaf), (target, copied)))
    check("the copy is done", state["status"] == "done")
    check("the checksums agree", demo.content(image, leaf) == demo.content(target, copied))
    check("its generation went up", demo.info(target, copied)["generation"] == 1)
    return target, copied


def leases(demo: Demo, image: str, leaf: str) -> None:
    title("Leases")
    say("   volume lease: " + json.dumps(demo.info(image, leaf)["lease"], sort_keys=True))
    demo.call("StoragePool.spmStart", storagepoolID=demo.pool, prevID=-1, prevLver="-1",
              enableScsiFencing="false", maxHostID=250, domVersion="5")  # fmt: skip
    while (status := demo.call("StoragePool.getSpmStatus", storagepoolID=demo.pool))[
        "spmStatus"
    ] != "SPM":
        time.sleep(0.1)
    say("   as pool manager: " + json.dumps(status, sort_keys=True))
    run_dir = str(demo.dir / "agent" / "sanlock")
    shown = subprocess.run(
        ["sanlock", "client", "status"], env={**os.environ, "SANLOCK_RUN_DIR": run_dir},
        capture_output=True, text=True, timeout=20, check=True,
    ).stdout  # fmt: skip
    say("   " + "\n   ".join(shown.strip().splitlines()))
    check("sanlock says that host 1 owns the lease SDM", f"r {demo.domain}:SDM:" in shown)
    for task in demo.call("Host.getAllTasksStatuses"):
        demo.call("Task.clear", taskID=task)
    demo.call("StoragePool.spmStop", storagepoolID=demo.pool)


def crash(demo: Demo) -> None:
    title("kill -9 in the middle of a copy")
    big, target = str(uuid.uuid4()), str(uuid.uuid4())
    source = demo.create(big, GIB)
    with demo.prepared(big, source) as path, open(path, "r+b") as file:
        for _ in range(512):
            file.write(os.urandom(MIB))
    copied = demo.create(target, GIB)
    job = demo.start_copy((big, source), (target, copied))
    while not 0 < demo.call("Host.getJobs", job_ids=[job])[job].get("progress", 0) < 100:
        time.sleep(0.01)
    say(f"   progress {demo.call('Host.getJobs', job_ids=[job])[job]['progress']:.0f} %: kill -9")
    demo.kill()

    title("Restart and recovery")
    demo.start()
    state = demo.job(job)
    say("   the job: " + json.dumps(state, sort_keys=True))
    check("the interrupted job is failed, not lost", state["status"] == "failed")
    info = demo.info(target, copied)
    check("the half copy is marked ILLEGAL, its generation unchanged",
          info["legality"] == "ILLEGAL" and info["generation"] == 0)  # fmt: skip
    check("its lease is free", info["lease"]["owners"] == [])
    demo.wait_host_id()
    state = demo.job(demo.start_copy((big, source), (target, copied)))
    check("the same copy again is done", state["status"] == "done")
    check("the checksums agree", demo.content(big, source) == demo.content(target, copied))
    for image in (big, target):
        demo.task("Image.delete", storagepoolID=demo.pool, storagedomainID=demo.domain,
                  imageID=image, postZero="false", force="false")  # fmt: skip
    left = demo.call("StorageDomain.getImages", storagedomainID=demo.domain)
    check("both images are deleted", big not in left and target not in left)


def block() -> None:
    """The chapter on block domains, where there is device-mapper: here, or in a guest."""
    chapter = [sys.executable, "-P", "-m", "functional.demo_block"]
    if subprocess.run(["dmsetup", "version"], capture_output=True, timeout=20).returncode == 0:
        argv = chapter
    else:
        title("This kernel has no device-mapper: a guest that has it boots (a minute or two)")
        shell = f"cd {ROOT} && PYTHONPATH={ROOT} {' '.join(chapter)}"
        argv = [sys.executable, "-P", "-m", "functional.lab", "run", "--", shell]
    check("the block chapter holds", run_chapter(argv) == 0)


def run_chapter(argv: list[str]) -> int:
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(argv, cwd=ROOT, env=env, timeout=1800, check=False).returncode


def main() -> int:
    if os.geteuid() != 0:
        say("make demo mounts a file system: run it as root")
        return 1
    directory = Path(tempfile.mkdtemp(prefix="vdsm-demo-", dir="/var/tmp"))
    demo = Demo(directory)
    began = time.monotonic()
    try:
        title("An agent of its own, over TLS")
        demo.start()
        title("A storage pool on a POSIX domain")
        demo.make_storage()
        image, leaf = volumes(demo)
        sizes(demo, image, leaf)
        copy(demo, image, leaf)
        leases(demo, image, leaf)
        crash(demo)
        title("Stop")
        demo.stop()
        mounts = Path("/proc/self/mounts").read_text()
        check("no mount is left", str(directory) not in mounts)
        block()
        for module, what in (("demo_vms", "running VMs"), ("demo_thin", "thin volumes")):
            argv = [sys.executable, "-P", "-m", f"functional.{module}"]
            check(f"the chapter on {what} holds", run_chapter(argv) == 0)
    except (CheckFailedError, RemoteError) as error:
        say(f"\nThe demo failed: {error}\nThe agent's log: {directory}/agent/agent.log")
        return 1
    finally:
        if demo.agent is not None and demo.agent.poll() is None:
            demo.agent.terminate()
            demo.agent.wait(60)
        if demo.loop and demo.loop + ":" in tool("losetup", "--all"):
            subprocess.run(["losetup", "--detach", demo.loop], check=False, timeout=20)
    shutil.rmtree(directory)
    say(f"\nAll checks hold ({time.monotonic() - began:.0f} s).")
    return 0


if __name__ == "__main__":
    sys.exit(main())
