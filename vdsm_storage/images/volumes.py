# SPDX-License-Identifier: GPL-2.0-or-later
"""Volumes as verbs see them: what they are, and the operations on them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Protocol

from vdsm_storage.base.locks import Locks
from vdsm_storage.config import Config
from vdsm_storage.errors import (
    AgentError,
    ImageDoesNotExistInSD,
    InvalidParameter,
    MetadataCleared,
    VolumeAlreadyExists,
    VolumeDoesNotExist,
    VolumeMetadataReadError,
)
from vdsm_storage.host.qemu_img import QemuImg
from vdsm_storage.images import alignment, copy_volume, create, delete, extend, guard, layers
from vdsm_storage.images import metadata as md
from vdsm_storage.images.chain import Member
from vdsm_storage.images.clone_image import CloneStructure, SyncData
from vdsm_storage.images.copy_volume import CopyVolume, CopyVolumeRequest
from vdsm_storage.images.create import CreateVolume, NewVolumeRequest
from vdsm_storage.images.delete import DeleteImage, DeleteVolumes
from vdsm_storage.images.encryption import Encryption
from vdsm_storage.images.extend import ExtendVolume
from vdsm_storage.images.metadata import VolumeMetadata
from vdsm_storage.images.move_image import MoveImage
from vdsm_storage.images.store import NO_WIPE, Store, Wipe
from vdsm_storage.images.workshop import Workshop
from vdsm_storage.jobs.operation import Kind
from vdsm_storage.jobs.runner import Request, Runner
from vdsm_storage.leases.model import LeaseSpec, LeaseState

OK, ILLEGAL, INVALID = "OK", "ILLEGAL", "INVALID"


class LeaseReader(Protocol):
    """The part of leases.lease.Leases that is used here."""

    def state(self, spec: LeaseSpec) -> LeaseState:
        """Who holds a lease, read from the storage."""


class Volumes:
    """Needs the domains' stores, qemu-img, leases (any domain's), the process's locks, the runner.

    Wiring: `runner.add_kinds(volumes.kinds())`.
    """

    def __init__(
        self,
        find_store: Callable[[str], Store],
        qemu: QemuImg,
        leases: LeaseReader,
        locks: Locks,
        config: Config,
        runner: Runner,
        encryption: Encryption | None = None,
    ) -> None:
        self._find_store = find_store
        self._leases = leases
        self._runner = runner
        self.shop = Workshop(find_store, qemu, locks, config.storage.lock_timeout, encryption)

    def kinds(self) -> list[Kind]:
        operations = (
            CloneStructure,
            CreateVolume,
            CopyVolume,
            DeleteVolumes,
            DeleteImage,
            ExtendVolume,
            MoveImage,
            SyncData,
        )
        return [operation(self.shop).kind() for operation in operations]

    # -- tasks -------------------------------------------------------------------------------

    def create(self, request: NewVolumeRequest) -> str:
        """Start making a volume; returns the task.  Raises what create.check* do, 212, 654."""
        create.check(request)
        store = self._find_store(request.domain)
        create.check_kind(store, request.volume, request.format, request.type)
        if request.volume in store.volumes(request.image):
            raise VolumeAlreadyExists(
                volume=request.volume, image=request.image, domain=request.domain
            )
        create.check_parent(store, request)
        if request.secret is not None:
            self.shop.luks_and_key(request.secret)
        text = f"Create volume {request.volume}"
        task = _task("volume.create", "createVolume", request.as_params(), text)
        return self.start(store, task)

    def delete(
        self,
        domain: str,
        image: str,
        volumes: Sequence[str],
        *,
        force: bool,
        wipe: Wipe = NO_WIPE,
    ) -> str:
        """Start deleting volumes of an image; returns the task.  Raises 201, 204, 223, 654."""
        store = self._find_store(domain)
        delete.check_volumes(store, image, volumes, force=force)
        params = {
            "domain": domain,
            "image": image,
            "volumes": list(volumes),
            "force": force,
            **_wiping(store, wipe),
        }
        text = f"Delete volumes {', '.join(volumes)}"
        return self.start(store, _task("volume.delete", "deleteVolume", params, text))

    def delete_image(self, domain: str, image: str, wipe: Wipe = NO_WIPE) -> str:
        """Start deleting an image; returns the task.  Raises 268, 223, 654."""
        store = self._find_store(domain)
        delete.check_image(store, image)
        params = {"domain": domain, "image": image, **_wiping(store, wipe)}
        return self.start(store, _task("image.delete", "deleteImage", params, f"Delete {image}"))

    def extend(
        self, domain: str, image: str, volume: str, size: int, secret: str | None = None
    ) -> str:
        """Start giving a volume a capacity of `size` bytes; an encrypted one needs its secret.

        Raises 201, 213, 232, 654, 1000.
        """
        store = self._find_store(domain)
        extend.check(store, image, volume, size)
        params = {"domain": domain, "image": image, "volume": volume, "size": size}
        if secret is not None:
            self.shop.luks_and_key(secret)
            params["secret"] = secret
        text = f"Extend volume {volume} to {size} bytes"
        return self.start(store, _task("volume.extend", "extendImageSize", params, text))

    def copy(self, request: CopyVolumeRequest) -> str:
        """Start copying a volume and all below it into a new one; returns the task.

        Raises 201, 202, 212, 262, 654, 1000.
        """
        copy_volume.check(self._find_store(request.source_domain), request)
        store = self._find_store(request.domain)
        create.check_kind(store, request.volume, request.format, request.type)
        if request.volume in store.volumes(request.image):
            raise VolumeAlreadyExists(
                volume=request.volume, image=request.image, domain=request.domain
            )
        text = f"Copy volume {request.source} to {request.volume}"
        task = _task("volume.copy", "copyImage", request.as_params(), text)
        return self.start(store, replace(task, domains=[request.source_domain, request.domain]))

    def start(self, store: Store, request: Request) -> str:
        """Start a task that changes a domain.

        The domain's lock is held meanwhile, so that a caller learns at once when another host has
        it (654): engines then look for that host.
        """
        with store.lock.held(self.shop.lock_timeout):
            return self._runner.start_task(request)

    # -- changes at once ---------------------------------------------------------------------

    def set_description(self, domain: str, image: str, volume: str, text: str) -> None:
        """Raises 201, 207, 654, 756."""
        self._change(domain, image, volume, description=md.clean_description(text))

    def set_legality(self, domain: str, image: str, volume: str, legality: str) -> None:
        """Raises 201, 207, 654, 1000."""
        if legality not in (md.LEGAL, md.ILLEGAL):
            raise InvalidParameter(
                parameter="legality", value=legality, reason="give LEGAL or ILLEGAL"
            )
        self._change(domain, image, volume, legality=legality)

    def _change(self, domain: str, image: str, volume: str, **changes: str) -> None:
        with self.shop.changing(domain, image) as store:
            metadata = store.load(image, volume)
            store.save(image, volume, metadata.with_(**changes))

    # -- looking -----------------------------------------------------------------------------

    def of_image(self, domain: str, image: str) -> list[str]:
        """Raises ImageDoesNotExistInSD (268)."""
        volumes = self._find_store(domain).volumes(image)
        if not volumes:
            raise ImageDoesNotExistInSD(image=image, domain=domain)
        return volumes

    def info(self, domain: str, image: str, volume: str) -> dict[str, Any]:
        """As Volume.getInfo shows it: a few small reads, no program is run.

        A volume whose metadata cannot be used has the status INVALID and no sizes.  Raises 201.
        """
        store = self._find_store(domain)
        try:
            metadata, sizes = store.examine(image, volume)
        except (MetadataCleared, VolumeMetadataReadError):
            return _broken_info(store, image, volume)
        info = _info(volume, metadata)
        info["apparentsize"] = str(sizes.apparent)
        info["truesize"] = str(sizes.allocated)
        info["status"] = OK if metadata.is_legal else ILLEGAL
        spec = store.lease(image, volume)
        if spec is not None:
            state = self._leases.state(spec)
            info["lease"] = {
                "path": spec.path,
                "offset": spec.offset,
                "owners": list(state.owners),
                "version": state.version,
            }
        info["children"] = []
        return info

    def size(self, domain: str, image: str, volume: str) -> dict[str, str]:
        """{apparentsize, truesize}, bytes.  Raises 201."""
        store = self._published(domain, image, volume)
        sizes = store.sizes(image, volume)
        return {"apparentsize": str(sizes.apparent), "truesize": str(sizes.allocated)}

    def refresh(self, domain: str, image: str, volume: str) -> None:
        """See the volume's present size on this host (block: device-mapper).  Raises 201."""
        self._published(domain, image, volume).refresh(image, volume)

    def teardown(self, domain: str, image: str, volume: str) -> None:
        """The volume is no longer used on this host.  Raises 201."""
        self._published(domain, image, volume).release(image, [volume])

    def qemu_info(self, domain: str, image: str, volume: str) -> dict[str, Any]:
        """What qemu-img says: format, virtualsize; clustersize, compat, backingfile, bitmaps of
        a cow volume.  Raises 201, 207, 757."""
        store = self._find_store(domain)
        metadata = store.load(image, volume)
        with guard.active(store, image, [volume], prepared=False):
            info = layers.look(store, self.shop.qemu, Member(image, volume, metadata))
        answer: dict[str, Any] = {"format": info.format, "virtualsize": info.virtual_size}
        if info.cluster_size is not None:
            answer["clustersize"] = info.cluster_size
        if info.compat is not None:
            answer["compat"] = info.compat
        if info.backing is not None:
            answer["backingfile"] = info.backing
        if info.bitmaps:
            answer["bitmaps"] = [
                {"name": b.name, "granularity": b.granularity, "flags": list(b.flags)}
                for b in info.bitmaps
            ]
        return answer

    def alignment(self, domain: str, image: str, volume: str) -> dict[str, bool]:
        """{partition: whether it is aligned}.  Raises 201, 207, 262."""
        return alignment.scan(self._find_store(domain), self.shop.qemu, image, volume)

    def _published(self, domain: str, image: str, volume: str) -> Store:
        store = self._find_store(domain)
        if volume not in store.volumes(image):
            raise VolumeDoesNotExist(volume=volume, image=image, domain=domain)
        return store


