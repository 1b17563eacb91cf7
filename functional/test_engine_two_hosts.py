# SPDX-License-Identifier: GPL-2.0-or-later
"""Two hosts, a sanlock daemon each, one POSIX domain on the same directory (two bind mounts)."""

from __future__ import annotations

import json
import random
import subprocess
import threading
import uuid
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from functional.engine.datacenter import DataCenter, Disk, FlowError, TaskFailedError
from functional.engine.host import COW, RAW, SPARSE, Host, StorageServer, pdiv
from functional.engine.replies import NO_UUID
from functional.engine.wire import NetworkError, VdsError
from functional.processes import AgentProcess

MIB = 1024**2
ROUNDS = 25


@dataclass
class Lab:
    agents: list[AgentProcess]
    hosts: list[Host]
    dc: DataCenter
    directory: Path

    @property
    def domain(self) -> str:
        return self.dc.master


@pytest.fixture(scope="module")
def lab(
    make_server: Callable[[str], StorageServer], start_agent: Callable[..., AgentProcess]
) -> Iterator[Lab]:
    settings = {"storage__lock_timeout": "3"}
    agents = [start_agent(f"a{number}", tls=False, **settings) for number in (1, 2)]
    hosts = [agent.host(f"host-{n}", n) for n, agent in enumerate(agents, start=1)]
    server = make_server("bind")
    dc = DataCenter.begin(hosts, server, "two")
    yield Lab(agents, hosts, dc, Path(server.spec))
    for host in hosts:
        host.close()


def test_one_manager_is_known_to_both(lab: Lab) -> None:
    first, second = (host.spm_status(lab.dc.id) for host in lab.hosts)
    assert first is not None
    assert second is not None
    assert (first.status, first.id) == ("SPM", 1)
    assert (second.status, second.id) == ("Free", 1)


def test_a_write_on_the_other_host_is_refused_while_there_is_a_manager(lab: Lab) -> None:
    """654, by which the engine knows that it asked the wrong host; storage is as before."""
    disk = Disk(lab.domain, str(uuid.uuid4()), (str(uuid.uuid4()),))
    with pytest.raises(VdsError) as refused:
        lab.hosts[1].irs.call("Volume.create", new_volume(lab, disk))
    assert refused.value.code == 654
    assert disk.image not in lab.hosts[0].images(lab.domain)


def test_fail_over_on_654(lab: Lab) -> None:
    """The engine takes the wrong host for the manager, hears 654, and finds the right one."""
    lab.dc.spm = lab.hosts[1]
    lab.dc.hosts = list(lab.hosts)
    disk = lab.dc.create_disk(lab.domain, 16 * MIB)
    assert lab.dc.spm is lab.hosts[0]
    for host in lab.hosts:  # read on both
        assert lab.dc.info(disk, host).capacity == 16 * MIB
    lab.dc.delete(disk)


def test_the_manager_moves(lab: Lab) -> None:
    lab.dc.hosts = list(lab.hosts)
    lab.dc.stop_spm()
    lab.dc.hosts.reverse()
    assert lab.dc.elect() is lab.hosts[1]
    lab.dc.stop_spm()


# -- without a manager: hammered by both -----------------------------------------------------------


