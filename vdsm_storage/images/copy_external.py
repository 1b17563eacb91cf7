# SPDX-License-Identifier: GPL-2.0-or-later
"""SDM.copy_data with one end that is no volume of a domain: an export of an NBD server, raw.

Into a volume it is a copy like any other: the target is ILLEGAL until everything is there, and
its generation tells.  Out of a volume the external lease of the job tells: SUCCEEDED or FAILED.
A cow image out there is refused, because its header could name any file of this host.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

from vdsm_storage.base.uuids import BLANK
from vdsm_storage.errors import (
    CommandError,
    CopyImageError,
    DestinationVolumeTooSmall,
    NoSuchLease,
    StorageDomainDoesNotExist,
    UnsupportedOperation,
    VolumeNonWritable,
)
from vdsm_storage.host.qemu_img import RAW, Conversion, Image, QemuImg, Watch
from vdsm_storage.images import chain, copy, guard, layers
from vdsm_storage.images.chain import Member
from vdsm_storage.images.encryption import check_clear
from vdsm_storage.images.guard import Guard, VolumeRef
from vdsm_storage.images.store import Store
from vdsm_storage.jobs.operation import COPYING, Kind, Operation
from vdsm_storage.jobs.runner import Request
from vdsm_storage.leases.external import LeaseRef
from vdsm_storage.leases.job_metadata import SUCCEEDED, JobMetadata

IMPORT = "volume.import"
EXPORT = "volume.export"

_NAME = r"[A-Za-z0-9_.-]*"
_HOST = r"(?:[A-Za-z0-9.-]+|\[[0-9A-Fa-f:.]+\])"
_TCP = re.compile(rf"nbd:{_HOST}:[0-9]{{1,5}}(?::exportname={_NAME})?|"
                  rf"nbd://{_HOST}(?::[0-9]{{1,5}})?(?:/{_NAME})?")  # fmt: skip
_SOCKET = "(?P<socket>/[A-Za-z0-9_./-]+)"
_UNIX = (
    re.compile(rf"nbd:unix:{_SOCKET}(?::exportname={_NAME})?"),
    re.compile(rf"nbd\+unix:///{_NAME}\?socket={_SOCKET}"),
)


class JobLeases(Protocol):
    """The part of leases.external.ExternalLeases that is used here."""

    def job(
        self, ref: LeaseRef, job_id: str, generation: int
    ) -> AbstractContextManager[None]: ...

    def metadata(self, ref: LeaseRef) -> JobMetadata | None: ...


def check_url(url: str, sockets: str) -> str:
    """The URL, if it is one of an NBD server that listens on TCP or below `sockets`.

    Raises UnsupportedOperation (2009): no request may name a file of this host.
    """
    for form in _UNIX:
        found = form.fullmatch(url)
        if found is not None:
            path = os.path.realpath(found["socket"])
            if path.startswith(os.path.realpath(sockets) + "/"):
                return url
            raise _refused(url, f"sockets of NBD servers are below {sockets}")
    if _TCP.fullmatch(url) is None:
        raise _refused(url, "give the URL of an NBD server, nbd:unix:PATH or nbd://HOST/NAME")
    return url


def _refused(url: str, reason: str) -> UnsupportedOperation:
    return UnsupportedOperation(operation=f"copying from or to {url[:200]!r}", reason=reason)


@dataclass(frozen=True)
class ExternalCopyRequest:
    """`external` is the endpoint as the schema gives it: url, lease, generation, format, is_zero.

    `generation` is that of `volume`, when it is the target.
    """

    job_id: str
    volume: VolumeRef
    external: Mapping[str, Any]
    into_volume: bool
    generation: int | None = None
    prepared: bool = False

    def as_job(self, sockets: str) -> Request:
        """Raises UnsupportedOperation (2009); `sockets` is the directory of NBD sockets."""
        url = check_url(str(self.external["url"]), sockets)
        if str(self.external["format"]).lower() != RAW:
            raise _refused(url, "only raw images are copied from and to servers")
        domains, lease = [self.volume.domain], self.external["lease"]
        params: dict[str, Any] = {"url": url, "prepared": self.prepared}
        if self.into_volume:
            params |= {"target": self.volume.as_params(), "generation": self.generation}
        else:
            domains = list(dict.fromkeys([*domains, lease["sd_id"]]))
            params |= {
                "source": self.volume.as_params(),
                "generation": int(self.external["generation"]),
                "lease": {"sd_id": lease["sd_id"], "lease_id": lease["lease_id"]},
                "job": self.job_id,
                "is_zero": bool(self.external.get("is_zero")),
            }
        ends = (url, self.volume.volume) if self.into_volume else (self.volume.volume, url)
        return Request(
            kind=IMPORT if self.into_volume else EXPORT,
            params=params,
            domains=domains,
            verb="copy_data",
            lane=self.volume.domain,
            description="Copy {} to {}".format(*ends),
        )


class ExternalCopying:
    """Copies between volumes and NBD servers."""

    def __init__(self, guarded: Guard, qemu_img: QemuImg, leases: JobLeases) -> None:
        self._guard = guarded
        self._qemu_img = qemu_img
        self._leases = leases

    def kinds(self) -> list[Kind]:
        into = ("locked", "marked", "copied", "published")
        out = ("locked", "copied", "published")

        def recover(op: Operation) -> bool:
            return copy.is_copied(self._guard, op)

        return [
            Kind(IMPORT, into, self._import, recover, work=COPYING),
            Kind(EXPORT, out, self._export, self._recover_export, work=COPYING),
        ]

    # -- into a volume -----------------------------------------------------------------------

    def _import(self, op: Operation) -> None:
        target = VolumeRef.from_params(op.params["target"])
        with self._guard.writing(target, cancel=op.cancel) as store:
            op.step("locked")
            found = store.load(target.image, target.volume)
            guard.check_generation(target.volume, found.generation, op.params["generation"])
            member = Member(target.image, target.volume, found)
            if member.is_shared or found.parent != BLANK:
                role = "a template (SHARED)" if member.is_shared else "based on another volume"
                raise VolumeNonWritable(volume=target.volume, role=role)
            check_clear(store, [member], prepared=op.params["prepared"])
            op.record(generation=found.generation)
            with guard.generation(store, target, found.generation, illegal=True):
                op.step("marked")
                prepared = op.params["prepared"]
                with guard.active(store, target.image, [target.volume], prepared=prepared):
                    self._fill(op, store, member)
                op.step("copied", abortable=False)
        op.step("published", abortable=False)

    def _fill(self, op: Operation, store: Store, target: Member) -> None:
        source, size = Image(op.params["url"], RAW), target.metadata.capacity
        image = layers.layer(store, target)
        raw_device = store.is_block and not target.is_cow
        try:
            needed = self._qemu_img.info(source).virtual_size
            if needed > size:
                raise DestinationVolumeTooSmall(volume=target.volume, size=size, needed=needed)
            conversion = Conversion(
                source=source,
                target=image,
                compat=layers.compat(store),
                preallocation=copy.preallocation(store, target),
                create=not raw_device,
                unordered=raw_device,
            )
            self._qemu_img.convert(conversion, Watch(op.progress, op.cancel, op.pace))
            if needed < size and not raw_device:
                self._qemu_img.resize(image, size, copy.preallocation(store, target))
        except CommandError as error:
            raise CopyImageError(volume=target.volume, reason=error) from error

    # -- out of a volume ---------------------------------------------------------------------

    def _export(self, op: Operation) -> None:
        source = VolumeRef.from_params(op.params["source"])
        lease, generation = LeaseRef(**op.params["lease"]), op.params["generation"]
        with (
            self._guard.reading(source, cancel=op.cancel) as store,
            self._leases.job(lease, op.params["job"], generation),
        ):
            op.step("locked")
            members = chain.walk(store, source.image, source.volume)
            names = [member.volume for member in members]
            prepared = op.params["prepared"]
            with guard.active(store, source.image, names, prepared=prepared):
                layers.check_headers(store, self._qemu_img, members)
                self._send(op, layers.layer(store, members[-1]), source.volume)
            op.step("copied", abortable=False)
        op.step("published", abortable=False)

    def _send(self, op: Operation, source: Image, volume: str) -> None:
        conversion = Conversion(
            source=source,
            target=Image(op.params["url"], RAW),
            create=False,
            is_zero=op.params["is_zero"],
        )
        try:
            self._qemu_img.convert(conversion, Watch(op.progress, op.cancel, op.pace))
        except CommandError as error:
            raise CopyImageError(volume=volume, reason=error) from error

    def _recover_export(self, op: Operation) -> bool:
        """The lease tells; what it does not tell, the engine fences."""
        try:
            found = self._leases.metadata(LeaseRef(**op.params["lease"]))
        except (NoSuchLease, StorageDomainDoesNotExist):
            return False
        return (
            found is not None
            and found.job_id == op.params["job"]
            and found.job_status == SUCCEEDED
        )
