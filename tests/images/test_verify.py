# SPDX-License-Identifier: GPL-2.0-or-later
"""verify_untrusted: every kind of bad upload, and headers made by a fuzzer."""

from __future__ import annotations

import os
import struct
import subprocess
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from functional import clients_image
from vdsm_storage.errors import CommandError, ImageVerificationError
from vdsm_storage.host.qemu_img import Image, NewImage, QemuImg
from vdsm_storage.images import qcow2_header
from vdsm_storage.images.qcow2_header import HeaderError
from vdsm_storage.images.verify import Verifier

MIB = 1024 * 1024


def create(path, *options, size="2M"):
    """Upload: what a client's own qemu-img made."""
    clients_image.create(Path(path), *options, size=size)


def verify(datalab, ref):
    store = datalab.stores[ref.domain]
    Verifier(datalab.qemu_img, datalab.locks, 5.0).verify(store, ref)


def patch(path, offset, data):
    with open(path, "r+b") as file:
        file.seek(offset)
        file.write(data)


@pytest.mark.parametrize("version", [3, 4, 5])
def test_sound_uploads(datalab, version):
    store = datalab.domain(version)
    raw = datalab.volume(store, cow=False)
    datalab.write(raw, 0, MIB, 1)
    verify(datalab, raw)
    for compat in ("0.10",) if version == 3 else ("0.10", "1.1"):
        ref = datalab.volume(store)
        create(datalab.path(ref), "-f", "qcow2", "-o", f"compat={compat}")
        datalab.write(ref, 0, MIB, 1)
        verify(datalab, ref)
    odd = datalab.volume(store, size=2 * MIB + 4096)
    create(datalab.path(odd), "-f", "qcow2", "-o", "compat=0.10", size=str(2 * MIB + 512))
    verify(datalab, odd)  # capacities are rounded up


def test_overlay_of_its_parent(datalab):
    store = datalab.domain()
    base, leaf = datalab.chain(store, 2)
    verify(datalab, leaf)
    stranger = datalab.volume(store, image=leaf.image, cow=False)
    backing = ("-b", stranger.volume, "-F", "raw")
    create(datalab.path(leaf), "-f", "qcow2", "-u", *backing)
    with pytest.raises(ImageVerificationError, match=base.volume):
        verify(datalab, leaf)
    create(datalab.path(leaf), "-f", "qcow2")
    with pytest.raises(ImageVerificationError, match="None"):
        verify(datalab, leaf)


