# SPDX-License-Identifier: GPL-2.0-or-later
"""Several domains in a pool: move between them, the master's role, reconstruction, import."""

from __future__ import annotations

import hashlib
import subprocess
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from functional.engine.datacenter import DataCenter, Disk, Domain
from functional.engine.host import COW, RAW, Host, StorageServer
from functional.engine.replies import NO_UUID
from functional.engine.wire import VdsError
from functional.processes import AgentProcess

MIB = 1024**2


@dataclass
class Lab:
    agent: AgentProcess
    host: Host
    dc: DataCenter
    make_server: Callable[[str], StorageServer]

    def attach(self, domain: Domain) -> None:
        """3.3: the domain into the running pool, and active."""
        dc = self.dc
        statuses = self.host.connect_servers(dc.id, [domain.server])
        assert set(statuses.values()) == {0}
        dc.clean(self.host, domain)
        dc.irs("StorageDomain.attach", storagedomainID=domain.id)
        dc.irs("StorageDomain.activate", storagedomainID=domain.id)
        domain.active = True
        dc.domains[domain.id] = domain
        dc.connect_pool(self.host)
        dc.wait_healthy(self.host)

    def new_domain(self, kind: str = "bind", version: str = "5") -> Domain:
        domain = Domain(str(uuid.uuid4()), self.make_server(kind), version)
        self.dc.create_domain(self.host, domain, pool=self.dc.id)
        self.attach(domain)
        return domain


@pytest.fixture(scope="module")
def lab(
    start_agent: Callable[..., AgentProcess], make_server: Callable[[str], StorageServer]
) -> Iterator[Lab]:
    agent = start_agent("agent", tls=False)
    host = agent.host("host-1", 1)
    dc = DataCenter.begin([host], make_server("bind"), "several")
    made = Lab(agent, host, dc, make_server)
    made.new_domain()
    yield made
    host.close()


def other(lab: Lab) -> Domain:
    """The active domain that is not the master."""
    return next(d for d in lab.dc.domains.values() if d.id != lab.dc.master)


def test_all_members_are_told(lab: Lab) -> None:
    info = lab.host.pool_info(lab.dc.id)
    assert info.domains == dict.fromkeys(lab.dc.domains, "Active")
    assert not lab.host.domain_info(other(lab).id).master


def test_attach_twice_and_forced_detach(lab: Lab) -> None:
    with pytest.raises(VdsError) as twice:
        lab.dc.irs("StorageDomain.attach", storagedomainID=other(lab).id)
    assert twice.value.code == 380


def test_move_a_disk(lab: Lab) -> None:
    """3.10: the same ids on the target, parents first; then the source is deleted."""
    dc, size = lab.dc, 16 * MIB
    source = dc.create_disk(dc.master, size, fmt=RAW)
    fill(lab, source, 0x21, "raw")
    source = dc.snapshot(source, size)
    target = Disk(other(lab).id, source.image, ())
    parent = (NO_UUID, NO_UUID)
    for number, volume in enumerate(source.volumes, start=1):
        target = Disk(target.domain, target.image, (*target.volumes, volume))
        fmt = RAW if number == 1 else COW
        dc.create_volume(target, size, fmt=fmt, parent=parent, sequence=number)
        parent = (target.image, target.leaf)
    containing = {"storagepoolID": dc.id, "imageID": source.image}
    both = lab.host.vds.call("StoragePool.getDomainsContainingImage", containing)
    assert set(both) == {source.domain, target.domain}
    for number in range(len(source.volumes)):
        assert dc.copy_volume(lab.host, source, target, number).status == "done"
    dc.delete(source)
    assert source.image not in lab.host.images(source.domain)
    path = lab.host.prepare(dc.id, target.domain, target.image, target.leaf)
    qemu_io(path, "read -P 0x21 0 1M", "qcow2")
    lab.host.teardown(dc.id, target.domain, target.image, target.leaf)
    dc.delete(target)