@dataclass
class Hammer:
    """Makes, snapshots, extends and deletes disks on one host, and remembers what was
    acknowledged: `kept` disks with their sizes.  `doubtful` is what a dead host was at."""

    lab: Lab
    host: Host
    seed: int
    kept: dict[str, tuple[Disk, int]] = field(default_factory=dict)
    doubtful: set[str] = field(default_factory=set)
    deleted: set[str] = field(default_factory=set)
    problems: list[str] = field(default_factory=list)
    done: int = 0

    def run(self, enough: Callable[[], bool]) -> None:
        chance = random.Random(self.seed)
        while not enough():
            works = (self._create, self._snapshot, self._extend, self._delete)
            work = chance.choices(works, (4, 2, 1, 2))[0] if self.kept else self._create
            image = chance.choice(sorted(self.kept)) if self.kept else ""
            try:
                work(str(uuid.uuid4()) if work == self._create else image)
                self.done += 1
            except NetworkError:  # the host may be dead: `enough` finds out
                threading.Event().wait(0.2)
            except (VdsError, TaskFailedError) as error:
                if error.code not in (654, 851):  # the other host was busy: again
                    self.problems.append(str(error))
                    return
            except FlowError as error:
                self.problems.append(str(error))
                return

    def _create(self, image: str) -> None:
        disk = Disk(self.lab.domain, image, (str(uuid.uuid4()),))
        fmt = RAW if int(image[:8], 16) % 2 else COW
        self._task("Volume.create", disk, new_volume(self.lab, disk, fmt))
        self.kept[image] = (disk, MIB)

    def _snapshot(self, image: str) -> None:
        old, size = self.kept[image]
        disk = Disk(old.domain, image, (*old.volumes, str(uuid.uuid4())))
        params = {
            **new_volume(self.lab, disk),
            "size": str(size),
            "srcImgUUID": image,
            "srcVolUUID": old.leaf,
            "sequence": len(disk.volumes),
        }
        self._task("Volume.create", disk, params)
        self.kept[image] = (disk, size)

    def _extend(self, image: str) -> None:
        disk, size = self.kept[image]
        where = pdiv(self.lab.dc.id, disk.domain, image, disk.leaf)
        self._task("Volume.extendSize", disk, {**where, "newSize": str(size + MIB)})
        self.kept[image] = (disk, size + MIB)

    def _delete(self, image: str) -> None:
        disk, _ = self.kept[image]
        where = pdiv(self.lab.dc.id, disk.domain, image, "")
        del where["volumeID"]
        self._task("Image.delete", disk, {**where, "postZero": "false", "force": "false"})
        del self.kept[image]
        self.deleted.add(image)

    def _task(self, verb: str, disk: Disk, params: dict[str, object]) -> None:
        """Doubtful only as long as no answer came."""
        self.doubtful.add(disk.image)
        try:
            task = self.host.irs.call(verb, params)
            self.lab.dc.finish_task(self.host, verb, task)
        except (VdsError, TaskFailedError):
            self.doubtful.discard(disk.image)
            raise
        self.doubtful.discard(disk.image)


def new_volume(lab: Lab, disk: Disk, fmt: int = COW) -> dict[str, object]:
    return {
        **pdiv(lab.dc.id, disk.domain, disk.image, disk.leaf),
        "size": str(MIB),
        "volFormat": fmt,
        "preallocate": SPARSE,
        "diskType": "DATA",
        "desc": "",
        "srcImgUUID": NO_UUID,
        "srcVolUUID": NO_UUID,
        "addBitmaps": False,
        "legal": True,
        "sequence": 1,
    }


