# SPDX-License-Identifier: GPL-2.0-or-later
"""The checker finds nothing wrong with what VDSM wrote, and each kind of damage."""

from __future__ import annotations

import os
import re
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from functional.checker.check import HALF_MADE, MARKED, Expected, Promised, check
from functional.checker.group import crc, read_group, read_label
from functional.checker.tags import checksum, decode, values_of
from functional.checker.text import BadTextError, parse
from functional.sample_domain import AREAS, MIB, REUSED, SampleDomain, put

BASE = "9b810e76-6ec9-4286-a3ca-828dd5f4b3b2"  # raw, slot 1, has the child LEAF
LEAF = "b2221a58-008a-45a6-8464-7159c324c985"  # cow, slot 2, two segments
OVF = "1a2b8f1f-f1fd-42a2-9755-d4c13a902931"  # raw, slot 4
TEMPLATE = "05b6e6e3-07d4-4edc-9143-1193e6c3f339"  # cow, slot 5, shared
DERIVED = "025b413f-8a9a-421e-a648-a7dd06839eb9"  # cow, slot 6, from the template
IMAGE = "cd613e30-d8f1-4adf-91b7-584a2265b1f5"
OTHER = "78e51061-7311-48a3-82ce-6f447ed4d57b"
LEASES = ("c2cd789a-3802-48a9-ad45-f23d3b1a11df", "ed2f89d9-4a2f-40aa-b3c6-4af775a89294")
ZERO = "00000000-0000-0000-0000-000000000000"


@pytest.fixture
def sample(tmp_path: Path) -> SampleDomain:
    return SampleDomain(tmp_path)


def problems(sample: SampleDomain, **more: Any) -> list[str]:
    return check(sample.devices, sample.domain, **more)


def test_a_domain_of_vdsm_is_sound(sample: SampleDomain) -> None:
    assert problems(sample) == []


def test_text_that_wraps_around_the_ring(sample: SampleDomain) -> None:
    sample.lay_out(offset=-1000)
    assert problems(sample) == []


# -- what LVM wrote --------------------------------------------------------------------------


class Edit(NamedTuple):
    """A change of the metadata's text, and what the checker must say."""

    old: str
    new: str
    says: str
    count: int = 1


def lv(name: str, old: str, new: str, says: str) -> Edit:
    """A change inside a volume's section."""
    return Edit(rf"(\n\s+{name} {{.*?){old}", rf"\g<1>{new}", says)


