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
    template = "Volume {volume} is {role}; only a template (SHARED) can be the base of another image"


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


class ImageDoesNotExistInSD(AgentError):
    code = 268
    template = "No image {image} in domain {domain}"


class NoSpaceLeftOnDomain(AgentError):
    code = 397
    template = "Domain {domain} has no space for {size} bytes"


class MetadataOverflow(AgentError):
    code = 756
    template = "The metadata of volume {volume} takes {size} bytes, {limit} fit; shorten its description"


class MetadataCleared(AgentError):
    code = 757
    template = "The metadata of volume {volume} was cleared: it is partly deleted, delete it again"
