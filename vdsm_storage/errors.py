# SPDX-License-Identifier: GPL-2.0-or-later
"""Errors as they cross the wire: a numeric code, and a message that says what to do.

The numbers are the ones that engines know (an unknown number is shown as "unexpected error").
An error is a subclass of AgentError with `code` and `template`; the facts that the template names
are given by keyword and stay readable as attributes:

    raise VolumeDoesNotExist(volume=vol_id, image=img_id, domain=sd_id)
"""

from __future__ import annotations

from typing import ClassVar


class AgentError(Exception):
    """Base of every error that a verb may answer.  `code` is what the caller decides by."""

    code: ClassVar[int] = 100
    template: ClassVar[str] = "{reason}"

    def __init__(self, **facts: object) -> None:
        self.facts = facts
        super().__init__(self.template.format(**facts))

    def __getattr__(self, name: str) -> object:
        try:
            return self.__dict__["facts"][name]
        except KeyError:
            raise AttributeError(name) from None

    @property
    def message(self) -> str:
        return str(self)


# -- general ---------------------------------------------------------------------------------


class ParseError(AgentError):
    code = -32700
    template = "The request is not JSON: {reason}"


class InvalidRequest(AgentError):
    code = -32600
    template = "Not a JSON-RPC 2.0 request: {reason}"


class MethodNotFound(AgentError):
    code = -32601
    template = "No verb named {method}; GET /schema lists the verbs"


class InvalidParams(AgentError):
    code = -32602
    template = "{method}: parameter {parameter}: {reason}"


class InternalError(AgentError):
    code = -32603
    template = "Internal error: {reason}; the agent's log has the details (flow {flow_id})"


class NotImplementedVerb(AgentError):
    code = 44
    template = "{method} is not built yet; rpc.discover tells which verbs are (implemented)"


class AccessTimeout(AgentError):
    code = 3
    template = "{what} did not answer in {seconds} seconds; the storage behind it may hang"


class ActionStopped(AgentError):
    code = 443
    template = "The operation was stopped on request"


class CommandError(AgentError):
    code = 100
    template = "{program} failed ({status}): {stderr}"


class CommandTimeout(AgentError):
    code = 3
    template = "{program} did not end within {seconds} seconds and was killed: {stderr}"


class ResourceTimeout(AgentError):
    code = 851
    template = "Another operation holds {namespace}/{name}; waited {seconds} s; try again later"


class InvalidConfiguration(AgentError):
    code = 101
    template = "Configuration {source}: [{section}] {option}: {reason}"


class RecoveryInProgress(AgentError):
    code = 99
    template = "The agent is still recovering from a restart; try again in a few seconds"


class ResourceExhausted(AgentError):
    code = 1100
    template = "{resource} is full ({limit} waiting); try again later"


class StorageFailure(AgentError):
    code = 200
    template = "The storage failed: {reason} ({path}); look at it, then try again"


def agent_error(error: BaseException) -> AgentError | None:
    """What a caller is told of an exception: itself, or what the storage said.  None for a bug."""
    if isinstance(error, AgentError):
        return error
    if isinstance(error, OSError):
        return StorageFailure(reason=error.strerror or error, path=error.filename or "no path")
    return None


# -- tasks and jobs --------------------------------------------------------------------------


class TaskUnknown(AgentError):
    code = 401
    template = "No task {task}; it was never started here, or it was cleared"


class TaskNotFinished(AgentError):
    code = 403
    template = "Task {task} has not finished (it is {state}); stop it or wait"


class TaskAborted(AgentError):
    code = 411
    template = "Task {task} was stopped before it finished"


class TaskNotRevertible(AgentError):
    code = 410
    template = "Task {task} is {state} and cannot be reverted: {reason}"


class NoSuchJob(AgentError):
    code = 66
    template = "No job {job} on this host"


class JobExists(AgentError):
    code = 69
    template = "Job {job} exists already; give each job an id of its own"


class JobNotDone(AgentError):
    code = 68
    template = "Job {job} is {status}; abort it or wait before it is deleted"


class JobNotActive(AgentError):
    code = 84
    template = "Job {job} is {status} and cannot be aborted"


# -- volumes and images ----------------------------------------------------------------------


class InvalidParameter(AgentError):
    code = 1000
    template = "{parameter}: {reason} (it is {value})"


class VolumeDoesNotExist(AgentError):
    code = 201
    template = "No volume {volume} in image {image} of domain {domain}"


