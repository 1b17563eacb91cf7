# SPDX-License-Identifier: GPL-2.0-or-later
"""Volumes on LUNs are active for as long as somebody on this host uses them.

A guest's image is prepared once, however often it was asked for, and stays so when the agent dies;
an operation's volumes are not, and what a killed one left is found at the next start.
"""

from __future__ import annotations

import os
import subprocess
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from functional.checker.check import SPECIAL
from functional.checker.group import EXTENT
from functional.engine.host import FCP, StorageServer
from functional.pool_lab import COW, RAW, Lab, Volume, endpoint, make_lab, wait_for
from functional.standin.process import StandInProcess

PREALLOCATED = 1
IN_USE = 551


@pytest.fixture(scope="module")
def standin(make_standin: Callable[..., StandInProcess]) -> StandInProcess:
    return make_standin(sync=False)


@pytest.fixture(scope="module")
def lab(
    start_agent: Callable[..., object],
    make_luns: Callable[..., list[str]],
    standin: StandInProcess,
) -> Iterator[Lab]:
    luns = make_luns(1)
    settings = {"lvm__devices": luns[0], "sanlock__io_timeout": "1"}
    made = make_lab(start_agent("agent", tls=False, standin=standin, **settings))
    made.add_domain(StorageServer(FCP, devices=tuple(luns)))
    yield made
    made.client.close()


@pytest.fixture
def domain(lab: Lab, standin: StandInProcess) -> Iterator[str]:
    """The domain; every test leaves it without images, and nothing active."""
    (found,) = lab.servers
    yield found
    for image in lab.call("StorageDomain.getImages", storagedomainID=found):
        assert delete(lab, found, image) == 0
    wait_for(lambda: active(standin, found) == set(), "the end of all use")


def delete(lab: Lab, domain: str, image: str) -> int:
    where = {"storagepoolID": lab.pool, "storagedomainID": domain, "imageID": image}
    return lab.task("Image.delete", **where, postZero="false", force="false")


def active(standin: StandInProcess, domain: str) -> set[str]:
    return set(standin.active(domain)) - set(SPECIAL)


def restart(lab: Lab, domain: str) -> None:
    if lab.agent.alive():
        lab.agent.kill()
    lab.agent.start()
    lab.reconnect()
    lab.wait_usable(domain)


def disk(lab: Lab, domain: str) -> tuple[Volume, Volume]:
    """A raw base and a snapshot."""
    base = lab.create(domain, EXTENT, RAW, preallocate=PREALLOCATED)
    return base, lab.snapshot(base, size=EXTENT)


def teardown(lab: Lab, where: Volume) -> None:
    lab.call("Image.teardown", **lab.ids(where))


def qemu_io(path: Path, command: str) -> None:
    argv = ["qemu-io", "-f", "qcow2", "-c", command, str(path)]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "failed" not in done.stdout


def test_a_prepared_image_outlives_the_agent(
    lab: Lab, domain: str, standin: StandInProcess
) -> None:
    base, top = disk(lab, domain)
    assert active(standin, domain) == set()
    path = lab.prepare(top)
    both = {base.volume, top.volume}
    assert active(standin, domain) == both
    lab.agent.kill()
    qemu_io(path, "write -P 0x61 0 1M")  # nobody is there, and the guest goes on
    restart(lab, domain)
    assert active(standin, domain) == both
    qemu_io(path, "read -P 0x61 0 1M")
    assert lab.prepare(top) == path
    teardown(lab, top)
    assert active(standin, domain) == set()
    assert not os.path.lexists(path)
    teardown(lab, top)


def test_a_prepared_image_outlives_a_clean_stop(
    lab: Lab, domain: str, standin: StandInProcess
) -> None:
    """As when the agent is upgraded: the domain is let go, but not what a guest has of it."""
    base, top = disk(lab, domain)
    path = lab.prepare(top)
    both = {base.volume, top.volume}
    assert lab.agent.stop() == ""
    assert set(standin.active(domain)) == both
    qemu_io(path, "write -P 0x62 0 1M")  # its backing file is found by a link, too
    lab.agent.start()
    lab.reconnect()
    lab.connect_pool()
    lab.wait_usable(domain)
    assert active(standin, domain) == both
    qemu_io(path, "read -P 0x62 0 1M")
    teardown(lab, top)
    assert active(standin, domain) == set()