EDITS = {
    "extent in two volumes": lv(OVF, '"pv0", 61', '"pv0", 62', "extent 62 of pv0 is in"),
    "extent twice in one": lv(LEAF, '"pv0", 66', '"pv0", 51', "extent 51 of pv0 is in"),
    "beyond the end": lv(OVF, '"pv0", 61', '"pv0", 157', "beyond the end of pv0"),
    "device unknown": lv(OVF, '"pv0", 61', '"pv7", 61', "pv7, which is not in the group"),
    "gap": lv(LEAF, "start_extent = 8", "start_extent = 9", "begins at 9, not at 8"),
    "segment count": lv(LEAF, "segment_count = 2", "segment_count = 1", "segment_count is 1"),
    "not linear": lv(OVF, "stripe_count = 1", "stripe_count = 2", "is not linear"),
    "same uuid": lv(OVF, "u4gnME-vBp2-nnbz-kjxi-UBYx-h3cR-7QS6D1",
                    "c9Ax2P-Yx7H-l6QS-k4gm-nrFg-2Z49-8TwsGK", "have the same UUID"),
    "same name": Edit(OVF, TEMPLATE, "is there twice"),
    "no extents": Edit("pe_count = 157", "pe_count = 60", "beyond the end of pv0"),
    "data over metadata": Edit("pe_count = 157", "pe_count = 159", "lies in the data"),
    "device missing": Edit('id = "CRkujF', 'id = "CRkujX', "on none of"),
    "syntax": Edit("seqno = 30", "seqno 30", "the text cannot be read"),
    "cut": Edit("logical_volumes {", "logical_volumes ", "the text cannot be read"),
    "no special volume": Edit(r"\tinbox \{", "\tinbax {", "there is no volume inbox"),
    "strange volume": Edit(r"\tinbox \{", "\tinbax {", "inbax is no volume of a domain"),
    "special too small": lv("leases", "extent_count = 16", "extent_count = 15", "leases has 1920"),
    "ids too large": lv("ids", "extent_count = 1", "extent_count = 2", "ids has 256 MiB"),
    "special with tags": lv("ids", 'flags = ..', 'flags = []\ntags = ["MD_7"]', "ids has tags"),
    "metadata elsewhere": lv("metadata", '"pv0", 0', '"pv0", 99', "metadata begins at extent 99"),
    "extent size": Edit("extent_size = 262144", "extent_size = 131072", "extents of 67108864"),
    "hidden": lv(OVF, '"READ", "WRITE", "VISIBLE"', '"READ", "VISIBLE"', "has the status"),
    # Tags of the group
    "not a domain": Edit('"RHAT_storage_domain", ', "", "not marked as a domain"),
    "unready": Edit('"RHAT_storage_domain"', '"RHAT_storage_domain_UNREADY"', "not marked"),
    "checksum": Edit("MDT_ROLE=Master", "MDT_ROLE=Regular", "of the domain's metadata, not"),
    "key twice": Edit('"MDT_CLASS=Data"', '"MDT_CLASS=Data", "MDT_CLASS=Iso"', "CLASS is in two"),
    "key missing": Edit('"MDT_LEASERETRIES=3", ', "", "have no LEASERETRIES"),
    "value": Edit("MDT_TYPE=ISCSI", "MDT_TYPE=NFS", "TYPE=NFS"),
    "another domain's": Edit("MDT_SDUUID=f", "MDT_SDUUID=0", "have SDUUID=0"),
    "another group's": Edit("MDT_VGUUID=D", "MDT_VGUUID=X", "have VGUUID=X"),
    "old keys": Edit('"MDT_CLASS=Data"', '"MDT_CLASS=Data", "MDT_LOGBLKSIZE=512"', "has not"),
    "characters": Edit("golden&32&pool", "golden pool", "characters that LVM does not allow"),
    "foreign tag": Edit('"MDT_CLASS=Data"', '"MDT_CLASS=Data", "x"', "the group has a tag x"),
    "no value": Edit('"MDT_CLASS=Data"', '"MDT_CLASS=Data", "MDT_X"', "MDT_X has no value"),
    "mapping": Edit("mapoffset:157", "mapoffset:156", "PV1="),
    "mapping count": Edit("pecount:157&44&mapoffset:0", "pecount:7&44&mapoffset:0", "PV0="),
    "mapping uuid": Edit("uuid:b9tIul", "uuid:b9tIuX", "is no physical volume of the group"),
    "mapping missing": Edit("MDT_PV1=", "MDT_PV2=", "2 physical volumes"),
    # Tags of volumes
    "half made": lv(OVF, '"MD_4"', '"MD_4", "OVIRT_VOL_INITIALIZING"', "is half made"),
    "marked": lv(OVF, '"IU_', '"IU__remove_me_', "is marked for removal"),
    "marked, to be zeroed": lv(OVF, '"IU_', '"IU__remove_me_ZERO_', "is marked for removal"),
    "parent marked": lv(BASE, '"IU_', '"IU__remove_me_', "is marked for removal"),
    "no image": lv(OVF, '"IU_[^"]*", ', "", "has not one image, one parent and one slot"),
    "no parent tag": lv(OVF, '"PU_[^"]*", ', "", "has not one image, one parent and one slot"),
    "two slots": lv(OVF, '"MD_4"', '"MD_4", "MD_9"', "has not one image, one parent and one"),
    "strange tag": lv(OVF, '"MD_4"', '"MD_4", "XX_1"', "has a tag XX_1"),
    "malformed": lv(OVF, '"MD_4"', '"MD_x"', "has malformed tags"),
    "slot twice": lv(OVF, '"MD_4"', '"MD_1"', "slot 1 is that of"),
    "slot 0": lv(OVF, '"MD_4"', '"MD_0"', "has the slot 0"),
    "slot too high": lv(OVF, '"MD_4"', '"MD_1948"', "has the slot 1948"),
    "image differs": lv(OVF, "IU_7", "IU_6", "IMAGE=7"),
    "parent differs": lv(LEAF, f"PU_{BASE}", f"PU_{ZERO}", f"PUUID={BASE}"),
    "parent missing": lv(LEAF, f"PU_{BASE}", f"PU_{IMAGE}", f"its parent {IMAGE} is not there"),
    "its own parent": lv(OVF, f"PU_{ZERO}", f"PU_{OVF}", "is its own ancestor"),
    "circle": lv(BASE, f"PU_{ZERO}", f"PU_{LEAF}", f"{BASE} is its own ancestor"),
    "no parent in the image": lv(LEAF, f"PU_{BASE}", f"PU_{OVF}", f"{OVF} is in image {OTHER}"),
    "capacity too large": lv(BASE, "extent_count = 8", "extent_count = 7", "the capacity of"),
    "two children": lv(OVF, f'"PU_{ZERO}", "IU_{OTHER}"', f'"PU_{BASE}", "IU_{IMAGE}"',
                       f"{BASE} has 2 children"),
}  # fmt: skip


