# SPDX-License-Identifier: GPL-2.0-or-later
"""Write packaging/rpm/agent.conf: every option of config.py, commented out, with its default.

    python scripts/example_config.py > packaging/rpm/agent.conf
"""

from __future__ import annotations

import dataclasses
import inspect
import sys
from collections.abc import Iterator

from vdsm_storage import config

HEAD = """\
# SPDX-License-Identifier: GPL-2.0-or-later
# Every option with its default.  Leave this file alone and put what you change into
# /etc/vdsm-storage/conf.d/NN-name.conf; the last value wins.
# `vdsm-storaged --show-config` prints the result.
"""


def example() -> Iterator[str]:
    yield HEAD
    defaults = config.Config()
    for section in dataclasses.fields(defaults):
        value = getattr(defaults, section.name)
        about = inspect.cleandoc(type(value).__doc__ or "")
        yield from (f"# {line}" for line in about.splitlines())
        yield f"[{section.name}]"
        yield from options(value)
        yield ""


def options(section: object) -> Iterator[str]:
    """The comments above each field, and the field as `#name = default`."""
    comments: list[str] = []
    names = {field.name for field in dataclasses.fields(section)}  # type: ignore[arg-type]
    for line in inspect.getsource(type(section)).splitlines():
        text = line.strip()
        name = text.partition(":")[0]
        if text.startswith("#"):
            comments.append(text)
        elif name in names:
            default = getattr(section, name)
            yield from comments
            shown = str(default).lower() if isinstance(default, bool) else default
            yield f"#{name} = {shown}".rstrip()
            comments = []


if __name__ == "__main__":
    sys.stdout.write("\n".join(example()))
