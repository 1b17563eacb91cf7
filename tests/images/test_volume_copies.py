# SPDX-License-Identifier: GPL-2.0-or-later
"""Volume.copy and Image.move: data, refusals, and death at every step."""

from __future__ import annotations

import os
from typing import Any

import pytest

from vdsm_storage.base.uuids import BLANK, new_uuid
from vdsm_storage.config import Config
from vdsm_storage.errors import (
    CannotDeleteSharedVolume,
    ImageDoesNotExistInSD,
    NoSpaceLeftOnDomain,
    OverwriteImageError,
    TemplateNotOnTarget,
)
from vdsm_storage.images import metadata as md
from vdsm_storage.images.guard import VolumeRef
from vdsm_storage.images.volumes import Volumes
from vdsm_storage.jobs.runner import Request


class Lab:
    def __init__(self, datalab: Any) -> None:
        self.data = datalab
        self.source = datalab.domain()
        self.target = datalab.domain()
        self.volumes = Volumes(
            datalab.find_store, datalab.qemu_img, None, datalab.locks, Config(), None
        )
        datalab.kinds += self.volumes.kinds()

    def copy(self, source: VolumeRef, **changes: Any) -> Request:
        params = {
            "source_domain": source.domain,
            "source_image": source.image,
            "source": source.volume,
            "domain": self.target.id,
            "image": new_uuid(),
            "volume": new_uuid(),
            "description": "a copy",
            "voltype": md.SHARED,
            "format": md.COW,
            "type": md.SPARSE,
            **changes,
        }
        return self._request("volume.copy", params)

    def move(self, image: str, *, move: bool) -> Request:
        params = {"domain": self.source.id, "image": image, "target": self.target.id, "move": move}
        return self._request("image.move", params)

    def _request(self, kind: str, params: dict[str, Any]) -> Request:
        domains = [self.source.id, self.target.id]
        return Request(kind, params, domains, "test", self.target.id)

    def files(self, store: Any) -> set[str]:
        root = f"{store.root}/images"
        return {
            os.path.relpath(os.path.join(folder, name), root)
            for folder, directories, names in os.walk(root)
            for name in [*names, *directories]
        }


@pytest.fixture
def lab(datalab: Any) -> Lab:
    return Lab(datalab)


@pytest.mark.parametrize(
    ("fmt", "allocation"),
    [(md.COW, md.SPARSE), (md.RAW, md.SPARSE), (md.RAW, md.PREALLOCATED)],
)
def test_a_copy_shows_what_the_chain_shows(lab: Lab, fmt: str, allocation: str) -> None:
    leaf = lab.data.chain(lab.source, 3)[-1]
    request = lab.copy(leaf, format=fmt, type=allocation)
    lab.data.run(request)
    made = VolumeRef(lab.target.id, request.params["image"], request.params["volume"])
    assert lab.data.checksum(made) == lab.data.checksum(leaf)
    metadata = lab.data.metadata(made)
    assert (metadata.voltype, metadata.format, metadata.type) == (md.SHARED, fmt, allocation)
    assert (metadata.parent, metadata.domain) == (BLANK, lab.target.id)
    sizes = lab.target.sizes(made.image, made.volume)
    if allocation == md.PREALLOCATED:
        assert sizes.allocated >= metadata.capacity
    assert os.stat(lab.data.path(made)).st_mode & 0o777 == 0o660


def test_volume_copy_dies_anywhere(lab: Lab) -> None:
    leaf = lab.data.chain(lab.source, 2)[-1]
    for point in lab.data.points("volume.copy"):
        request = lab.copy(leaf)
        before = lab.files(lab.target)
        running = lab.data.crash(request, point)
        if point.endswith(":published"):
            assert running.entry.outcome == "success"
            made = VolumeRef(lab.target.id, request.params["image"], request.params["volume"])
            assert lab.data.checksum(made) == lab.data.checksum(leaf)
        else:
            assert running.entry.outcome == "cleanSuccess"
            assert lab.files(lab.target) == before


def test_volume_copy_is_reverted(lab: Lab) -> None:
    """It is gone again, and stays while somebody uses it."""
    leaf = lab.data.chain(lab.source, 2)[-1]
    before, runner = lab.files(lab.target), lab.data.runner()
    request = lab.copy(leaf)
    running = lab.data.job(request, runner)
    made = VolumeRef(lab.target.id, request.params["image"], request.params["volume"])
    user = new_uuid()
    lab.target.share(made.image, made.volume, user)
    with pytest.raises(CannotDeleteSharedVolume):
        runner.revert(running)
    assert lab.data.checksum(made) == lab.data.checksum(leaf)
    lab.target.unmake(user, made.volume)
    for _ in range(2):
        runner.revert(running)
        assert lab.files(lab.target) == before


def test_a_full_target_keeps_nothing(lab: Lab, small_fs: Any) -> None:
    big = lab.data.volume(lab.source, cow=False, size=64 * 1024 * 1024)
    lab.target = lab.data.domain(root=small_fs)
    with pytest.raises(NoSpaceLeftOnDomain):
        lab.data.run(lab.copy(big, format=md.RAW, type=md.PREALLOCATED))
    assert lab.files(lab.target) == set()


