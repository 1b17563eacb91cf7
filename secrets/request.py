# SPDX-License-Identifier: GPL-2.0-or-later
"""What a caller wants registered, checked as a whole before anything is done."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Final

from vdsm_storage.base.secret import Secret
from vdsm_storage.errors import BadSecretRequest
from vdsm_storage.secrets.model import OF_VMS, OURS, USAGES, Entry

LARGEST: Final = 65536  # bytes of a value; libvirt's protocol takes no more


def parse(secrets: Iterable[Mapping[str, Any]]) -> list[Entry]:
    """The secrets of one request, in its order.  Raises BadSecretRequest, which names the secret
    that is wrong by its place and never shows a value."""
    entries = [_entry(number, given) for number, given in enumerate(secrets)]
    for number, entry in enumerate(entries):
        if entry.of_vms:
            raise _bad(number, f"usageID begins with {OF_VMS}, which is for secrets of VMs")
    _refuse_twice("UUID", [entry.uuid for entry in entries])
    _refuse_twice("usage", [entry.usage for entry in entries])
    return entries


def parse_of_vm(secrets: Iterable[Mapping[str, Any]]) -> list[Entry]:
    """The same of those that come with a VM: their usage ids are the agent's to choose."""
    given = [{**secret, "usageID": OF_VMS + secret["uuid"]} for secret in secrets]
    entries = [_entry(number, secret) for number, secret in enumerate(given)]
    _refuse_twice("UUID", [entry.uuid for entry in entries])
    return entries


def _refuse_twice(what: str, keys: Sequence[Hashable]) -> None:
    seen: dict[Hashable, int] = {}
    for number, key in enumerate(keys):
        first = seen.setdefault(key, number)
        if first != number:
            raise _bad(number, f"it has the {what} of secrets[{first}]; send each secret once")


def _entry(number: int, given: Mapping[str, Any]) -> Entry:
    usage_type, usage_id = given["usageType"], given["usageID"]
    description = given.get("description") or ""
    if usage_type not in USAGES:
        raise _bad(number, f"usageType is none of {', '.join(USAGES)}")
    if not usage_id.startswith(OURS) or usage_id == OURS:
        raise _bad(number, f"usageID must be {OURS} and a name; others are not this agent's")
    if not usage_id.isprintable():
        raise _bad(number, "usageID has characters that cannot be printed")
    if any(_not_xml(description)):
        raise _bad(number, "description has characters that XML cannot carry")
    return Entry(
        uuid=given["uuid"],
        usage_type=usage_type,
        usage_id=usage_id,
        password=_password(number, given["password"]),
        description=description,
    )


def _password(number: int, password: Secret) -> Secret:
    """The same in its one canonical form.  Senders may have broken it into lines."""
    text = "".join(password.reveal().split())
    try:
        value = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):  # ValueError: not ASCII
        # The cause is left out, for its text is not ours to vouch for.
        raise _bad(number, "password is not base64") from None
    if not value:
        raise _bad(number, "password is empty")
    if len(value) > LARGEST:
        raise _bad(number, f"password is longer than {LARGEST} bytes")
    return Secret(base64.b64encode(value).decode("ascii"))


def _not_xml(text: str) -> Iterator[bool]:
    """Whether each character is outside of the production Char of XML 1.0, but a carriage return,
    which a parser would turn into a newline."""
    for character in text:
        code = ord(character)
        yield not (
            character in "\t\n"
            or 0x20 <= code <= 0xD7FF
            or 0xE000 <= code <= 0xFFFD
            or code >= 0x10000
        )


def _bad(number: int, reason: str) -> BadSecretRequest:
    return BadSecretRequest(parameter=f"secrets[{number}]", reason=reason)