@pytest.mark.parametrize("name", EDITS)
def test_damage_of_the_text(sample: SampleDomain, name: str) -> None:
    edit = EDITS[name]
    changed, count = re.subn(edit.old, edit.new, sample.text, count=1, flags=re.DOTALL)
    assert count == 1
    sample.lay_out(changed, changed)
    found = problems(sample)
    assert any(edit.says in text for text in found), found


def test_copies_that_differ(sample: SampleDomain) -> None:
    newer = sample.text.replace("seqno = 30", "seqno = 31")
    sample.lay_out(sample.text, newer)
    assert [text for text in problems(sample) if "copies of the metadata differ" in text]


def test_areas_in_use_on_another_device(sample: SampleDomain) -> None:
    sample.area(sample.paths[1], AREAS[0], sample.text.encode() + b"\0", 512)
    assert problems(sample) == [
        "metadata areas in use are on ['pv0', 'pv0', 'pv1'], not two on one device"
    ]


def test_one_area_in_use(sample: SampleDomain) -> None:
    sample.area(sample.paths[0], AREAS[1], b"", 512)
    assert problems(sample) == ["metadata areas in use are on ['pv0'], not two on one device"]


@pytest.mark.parametrize(
    ("offset", "says"),
    [
        (512 + 40, "the label's checksum"),
        (512, "has no LVM label"),
        (4096 + 30, "a broken header"),
        (4096 + 512 * 7 + 100, "has a wrong checksum"),
        (AREAS[1][0] + 512 * 7 + 100, "has a wrong checksum"),
    ],
)
def test_damage_of_label_and_areas(sample: SampleDomain, offset: int, says: str) -> None:
    put(sample.paths[0], offset, b"\xff\xff")
    found = problems(sample)
    assert any(says in text for text in found), found


def test_the_group_is_on_none_of_the_devices(sample: SampleDomain) -> None:
    assert check(sample.devices, ZERO) == [f"volume group {ZERO} is on none of the devices"]


# -- what is in the volumes ------------------------------------------------------------------


def change(number: int, old: bytes, new: bytes) -> Callable[[SampleDomain], None]:
    def damage(sample: SampleDomain) -> None:
        text = sample.slot_text(number)
        assert old in text
        sample.slot(number, text.replace(old, new))

    return damage


def write(volume: str, offset: int, data: bytes) -> Callable[[SampleDomain], None]:
    return lambda sample: sample.put(volume, offset, data)


def lease(volume: str, number: int, name: str, space: str = "") -> Callable[[SampleDomain], None]:
    return lambda sample: sample.lease(volume, number, name, space)