class IncorrectFormat(AgentError):
    code = 202
    template = "Volume {volume}: {reason}"


class VolumeIsBusy(AgentError):
    code = 203
    template = "Volume {volume} is in use ({reason}); try again when it is free"


class VolumeImageHasChildren(AgentError):
    code = 204
    template = "Volume {volume} has children ({children}); delete those first"


class VolumeCreationError(AgentError):
    code = 205
    template = "Volume {volume} could not be created: {reason}"


class VolumeExtendingError(AgentError):
    code = 206
    template = "Volume {volume} could not be extended to {size} bytes: {reason}"


class VolumeMetadataReadError(AgentError):
    code = 207
    template = "The metadata of volume {volume} cannot be used: {reason}"


class VolumeMetadataWriteError(AgentError):
    code = 208
    template = "The metadata of volume {volume} cannot be written: {reason}"


class VolumeAccessError(AgentError):
    code = 209
    template = "{path} cannot be used: {reason}"


class VolumeAlreadyExists(AgentError):
    code = 212
    template = "Volume {volume} exists already in image {image} of domain {domain}"


class VolumeNonWritable(AgentError):
    code = 213
    template = "Volume {volume} must not be changed: it is {role}"


class VolumeNonShareable(AgentError):
    code = 214
    template = "Volume {volume} is {role}; another image can be based on a template (SHARED) only"


class CannotShareVolume(AgentError):
    code = 218
    template = "Volume {volume} cannot become part of image {image}: {reason}"


class CannotDeleteSharedVolume(AgentError):
    code = 223
    template = "Volume {volume} is a template that images {images} use; delete those first"


class IllegalVolumeSnapshot(AgentError):
    code = 226
    template = "Volume {volume} is ILLEGAL and cannot be the base of another volume"


class PrepareIllegalVolume(AgentError):
    code = 227
    template = "Volume {volume} is ILLEGAL; use allowIllegal to prepare it all the same"


class CreateVolumeSizeError(AgentError):
    code = 229
    template = "Volume {volume}: a capacity of {size} bytes cannot be given to a volume"


class VolumeResizeValueError(AgentError):
    code = 232
    template = "Volume {volume} has {current} bytes; {size} would shrink it"


class ImagePathError(AgentError):
    code = 254
    template = "{path} is no image: {reason}"


class ImageIsNotLegalChain(AgentError):
    code = 262
    template = "The volumes of image {image} are no legal chain: {reason}"


class TemplateNotOnTarget(AgentError):
    code = 263
    template = "Image {image} is based on template {volume}; copy that to domain {domain} first"


class OverwriteImageError(AgentError):
    code = 265
    template = "Image {image} exists already in domain {domain}; delete it there first"


class ImageDoesNotExistInSD(AgentError):
    code = 268
    template = "No image {image} in domain {domain}"


class NoSpaceLeftOnDomain(AgentError):
    code = 397
    template = "Domain {domain} has no space for {size} bytes"


class TooManyVolumes(AgentError):
    code = 397
    template = (
        "Domain {domain} has {limit} volumes, as many as it has leases for: delete volumes or use"
        " another domain"
    )


class MetadataOverflow(AgentError):
    code = 756
    template = (
        "The metadata of volume {volume} has {size} bytes, {limit} fit; shorten its "
        "description"
    )


class MetadataCleared(AgentError):
    code = 757
    template = "The metadata of volume {volume} was cleared: it is partly deleted, delete it again"


# -- jobs on the data of volumes -------------------------------------------------------------


class DestinationVolumeTooSmall(AgentError):
    code = 79
    template = "Volume {volume} has {size} bytes, the source {needed}; extend it first"


class InvalidVolumeUpdate(AgentError):
    code = 235
    template = "Volume {volume} cannot be updated: {reason}"


class MergeSnapshotsError(AgentError):
    code = 252
    template = "Volume {top} could not be merged into {base}: {reason}"


class CopyImageError(AgentError):
    code = 261
    template = "The copy to volume {volume} failed: {reason}"


class ImageVerificationError(AgentError):
    code = 484
    template = "Volume {volume} must not be used: {reason}"


class GenerationMismatch(AgentError):
    code = 911
    template = (
        "Volume {volume} has generation {actual}, the request says {requested}: "
        "the job ran already, or was fenced"
    )


class VolumeIsNotInChain(AgentError):
    code = 920
    template = "Volume {volume} is not in the chain of image {image}: {chain}"


class WrongParentVolume(AgentError):
    code = 921
    template = "The parent of volume {top} is {parent}, not {base}"


