# SPDX-License-Identifier: GPL-2.0-or-later
"""The requests behind the golden block domains, made again of this agent.

What it leaves on the LUNs and answers is kept stage by stage, under the names of the golden files,
for the tests to compare.
"""

from __future__ import annotations

import json
import os
import stat
import subprocess
from collections.abc import Mapping
from typing import Any

from functional.checker import tags
from tests.domains.block_world import BlockHost, HostMaker
from tests.domains.conftest import GOLDEN as ALL_GOLDEN
from tests.domains.conftest import wait_for
from vdsm_storage.base.units import MIB
from vdsm_storage.base.uuids import BLANK
from vdsm_storage.domains import block_names as names
from vdsm_storage.domains.masters import NewPool
from vdsm_storage.domains.new_domain import CreateRequest
from vdsm_storage.images.create import NewVolumeRequest
from vdsm_storage.leases.external import LeaseRef

GOLDEN = ALL_GOLDEN / "block-domain"
PE_START = 129 * MIB
EXTENT = 128 * MIB
REPORTS = ("lvs", "vgs", "pvs")
METADATA = {"v4": "4-metadata@0.bin", "v5": "4-metadata@1M.bin"}


def golden(version: str, name: str) -> bytes:
    return (GOLDEN / version / name).read_bytes()


def golden_json(version: str, name: str) -> Any:
    return json.loads(golden(version, name))


def golden_rows(version: str, name: str) -> list[dict[str, str]]:
    """The rows of a report of lvm; the kind is in the name: 1-vg-created.vgs.json."""
    kind = name.split(".")[-2].removesuffix("s")
    rows: list[dict[str, str]] = golden_json(version, name)["report"][0][kind]
    return rows


def new_volume(given: Mapping[str, Any], domain: str, ctime: int) -> NewVolumeRequest:
    return NewVolumeRequest(
        domain=domain,
        image=given["img"],
        volume=given["vol"],
        capacity=given["capacity"],
        format=given["format"],
        type=given["alloc"],
        disktype=given["disktype"],
        description=given["desc"],
        parent_image=given.get("src_img", BLANK),
        parent=given.get("src_vol", BLANK),
        initial_size=given.get("initial_size"),
        sequence=given.get("sequence", 0),
        ctime=ctime,
    )