BAD = {
    "backing file": (("-f", "qcow2", "-u", "-b", "/etc/passwd", "-F", "raw"), "backing file"),
    "backing url": (("-f", "qcow2", "-u", "-b", "nbd:127.0.0.1:1", "-F", "raw"), "backing file"),
    "backing json": (
        ("-f", "qcow2", "-u", "-b", 'json:{"driver":"file","filename":"/etc/shadow"}', "-F", "raw"),
        "backing file",
    ),
    "parent directory": (("-f", "qcow2", "-u", "-b", "../x", "-F", "raw"), "backing file"),
    "data file": (("-f", "qcow2", "-o", "data_file=DATA,data_file_raw=on"), "external file"),
    "extended l2": (("-f", "qcow2", "-o", "extended_l2=on,cluster_size=128k"), "extended L2"),
    "encrypted": (
        (
            *("-f", "qcow2", "--object", "secret,id=s,data=x"),
            *("-o", "encrypt.format=luks,encrypt.key-secret=s"),
        ),
        "encrypted",
    ),
    "vmdk": (("-f", "vmdk"), "magic"),
    "raw": (("-f", "raw"), "magic"),
    "vdi": (("-f", "vdi"), "magic"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_uploads(datalab, name, tmp_path):
    options, match = BAD[name]
    options = [option.replace("DATA", str(tmp_path / "data.raw")) for option in options]
    ref = datalab.volume(datalab.domain())
    os.unlink(datalab.path(ref))
    create(datalab.path(ref), *options)
    with pytest.raises(ImageVerificationError, match=match) as caught:
        verify(datalab, ref)
    assert caught.value.code == 484
    assert ref.volume in str(caught.value)


@pytest.mark.parametrize(
    ("size", "compat", "version", "match"),
    [
        ("4M", "1.1", 5, "4194304 bytes"),
        ("1M", "1.1", 5, "1048576 bytes"),
        ("2M", "1.1", 3, "version 4"),
    ],
)
def test_size_and_version(datalab, size, compat, version, match):
    ref = datalab.volume(datalab.domain(version))
    create(datalab.path(ref), "-f", "qcow2", "-o", f"compat={compat}", size=size)
    with pytest.raises(ImageVerificationError, match=match):
        verify(datalab, ref)


def test_snapshots_and_corruption(datalab):
    store = datalab.domain()
    ref = datalab.volume(store)
    subprocess.run(["qemu-img", "snapshot", "-c", "s", datalab.path(ref)], check=True)
    with pytest.raises(ImageVerificationError, match="1 internal snapshots"):
        verify(datalab, ref)
    ref = datalab.volume(store)
    patch(datalab.path(ref), 72, struct.pack(">Q", 2))
    with pytest.raises(ImageVerificationError, match="corrupt"):
        verify(datalab, ref)
    ref = datalab.volume(store)
    patch(datalab.path(ref), 72, struct.pack(">Q", 1 << 40))
    with pytest.raises(ImageVerificationError, match="unknown features"):
        verify(datalab, ref)
    ref = datalab.volume(store)
    patch(datalab.path(ref), 40, struct.pack(">Q", 1 << 60))  # an L1 table far away
    with pytest.raises(ImageVerificationError, match="behind the end"):
        verify(datalab, ref)
    ref = datalab.volume(store)
    patch(datalab.path(ref), 48, struct.pack(">Q", 513))  # a refcount table between clusters
    with pytest.raises(ImageVerificationError, match="qemu-img cannot read"):
        verify(datalab, ref)


@pytest.mark.parametrize("other", ["qcow2", "vmdk", "qed", "vhdx"])
def test_another_format_in_a_raw_volume(datalab, other, tmp_path):
    ref = datalab.volume(datalab.domain(), cow=False, size=16 * MIB)
    create(tmp_path / "upload", "-f", other, size="4M")
    with open(tmp_path / "upload", "rb") as file:
        patch(datalab.path(ref), 0, file.read(16 * MIB))
    with pytest.raises(ImageVerificationError, match="RAW"):
        verify(datalab, ref)


def test_raw_of_another_size(datalab):
    ref = datalab.volume(datalab.domain(), cow=False)
    for size in (MIB, 3 * MIB, 0):
        os.truncate(datalab.path(ref), size)
        with pytest.raises(ImageVerificationError, match="capacity"):
            verify(datalab, ref)


def test_empty_and_short_files(datalab):
    ref = datalab.volume(datalab.domain())
    for size in (0, 1, 71, 103):
        os.truncate(datalab.path(ref), size)
        with pytest.raises(ImageVerificationError):
            verify(datalab, ref)


# -- the parser --------------------------------------------------------------------------------


def real_header(tmp_path, *options):
    create(tmp_path / "x", "-f", "qcow2", *options)
    with open(tmp_path / "x", "rb") as file:
        return file.read(qcow2_header.READ_LENGTH)


def try_parse(data):
    try:
        header = qcow2_header.parse(data)
    except HeaderError:
        return None
    qcow2_header.dangers(header, MIB)
    return header


@settings(max_examples=400, deadline=None)
@given(st.binary(max_size=400))
@example(b"QFI\xfb")
@example(b"QFI\xfb" + b"\xff" * 200)
@example(b"QFI\xfb" + b"\0" * 200)
def test_random_bytes(data):
    assert try_parse(data) is None or data.startswith(b"QFI\xfb")
    header = try_parse(b"QFI\xfb" + data)
    assert header is None or header.version in (2, 3)


numbers = st.one_of(
    st.integers(0, 40), st.integers(0, 2**64 - 1), st.sampled_from([2**31, 2**32 - 1, 2**63])
)


@settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    offset=st.integers(0, 200),
    width=st.sampled_from([1, 4, 8]),
    value=numbers,
    cut=st.integers(60, 70000),
)
def test_mutated_headers(base_header, offset, width, value, cut):
    data = bytearray(base_header)
    data[offset : offset + width] = (value % (1 << 8 * width)).to_bytes(width, "big")
    try_parse(bytes(data[:cut]))


@pytest.fixture(scope="module")
def base_header(tmp_path_factory):
    return real_header(
        tmp_path_factory.mktemp("header"), "-u", "-b", "some-parent", "-F", "raw"
    )


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(offset=st.integers(4, 127), value=st.integers(0, 255), second=st.integers(4, 160))
def test_what_passes_is_read_by_qemu_in_the_same_way(
    base_header, tmp_path_factory, offset, value, second
):
    data = bytearray(base_header)
    data[offset] = value
    data[second] = value
    header = try_parse(bytes(data))
    path = tmp_path_factory.mktemp("fuzz") / "image"
    path.write_bytes(data)
    try:
        info = QemuImg(cpu=5).info_untrusted(Image(str(path), "qcow2"))
    except CommandError:
        return
    if header is None or qcow2_header.dangers(header, MIB):
        return  # stricter than QEMU is fine
    assert info.backing == header.backing
    assert info.virtual_size == header.size - header.size % 512  # QEMU counts whole sectors
    assert info.compat == header.compat
    assert info.data_file is None
    assert not info.encrypted
    assert info.snapshots == 0


def test_parsed_fields(tmp_path):
    header = qcow2_header.parse(real_header(tmp_path, "-o", "compat=0.10,cluster_size=4k"))
    assert (header.version, header.cluster_bits, header.size) == (2, 12, 2 * MIB)
    assert header.backing is None
    assert qcow2_header.dangers(header, MIB) == []


def test_qemu_img_is_bounded(tmp_path):
    """An image that needs more memory than is allowed ends qemu-img, not the host."""
    path = str(tmp_path / "image")
    QemuImg().create(NewImage(path, "qcow2", MIB))
    with pytest.raises(CommandError):
        QemuImg(memory=16 * MIB).info_untrusted(Image(path, "qcow2"))
    assert QemuImg().info_untrusted(Image(path, "qcow2")).virtual_size == MIB
