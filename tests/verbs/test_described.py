# SPDX-License-Identifier: GPL-2.0-or-later
"""What the schema says of a built verb is true of its function."""

from __future__ import annotations

import ast
import inspect
import re
import textwrap
from pathlib import Path

import pytest

from vdsm_storage import errors
from vdsm_storage.schema.loader import Schema
from vdsm_storage.verbs.tables import VERBS

ROOT = Path(__file__).parents[2]
SCHEMA = Schema()


@pytest.mark.parametrize("name", sorted(VERBS))
def test_parameters_that_are_not_used_say_so(name: str) -> None:
    verb = VERBS[name]
    (function,) = ast.parse(textwrap.dedent(inspect.getsource(verb.function))).body
    used = {node.id for node in ast.walk(function) if isinstance(node, ast.Name)}
    used |= {verb.lane or ""}
    for param in SCHEMA.verb(name).params:
        said = re.search("[nN]ot used|nothing depends on it", param.description)
        assert said or param.name in used, f"{param.name}: {param.description}"


def test_every_error_of_a_built_verb_is_raised_somewhere() -> None:
    rooms = ("vdsm_storage/**", "verbs", "lvm", "secrets")
    files = [path for room in rooms for path in ROOT.glob(f"{room}/*.py")]
    code = "\n".join(path.read_text() for path in files if path.parent.name != "errors")
    words = set(re.findall(r"\w+", code))
    raised = {
        found.code
        for name, found in vars(errors).items()
        if name in words and isinstance(found, type) and issubclass(found, errors.AgentError)
    }
    table = SCHEMA.errors()
    for name in VERBS:
        never = [one for one in SCHEMA.verb(name).errors if table[one].code not in raised]
        assert never == [], name