class Replay:
    """One golden domain made again.  `seen` has what was found: bytes, rows, answers."""

    def __init__(self, version: str, hosts: HostMaker) -> None:
        self.version = version
        self.given = golden_json(version, "input.json")
        self.sd_id: str = self.given["sd_uuid"]
        self.luns = hosts.luns
        self.devices = [self.luns.make(guid) for guid in self.given["devices"]]
        self.host: BlockHost = hosts.host("host")
        self.seen: dict[str, Any] = {}
        self.dirty(self.devices[0])

    @staticmethod
    def dirty(device: str) -> None:
        """What was on the LUN before must not show in what the format wants zeroed."""
        with open(device, "r+b") as file:
            for extent in (0, 2, 3):  # metadata, inbox, outbox
                file.seek(PE_START + extent * EXTENT)
                file.write(b"\xee" * (18 * MIB))

    # -- looking -------------------------------------------------------------------------------

    def see_report(self, name: str) -> None:
        fields = list(golden_rows(self.version, name)[0])
        command = name.split(".")[-2]
        self.seen[name] = self.luns.report(command, fields, self.sd_id)

    def see_bytes(self, name: str, lv: str, offset: int, length: int = 0) -> None:
        """As long as the golden file, or `length`."""
        length = length or len(golden(self.version, name))
        self.seen[name] = self.luns.group(self.sd_id).read(lv, offset, length)

    def see_domain(self, stage: int) -> None:
        domain = self.host.domain(self.sd_id)
        self.seen[f"{stage}-sd-info.json"] = domain.info()
        self.seen[f"{stage}-sd-stats.json"] = domain.stats()

    # -- the stages ----------------------------------------------------------------------------

    def run(self) -> None:
        self.make_domain()
        self.make_pool()
        self.make_volumes()
        self.make_leases()
        self.delete_image()

    def make_domain(self) -> None:
        given, host = self.given, self.host
        vg = host.make_group(self.sd_id)
        self.see_report("1-vg-created.pvs.json")
        self.see_report("1-vg-created.vgs.json")
        host.services.create(
            CreateRequest(
                self.sd_id, given["type"], vg, given["name"], version=int(self.version[1:])
            )
        )
        for kind in REPORTS:
            self.see_report(f"2-domain-created.{kind}.json")
        for offset in (0, 512000, 1023488):
            self.see_bytes(f"2-ids@{offset}.bin", "ids", offset)
        for mailbox in ("inbox", "outbox"):
            self.see_bytes(f"2-{mailbox}@0.bin", mailbox, 0)
        self.see_bytes("2-leases@1048576.bin", "leases", MIB)
        self.see_bytes("2-xleases@0.bin", "xleases", 0)
        self.see_bytes("2-xleases-index.bin", "xleases", MIB, 253952)
        self.see_bytes("2-xleases@2align.bin", "xleases", 2 * MIB)
        group = self.luns.group(self.sd_id)
        for lv, length in (("metadata", 17 * MIB), ("inbox", 1024000), ("outbox", 1024000)):
            self.seen[f"zero {lv}"] = group.read(lv, 0, length)
        self.seen["2-master-dumpe2fs.txt"] = self.dumpe2fs()
        self.see_domain(2)

    def dumpe2fs(self) -> str:
        group, activation = self.host.domain(self.sd_id).group, self.host.activation
        activation.activate(group, [names.MASTER])
        try:
            argv = ["dumpe2fs", "-h", activation.path(self.sd_id, names.MASTER)]
            return subprocess.run(
                argv, capture_output=True, text=True, check=True, timeout=60
            ).stdout
        finally:
            activation.deactivate(group, [names.MASTER])

    def make_pool(self) -> None:
        given, services = self.given, self.host.services
        services.masters.create(
            NewPool(
                given["pool_uuid"], given["pool_name"], self.sd_id, given["master_version"],
                [self.sd_id], lease=(0, 0, 0, 0),
            )
        )  # fmt: skip
        self.see_bytes("3-leases@1048576.bin", "leases", MIB)
        self.see_report("3-pool-created.vgs.json")
        self.host.world.attach(given["pool_uuid"], self.sd_id)
        wait_for(lambda: self.host.world.health.usable(self.sd_id))

    def make_volumes(self) -> None:
        given, host = self.given, self.host
        for number, volume in enumerate(given["volumes"]):
            host.create(new_volume(volume, self.sd_id, given["ctime"] + number))
            if volume.get("share"):
                host.make_template(self.sd_id, volume["img"], volume["vol"])
        for kind in REPORTS:
            self.see_report(f"4-volumes-created.{kind}.json")
        base = MIB if self.version == "v5" else 0
        self.see_bytes(METADATA[self.version], "metadata", base)
        self.seen["4-volume-info.json"] = {
            volume["vol"]: host.volumes.info(self.sd_id, volume["img"], volume["vol"])
            for volume in given["volumes"]
        }
        group = self.luns.group(self.sd_id)
        self.seen["4-volume-leases.json"] = {
            row["offset"]: group.read("leases", row["offset"], 1024)
            for row in golden_json(self.version, "4-volume-leases.json")
        }
        self.seen["4-links.json"] = self.links()

    def links(self) -> list[str]:
        """Those of the domain while all its volumes are prepared for guests."""
        given, host = self.given, self.host
        for volume in given["volumes"]:
            host.images.prepare(self.sd_id, volume["img"], volume["vol"])
        root = host.domain(self.sd_id).path
        found = [_line(root)]
        for directory, directories, files in os.walk(root):
            found += [_line(os.path.join(directory, name), root) for name in (*directories, *files)]
        for volume in given["volumes"]:
            host.images.teardown(self.sd_id, volume["img"])
        return sorted(found)

    def make_leases(self) -> None:
        host, ids = self.host, self.given["xleases"]
        for lease in ids:
            host.task(host.leases.start_create(LeaseRef(self.sd_id, lease), None))
        self.see_bytes("5-xleases-index.bin", "xleases", MIB)
        self.see_bytes("5-xleases@3align.bin", "xleases", 3 * MIB)
        host.task(host.leases.start_delete(LeaseRef(self.sd_id, ids[0])))
        self.see_bytes("5-xleases-index-removed.bin", "xleases", MIB)
        self.see_bytes("5-xleases@3align-removed.bin", "xleases", 3 * MIB)
        self.seen["5-dump-full.json"] = host.services.dump(self.sd_id, True)
        self.see_domain(5)

    def delete_image(self) -> None:
        given, host = self.given, self.host
        store = host.domain(self.sd_id).store
        volumes = {volume["vol"]: volume["img"] for volume in given["volumes"]}
        with store.lock.held(15.0):
            extended = given["extend"]["vol"]
            store.resize(volumes[extended], extended, given["extend"]["size_mb"] * MIB, False)
            store.mark_removed(given["delete_img"])
        self.see_report("6-after-delete-mark.lvs.json")
        self.seen["6-dump.json"] = host.services.dump(self.sd_id, False)
        store.purge(given["delete_img"])
        self.see_report("7-after-purge.lvs.json")
        name = METADATA[self.version]
        stage4 = self.seen[name]
        self.see_bytes(name, "metadata", MIB if self.version == "v5" else 0)
        self.seen["7-metadata"], self.seen[name] = self.seen[name], stage4
        ctime = given["ctime"] + len(volumes)
        host.create(new_volume(given["reuse"], self.sd_id, ctime))
        self.see_report("8-slot-reused.lvs.json")
        self.seen["8-vgcfgbackup.txt"] = self.luns.text(self.sd_id)