def test_the_master_goes_to_maintenance(lab: Lab) -> None:
    """The same verb moves the role to the domain that the engine names."""
    dc = lab.dc
    old, new = dc.domains[dc.master], other(lab)
    dc.master_version += 1
    dc.irs(
        "StorageDomain.deactivate",
        storagedomainID=old.id,
        masterSdUUID=new.id,
        masterVersion=dc.master_version,
    )
    dc.master, old.active = new.id, False
    dc.connect_pool(lab.host)
    info = lab.host.pool_info(dc.id)
    assert (info.master, info.master_version) == (new.id, dc.master_version)
    assert info.domains == {old.id: "Attached", new.id: "Active"}
    assert lab.host.domain_info(new.id).master
    status = lab.host.spm_status(dc.id)
    assert status is not None
    assert status.status == "SPM"
    dc.wait(lambda: old.id not in lab.host.health(), "unreported")
    dc.delete(dc.create_disk(new.id, MIB))
    # ... and back into the pool.
    dc.irs("StorageDomain.activate", storagedomainID=old.id)
    old.active = True
    dc.connect_pool(lab.host)
    dc.wait_healthy(lab.host)


def test_switch_master(lab: Lab) -> None:
    """On the user's wish: a task."""
    dc = lab.dc
    old, new = dc.master, other(lab).id
    dc.master_version += 1
    dc.task(
        "StoragePool.switchMaster",
        oldMasterUUID=old,
        newMasterUUID=new,
        masterVersion=dc.master_version,
    )
    dc.master = new
    dc.connect_pool(lab.host)
    assert lab.host.pool_info(dc.id).master == new
    assert lab.host.domain_info(new).master
    assert not lab.host.domain_info(old).master


def test_reconstruct_the_master(lab: Lab) -> None:
    """3.5, 6: the engine knows another master than the host finds."""
    dc = lab.dc
    new = other(lab).id
    wrong = DataCenter(dc.name, dc.id, hosts=[lab.host], domains=dc.domains)
    wrong.master, wrong.master_version = new, dc.master_version + 1
    with pytest.raises(VdsError) as mismatch:
        wrong.connect_pool(lab.host)
    assert mismatch.value.code in (304, 307, 324)
    dc.stop_spm()
    lab.host.disconnect_pool(dc.id)
    dc.master, dc.master_version = new, dc.master_version + 1
    params = {
        "storagepoolID": dc.id,
        "hostId": lab.host.id,
        "name": dc.name,
        "masterSdUUID": new,
        "masterVersion": dc.master_version,
        "domainDict": dict.fromkeys(dc.domains, "active"),
        "lockRenewalIntervalSec": 5,
        "leaseTimeSec": 60,
        "ioOpTimeoutSec": 10,
        "leaseRetries": 3,
    }
    assert lab.host.vds.call("StoragePool.reconstructMaster", params) is True
    dc.connect_pool(lab.host)
    dc.elect()
    info = lab.host.pool_info(dc.id)
    assert (info.master, info.master_version) == (new, dc.master_version)
    assert set(info.domains) == set(dc.domains)
    dc.wait_healthy(lab.host)


@pytest.mark.parametrize(("version", "kind"), [("3", "local"), ("4", "bind")])
def test_a_domain_of_an_older_format(lab: Lab, version: str, kind: str) -> None:
    """It is upgraded when it becomes active; disks are made and changed meanwhile."""
    dc = lab.dc
    domain = lab.new_domain(kind, version)
    disk = dc.snapshot(dc.create_disk(domain.id, 4 * MIB), 4 * MIB)
    fill(lab, disk, 0x37, "qcow2")
    assert dc.info(disk).status == "OK"
    dc.extend(disk, 8 * MIB)
    dc.wait(lambda: lab.host.domain_info(domain.id).version == "5", "the upgrade")
    assert dc.info(disk).capacity == 8 * MIB
    dc.delete(disk)
    leave(lab, domain)
    lab.host.vds.call("StorageDomain.format", {"storagedomainID": domain.id, "autoDetach": False})
    assert set(lab.host.disconnect_servers(dc.id, [domain.server]).values()) == {0}


