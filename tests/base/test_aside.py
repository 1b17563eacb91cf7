# SPDX-License-Identifier: GPL-2.0-or-later
"""Work that is done aside."""

from __future__ import annotations

import threading

import pytest

from vdsm_storage.base.aside import aside


def test_both_go_on_at_once_and_both_have_ended() -> None:
    begun, go_on = threading.Event(), threading.Event()
    ended = []

    def work() -> None:
        begun.set()
        assert go_on.wait(10)
        ended.append(True)

    with aside("test", work):
        assert begun.wait(10)
        go_on.set()
    assert ended


def test_errors_of_either_are_raised() -> None:
    def fail() -> None:
        raise OSError("work")

    with pytest.raises(OSError, match="work"), aside("test", fail):
        pass
    with pytest.raises(ValueError, match="block"), aside("test", fail):
        raise ValueError("block")


def test_it_has_ended_when_the_block_fails() -> None:
    go_on, ended = threading.Event(), []

    def work() -> None:
        assert go_on.wait(10)
        ended.append(True)

    threading.Timer(0.05, go_on.set).start()
    with pytest.raises(ValueError, match="block"), aside("test", work):
        raise ValueError("block")
    assert ended
