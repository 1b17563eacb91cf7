# SPDX-License-Identifier: GPL-2.0-or-later
"""SCSI disks as sysfs shows them; and those of this very machine."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.san_tree import GIB, SanTree, golden_tree
from vdsm_storage.host.kernel_files import KernelFiles
from vdsm_storage.host.scsi import Scsi


@pytest.fixture
def tree(tmp_path: Path) -> SanTree:
    return SanTree(tmp_path)


def test_iscsi_disk(tmp_path: Path) -> None:
    disk = Scsi(golden_tree(tmp_path).files).disk("sdd")
    assert disk is not None
    assert (disk.number, disk.host, disk.lun, disk.session) == ("8:48", 1, 1, 2)
    assert (disk.vendor, disk.model, disk.revision) == ("LIO-ORG", "lun1", "4.0")
    assert disk.serial == "SLIO-ORG_lun1_2d05b1f3-670a-40e0-ae46-37e4fb7e1102"
    assert (disk.limits.size, disk.limits.logical, disk.transport) == (20 * GIB, 512, "iSCSI")
    assert disk.is_running


def test_fibre_channel_and_a_disk_of_the_host(tree: SanTree) -> None:
    tree.write("/sys/class/fc_host/host5/port_name", "0x1000000000000001")
    tree.disk("sdb", "8:16", "pci0000:00/0000:00:03.0/host5/rport-5:0-1/target5:0:1/5:0:1:12")
    tree.disk("sda", "8:0", "pci0000:00/0000:00:04.0/ata1/host0/target0:0:0/0:0:0:0")
    scsi = Scsi(tree.files)
    assert [(d.name, d.transport, d.lun) for d in scsi.disks()] == [
        ("sda", "", 0),
        ("sdb", "FCP", 12),
    ]
    assert [disk.name for disk in scsi.san_disks()] == ["sdb"]
    assert scsi.fc_hosts() == [5]


def test_order_is_the_kernels(tree: SanTree) -> None:
    for name in ("sdaa", "sdb", "sda", "sdz"):
        tree.disk(name, "8:0", f"platform/host0/target0:0:0/{name}/0:0:0:0")
    tree.write("/sys/block/vda/size", "1")
    assert Scsi(tree.files).names() == ["sda", "sdb", "sdz", "sdaa"]


@pytest.mark.parametrize(
    ("vendor", "model", "serial"),
    [
        ("LIO-ORG", "a b", "SLIO-ORG_a_b_1"),
        ("COMPELNT", "Compellent Vol", "SCOMPELNTCompellent_Vol_1"),
    ],
)
def test_serial_is_that_of_scsi_id(tree: SanTree, vendor: str, model: str, serial: str) -> None:
    place = "platform/host0/target0:0:0/0:0:0:0"
    tree.disk("sda", "8:0", place, serial="1", vendor=f"{vendor:8}", model=model)
    disk = Scsi(tree.files).disk("sda")
    assert disk is not None
    assert disk.serial == serial


def test_placeholders_are_no_luns(tree: SanTree) -> None:
    place = tree.session(1, "192.0.2.1")
    tree.disk("sda", "8:0", f"{place}/0:0:0:0", size=0)
    assert Scsi(tree.files).san_disks() == []


def test_what_is_written(tree: SanTree) -> None:
    place = tree.session(1, "192.0.2.1")
    tree.disk("sda", "8:0", f"{place}/0:0:0:0")
    scsi = Scsi(tree.files)
    scsi.scan(0)
    scsi.rescan("sda")
    scsi.remove("sda")
    assert tree.read("/sys/class/scsi_host/host0/scan") == "- - -"
    assert tree.read("/sys/block/sda/device/rescan") == "1"
    assert tree.read("/sys/block/sda/device/delete") == "1"
    with pytest.raises(OSError, match="host9"):
        scsi.scan(9)


def test_no_such_disk(tree: SanTree) -> None:
    assert Scsi(tree.files).disk("sda") is None
    assert Scsi(tree.files).disks() == []


def test_this_machine() -> None:
    for disk in Scsi(KernelFiles()).disks():
        assert disk.limits.logical >= 512
