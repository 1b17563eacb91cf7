# SPDX-License-Identifier: GPL-2.0-or-later
"""Leases of virtual machines and of jobs, as the engine makes, reads and fences them.

And a host whose storage for host ids dies under its pool manager's lease.
"""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from functional.engine.datacenter import DataCenter, TaskFailedError
from functional.engine.host import Host, StorageServer
from functional.engine.wire import VdsError
from functional.processes import AgentProcess

MIB = 1024**2
NO_SUCH_LEASE = 936
GENERATION_MISMATCH = 911
JOB_STATUS_MISMATCH = 912


@dataclass
class Lab:
    agent: AgentProcess
    host: Host
    dc: DataCenter

    def call(self, verb: str, **params: Any) -> Any:
        return self.host.vds.call(verb, params)

    def new_lease(self, metadata: dict[str, Any] | None = None) -> dict[str, str]:
        """The engine sends the key `metadata` even when it is null."""
        lease = {"sd_id": self.dc.master, "lease_id": str(uuid.uuid4())}
        self.task("Lease.create", lease=lease, metadata=metadata)
        return lease

    def task(self, verb: str, **params: Any) -> None:
        task = self.dc.irs_raw(verb, params)
        self.dc.finish_task(self.host, verb, task)


def pending(generation: int = 0) -> dict[str, Any]:
    return {
        "type": "JOB",
        "job_id": str(uuid.uuid4()),
        "job_status": "PENDING",
        "generation": generation,
    }


@pytest.fixture(scope="module")
def lab(
    make_server: Callable[[str], StorageServer], start_agent: Callable[..., AgentProcess]
) -> Iterator[Lab]:
    agent = start_agent("leases", tls=False)
    host = agent.host("host-1", 1)
    dc = DataCenter.begin([host], make_server("bind"))
    made = Lab(agent, host, dc)
    yield made
    made.host.close()


def test_lease_of_a_vm(lab: Lab) -> None:
    lease = lab.new_lease()
    info = lab.call("Lease.info", lease=lease)
    assert info["offset"] % MIB == 0
    assert info["offset"] >= 3 * MIB
    assert info["path"].endswith(f"/{lab.dc.master}/dom_md/xleases")
    assert os.path.getsize(info["path"]) >= info["offset"] + MIB
    assert lab.call("Lease.status", lease=lease) == {"owners": [], "version": None}
    with pytest.raises(TaskFailedError):
        lab.task("Lease.create", lease=lease, metadata=None)
    lab.task("Lease.delete", lease=lease)
    for verb in ("Lease.info", "Lease.status", "Lease.delete"):
        with pytest.raises(VdsError) as gone:
            lab.call(verb, lease=lease)
        assert gone.value.code == NO_SUCH_LEASE


def test_verbs_of_lease_tasks_are_the_engines(lab: Lab) -> None:
    lease = {"sd_id": lab.dc.master, "lease_id": str(uuid.uuid4())}
    task = lab.dc.irs_raw("Lease.create", {"lease": lease, "metadata": None})
    assert lab.host.task_verbs()[task] == "addLease"
    lab.dc.finish_task(lab.host, "Lease.create", task)
    task = lab.dc.irs_raw("Lease.delete", {"lease": lease})
    assert lab.host.task_verbs()[task] == "removeLease"
    lab.dc.finish_task(lab.host, "Lease.delete", task)


def test_lease_of_a_job_is_fenced(lab: Lab) -> None:
    job = pending(generation=5)
    lease = lab.new_lease(job)
    metadata = lab.call("Lease.status", lease=lease)["metadata"]
    assert {key: metadata[key] for key in job} == job
    with pytest.raises(VdsError) as late:
        lab.call("Lease.fence", lease=lease, metadata={**job, "generation": 4})
    assert late.value.code == GENERATION_MISMATCH
    with pytest.raises(VdsError) as other:
        lab.call("Lease.fence", lease=lease, metadata=pending(5))
    assert other.value.code == JOB_STATUS_MISMATCH
    assert lab.call("Lease.fence", lease=lease, metadata=job) is True
    metadata = lab.call("Lease.status", lease=lease)["metadata"]
    assert (metadata["generation"], metadata["job_status"]) == (6, "FENCED")
    with pytest.raises(VdsError) as again:
        lab.call("Lease.fence", lease=lease, metadata={**job, "generation": 6})
    assert again.value.code == JOB_STATUS_MISMATCH


def test_rebuild_of_a_damaged_index(lab: Lab) -> None:
    lease = lab.new_lease()
    info = lab.call("Lease.info", lease=lease)
    with Path(info["path"]).open("r+b") as file:
        file.seek(MIB)
        file.write(b"\0" * 4096)
    with pytest.raises(VdsError, match="rebuild_leases"):
        lab.call("Lease.info", lease=lease)
    lab.task("Lease.rebuild_leases", sd_id=lab.dc.master)
    assert lab.call("Lease.info", lease=lease) == info


def test_a_lost_host_id_ends_the_role_and_not_the_agent(lab: Lab) -> None:
    """What sanlock does when it cannot renew: see tests/leases/lost_test.py for the real thing."""
    status = lab.host.spm_status(lab.dc.id)
    assert status is not None
    assert status.status == "SPM"
    (lab.agent.dir / "run" / "lost" / lab.dc.master).touch()
    deadline = time.monotonic() + 30
    while status.status == "SPM" and time.monotonic() < deadline:
        time.sleep(0.1)
        status = lab.host.spm_status(lab.dc.id)
        assert status is not None
    assert status.status == "Free"
    with pytest.raises(VdsError) as refused:
        lab.host.vds.call("StoragePool.spmStop", {"storagepoolID": lab.dc.id})
    assert refused.value.code == 654
    lab.dc.spm = None
    lab.dc.elect()
    lab.task("Lease.delete", lease=lab.new_lease())