BYTES = {
    "slot empty": (lambda s: s.slot(4, b""), "slot 4: it is empty"),
    "slot of another volume": (lambda s: s.slot(4, s.slot_text(1)), f"IMAGE={IMAGE}"),
    "no EOF": (change(4, b"EOF\n", b""), "does not end with EOF"),
    "bytes behind": (write("metadata", MIB + 4 * 8192 + 511, b"x"), "bytes follow the text"),
    "not UTF-8": (change(4, b"DISKTYPE=OVFS", b"DISKTYPE=\xff"), "is not UTF-8"),
    "line": (change(4, b"GEN=0", b"GEN"), "a bad line 'GEN'"),
    "key twice": (change(4, b"GEN=0", b"GEN=0\nGEN=0"), "a bad line 'GEN=0'"),
    "order": (change(4, b"GEN=0\n", b""), "it has no GEN"),
    "not sorted": (change(4, b"SEQ=1\nTYPE=PREALLOCATED\n", b"TYPE=PREALLOCATED\nSEQ=1\n"),
                   "lines are not in order"),
    "unknown key": (change(4, b"SEQ=1", b"SEQ=1\nSIZE=1"), "it has a SIZE"),
    "enumeration": (change(4, b"VOLTYPE=LEAF", b"VOLTYPE=BRANCH"), "VOLTYPE=BRANCH"),
    "generation": (change(4, b"GEN=0", b"GEN=1000"), "GEN=1000"),
    "another domain's": (change(4, b"DOMAIN=f", b"DOMAIN=0"), "DOMAIN=0"),
    "sparse raw": (change(4, b"TYPE=PREALLOCATED", b"TYPE=SPARSE"), "on block storage is sparse"),
    "capacity": (change(4, b"CAP=134217728", b"CAP=134217729"), "is more than the volume's"),
    "leaf with child": (change(1, b"=INTERNAL", b"=LEAF"), f"{BASE} is a leaf and has"),
    "internal without": (change(4, b"=LEAF", b"=INTERNAL"), f"{OVF} is internal and has no child"),
    "template not shared": (change(5, b"=SHARED", b"=LEAF"), f"its parent {TEMPLATE} is in image"),
    "less than its parent": (change(2, b"CAP=1073741824", b"CAP=1073737728"), "less capacity than"),
    "lease missing": (write("leases", 104 * MIB, bytes(512)), "no lease (magic 0x0)"),
    "lease of another": (lease("leases", 104, BASE), f"is that of {'f06d3fef'}"),
    "lease of another domain": (lease("leases", 104, OVF, ZERO), f"is that of {ZERO}/{OVF}"),
    "lease broken": (write("leases", 104 * MIB + 40, b"\7"), "the record's checksum is wrong"),
    "cluster lock": (write("leases", MIB + 104, b"SDN"), "lease of SDM"),
    "cluster lock renamed": (lease("leases", 1, "SDX"), "lease of SDM"),
    "host id": (write("ids", 249 * 512, bytes(512)), "host id 250: no lease"),
    "host id broken": (write("ids", 512 * 3 + 60, b"x"), "host id 4: the record's checksum"),
    "index": (write("xleases", MIB, b"\0"), "the index of leases has magic"),
    "index of another": (write("xleases", MIB + 10, b"0"), "index of leases is of the lockspace"),
    "index updating": (write("xleases", MIB + 70, b"u"), "being rebuilt"),
    "record updating": (write("xleases", MIB + 512 + 61, b"u"), "is half made"),
    "record broken": (write("xleases", MIB + 512 + 63, b"x"), "record 0 of the index"),
    "record empty": (write("xleases", MIB + 512 + 64 * 9, bytes(64)), "record 9 of the index"),
    "record twice": (write("xleases", MIB + 512 + 64, LEASES[0].encode()), "is there twice"),
    "external lease": (lease("xleases", 4, OVF), f"lease of {LEASES[1]} at xleases"),
    "qcow2 missing": (write(LEAF, 0, bytes(512)), "no qcow2 header"),
    "qcow2 size": (write(LEAF, 24, struct.pack(">Q", MIB)), "a virtual size of 1048576"),
    "qcow2 backing": (write(LEAF, 8, bytes(8)), "as its backing file"),
    "qcow2 backing of another": (lambda s: s.put(DERIVED, 0, s.get(LEAF, 0, 512 * 1024)),
                                 f"names '{BASE}' as its backing file"),
    "qcow2 format": (lambda s: rename_format(s, LEAF), "names 'rax' as its parent's format"),
    "qcow2 tables": (write(LEAF, 40, struct.pack(">Q", 1 << 40)), "L1 table at"),
    "qcow2 refcounts": (write(LEAF, 48, struct.pack(">Q", 7)), "refcounts at 7"),
    "qcow2 cluster": (write(TEMPLATE, 3 * 65536, struct.pack(">Q", 1 << 40)), "leads to"),
}  # fmt: skip


