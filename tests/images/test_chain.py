# SPDX-License-Identifier: GPL-2.0-or-later
"""Chains as metadata tell them, damaged ones included."""

from __future__ import annotations

import pytest

from vdsm_storage.base.uuids import new_uuid
from vdsm_storage.errors import (
    ImageIsNotLegalChain,
    VolumeDoesNotExist,
    VolumeIsNotInChain,
    WrongParentVolume,
)
from vdsm_storage.images import chain
from vdsm_storage.images import metadata as md


def names(members):
    return [member.volume for member in members]


@pytest.mark.parametrize("depth", [1, 2, 6])
def test_walk(datalab, depth):
    store = datalab.domain()
    refs = datalab.chain(store, depth)
    for end, ref in enumerate(refs, 1):
        walked = chain.walk(store, ref.image, ref.volume)
        assert names(walked) == [r.volume for r in refs[:end]]
    above = chain.children(store, refs[0].image, refs[0].volume)
    assert names(above) == [r.volume for r in refs[1:2]]
    assert names(chain.leaves(store, refs[0].image)) == [refs[-1].volume]


def test_template_is_part_of_the_chain(datalab):
    store = datalab.domain()
    template = datalab.volume(store, voltype=md.SHARED)
    image = new_uuid()
    store.share(template.image, template.volume, image)
    leaf = datalab.volume(store, image=image)
    found = datalab.metadata(leaf)
    store.save(image, leaf.volume, found.with_(parent=template.volume))
    walked = chain.walk(store, image, leaf.volume)
    assert names(walked) == [template.volume, leaf.volume]
    assert walked[0].is_shared
    assert names(chain.children(store, template.image, template.volume)) == []


def test_loops_and_gaps(datalab):
    store = datalab.domain()
    low, middle, leaf = datalab.chain(store, 3)
    image = low.image
    with pytest.raises(VolumeDoesNotExist):
        chain.walk(store, image, new_uuid())
    store.save(image, low.volume, datalab.metadata(low).with_(parent=leaf.volume))
    for ref in (low, middle, leaf):
        with pytest.raises(ImageIsNotLegalChain) as caught:
            chain.walk(store, image, ref.volume)
        assert caught.value.code == 262
    store.save(image, low.volume, datalab.metadata(low).with_(parent=low.volume))
    with pytest.raises(ImageIsNotLegalChain, match="each other"):
        chain.walk(store, image, leaf.volume)
    gone = new_uuid()
    store.save(image, low.volume, datalab.metadata(low).with_(parent=gone))
    with pytest.raises(ImageIsNotLegalChain, match=gone):
        chain.walk(store, image, leaf.volume)


def test_subchain(datalab):
    store = datalab.domain()
    refs = datalab.chain(store, 4)
    image, ids = refs[0].image, [r.volume for r in refs]
    sub = chain.subchain(store, image, ids[1], ids[2])
    assert names(sub.below) == ids[:1]
    assert (sub.base.volume, sub.top.volume) == (ids[1], ids[2])
    assert sub.child is not None
    assert sub.child.volume == ids[3]
    assert chain.subchain(store, image, ids[2], ids[3]).child is None
    with pytest.raises(WrongParentVolume):
        chain.subchain(store, image, ids[0], ids[2])
    with pytest.raises(VolumeIsNotInChain):
        chain.subchain(store, image, ids[3], ids[2])
    second = datalab.volume(store, parent=refs[2])
    assert second.image == image
    with pytest.raises(ImageIsNotLegalChain, match="share"):
        chain.subchain(store, image, ids[1], ids[2])
