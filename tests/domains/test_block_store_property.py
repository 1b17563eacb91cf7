# SPDX-License-Identifier: GPL-2.0-or-later
"""Whatever is done to a block domain's volumes, in whatever order: what the store says, what lies
on the LUNs and what an independent checker finds agree with a simple model.
"""

from __future__ import annotations

import itertools
import os
import random
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import pytest

from functional.checker.check import HALF_MADE, MARKED, check
from tests.domains.block_world import BlockHost, block_hosts, workdir
from tests.domains.conftest import wait_for
from vdsm_storage.base.units import MIB
from vdsm_storage.base.uuids import BLANK, new_uuid
from vdsm_storage.domains import block_slots
from vdsm_storage.domains.block_names import SPECIAL
from vdsm_storage.domains.new_domain import CreateRequest
from vdsm_storage.errors import (
    ImageDoesNotExistInSD,
    VolumeAlreadyExists,
    VolumeDoesNotExist,
    VolumeGroupSizeError,
)
from vdsm_storage.host.sanlock import Sanlock
from vdsm_storage.images import metadata as md
from vdsm_storage.images.metadata import VolumeMetadata
from vdsm_storage.images.qcow2_empty import empty_qcow2
from vdsm_storage.images.store import NewVolume

pytestmark = [pytest.mark.sanlock, pytest.mark.slow, pytest.mark.timeout(600)]

EXTENT = 128 * MIB
GIB = 1024 * MIB
MADE, PUBLISHED, REMOVED = "made", "published", "removed"
SEEDS = (1, 2)
STEPS = 70
LARGEST = 3  # extents of a volume
TEXTS = ("", "text", "a=b", "ü" * 90, "x" * 210)


@dataclass(frozen=True)
class Volume:
    image: str
    slot: int
    extents: int
    state: str
    metadata: VolumeMetadata

    @property
    def parent(self) -> str:
        return self.metadata.parent


class Model:
    """What should be there.  `texts` by slot: what was written last."""

    def __init__(self, version: int) -> None:
        self.version = version
        self.volumes: dict[str, Volume] = {}
        self.texts: dict[int, bytes] = {}

    def images(self, state: str = PUBLISHED) -> dict[str, set[str]]:
        found: dict[str, set[str]] = {}
        for name, volume in self.volumes.items():
            if volume.state == state:
                found.setdefault(volume.image, set()).add(name)
        return found

    def shown(self) -> dict[str, set[str]]:
        """The same with templates in the images that are based on them."""
        found = self.images()
        for image, names in self.images().items():
            parents = {self.volumes[name].parent for name in names} - {BLANK}
            found[image] = names | parents
        return found

    def children(self, name: str) -> list[str]:
        return [child for child, volume in self.volumes.items() if volume.parent == name]

    def slots(self) -> dict[int, str]:
        return {volume.slot: name for name, volume in self.volumes.items()}

    def free_slot(self) -> int:
        first = block_slots.first_slot(self.version)
        return next(slot for slot in itertools.count(first) if slot not in self.slots())

    def write(self, name: str) -> None:
        volume = self.volumes[name]
        self.texts[volume.slot] = volume.metadata.encode_slot(self.version, name)