class UnexpectedVolumeState(AgentError):
    code = 922
    template = "Volume {volume} is {actual}; this step needs {expected}"


class BitmapDoesNotExist(AgentError):
    code = 947
    template = "Volume {volume} has no bitmap {bitmap}"


class AddBitmapError(AgentError):
    code = 1620
    template = "Bitmap {bitmap} could not be added to volume {volume}: {reason}"


class MergeBitmapError(AgentError):
    code = 1621
    template = "Bitmap {bitmap} of volume {top} could not be merged into {base}: {reason}"


class RemoveBitmapError(AgentError):
    code = 1622
    template = "Bitmap {bitmap} could not be removed from volume {volume}: {reason}"


class UnsupportedOperation(AgentError):
    code = 2009
    template = "{operation} is not possible here: {reason}"


# -- secrets ---------------------------------------------------------------------------------


class BadSecretRequest(AgentError):
    code = 72
    template = "Nothing was done: {parameter}: {reason}"


class SecretRegistrationFailed(AgentError):
    code = 73
    template = "No secret was registered, those of before are kept: {reason}"


class SecretUnregistrationFailed(AgentError):
    code = 74
    template = "No secret was removed, those of before are kept: {reason}"


# -- storage domains -------------------------------------------------------------------------


class InvalidDomainMetadata(AgentError):
    code = 751
    template = "The metadata of domain {domain} is not valid: {reason}"


class MetadataSealBroken(AgentError):
    code = 752
    template = (
        "The metadata of domain {domain} does not match its checksum (computed {computed}, stored"
        " {stored}); restore it (dom_md/metadata, or the MDT_ tags of a block domain's volume"
        " group) or write it anew with the right checksum"
    )


class StorageDomainDoesNotExist(AgentError):
    code = 358
    template = (
        "Storage domain {domain} is on no connected storage; connect its storage server "
        "first"
    )


class StorageDomainAlreadyExists(AgentError):
    code = 365
    template = "Storage domain {domain} exists already at {path}; choose another UUID"


class StorageDomainNotEmpty(AgentError):
    code = 361
    template = (
        "{path} holds the storage domain {other} already; one domain a directory: format that one"
        " or use an empty directory"
    )


class StorageDomainNotMounted(AgentError):
    code = 360
    template = "{path} is not connected; call StoragePool.connectStorageServer with it first"


class StorageDomainBlockSizeMismatch(AgentError):
    code = 348
    template = (
        "{path} has sectors of {found} bytes and {asked} were asked for ({type} domains of version"
        " {version} take {supported}); use another block size or other storage"
    )


class StorageDomainPermission(AgentError):
    code = 385
    template = "{path} cannot be used by {user}: {reason}; change its owner or mode"


class StorageDomainUnsupportedTarget(AgentError):
    code = 399
    template = "{path} cannot hold a storage domain: {reason}"


class StorageDomainCreationError(AgentError):
    code = 351
    template = "Storage domain {domain} could not be made at {path}: {reason}"


class StorageDomainTypeError(AgentError):
    code = 372
    template = "Storage domains of the type {type} are not supported by this agent: {reason}"


class StorageDomainClassError(AgentError):
    code = 386
    template = "Storage domains of the class {klass} cannot be made any more; use a Data domain"


class UnsupportedDomainVersion(AgentError):
    code = 394
    template = "Domain format {version} is not supported here; use one of {supported}"


class VersionTooAdvanced(AgentError):
    code = 395
    template = "Domain {domain} has version {version} already, which is newer than {wanted}"


class StorageDomainDescriptionTooLong(AgentError):
    code = 387
    template = "The name {name!r} is longer than {limit} characters"


class InvalidName(AgentError):
    code = 1001
    template = "{what} {name!r} cannot be stored: {reason}"


class NoSpaceForDomain(AgentError):
    code = 397
    template = "No space is left on {path}: free some or enlarge the file system"


class StorageDomainAccessError(AgentError):
    code = 379
    template = "Storage domain {domain} cannot be read: {reason}"


class StorageDomainAlreadyAttached(AgentError):
    code = 380
    template = "Storage domain {domain} is attached to pool {pool}; detach it there first"


class StorageDomainNotInPool(AgentError):
    code = 353
    template = "Storage domain {domain} is not in pool {pool}"


class StorageDomainActive(AgentError):
    code = 382
    template = "Storage domain {domain} is active in pool {pool}; deactivate it first"


