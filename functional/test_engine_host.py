# SPDX-License-Identifier: GPL-2.0-or-later
"""A host on its way to Up, what it says of itself, and transfers through a real ovirt-imageio."""

from __future__ import annotations

import http.client
import os
import re
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from functional.engine.datacenter import DataCenter, Domain
from functional.engine.host import COW, LOCALFS, POSIXFS, RAW, Host, StorageServer, pdiv
from functional.engine.replies import NO_UUID
from functional.engine.wire import VdsError
from functional.processes import AgentProcess
from vdsm_storage.domains.domain import SUPPORTED_VERSIONS

MIB = 1024**2
IMAGEIO = Path(sys.executable).with_name("ovirt-imageio")
NOT_FOUND = -32601
NOT_BUILT = 44


@dataclass
class Lab:
    agent: AgentProcess
    host: Host
    dc: DataCenter


@pytest.fixture(scope="module")
def lab(
    start_agent: Callable[..., AgentProcess], make_server: Callable[[str], StorageServer]
) -> Iterator[Lab]:
    agent = start_agent("agent")
    host = agent.host("host-1", 1)
    dc = DataCenter.begin([host], make_server("local"))
    yield Lab(agent, host, dc)
    host.close()


# -- 2: becoming Up --------------------------------------------------------------------------------


def test_what_a_host_says_before_it_is_up(lab: Lab) -> None:
    """Every three seconds, therefore cheap: many of them in the time-out of one."""
    for _ in range(20):
        capabilities = lab.host.capabilities()
    assert tuple(capabilities.domain_versions) == SUPPORTED_VERSIONS
    assert re.fullmatch(r"[0-9a-f-]{36}", lab.host.hardware()["systemUUID"])
    for verb, params in (
        ("Host.ping", {}),
        ("Host.ping2", {}),
        ("Host.confirmConnectivity", {}),
        ("Host.setLogLevel", {"level": "INFO"}),
    ):
        assert lab.host.vds.call(verb, params) is True
    assert lab.host.vds.call("Host.echo", {"message": "wörld"}) == "wörld"


def test_no_virtual_machines(lab: Lab) -> None:
    call = lab.host.vds.call
    assert call("Host.getAllVmStats", {}) == []
    assert call("Host.getVMList", {"onlyUUID": True}) == []
    assert call("Host.getVMList", {"onlyUUID": False, "fullStatus": True}) == []
    assert call("Host.getVMFullList", {}) == []
    assert call("Host.dumpxmls", {"vmList": [str(uuid.uuid4())]}) == {}
    assert call("Host.getAllVmIoTunePolicies", {}) == {}


@pytest.mark.parametrize(
    ("verb", "params"),
    [
        ("Host.setMOMPolicyParameters", {"key_value_store": {"balloonEnabled": False}}),
        ("Host.hostdevListByCaps", {"caps": []}),
        ("VM.screenshot", {"vmID": NO_UUID}),
        ("SDM.isolateVolume", {"vol_info": {}}),
    ],
)
def test_verbs_that_are_not_there_say_so(lab: Lab, verb: str, params: dict[str, object]) -> None:
    """The engine only logs these failures."""
    with pytest.raises(VdsError) as refused:
        lab.host.vds.call(verb, params)
    assert refused.value.code in (NOT_FOUND, NOT_BUILT)


def test_wrong_parameters_are_named(lab: Lab) -> None:
    with pytest.raises(VdsError) as refused:
        lab.host.vds.call("StorageDomain.getInfo", {"storagedomainID": "../../etc"})
    assert refused.value.code == -32602
    assert "storagedomainID" in refused.value.message


# -- storage, as the import dialogue and monitoring see it -----------------------------------------