def rename_format(sample: SampleDomain, volume: str) -> None:
    at = sample.get(volume, 0, 65536).index(b"raw\0")
    sample.put(volume, at, b"rax")


@pytest.mark.parametrize("name", BYTES)
def test_damage_of_what_volumes_hold(sample: SampleDomain, name: str) -> None:
    damage, says = BYTES[name]
    damage(sample)
    found = problems(sample)
    assert any(says in text for text in found), found


def test_what_is_allowed(sample: SampleDomain) -> None:
    text = sample.text.replace('"MD_4"', '"MD_4", "OVIRT_VOL_INITIALIZING"')
    text = text.replace("IU_ea90a8f0", "IU__remove_me_ZERO_ea90a8f0")
    sample.lay_out(text, text)
    assert len(problems(sample)) == 2
    assert problems(sample, allow=(HALF_MADE, MARKED)) == []


# -- what was promised -----------------------------------------------------------------------


def promised() -> dict[str, Promised]:
    return {
        BASE: Promised(IMAGE, 1024 * MIB, 1024 * MIB, "RAW", ZERO),
        LEAF: Promised(IMAGE, 1024 * MIB, 2048 * MIB, "COW", BASE, ""),
        OVF: Promised(OTHER),
        TEMPLATE: Promised("35bf992d-c9e9-4616-a12e-7696a6cecc1b", description="template"),
        DERIVED: Promised("e4b06ce6-0741-47a8-bce4-2c8218072e8c", parent=TEMPLATE, generation=0),
        REUSED: Promised("ea90a8f0-d66b-429e-aa8a-c4ba05805975"),
    }


def expected(**more: Any) -> Expected:
    return Expected(**{"volumes": promised(), "leases": LEASES, **more})


def test_promises_that_are_kept(sample: SampleDomain) -> None:
    assert problems(sample, expected=expected()) == []
    fewer = promised()
    del fewer[OVF]
    unsure = expected(volumes=fewer, unsure={OVF, ZERO}, leases=LEASES[:1], unsure_leases=LEASES)
    assert problems(sample, expected=unsure) == []


@pytest.mark.parametrize(
    ("name", "change", "says"),
    [
        (ZERO, Promised(IMAGE), "was answered as made and is lost"),
        (OVF, None, "was answered as deleted, or never made, and is there"),
        (OVF, Promised(IMAGE), "its image was answered as"),
        (OVF, Promised(OTHER, capacity=MIB * 129), "a capacity of 135266304 was answered"),
        (LEAF, Promised(IMAGE, size=MIB * 2049), "2148532224 bytes were answered"),
        (LEAF, Promised(IMAGE, parent=ZERO), "its parent was answered as"),
        (LEAF, Promised(IMAGE, format="RAW"), "its format was answered as"),
        (LEAF, Promised(IMAGE, description="new"), "its description was answered as 'new'"),
        (LEAF, Promised(IMAGE, generation=1), "its generation was answered as 1"),
    ],
)
def test_promises_that_are_broken(
    sample: SampleDomain, name: str, change: Promised | None, says: str
) -> None:
    volumes = promised()
    if change is None:
        del volumes[name]
    else:
        volumes[name] = change
    found = problems(sample, expected=expected(volumes=volumes))
    assert len(found) == 1
    assert says in found[0]
    assert name in found[0]


def test_the_description_of_the_domain(sample: SampleDomain) -> None:
    name = 'Golden V5: a=b & c,d ("é" 漢) #1 50%'
    assert problems(sample, expected=expected(descriptions={name, "x"})) == []
    found = problems(sample, expected=expected(descriptions={"x"}))
    assert found == [f"the domain is called {name!r}, not {{'x'}}"]


