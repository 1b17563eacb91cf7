# SPDX-License-Identifier: GPL-2.0-or-later
"""The wrapper on the real program, and its parsers on what the program printed."""

from __future__ import annotations

import json
import os
import subprocess
import threading
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vdsm_storage.base.cancel import Cancel
from vdsm_storage.base.pace import Pace
from vdsm_storage.errors import ActionStopped, CommandError, CommandTimeout
from vdsm_storage.host import qemu_img_output as out
from vdsm_storage.host.qemu_img import (
    Conversion,
    Image,
    NewImage,
    QemuImg,
    Watch,
    convert_argv,
    supports_direct,
)

DATA = Path(__file__).parent.parent / "data" / "qemu_img"
MIB = 1024 * 1024


def captured(name):
    return (DATA / f"{name}-7.2.txt").read_bytes()


# -- parsers -----------------------------------------------------------------------------------


def test_info():
    info = out.parse_info(captured("info-cow-bitmaps"))
    assert (info.format, info.virtual_size, info.cluster_size) == ("qcow2", 4 * MIB, 65536)
    assert (info.backing, info.backing_format, info.compat) == ("base", "raw", "1.1")
    assert [b.name for b in info.bitmaps] == ["11111111-2222-3333-4444-555555555555", "b2"]
    assert [b.enabled for b in info.bitmaps] == [True, False]
    assert all(b.valid for b in info.bitmaps)
    old = out.parse_info(captured("info-cow-0.10"))
    assert (old.compat, old.backing, old.bitmaps) == ("0.10", None, ())
    raw = out.parse_info(captured("info-raw"))
    assert (raw.format, raw.compat, raw.cluster_size, raw.allocated) == ("raw", None, None, 4096)


def test_chain():
    assert [info.format for info in out.parse_chain(captured("info-chain"))] == ["qcow2", "raw"]


def test_measure():
    assert out.parse_measure(captured("measure")) == out.Measure(1376256, 4521984, 327680)


def test_check():
    assert out.parse_check(captured("check")) == out.Check(1900544, 0, 0, 0)
    assert out.parse_check(captured("check-corrupt")) == out.Check(262144, 0, 3, 1)


def test_map():
    first, second = out.parse_map(captured("map"))
    assert (first.start, first.length, first.data, first.zero) == (0, MIB, True, False)
    assert (second.start, second.data, second.zero, second.present) == (MIB, False, True, False)


def test_progress():
    assert out.parse_progress(captured("convert-progress")) == 1.0
    assert out.parse_progress(b"    (12.50/100%)\r    (25.") == 0.125
    assert out.parse_progress(b"(7") is None


@given(st.binary(max_size=200))
def test_parsers_name_what_they_cannot_read(data):
    parsers = (out.parse_info, out.parse_chain, out.parse_measure, out.parse_check, out.parse_map)
    for parse in parsers:
        try:
            parse(data)
        except CommandError:
            continue
    out.parse_progress(data)


@given(st.recursive(st.none() | st.integers() | st.text(max_size=5), st.lists, max_leaves=5))
def test_parsers_on_other_json(value):
    for parse in (out.parse_info, out.parse_chain, out.parse_measure, out.parse_map):
        try:
            found = parse(json.dumps(value).encode())
        except CommandError:
            continue
        assert not found  # an empty list


# -- the program -------------------------------------------------------------------------------


@pytest.fixture
def tool():
    return QemuImg(quick=60, long=120)


def make(tool, path, image_format="qcow2", size=4 * MIB, **more):
    tool.create(NewImage(str(path), image_format, size, **more))
    return Image(str(path), image_format)


def write(image, offset, length, pattern=1):
    argv = ["qemu-io", "-f", image.format, "-c", f"write -q -P {pattern} {offset} {length}"]
    subprocess.run([*argv, image.path], check=True, timeout=60)