def test_import_a_domain_of_another_pool(lab: Lab) -> None:
    """It still says that it belongs elsewhere: detached by force, attached; its disks are there."""
    dc = lab.dc
    domain = lab.new_domain()
    disk = dc.create_disk(domain.id, 4 * MIB)
    leave(lab, domain)
    pretend_member(Path(domain.server.spec) / domain.id, str(uuid.uuid4()))
    lab.host.disconnect_servers(dc.id, [domain.server])
    lab.host.connect_servers(dc.id, [domain.server])
    params = {
        "storagepoolID": NO_UUID,
        "domainClass": 1,
        "storageType": "",
        "remotePath": domain.server.spec,
    }
    assert lab.host.vds.call("Host.getStorageDomains", params) == [domain.id]
    assert lab.host.domain_info(domain.id).pools not in ([], [dc.id])
    lab.attach(domain)
    assert lab.host.images(domain.id) == [disk.image]
    assert dc.info(disk).status == "OK"
    leave(lab, domain)
    with pytest.raises(VdsError) as unknown:
        lab.host.pool_info(str(uuid.uuid4()))
    assert unknown.value.code == 309


def test_a_domain_that_is_unreachable_is_told(lab: Lab) -> None:
    """The pool's other domain works on; the engine reads 358 or an error, and no free space.

    Who listens for events hears of it, and of its end, once each.
    """
    dc = lab.dc
    domain = lab.new_domain("local")
    disk = dc.create_disk(domain.id, MIB)
    root = Path(domain.server.spec)
    away = root / "away"
    heard = len(domain_events(lab, domain.id))
    (root / domain.id).rename(away)
    dc.wait(lambda: not lab.host.health()[domain.id].valid, "seen as invalid")
    assert lab.host.health()[domain.id].code in (358, 379)
    assert domain.id in lab.host.pool_info(dc.id).domains  # else the engine would drop it
    dc.delete(dc.create_disk(dc.master, MIB))
    away.rename(root / domain.id)
    dc.wait_healthy(lab.host)
    dc.wait(lambda: domain_events(lab, domain.id)[heard:] == [(358, False), (0, True)], "events")
    assert dc.info(disk).status == "OK"
    dc.delete(disk)
    leave(lab, domain)


def domain_events(lab: Lab, domain: str) -> list[tuple[int, bool]]:
    """Code and validity, as the events about a domain told them."""
    name = f"|storage|domain_status|{domain}"
    told = [params[domain] for method, params in lab.host.events if method == name]
    return [(one["code"], one["valid"]) for one in told]


# -- helpers -------------------------------------------------------------------------------------


def leave(lab: Lab, domain: Domain) -> None:
    """Maintenance and detach; the storage stays connected."""
    dc = lab.dc
    dc.domain_to_maintenance(domain)
    lab.host.connect_servers(dc.id, [domain.server])
    detach = {"storagedomainID": domain.id, "masterSdUUID": dc.master}
    dc.irs("StorageDomain.detach", **detach, masterVersion=dc.master_version)
    del dc.domains[domain.id]
    dc.connect_pool(lab.host)


def pretend_member(root: Path, pool: str) -> None:
    """Metadata as another pool's host leaves it: text lines and their checksum."""
    path = root / "dom_md" / "metadata"
    lines = dict(line.split("=", 1) for line in path.read_text().splitlines() if "=" in line)
    lines["POOL_UUID"] = pool
    del lines["_SHA_CKSUM"]
    text = "".join(f"{key}={lines[key]}" for key in sorted(lines))
    lines["_SHA_CKSUM"] = hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest()
    path.write_text("".join(f"{key}={value}\n" for key, value in lines.items()))


def fill(lab: Lab, disk: Disk, pattern: int, fmt: str) -> None:
    path = lab.host.prepare(lab.dc.id, disk.domain, disk.image, disk.leaf)
    qemu_io(path, f"write -P {pattern} 0 1M", fmt)
    lab.host.teardown(lab.dc.id, disk.domain, disk.image, disk.leaf)


def qemu_io(path: str, command: str, fmt: str) -> None:
    argv = ["qemu-io", "-f", fmt, "-c", command, path]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Pattern verification failed" not in done.stdout
