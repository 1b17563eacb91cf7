# SPDX-License-Identifier: GPL-2.0-or-later
"""Operations on volumes: results, refusals, and death at every step."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from vdsm_storage.base.uuids import BLANK, new_uuid
from vdsm_storage.config import Config
from vdsm_storage.domains.file_store import FileStore
from vdsm_storage.errors import (
    AgentError,
    CannotDeleteSharedVolume,
    CreateVolumeSizeError,
    ImageDoesNotExistInSD,
    ImageIsNotLegalChain,
    IncorrectFormat,
    InvalidParameter,
    MetadataOverflow,
    NoSpaceLeftOnDomain,
    PrepareIllegalVolume,
    VolumeAlreadyExists,
    VolumeDoesNotExist,
    VolumeImageHasChildren,
    VolumeNonWritable,
    VolumeResizeValueError,
)
from vdsm_storage.host.qemu_img import Image, NewImage
from vdsm_storage.images import metadata as md
from vdsm_storage.images.create import NewVolumeRequest
from vdsm_storage.images.images import Images
from vdsm_storage.images.volumes import Volumes
from vdsm_storage.jobs import journal as j
from vdsm_storage.jobs.runner import Request
from vdsm_storage.leases.model import LeaseSpec, LeaseState

MIB = 1024 * 1024


class NoLeases:
    def state(self, spec: LeaseSpec) -> LeaseState:
        raise AssertionError(f"{spec} on a local domain")


class Lab:
    """A local domain and the services on it; `create` runs the operation in this thread."""

    def __init__(self, datalab: Any) -> None:
        self.data = datalab
        self.store: FileStore = datalab.domain()
        self.volumes = Volumes(
            datalab.find_store, datalab.qemu_img, NoLeases(), datalab.locks, Config(), None
        )
        datalab.kinds += self.volumes.kinds()
        self.images = Images(self.volumes, str(datalab.root / "run"))

    def request(self, **changes: Any) -> NewVolumeRequest:
        given = NewVolumeRequest(
            domain=self.store.id,
            image=new_uuid(),
            volume=new_uuid(),
            capacity=4 * MIB,
            format=md.COW,
            type=md.SPARSE,
            disktype="DATA",
        )
        return replace(given, **changes)

    def create(self, **changes: Any) -> NewVolumeRequest:
        request = self.request(**changes)
        self.data.run(self.task("volume.create", **request.as_params()))
        return request

    def on(self, base: NewVolumeRequest, **changes: Any) -> dict[str, Any]:
        """What makes a request one for a child of `base` in the same image."""
        return {
            "image": base.image,
            "parent_image": base.image,
            "parent": base.volume,
            "capacity": base.capacity,
            **changes,
        }

    def template(self, **changes: Any) -> NewVolumeRequest:
        base = self.create(**changes)
        metadata = self.load(base)
        self.store.save(base.image, base.volume, metadata.with_(voltype=md.SHARED))
        return base

    def task(self, kind: str, **params: Any) -> Request:
        return Request(kind, params, [self.store.id], "test", self.store.id)

    def run(self, kind: str, **params: Any) -> None:
        self.data.run(self.task(kind, domain=self.store.id, **params))

    def load(self, request: NewVolumeRequest) -> md.VolumeMetadata:
        return self.store.load(request.image, request.volume)

    def files(self) -> set[str]:
        root = f"{self.store.root}/images"
        return {
            os.path.relpath(os.path.join(folder, name), root)
            for folder, directories, names in os.walk(root)
            for name in [*names, *directories]
        }

    def snapshot(self) -> dict[str, bytes]:
        """Everything in the domain: names, and the text of the metadata."""
        root = Path(self.store.root, "images")
        return {
            name: (root / name).read_bytes() if name.endswith(".meta") else b""
            for name in self.files()
        }

    def qemu_size(self, request: NewVolumeRequest) -> int:
        image = Image(self.store.path(request.image, request.volume), "qcow2")
        return self.data.qemu_img.info(image).virtual_size


@pytest.fixture
def lab(datalab: Any) -> Lab:
    return Lab(datalab)


# -- create ------------------------------------------------------------------------------------


def test_capacity_is_rounded_up(lab: Lab) -> None:
    cow = lab.create(capacity=MIB + 1)
    assert lab.load(cow).capacity == lab.qemu_size(cow) == MIB + 4096
    raw = lab.create(capacity=MIB + 1, format=md.RAW)
    assert os.path.getsize(lab.store.path(raw.image, raw.volume)) == MIB + 4096


def test_a_snapshot_shows_the_data_below_it(lab: Lab) -> None:
    base = lab.create(format=md.RAW)
    with open(lab.store.path(base.image, base.volume), "r+b") as file:
        file.write(b"hello")
    leaf = lab.create(**lab.on(base))
    assert (lab.load(base).voltype, lab.load(leaf).voltype) == (md.INTERNAL, md.LEAF)
    path = lab.store.path(leaf.image, leaf.volume)
    done = subprocess.run(
        ["qemu-io", "-f", "qcow2", "-c", "read -v 0 512", path], capture_output=True, timeout=60
    )
    assert b"hello" in done.stdout
    other = lab.create(**lab.on(base))  # a preview of the same snapshot
    assert lab.load(base).voltype == md.INTERNAL
    assert lab.load(other).parent == base.volume


def test_what_create_refuses(lab: Lab) -> None:
    base = lab.create()
    template = lab.template()
    before = lab.snapshot()
    cases: list[tuple[type[AgentError], dict[str, Any]]] = [
        (VolumeAlreadyExists, {"image": base.image, "volume": base.volume}),
        (InvalidParameter, lab.on(base, capacity=base.capacity - 4096)),
        (IncorrectFormat, lab.on(base, format=md.RAW)),
        (IncorrectFormat, {"format": md.RAW, "bitmap": new_uuid()}),
        (VolumeDoesNotExist, lab.on(base, parent=new_uuid())),
        (CreateVolumeSizeError, {"capacity": 0}),
        (CreateVolumeSizeError, {"capacity": 2**64}),
        (InvalidParameter, {"sequence": 2**32}),
        (InvalidParameter, {"format": md.RAW, "initial_size": 2**40}),
        (InvalidParameter, {"volume": "../../etc/passwd"}),
        (MetadataOverflow, {"description": "漢" * 210}),
    ]
    for error, changes in cases:
        with pytest.raises(error):
            lab.create(**changes)
        assert lab.snapshot() == before, error
    not_template = lab.on(base, image=new_uuid())
    with pytest.raises(AgentError) as caught:
        lab.create(**not_template)
    assert caught.value.code == 214
    lab.store.save(base.image, base.volume, lab.load(base).with_(legality=md.ILLEGAL))
    with pytest.raises(AgentError) as caught:
        lab.create(**lab.on(base))
    assert caught.value.code == 226
    assert template.volume in lab.store.volumes(template.image)


def test_bitmaps(lab: Lab) -> None:
    names = [new_uuid(), new_uuid()]
    base = lab.create(bitmap=names[0])
    leaf = lab.create(**lab.on(base, add_bitmaps=True, bitmap=names[1]))
    info = lab.volumes.qemu_info(lab.store.id, leaf.image, leaf.volume)
    assert sorted(b["name"] for b in info["bitmaps"]) == sorted(names)
    assert info["backingfile"] == base.volume
    plain = lab.create(**lab.on(base))
    assert "bitmaps" not in lab.volumes.qemu_info(lab.store.id, plain.image, plain.volume)


def test_initial_size_of_a_preallocated_volume_is_within_its_capacity(lab: Lab) -> None:
    raw = lab.create(format=md.RAW, type=md.PREALLOCATED, initial_size=MIB)
    assert lab.store.sizes(raw.image, raw.volume).allocated >= 4 * MIB


def test_a_preallocated_cow_volume_never_needs_more_space(lab: Lab, small_fs: Path) -> None:
    """Every byte of it can be written although the file system is full meanwhile."""
    lab.store = lab.data.domain(root=small_fs)
    full = lab.create(format=md.COW, type=md.PREALLOCATED, capacity=16 * MIB)
    lab.run("volume.extend", image=full.image, volume=full.volume, size=24 * MIB)
    assert lab.store.sizes(full.image, full.volume).allocated >= 24 * MIB
    hog = small_fs / "hog"
    run = subprocess.run(["dd", "if=/dev/zero", f"of={hog}", "bs=1M"], timeout=60, check=False)
    assert run.returncode == 1  # no space left
    path = lab.store.path(full.image, full.volume)
    for command in ("write -P 5 0 24M", "read -P 5 0 24M"):
        subprocess.run(["qemu-io", "-f", "qcow2", "-c", command, path], check=True, timeout=60)
    subprocess.run(["qemu-img", "check", "-f", "qcow2", path], check=True, timeout=60)


def test_a_full_domain(lab: Lab, small_fs: Path) -> None:
    lab.store = lab.data.domain(root=small_fs)
    with pytest.raises(NoSpaceLeftOnDomain):
        lab.create(format=md.RAW, type=md.PREALLOCATED, capacity=128 * MIB)
    assert lab.files() == set()


def test_preallocation_lets_other_hosts_go_on(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    held: list[bool] = []
    make = lab.store.make

    def watch(*args: Any) -> str:
        held.append(lab.store.lock.is_held())
        return make(*args)

    monkeypatch.setattr(lab.store, "make", watch)
    lab.create(format=md.RAW, type=md.PREALLOCATED)
    lab.create()
    assert held == [False, True]
    assert not lab.store.lock.is_held()


def test_illegal_until_filled(lab: Lab) -> None:
    made = lab.create(legal=False)
    assert lab.load(made).legality == md.ILLEGAL
    info = lab.volumes.info(lab.store.id, made.image, made.volume)
    assert (info["status"], info["legality"]) == ("ILLEGAL", "ILLEGAL")
    lab.volumes.set_legality(lab.store.id, made.image, made.volume, "LEGAL")
    assert lab.volumes.info(lab.store.id, made.image, made.volume)["status"] == "OK"
    with pytest.raises(InvalidParameter):
        lab.volumes.set_legality(lab.store.id, made.image, made.volume, "MAYBE")


def test_description(lab: Lab) -> None:
    made = lab.create()
    lab.volumes.set_description(lab.store.id, made.image, made.volume, "ä" + "x" * 300)
    assert lab.load(made).description == "ä" + "x" * 209
    with pytest.raises(MetadataOverflow):
        lab.volumes.set_description(lab.store.id, made.image, made.volume, "漢" * 300)


def test_info_of_a_damaged_volume(lab: Lab) -> None:
    made = lab.create()
    meta = Path(lab.store.root, "images", made.image, made.volume + ".meta")
    meta.write_text(meta.read_text().replace("CAP=4194304", "CAP=many"))
    info = lab.volumes.info(lab.store.id, made.image, made.volume)
    assert (info["status"], info["capacity"], info["truesize"]) == ("INVALID", "0", "0")
    assert info["format"] == "COW"
    with pytest.raises(VolumeDoesNotExist):
        lab.volumes.info(lab.store.id, made.image, new_uuid())
    lab.run("volume.delete", image=made.image, volumes=[made.volume])
    assert lab.files() == set()


# -- death at every step -----------------------------------------------------------------------


def create_cases(lab: Lab) -> dict[str, Callable[[], NewVolumeRequest]]:
    base, template = lab.create(), lab.template()
    return {
        "raw": lambda: lab.request(format=md.RAW, type=md.PREALLOCATED),
        "cow": lab.request,
        "snapshot": lambda: lab.request(**lab.on(base)),
        "template": lambda: lab.request(
            parent_image=template.image, parent=template.volume, capacity=template.capacity
        ),
    }


def test_create_dies_anywhere(lab: Lab) -> None:
    for name, make in create_cases(lab).items():
        for point in lab.data.points("volume.create"):
            request = make()
            before = lab.snapshot()
            task = lab.task("volume.create", **request.as_params())
            running = lab.data.crash(task, point)
            if point.endswith(":published"):
                assert running.entry.outcome == "success", (name, point)
                assert request.volume in lab.store.volumes(request.image)
                if request.parent != BLANK:
                    role = lab.store.load(request.parent_image, request.parent).voltype
                    assert role in (md.INTERNAL, md.SHARED)
                lab.run("volume.delete", image=request.image, volumes=[request.volume])
                if name == "template":
                    lab.store.unmake(request.image, request.parent)
            else:
                assert running.entry.outcome == "cleanSuccess", (name, point)
                assert running.entry.state == j.FINISHED
            assert lab.snapshot() == before, (name, point)


def test_create_is_reverted(lab: Lab) -> None:
    for name, make in create_cases(lab).items():
        request = make()
        before = lab.snapshot()
        runner = lab.data.runner()
        task = lab.task("volume.create", **request.as_params())
        running = lab.data.job(task, runner)
        assert running.entry.outcome == "success", name
        assert lab.snapshot() != before
        for _ in range(2):
            runner.revert(running)
            assert lab.snapshot() == before, name


def test_a_volume_with_a_child_is_not_reverted(lab: Lab) -> None:
    request = lab.request()
    runner = lab.data.runner()
    running = lab.data.job(lab.task("volume.create", **request.as_params()), runner)
    lab.create(**lab.on(request))
    with pytest.raises(VolumeImageHasChildren):
        runner.revert(running)
    assert request.volume in lab.store.volumes(request.image)


def test_delete_dies_anywhere(lab: Lab) -> None:
    for point in lab.data.points("volume.delete"):
        base = lab.create()
        leaf = lab.create(**lab.on(base))
        before = lab.snapshot()
        task = lab.task(
            "volume.delete", domain=lab.store.id, image=base.image, volumes=[leaf.volume]
        )
        running = lab.data.crash(task, point)
        if point.endswith(":recorded"):
            assert running.entry.outcome == "cleanSuccess"
            assert lab.snapshot() == before
        else:
            assert running.entry.outcome == "success"
            assert lab.store.volumes(base.image) == [base.volume]
            assert lab.load(base).voltype == md.LEAF
            assert not [name for name in lab.files() if leaf.volume in name]
        lab.run("image.delete", image=base.image)
        assert lab.files() == set()


def test_image_delete_dies_anywhere(lab: Lab) -> None:
    for point in lab.data.points("image.delete"):
        base = lab.create()
        lab.create(**lab.on(base))
        task = lab.task("image.delete", domain=lab.store.id, image=base.image)
        running = lab.data.crash(task, point)
        assert running.entry.outcome == "success"
        assert lab.files() == set()


@pytest.mark.parametrize("kind", ["raw", "preallocated", "cow"])
def test_extend_dies_anywhere(lab: Lab, kind: str) -> None:
    changes = {
        "raw": {"format": md.RAW},
        "preallocated": {"format": md.RAW, "type": md.PREALLOCATED},
        "cow": {},
    }[kind]
    for point in lab.data.points("volume.extend"):
        made = lab.create(**changes)
        names = {"image": made.image, "volume": made.volume, "size": 9 * MIB}
        task = lab.task("volume.extend", domain=lab.store.id, **names)
        running = lab.data.crash(task, point)
        assert running.entry.outcome == "success"
        assert lab.load(made).capacity == 9 * MIB


# -- extend ------------------------------------------------------------------------------------


def test_extend(lab: Lab) -> None:
    raw = lab.create(format=md.RAW)
    full = lab.create(format=md.RAW, type=md.PREALLOCATED)
    cow = lab.create()
    for made in (raw, full, cow):
        for _ in range(2):  # an absolute size: asking again changes nothing
            lab.run("volume.extend", image=made.image, volume=made.volume, size=8 * MIB)
        assert lab.load(made).capacity == 8 * MIB
        with pytest.raises(VolumeResizeValueError):
            lab.run("volume.extend", image=made.image, volume=made.volume, size=4 * MIB)
    assert lab.qemu_size(cow) == 8 * MIB
    assert lab.store.sizes(raw.image, raw.volume).apparent == 8 * MIB
    assert lab.store.sizes(full.image, full.volume).allocated >= 8 * MIB
    template = lab.template()
    with pytest.raises(VolumeNonWritable):
        lab.run("volume.extend", image=template.image, volume=template.volume, size=8 * MIB)


def test_extending_what_a_guest_has_open_is_left_to_the_guest(lab: Lab) -> None:
    cow = lab.create()
    path = lab.store.path(cow.image, cow.volume)
    guest = subprocess.Popen(
        ["qemu-io", "-f", "qcow2", path], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    try:
        assert guest.stdin is not None
        assert guest.stdout is not None
        guest.stdin.write(b"write 0 512\n")
        guest.stdin.flush()
        guest.stdout.readline()
        lab.run("volume.extend", image=cow.image, volume=cow.volume, size=8 * MIB)
        assert lab.load(cow).capacity == 4 * MIB
    finally:
        guest.communicate(b"quit\n", timeout=30)
    lab.run("volume.extend", image=cow.image, volume=cow.volume, size=8 * MIB)
    assert lab.load(cow).capacity == 8 * MIB


def test_a_half_extended_file_is_cut_again(lab: Lab, small_fs: Path) -> None:
    lab.store = lab.data.domain(root=small_fs)
    full = lab.create(format=md.RAW, type=md.PREALLOCATED)
    with pytest.raises(NoSpaceLeftOnDomain):
        lab.run("volume.extend", image=full.image, volume=full.volume, size=256 * MIB)
    assert lab.load(full).capacity == 4 * MIB
    assert lab.store.sizes(full.image, full.volume).apparent == 4 * MIB


# -- delete ------------------------------------------------------------------------------------


def test_delete_needs_the_children_gone(lab: Lab) -> None:
    base = lab.create()
    middle = lab.create(**lab.on(base))
    leaf = lab.create(**lab.on(middle))
    with pytest.raises(VolumeImageHasChildren):
        lab.run("volume.delete", image=base.image, volumes=[middle.volume])
    lab.run("volume.delete", image=base.image, volumes=[middle.volume, leaf.volume])
    assert lab.store.volumes(base.image) == [base.volume]
    assert lab.load(base).voltype == md.LEAF
    with pytest.raises(VolumeDoesNotExist):
        lab.run("volume.delete", image=base.image, volumes=[leaf.volume])
    lab.run("volume.delete", image=base.image, volumes=[base.volume])
    assert lab.files() == set()


def test_a_template_in_use_is_kept(lab: Lab) -> None:
    template = lab.template()
    child = lab.create(
        parent_image=template.image, parent=template.volume, capacity=template.capacity
    )
    for kind, params in (
        ("volume.delete", {"image": template.image, "volumes": [template.volume]}),
        ("image.delete", {"image": template.image}),
    ):
        with pytest.raises(CannotDeleteSharedVolume) as caught:
            lab.run(kind, **params)
        assert child.image in str(caught.value)
    lab.run("image.delete", image=child.image)
    lab.run("image.delete", image=template.image)
    assert lab.files() == set()
    with pytest.raises(ImageDoesNotExistInSD):
        lab.run("image.delete", image=template.image)


# -- prepare, reconcile ------------------------------------------------------------------------


def test_prepare_refuses_what_is_no_legal_chain(lab: Lab) -> None:
    base = lab.create()
    leaf = lab.create(**lab.on(base))
    names = (lab.store.id, leaf.image, leaf.volume)
    lab.store.save(base.image, base.volume, lab.load(base).with_(legality=md.ILLEGAL))
    with pytest.raises(PrepareIllegalVolume):
        lab.images.prepare(*names)
    assert lab.images.prepare(*names, allow_illegal=True)["path"].endswith(leaf.volume)
    lab.store.save(base.image, base.volume, lab.load(base).with_(legality=md.LEGAL))
    os.rename(f"{lab.store.root}/images/{base.image}/{base.volume}", f"{lab.data.root}/kept")
    with pytest.raises(ImageIsNotLegalChain):
        lab.images.prepare(*names)
    os.rename(f"{lab.data.root}/kept", f"{lab.store.root}/images/{base.image}/{base.volume}")
    lab.store.save(base.image, base.volume, lab.load(base).with_(parent=leaf.volume))
    with pytest.raises(ImageIsNotLegalChain):
        lab.images.prepare(*names)


def test_reconcile_after_a_merge_that_nobody_saw_end(lab: Lab) -> None:
    base = lab.create()
    middle = lab.create(**lab.on(base))
    leaf = lab.create(**lab.on(middle))
    path = lab.store.path(leaf.image, leaf.volume)
    rebase = ["qemu-img", "rebase", "-u", "-f", "qcow2", "-b", base.volume, "-F", "qcow2", path]
    subprocess.run(rebase, check=True, timeout=60)
    for _ in range(2):
        chain = lab.images.reconcile(lab.store.id, base.image, leaf.volume)
        assert chain == [base.volume, leaf.volume]
        assert lab.load(leaf).parent == base.volume
    lab.run("volume.delete", image=base.image, volumes=[middle.volume])
    assert lab.load(base).voltype == md.INTERNAL
    lab.store.save(leaf.image, leaf.volume, lab.load(leaf).with_(legality=md.ILLEGAL))
    assert lab.images.reconcile(lab.store.id, base.image, leaf.volume) == [base.volume]


def test_reconcile_refuses_a_header_that_leads_out(lab: Lab) -> None:
    base = lab.create()
    path = lab.store.path(base.image, base.volume)
    lab.data.qemu_img.create(NewImage(path, "qcow2", 4 * MIB, backing="/etc/passwd"))
    with pytest.raises(ImageIsNotLegalChain):
        lab.images.reconcile(lab.store.id, base.image, base.volume)