class Player:
    """Does what a seed says to the one domain of `host`, and to a model."""

    def __init__(self, host: BlockHost, sd_id: str, seed: int) -> None:
        self.host, self.sd_id = host, sd_id
        self.store = host.domain(sd_id).store
        self.model = Model(self.store.version)
        self.random = random.Random(seed)
        self.done: list[str] = []

    def play(self, steps: int) -> None:
        """`done` has the names of the steps, for who looks for what went wrong."""
        moves: dict[Callable[[], None], int] = {
            self.make: 9, self.make_again: 1, self.make_at_once: 1, self.publish: 16, self.save: 2,
            self.share: 3, self.resize: 3, self.too_large: 1, self.unmake: 3, self.mark_removed: 2,
            self.purge: 2, self.refused: 1, self.as_a_new_process: 1,
        }  # fmt: skip
        for move in self.random.choices(list(moves), list(moves.values()), k=steps):
            self.done.append(move.__name__)
            move()
            self.store_agrees()
            self.storage_agrees()

    def new_id(self) -> str:
        return str(uuid.UUID(int=self.random.getrandbits(128), version=4))

    def choose(self, *states: str) -> str | None:
        names = [name for name, found in self.model.volumes.items() if found.state in states]
        return self.random.choice(names) if names else None

    def extents(self) -> int:
        return self.random.randint(1, LARGEST)

    # -- what can be done --------------------------------------------------------------------

    def make(self) -> None:
        """A base in a new image, or on a leaf, or on a template for another image."""
        name, image, parent = self.new_id(), self.new_id(), BLANK
        if (kind := self.random.choice((md.LEAF, md.SHARED, BLANK))) != BLANK:
            parent = self._base(kind) or BLANK
        if kind == md.LEAF and parent != BLANK:
            image = self.model.volumes[parent].image
        self._made(name, image, self.extents(), parent)
        self.store.make(self._new(name))

    def _base(self, kind: str) -> str | None:
        """What a new volume can be based on: templates may have several children."""
        found = [
            name
            for name, volume in self.model.volumes.items()
            if volume.state == PUBLISHED and volume.metadata.voltype == kind
            if kind == md.SHARED or not self.model.children(name)
        ]
        return self.random.choice(found) if found else None

    def _new(self, name: str) -> NewVolume:
        found = self.model.volumes[name]
        raw = found.metadata.format == md.RAW
        return NewVolume(found.image, name, found.extents * EXTENT, raw, raw, found.parent)

    def _made(self, name: str, image: str, extents: int, parent: str = BLANK) -> None:
        raw = parent == BLANK
        below = self.model.volumes[parent].metadata.capacity if parent != BLANK else 0
        metadata = VolumeMetadata(
            self.sd_id, image, max(extents * EXTENT, below), md.RAW if raw else md.COW,
            md.PREALLOCATED if raw else md.SPARSE, md.LEAF, "DATA", parent, ctime=1700000000,
        )  # fmt: skip
        slot = self.model.free_slot()
        self.model.volumes[name] = Volume(image, slot, extents, MADE, metadata)

    def make_again(self) -> None:
        """What a crash left half made is made anew, in the lowest slot that is free then."""
        if (name := self.choose(MADE)) is not None:
            old = self.model.volumes.pop(name)
            self.model.texts[old.slot] = bytes(block_slots.SLOT_SIZE)
            self._made(name, old.image, old.extents, old.parent)
            self.store.make(self._new(name))

    def make_at_once(self) -> None:
        """By several threads: each gets a slot of its own, the lowest ones."""
        count = self.random.randint(2, 4)
        names = [self.new_id() for _ in range(count)]
        for name in names:
            self._made(name, self.new_id(), 1)
        with ThreadPoolExecutor(count) as threads:
            list(threads.map(self.store.make, [self._new(name) for name in names]))
        slots = {name: slot for slot, name in self.store.by_slot().items()}
        expected = sorted(self.model.volumes[name].slot for name in names)
        assert sorted(slots[name] for name in names) == expected
        for name in names:  # who came first is nobody's business
            self.model.volumes[name] = replace(self.model.volumes[name], slot=slots[name])

    def publish(self) -> None:
        name = self.choose(MADE)
        if name is None:
            return
        found = self.model.volumes[name]
        parent = self.model.volumes.get(found.parent)
        if found.parent != BLANK and (parent is None or parent.state != PUBLISHED):
            return  # it was deleted meanwhile; who makes the volume takes it back
        metadata = found.metadata.with_(description=self.random.choice(TEXTS))
        if metadata.format == md.COW:
            self._format(name, found)
        if parent is not None and parent.metadata.voltype == md.LEAF:
            self._save(found.parent, voltype=md.INTERNAL)
        self.store.publish(found.image, name, metadata)
        self.model.volumes[name] = replace(found, state=PUBLISHED, metadata=metadata)
        self.model.write(name)

    def _format(self, name: str, found: Volume) -> None:
        parent = self.model.volumes[found.parent].metadata.format
        kind = "raw" if parent == md.RAW else "qcow2"
        header = empty_qcow2(found.metadata.capacity, "1.1", found.parent, kind)
        self.store.activate(found.image, [name])
        with open(os.path.realpath(self.store.path(found.image, name)), "r+b") as file:
            file.write(header)
        self.store.deactivate(found.image, [name])

    def _save(self, name: str, **changes: Any) -> None:
        found = self.model.volumes[name]
        new = found.metadata.with_(**changes)
        self.store.save(found.image, name, new)
        self.model.volumes[name] = replace(found, metadata=new)
        self.model.write(name)

    def save(self) -> None:
        if (name := self.choose(PUBLISHED)) is not None:
            text, generation = self.random.choice(TEXTS), self.random.randint(0, 999)
            self._save(name, description=text, generation=generation)

    def share(self) -> None:
        """A volume without children becomes a template, and another image is based on it."""
        if (template := self._base(md.LEAF)) is not None:
            self._save(template, voltype=md.SHARED)
            name, image = self.new_id(), self.new_id()
            self.store.share(self.model.volumes[template].image, template, image)
            self._made(name, image, self.extents(), template)
            self.store.make(self._new(name))

    def resize(self) -> None:
        name, extents = self.choose(PUBLISHED), self.extents()
        if name is None:
            return
        found = self.model.volumes[name]
        if found.metadata.format == md.RAW and extents * EXTENT < found.metadata.capacity:
            return
        self.store.resize(found.image, name, extents * EXTENT - MIB, False)
        self.model.volumes[name] = replace(found, extents=extents)

    def too_large(self) -> None:
        """More than there is: nothing is changed, no slot is lost."""
        name = self.choose(PUBLISHED)
        with pytest.raises(VolumeGroupSizeError):
            self.store.make(NewVolume(self.new_id(), self.new_id(), 100 * GIB, True, True))
        if name is not None:
            with pytest.raises(VolumeGroupSizeError):
                self.store.resize(self.model.volumes[name].image, name, 100 * GIB, True)

    def unmake(self) -> None:
        """Half made, or without children; then its slot is empty."""
        name = self.choose(MADE, PUBLISHED)
        if name is None or self.model.children(name):
            return
        found = self.model.volumes[name]
        if found.state == PUBLISHED:
            self.store.unpublish(found.image, name)
            assert self.store.has_remains(found.image, name)
        self.store.unmake(found.image, name)
        self.store.unmake(found.image, name)  # a second time does nothing
        self.model.texts[found.slot] = bytes(block_slots.SLOT_SIZE)
        del self.model.volumes[name]
        if found.parent in self.model.volumes and not self.model.children(found.parent):
            parent = self.model.volumes[found.parent]
            if parent.metadata.voltype == md.INTERNAL and parent.state == PUBLISHED:
                self._save(found.parent, voltype=md.LEAF)

    def mark_removed(self) -> None:
        images, zero = self.model.images(), self.random.random() < 0.5
        if not images:
            with pytest.raises(ImageDoesNotExistInSD):
                self.store.mark_removed(self.new_id())
            return
        image = self.random.choice(list(images))
        names = images[image]
        if any(child not in names for name in names for child in self.model.children(name)):
            return  # a template in use, or half a child
        self.store.mark_removed(image, zero)
        self.store.mark_removed(image, zero)
        for name in names:
            self.model.volumes[name] = replace(self.model.volumes[name], state=REMOVED)

    def purge(self) -> None:
        """Texts and leases stay where they are."""
        images = self.model.images(REMOVED)
        image = self.random.choice([*images, self.new_id()])
        self.store.purge(image)
        for name in images.get(image, ()):
            del self.model.volumes[name]

    def refused(self) -> None:
        """What is there cannot be made, what is not there is not found."""
        name = self.choose(PUBLISHED, REMOVED)
        if name is not None:
            with pytest.raises(VolumeAlreadyExists):
                self.store.make(self._new(name))
        with pytest.raises(VolumeDoesNotExist):
            self.store.load(self.new_id(), self.new_id())

    def as_a_new_process(self) -> None:
        """Nothing that was kept in memory is needed."""
        self.host.services.registry.forget(self.sd_id)
        self.host.domain(self.sd_id).group.forget()
        self.store = self.host.domain(self.sd_id).store

    # -- what must always hold ---------------------------------------------------------------

    def store_agrees(self) -> None:
        store, model = self.store, self.model
        assert set(store.images()) == set(model.images())
        shown = model.shown()
        assert {image: set(store.volumes(image)) for image in shown} == shown
        of_volume: dict[str, set[str]] = {}
        for image, names in shown.items():
            for name in names:
                of_volume.setdefault(name, set()).add(image)
        found = {name: set(images) for name, images in store.all_volumes().items()}
        half = self._images_of_half_made()
        assert {name: images - half[name] for name, images in found.items()} == of_volume
        removed = {image: set(names) for image, names in store.removed_images().items()}
        assert removed == model.images(REMOVED)
        assert store.by_slot() == model.slots()
        assert [spec.resource for spec in store.leases()] == [
            name for _, name in sorted(model.slots().items())
        ]
        for name, volume in model.volumes.items():
            self._volume_agrees(name, volume)

    def _images_of_half_made(self) -> dict[str, set[str]]:
        """Where a template is also seen: a volume on it is being made there."""
        found: dict[str, set[str]] = {name: set() for name in self.model.volumes}
        shown = self.model.images()
        for volume in self.model.volumes.values():
            if volume.state == MADE and volume.parent in found and volume.image not in shown:
                found[volume.parent].add(volume.image)
        return found

    def _volume_agrees(self, name: str, volume: Volume) -> None:
        store = self.store
        assert store.has_remains(volume.image, name) == (volume.state == MADE)
        if volume.state == PUBLISHED:
            metadata, sizes = store.examine(volume.image, name)
            assert metadata == volume.metadata
            assert sizes.apparent == sizes.allocated == volume.extents * EXTENT
        else:
            with pytest.raises(VolumeDoesNotExist):
                store.load(volume.image, name)

    def storage_agrees(self) -> None:
        """By a reader of our own: tags, sizes, and every slot that was ever written."""
        group = self.host.luns.group(self.sd_id)
        volumes = {name: lv for name, lv in group.lvs.items() if "-" in name}
        assert volumes.keys() == self.model.volumes.keys()
        for name, volume in self.model.volumes.items():
            lv = volumes[name]
            tags = {tag for tag in lv.tags if "REMOVE" not in tag.upper() and "HOST" not in tag}
            expected = {f"PU_{volume.parent}", f"MD_{volume.slot}"}
            if volume.state != REMOVED:
                expected.add(f"IU_{volume.image}")
            if volume.state == MADE:
                expected.add("OVIRT_VOL_INITIALIZING")
            assert tags == expected
            assert lv.extents == volume.extents
        for slot, text in self.model.texts.items():
            offset = block_slots.slot_offset(slot, self.model.version)
            assert group.read("metadata", offset, len(text)) == text

    def clear(self) -> None:
        """Remove everything that is there, templates after what is based on them."""
        for image in self.model.images(REMOVED):
            self.store.purge(image)
        left = {n: v for n, v in self.model.volumes.items() if v.state != REMOVED}
        while left:
            name = next(n for n in left if all(v.parent != n for v in left.values()))
            self.store.unmake(left.pop(name).image, name)