class CannotDetachMaster(AgentError):
    code = 383
    template = "Storage domain {domain} is the master of pool {pool}; move the master role first"


class CannotFormatAttached(AgentError):
    code = 391
    template = (
        "Storage domain {domain} is attached to pool {pool}; detach it before it is "
        "formatted"
    )


class CannotFormatConnected(AgentError):
    code = 392
    template = "Storage domain {domain} is in use by the connected pool {pool}; deactivate it first"


class UnsupportedOnFileDomain(AgentError):
    code = 2009
    template = "{what} works on block domains; {domain} keeps its volumes in files: {remedy}"


class StorageDomainLayoutError(AgentError):
    code = 371
    template = "Storage domain {domain} is damaged: {reason}"


class FileStatsError(AgentError):
    code = 330
    template = "The files of domain {domain} cannot be listed: {reason}"


# -- storage servers and mounts --------------------------------------------------------------


class ConnectionInvalid(AgentError):
    code = 453
    template = "The storage connection {connection!r} cannot be used: {reason}"


class ConnectionTypeUnsupported(AgentError):
    code = 468
    template = "Storage of the type {type} is not built into this agent yet"


class ConnectionPermission(AgentError):
    code = 469
    template = "{path} cannot be used by {user}: {reason}; change its owner or mode"


class MountFailed(AgentError):
    code = 477
    template = "{spec} could not be mounted on {target}: {reason}"


class DisconnectionFailed(AgentError):
    code = 452
    template = "{connection} could not be disconnected: {reason}"


class IscsiLoginFailed(AgentError):
    code = 465
    template = "Login to target {target} at {portal} failed: {reason}"


class IscsiAuthFailed(AgentError):
    code = 476
    template = "{portal} refuses the login to {target}: check the CHAP user and password"


class IscsiDiscoveryFailed(AgentError):
    code = 475
    template = "Portal {portal} does not tell its targets: {reason}"


class IscsiInterfaceError(AgentError):
    code = 473
    template = "iSCSI interface {interface} could not be set up: {reason}"


class IscsiLogoutFailed(AgentError):
    code = 474
    template = "Logout from target {target} at {portal} failed: {reason}"


class MultipathSetupError(AgentError):
    code = 467
    template = "multipathd does not answer, so that no LUN gets its device: {reason}"


# -- storage pools ---------------------------------------------------------------------------


class StoragePoolUnknown(AgentError):
    code = 309
    template = "Storage pool {pool} is not connected on this host; call StoragePool.connect"


class StoragePoolMasterNotFound(AgentError):
    code = 304
    template = "The master domain {domain} of pool {pool} cannot be used: {reason}"


class StoragePoolWrongMaster(AgentError):
    code = 324
    template = (
        "Storage domain {domain} is not the master of pool {pool} at version {version}: "
        "{reason}"
    )


class CannotConnectMultiplePools(AgentError):
    code = 323
    template = "This host is connected to pool {connected}; disconnect it before pool {pool}"


class StoragePoolConnected(AgentError):
    code = 325
    template = "Storage pool {pool} is connected on this host; disconnect it first"


class HostIdMismatch(AgentError):
    code = 700
    template = "Pool {pool} is connected with host id {connected}, not {asked}; disconnect it first"


class IsSpm(AgentError):
    code = 656
    template = "This host is the storage pool manager of {pool}; call StoragePool.spmStop first"


class MailboxFull(AgentError):
    code = 1100
    template = (
        "Volume {volume} cannot be extended now: all {limit} messages of this host wait for the"
        " storage pool manager. See that one runs and can extend volumes, then try again"
    )


class ExtendNotAnswered(AgentError):
    code = 206
    template = (
        "No storage pool manager extended volume {volume} of domain {domain} to {size} bytes in"
        " {seconds} s ({reason}). See that one runs and that this host can write {mailbox}"
    )


class ExtendRefused(AgentError):
    code = 206
    template = (
        "The storage pool manager could not extend volume {volume} of domain {domain} to {size}"
        " bytes: its log has the reason, which mostly is that the domain is full"
    )


class NotABackupDomain(AgentError):
    code = 378
    template = "Storage domain {domain} is a data domain; only export domains keep copies of VMs"


class NotSpm(AgentError):
    code = 654
    template = "This host is not the storage pool manager of {pool}; ask the host that is"


class TaskInProgress(AgentError):
    code = 406
    template = "{count} tasks of pool {pool} still run; wait for them or stop them"


class StoragePoolDescriptionTooLong(AgentError):
    code = 327
    template = "The pool name {name!r} is longer than {limit} characters"


