# SPDX-License-Identifier: GPL-2.0-or-later
"""The turn of who works on a volume group."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from vdsm_storage.lvm.turn import Turn

SOON = 10.0


def test_it_is_taken_again_by_its_holder_only() -> None:
    turn = Turn()
    assert turn.take()
    assert turn.take()
    with ThreadPoolExecutor(1) as other:
        with pytest.raises(TimeoutError):
            other.submit(turn.take, timeout=0.01).result(SOON)
        turn.release()
        with pytest.raises(TimeoutError):
            other.submit(turn.take, timeout=0.01).result(SOON)
        turn.release()
        assert other.submit(turn.take, timeout=0.01).result(SOON)
        with pytest.raises(TimeoutError):
            turn.take(timeout=0.01)


def test_who_needs_it_no_more_does_not_wait_for_others() -> None:
    turn, done, deal = Turn(), threading.Event(), threading.Event()
    turn.take()
    with ThreadPoolExecutor(6) as pool:
        needless = [pool.submit(turn.take, done.is_set, SOON) for _ in range(5)]
        keeps = pool.submit(lambda: turn.take(timeout=SOON) and deal.wait(SOON))
        done.set()
        turn.release()
        assert [each.result(SOON) for each in needless] == 5 * [False]
        assert not keeps.done()  # it has the turn all the while
        deal.set()
        assert keeps.result(SOON)


def test_needless_from_the_start() -> None:
    turn = Turn()
    assert not turn.take(lambda: True)
    assert turn.take(timeout=0)