def test_preparing_thrice_is_preparing_once(
    lab: Lab, domain: str, standin: StandInProcess
) -> None:
    _, top = disk(lab, domain)
    assert len({lab.prepare(top) for _ in range(3)}) == 1
    restart(lab, domain)
    lab.prepare(top)
    teardown(lab, top)
    assert active(standin, domain) == set()


def test_images_that_share_a_template(lab: Lab, domain: str, standin: StandInProcess) -> None:
    template = lab.create(domain, EXTENT, COW)
    place = {"sd_id": domain, "img_id": template.image, "vol_id": template.volume}
    assert lab.job("SDM.update_volume", vol_info=place, vol_attr={"type": "SHARED"}) == 0
    upon = {"srcImgUUID": template.image, "srcVolUUID": template.volume}
    one, two = (lab.create(domain, EXTENT, COW, **upon) for _ in range(2))
    paths = [lab.prepare(one), lab.prepare(two)]
    assert active(standin, domain) == {template.volume, one.volume, two.volume}
    restart(lab, domain)
    teardown(lab, one)
    assert active(standin, domain) == {template.volume, two.volume}
    qemu_io(paths[1], "read -P 0 0 1M")
    lab.prepare(template)  # by itself, too
    teardown(lab, two)
    assert active(standin, domain) == {template.volume}
    teardown(lab, template)
    assert active(standin, domain) == set()
    assert [delete(lab, domain, v.image) for v in (one, two)] == [0, 0]


def test_operations_and_guests_share(lab: Lab, domain: str, standin: StandInProcess) -> None:
    """Whoever is the last switches the light off."""
    source, target = (lab.create(domain, EXTENT, COW) for _ in range(2))
    lab.prepare(source)
    assert lab.copy(source, target) == 0
    assert active(standin, domain) == {source.volume}
    job = begin_copy(lab, standin, source, target)
    teardown(lab, source)
    assert active(standin, domain) == {source.volume, target.volume}
    standin.call("clear")
    assert lab.wait_job(job) == 0
    assert active(standin, domain) == set()


def begin_copy(lab: Lab, standin: StandInProcess, source: Volume, target: Volume) -> str:
    """A job that hangs when it writes."""
    job = str(uuid.uuid4())
    lab.prepare(target)  # activation itself must not hang
    standin.hang(f"{target.domain}/{target.volume}", "write")
    lab.call("SDM.copy_data", job_id=job, source=endpoint(source), destination=endpoint(target))
    wait_for(lambda: standin.held() > 0, "the copy to hang")
    teardown(lab, target)
    return job


def test_what_a_killed_agents_operation_left(
    lab: Lab, domain: str, standin: StandInProcess
) -> None:
    """Its program dies with it, and the next start finds the volumes."""
    source, target = (lab.create(domain, EXTENT, COW) for _ in range(2))
    begin_copy(lab, standin, source, target)
    lab.agent.kill()
    standin.call("clear")
    assert active(standin, domain) == {source.volume, target.volume}
    restart(lab, domain)
    wait_for(lambda: active(standin, domain) == set(), "volumes to be let go")


def test_what_somebody_else_has_open_stays(
    lab: Lab, domain: str, standin: StandInProcess
) -> None:
    _, top = disk(lab, domain)
    path = lab.prepare(top)
    with path.open("rb"):
        teardown(lab, top)
        assert active(standin, domain) == {top.volume}
        restart(lab, domain)
        assert active(standin, domain) == {top.volume}
    wait_for(lambda: active(standin, domain) == set(), "the volume to be let go")


def test_a_prepared_image_is_deleted(lab: Lab, domain: str, standin: StandInProcess) -> None:
    """The engine says that no guest needs it; one that has it open nevertheless keeps it."""
    base, top = disk(lab, domain)
    path = lab.prepare(top)
    with path.open("rb"):
        assert delete(lab, domain, top.image) == IN_USE
        assert active(standin, domain) == {base.volume, top.volume}
    assert lab.call("StorageDomain.getImages", storagedomainID=domain) == [top.image]
    qemu_io(path, "read -P 0 2M 1M")
    assert delete(lab, domain, top.image) == 0
    assert active(standin, domain) == set()
