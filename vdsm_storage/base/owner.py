# SPDX-License-Identifier: GPL-2.0-or-later
"""Who owns what the agent makes on storage."""

from __future__ import annotations

import grp
import os
import pwd
from dataclasses import dataclass

from vdsm_storage.errors import InvalidConfiguration


@dataclass(frozen=True)
class Owner:
    """Numbers.  `apply*` do nothing where the process already makes its files with them."""

    uid: int
    gid: int

    def apply(self, path: str) -> None:
        """Give `path` to this owner; a symlink itself, not what it points to."""
        if not self.is_process():
            os.chown(path, self.uid, self.gid, follow_symlinks=False)

    def apply_fd(self, fd: int) -> None:
        if not self.is_process():
            os.fchown(fd, self.uid, self.gid)

    def is_process(self) -> bool:
        return (self.uid, self.gid) == (os.geteuid(), os.getegid())


def resolve(user: str, group: str) -> Owner:
    """Names or numbers.  Raises InvalidConfiguration for a name that this host does not know."""
    try:
        uid = int(user) if user.isdigit() else pwd.getpwnam(user).pw_uid
        gid = int(group) if group.isdigit() else grp.getgrnam(group).gr_gid
    except KeyError as error:
        raise InvalidConfiguration(
            source="storage", section="storage", option="user, group", reason=str(error)
        ) from error
    return Owner(uid, gid)
