# SPDX-License-Identifier: GPL-2.0-or-later
"""Runs test files in a guest and reports each of their tests here, under its own name.

The file is collected here as any other, so that it can be chosen, listed and shared out among
processes as any other.  When the first of its tests is due, one pytest starts in the guest with
all of them; its reports come back one by one and are given out as if the test had run here.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from functional.guests.ram import leave
from functional.lab.channel import Command
from functional.lab.errors import CommandTimeoutError, GuestGoneError, LabError
from functional.lab.guest import Guest, Settings, guest, say
from functional.lab.reporter import OPTION

MEMORY = 2048  # MiB
START = 120.0  # seconds that pytest itself may need in the guest
SLACK = 60.0  # seconds beyond a test's own time limit, which is kept in the guest
POLL = 0.1
PYTEST = (".venv/bin/python", "-m", "pytest", "-q", "-p", "no:cacheprovider")
# The other plugins take seconds to import under emulation and have nothing to do there.
PLUGINS = ("-p", "pytest_timeout", "-p", "functional.lab.reporter")
ENVIRONMENT = {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "TMPDIR": "/var/tmp", "COLUMNS": "100"}
_LIMIT = pytest.StashKey[float]()


@dataclass
class _Run:
    """One file's tests in the guest."""

    command: Command
    path: Path  # of the reports
    read: int = 0
    over: bool = False
    reports: dict[str, list[pytest.TestReport]] = field(default_factory=dict)

    @property
    def output(self) -> str:
        return self.command.output()


class Delegate:
    """Keeps the guest from one file to the next while all goes well."""

    def __init__(self, config: pytest.Config) -> None:
        self._config = config
        self._guests = contextlib.ExitStack()
        self._guest: Guest | None = None
        self._run: _Run | None = None
        self._tainted = False  # a test failed: the kernel is as it left it
        self._failed = ""  # why this file's tests cannot run any more

    def protocol(self, item: pytest.Item, keep: bool, last: bool) -> None:
        """The reports of one test.  `last` of its file; `keep` the guest for another file."""
        item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
        for report in self._reports(item):
            self._tainted = self._tainted or report.failed
            item.ihook.pytest_runtest_logreport(report=report)
        item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
        if last:
            self._end_file()
            if self._tainted or not keep:
                self.close()

    def close(self) -> None:
        self._guest = None
        self._tainted = False
        self._guests.close()

    def _reports(self, item: pytest.Item) -> Sequence[pytest.TestReport]:
        try:
            if self._run is None and not self._failed:
                self._start(_tests_of_file(item))
            if self._run is not None:
                return self._wait(item, self._run)
        except LabError as error:
            self._failed = f"{type(error).__name__}: {error}\n{self._said()}"
            self._run = None
            self.close()
        return [_failure(item, self._failed)]

    def _start(self, names: Sequence[str]) -> None:
        if self._guest is None:
            settings = Settings(memory=MEMORY, env=ENVIRONMENT)
            self._guest = self._guests.enter_context(guest(settings, say))
        path = self._guest.directory / "reports"
        path.unlink(missing_ok=True)
        argv = (*PYTEST, *PLUGINS, f"{OPTION}={path}", *names)
        tiny = leave(self._guest.directory / "tiny")
        self._run = _Run(self._guest.start(*argv, env=tiny), path)

    def _wait(self, item: pytest.Item, run: _Run) -> Sequence[pytest.TestReport]:
        """The reports of its phases, when all are there."""
        limit = item.stash[_LIMIT] + SLACK + (0 if run.read else START)
        end = time.monotonic() + limit
        while True:
            over = run.over = run.over or run.command.ended()
            self._read(run)
            reports = run.reports.get(item.nodeid, [])
            if any(report.when == "teardown" for report in reports):
                return run.reports.pop(item.nodeid)
            if over:
                code = run.command.wait(0).rc
                raise GuestGoneError(f"pytest in the guest ended with {code} before {item.nodeid}")
            if time.monotonic() > end:
                raise CommandTimeoutError(f"no report from the guest for {limit:.0f} s")
            time.sleep(POLL)

    def _read(self, run: _Run) -> None:
        """What the file has more than last time, in whole lines."""
        if not run.path.exists():
            return
        with run.path.open("rb") as file:
            file.seek(run.read)
            whole, newline, _ = file.read().rpartition(b"\n")
        run.read += len(whole) + len(newline)
        for line in whole.splitlines():
            report = self._config.hook.pytest_report_from_serializable(
                config=self._config, data=json.loads(line)
            )
            if isinstance(report.longrepr, list):  # place and reason of a skip; JSON has no tuples
                report.longrepr = tuple(report.longrepr)
            run.reports.setdefault(report.nodeid, []).append(report)

    def _end_file(self) -> None:
        """Its pytest is to end before the next one starts."""
        run, self._run, self._failed = self._run, None, ""
        if run is not None and not run.over:
            try:
                run.command.wait(START)
            except LabError as error:
                say(f"pytest in the guest did not end: {error}")
                self.close()

    def _said(self) -> str:
        parts = []
        if self._run is not None:
            parts.append(f"-- pytest in the guest\n{self._run.output[-4000:]}")
        if self._guest is not None:
            parts.append(f"-- console\n{self._guest.console()}")
            with contextlib.suppress(LabError):
                parts.append(f"-- processes\n{_processes(self._guest)}")
        return "\n".join(parts)


def hand_over(item: pytest.Item) -> None:
    """Its time limit is the guest's business: here it may have to wait for the guest first."""
    mark = item.get_closest_marker("timeout")
    limit = mark.args[0] if mark is not None and mark.args else item.config.getini("timeout")
    item.stash[_LIMIT] = float(limit or 300)
    item.add_marker(pytest.mark.timeout(0), append=False)


def _tests_of_file(item: pytest.Item) -> list[str]:
    return [other.nodeid for other in item.session.items if other.path == item.path]


def _processes(guest: Guest) -> str:
    """Where each waits in the kernel; without the kernel's own threads, unless they hang."""
    rows = guest.run("ps", "-eo", "pid,stat,wchan:24,args", timeout=30).out.splitlines()
    return "\n".join(row for row in rows if " [" not in row or " D" in row)


def _failure(item: pytest.Item, why: str) -> pytest.TestReport:
    return pytest.TestReport(
        item.nodeid, item.location, dict.fromkeys(item.keywords, 1), "failed", why, "setup"
    )
