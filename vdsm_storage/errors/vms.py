# SPDX-License-Identifier: GPL-2.0-or-later
"""Of running VMs and of their secrets."""

from __future__ import annotations

from vdsm_storage.errors.general import AgentError

# -- running VMs ------------------------------------------------------------------------------


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


# -- secrets ----------------------------------------------------------------------------------


class BadSecretRequest(AgentError):
    code = 72
    template = "Nothing was done: {parameter}: {reason}"


class SecretRegistrationFailed(AgentError):
    code = 73
    template = "No secret was registered, those of before are kept: {reason}"


class SecretUnregistrationFailed(AgentError):
    code = 74
    template = "No secret was removed, those of before are kept: {reason}"