@pytest.mark.parametrize("compat", ["0.10", "1.1"])
def test_create(tool, tmp_path, compat):
    info = tool.info(make(tool, tmp_path / "a", compat=compat))
    assert (info.virtual_size, info.compat, info.cluster_size) == (4 * MIB, compat, 65536)
    assert os.path.getsize(tmp_path / "a") == 196616  # what the ecosystem's volumes have
    more = {"compat": compat, "backing": "nowhere", "backing_format": "raw"}
    backed = make(tool, tmp_path / "b", size=1024 * MIB, **more)
    info = tool.info(backed)
    assert (info.backing, info.backing_format) == ("nowhere", "raw")
    assert os.path.getsize(tmp_path / "b") == 196624


def test_create_with_spaces_and_commas(tool, tmp_path):
    folder = tmp_path / "a b,c=d:e"
    folder.mkdir()
    image = make(tool, folder / "x")
    write(image, 0, 65536)
    tool.convert(Conversion(image, Image(str(folder / "y"), "raw")))
    assert tool.compare(image, Image(str(folder / "y"), "raw"))
    assert tool.measure_layers([image], "qcow2").required > 65536


def test_preallocation(tool, tmp_path):
    for image_format in ("raw", "qcow2"):
        image = make(tool, tmp_path / image_format, image_format, preallocation="falloc")
        assert tool.info(image).allocated >= 4 * MIB


def test_chain_commands(tool, tmp_path):
    base = make(tool, tmp_path / "base", "raw", MIB)
    top = make(tool, tmp_path / "top", backing="base", backing_format="raw")
    write(base, 0, MIB, 1)
    write(top, 65536, MIB, 2)
    assert [i.format for i in tool.chain_info(top)] == ["qcow2", "raw"]
    assert [e.depth for e in tool.map(top)] == [1, 0, 0]
    copy = Image(str(tmp_path / "copy"), "raw")
    tool.convert(Conversion(top, copy))
    assert tool.compare(top, copy)
    assert not tool.compare(base, copy)
    layer = Image(str(tmp_path / "layer"), "qcow2")
    tool.convert(Conversion(top, layer, backing="base", backing_format="raw"))
    assert tool.info(layer).backing == "base"
    assert tool.check(layer).end <= tool.check(top).end
    tool.resize(base, 4 * MIB)
    tool.commit(top, base.path)
    assert tool.compare(base, copy)
    tool.rebase_unsafe(top, None, "raw")
    assert tool.info(top).backing is None
    tool.rebase_unsafe(top, "base", "raw")
    assert tool.info(top).backing == "base"


@pytest.mark.parametrize("target", ["raw", "qcow2"])
@pytest.mark.parametrize("backing", [True, False])
def test_measure_holds(tool, tmp_path, target, backing):
    make(tool, tmp_path / "base", size=16 * MIB)
    write(Image(str(tmp_path / "base"), "qcow2"), 0, 5 * MIB)
    top = make(tool, tmp_path / "top", size=16 * MIB, backing="base", backing_format="qcow2")
    write(top, 8 * MIB, MIB)
    need = tool.measure(top, target, with_backing=backing)
    copy = Image(str(tmp_path / "copy"), target)
    conversion = Conversion(top, copy, backing=None if backing else "base", backing_format="qcow2")
    if target == "qcow2" or backing:
        tool.convert(conversion)
        assert os.path.getsize(copy.path) <= need.required
    if target == "qcow2":
        assert need.required < (7.5 if backing else 2) * MIB


def test_bitmaps(tool, tmp_path):
    one, two = make(tool, tmp_path / "one"), make(tool, tmp_path / "two")
    tool.bitmap_add(one.path, "b", 131072)
    tool.bitmap_add(two.path, "b", 131072, enabled=False)
    write(one, 0, 65536)
    tool.bitmap_merge(one.path, "b", two.path, "b")
    tool.bitmap_clear(one.path, "b")
    tool.bitmap_enable(two.path, "b")
    (bitmap,) = tool.info(two).bitmaps
    assert (bitmap.name, bitmap.granularity, bitmap.enabled) == ("b", 131072, True)
    copy = Image(str(tmp_path / "copy"), "qcow2")
    tool.convert(Conversion(two, copy, bitmaps=True))
    assert tool.info(copy).bitmaps == (bitmap,)
    tool.bitmap_remove(two.path, "b")
    assert tool.info(two).bitmaps == ()