def _line(path: str, root: str = "") -> str:
    """As the golden file has it: type, mode, name, target."""
    status = os.lstat(path)
    kind = "l" if stat.S_ISLNK(status.st_mode) else "d"
    target = os.readlink(path) if kind == "l" else ""
    name = f"./{os.path.relpath(path, root)}" if root else "."
    return f"{kind} {stat.S_IMODE(status.st_mode):o} {name} -> {target}"


# -- what may differ -------------------------------------------------------------------------


# Ids, how many commits there were, and whether anything is active, which lvm cannot tell here.
VARIES = ("pv_uuid", "vg_uuid", "lv_uuid", "vg_seqno", "lv_permissions")
TEXT_BYTES = ("pv_mda_free", "vg_mda_free", "mdafree")  # what the text leaves, rounded


class Names:
    """What is named otherwise here: `devices` by their golden GUIDs, `ids` of the group and of its
    devices by the golden ones."""

    def __init__(self, devices: Mapping[str, str], ids: Mapping[str, str]) -> None:
        self._devices = devices
        self._ids = ids

    @classmethod
    def of(cls, replay: Replay) -> Names:
        devices = dict(zip(replay.given["devices"], replay.devices, strict=True))
        ids: dict[str, str] = {}
        for report, key, uuid in (("pvs", "pv_name", "pv_uuid"), ("vgs", "vg_name", "vg_uuid")):
            name = f"1-vg-created.{report}.json"
            mine = {row[key]: row[uuid] for row in replay.seen[name]}
            for row in golden_rows(replay.version, name):
                ids[row[uuid]] = mine[cls(devices, {}).device(row[key])]
        return cls(devices, ids)

    def device(self, name: str) -> str:
        """/dev/mapper/GUID -> the path here; another text stays."""
        for guid, path in self._devices.items():
            name = name.replace(f"/dev/mapper/{guid}", path)
        return name

    def text(self, text: str) -> str:
        """A golden text with our ids in it."""
        for theirs, ours in self._ids.items():
            text = text.replace(theirs, ours)
        return text

    def tags(self, text: str) -> set[str]:
        """Golden tags with our ids, and the checksum that then belongs to them."""
        found = set(self.text(text).split(",")) - {""}
        values = dict(
            tags.decode(tag.removeprefix(tags.PREFIX)).split("=", 1)
            for tag in found
            if tag.startswith(tags.PREFIX)
        )
        seal = f"{tags.PREFIX}{tags.CHECKSUM}="
        if tags.CHECKSUM in values:
            found = {tag for tag in found if not tag.startswith(seal)}
            found.add(seal + tags.checksum(values))
        return found


def comparable(row: dict[str, str], names: Names | None = None) -> dict[str, Any]:
    """A row of a report; of a golden one with `names`."""
    found: dict[str, Any] = {}
    for key, value in row.items():
        if key in VARIES:
            continue
        if key.endswith("_tags"):
            found[key] = names.tags(value) if names else set(value.split(",")) - {""}
        elif key in TEXT_BYTES:
            found[key] = int(value) > 0
        elif key == "lv_attr":
            found[key] = value[:4] + value[6:]
        else:
            found[key] = names.device(value) if names else value
    return found
