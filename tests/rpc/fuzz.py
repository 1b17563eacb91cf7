# SPDX-License-Identifier: GPL-2.0-or-later
"""Targets for atheris: `python tests/rpc/fuzz.py TARGET [libFuzzer options]`.

What peers send, and what is read from storage that others can write.
"""

from __future__ import annotations

import contextlib
import json
import sys
import types
from collections.abc import Callable, Mapping

import h11

from vdsm_storage.domains import metadata as domain
from vdsm_storage.errors import (
    InvalidDomainMetadata,
    MetadataCleared,
    MetadataOverflow,
    MetadataSealBroken,
    VolumeMetadataReadError,
)
from vdsm_storage.images import metadata as volume
from vdsm_storage.images import qcow2_header
from vdsm_storage.leases import index
from vdsm_storage.lvm import config_tree, group_tree, labels, lv_text
from vdsm_storage.lvm import text as group_text
from vdsm_storage.rpc import frames as codec
from vdsm_storage.rpc import jsonrpc, listener
from vdsm_storage.rpc.frames import Decoder, Frame, FrameError, encode


def frames(data: bytes) -> None:
    """The first byte says where to cut; what is decoded must survive encoding."""
    cut = data[0] if data else 0
    found = []
    decoder = Decoder(max_frame=1000, max_head=300)
    try:
        for piece in (data[1 : 1 + cut], data[1 + cut :]):
            found += decoder.feed(piece)
    except FrameError:
        pass
    for item in found:
        if isinstance(item, Frame):
            (again,) = Decoder().feed(encode(item))
            assert isinstance(again, Frame)
            assert (again.command, again.body) == (item.command, item.body)


def requests(data: bytes) -> None:
    """Whatever comes in, what goes out is JSON with one of result and error."""
    out = jsonrpc.dispatch(data, {}, None)
    for reply in out if isinstance(out, list) else [out]:
        if reply is not None:
            decoded = json.loads(jsonrpc.dumps(reply))
            assert ("result" in decoded) != ("error" in decoded)


def first_bytes(data: bytes) -> None:
    kind = listener.protocol_of(data)
    assert kind in ("stomp", "http", "", None)
    if kind == "http":
        parser = h11.Connection(h11.SERVER, max_incomplete_event_size=1000)
        parser.receive_data(data)
        with contextlib.suppress(h11.RemoteProtocolError):
            parser.next_event()


def volume_metadata(data: bytes) -> None:
    """What is understood is understood again after it was written."""
    volume.parse(data)
    with contextlib.suppress(MetadataCleared, VolumeMetadataReadError):
        found = volume.decode(data)
        with contextlib.suppress(MetadataOverflow):
            assert volume.decode(found.encode(5)).capacity == found.capacity


def domain_metadata(data: bytes) -> None:
    """The bytes as they are, and with a seal that fits."""
    with contextlib.suppress(MetadataSealBroken):
        domain.decode(data)
    pairs = (line.partition("=") for line in data.decode("ascii", "ignore").splitlines())
    values = {key: value for key, sign, value in pairs if key and sign}
    with contextlib.suppress(MetadataSealBroken, InvalidDomainMetadata):
        found = domain.DomainMetadata(domain.decode(domain.encode(values)))
        for name in ("id", "type", "klass", "role", "version", "pools", "block_size", "alignment"):
            with contextlib.suppress(InvalidDomainMetadata):
                getattr(found, name)


def qcow2(data: bytes) -> None:
    """A header that a guest or a stranger wrote."""
    with contextlib.suppress(qcow2_header.HeaderError):
        qcow2_header.dangers(qcow2_header.parse(data), 1 << 20)
    qcow2_header.looks_raw(data)