def run_all(work: dict[str, tuple[Hammer, Callable[[], bool]]]) -> None:
    """Each hammer until it has enough."""
    threads = [
        threading.Thread(target=hammer.run, args=(enough,), name=name, daemon=True)
        for name, (hammer, enough) in work.items()
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(300)
    assert [thread.name for thread in threads if thread.is_alive()] == []
    assert [problem for hammer, _ in work.values() for problem in hammer.problems] == []


def check_storage(lab: Lab, host: Host, hammers: list[Hammer], before: Collection[str]) -> None:
    """Every acknowledged volume is there and whole, nothing deleted is, nothing is half-made."""
    listed = set(host.images(lab.domain))
    known: set[str] = set(before)
    for hammer in hammers:
        known |= {*hammer.kept, *hammer.doubtful}
        assert not hammer.deleted & listed
        assert set(hammer.kept) - hammer.doubtful <= listed
        for image, (disk, size) in hammer.kept.items():
            if image not in hammer.doubtful:
                check_disk(lab, host, disk, size)
    assert listed <= known
    for image in listed:
        for volume in volumes(lab, host, image):
            assert host.volume_info(lab.dc.id, lab.domain, image, volume).status == "OK"


def check_disk(lab: Lab, host: Host, disk: Disk, size: int) -> None:
    """The chain as the agent tells it is the one that was made, and the one in the files."""
    assert set(volumes(lab, host, disk.image)) == set(disk.volumes)
    parent = NO_UUID
    for volume in disk.volumes:
        info = host.volume_info(lab.dc.id, lab.domain, disk.image, volume)
        assert (info.parent, info.owners) == (parent, [])
        assert info.voltype == ("LEAF" if volume == disk.leaf else "INTERNAL")
        parent = volume
    assert info.capacity == size
    path = lab.directory / lab.domain / "images" / disk.image / disk.leaf
    argv = ["qemu-img", "info", "--backing-chain", "--output=json", str(path)]
    done = subprocess.run(argv, capture_output=True, check=True, timeout=60)
    chain = json.loads(done.stdout)
    assert [Path(layer["filename"]).name for layer in chain] == list(reversed(disk.volumes))
    assert chain[0]["virtual-size"] == size


def volumes(lab: Lab, host: Host, image: str) -> list[str]:
    where = {"storagedomainID": lab.domain, "storagepoolID": lab.dc.id, "imageID": image}
    return list(host.vds.call("StorageDomain.getVolumes", where))


def files_of_images(lab: Lab) -> dict[str, set[str]]:
    """Image directory -> the suffixes of its files."""
    images = lab.directory / lab.domain / "images"
    return {path.name: {file.suffix for file in path.iterdir()} for path in images.iterdir()}


def test_work_from_both_hosts_never_collides(lab: Lab) -> None:
    """Two at a time on each of them."""
    hammers = [Hammer(lab, host, seed) for seed, host in enumerate(lab.hosts * 2)]
    run_all({f"hammer {h.seed}": (h, lambda h=h: h.done >= ROUNDS) for h in hammers})  # type: ignore[misc]
    assert [hammer.done for hammer in hammers] == [ROUNDS] * 4
    assert not any(hammer.doubtful for hammer in hammers)
    for host in lab.hosts:
        check_storage(lab, host, hammers, before=())
    files = files_of_images(lab)
    assert set(files) == {image for hammer in hammers for image in hammer.kept}
    assert all(suffixes == {"", ".meta", ".lease"} for suffixes in files.values())


def test_one_host_dies_and_the_other_goes_on(lab: Lab) -> None:
    """An agent dies in the middle of a create, and its sanlock with it."""
    before = set(lab.hosts[0].images(lab.domain))
    restart(lab, 0, crash_point="volume.create:made:6")
    doomed, survivor = Hammer(lab, lab.hosts[0], 10), Hammer(lab, lab.hosts[1], 11)

    at_death: list[int] = []

    def dead() -> bool:
        """Asked before each round of the one that dies: its host dies with the agent."""
        if not lab.agents[0].alive():
            lab.agents[0].wait_dead()
            lab.agents[0].kill_sanlock()
            at_death.append(survivor.done)
        return bool(at_death)

    run_all(
        {
            "doomed": (doomed, dead),
            "survivor": (survivor, lambda: bool(at_death) and survivor.done >= at_death[0] + 10),
        }
    )
    assert len(doomed.doubtful) == 1
    check_storage(lab, lab.hosts[1], [doomed, survivor], before)
    # The dead host comes back; what it left half-done is taken back.
    restart(lab, 0)
    lab.dc.wait(
        lambda: all(task.finished for task in lab.hosts[0].tasks().values()), "recovery of tasks"
    )
    check_storage(lab, lab.hosts[0], [doomed, survivor], before)
    files = files_of_images(lab)
    assert set(files) == set(lab.hosts[0].images(lab.domain))
    assert all(suffixes == {"", ".meta", ".lease"} for suffixes in files.values())


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_host_of_the_manager_dies(lab: Lab) -> None:
    """Its lease is given away after 8 I/O time-outs of a second and the 60 seconds of a watchdog
    that would have reset it; until then every election of the other host fails."""
    dc = lab.dc
    dc.hosts, dc.spm = list(lab.hosts), None
    assert dc.elect() is lab.hosts[0]
    disk = dc.create_disk(lab.domain, MIB)
    lab.agents[0].kill_host()
    with pytest.raises(NetworkError):
        dc.create_disk(lab.domain, MIB)
    dc.hosts, dc.spm = [lab.hosts[1]], None
    survivor = lab.hosts[1]
    status = survivor.spm_status(dc.id)  # answers meanwhile
    assert status is not None
    assert status.status != "SPM"
    tries = 0
    while dc.spm is None:
        tries += 1
        try:
            dc.elect()
        except FlowError:
            threading.Event().wait(0.5)
    assert tries > 1
    assert dc.spm is survivor
    dc.delete(disk)
    dc.delete(dc.create_disk(lab.domain, MIB))
    dc.stop_spm()
    restart(lab, 0)


def restart(lab: Lab, number: int, crash_point: str = "") -> None:
    """Stop (or find dead) an agent and start it again; the engine connects it anew."""
    lab.hosts[number].close()
    assert lab.agents[number].stop() == ""
    lab.agents[number].start(crash_point)
    lab.hosts[number] = lab.agents[number].host(f"host-{number + 1}", number + 1)
    other = lab.hosts[1 - number]
    lab.dc.hosts, lab.dc.spm = [other], other  # no election: there is to be no manager
    lab.dc.activate_host(lab.hosts[number])
    lab.dc.hosts = list(lab.hosts)
    lab.dc.wait(lambda: lab.hosts[number].health()[lab.domain].acquired, "host id")