def _wiping(store: Store, wipe: Wipe) -> dict[str, bool]:
    """The params that tell how data is wiped; files are given back zeroed anyway."""
    return {"zero": wipe.zero and store.is_block, "discard": wipe.discard and store.is_block}


def _task(kind: str, verb: str, params: dict[str, Any], text: str) -> Request:
    domain = str(params["domain"])
    return Request(
        kind=kind, params=params, domains=[domain], verb=verb, lane=domain, description=text
    )


def _info(volume: str, metadata: VolumeMetadata) -> dict[str, Any]:
    return {
        "uuid": volume,
        "type": metadata.type,
        "format": md.known_format(metadata.format),
        "disktype": metadata.disktype,
        "voltype": metadata.voltype,
        "capacity": str(metadata.capacity),
        "parent": metadata.parent,
        "description": metadata.description,
        "pool": "",
        "domain": metadata.domain,
        "image": metadata.image,
        "ctime": str(metadata.ctime),
        "mtime": "0",
        "legality": metadata.legality,
        "generation": metadata.generation,
        "sequence": metadata.sequence,
    }


def _broken_info(store: Store, image: str, volume: str) -> dict[str, Any]:
    """As much as can be told of a volume whose metadata is damaged."""
    info = _info(volume, VolumeMetadata(store.id, image, 0, "", "", "", ""))
    with contextlib.suppress(AgentError):
        for key, value in store.parse(image, volume).fields.items():
            info[key] = str(value) if key in ("capacity", "ctime") else value
    info["format"] = md.known_format(info["format"])
    info.update(apparentsize="0", truesize="0", status=INVALID, children=[])
    return info
