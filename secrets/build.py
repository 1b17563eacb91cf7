# SPDX-License-Identifier: GPL-2.0-or-later
"""The registry of secrets with all that it is made of."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping

from vdsm_storage.base.locks import Locks
from vdsm_storage.config import Config
from vdsm_storage.secrets.key import KeySource
from vdsm_storage.secrets.libvirt_keyring import LibvirtKeyring
from vdsm_storage.secrets.registry import Registry
from vdsm_storage.secrets.sealing import SealProcess
from vdsm_storage.secrets.store import Forgetful, Store


def registry_of(
    config: Config, keyring: LibvirtKeyring, locks: Locks, boot: str,
    reach: Callable[[str], None], environment: Mapping[str, str],
) -> Registry:  # fmt: skip
    """`boot` is the id of the host's boot, after which secrets are gone."""
    path = os.path.join(config.paths.state, "secrets")
    key = KeySource(config.paths.secrets_key, environment.get("CREDENTIALS_DIRECTORY"))
    store = Store(path, key, SealProcess(), boot)
    return Registry(keyring, store if config.secrets.keep else Forgetful(path), locks, reach)