@pytest.mark.parametrize("move", [False, True])
def test_an_image_arrives_whole(lab: Lab, move: bool) -> None:
    chain = lab.data.chain(lab.source, 3)
    image = chain[0].image
    before = [lab.data.checksum(ref) for ref in chain]
    roles = [lab.data.metadata(ref) for ref in chain]
    lab.data.run(lab.move(image, move=move))
    arrived = [VolumeRef(lab.target.id, image, ref.volume) for ref in chain]
    assert [lab.data.checksum(ref) for ref in arrived] == before
    expected = [m.with_(domain=lab.target.id) for m in roles]
    assert [lab.data.metadata(ref) for ref in arrived] == expected
    assert bool(lab.files(lab.source)) != move
    if not move:
        with pytest.raises(OverwriteImageError):
            lab.data.run(lab.move(image, move=False))
        assert [lab.data.checksum(ref) for ref in arrived] == before
    else:
        with pytest.raises(ImageDoesNotExistInSD):
            lab.data.run(lab.move(image, move=True))


def test_a_derived_image_needs_its_template_there(lab: Lab) -> None:
    template = lab.data.volume(lab.source, voltype=md.SHARED)
    lab.data.write(template, 0, 65536, 7)
    image = new_uuid()
    lab.source.share(template.image, template.volume, image)
    child = lab.data.volume(
        lab.source, parent=VolumeRef(lab.source.id, image, template.volume)
    )
    lab.data.write(child, 65536, 65536, 9)
    before = lab.data.checksum(child)
    with pytest.raises(TemplateNotOnTarget):
        lab.data.run(lab.move(image, move=True))
    assert lab.files(lab.target) == set()
    lab.data.run(lab.move(template.image, move=False))
    for point in lab.data.points("image.move"):
        there = lab.files(lab.target)
        running = lab.data.crash(lab.move(image, move=False), point)
        if running.entry.outcome == "success":
            lab.target.mark_removed(image)
            lab.target.purge(image)
        assert lab.files(lab.target) == there, point
    lab.data.run(lab.move(image, move=True))
    moved = VolumeRef(lab.target.id, image, child.volume)
    assert lab.data.checksum(moved) == before
    assert os.stat(lab.target.path(image, template.volume)).st_nlink == 2
    assert lab.source.images() == [template.image]


def test_image_move_dies_anywhere(lab: Lab) -> None:
    for point in lab.data.points("image.move"):
        chain = lab.data.chain(lab.source, 2)
        image = chain[0].image
        before = lab.data.checksum(chain[-1])
        at_source, at_target = lab.files(lab.source), lab.files(lab.target)
        running = lab.data.crash(lab.move(image, move=True), point)
        if running.entry.outcome == "success":
            moved = VolumeRef(lab.target.id, image, chain[-1].volume)
            assert lab.data.checksum(moved) == before
            assert lab.files(lab.source) == set()
        else:
            assert lab.files(lab.source) == at_source
            assert lab.files(lab.target) == at_target
            lab.source.mark_removed(image)
            lab.source.purge(image)


# -- structure first, data after ---------------------------------------------------------------


def test_structure_first_then_data(lab: Lab) -> None:
    chain = lab.data.chain(lab.source, 3)
    image = chain[0].image
    names = {"domain": lab.source.id, "image": image, "target": lab.target.id}
    lab.data.run(lab._request("image.clone", names))
    there = [VolumeRef(lab.target.id, image, ref.volume) for ref in chain]
    assert [lab.data.metadata(ref).parent for ref in there] == [
        lab.data.metadata(ref).parent for ref in chain
    ]
    empty = lab.data.volume(lab.source, cow=False)
    assert lab.data.checksum(there[-1]) == lab.data.checksum(empty)
    lab.data.run(lab._request("image.sync", {**names, "what": "INTERNAL"}))
    assert lab.data.checksum(there[1]) == lab.data.checksum(chain[1])
    assert lab.data.checksum(there[2]) == lab.data.checksum(chain[1])
    lab.data.run(lab._request("image.sync", {**names, "what": "LEAF"}))
    assert lab.data.checksum(there[2]) == lab.data.checksum(chain[2])
    lab.data.write(chain[0], 0, 4096, 0x55)
    for _ in range(2):
        lab.data.run(lab._request("image.sync", {**names, "what": "ALL"}))
        for ref, source in zip(there, chain, strict=True):
            assert lab.data.checksum(ref) == lab.data.checksum(source)
            assert lab.data.metadata(ref).legality == md.LEGAL


def test_clone_dies_anywhere(lab: Lab) -> None:
    for point in lab.data.points("image.clone"):
        chain = lab.data.chain(lab.source, 2)
        image = chain[0].image
        names = {"domain": lab.source.id, "image": image, "target": lab.target.id}
        running = lab.data.crash(lab._request("image.clone", names), point)
        if point.endswith(":made"):
            assert running.entry.outcome == "cleanSuccess"
            assert lab.files(lab.target) == set()
        else:
            assert running.entry.outcome == "success"
            assert sorted(lab.target.volumes(image)) == sorted(ref.volume for ref in chain)
            lab.target.mark_removed(image)
            lab.target.purge(image)


def test_sync_dies_anywhere(lab: Lab) -> None:
    for point in lab.data.points("image.sync"):
        chain = lab.data.chain(lab.source, 2)
        image = chain[0].image
        names = {"domain": lab.source.id, "image": image, "target": lab.target.id}
        lab.data.run(lab._request("image.clone", names))
        running = lab.data.crash(lab._request("image.sync", {**names, "what": "ALL"}), point)
        assert running.entry.outcome == "cleanSuccess"
        base = VolumeRef(lab.target.id, image, chain[0].volume)
        assert lab.data.metadata(base).legality == md.ILLEGAL
        lab.data.run(lab._request("image.sync", {**names, "what": "ALL"}))
        leaf = VolumeRef(lab.target.id, image, chain[1].volume)
        assert lab.data.checksum(leaf) == lab.data.checksum(chain[1])
