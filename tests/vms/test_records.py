# SPDX-License-Identifier: GPL-2.0-or-later
"""What stands in a VM's metadata of its disks and their limits, and what is held for it."""

from __future__ import annotations

from pathlib import Path

from vdsm_storage.vms import iotune, records
from vdsm_storage.vms.drives import VolumePath
from vdsm_storage.vms.holdings import Holdings
from vdsm_storage.vms.iotune import NO_LIMITS
from vdsm_storage.vms.registry import Definition

VM = "00000000-0000-4000-8000-000000000001"
DOMAIN = "00000000-0000-4000-8000-0000000000d0"
IMAGE = "00000000-0000-4000-8000-0000000000e0"
VOLUME = "00000000-0000-4000-8000-0000000000b0"
HERE = VolumePath(DOMAIN, IMAGE, VOLUME)
PATH = f"/x/{DOMAIN}/images/{IMAGE}/{VOLUME}"
NAMES = {"domainID": DOMAIN, "imageID": IMAGE, "volumeID": VOLUME}


def domain(metadata: str = "", devices: str = "") -> str:
    return f"<domain><metadata>{metadata}</metadata><devices>{devices}</devices></domain>"


def engine(inner: str) -> str:
    return domain(f'<o:vm xmlns:o="http://ovirt.org/vm/1.0">{inner}</o:vm>')


ONE = (
    '<o:startTime type="float">1.5</o:startTime><o:device devtype="disk" name="vda">'
    f"<o:domainID>{DOMAIN}</o:domainID><o:imageID>{IMAGE}</o:imageID>"
    f"<o:volumeID>{VOLUME}</o:volumeID><o:shared>transient</o:shared></o:device>"
    '<o:device mac_address="1"><o:network>n</o:network></o:device>'
)


def again(element: str | None) -> str:
    """As libvirt gives it back: in its name space."""
    assert element is not None
    return domain(element.replace("<vm>", '<vm xmlns="http://ovirt.org/vm/1.0">', 1))


def test_records_are_read() -> None:
    assert records.records(domain()) == {}
    found = records.records(engine(ONE))
    assert found == {"vda": {**NAMES, "shared": "transient"}}
    assert records.volume_in(found["vda"]) == HERE
    assert records.volume_in({"GUID": "3600"}) is None


def test_record_is_added_and_removed() -> None:
    added = records.with_record(engine(ONE), "vdb", {"GUID": "3600"})
    assert set(records.records(again(added))) == {"vda", "vdb"}
    removed = records.with_record(again(added), "vdb", None)
    assert set(records.records(again(removed))) == {"vda"}
    assert removed is not None
    assert "startTime" in removed
    assert "mac_address" in removed


def test_record_is_changed_and_keeps_the_rest() -> None:
    changed = records.with_record(engine(ONE), "vda", {"volumeID": DOMAIN})
    assert records.records(again(changed))["vda"] == {
        **NAMES, "volumeID": DOMAIN, "shared": "transient",
    }  # fmt: skip


def test_nothing_to_change() -> None:
    assert records.with_record(engine(ONE), "vda", NAMES) is None
    assert records.with_record(engine(ONE), "vdb", None) is None


def test_vm_of_no_engine_gets_an_element() -> None:
    made = records.with_record(domain(), "vda", NAMES)
    assert records.records(again(made)) == {"vda": NAMES}


# -- limits ----------------------------------------------------------------------------------

POLICY = domain(
    '<t:qos xmlns:t="http://ovirt.org/vm/tune/1.0"><t:vcpuLimit>50</t:vcpuLimit><t:ioTune>'
    f'<t:device name="vda" path="{PATH}"><t:maximum><t:read_iops_sec>9</t:read_iops_sec>'
    "</t:maximum></t:device>"
    '<t:device name="vdb"><t:maximum><t:total_bytes_sec>5</t:total_bytes_sec></t:maximum>'
    "<t:guaranteed><t:total_bytes_sec>3</t:total_bytes_sec></t:guaranteed></t:device>"
    "</t:ioTune></t:qos>"
)


