# SPDX-License-Identifier: GPL-2.0-or-later
"""Task.*: what became of the operations that answered with a task's id."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from vdsm_storage.verbs.context import Context
from vdsm_storage.verbs.table import Verb


def get_status(ctx: Context, taskID: str) -> dict[str, Any]:
    return ctx.services.tasks.status(taskID)


def get_info(ctx: Context, taskID: str) -> dict[str, Any]:
    return ctx.services.tasks.info(taskID)


def stop(ctx: Context, taskID: str) -> None:
    """Also for jobs, which have no verb of their own for it."""
    if ctx.services.jobs.has(taskID):
        ctx.services.jobs.abort(taskID)
    else:
        ctx.services.tasks.stop(taskID)


def clear(ctx: Context, taskID: str) -> None:
    ctx.services.tasks.clear(taskID)


def revert(ctx: Context, taskID: str) -> None:
    ctx.services.tasks.revert(taskID)


VERBS: Final[Mapping[str, Verb]] = {
    "Task.clear": Verb(clear, lane=":host"),
    "Task.getInfo": Verb(get_info),
    "Task.getStatus": Verb(get_status),
    "Task.revert": Verb(revert, lane=":revert"),
    "Task.stop": Verb(stop, lane=":host"),
}