@pytest.fixture(scope="module", params=[4, 5])
def player(request: pytest.FixtureRequest, sanlock: Sanlock) -> Iterator[Callable[[int], Player]]:
    """One domain on two LUNs; the first one is full soon."""
    with workdir() as directory, block_hosts(directory, sanlock) as hosts:
        host, sd_id = hosts.host("host"), new_uuid()
        hosts.luns.make("first", 6 * GIB)
        hosts.luns.make("second", 12 * GIB)
        vg = host.make_group(sd_id)
        host.services.create(CreateRequest(sd_id, "FCP", vg, "random", version=request.param))
        host.world.pool(sd_id)
        wait_for(lambda: host.world.health.usable(sd_id))
        with host.domain(sd_id).lock.held(30.0):
            yield lambda seed: Player(host, sd_id, seed)


@pytest.mark.parametrize("seed", SEEDS)
def test_any_sequence(player: Callable[[int], Player], seed: int) -> None:
    playing = player(seed)
    playing.play(STEPS)
    assert playing.store.active.volumes() == []
    allow = (HALF_MADE, MARKED)
    assert check(playing.host.luns.paths, playing.sd_id, allow=allow) == []
    playing.clear()
    assert playing.store.by_slot() == {}
    assert playing.host.luns.group(playing.sd_id).lvs.keys() == SPECIAL
