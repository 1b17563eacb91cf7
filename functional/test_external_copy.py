# SPDX-License-Identifier: GPL-2.0-or-later
"""SDM.copy_data between volumes and NBD servers, with the lease that tells how a job ended."""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from functional.engine.host import StorageServer
from functional.nbd import NbdServer
from functional.pool_lab import COW, MIB, RAW, Lab, Volume, endpoint, make_lab
from functional.processes import AgentProcess

SIZE = 16 * MIB


@pytest.fixture(scope="module")
def lab(
    start_agent: Callable[..., AgentProcess], make_server: Callable[[str], StorageServer]
) -> Iterator[Lab]:
    made = make_lab(start_agent("agent", tls=False))
    made.add_domain(make_server("bind"))
    yield made
    made.client.close()


@pytest.fixture
def server(lab: Lab) -> Iterator[NbdServer]:
    with NbdServer(lab.agent.dir / "run", SIZE) as server:
        yield server


def domain(lab: Lab) -> str:
    return next(iter(lab.servers))


def job(lab: Lab, generation: int = 0) -> tuple[str, str]:
    """A job and the external lease that an engine makes for it."""
    job_id, lease_id = str(uuid.uuid4()), str(uuid.uuid4())
    metadata = {
        "type": "JOB", "job_id": job_id, "job_status": "PENDING", "generation": generation,
    }  # fmt: skip
    lease = {"sd_id": domain(lab), "lease_id": lease_id}
    assert lab.task("Lease.create", lease=lease, metadata=metadata) == 0
    return job_id, lease_id


def told(lab: Lab, lease_id: str) -> tuple[str, int]:
    lease = {"sd_id": domain(lab), "lease_id": lease_id}
    found = lab.call("Lease.status", lease=lease)
    assert found["owners"] == []
    return found["metadata"]["job_status"], found["metadata"]["generation"]


def export(lab: Lab, source: Volume, target: dict[str, Any], job_id: str) -> int:
    lab.call("SDM.copy_data", job_id=job_id, source=endpoint(source), destination=target)
    return lab.wait_job(job_id)


def fill(path: Path) -> bytes:
    data = os.urandom(MIB)
    with path.open("r+b") as file:
        file.seek(3 * MIB)
        file.write(data)
    return data


def test_out_of_a_chain(lab: Lab, server: NbdServer) -> None:
    source = lab.create(domain(lab), SIZE, RAW)
    data = fill(lab.prepare(source))
    top = lab.snapshot(source, size=SIZE)
    job_id, lease_id = job(lab, generation=4)
    assert export(lab, top, server.endpoint(domain(lab), lease_id, 4, is_zero=True), job_id) == 0
    assert told(lab, lease_id) == ("SUCCEEDED", 5)
    content = server.file.read_bytes()
    assert (len(content), content[3 * MIB : 4 * MIB]) == (SIZE, data)
    assert lab.call("Volume.getInfo", **lab.ids(top))["generation"] == 0


def test_a_job_that_may_not_start(lab: Lab, server: NbdServer) -> None:
    """Of another generation, fenced, or without its lease: nothing is written."""
    source = lab.create(domain(lab), SIZE, RAW)
    fill(lab.prepare(source))
    job_id, lease_id = job(lab, generation=4)
    target = server.endpoint(domain(lab), lease_id, 3)
    assert export(lab, source, target, job_id) == 911
    lease = {"sd_id": domain(lab), "lease_id": lease_id}
    metadata = {"type": "JOB", "job_id": job_id, "job_status": "PENDING", "generation": 4}
    lab.call("Lease.fence", lease=lease, metadata=metadata)
    other = str(uuid.uuid4())
    assert export(lab, source, {**target, "generation": 4}, other) == 912
    nowhere = server.endpoint(domain(lab), str(uuid.uuid4()), 0)
    assert export(lab, source, nowhere, str(uuid.uuid4())) == 936
    assert not any(server.file.read_bytes())


def test_a_job_that_fails_says_so(lab: Lab, server: NbdServer) -> None:
    """The export is too small."""
    source = lab.create(domain(lab), 2 * SIZE, RAW)
    job_id, lease_id = job(lab)
    assert export(lab, source, server.endpoint(domain(lab), lease_id, 0), job_id) == 261
    assert told(lab, lease_id) == ("FAILED", 1)


@pytest.mark.parametrize("fmt", [RAW, COW])
def test_into_a_volume(lab: Lab, server: NbdServer, fmt: int) -> None:
    data = fill(server.file)
    target = lab.create(domain(lab), 2 * SIZE, fmt)
    source = server.endpoint(domain(lab), str(uuid.uuid4()), 0)
    place = {**endpoint(target), "generation": 0}
    assert lab.job("SDM.copy_data", source=source, destination=place) == 0
    info = lab.call("Volume.getInfo", **lab.ids(target))
    assert (info["legality"], info["generation"], info["capacity"]) == ("LEGAL", 1, str(2 * SIZE))
    back = lab.create(domain(lab), 2 * SIZE, RAW)
    assert lab.copy(target, back) == 0
    content = lab.prepare(back).read_bytes()
    assert (len(content), content[3 * MIB : 4 * MIB]) == (2 * SIZE, data)
    assert lab.job("SDM.copy_data", source=source, destination=place) == 911


def test_into_a_volume_that_is_too_small(lab: Lab, server: NbdServer) -> None:
    target = lab.create(domain(lab), SIZE // 2, RAW)
    source = server.endpoint(domain(lab), str(uuid.uuid4()), 0)
    assert lab.job("SDM.copy_data", source=source, destination=endpoint(target)) != 0
    info = lab.call("Volume.getInfo", **lab.ids(target))
    assert (info["legality"], info["generation"]) == ("ILLEGAL", 0)


@pytest.mark.parametrize(
    "change",
    [
        {"url": "file:///etc/passwd"},
        {"url": "/etc/passwd"},
        {"url": "json:{}"},
        {"url": "nbd:unix:/run/other/socket"},
        {"url": "nbd:unix:RUN/../../other"},
        {"url": "nbd+unix:///?socket=/run/other/socket"},
        {"url": "nbd://host/a?tls-creds=x"},
        {"format": "cow"},
    ],
)
def test_refused_at_once(lab: Lab, server: NbdServer, change: dict[str, str]) -> None:
    volume = lab.create(domain(lab), SIZE, RAW)
    change = {k: v.replace("RUN", str(lab.agent.dir / "run")) for k, v in change.items()}
    external = {**server.endpoint(domain(lab), str(uuid.uuid4()), 0), **change}
    ends = [external, endpoint(volume)]
    for source, destination in (ends, ends[::-1]):
        assert lab.job("SDM.copy_data", source=source, destination=destination) == 2009
