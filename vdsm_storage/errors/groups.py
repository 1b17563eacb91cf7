# SPDX-License-Identifier: GPL-2.0-or-later
"""Of volume groups, and of LUNs and other devices."""

from __future__ import annotations

from vdsm_storage.errors.general import AgentError


class LvmCommandError(AgentError):
    """An lvm command failed; `reason` has lvm's own words."""

    code = 621
    template = "lvm {command} of volume group {vg} failed: {reason}"


class VolumeGroupCreateError(AgentError):
    code = 502
    template = "Volume group {vg} cannot be made on {devices}: {reason}"


class VolumeGroupExtendError(AgentError):
    code = 503
    template = "Volume group {vg} cannot get {devices}: {reason}"


class VolumeGroupSizeError(AgentError):
    code = 504
    template = "Volume group {vg} has {free} bytes free, {size} are needed: extend the domain"


class VolumeGroupAlreadyExists(AgentError):
    code = 505
    template = "There is a volume group {vg} already, on {devices}"


class VolumeGroupDoesNotExist(AgentError):
    code = 506
    template = (
        "There is no volume group {vg} on the devices of this host: connect its storage server"
    )


class VolumeGroupRemoveError(AgentError):
    code = 508
    template = "Volume group {vg} cannot be removed: {reason}"


class VolumeGroupScanError(AgentError):
    code = 513
    template = "Device {device} cannot be read: {reason}"


class VolumeGroupHasDomainTag(AgentError):
    code = 515
    template = "Volume group {vg} is a storage domain already: format that domain first"


class VolumeGroupBlockSizeError(AgentError):
    code = 517
    template = "Devices of one volume group have different sector sizes: {devices}"


class DeviceBlockSizeError(AgentError):
    code = 518
    template = (
        "Device {device} has sectors of {size} bytes; the format of block domains has only 512."
        " Give a LUN with sectors of 512 bytes"
    )


class VolumeGroupReduceError(AgentError):
    code = 519
    template = "Device {device} cannot be taken from volume group {vg}: {reason}"


class TooManyPVsInVG(AgentError):
    code = 389
    template = "Volume group {vg} would have {count} devices, its format holds {limit}"


class CannotCreateLogicalVolume(AgentError):
    code = 550
    template = "Logical volume {vg}/{lv} cannot be made: {reason}"


class CannotRemoveLogicalVolume(AgentError):
    code = 551
    template = "Logical volume {vg}/{lv} cannot be removed: {reason}"


class CannotDeactivateLogicalVolume(AgentError):
    code = 552
    template = "Logical volume {vg}/{lv} cannot be deactivated: {reason}"


class LogicalVolumeExtendError(AgentError):
    code = 554
    template = "Logical volume {vg}/{lv} cannot get {size} bytes: {reason}"


class LogicalVolumeRefreshError(AgentError):
    code = 556
    template = "Logical volume {vg}/{lv} cannot be refreshed: {reason}"


class CannotActivateLogicalVolume(AgentError):
    code = 558
    template = "Logical volume {vg}/{lv} cannot be activated: {reason}"


class LogicalVolumeAlreadyExists(AgentError):
    code = 604
    template = "There is a logical volume {vg}/{lv} already"


class LogicalVolumeDoesNotExist(AgentError):
    code = 610
    template = "There is no logical volume {vg}/{lv}"


class LogicalVolumeReplaceTagError(AgentError):
    code = 572
    template = "Tags of {vg}/{lv} cannot be changed: {reason}"


class PhysDevInitializationError(AgentError):
    code = 601
    template = "Device {device} cannot be made a physical volume: {reason}"


class InaccessiblePhysDev(AgentError):
    code = 606
    template = "Devices {devices} are not there: log in to their portals, or check the names"


class PartitionedPhysDev(AgentError):
    code = 607
    template = "Device {device} has partitions: use another one, or remove them"


class VgMetadataCriticallyFull(AgentError):
    code = 613
    template = "The metadata areas of volume group {vg} have only {free} of {size} bytes free"


class MissingTagOnLogicalVolume(AgentError):
    code = 609
    template = (
        "Logical volume {vg}/{lv} has no tag {tag}: it is no volume of a storage domain, or is"
        " damaged"
    )


class SmallVgMetadata(AgentError):
    code = 614
    template = "The metadata areas of volume group {vg} have only {size} bytes"


class CouldNotResizePhysicalVolume(AgentError):
    code = 615
    template = "Device {device} cannot be resized: {reason}"


class UnexpectedVolumeGroupMetadata(AgentError):
    code = 616
    template = "The metadata of volume group {vg} cannot be used: {reason}"


class ForbiddenPhysicalVolumeOperation(AgentError):
    code = 617
    template = "Device {device}: {reason}"


class CouldNotMovePVData(AgentError):
    code = 618
    template = "Data of {device} in volume group {vg} could not be moved: {reason}"


class NoSuchPhysicalVolume(AgentError):
    code = 619
    template = "Volume group {vg} has no device {device}; it has {devices}"


class NoSuchDestinationPhysicalVolumes(AgentError):
    code = 620
    template = "Volume group {vg} has no devices {missing} to move data to; it has {devices}"


class VolumesZeroingError(AgentError):
    code = 374
    template = "{device} cannot be zeroed or discarded: {reason}"


class MasterFsckError(AgentError):
    code = 367
    template = (
        "The master file system of domain {domain} ({device}) is damaged: {reason}. Repair it with"
        " fsck, or make another domain the master"
    )


class MasterMountError(AgentError):
    code = 368
    template = "The master file system of domain {domain} ({device}) cannot be used: {reason}"
