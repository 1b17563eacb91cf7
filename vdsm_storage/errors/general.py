# SPDX-License-Identifier: GPL-2.0-or-later
"""The base of all errors, and those that have to do with no storage: requests, tasks, jobs."""

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


# -- general ----------------------------------------------------------------------------------


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


# -- tasks and jobs ---------------------------------------------------------------------------


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