def lease_index(data: bytes) -> None:
    """A record somewhere in an index that is otherwise sound."""
    whole = bytearray(index.encode(index.Index(LEASE, 0, (index.Record(3, LEASE),)), 1 << 20))
    position = int.from_bytes(data[:3], "big") % (len(whole) - len(data) + 1)
    whole[position : position + len(data) - 3] = data[3:]
    with contextlib.suppress(index.IndexDamagedError):
        index.decode(bytes(whole[: index.INDEX_SIZE]), LEASE)


def group(data: bytes) -> None:
    """The metadata of a volume group, whole and as a change of one that is known; a header."""
    parser = group_text.IncrementalParser()
    parser.parse(SEEDS["group"])
    with contextlib.suppress(group_text.TextError):
        assert parser.parse(data) == group_text.parse_group(data)
    with contextlib.suppress(labels.HeaderDamaged):
        body = data[:508].ljust(508, b"\0")
        seal = labels.checksum(body).to_bytes(4, "little")
        labels.parse_header(seal + body, labels.Area(4096, 1 << 20), "/dev/x")


LEASE = "e1e437b7-f735-4fe6-88d1-80113e940bb4"
TARGETS: Mapping[str, Callable[[bytes], None]] = {
    "frames": frames,
    "jsonrpc": requests,
    "http": first_bytes,
    "volume": volume_metadata,
    "domain": domain_metadata,
    "qcow2": qcow2,
    "index": lease_index,
    "group": group,
}
SEEDS: Mapping[str, bytes] = {
    "frames": b"\0SEND\ndestination:a\ncontent-length:1\n\nx\0",
    "jsonrpc": b'[{"jsonrpc": "2.0", "method": "a.b", "params": {}, "id": 1}]',
    "http": b"GET /schema HTTP/1.1\r\nhost: a\r\n\r\n",
    "volume": b"CAP=1048576\nCTIME=1\nDESCRIPTION=\nDISKTYPE=DATA\nDOMAIN=a\nFORMAT=RAW\nGEN=0\n"
    b"IMAGE=b\nLEGALITY=LEGAL\nPUUID=c\nSEQ=1\nTYPE=SPARSE\nVOLTYPE=LEAF\nEOF\n",
    "domain": b"ALIGNMENT=1048576\nBLOCK_SIZE=512\nCLASS=Data\nSDUUID=a\nTYPE=POSIXFS\nVERSION=5\n",
    "qcow2": b"QFI\xfb\0\0\0\x03"
    + bytes(12)
    + b"\0\0\0\x10"
    + bytes(72)
    + b"\0\0\0\x68"
    + bytes(200),
    "index": b"\0\x02\0" + LEASE.encode(),
    "group": b'vg {\nid = "a"\nseqno = 1\nstatus = ["READ"]\nextent_size = 8\nphysical_volumes {\n'
    b'pv0 {\nid = "b"\npe_start = 8\npe_count = 9\n}\n}\nlogical_volumes {\n\nlv {\nid = "'
    + b"x"
    * 38
    + b'"\nstatus = ["VISIBLE"]\nflags = []\ntags = ["T"]\ncreation_time = 1\ncreation_host = "h"\n'
    b"segment_count = 1\n\nsegment1 {\nstart_extent = 0\nextent_count = 1\n\n"
    b'type = "striped"\nstripe_count = 1\n\nstripes = [\n"pv0", 0\n]\n}\n}\n}\n}\n'
    b'contents = "Text Format Volume Group"\nversion = 1\n\0',
}

if __name__ == "__main__":
    import atheris

    parsers = (volume, domain, qcow2_header, index, config_tree, group_tree, group_text, lv_text)
    for owner in (
        codec,
        jsonrpc,
        listener,
        codec.Decoder,
        lv_text.LvReader,
        *parsers,
    ):  # all takes half a minute
        for found in list(vars(owner).values()):
            if isinstance(found, types.FunctionType):
                atheris.instrument_func(found)
    atheris.Setup([sys.argv[0], *sys.argv[2:]], TARGETS[sys.argv[1]])
    atheris.Fuzz()
