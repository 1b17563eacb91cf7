# SPDX-License-Identifier: GPL-2.0-or-later
"""SDM.update_volume and SDM.amend_volume: a volume's metadata, and its qcow2 version."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from vdsm_storage.base.uuids import BLANK
from vdsm_storage.errors import (
    CommandError,
    ImageIsNotLegalChain,
    IncorrectFormat,
    InvalidVolumeUpdate,
    UnsupportedOperation,
    VolumeDoesNotExist,
)
from vdsm_storage.host.qemu_img import QemuImg, Watch
from vdsm_storage.images import chain, guard, layers
from vdsm_storage.images import metadata as md
from vdsm_storage.images.guard import Guard, VolumeRef
from vdsm_storage.images.metadata import GENERATIONS, VolumeMetadata
from vdsm_storage.images.store import Store
from vdsm_storage.jobs.operation import Kind, Operation
from vdsm_storage.jobs.runner import Request

log = logging.getLogger("volumes")

UPDATE = "volume.update"
AMEND = "volume.amend"
ATTRIBUTES = ("legality", "description", "generation", "type")
COMPATS = ("0.10", "1.1")


def update_job(
    target: VolumeRef, generation: int | None, attributes: Mapping[str, Any]
) -> Request:
    """`attributes`: any of legality, description, generation, type; None is as if absent.

    Raises InvalidVolumeUpdate (235) for what no volume can be given.
    """
    wanted = {name: attributes.get(name) for name in ATTRIBUTES}
    wanted = {name: value for name, value in wanted.items() if value is not None}
    reason = _unusable(wanted)
    if reason is not None:
        raise InvalidVolumeUpdate(volume=target.volume, reason=reason)
    return Request(
        kind=UPDATE,
        params={**target.as_params(), "generation": generation, "attributes": wanted},
        domains=[target.domain],
        verb="update_volume",
        lane=target.domain,
        description=f"Update volume {target.volume}",
    )


def _unusable(wanted: Mapping[str, Any]) -> str | None:
    if not wanted:
        return f"nothing to change; give one of {', '.join(ATTRIBUTES)}"
    if wanted.get("type", md.SHARED) != md.SHARED:
        return f"a role can only become SHARED, not {wanted['type']}"
    if wanted.get("legality", md.LEGAL) not in (md.LEGAL, md.ILLEGAL):
        return f"a legality is LEGAL or ILLEGAL, not {wanted['legality']}"
    if not 0 <= wanted.get("generation", 0) < GENERATIONS:
        return f"a generation is 0 to {GENERATIONS - 1}, not {wanted['generation']}"
    return None


def amend_job(target: VolumeRef, generation: int | None, compat: str | None) -> Request:
    """Raises InvalidVolumeUpdate (235) for an unknown version."""
    compat = "0.10" if compat == "0.1" else compat
    if compat not in COMPATS:
        reason = f"compat is one of {', '.join(COMPATS)}, not {compat}"
        raise InvalidVolumeUpdate(volume=target.volume, reason=reason)
    return Request(
        kind=AMEND,
        params={**target.as_params(), "generation": generation, "compat": compat},
        domains=[target.domain],
        verb="amend_volume",
        lane=target.domain,
        description=f"Amend volume {target.volume}",
    )


class Updating:
    """What changes a volume without moving its data."""

    def __init__(self, guard: Guard, qemu_img: QemuImg) -> None:
        self._guard = guard
        self._qemu_img = qemu_img

    def kinds(self) -> list[Kind]:
        return [
            Kind(UPDATE, ("locked", "updated"), self._update, self._recover_update),
            Kind(AMEND, ("locked", "marked", "amended"), self._amend, self._recover_amend),
        ]

    # -- metadata ----------------------------------------------------------------------------

    def _update(self, op: Operation) -> None:
        target = VolumeRef.from_params(op.params)
        with self._guard.writing(target, cancel=op.cancel) as store:
            op.step("locked")
            found = store.load(target.image, target.volume)
            guard.check_generation(target.volume, found.generation, op.params["generation"])
            new = _updated(store, target, found, op.params["attributes"])
            op.record(before=found.generation, after=new.generation)
            store.save(target.image, target.volume, new)
        op.step("updated", abortable=False)

    def _recover_update(self, op: Operation) -> bool:
        """One rename decides: the metadata are the new ones or the old ones."""
        now = _load(self._guard, op)
        if now is None or "after" not in op.facts:
            return False
        attributes = op.params["attributes"]
        names = {"type": "voltype"}
        return now.generation == op.facts["after"] and all(
            getattr(now, names.get(name, name)) == _stored(name, value)
            for name, value in attributes.items()
        )

    # -- qcow2 version -----------------------------------------------------------------------

    def _amend(self, op: Operation) -> None:
        target = VolumeRef.from_params(op.params)
        with self._guard.writing(target, cancel=op.cancel) as store:
            op.step("locked")
            found = store.load(target.image, target.volume)
            if found.format != md.COW:
                raise IncorrectFormat(volume=target.volume, reason="only COW has a version")
            if op.params["compat"] != "0.10" and layers.compat(store) == "0.10":
                raise UnsupportedOperation(
                    operation=f"qcow2 {op.params['compat']} for volume {target.volume}",
                    reason=f"domain {store.id} has version {store.version}; upgrade it first",
                )
            guard.check_generation(target.volume, found.generation, op.params["generation"])
            op.record(generation=found.generation, legality=found.legality)
            with guard.generation(store, target, found.generation, illegal=True):
                op.step("marked")
                path = store.path(target.image, target.volume)
                names = chain.opened_with(store, target.image, target.volume)
                with guard.active(store, target.image, names, prepared=False):
                    member = chain.Member(target.image, target.volume, found)
                    info = layers.check_header(store, self._qemu_img, member)
                    if info.bitmaps and op.params["compat"] == "0.10":  # qemu drops them unasked
                        reason = "qcow2 0.10 holds no bitmaps; clear_bitmaps first"
                        raise InvalidVolumeUpdate(volume=target.volume, reason=reason)
                    self._amend_file(op, target, path)
                op.step("amended", abortable=False)

    def _amend_file(self, op: Operation, target: VolumeRef, path: str) -> None:
        try:
            self._qemu_img.amend(path, op.params["compat"], Watch(op.progress, op.cancel))
        except CommandError as error:
            reason = f"its qcow2 version cannot be changed: {error}"
            raise InvalidVolumeUpdate(volume=target.volume, reason=reason) from error

    def _recover_amend(self, op: Operation) -> bool:
        """An image that is sound gets its legality back; a damaged one stays ILLEGAL."""
        target = VolumeRef.from_params(op.params)
        now, before = _load(self._guard, op), op.facts.get("generation")
        if now is None or before is None:
            return False
        if now.generation != before:
            return now.generation == guard.following(before) and now.is_legal
        if op.facts["legality"] == now.legality:
            return False
        with self._guard.writing(target) as store:
            names = chain.opened_with(store, target.image, target.volume)
            with guard.active(store, target.image, names, prepared=False):
                sound = self._is_sound(store, chain.Member(target.image, target.volume, now))
            now = store.load(target.image, target.volume)
            if sound and now.generation == before:
                store.save(target.image, target.volume, now.with_(legality=op.facts["legality"]))
        return False

    def _is_sound(self, store: Store, member: chain.Member) -> bool:
        try:
            layers.check_header(store, self._qemu_img, member)
        except ImageIsNotLegalChain as error:
            log.warning("Volume %s stays ILLEGAL: %s", member.volume, error)
            return False
        check = self._qemu_img.check(layers.layer(store, member))
        return not (check.corruptions or check.errors)


def _load(guarded: Guard, op: Operation) -> VolumeMetadata | None:
    target = VolumeRef.from_params(op.params)
    try:
        return guarded.store(target.domain).load(target.image, target.volume)
    except VolumeDoesNotExist:
        return None


def _stored(name: str, value: Any) -> Any:
    return md.clean_description(value) if name == "description" else value


def _updated(
    store: Store, target: VolumeRef, found: VolumeMetadata, attributes: Mapping[str, Any]
) -> VolumeMetadata:
    """The new metadata; the generation goes up by one unless it is set.  Raises 235."""
    changes: dict[str, object] = {
        "voltype" if name == "type" else name: value for name, value in attributes.items()
    }
    if "type" in attributes and found.voltype != md.SHARED:
        if found.voltype != md.LEAF or found.parent != BLANK:
            reason = f"only a volume that stands alone can become SHARED; it is {found.voltype}"
            raise InvalidVolumeUpdate(volume=target.volume, reason=reason)
        if chain.children(store, target.image, target.volume):
            reason = "it has children and cannot become SHARED"
            raise InvalidVolumeUpdate(volume=target.volume, reason=reason)
    changes.setdefault("generation", guard.following(found.generation))
    return found.with_(**changes)
