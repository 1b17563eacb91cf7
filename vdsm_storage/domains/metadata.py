# SPDX-License-Identifier: GPL-2.0-or-later
"""A domain's metadata: the keys, the checksum over them, and the text form of file domains.

    ALIGNMENT=1048576
    ...
    VERSION=5
    _SHA_CKSUM=50ccaf5e45d0fbe2b509cf5ae68cb56beb4d1c6c

Lines are sorted, the checksum comes last, the text is UTF-8 without padding.  Other hosts write
and read the same text.  Keys that this agent does not know survive a rewrite.  (Block domains keep
the same keys and the same checksum in LVM tags; that encoding has a module of its own.)
"""

from __future__ import annotations

import hashlib
import logging
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from vdsm_storage.base.units import MIB
from vdsm_storage.errors import InvalidDomainMetadata, MetadataSealBroken

log = logging.getLogger("domain.metadata")

CHECKSUM = "_SHA_CKSUM"
REGULAR = "Regular"
MASTER = "Master"
DESCRIPTION_LIMIT = 50  # characters; upstream writes no longer ones
# What StoragePool.create adds to the master domain's metadata.
POOL_KEYS = ("MASTER_VERSION", "POOL_DESCRIPTION", "POOL_DOMAINS", "POOL_SPM_ID", "POOL_SPM_LVER")

_KEY = re.compile(r"[A-Za-z0-9_]+")


def checksum(values: Mapping[str, str]) -> str:
    """SHA-1 over the sorted lines without line ends; non-ASCII characters as `&#NNN;`."""
    lines = sorted(f"{key}={value}" for key, value in values.items() if key != CHECKSUM)
    return hashlib.sha1(  # noqa: S324 - the format's choice; it guards against torn writes only
        "".join(lines).encode("ascii", "xmlcharrefreplace")
    ).hexdigest()


def encode(values: Mapping[str, str]) -> bytes:
    """The text of dom_md/metadata.  Raises InvalidDomainMetadata for what it cannot hold."""
    for key, value in values.items():
        if not _KEY.fullmatch(key):
            raise InvalidDomainMetadata(domain=values.get("SDUUID"), reason=f"the key {key!r}")
        if any(ord(c) < 32 or 0xD800 <= ord(c) < 0xE000 for c in value):
            reason = f"{key} holds a control character or half a surrogate pair: {value!r}"
            raise InvalidDomainMetadata(domain=values.get("SDUUID"), reason=reason)
    lines = sorted(f"{key}={value}" for key, value in values.items() if key != CHECKSUM)
    lines.append(f"{CHECKSUM}={checksum(values)}")
    return "".join(line + "\n" for line in lines).encode()


def decode(text: bytes, where: str = "") -> dict[str, str]:
    """All keys but the checksum.  `where` names the domain in errors.

    Tolerant as the other readers are: a line without `=` is ignored, the last duplicate wins, a
    missing checksum is accepted with a warning.  A wrong one is MetadataSealBroken (752).
    """
    try:
        lines = text.decode().split("\n")
    except UnicodeDecodeError as error:
        raise MetadataSealBroken(domain=where, computed="none", stored="unreadable") from error
    return unseal(lines, where)


def unseal(lines: Iterable[str], where: str = "") -> dict[str, str]:
    """What the lines say, once their checksum is found right; `where` names the domain.

    A line without `=` is ignored, the last of two equal keys counts.
    """
    raw: dict[str, str] = {}
    for line in lines:
        key, equals, value = line.partition("=")
        if equals:
            raw[key.strip()] = value
    values = {key: value.strip() for key, value in raw.items()}
    stored = values.pop(CHECKSUM, None)
    if stored is None:
        log.warning("The metadata of domain %s has no checksum", where)
        return values
    computed = checksum(values)
    if stored != computed:
        if stored == checksum(raw):  # blanks around a value, and a writer that counted them
            del raw[CHECKSUM]
            return raw
        raise MetadataSealBroken(domain=where, computed=computed, stored=stored)
    return values


@dataclass(frozen=True)
class DomainMetadata:
    """Typed sight of the keys.  Raises InvalidDomainMetadata (751) for a key that is missing."""

    values: Mapping[str, str] = field(default_factory=dict)

    def _get(self, key: str) -> str:
        try:
            return self.values[key]
        except KeyError:
            raise InvalidDomainMetadata(
                domain=self.values.get("SDUUID", "?"), reason=f"the key {key} is missing"
            ) from None

    def _number(self, key: str, default: int | None = None) -> int:
        text = self.values.get(key) if default is not None else self._get(key)
        if text is None:
            assert default is not None
            return default
        try:
            return int(text)
        except ValueError as error:
            raise InvalidDomainMetadata(
                domain=self.values.get("SDUUID", "?"), reason=f"{key}={text!r} is no number"
            ) from error

    def as_info(self, domain: str) -> dict[str, Any]:
        """What StorageDomain.getInfo shows of every domain."""
        return {
            "uuid": domain,
            "type": self.type,
            "class": self.klass,
            "name": self.name,
            "role": self.role,
            "pool": self.pools,
            "version": str(self.version),
            "block_size": self.block_size,
            "alignment": self.alignment,
        }

    @property
    def id(self) -> str:
        return self._get("SDUUID")

    @property
    def type(self) -> str:
        return self._get("TYPE")

    @property
    def klass(self) -> str:
        return self._get("CLASS")

    @property
    def role(self) -> str:
        return self._get("ROLE")

    @property
    def is_master(self) -> bool:
        return self.role.lower() == MASTER.lower()

    @property
    def name(self) -> str:
        return self.values.get("DESCRIPTION", "")

    @property
    def version(self) -> int:
        return self._number("VERSION")

    @property
    def pools(self) -> list[str]:
        """The pool that the domain is attached to, or []."""
        return [pool for pool in self.values.get("POOL_UUID", "").split(",") if pool]

    @property
    def remote_path(self) -> str:
        return self.values.get("REMOTE_PATH", "")

    @property
    def block_size(self) -> int:
        return self._number("BLOCK_SIZE", 512)

    @property
    def alignment(self) -> int:
        return self._number("ALIGNMENT", MIB)

    @property
    def master_version(self) -> int | None:
        """What is on disk; None when no pool was ever created on the domain."""
        return self._number("MASTER_VERSION") if "MASTER_VERSION" in self.values else None

    def with_changes(self, changes: Mapping[str, str | None]) -> DomainMetadata:
        """A copy with keys set, or removed where the new value is None."""
        values = {k: v for k, v in self.values.items() if changes.get(k, "") is not None}
        values.update({k: v for k, v in changes.items() if v is not None})
        return DomainMetadata(values)
