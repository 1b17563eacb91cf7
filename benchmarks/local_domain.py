# SPDX-License-Identifier: GPL-2.0-or-later
"""What volumes on a local domain cost, against the bare work in the same run.

- Volume.create of a sparse cow, wall, against `qemu-img create` itself
- Volume.getInfo against direct reads, and that it spawns no process
- listing 10,000 volumes: microseconds a volume, and that it is linear
- resident memory of an idle agent; time to ready against importing the same libraries

    benchmarks/local_domain.py [--json]
"""

from __future__ import annotations

import contextlib
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from vdsm_storage.base.files import read_direct
from vdsm_storage.rpc.client import Client

BLANK = str(uuid.UUID(int=0))
BIN = Path(sys.executable).parent
GIB = 1024**3
MEASURES: list[dict[str, Any]] = []


def measure(name: str, value: float, unit: str, limit: float) -> None:
    MEASURES.append(
        {"name": name, "value": round(value, 3), "unit": unit, "limit": limit, "ok": value <= limit}
    )


def median(work: Callable[[], object], repeat: int) -> float:
    """Median seconds of `work`."""
    times = []
    for _ in range(repeat):
        began = time.perf_counter()
        work()
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def best(work: Callable[[], object], repeat: int) -> float:
    """Shortest seconds of `work`: for promises of a time, which what else runs here must not break.
    """
    return min(median(work, 1) for _ in range(repeat))


