# SPDX-License-Identifier: GPL-2.0-or-later
from __future__ import annotations

import random
import threading

import pytest

from vdsm_storage.base.clock import SystemClock
from vdsm_storage.base.locks import Lock, Locks
from vdsm_storage.errors import ResourceTimeout


def test_shared_goes_with_shared_and_not_with_exclusive() -> None:
    locks = Locks(SystemClock())
    shared, exclusive = Lock("n", "a", exclusive=False), Lock("n", "a")
    two = locks.held([shared], 1), locks.held([shared], 1)
    wrong = pytest.raises(ResourceTimeout, match="n/a")
    with two[0], two[1], wrong, locks.held([exclusive], 0.05):
        pytest.fail("both held it")
    with locks.held([exclusive], 1), pytest.raises(ResourceTimeout), locks.held([shared], 0.05):
        pytest.fail("both held it")
    assert locks._states == {}  # nothing is kept for locks that nobody holds


def test_one_group_may_name_a_lock_twice() -> None:
    locks = Locks(SystemClock())
    shared, exclusive = Lock("n", "a", exclusive=False), Lock("n", "a")
    both = locks.held([shared, exclusive], 1)
    with both, pytest.raises(ResourceTimeout), locks.held([shared], 0.05):
        pytest.fail("not held exclusive")


def test_a_group_that_fails_gives_back_what_it_took() -> None:
    locks = Locks(SystemClock())
    with locks.held([Lock("n", "b")], 1):
        with pytest.raises(ResourceTimeout), locks.held([Lock("n", "a"), Lock("n", "b")], 0.05):
            pytest.fail("held")
        with locks.held([Lock("n", "a")], 0.05):
            pass


def test_random_groups_never_deadlock_nor_overlap() -> None:
    locks = Locks(SystemClock())
    holders: dict[str, int] = dict.fromkeys("abcd", 0)
    failures: list[str] = []

    def work(seed: int) -> None:
        rng = random.Random(seed)
        for _ in range(200):
            names = rng.sample("abcd", 3)
            with locks.held([Lock("n", name) for name in names], 30):
                for name in names:
                    holders[name] += 1
                    if holders[name] != 1:
                        failures.append(name)
                for name in names:
                    holders[name] -= 1

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    assert failures == []