def test_a_target_that_stands_keeps_its_blocks(tool, tmp_path):
    source = make(tool, tmp_path / "source", size=8 * MIB)
    write(source, 0, MIB)
    target = make(tool, tmp_path / "target", "raw", 8 * MIB, preallocation="falloc")
    tool.convert(Conversion(source, target, create=False, sparse=False))
    assert tool.compare(source, target)
    assert tool.info(target).allocated >= 8 * MIB


def test_progress_and_cancel(tool, tmp_path):
    source = make(tool, tmp_path / "source", "raw", 64 * MIB)
    write(source, 0, 64 * MIB)
    seen = []
    tool.convert(Conversion(source, Image(str(tmp_path / "a"), "qcow2")), Watch(seen.append))
    assert seen[-1] == 1.0
    assert seen == sorted(seen)
    cancel = Cancel()
    threading.Timer(0.0, cancel.request).start()
    big = make(tool, tmp_path / "big", "raw", 1024 * MIB, preallocation="full")
    with pytest.raises(ActionStopped):
        tool.convert(Conversion(big, Image(str(tmp_path / "b"), "raw")), Watch(cancel=cancel))


def test_time_limit(tmp_path):
    image = make(QemuImg(), tmp_path / "a", "raw", 1024 * MIB, preallocation="full")
    with pytest.raises(CommandTimeout):
        QemuImg(long=0.01).convert(Conversion(image, Image(str(tmp_path / "b"), "raw")))


def test_errors_say_what_qemu_said(tool, tmp_path):
    with pytest.raises(CommandError, match="No such file"):
        tool.info(Image(str(tmp_path / "missing"), "raw"))
    (tmp_path / "text").write_bytes(b"x" * 4096)
    with pytest.raises(CommandError, match="not in qcow2 format"):
        tool.info_untrusted(Image(str(tmp_path / "text"), "qcow2"))


def test_check_and_repair(tool, tmp_path):
    image = make(tool, tmp_path / "a")
    write(image, 0, MIB)
    assert tool.check(image).leaks == 0
    with open(image.path, "r+b") as file:  # an L2 table that nobody refers to any more
        file.seek(196608)
        file.write(bytes(8))
    assert tool.check(image).leaks > 0
    assert tool.repair_leaks(image).corruptions == 0
    assert tool.check(image).leaks == 0


def test_direct_io_where_it_works(tmp_path):
    source, target = tmp_path / "s", tmp_path / "t"
    source.write_bytes(bytes(4096))
    target.write_bytes(b"")
    argv = convert_argv(Conversion(Image(str(source), "raw"), Image(str(target), "raw")))
    assert ("none" in argv) == supports_direct(str(source))
    url = "nbd:unix:/run/x.sock"
    argv = convert_argv(Conversion(Image(url, "raw"), Image(str(target), "raw")))
    assert argv[-2:] == [url, str(target)]


@pytest.mark.parametrize("verb", ["convert", "commit"])
def test_it_keeps_to_a_pace(tmp_path, verb):
    mib, limit = 12, 12
    base, top = tmp_path / "base", tmp_path / "top"
    qemu = QemuImg()
    qemu.create(NewImage(str(base), "qcow2", 16 * MIB))
    qemu.create(NewImage(str(top), "qcow2", 16 * MIB, backing="base", backing_format="qcow2"))
    subprocess.run(["qemu-io", "-f", "qcow2", "-c", f"write -P 5 0 {mib}M", top], check=True,
                   timeout=60, capture_output=True)  # fmt: skip
    started = time.monotonic()
    watch = Watch(pace=Pace(limit))
    if verb == "commit":
        qemu.commit(Image(str(top), "qcow2"), str(base), watch)
    else:
        target = Image(str(tmp_path / "copy"), "qcow2")
        qemu.convert(Conversion(Image(str(top), "qcow2"), target), watch)
    assert time.monotonic() - started > 0.7 * mib / limit
