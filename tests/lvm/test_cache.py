# SPDX-License-Identifier: GPL-2.0-or-later
"""The cached group on real storage that others change, damage, and take away."""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.lvm.conftest import LoopDevices, LvmTool, comparable, program
from tests.lvm.test_labels import flip, label_of, patch
from vdsm_storage.errors import (
    InaccessiblePhysDev,
    LvmCommandError,
    UnexpectedVolumeGroupMetadata,
    VolumeGroupDoesNotExist,
    VolumeGroupScanError,
)
from vdsm_storage.lvm import cache as module
from vdsm_storage.lvm.cache import CachedGroup
from vdsm_storage.lvm.labels import HeaderReader, checksum, read_header
from vdsm_storage.lvm.model import VolumeGroup
from vdsm_storage.lvm.text import TextError, parse_group


def no_report(devices: Sequence[str]) -> VolumeGroup:
    raise AssertionError(f"lvm is asked about {devices}")


@pytest.fixture
def pair(loops: LoopDevices, lvm: LvmTool) -> tuple[str, str]:
    """The devices of the group `vg`; its metadata is on the first."""
    one, two = loops(2)
    lvm.make_group("vg", [one, two])
    for number in range(3):
        lvm.create("vg", f"lv{number}", 2, tags=[f"MD_{number}"])
    return one, two


@pytest.fixture
def cached(loops: LoopDevices, pair: tuple[str, str]) -> CachedGroup:
    return CachedGroup("vg", lambda: list(loops.paths), no_report)


# -- what does not change, and what does -----------------------------------------------------


def test_a_recent_look_will_do(cached: CachedGroup, lvm: LvmTool) -> None:
    before = cached.read()
    lvm("vgchange", "--addtag", "later", "vg")
    assert cached.read(within=60.0) is before
    assert "later" in cached.read().tags
    lvm("vgchange", "--deltag", "later", "vg")
    cached.forget()
    assert "later" not in cached.read(within=60.0).tags


def test_same_object_until_something_changes(cached: CachedGroup, lvm: LvmTool) -> None:
    first = cached.read()
    assert comparable(first) == comparable(lvm.report("vg"))
    assert cached.read() is first
    lvm("lvextend", "-l", "+1", "vg/lv1")
    second = cached.read()
    assert comparable(second) == comparable(lvm.report("vg"))
    assert second.lvs["lv0"] is first.lvs["lv0"]
    assert second.lvs["lv1"].extents == 3
    assert first.lvs["lv1"].extents == 2


def test_text_and_devices(cached: CachedGroup, pair: tuple[str, str]) -> None:
    text, group = cached.text()
    assert parse_group(text) == group
    assert group is cached.read()
    assert cached.devices() == {label_of(device).pv_uuid: device for device in pair}
    assert [label.device for label in cached.holders()] == [pair[0]]


def test_group_without_volumes(loops: LoopDevices, lvm: LvmTool) -> None:
    devices = loops(1)
    lvm("vgcreate", "empty", *devices)
    group = CachedGroup("empty", lambda: devices, no_report).read()
    assert comparable(group) == comparable(lvm.report("empty"))
    assert not group.lvs


def test_sectors_of_4k(loops: LoopDevices, lvm: LvmTool) -> None:
    lvm.make_group("vg", loops(2, sector=4096))
    cached = CachedGroup("vg", lambda: list(loops.paths), no_report)
    for number in range(5):
        lvm.create("vg", f"lv{number}")
        assert comparable(cached.read()) == comparable(lvm.report("vg"))


def test_group_that_is_removed_and_made_again(
    cached: CachedGroup, pair: tuple[str, str], lvm: LvmTool
) -> None:
    old = cached.read()
    lvm("vgremove", "-f", "vg")
    with pytest.raises(VolumeGroupDoesNotExist):
        cached.read()
    lvm("pvremove", *pair)
    with pytest.raises(VolumeGroupDoesNotExist):
        cached.read()
    lvm.make_group("vg", [pair[1]])
    new = cached.read()
    assert (new.uuid != old.uuid, list(new.lvs), len(new.pvs)) == (True, [], 1)


def test_group_that_is_renamed(cached: CachedGroup, loops: LoopDevices, lvm: LvmTool) -> None:
    cached.read()
    lvm("vgrename", "vg", "other")
    with pytest.raises(VolumeGroupDoesNotExist):
        cached.read()
    assert CachedGroup("other", lambda: list(loops.paths), no_report).read().name == "other"
    lvm("vgrename", "other", "vg")
    assert cached.read().name == "vg"


