# SPDX-License-Identifier: GPL-2.0-or-later
"""A plugin of the pytest that runs in the guest: each report as a line of a file (delegate.py)."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

OPTION = "--lab-reports"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(OPTION, type=Path, metavar="FILE")


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(_Reporter(config))


class _Reporter:
    def __init__(self, config: pytest.Config) -> None:
        self._config = config
        self._path: Path = config.getoption(OPTION)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        hook = self._config.hook
        data = hook.pytest_report_to_serializable(config=self._config, report=report)
        with self._path.open("a") as file:
            file.write(json.dumps(data, default=str) + "\n")
