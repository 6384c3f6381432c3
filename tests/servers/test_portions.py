"""Portions of a batch: for whoever is free, late ones twice."""

from __future__ import annotations

import pytest

from wagontrain.servers.leases import Work
from wagontrain.servers.portions import Asker, Pool, Push


def asker(worker: int, busy: bool = False, ready: int = 4, others: int = 3) -> Asker:
    return Asker(worker, busy, ready, others, lambda work: True)


def test_equal_workers_send_their_last_portion_by_itself() -> None:
    pool = Pool(range(100, 180), 40)
    alone = []
    for number in range(40):
        pool.asked()
        portion = pool.choose(asker(number % 4, busy=True))
        assert portion is not None
        assert portion.work == Work(100 + 2 * number, 102 + 2 * number)
        alone.append(portion.alone)
    assert alone == [False] * 36 + [True] * 4


def test_a_slow_worker_sends_its_last_portion_by_itself_too() -> None:
    """Worker 3 comes back when each of the others has had four."""
    pool = Pool(range(39), 39)
    alone: dict[int, list[bool]] = {0: [], 1: [], 2: [], 3: []}
    turns = 0
    while pool.fresh:
        for worker in (0, 1, 2, 3):
            if worker == 3 and turns % 4:
                continue
            pool.asked()
            if portion := pool.choose(asker(worker, busy=True)):
                alone[worker].append(portion.alone)
        turns += 1
    assert alone[3] == [False, False, True]
    assert [len(each) for each in alone.values()] == [12, 12, 12, 3]
    assert all(each[-1] and not any(each[:-2]) for each in alone.values())


def test_what_is_late_is_given_twice_and_to_nobody_who_has_it() -> None:
    pool = Pool(range(8), 8)
    pool.asked()
    slow = pool.choose(asker(3))
    assert slow is not None
    for number in range(7):
        pool.asked()
        assert pool.choose(asker(number % 3, busy=True)) is not None
    pool.asked()
    assert pool.choose(asker(0, busy=True)) is None  # it has yet to bring what it has
    copy = pool.choose(asker(0))
    assert copy is not None
    assert (copy.work, copy.copy, copy.alone) == (slow.work, True, True)
    late = pool.choose(asker(1))
    assert late is None or late.work != slow.work  # twice is enough
    assert pool.choose(asker(3)) is None or pool.copies > 1


def test_what_was_just_given_is_not_given_twice_while_others_work() -> None:
    pool = Pool(range(4), 4)
    for worker in range(4):
        pool.asked()
        assert pool.choose(asker(worker)) is not None
    assert pool.accept(Push((0, 1), frozenset({0}), 1.0, 1.0)) == []
    pool.asked()
    assert pool.choose(asker(0, others=3)) is None
    assert pool.choose(asker(0, others=1)) is not None  # the last one may be lost


def test_nothing_is_given_twice_where_that_is_not_wanted() -> None:
    pool = Pool(range(2), 2, twice=False)
    for worker in range(2):
        pool.asked()
        assert pool.choose(asker(worker)) is not None
    assert pool.choose(asker(2, others=1)) is None


@pytest.mark.parametrize(
    ("pushes", "counting"),
    [
        ([(1, {0, 1}), (2, {2, 3})], {1, 2}),
        ([(1, {0}), (2, {0})], {1}),
        ([(1, {0}), (2, {0, 1, 2}), (3, {3})], {2, 3}),
        ([(1, {0}), (2, {1}), (3, {0, 1})], {1, 2}),
        ([(1, {0, 1}), (2, {1, 2})], {1}),
        ([(1, {0}), (2, {1}), (3, {0, 1, 2})], {3}),
    ],
    ids=str,
)
def test_what_comes_first_counts(pushes: list[tuple[int, set[int]]], counting: set[int]) -> None:
    pool = Pool(range(4), 4)
    for worker, portions in pushes:
        pool.accept(Push((worker, 1), frozenset(portions), 1.0, float(worker)))
    assert {worker for worker, _ in pool.pushes} == counting
    covered = [start for push in pool.pushes.values() for start in push.portions]
    assert len(covered) == len(set(covered))
    assert pool.missing == set(range(4)) - set(covered)