def test_looking_for_domains(lab: Lab) -> None:
    """The storage type comes as a string, and blank is no filter."""
    server = lab.dc.domains[lab.dc.master].server

    def look(kind: str, path: str, pool: str = NO_UUID, domain_class: int = 1) -> object:
        params = {
            "storagepoolID": pool,
            "domainClass": domain_class,
            "storageType": kind,
            "remotePath": path,
        }
        return lab.host.vds.call("Host.getStorageDomains", params)

    found = [lab.dc.master]
    assert look("", "") == found
    assert look(str(LOCALFS), server.spec) == found
    assert look(str(POSIXFS), "") == []
    assert look("", "/elsewhere") == []
    assert look("", "", pool=lab.dc.id) == found
    assert look("", "", pool=str(uuid.uuid4())) == []
    assert look("", "", domain_class=2) == []


def test_pools_and_repository_statistics(lab: Lab) -> None:
    assert lab.host.vds.call("Host.getConnectedStoragePools", {}) == [lab.dc.id]
    known = lab.host.vds.call("Host.getStorageRepoStats", {"domains": [lab.dc.master]})
    assert known[lab.dc.master]["valid"] is True
    assert lab.host.vds.call("Host.getStorageRepoStats", {"domains": [str(uuid.uuid4())]}) == {}


def test_monitoring_a_domain_without_a_pool(
    lab: Lab, make_server: Callable[[str], StorageServer]
) -> None:
    """As the hosted engine's agent does, before there is a pool."""
    domain = Domain(str(uuid.uuid4()), make_server("bind"))
    lab.dc.create_domain(lab.host, domain, pool=NO_UUID)
    lab.host.vds.call("Host.startMonitoringDomain", {"sdUUID": domain.id, "hostID": 1})
    assert domain.id in lab.host.health()

    def held() -> bool:
        health = lab.host.health()[domain.id]
        return health.actual and health.valid and health.acquired

    lab.dc.wait(held, "the host id")
    lab.host.vds.call("Host.stopMonitoringDomain", {"sdUUID": domain.id})
    assert domain.id not in lab.host.health()
    lab.host.vds.call("Host.stopMonitoringDomain", {"sdUUID": lab.dc.master})
    assert lab.dc.master in lab.host.health()  # the pool's domain stays watched
    assert set(lab.host.disconnect_servers(NO_UUID, [domain.server]).values()) == {0}


# -- 3.11: upload and download ---------------------------------------------------------------------


@pytest.fixture
def imageio(lab: Lab) -> Iterator[int]:
    """The port of a real daemon whose control socket is where the agent looks."""
    run = lab.agent.dir
    (run / "conf.d").mkdir(exist_ok=True)
    (run / "conf.d" / "test.conf").write_text(
        "[tls]\nenable = false\n[local]\nenable = false\n"
        "[remote]\nhost = 127.0.0.1\nport = 0\n"
        f"[control]\ntransport = unix\nsocket = {run}/imageio.sock\n"
        f"[daemon]\nrun_dir = {run}\ndrop_privileges = false\nsystemd_enable = false\n"
        "[handlers]\nkeys = stderr\n[logger_root]\nhandlers = stderr\n"
    )
    log = run / "imageio.log"
    with log.open("wb") as stderr:
        process = subprocess.Popen([IMAGEIO, "-c", run], stderr=stderr, stdin=subprocess.DEVNULL)
    try:
        end = time.monotonic() + 30
        while not (found := _listening(log)) and time.monotonic() < end:
            time.sleep(0.05)
        yield int(found)
    finally:
        process.terminate()
        process.wait(30)


def _listening(log: Path) -> str:
    """The port once all services listen (the control service is the last)."""
    text = log.read_text()
    found = re.search(r"remote.service listening on \('127.0.0.1', (\d+)\)", text)
    return found[1] if found and "control.service listening" in text else ""