# -- image transfers -------------------------------------------------------------------------


class StreamFailed(AgentError):
    code = 250
    template = "The image stream of task {task} failed: {reason}"


class StreamTooLong(AgentError):
    code = 229
    template = "{length} bytes do not fit into volume {volume} of {capacity} bytes"


class ImageTicketsError(AgentError):
    code = 481
    template = "ovirt-imageio refused to {method} ticket {ticket}: {status} {reason}"


class ImageDaemonError(AgentError):
    code = 482
    template = "ovirt-imageio does not answer at {path} ({reason}); look at the service's log"


class ImageDaemonUnsupported(AgentError):
    code = 483
    template = "ovirt-imageio does not run on this host (no {path}); install and start it"


# -- leases ----------------------------------------------------------------------------------


class AcquireLockFailure(AgentError):
    code = 651
    template = "Lease {resource} of {lockspace} at {path}:{offset} cannot be acquired: {reason}"


class LeaseHeldElsewhere(AcquireLockFailure):
    template = (
        "Lease {resource} of {lockspace} at {path}:{offset} is held by another host or operation"
        " ({reason}); try again when it has ended"
    )


class SpmStatusError(AgentError):
    code = 654
    template = (
        "The metadata of domain {domain} is locked by {owner}; waited {seconds} s."
        " Try again, or send the request to that host"
    )


class ReleaseLockFailure(AgentError):
    code = 660
    template = (
        "Lease {resource} of {lockspace} at {path}:{offset} cannot be released: {reason};"
        " sanlock takes it back when this agent ends"
    )


class AcquireHostIdFailure(AgentError):
    code = 661
    template = "Host id {host_id} of domain {domain} ({path}) cannot be acquired: {reason}"


class HostIdConflict(AgentError):
    code = 700
    template = (
        "Domain {domain} is used with host id {held}, not {asked}; disconnect the pool and"
        " connect it with the new id"
    )


class ReleaseHostIdFailure(AgentError):
    code = 662
    template = "Host id {host_id} of domain {domain} ({path}) cannot be released: {reason}"


class ClusterLockInitError(AgentError):
    code = 701
    template = "{what} of {lockspace} cannot be written at {path}:{offset}: {reason}"


class SanlockLVBError(AgentError):
    code = 703
    template = "The data of lease {resource} of {lockspace} at {path}:{offset}: {reason}"


class SanlockInquireError(AgentError):
    code = 704
    template = "Who holds {resource} of {lockspace} at {path}:{offset} cannot be told: {reason}"


class SanlockDaemonError(AgentError):
    code = 701
    template = "sanlock in {directory} does not serve: {reason}; see {directory}/sanlock.log"


class NoSuchLease(AgentError):
    code = 936
    template = "No lease {lease} on domain {domain}; Lease.create makes one"


class LeaseExists(AgentError):
    code = 100
    template = "Lease {lease} exists already on domain {domain}; use it, or delete it first"


class LeasesIndexUnusable(AgentError):
    code = 749
    template = (
        "The index of external leases of domain {domain} ({path}) cannot be used: {reason};"
        " run Lease.rebuild_leases"
    )


class LeasesIndexFull(AgentError):
    code = 397
    template = "Domain {domain} has room for {limit} external leases and all are taken: delete some"


class LeasesUnsupported(AgentError):
    code = 350
    template = "Domain {domain} has no external leases: {reason}"


class JobStatusMismatch(AgentError):
    code = 912
    template = "Lease {lease} of job {job} is {status}, not {expected}; read Lease.status again"


# -- volume groups and devices ---------------------------------------------------------------


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


# -- running VMs -----------------------------------------------------------------------------


class LibvirtUnavailable(AgentError):
    code = 59
    template = "libvirt ({uri}) cannot be reached: {reason}; the agent connects again, try again"


class LibvirtLost(LibvirtUnavailable):
    """In the middle of a call: what was asked for may have been done."""


class LibvirtTimeout(AgentError):
    code = 59
    template = "libvirt did not answer {call} in {seconds} seconds; try again later"


class LibvirtFailure(AgentError):
    code = 100
    template = "libvirt: {call} failed: {reason}"


class NoSuchVM(AgentError):
    code = 1
    template = "No VM {vm} on this host"


class VMIsDown(AgentError):
    code = 6
    template = "VM {vm} does not run"


class VMExists(AgentError):
    code = 4
    template = "VM {vm} runs here already, or is being started; end it with VM.destroy first"


