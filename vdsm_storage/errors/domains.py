# SPDX-License-Identifier: GPL-2.0-or-later
"""Of storage domains, the servers that they are on, and the pools that they are in."""

from __future__ import annotations

from vdsm_storage.errors.general import AgentError

# -- storage domains --------------------------------------------------------------------------


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
        "Storage domain {domain} is on no connected storage; connect its storage server first"
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
        "Storage domain {domain} is attached to pool {pool}; detach it before it is formatted"
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


# -- storage servers and mounts ---------------------------------------------------------------


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


# -- storage pools ----------------------------------------------------------------------------


class StoragePoolUnknown(AgentError):
    code = 309
    template = "Storage pool {pool} is not connected on this host; call StoragePool.connect"


class StoragePoolMasterNotFound(AgentError):
    code = 304
    template = "The master domain {domain} of pool {pool} cannot be used: {reason}"


class StoragePoolWrongMaster(AgentError):
    code = 324
    template = (
        "Storage domain {domain} is not the master of pool {pool} at version {version}: {reason}"
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