def test_upload_and_download(lab: Lab, imageio: int) -> None:
    dc, call = lab.dc, lab.host.vds.call
    disk = dc.create_disk(dc.master, 8 * MIB, fmt=RAW)
    where = pdiv(dc.id, disk.domain, disk.image, disk.leaf)
    data = os.urandom(8 * MIB)

    path = lab.host.prepare(dc.id, disk.domain, disk.image, disk.leaf)
    dc.irs_raw("Volume.setLegality", {**where, "legality": "ILLEGAL"})
    assert dc.info(disk).status == "ILLEGAL"
    transfer(lab, imageio, path, "write", data)
    assert call("Volume.verify_untrusted", where) is True
    dc.irs_raw("Volume.setLegality", {**where, "legality": "LEGAL"})
    info = call("Volume.getQemuImageInfo", where)
    assert (info["format"], info["virtualsize"]) == ("raw", 8 * MIB)
    lab.host.teardown(dc.id, disk.domain, disk.image, disk.leaf)
    assert dc.info(disk).status == "OK"

    path = lab.host.prepare(dc.id, disk.domain, disk.image, disk.leaf)
    assert transfer(lab, imageio, path, "read", data) == data
    lab.host.teardown(dc.id, disk.domain, disk.image, disk.leaf)
    dc.delete(disk)


def test_a_bad_upload_is_found_out(lab: Lab, imageio: int) -> None:
    """A qcow2 header that names a backing file: 484, and the image stays illegal."""
    dc = lab.dc
    disk = dc.create_disk(dc.master, 8 * MIB, fmt=COW)
    where = pdiv(dc.id, disk.domain, disk.image, disk.leaf)
    path = lab.host.prepare(dc.id, disk.domain, disk.image, disk.leaf)
    dc.irs_raw("Volume.setLegality", {**where, "legality": "ILLEGAL"})
    evil = lab.agent.dir / "evil.qcow2"
    argv = ["qemu-img", "create", "-q", "-f", "qcow2", "-u", "-F", "raw", "-b", "/etc/passwd"]
    subprocess.run([*argv, evil, str(8 * MIB)], check=True, timeout=60)
    transfer(lab, imageio, path, "write", evil.read_bytes())
    with pytest.raises(VdsError) as refused:
        lab.host.vds.call("Volume.verify_untrusted", where)
    assert refused.value.code == 484
    assert dc.info(disk).status == "ILLEGAL"
    lab.host.teardown(dc.id, disk.domain, disk.image, disk.leaf)
    dc.delete(disk)


def test_without_the_daemon(lab: Lab) -> None:
    with pytest.raises(VdsError) as refused:
        lab.host.vds.call("Host.get_image_ticket", {"uuid": str(uuid.uuid4())})
    assert refused.value.code in (482, 483)


def transfer(lab: Lab, port: int, path: str, mode: str, data: bytes) -> bytes:
    """A ticket, the client's one request, the engine's look at it, and its end."""
    ticket = str(uuid.uuid4())
    whole = {
        "uuid": ticket,
        "timeout": 300,
        "inactivity_timeout": 60,
        "size": len(data),
        "url": f"file://{path}",
        "ops": [mode],
        "sparse": True,
        "transfer_id": str(uuid.uuid4()),
        "dirty": False,
        "filename": "disk",
    }
    call = lab.host.vds.call
    assert call("Host.add_image_ticket", {"ticket": whole}) is True
    assert call("Host.extend_image_ticket", {"uuid": ticket, "timeout": 300}) is True
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    try:
        if mode == "write":
            connection.request("PUT", f"/images/{ticket}", body=data)
        else:
            connection.request("GET", f"/images/{ticket}")
        response = connection.getresponse()
        body = response.read()
        assert response.status == 200, body
    finally:
        connection.close()
    info = call("Host.get_image_ticket", {"uuid": ticket})
    assert (info["uuid"], info["size"], info["ops"]) == (ticket, len(data), [mode])
    # The daemon counts an operation when it has ended it, which may be after its last byte came.
    end = time.monotonic() + 60
    while (done := call("Host.get_image_ticket", {"uuid": ticket})["transferred"]) != len(data):
        assert time.monotonic() < end, f"{done} of {len(data)} bytes are transferred"
        time.sleep(0.05)
    assert call("Host.remove_image_ticket", {"uuid": ticket}) is True
    return body

