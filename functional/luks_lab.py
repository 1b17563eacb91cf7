# SPDX-License-Identifier: GPL-2.0-or-later
"""Encrypted volumes for tests, on a directory and on a LUN; guests that libvirt gives the key."""

from __future__ import annotations

import base64
import contextlib
import json
import subprocess
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import libvirt
import libvirt_qemu

from functional.engine.host import FCP, StorageServer
from functional.guests.guest import Plan, definition
from functional.guests.libvirtd import Libvirtd
from functional.pool_lab import COW, MIB, Lab, Volume, local_server, make_lab
from functional.processes import AgentProcess
from functional.standin.process import StandInProcess

KEY, OTHER = "correct horse battery", "another key altogether"
SECRETS = {"disk": str(uuid.uuid4()), "other": str(uuid.uuid4()), "ceph": str(uuid.uuid4())}
SIZE = 64 * MIB
PATTERN = b"\xa5" * 512
PREALLOCATED = 1


class World:
    def __init__(self, lab: Lab, libvirtd: Libvirtd, domains: dict[str, str]) -> None:
        self.lab = lab
        self.libvirtd = libvirtd
        self.domains = domains

    def make(self, kind: str, secret: str = "disk", **more: Any) -> Volume:
        return self.lab.create(self.domains[kind], SIZE, secretID=SECRETS[secret], **more)

    def code(self, domain: str, **more: Any) -> int:
        """Of making a volume that cannot be."""
        where = Volume(domain, str(uuid.uuid4()), str(uuid.uuid4()))
        given = {"size": SIZE, "fmt": COW, **more}
        if "srcImgUUID" in more:
            where.image = more["srcImgUUID"]
        code = self.lab.task("Volume.create", **self.lab.new_volume(where, **given))
        assert self.lab.code("Volume.getInfo", **self.lab.ids(where)) == 201
        return code

    def extend(self, where: Volume, size: int, **more: Any) -> int:
        ids = self.lab.ids(where)
        return self.lab.task("Volume.extendSize", **ids, newSize=str(size), **more)

    @contextlib.contextmanager
    def prepared(self, where: Volume) -> Iterator[Path]:
        path = self.lab.prepare(where)
        try:
            yield path
        finally:
            self.lab.call("Image.teardown", **self.lab.ids(where))

    def opens(self, where: Volume, key: str, raw: bool = False) -> bool:
        """By qemu-io alone, without libvirt."""
        node: dict[str, Any] = {"driver": "luks", "key-secret": "s"}
        if not raw:
            inside = {"format": "luks", "key-secret": "s"}
            node = {"driver": "qcow2", "encrypt": inside, "backing": None}
        with self.prepared(where) as path:
            node["file"] = {"driver": driver(path), "filename": str(path)}
            done = subprocess.run(
                ["qemu-io", "--object", "secret,id=s,file=/dev/stdin", "-r", "-c", "read 0 4k",
                 "json:" + json.dumps(node)],
                input=key.encode(), capture_output=True, timeout=120, check=False,
            )  # fmt: skip
        return done.returncode == 0

    @contextlib.contextmanager
    def guest(
        self, *chain: Volume, secret: str = "disk", raw: bool = False
    ) -> Iterator[Guest]:
        """A paused one; `chain` from the top down, the lowest is a `raw` volume."""
        with self.prepared(chain[0]) as top:
            paths = [top.parent / volume.volume for volume in chain]
            xml = definition(Plan("luks", agent=False), self.libvirtd.directory)
            xml = xml.replace("<devices>", f"<devices>{disk(paths, SECRETS[secret], raw=raw)}")
            with contextlib.closing(libvirt.open(self.libvirtd.uri)) as connection:
                domain = connection.createXML(xml, libvirt.VIR_DOMAIN_START_PAUSED)
                try:
                    yield Guest(domain)
                finally:
                    domain.destroy()


class Guest:
    def __init__(self, domain: Any) -> None:
        self._domain = domain

    def io(self, command: str, device: str = "virtio-disk0/virtio-backend") -> str:
        """By QEMU itself, as if the guest did it."""
        line = f'qemu-io -d /machine/peripheral/{device} "{command}"'
        flags = libvirt_qemu.VIR_DOMAIN_QEMU_MONITOR_COMMAND_HMP
        said: str = libvirt_qemu.qemuMonitorCommand(self._domain, line, flags)
        assert "fail" not in said.lower(), said
        assert "error" not in said.lower(), said
        return said

    @property
    def id(self) -> str:
        found: str = self._domain.UUIDString()
        return found

    @property
    def capacity(self) -> int:
        size: int = self._domain.blockInfo("vda")[0]
        return size


def driver(path: Path) -> str:
    return "host_device" if path.is_block_device() else "file"


def disk(paths: list[Path], secret: str, *, raw: bool = False) -> str:
    kind, where = ("block", "dev") if paths[0].is_block_device() else ("file", "file")
    key = f"<encryption format='luks'><secret type='passphrase' uuid='{secret}'/></encryption>"
    formats = ["qcow2"] * (len(paths) - 1) + ["raw" if raw else "qcow2"]
    below = "<backingStore/>"
    for path, form in reversed(list(zip(paths, formats, strict=True))[1:]):
        below = (
            f"<backingStore type='{kind}'><format type='{form}'/>"
            f"<source {where}='{path}'>{key}</source>{below}</backingStore>"
        )
    return (
        f"<disk type='{kind}' device='disk'>"
        f"<driver name='qemu' type='{formats[0]}' cache='none'/>"
        f"<source {where}='{paths[0]}'>{key}</source>{below}"
        "<target dev='vda' bus='virtio'/></disk>"
    )


def secret(name: str, value: str, usage_type: str = "volume") -> dict[str, str]:
    return {
        "uuid": SECRETS[name], "usageType": usage_type, "usageID": f"ovirt/{name}",
        "password": base64.b64encode(value.encode()).decode(),
    }  # fmt: skip


@contextlib.contextmanager
def luks_lab(
    workdir: Path,
    start_agent: Callable[..., AgentProcess],
    make_standin: Callable[..., StandInProcess],
    make_luns: Callable[..., list[str]],
) -> Iterator[World]:
    """Its domains are "local" and "lun"."""
    libvirtd = Libvirtd(workdir / "virt")
    libvirtd.start()
    luns = make_luns(1)
    agent = start_agent(
        "luks", tls=False, standin=make_standin(sync=False), lvm__devices=",".join(luns),
        libvirt__uri=libvirtd.uri, secrets__luks_iteration_time="20",
    )  # fmt: skip
    lab = make_lab(agent)
    domains = {
        "local": lab.add_domain(local_server(workdir / "local")),
        "lun": lab.add_domain(StorageServer(FCP, devices=tuple(luns))),
    }
    secrets = [secret("disk", KEY), secret("other", OTHER), secret("ceph", KEY, "ceph")]
    lab.call("Host.registerSecrets", secrets=secrets)
    yield World(lab, libvirtd, domains)
    lab.client.close()
    libvirtd.stop()
