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


class RecoveryInProgress(AgentError):
    code = 99
    template = "The agent is still recovering from a restart; try again in a few seconds"


class ResourceExhausted(AgentError):
    code = 1100
    template = "{resource} is full ({limit} waiting); try again later"