@contextlib.contextmanager
def agent(directory: Path) -> Iterator[tuple[subprocess.Popen[str], Client, float]]:
    """A running agent, a connected client, and the seconds from start to `ready`."""
    began = time.perf_counter()
    process = subprocess.Popen(
        [BIN / "vdsm-storaged", "--dev", directory], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    if not process.stdout.readline().startswith("ready"):
        raise SystemExit("the agent did not start")
    ready = time.perf_counter() - began
    client = Client.dev(str(directory))
    try:
        yield process, client, ready
    finally:
        client.close()
        process.terminate()
        process.wait(60)


class Domain:
    """A local domain with a pool, ready for volumes."""

    def __init__(self, client: Client, data: Path) -> None:
        self.client, self.data = client, data
        self.pool, self.id = str(uuid.uuid4()), str(uuid.uuid4())
        connection = {"id": BLANK, "connection": str(data), "port": "", "iqn": "", "user": ""}
        client.call("StoragePool.connectStorageServer", {
            "storagepoolID": BLANK, "domainType": 4, "connectionParams": [connection]})
        client.call("StorageDomain.create", {
            "storagedomainID": self.id, "domainType": 4, "typeArgs": str(data), "name": "bench",
            "domainClass": 1, "version": "5", "blockSize": 0, "maxHosts": 250})
        client.call("StoragePool.create", {
            "storagepoolID": self.pool, "name": "bench", "masterSdUUID": self.id,
            "masterVersion": 1, "domainList": [self.id], "lockRenewalIntervalSec": 5,
            "leaseTimeSec": 60, "ioOpTimeoutSec": 10, "leaseRetries": 3})
        client.call("StoragePool.connect", {
            "storagepoolID": self.pool, "hostID": 1, "scsiKey": self.pool,
            "masterSdUUID": self.id, "masterVersion": 1, "domainDict": {self.id: "active"}})

    @property
    def images(self) -> Path:
        return self.data / self.id / "images"

    def create(self, image: str, volume: str) -> None:
        task = self.client.call("Volume.create", {
            "volumeID": volume, "storagepoolID": self.pool, "storagedomainID": self.id,
            "imageID": image, "size": str(GIB), "volFormat": 4, "preallocate": 2,
            "diskType": "DATA", "desc": "", "srcImgUUID": BLANK, "srcVolUUID": BLANK})
        while (status := self.client.call("Task.getStatus", {"taskID": task}))[
            "taskState"
        ] != "finished":
            pass
        if status["code"]:
            raise SystemExit(f"Volume.create: {status}")
        self.client.call("Task.clear", {"taskID": task})


def creating(domain: Domain) -> tuple[str, str]:
    """Measures Volume.create; returns one image and volume."""
    bare_file = domain.data / "bare.qcow2"

    def bare() -> None:
        bare_file.unlink(missing_ok=True)
        subprocess.run(
            ["qemu-img", "create", "-q", "-f", "qcow2", "-o", "compat=1.1", bare_file, str(GIB)],
            check=True,
        )

    made: list[tuple[str, str]] = []

    def ours() -> None:
        made.append((str(uuid.uuid4()), str(uuid.uuid4())))
        domain.create(*made[-1])

    median(bare, 5)
    median(ours, 5)
    # Interleaved, so that what else the machine does weighs on both.
    pairs = [(median(ours, 1), median(bare, 1)) for _ in range(40)]
    ratio = statistics.median(o for o, _ in pairs) / statistics.median(b for _, b in pairs)
    bare_file.unlink()
    measure("Volume.create of a sparse cow / qemu-img create", ratio, "times", 1.5)
    return made[-1]


def looking(domain: Domain, pid: int, image: str, volume: str) -> None:
    """Measures Volume.getInfo."""
    params = {
        "storagepoolID": domain.pool, "storagedomainID": domain.id,
        "imageID": image, "volumeID": volume,
    }  # fmt: skip
    file = str(domain.images / image / volume)

    def info() -> None:
        domain.client.call("Volume.getInfo", params)

    def ping() -> None:
        domain.client.call("Host.ping2", {})

    median(info, 50)
    before = children_faults(pid)
    inside, wire = median(info, 400), median(ping, 400)
    reads = 5 * median(lambda: read_direct(file, 4096), 400)
    # The wire's own cost is the subject of rpc.py; what is left is the verb.
    measure("Volume.getInfo without the wire / 5 direct reads", (inside - wire) / reads, "times", 1)
    measure("processes spawned by Volume.getInfo", children_faults(pid) - before, "faults", 0)


def children_faults(pid: int) -> int:
    """Page faults of the ended children of `pid`: any process it spawned would raise this."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return int(fields[8])  # cminflt, the 11th field of proc(5)


def listing(domain: Domain) -> None:
    """Measures the listing of many volumes, in one image and in many images."""
    image = str(uuid.uuid4())
    meta = next(domain.images.glob("*/*.meta")).read_bytes()

    def fill(count: int) -> str:
        folder = domain.images / str(uuid.uuid4())
        folder.mkdir()
        for _ in range(count):
            volume = folder / str(uuid.uuid4())
            volume.touch()
            volume.with_name(volume.name + ".meta").write_bytes(meta)
        return folder.name

    def volumes(image: str, count: int, repeat: int) -> None:
        params = {
            "storagepoolID": domain.pool, "storagedomainID": domain.id, "imageID": image,
        }  # fmt: skip
        for _ in range(repeat):
            assert len(domain.client.call("Image.getVolumes", params)) == count

    small, image = fill(1000), fill(10_000)
    # Side by side and as long as each other: what else the machine does weighs on both.
    rounds = [
        (median(lambda: volumes(image, 10_000, 1), 1), median(lambda: volumes(small, 1000, 10), 1))
        for _ in range(25)
    ]
    many, ratio = min(m for m, _ in rounds), statistics.median(m / f for m, f in rounds)
    measure("listing 10,000 volumes of an image", many / 10_000 * 1e6, "us/volume", 20)
    measure("listing 10,000 volumes / 10 times listing 1,000", ratio, "times", 1.3)
    for name in (small, image):
        shutil.rmtree(domain.images / name)

    for _ in range(10_000):
        volume = domain.images / str(uuid.uuid4()) / str(uuid.uuid4())
        volume.parent.mkdir()
        volume.touch()
        volume.with_name(volume.name + ".meta").write_bytes(meta)
    params = {"storagedomainID": domain.id}
    assert len(domain.client.call("StorageDomain.getImages", params)) >= 10_000
    many = best(lambda: domain.client.call("StorageDomain.getImages", params), 15)
    measure("listing 10,000 images of one volume each", many / 10_000 * 1e6, "us/volume", 20)


def idle(directory: Path) -> None:
    """Measures memory and start-up; the first start made the TLS authority."""
    imports = "import vdsm_storage.agent"

    def bare() -> None:
        subprocess.run([sys.executable, "-c", imports], check=True)

    importing = median(bare, 5)
    ready = []
    for _ in range(3):
        with agent(directory) as (process, client, seconds):
            ready.append(seconds)
            client.call("Host.ping2", {})
            status = Path(f"/proc/{process.pid}/status").read_text()
    rss = int(status.partition("VmRSS:")[2].split()[0]) / 1024
    measure("resident memory of an idle agent", rss, "MiB", 60)
    measure("start to ready / importing the same", statistics.median(ready) / importing, "times", 3)


def main() -> int:
    directory = Path(tempfile.mkdtemp(prefix="vdsm-bench-", dir="/var/tmp"))
    data = directory / "data"
    data.mkdir()
    try:
        with agent(directory / "agent") as (process, client, _):
            domain = Domain(client, data)
            image, volume = creating(domain)
            looking(domain, process.pid, image, volume)
            listing(domain)
        idle(directory / "agent")
    finally:
        shutil.rmtree(directory)
    if "--json" in sys.argv[1:]:
        print(json.dumps({"measures": MEASURES}, indent=1))
    else:
        for row in MEASURES:
            print("{name:52} {value:>10} {unit:10} limit {limit:<6} {mark}".format(
                **row, mark="ok" if row["ok"] else "TOO MUCH"))
    return 0 if all(row["ok"] for row in MEASURES) else 1


if __name__ == "__main__":
    sys.exit(main())
