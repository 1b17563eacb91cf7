# SPDX-License-Identifier: GPL-2.0-or-later
"""The records of open-iscsi: what to log in with, one small file each.

iscsiadm takes a value on its command line only, where every user of the host can read it.  So a
record is made by iscsiadm and then filled in here, passwords included: the files are root's alone
(mode 0600), and are replaced in one step, so that a reader sees an old or a new one.

    # BEGIN RECORD 2.1.8
    node.name = iqn.2020-01.org.example:t1
    node.session.auth.authmethod = None
    # END RECORD
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Mapping, Sequence
from typing import Final

from vdsm_storage.base.secret import Secret

# Distributions differ in where they keep them.
ROOTS: Final = ("/var/lib/iscsi", "/etc/iscsi")
_END: Final = "# END RECORD"

Values = Mapping[str, str | Secret]


class Records:
    def __init__(self, roots: Sequence[str] = ROOTS) -> None:
        self._roots = roots

    def find(self, *names: str) -> str | None:
        """The path of a record by its names below a root; None when there is none."""
        for root in self._roots:
            path = os.path.join(root, *names)
            if os.path.isfile(path):
                return path
        return None

    def update(self, path: str, values: Values) -> None:
        """Set values of a record.  Raises OSError."""
        with open(path, encoding="utf-8") as file:
            text = file.read()
        self.replace(path, changed(text, values))

    def replace(self, path: str, text: str) -> None:
        """Give a record another text.  Raises OSError."""
        # Not beside the record: iscsiadm takes every file there for one.
        root = next(root for root in self._roots if path.startswith(f"{root}/"))
        fd, new = tempfile.mkstemp(prefix=".vdsm-storage.", dir=root)
        try:
            with open(fd, "w", encoding="utf-8") as file:
                file.write(text)
            os.rename(new, path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(new)
            raise


def changed(text: str, values: Values) -> str:
    """A record's text with other values; what it has not is added at its end."""
    left = dict(values)
    lines: list[str] = []
    for line in text.splitlines():
        key = line.partition(" = ")[0]
        if line.startswith(_END):
            lines += [_line(name, value) for name, value in left.items()]
            left = {}
        lines.append(_line(key, left.pop(key)) if key in left else line)
    lines += [_line(name, value) for name, value in left.items()]
    return "\n".join(lines) + "\n"


def value_of(text: str, key: str) -> str:
    """A value of a record's text, "" when it has none."""
    for line in text.splitlines():
        name, equals, value = line.partition(" = ")
        if equals and name == key:
            return value.strip()
    return ""


def _line(key: str, value: str | Secret) -> str:
    return f"{key} = {value.reveal() if isinstance(value, Secret) else value}"
