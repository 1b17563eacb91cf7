# SPDX-License-Identifier: GPL-2.0-or-later
"""Of host ids, leases and their index."""

from __future__ import annotations

from vdsm_storage.errors.general import AgentError


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
