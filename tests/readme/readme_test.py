# SPDX-License-Identifier: GPL-2.0-or-later
"""The README's console sessions, typed into a shell: each command answers what the README shows.

    UPDATE_README=1 pytest tests/readme     # writes the real answers into the README
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from vdsm_storage.schema.loader import Schema
from vdsm_storage.verbs.tables import BUILT

README = Path(__file__).resolve().parents[2] / "README.md"
BIN = Path(sys.executable).parent
SESSION = re.compile(r"(?s)```console\n(.*?)```\n")
NOBODY = "00000000-0000-0000-0000-000000000000"
HERE = "/root/vdsm-storage"  # the directory that the README's user stands in

AGAIN = "UPDATE_README=1 .venv/bin/pytest tests/readme   # and look at the difference"
VERBS_TABLE = re.compile(r"(?s)<!-- verbs -->\n(.*?)<!-- end of verbs -->")

needs_tools = pytest.mark.skipif(
    not (shutil.which("curl") and shutil.which("jq")), reason="needs curl and jq: make venv"
)


def commands(session: str) -> list[str]:
    """What is typed: the rows after `$ `, and on to the end of a quoted text; "" for an empty row.

    >>> commands("$ ls \\\\\\n      -l\\nfile\\n\\n$ pwd\\n/\\n")
    ['ls \\\\\\n      -l', '', 'pwd']
    """
    typed: list[str] = []
    for row in session.splitlines():
        if row.startswith("$ "):
            typed.append(row[2:])
        elif typed and (typed[-1].endswith("\\") or typed[-1].count("'") % 2):
            typed[-1] += "\n" + row
        elif not row:
            typed.append("")
    return typed


def play(typed: list[str], directory: Path) -> str:
    """The session as a terminal would show it."""
    script = ["exec 2>&1"]
    for command in typed:
        script += ["cat <<'SHOW'", f"$ {command}" if command else "", "SHOW", command]
    done = subprocess.run(
        ["bash", "-c", "\n".join(script)],
        cwd=directory, capture_output=True, text=True, timeout=120, check=False,
        env={**os.environ, "TMPDIR": str(directory)},
    )  # fmt: skip
    shown = done.stdout.replace(str(directory), HERE)
    return re.sub(r"/mnt/_[^/]*_\.dev_disks/", "/mnt/_root_vdsm-storage_.dev_disks/", shown)


def comparable(shown: str) -> str:
    """Without what differs from run to run: UUIDs, times, what the file system makes of a size."""
    uuid = rf"(?!{NOBODY})[0-9a-f]{{8}}(-[0-9a-f]{{4}}){{3}}-[0-9a-f]{{12}}"
    shown = re.sub(uuid, "<uuid>", shown)
    shown = re.sub(r'("ctime"|"truesize"): "\d+"', r"\1: <number>", shown)
    return re.sub(r"(disk size:) .*", r"\1", shown)


@pytest.fixture
def checkout(tmp_path: Path) -> Iterator[Path]:
    """A directory like the one that the reader stands in, with `make run` in another terminal."""
    (tmp_path / ".venv").mkdir()
    (tmp_path / ".venv" / "bin").symlink_to(BIN)
    argv = [str(BIN / "vdsm-storaged"), "--dev", ".dev"]
    agent = subprocess.Popen(argv, cwd=tmp_path, stdout=subprocess.PIPE, text=True)
    try:
        assert agent.stdout is not None
        assert agent.stdout.readline().startswith("ready ")
        yield tmp_path
    finally:
        agent.terminate()
        assert agent.wait(60) == 0


@needs_tools
def test_sessions_are_true(checkout: Path) -> None:
    text = README.read_text()
    found = SESSION.findall(text)
    assert found
    # One shell for all sessions: a later one uses what an earlier one made.
    typed = [command for session in found for command in [*commands(session), "# --"]]
    sessions = play(typed, checkout).split("$ # --\n")[:-1]
    if os.environ.get("UPDATE_README"):
        real = iter(sessions)
        README.write_text(SESSION.sub(lambda _: f"```console\n{next(real)}```\n", text))
        return
    for shown, real_one in zip(found, sessions, strict=True):
        assert comparable(real_one) == comparable(shown), AGAIN


def verbs_table() -> str:
    known: dict[str, int] = {}
    built: dict[str, int] = {}
    for verb in Schema().verbs():
        space = verb.name.partition(".")[0]
        known[space] = known.get(space, 0) + 1
        built[space] = built.get(space, 0) + (verb.name in BUILT)
    rows = [f"| {space} | {built[space]} | {known[space]} |" for space in known if built[space]]
    rest = sorted(space for space in known if not built[space])
    total = f"| **all** | **{sum(built.values())}** | **{sum(known.values())}** |"
    others = f"| {', '.join(rest)} | 0 | {sum(known[space] for space in rest)} |"
    head = ["| namespace | built | of |", "|---|---|---|"]
    return "\n".join([*head, *sorted(rows), others, total, ""])


def test_table_of_verbs_is_true() -> None:
    text = README.read_text()
    if os.environ.get("UPDATE_README"):
        table = f"<!-- verbs -->\n{verbs_table()}<!-- end of verbs -->"
        README.write_text(VERBS_TABLE.sub(lambda _: table, text))
        return
    assert VERBS_TABLE.findall(text) == [verbs_table()], AGAIN
