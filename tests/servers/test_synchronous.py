"""Synchronous descents: shares that are added in order, and backup workers."""

from __future__ import annotations

from tests.servers.descents import SYNCHRONOUS, begin, kinds, lent, push, synchronous
from wagontrain.servers.descent import Apply, Course, Descent, Drop, Forget, Gate, Give, Keep, Note
from wagontrain.servers.messages import Lease


def test_shares_are_added_in_their_order() -> None:
    descent, given = begin(Course(12, 6, 1), SYNCHRONOUS, 3)
    step = {**given, **lent(descent.asked(0))}
    assert [one.shares for one in given.values()] == [1]  # who asks first is alone
    commands = descent.done(push(0, 1, step[0]))
    shares = lent(commands) | lent(descent.asked(0))
    assert sorted(one.share for one in shares.values()) == [0, 1, 2]
    for one in shares.values():
        assert (one.shares, one.start, one.stop, one.version, one.step) == (3, 6, 12, 1, 1)
    by_share = sorted(shares, key=lambda worker: shares[worker].share)
    for worker in reversed(by_share[1:]):
        assert descent.done(push(worker, 5, shares[worker])) == []
    (update, *_) = descent.done(push(by_share[0], 5, shares[by_share[0]]))
    assert update == Apply(2, tuple((worker, 5) for worker in by_share), 6, 0, 1, 0, 6, 2.0)


def test_a_lost_workers_share_goes_to_one_that_is_done() -> None:
    descent, shares = synchronous(3, Course(60, 6, 1))
    descent.asked(0)  # in advance: still at work on its share
    assert lent(descent.left(2)) == {}
    commands = descent.done(push(0, 2, shares[0]))
    again = lent(commands)[0]
    assert (again.share, again.start, again.version) == (shares[2].share, 6, 1)
    assert descent.done(push(1, 2, shares[1])) == []
    assert kinds(descent.done(push(0, 3, again))) == [Apply]


def test_what_a_lost_worker_has_done_counts() -> None:
    descent, shares = synchronous(2, Course(60, 6, 1))
    assert descent.done(push(1, 2, shares[1])) == []
    assert Forget(1) not in descent.left(1)  # shards have to keep it until the update
    assert kinds(descent.done(push(1, 2, shares[1]))) == []  # said again: not forgotten either
    commands = descent.done(push(0, 2, shares[0]))
    assert kinds(commands) == [Apply, Forget]
    assert sorted(commands[0].pushes) == [(0, 2), (1, 2)]  # type: ignore[union-attr]


def test_a_newcomer_counts_from_the_next_step() -> None:
    descent, shares = synchronous(2, Course(60, 6, 1))
    descent.joined(9)
    assert descent.asked(9) == []
    descent.done(push(0, 2, shares[0]))
    commands = descent.done(push(1, 2, shares[1]))
    assert [one.shares for one in lent(commands).values()] == [3]


def test_no_share_is_empty() -> None:
    descent, shares = begin(Course(10, 5, 1), SYNCHRONOUS, 4)
    commands = descent.done(push(0, 1, shares[0]))
    shares = lent(commands) | lent(descent.asked(0))
    # Five samples in four equal shares, rounded up, would be 2, 2, 1, 0.
    assert [one.shares for one in shares.values()] == [3, 3, 3]


def test_a_shard_that_forgot_has_the_shares_done_again() -> None:
    descent, shares = synchronous(2, Course(60, 6, 1))
    descent.done(push(1, 2, shares[1]))
    commands = descent.mislaid()
    assert Forget(1, (2,)) in commands
    again = lent(descent.asked(1))[1]
    assert (again.share, again.step) == (shares[1].share, 1)
    descent.done(push(0, 2, shares[0]))
    assert descent.version == 1
    assert kinds(descent.done(push(1, 3, again))) == [Apply]
    assert descent.mislaid() == []


# --------------------------------------------------------------------------- backup workers


def backups(workers: int, course: Course) -> tuple[Descent, dict[int, Lease]]:
    """A descent after its first update, with a piece for each worker.

    Who asks first is alone in the first step, and its piece a whole batch; the others' come late.
    """
    descent, given = begin(course, Gate("synchronous", backups=1), workers)
    assert kinds(descent.done(push(0, 1, given[0])))[0] == Apply
    pieces = lent(descent.asked(0))
    for worker in range(1, workers):
        assert kinds(descent.done(push(worker, 1, given[worker]))) == [Forget]
        pieces |= lent(descent.asked(worker))
    return descent, pieces


def test_an_update_does_not_wait_for_the_slowest() -> None:
    descent, pieces = backups(3, Course(80, 8, 1))
    # Two of three make a step.
    assert {worker: one.stop - one.start for worker, one in pieces.items()} == {0: 4, 1: 4, 2: 4}
    assert descent.done(push(1, 2, pieces[1])) == []
    assert descent.asked(1) == []  # what it began now would not count
    commands = descent.done(push(2, 2, pieces[2]))
    update = commands[0]
    assert isinstance(update, Apply)
    assert (update.samples, update.staleness) == (8, 0)
    assert [name[0] for name in update.pushes] == sorted(
        (1, 2), key=lambda worker: pieces[worker].start
    )
    again = lent(commands)[1]
    assert (again.start, again.version) == (pieces[0].start, 2)  # the late one's samples
    assert descent.asked(0) == []  # still at work on what does not count
    late = descent.done(push(0, 2, pieces[0]))
    assert late[0] == Forget(0, (2,))
    assert isinstance(late[1], Note)
    assert late[1].fields["reason"] == "it came too late"
    assert lent(late)[0].version == 2


def test_too_few_left_for_a_step_do_more_than_one_piece() -> None:
    descent, pieces = backups(4, Course(900, 9, 1))
    assert {one.stop - one.start for one in pieces.values()} == {3}
    descent.left(2)
    descent.left(3)
    assert descent.done(push(0, 2, pieces[0])) == []
    more = lent(descent.asked(0))[0]
    assert descent.done(push(0, 3, more)) == []
    assert kinds(descent.done(push(1, 2, pieces[1]))) == [Apply]


def test_the_last_step_of_an_epoch_is_what_is_left() -> None:
    descent, pieces = backups(3, Course(18, 8, 2))
    assert [(one.start, one.stop) for one in pieces.values()] == [(8, 12), (12, 16), (16, 18)]
    descent.done(push(0, 2, pieces[0]))
    descent.asked(0)
    again = lent(descent.done(push(1, 2, pieces[1])))[0]
    assert (again.start, again.stop) == (16, 18)  # one piece, though two would make a step
    assert descent.asked(1) == []
    commands = descent.done(push(0, 3, again))
    assert kinds(commands) == [Apply, Keep, Drop, Give]
    assert commands[0].samples == 2  # type: ignore[union-attr]
    assert lent(commands)[1].epoch == 1