def test_metadata_that_moves_to_another_volume(
    cached: CachedGroup, pair: tuple[str, str], lvm: LvmTool
) -> None:
    """As when the LUN that holds it is taken out of the domain."""
    one, two = pair
    lvm("lvremove", "-y", "vg")
    cached.read()
    lvm("pvchange", "--metadataignore", "n", two)
    assert comparable(cached.read()) == comparable(lvm.report("vg"))
    lvm("pvchange", "--metadataignore", "y", one)
    assert comparable(cached.read()) == comparable(lvm.report("vg"))
    lvm.create("vg", "more")
    assert "more" in cached.read().lvs
    lvm("lvremove", "-y", "vg/more")
    lvm("vgreduce", "vg", one)
    assert comparable(cached.read()) == comparable(lvm.report("vg"))
    assert list(cached.devices().values()) == [two]


def test_group_that_gets_another_volume(
    cached: CachedGroup, loops: LoopDevices, lvm: LvmTool
) -> None:
    cached.read()
    (new,) = loops(1)
    lvm("vgextend", "vg", new)
    group = cached.read()
    assert comparable(group) == comparable(lvm.report("vg"))
    assert not group.partial
    assert new in cached.devices().values()


# -- devices that come and go ----------------------------------------------------------------


def test_volume_that_is_not_there(loops: LoopDevices, pair: tuple[str, str], lvm: LvmTool) -> None:
    seen = [pair[0]]
    cached = CachedGroup("vg", lambda: seen, no_report)
    part = cached.read()
    missing = [pv for pv in part.pvs.values() if pv.missing]
    assert part.partial
    assert [pv.uuid for pv in missing] == [label_of(pair[1]).pv_uuid]
    assert list(cached.devices().values()) == [pair[0]]
    assert comparable(part)["lvs"] == comparable(lvm.report("vg"))["lvs"]
    lvm("lvchange", "--addtag", "t", "vg/lv0")
    assert cached.read().partial
    seen.append(pair[1])
    assert cached.read().partial  # nobody said that there is more
    cached.forget()
    assert not cached.read().partial
    assert sorted(cached.devices().values()) == sorted(pair)


def test_device_that_comes_back_under_another_name(
    cached: CachedGroup, loops: LoopDevices, pair: tuple[str, str]
) -> None:
    before = cached.read()
    backing = program("losetup", "--noheadings", "--output", "BACK-FILE", pair[0]).strip()
    other = program("losetup", "--find", "--show", backing).strip()
    loops.paths.append(other)
    loops.drop(pair[0])
    assert cached.read() == before
    assert cached.devices()[label_of(other).pv_uuid] == other


