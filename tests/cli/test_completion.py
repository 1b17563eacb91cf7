# SPDX-License-Identifier: GPL-2.0-or-later
"""Completion: the candidates, and the scripts in the shells they are for."""

from __future__ import annotations

import os
import pty
import select
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from vdsm_storage.cli import completion
from vdsm_storage.schema.loader import Schema

PROGRAM = Path(sys.executable).parent / "vdsm-client"
ENV = {**os.environ, "PATH": f"{PROGRAM.parent}:{os.environ['PATH']}"}
FORMATS = ["volFormat=COW", "volFormat=RAW"]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["Vol"], ["Volume"]),
        (["wa"], ["watch"]),
        (["Volume", "cr"], ["create"]),
        (["Volume", "getInfo", "v"], ["volumeID="]),
        (["--dev", "/tmp", "Volume", "getInfo", "volumeID=x", "v"], []),
        (["--dev", "=", "/tmp", "Volume", "cr"], ["create"]),
        (["Volume", "create", "volFormat="], FORMATS),
        (["Volume", "create", "volFormat", "="], FORMATS),
        (["Volume", "create", "volFormat", "=", "C"], FORMATS[:1]),
        (["Volume", "create", "volFormat", "=", "COW", "volu"], ["volumeID="]),
        (["Volume", "create", "desc=", "volu"], ["volumeID="]),
        (["Volume", "create", "legal=t"], ["legal=true"]),
        (["Volume", "create", "volumeID="], []),
        (["Volume", "create", "nothing="], []),
        (["tasks", ""], ["--follow"]),
        (["th"], ["thin"]),
        (["thin", ""], ["top", "plot"]),
        (["thin", "top", "--on"], ["--once"]),
        (["thin", "plot", "web", "vda", "--si"], ["--since"]),
        (["thin", "plot", "web", "vda", "-o", ""], []),
        (["thin", "top", "--interval", ""], []),
        (["Host", "ping", "--on"], []),
        (["--dev", ""], []),
        (["--ins"], ["--insecure"]),
        (["Nothing", ""], []),
        (["Volume", "nothing", ""], []),
    ],
)
def test_candidates(words: list[str], expected: list[str]) -> None:
    assert list(completion.candidates(Schema(), words)) == expected


@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        ("Volume extendSi", "extendSize"),
        ("Volume create volumeID = abc volF", "volFormat="),
        ("Volume create volFormat =", "COW RAW"),
        ("Volume create volFormat = R", "RAW"),
        ("Volume nothing x", ""),
    ],
)
def test_bash_completion(typed: str, expected: str) -> None:
    """The words are those that bash makes of the row: it breaks them at each `=`."""
    lines = (
        "source <(vdsm-client --completion bash)",
        f"COMP_WORDS=(vdsm-client {typed}); COMP_CWORD=$((${{#COMP_WORDS[@]}} - 1))",
        "_vdsm_client 2>/dev/null",
        'echo "${COMPREPLY[*]}"',
    )
    done = subprocess.run(
        ["bash", "-c", "\n".join(lines)],
        env=ENV, capture_output=True, text=True, timeout=60, check=True,
    )  # fmt: skip
    assert done.stdout == f"{expected}\n"


def press(argv: Sequence[str], env: dict[str, str], keys: str, wanted: str) -> str:
    """What a terminal shows after `keys`, at the latest when `wanted` is there."""
    pid, terminal = pty.fork()
    if pid == 0:
        os.execvpe(argv[0], list(argv), env)
    shown, end, typed = "", time.monotonic() + 30, False
    try:
        while wanted not in shown and time.monotonic() < end:
            if select.select([terminal], [], [], 0.2)[0]:
                shown += os.read(terminal, 4096).decode(errors="replace")
            if not typed and "READY" in shown:
                os.write(terminal, keys.encode())
                typed = True
        return shown
    finally:
        os.close(terminal)  # the shell hangs up
        os.waitpid(pid, 0)


def test_bash_on_a_terminal(tmp_path: Path) -> None:
    (tmp_path / "rc").write_text('source <(vdsm-client --completion bash)\nPS1="READY "\n')
    argv = ("bash", "--noprofile", "--rcfile", str(tmp_path / "rc"), "-i")
    keys = "vdsm-client Vol\tcrea\tvolF\tC\t"
    assert "volFormat=COW" in press(argv, {**ENV, "TERM": "dumb"}, keys, "volFormat=COW")


@pytest.mark.skipif(not shutil.which("zsh"), reason="needs zsh")
@pytest.mark.parametrize("how", ["found in fpath", "sourced"])
def test_zsh_on_a_terminal(how: str, tmp_path: Path) -> None:
    """The first press of the key completes, too, when the function is loaded by it."""
    script = subprocess.run(
        [PROGRAM, "--completion", "zsh"], capture_output=True, timeout=60, check=True
    ).stdout
    rows = [f"fpath=({tmp_path}/site $fpath)", "autoload -U compinit; compinit -u -D"]
    (tmp_path / "site").mkdir()
    if how == "sourced":
        rows.append("source <(vdsm-client --completion zsh)")
    else:
        (tmp_path / "site" / "_vdsm-client").write_bytes(script)
    (tmp_path / ".zshrc").write_text("\n".join([*rows, "PS1='READY '", ""]))
    env = {**ENV, "ZDOTDIR": str(tmp_path), "TERM": "dumb"}
    assert "extendSize" in press(("zsh", "-i"), env, "vdsm-client Volume extendS\t", "extendSize")
