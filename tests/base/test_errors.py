# SPDX-License-Identifier: GPL-2.0-or-later
from __future__ import annotations

import errno
import inspect
import os
import string

import pytest

from vdsm_storage import errors

CLASSES = [
    found
    for found in vars(errors).values()
    if inspect.isclass(found) and issubclass(found, errors.AgentError)
]


@pytest.mark.parametrize("found", CLASSES, ids=lambda found: found.__name__)
def test_every_error_tells_its_facts(found: type[errors.AgentError]) -> None:
    names = [name for _, name, _, _ in string.Formatter().parse(found.template) if name]
    facts = {name: f"<{name}>" for name in names}
    error = found(**facts)
    assert isinstance(error.code, int)
    for name, value in facts.items():
        assert value in error.message
        assert getattr(error, name) == value


def test_what_the_storage_says_is_told_with_its_path() -> None:
    error = errors.agent_error(OSError(errno.EIO, os.strerror(errno.EIO), "/a/b"))
    assert error is not None
    assert error.code == 200
    assert "Input/output error (/a/b)" in error.message


def test_a_bug_is_no_agent_error() -> None:
    assert errors.agent_error(ZeroDivisionError()) is None
    with pytest.raises(AttributeError):
        _ = errors.ActionStopped().nothing