def test_leases_that_are_lost(sample: SampleDomain) -> None:
    found = problems(sample, expected=expected(leases=(ZERO, LEASES[1])))
    assert found == [
        f"lease {ZERO} was answered as made and is lost",
        f"lease {LEASES[0]} was answered as deleted, or never made, and is there",
    ]


# -- the parts -------------------------------------------------------------------------------


def test_parser() -> None:
    text = 'a { b = 1 # c\n d = "x\\"y\\\\" e = ["p", 3]\n f = [] 7 { g = -1.5 } }\n# end\n'
    assert parse(text) == {
        "a": {"b": 1, "d": 'x"y\\', "e": ["p", 3], "f": [], "7": {"g": -1.5}}
    }
    for bad in ("a {", "a = ", "a = b", "a }", "= 1", 'a = "x', "a = [1", "a = 1 a = 2"):
        with pytest.raises(BadTextError):
            parse(bad)


def test_tags() -> None:
    assert decode("a&32&b&44&&28450&&x&") == "a b,漢&x&"
    assert checksum({"A": "é", "_SHA_CKSUM": "x"}) == checksum({"A": "é"})


def test_program(sample: SampleDomain) -> None:
    argv = [sys.executable, "-P", "-m", "functional.checker", *sample.devices, sample.domain]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run(argv, env=environment, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, "no problem found\n"), done.stderr
    sample.slot(4, b"")
    done = subprocess.run(argv, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert done.stdout == f"{OVF}, slot 4: it is empty\n"


@pytest.mark.slow
def test_what_lvm_writes(make_luns: Callable[..., list[str]], tmp_path: Path) -> None:
    """Labels, headers and text of the installed lvm, after the ring went around."""
    luns = make_luns(2, 2048 * MIB)
    (tmp_path / "lvm.conf").write_text(
        'devices { dir="/dev" scan=["/dev"] use_devicesfile=0 obtain_device_list_from_udev=0 '
        'external_device_info_source="none" hints="none" md_component_detection=0 }\n'
        "global { use_aio=0 event_activation=0 use_lvmpolld=0 use_lvmlockd=0 notify_dbus=0 "
        f'locking_dir="{tmp_path}" }}\nbackup {{ backup=0 archive=0 }}\n'
    )
    environment = {**os.environ, "LVM_SYSTEM_DIR": str(tmp_path), "LVM_SUPPRESS_FD_WARNINGS": "1"}

    def lvm(command: str, *words: str) -> None:
        argv = ["lvm", command, "--devices", ",".join(luns), "--driverloaded", "n", *words]
        subprocess.run(argv, env=environment, check=True, capture_output=True, timeout=60)

    areas = ("--metadatacopies", "2", "--metadataignore", "y")
    lvm("pvcreate", "--metadatasize", "64k", *areas, *luns)
    lvm("pvchange", "--metadataignore", "n", luns[0])
    lvm("vgcreate", "--physicalextentsize", "128m", "--addtag", "MDT_A=x", "g", *luns)
    for number in range(6):
        lvm("lvcreate", "-an", "-Zn", "-Wn", "-L", "256m", "--addtag", "x", "-n", f"v{number}", "g")
        lvm("lvchange", "--addtag", f"t{number}", f"g/v{number}")
    lvm("lvremove", "-y", "g/v1")
    lvm("lvextend", "-L", "512m", "g/v4")
    for number in range(20):
        lvm("lvchange", "--addtag", "y" * 900 + str(number), "g/v0")
    wrong: list[str] = []
    group = read_group(luns, "g", wrong)
    assert wrong == []
    assert group is not None
    assert {name: found.extents for name, found in group.lvs.items()} == {
        "v0": 2, "v2": 2, "v3": 2, "v4": 4, "v5": 2,
    }  # fmt: skip
    assert len(group.lvs["v4"].segments) == 2
    assert len(read_label(luns[1]).areas) == 2
    values_of(group, wrong)
    assert crc(b"") == 0xF597A6CF
