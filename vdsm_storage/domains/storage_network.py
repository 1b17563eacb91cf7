# SPDX-License-Identifier: GPL-2.0-or-later
"""What LUNs are reached by, put together."""

from __future__ import annotations

from dataclasses import dataclass

from vdsm_storage.base.clock import Clock
from vdsm_storage.config import Lvm
from vdsm_storage.domains.candidates import Candidates
from vdsm_storage.host.device_mapper import DmInterface
from vdsm_storage.host.iscsi import Iscsi
from vdsm_storage.host.iscsi_records import Records
from vdsm_storage.host.iscsi_sessions import Sessions
from vdsm_storage.host.kernel_files import KernelFiles
from vdsm_storage.host.multipath import Multipath
from vdsm_storage.host.scsi import Scsi


@dataclass(frozen=True)
class StorageNetwork:
    scsi: Scsi
    multipath: Multipath
    sessions: Sessions
    iscsi: Iscsi
    candidates: Candidates


def storage_network(config: Lvm, clock: Clock, files: KernelFiles) -> StorageNetwork:
    """This host's."""
    multipath, sessions = Multipath(files, DmInterface()), Sessions(files)
    return StorageNetwork(
        scsi=Scsi(files),
        multipath=multipath,
        sessions=sessions,
        iscsi=Iscsi(files, sessions, Records(), clock, config.login_timeout),
        candidates=Candidates(multipath, config.devices),
    )
