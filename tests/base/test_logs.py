# SPDX-License-Identifier: GPL-2.0-or-later
"""The log file: format, order, rotation, secrets of no one, a full disk."""

from __future__ import annotations

import logging
import re
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from vdsm_storage.base import logs


@pytest.fixture
def path(tmp_path: Path) -> Iterator[Path]:
    """A log of its own; the root logger is put back."""
    root = logging.getLogger()
    before, level = list(root.handlers), root.level
    logs.setup(str(tmp_path / "agent.log"), "INFO", 2000, 2)
    yield tmp_path / "agent.log"
    for handler in root.handlers:
        handler.close()
    root.handlers[:] = before
    root.setLevel(level)


def alone() -> None:
    """Without pytest's own handlers: as it is in the agent."""
    root = logging.getLogger()
    root.handlers[:] = [one for one in root.handlers if isinstance(one, logs.RotatingLog)]


def test_a_quick_line_looks_like_a_record(path: Path) -> None:
    alone()
    log = logging.getLogger("some.name")
    token = logs.FLOW.set("flow-1")
    assert logs.line(log, logging.INFO, "%s -> %d", "verb", 0)
    log.info("%s -> %d", "verb", 0)
    logs.FLOW.reset(token)
    quick, record = path.read_text().splitlines()
    when = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3}"
    form = re.compile(when + r" INFO  \(MainThread\) \[some.name\] (.*)")
    for line in (quick, record):
        found = form.fullmatch(line)
        assert found is not None
        assert found[1] == "flow-1 verb -> 0"


def test_lines_wait_for_flush_or_a_record_and_keep_their_order(path: Path) -> None:
    alone()
    log = logging.getLogger("x")
    logs.line(log, logging.INFO, "one")
    assert path.read_text() == ""
    logs.flush()
    logs.line(log, logging.INFO, "two")
    log.info("three")
    assert [line.split()[-1] for line in path.read_text().splitlines()] == ["one", "two", "three"]


def test_rotation_keeps_so_many(path: Path) -> None:
    log = logging.getLogger("x")
    for number in range(200):
        log.info("line %04d", number)
    names = sorted(one.name for one in path.parent.iterdir())
    assert names == ["agent.log", "agent.log.1", "agent.log.2"]
    assert all(one.stat().st_size <= 2000 for one in path.parent.iterdir())
    assert path.read_text().endswith("line 0199\n")
    older = (path.parent / "agent.log.1").read_text()
    last, first = older.splitlines()[-1].split()[-1], path.read_text().splitlines()[0].split()[-1]
    assert int(first) == int(last) + 1


def test_a_second_start_appends(path: Path) -> None:
    logging.getLogger("x").info("first")
    logs.setup(str(path), "INFO", 2000, 2)
    logging.getLogger("x").info("second")
    assert len(path.read_text().splitlines()) == 2


def test_odd_texts_are_written(path: Path) -> None:
    alone()  # such a text cannot be sent between pytest's processes
    logging.getLogger("x").info("%s", "\udcff ä")
    assert "\\udcff ä" in path.read_text(encoding="utf-8")


def test_many_threads(path: Path) -> None:
    alone()
    logs.setup(str(path), "INFO", 10_000_000, 2)

    def work(name: str) -> None:
        for number in range(200):
            logging.getLogger("x").info("%s %d", name, number)

    threads = [threading.Thread(target=work, args=(name,)) for name in "abc"]
    for thread in threads:
        thread.start()
    for number in range(200):
        logs.line(logging.getLogger("x"), logging.INFO, "main %d", number)
    for thread in threads:
        thread.join()
    logs.flush()
    lines = path.read_text().splitlines()
    assert len(lines) == 800
    assert sum("(MainThread)" in line for line in lines) == 200


def test_a_full_disk_fails_nobody(path: Path) -> None:
    logs.setup("/dev/full", "INFO", 10_000_000, 2)
    alone()
    logs.line(logging.getLogger("x"), logging.INFO, "lost")
    logs.flush()
    logging.getLogger("x").info("lost")
    logs.setup(str(path), "INFO", 10_000_000, 2)
    logging.getLogger("x").info("kept")
    logs.flush()
    assert path.read_text().count("kept") == 1
    assert "lost" not in path.read_text()