class NoConnectionToPeer(AgentError):
    code = 10
    template = "The agent of host {peer} cannot be asked for {verb}: {reason}"


class MigrationError(AgentError):
    code = 12
    template = "VM {vm} was not moved: {reason}"


class MigrationCancelationFailed(AgentError):
    code = 47
    template = "The migration of VM {vm} could not be stopped: {reason}"


class MigrationInProgress(AgentError):
    code = 51
    template = "VM {vm} is moving to host {peer} already; VM.migrateCancel stops that"


class MigrationNotInProgress(AgentError):
    code = 81
    template = "VM {vm} is not being moved to another host, nor was it since the agent started"


class MigrationLimitExceeded(AgentError):
    code = 82
    template = "VM {vm} cannot come yet: {count} others are arriving, and {limit} may at a time"


class PeerRefused(AgentError):
    """`number` is the error code that the other agent answered."""

    code = 12
    template = "The agent of host {peer} answered {verb} with error {number}: {reason}"


class CannotCreateVM(AgentError):
    code = 9
    template = "VM {vm} was not started: {reason}"


class ImageFileNotFound(AgentError):
    code = 13
    template = "VM {vm} has no such disk ({disk})"


class NonResponsiveGuestAgent(AgentError):
    code = 19
    template = "The guest agent of VM {vm} does not answer: {reason}"


class SnapshotFailed(AgentError):
    code = 48
    template = "VM {vm} was not snapshotted: {reason}"


class UnsupportedDriveType(AgentError):
    code = 36
    template = "VM {vm}: {operation} is not possible for disk {disk}: {reason}"


class ChangeDiskFailed(AgentError):
    code = 41
    template = "The medium of VM {vm} was not changed: {reason}"


class HotplugDiskFailed(AgentError):
    code = 45
    template = "No disk was added to VM {vm}: {reason}"


class HotunplugDiskFailed(AgentError):
    code = 46
    template = "No disk was taken from VM {vm}: {reason}"


class UpdateDeviceFailed(AgentError):
    code = 56
    template = "The device of VM {vm} was not changed: {reason}"


class BadDiskResizeParameter(AgentError):
    code = 58
    template = "Disk {disk} of VM {vm} was not resized to {size} bytes: {reason}"


class UpdateVMPolicyFailed(AgentError):
    code = 63
    template = "The policy of VM {vm} was not changed: {reason}"


class UpdateIOTuneError(AgentError):
    code = 64
    template = "The limits of VM {vm} were not changed: {reason}"


class HotplugLeaseFailed(AgentError):
    code = 86
    template = "VM {vm} was not given lease {lease}: {reason}"


class HotunplugLeaseFailed(AgentError):
    code = 87
    template = "Lease {lease} was not taken from VM {vm}: {reason}"


class CannotPrepareImage(AgentError):
    code = 1630
    template = "Volume {volume} of image {image} cannot be used on this host: {reason}"


class CannotRefreshDisk(AgentError):
    code = 1650
    template = "Disk {disk} of VM {vm} was not refreshed: {reason}"


class DiskRefreshNotSupported(AgentError):
    code = 1651
    template = "Disk {disk} of VM {vm} cannot be refreshed: {reason}"


class VMDestroyFailed(AgentError):
    code = 42
    template = "VM {vm} could not be ended: {reason}"


class ResetFailed(AgentError):
    code = 90
    template = "VM {vm} could not be reset: {reason}"


class MergeFailed(AgentError):
    code = 52
    template = "Volume {top} was not merged into {base}: {reason}"


class ReplicaError(AgentError):
    code = 55
    template = "Disk {disk} of VM {vm} is not replicated: {reason}"


class ReplicationNotInProgress(AgentError):
    code = 88
    template = "Disk {disk} of VM {vm} is not being replicated"


class ResourceUnavailable(AgentError):
    code = 40
    template = "Disk {disk} of VM {vm} cannot leave its volume yet: {reason}; ask again"


class UnsupportedGuestOperation(AgentError):
    code = 75
    template = "VM {vm} cannot {operation}: {reason}"


class FreezeGuestFSFailed(AgentError):
    code = 76
    template = "The file systems of VM {vm} were not frozen: {reason}"


class ThawGuestFSFailed(AgentError):
    code = 77
    template = "The file systems of VM {vm} were not thawed: {reason}; it is tried again"


class ValueOutOfRange(AgentError):
    code = 91
    template = "{parameter}: {reason} (it is {value})"