def test_policy_is_read() -> None:
    assert iotune.policy(domain()) == []
    first, second = iotune.policy(POLICY)
    assert first == {
        "name": "vda", "path": PATH, "maximum": {**NO_LIMITS, "read_iops_sec": 9},
        "guaranteed": NO_LIMITS,
    }  # fmt: skip
    assert second["guaranteed"]["total_bytes_sec"] == 3


def test_policy_follows_the_image() -> None:
    other = VolumePath(DOMAIN, VM, VOLUME)
    newer = VolumePath(DOMAIN, IMAGE, VM)  # a snapshot later
    assert iotune.maximum(POLICY, "vdx", newer)["read_iops_sec"] == 9
    assert iotune.maximum(POLICY, "vda", other) == {}  # another disk in its place
    assert iotune.maximum(POLICY, "vdb", None)["total_bytes_sec"] == 5
    assert iotune.maximum(POLICY, "vda", None) == {}
    assert iotune.maximum(domain(), "vda", HERE) == {}


def test_limits_in_force() -> None:
    disk = (
        f"<disk type='file' device='disk'><source file='{PATH}'/><target dev='vda'/>"
        "<iotune><total_bytes_sec>4</total_bytes_sec></iotune></disk>"
        "<disk type='file' device='cdrom'><target dev='hdc'/></disk>"
    )
    assert iotune.in_force(Definition.of(domain(devices=disk))) == [
        {"name": "vda", "path": PATH, "ioTune": {**NO_LIMITS, "total_bytes_sec": 4}}
    ]


# -- holdings --------------------------------------------------------------------------------


def test_holdings_outlive_the_agent(tmp_path: Path) -> None:
    directory = str(tmp_path / "holdings")
    first = Holdings(directory)
    other = VolumePath(DOMAIN, VM, VOLUME)
    first.add(VM, HERE)
    first.add(VM, HERE)
    first.add(VM, other)
    again_ = Holdings(directory)
    assert again_.vms() == [VM]
    assert again_.of(VM) == (HERE, other)
    again_.drop(VM, VolumePath(DOMAIN, IMAGE, "a later one"))
    assert again_.of(VM) == (other,)
    again_.drop(VM, other)
    again_.drop(VM, other)
    assert list((tmp_path / "holdings").iterdir()) == []
    assert Holdings(directory).vms() == []


def test_damaged_holdings(tmp_path: Path) -> None:
    (tmp_path / f"{VM}.json").write_text("{")
    (tmp_path / "x.json").write_text("[]")
    assert Holdings(str(tmp_path)).vms() == []


def test_what_a_disk_is_copied_to_stands_beside_its_record() -> None:
    there = VolumePath(VM, IMAGE, VOLUME)
    xml = engine(ONE)
    assert records.replicas(xml) == {}
    copied = again(records.with_replica(xml, "vda", there))
    assert records.replicas(copied) == {"vda": there}
    assert records.records(copied) == records.records(xml)
    assert records.with_replica(copied, "vda", there) is None
    changed = again(records.with_record(copied, "vda", {**NAMES, "domainID": VM}))
    assert records.replicas(changed) == {"vda": there}
    assert records.records(changed)["vda"]["domainID"] == VM
    assert records.replicas(again(records.with_replica(copied, "vda", None))) == {}
    assert records.with_replica(xml, "vda", None) is None


def test_a_disk_without_a_record_has_none_after_it_was_copied() -> None:
    copied = again(records.with_replica(engine(""), "vdb", HERE))
    assert records.replicas(copied) == {"vdb": HERE}
    assert records.volume_in(records.records(copied)["vdb"]) is None
    assert records.records(again(records.with_replica(copied, "vdb", None))) == {}