def test_one_device_by_two_names(pair: tuple[str, str], tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(pair[0])
    cached = CachedGroup("vg", lambda: [pair[0], str(link), *pair], no_report)
    assert not cached.read().partial
    assert list(cached.devices().values()) == list(pair)


@pytest.mark.parametrize("which", [0, 1])
def test_volume_that_is_there_twice(
    cached: CachedGroup, loops: LoopDevices, pair: tuple[str, str], which: int
) -> None:
    """A snapshot of the LUN, made by the storage and shown to this host."""
    cached.read()
    backing = program("losetup", "--noheadings", "--output", "BACK-FILE", pair[which]).strip()
    copy = os.path.join(loops.directory, "copy")
    program("cp", "--sparse=always", backing, copy)
    double = program("losetup", "--find", "--show", copy).strip()
    loops.paths.append(double)
    assert cached.read()  # not looked for yet
    cached.forget()
    for _ in range(2):
        with pytest.raises(UnexpectedVolumeGroupMetadata) as caught:
            cached.read()
        assert pair[which] in caught.value.message
        assert double in caught.value.message
    loops.drop(double)
    assert cached.read()


def test_two_groups_of_one_name(loops: LoopDevices, lvm: LvmTool) -> None:
    one, two = loops(2)
    lvm("vgcreate", "vg", one, devices=[one])
    lvm("vgcreate", "vg", two, devices=[two])
    with pytest.raises(UnexpectedVolumeGroupMetadata, match=", ".join(sorted((one, two)))):
        CachedGroup("vg", lambda: [one, two], no_report).read()


def test_no_group(loops: LoopDevices, lvm: LvmTool) -> None:
    devices = [*loops(1)]
    lvm("vgcreate", "other", devices[0])
    devices += loops(1)
    for seen in ([], devices):
        with pytest.raises(VolumeGroupDoesNotExist, match="vg"):
            CachedGroup("vg", lambda seen=seen: seen, no_report).read()


def test_devices_that_cannot_be_looked_at(pair: tuple[str, str], tmp_path: Path) -> None:
    """They matter only when the group was not found without them."""
    gone, broken = str(tmp_path / "gone"), str(tmp_path)  # nothing, and a directory
    assert CachedGroup("vg", lambda: [gone, broken, *pair], no_report).read()
    with pytest.raises(VolumeGroupScanError, match=broken):
        CachedGroup("vg", lambda: [broken, gone], no_report).read()
    with pytest.raises(InaccessiblePhysDev, match=gone):
        CachedGroup("vg", lambda: [gone], no_report).read()


def test_device_that_fails_later(cached: CachedGroup, pair: tuple[str, str]) -> None:
    cached.read()
    backing = program("losetup", "--noheadings", "--output", "BACK-FILE", pair[0]).strip()
    size = os.path.getsize(backing)
    with open(backing, "rb") as file:
        start = file.read(8 << 20)
    os.truncate(backing, 0)  # reads of the device fail now
    with pytest.raises((VolumeGroupScanError, VolumeGroupDoesNotExist, InaccessiblePhysDev)):
        cached.read()
    with open(backing, "r+b") as file:
        file.write(start)
    os.truncate(backing, size)
    assert cached.read().lvs


# -- damage ----------------------------------------------------------------------------------


def damage(device: str, what: str, copies: Sequence[int]) -> None:
    for area in (label_of(device).areas[number] for number in copies):
        location = read_header(device, area).location
        assert location is not None
        places = {
            "magic": area.offset + 6,
            "header": area.offset + 41,
            "start": area.offset + location.offset + len("vg"),
            "text": area.offset + location.offset + location.size - 300,
        }
        flip(device, places[what])


@pytest.mark.parametrize("what", ["magic", "header", "start", "text"])
@pytest.mark.parametrize("copy", [0, 1])
@pytest.mark.parametrize("known", [True, False])
def test_one_copy_is_damaged(
    cached: CachedGroup,
    pair: tuple[str, str],
    lvm: LvmTool,
    what: str,
    copy: int,
    known: bool,
    caplog: pytest.LogCaptureFixture,
) -> None:
    expected = comparable(lvm.report("vg"))
    if known:
        cached.read()
    damage(pair[0], what, [copy])
    assert comparable(cached.read()) == expected
    looked_at = what in ("magic", "header") or (not known and (copy == 0 or what == "start"))
    assert (pair[0] in caplog.text) == looked_at
    lvm("vgchange", "--addtag", "later", "vg")  # lvm writes what is whole; it repairs no header
    assert "later" in cached.read().tags


@pytest.mark.parametrize("what", ["magic", "header", "start", "text"])
@pytest.mark.parametrize("known", [True, False])
def test_both_copies_are_damaged(
    loops: LoopDevices, pair: tuple[str, str], what: str, known: bool
) -> None:
    asked = []

    def report(devices: Sequence[str]) -> VolumeGroup:
        asked.append(devices)
        raise LvmCommandError(command="fullreport", vg="vg", reason="Volume group not found")

    cached = CachedGroup("vg", lambda: list(loops.paths), report)
    if known:
        cached.read()
    damage(pair[0], what, [0, 1])
    if known and what in ("start", "text"):
        assert cached.read()  # nobody has to read what did not change
        cached.forget()
    with pytest.raises(UnexpectedVolumeGroupMetadata, match=pair[0]):
        cached.read()
    damage_undone = {"magic": 6, "header": 41}
    if what in damage_undone:
        for area in label_of(pair[0]).areas:
            flip(pair[0], area.offset + damage_undone[what])
    else:
        damage(pair[0], what, [0, 1])
    assert cached.read()


def test_label_is_damaged(cached: CachedGroup, pair: tuple[str, str]) -> None:
    cached.read()
    flip(pair[0], 512 + 60)
    assert cached.read()  # it is found already
    cached.forget()
    with pytest.raises(UnexpectedVolumeGroupMetadata, match=f"label in sector 1 of {pair[0]}"):
        cached.read()


@pytest.mark.parametrize("old", [0, 1])
def test_copies_of_different_age(
    cached: CachedGroup, pair: tuple[str, str], lvm: LvmTool, old: int
) -> None:
    """A writer that died between the two commits; the newer one counts, for lvm as well."""
    cached.read()
    area = label_of(pair[0]).areas[old]
    before = HeaderReader(pair[0], [area]).read()[0]
    lvm("lvremove", "-y", "vg/lv1")
    patch(pair[0], area.offset, before)
    assert "lv1" not in cached.read().lvs
    cached.forget()
    assert comparable(cached.read()) == comparable(lvm.report("vg"))
    lvm.create("vg", "next")
    assert comparable(cached.read()) == comparable(lvm.report("vg"))


def test_what_is_prepared_is_not_read(cached: CachedGroup, pair: tuple[str, str]) -> None:
    """A second place in the header is a text that is not committed yet."""
    before = cached.read()
    for area in label_of(pair[0]).areas:
        raw = bytearray(HeaderReader(pair[0], [area]).read()[0])
        raw[64:88] = (512).to_bytes(8, "little") + (77).to_bytes(8, "little") + bytes(8)
        raw[:4] = checksum(bytes(raw[4:])).to_bytes(4, "little")
        patch(pair[0], area.offset, raw)
    assert cached.read() == before


# -- lvm's own report, where the text is not understood --------------------------------------


def test_report_is_asked_once(
    loops: LoopDevices, pair: tuple[str, str], lvm: LvmTool, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def report(devices: Sequence[str]) -> VolumeGroup:
        asked.append(list(devices))
        return lvm.report("vg")

    def refuse(_self: object, _text: object) -> VolumeGroup:
        raise TextError("a new thing")

    cached = CachedGroup("vg", lambda: list(loops.paths), report)
    monkeypatch.setattr(module.IncrementalParser, "parse", refuse)
    first = cached.read()
    assert comparable(first) == comparable(lvm.report("vg"))
    assert cached.read() is first
    assert asked == [list(pair)]
    with pytest.raises(UnexpectedVolumeGroupMetadata, match="not understood"):
        cached.text()
    lvm.create("vg", "more")
    assert "more" in cached.read().lvs
    assert len(asked) == 2
    monkeypatch.undo()
    assert "more" in cached.read().lvs
    lvm.create("vg", "most")
    assert cached.text()[1] is cached.read()
    assert len(asked) == 2


def test_report_that_fails(
    loops: LoopDevices, pair: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def report(_devices: Sequence[str]) -> VolumeGroup:
        raise LvmCommandError(command="fullreport", vg="vg", reason="it does not want to")

    def refuse(_self: object, _text: object) -> VolumeGroup:
        raise TextError("a new thing")

    cached = CachedGroup("vg", lambda: list(loops.paths), report)
    monkeypatch.setattr(module.IncrementalParser, "parse", refuse)
    with pytest.raises(UnexpectedVolumeGroupMetadata, match=r"a new thing.*does not want to"):
        cached.read()
    monkeypatch.undo()
    assert cached.read()


# -- threads ---------------------------------------------------------------------------------


def test_waiting_readers_share_the_next_read(
    cached: CachedGroup, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that began before a reader came does not count for it: it may be older."""
    cached.read()
    looks = []
    enter, go = threading.Event(), threading.Event()
    look = cached._look

    def slow() -> object:
        looks.append(threading.current_thread())
        enter.set()
        assert go.wait(10)
        return look()

    monkeypatch.setattr(cached, "_look", slow)
    answers: list[VolumeGroup] = []
    threads = [threading.Thread(target=lambda: answers.append(cached.read())) for _ in range(8)]
    threads[0].start()
    assert enter.wait(10)
    for thread in threads[1:]:
        thread.start()
    while sum(thread.is_alive() for thread in threads) < 8:
        pass
    threading.Event().wait(0.2)  # until they all wait
    go.set()
    for thread in threads:
        thread.join(10)
    assert len(answers) == 8
    assert all(answer is answers[0] for answer in answers)
    assert len(looks) == 2


def test_failed_read_is_not_shared(cached: CachedGroup, monkeypatch: pytest.MonkeyPatch) -> None:
    look = cached._look
    failures = [VolumeGroupDoesNotExist(vg="vg")]

    def once() -> object:
        if failures:
            raise failures.pop()
        return look()

    monkeypatch.setattr(cached, "_look", once)
    with pytest.raises(VolumeGroupDoesNotExist):
        cached.read()
    assert cached.read().lvs


def test_readers_beside_a_writer(loops: LoopDevices, lvm: LvmTool) -> None:
    """Small areas, so that what is read is soon overwritten: each answer is whole and in order,
    and has what was committed before it was asked for."""
    (device,) = loops()
    small = ("--metadatasize", "40k", "--metadatacopies", "2", "--dataalignment", "4k")
    lvm("pvcreate", *small, device)
    lvm("vgcreate", "-s", "1m", "vg", device)
    cached = CachedGroup("vg", lambda: [device], no_report)
    done = threading.Event()
    errors: list[BaseException] = []

    def reader() -> None:
        own = CachedGroup("vg", lambda: [device], no_report)
        last = 0
        try:
            while not done.is_set():
                for group in (own.read(), cached.read(), cached.text()[1]):
                    assert group.seqno >= last
                    last = group.seqno
                    assert len(group.tags) == group.seqno - 1
                done.wait(0.001)
        except BaseException as error:
            errors.append(error)
            raise

    threads = [threading.Thread(target=reader) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        for number in range(80):
            lvm("vgchange", "--addtag", f"t{number}", "vg")
            assert len(cached.read().tags) == number + 1
    finally:
        done.set()
        for thread in threads:
            thread.join(30)
    assert not errors
    assert comparable(cached.read()) == comparable(lvm.report("vg"))
