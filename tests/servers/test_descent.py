"""What is decided in plain situations; any order of events: test_interleavings."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tests.servers.fleet import Fleet
from wagontrain.errors import UsageError
from wagontrain.servers.descent import (
    Apply,
    Command,
    Course,
    Descent,
    Drop,
    Fail,
    Finish,
    Forget,
    Gate,
    Give,
    Keep,
    Note,
    Reached,
    Validated,
)
from wagontrain.servers.messages import Done, Lease, Measured, Spoiled

ASYNCHRONOUS = Gate("asynchronous")
SYNCHRONOUS = Gate("synchronous")


def lent(commands: list[Command]) -> dict[int, Lease]:
    """Worker -> the lease it is given."""
    return {one.worker: one.lease for one in commands if isinstance(one, Give)}


def kinds(commands: list[Command]) -> list[type[Command]]:
    return [type(one) for one in commands if not isinstance(one, Note)]


def begin(course: Course, gate: Gate, workers: int) -> tuple[Descent, dict[int, Lease]]:
    """A descent whose workers have all joined, then all asked."""
    descent = Descent(course, gate)
    for worker in range(workers):
        assert descent.joined(worker) == []
    given: dict[int, Lease] = {}
    for worker in range(workers):
        given |= lent(descent.asked(worker))
    return descent, given


def push(worker: int, sequence: int, *leases: Lease, **fields: Any) -> Done:
    count = sum((one.stop - one.start) // one.shares for one in leases)
    numbers = tuple(one.number for one in leases)
    known = {"fetched": leases[0].version, "weight": count, "samples": count, "loss": 2.0 * count}
    return Done(worker, sequence, numbers, **{**known, **fields})


def measured(worker: int, lease: Lease, mean: float = 1.0) -> Measured:
    count = float(lease.stop - lease.start)
    return Measured(worker, lease.number, count, {"loss": mean * count})


# ------------------------------------------------------------------------------- asynchronous


def test_each_push_is_an_update() -> None:
    descent, given = begin(Course(10, 4, 1), ASYNCHRONOUS, 2)
    assert [(one.start, one.stop, one.version) for one in given.values()] == [(0, 4, 0), (4, 8, 0)]
    assert descent.done(push(1, 1, given[1])) == [Apply(1, ((1, 1),), 4, 0, 1, 0, 4, 2.0)]
    assert descent.done(push(0, 1, given[0])) == [Apply(2, ((0, 1),), 4, 1, 0, 0, 4, 2.0)]
    last = lent(descent.asked(1))[1]
    assert (last.start, last.stop, last.step) == (8, 10, 2)
    assert descent.asked(0) == []
    assert descent.done(push(1, 2, last, fetched=2)) == [
        Apply(3, ((1, 2),), 2, 0, 2, 0, 2, 2.0),
        Keep(0, 0, 3, Reached(10), final=True),
        Drop(0),
        Finish(),
    ]
    assert descent.over
    assert descent.asked(0) == descent.left(1) == descent.done(push(1, 2, last)) == []
    assert descent.staleness()["histogram"] == {"0": 2, "1": 1}
    assert descent.workers()[1] == {
        "pushes": 2, "samples": 6, "seconds": 0.0, "samples_per_second": None, "dropped": 0,
    }  # fmt: skip


def test_the_next_epoch_begins_while_the_last_batch_is_out() -> None:
    descent, given = begin(Course(4, 4, 3), ASYNCHRONOUS, 2)
    assert [one.epoch for one in given.values()] == [0, 1]
    assert kinds(descent.done(push(1, 1, given[1]))) == [Apply]  # epoch 1, but 0 has not ended
    commands = descent.done(push(0, 1, given[0]))
    assert kinds(commands) == [Apply, Keep, Drop, Keep, Drop]
    keeps = [one for one in commands if isinstance(one, Keep)]
    assert [(one.epoch, one.version, one.final) for one in keeps] == [(0, 2, False), (1, 2, False)]


def test_a_lost_workers_leases_are_given_again_and_its_late_push_is_forgotten() -> None:
    descent, given = begin(Course(12, 4, 1), ASYNCHRONOUS, 2)
    more = lent(descent.asked(0))[0]  # in advance: it works on the first one
    assert descent.asked(1) == []
    commands = descent.left(0)
    fields = {"worker": 0, "leases": [given[0].number, more.number]}
    assert commands[:2] == [Note("lost", fields), Forget(0)]
    again = lent(commands)[1]
    assert again.number not in (given[0].number, more.number)
    assert (again.start, again.stop) == (0, 4)
    assert commands[-1] == Note(
        "again",
        {"worker": 1, "lease": again.number, "epoch": 0, "step": 0, "purpose": "train"},
    )
    late = descent.done(push(0, 1, given[0]))
    assert late[0] == Forget(0, (1,))
    assert kinds(late) == [Forget]
    assert kinds(descent.done(push(1, 1, again))) == [Apply]
    assert lent(descent.asked(1))[1].start == 8
    assert descent.workers()[0]["dropped"] == 1


def test_one_push_of_several_leases_is_one_update() -> None:
    descent, given = begin(Course(12, 4, 1), ASYNCHRONOUS, 1)
    more = lent(descent.asked(0))[0]
    (command,) = descent.done(push(0, 1, given[0], more))
    assert command == Apply(1, ((0, 1),), 8, 0, 0, 0, 8, 2.0)


def test_what_was_said_before_is_not_heard_twice() -> None:
    descent, given = begin(Course(12, 4, 1), ASYNCHRONOUS, 1)
    descent.done(push(0, 1, given[0]))
    assert kinds(descent.done(push(0, 1, given[0]))) == [Forget]
    lease = lent(descent.asked(0))[0]
    again = descent.done(push(0, 1, lease))  # the number of another push: it is not this one
    assert again[0] == Forget(0, (1,))
    lease = lent(descent.asked(0))[0]  # it may never say another number
    assert lease.start == 4
    assert kinds(descent.done(push(0, 2, lease))) == [Apply]
    assert descent.version == 2


def test_a_push_whose_name_was_used_by_another_is_done_again() -> None:
    descent, given = begin(Course(8, 4, 1), Gate("asynchronous"), 2)
    descent.done(push(0, 1, given[1]))  # not its own
    assert kinds(descent.done(push(0, 1, given[0]))) == [Forget]
    (again,) = lent(descent.asked(0)).values()
    assert (again.start, again.stop) == (given[0].start, given[0].stop)


def test_a_push_that_one_shard_refused_is_forgotten_by_the_others() -> None:
    descent, given = begin(Course(8, 4, 1), Gate("asynchronous"), 2)
    commands = descent.spoiled(Spoiled(0, given[0].number, "a gradient", sequence=1))
    assert commands[0] == Forget(0, (1,))
    assert kinds(descent.done(push(0, 1, given[0]))) == [Forget]  # said all the same


def test_an_accepted_push_is_not_forgotten_whoever_says_so() -> None:
    descent, given = synchronous(2, Course(8, 4, 1))
    assert descent.done(push(0, 2, given[0])) == []
    assert descent.spoiled(Spoiled(0, 10**6, "so it is said", sequence=2)) == []
    apply = descent.done(push(1, 1, given[1]))[0]
    assert isinstance(apply, Apply)
    assert sorted(apply.pushes) == [(0, 2), (1, 1)]


def test_a_push_for_somebody_elses_lease() -> None:
    descent, given = begin(Course(20, 4, 1), ASYNCHRONOUS, 2)
    assert kinds(descent.done(push(1, 1, given[0]))) == [Forget]
    both = descent.done(push(1, 2, given[0], given[1]))
    assert kinds(both) == [Forget]
    # What was its own in that push is lost with it, and so given again; worker 0 keeps its own.
    again = lent(descent.asked(1))[1]
    assert again.start == given[1].start
    assert kinds(descent.done(push(0, 1, given[0]))) == [Apply]


def test_a_push_taken_at_a_version_that_cannot_be() -> None:
    for fetched in (-1, 1):
        descent, given = begin(Course(20, 4, 1), ASYNCHRONOUS, 1)
        commands = descent.done(push(0, 1, given[0], fetched=fetched))
        assert commands[0] == Forget(0, (1,))
        assert lent(descent.asked(0))[0].start == 0


def test_a_silent_worker_costs_nothing_and_a_stranger_gets_nothing() -> None:
    descent = Descent(Course(4, 4, 1), SYNCHRONOUS)
    descent.joined(0)
    descent.joined(1)
    assert descent.asked(7) == descent.left(7) == []
    assert kinds(descent.done(Done(7, 1, (0,), 0, 4, 4, 1.0))) == [Forget]
    lease = lent(descent.asked(0))[0]
    assert lease.shares == 1
    assert kinds(descent.done(push(0, 1, lease))) == [Apply, Keep, Drop, Finish]


def test_asking_twice_is_asking_once() -> None:
    descent, given = begin(Course(4, 4, 1), ASYNCHRONOUS, 2)
    assert list(given) == [0]
    assert descent.asked(1) == []
    assert list(lent(descent.left(0))) == [1]
    assert descent.leases() == {"given": 2, "again": 1, "out": 1, "waiting": 0}


def test_one_worker_at_a_time_at_a_warm_start() -> None:
    descent, given = begin(Course(40, 4, 1), Gate("asynchronous", warm_start=2), 3)
    assert list(given) == [0]
    commands = descent.done(push(0, 1, given[0]))
    assert list(lent(commands)) == [1]  # it has waited longest
    assert descent.asked(0) == []
    commands = descent.done(push(1, 1, lent(commands)[1]))
    assert list(lent(commands)) == [2, 0]
    # Who is let in then has to know what was learned so far, whatever it fetched before.
    assert [one.version for one in lent(commands).values()] == [2, 2]


# ------------------------------------------------------------------------- stale-synchronous


def test_with_bound_nought_all_go_in_step() -> None:
    descent, given = begin(Course(24, 4, 1), Gate("stale-synchronous", bound=0), 2)
    assert list(given) == [0, 1]
    assert descent.asked(0) == []  # not in advance either: it would not know its own last push
    assert kinds(descent.done(push(0, 1, given[0]))) == [Apply]
    commands = descent.done(push(1, 1, given[1]))
    assert lent(commands)[0].version == 2
    assert lent(descent.asked(1))[1].version == 2


def test_a_newcomer_begins_at_the_slowest_ones_clock() -> None:
    descent, given = begin(Course(400, 4, 1), Gate("stale-synchronous", bound=1), 1)
    for sequence in range(1, 9):
        descent.done(push(0, sequence, given[0]))
        given |= lent(descent.asked(0))
    descent.joined(1)
    assert 1 in lent(descent.asked(1))
    descent.done(push(0, 9, given[0]))
    assert 0 in lent(descent.asked(0))  # it does not wait for eight rounds of the newcomer


# ------------------------------------------------------------------------------- synchronous


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


def synchronous(workers: int, course: Course) -> tuple[Descent, dict[int, Lease]]:
    """A descent in the second step, of which every worker has a share."""
    descent, given = begin(course, SYNCHRONOUS, workers)
    commands = descent.done(push(0, 1, given[0]))
    shares = lent(commands) | lent(descent.asked(0))
    assert len(shares) == workers
    return descent, shares


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


# --------------------------------------------------------------------------- what goes wrong


def test_a_spoiled_lease_goes_to_another_worker_once() -> None:
    descent, given = begin(Course(20, 4, 1), ASYNCHRONOUS, 2)
    commands = descent.spoiled(Spoiled(0, given[0].number, "loss is nan"))
    (note,) = commands
    assert isinstance(note, Note)
    assert note.fields["reason"] == "loss is nan"
    assert lent(descent.asked(0))[0].start == 8
    again = lent(descent.asked(1))[1]
    assert again.start == 0
    (failure,) = descent.spoiled(Spoiled(1, again.number, "loss is nan"))
    assert failure == Fail(
        "step 0, samples 0 to 3 of the order of epoch 0: loss is nan on worker 1, after worker 0 "
        "had failed on them, too; lower the learning rate or look at these samples"
    )
    assert descent.over
    assert descent.asked(0) == []


def test_a_lone_worker_tries_a_spoiled_lease_again_itself() -> None:
    descent, given = begin(Course(20, 4, 1), ASYNCHRONOUS, 1)
    descent.spoiled(Spoiled(0, given[0].number, "loss is inf"))
    again = lent(descent.asked(0))[0]
    assert again.start == 0
    assert kinds(descent.done(push(0, 1, again))) == [Apply]


def test_an_unfinite_loss_that_was_pushed_all_the_same() -> None:
    descent, given = begin(Course(20, 4, 1), ASYNCHRONOUS, 2)
    commands = descent.done(push(0, 1, given[0], loss=float("nan")))
    assert commands[0] == Forget(0, (1,))
    assert [one.kind for one in commands if isinstance(one, Note)] == ["dropped", "spoiled"]
    assert lent(descent.asked(1))[1].start == 0


def test_spoiled_for_a_lease_of_another_changes_nothing() -> None:
    descent, given = begin(Course(20, 4, 1), ASYNCHRONOUS, 2)
    assert descent.spoiled(Spoiled(1, given[0].number, "no")) == []
    assert kinds(descent.done(push(0, 1, given[0]))) == [Apply]


def test_everybody_waits_for_work_that_is_barred_to_the_slowest() -> None:
    descent, given = begin(Course(8, 4, 1), Gate("stale-synchronous", bound=0), 2)
    descent.joined(2)
    assert lent(descent.asked(2)) == {}
    commands = descent.spoiled(Spoiled(0, given[0].number, "loss is nan"))
    assert lent(commands)[2].start == 0
    assert descent.asked(0) == []
    descent.done(push(1, 1, given[1]))
    assert descent.asked(1) == []  # a round ahead of worker 0
    # Worker 0 has spoiled what is left, and worker 1 waits for worker 0.
    assert lent(descent.left(2))[0].start == 0


def test_weights_that_add_up_to_nothing() -> None:
    descent, given = begin(Course(20, 4, 1), ASYNCHRONOUS, 1)
    (failure,) = descent.done(push(0, 1, given[0], weight=0.0))
    assert isinstance(failure, Fail)
    assert "step 0 add up to 0: a mean over them does not exist" in failure.reason


# -------------------------------------------------------------- validation, limits, resuming


def test_validation_goes_first_and_nobody_is_stopped_for_it() -> None:
    descent, given = begin(
        Course(8, 4, 2, validation_samples=5, validation_batch=2), ASYNCHRONOUS, 2
    )
    descent.done(push(0, 1, given[0]))
    commands = descent.done(push(1, 1, given[1]))
    assert commands[1:] == [Keep(0, 0, 2, Reached(8))]
    pieces = lent(descent.asked(0)) | lent(descent.asked(1))
    assert [(one.start, one.stop) for one in pieces.values()] == [(0, 2), (2, 4)]
    for one in pieces.values():
        assert (one.purpose, one.snapshot, one.version) == ("validate", 0, 2)
    commands = descent.left(1)
    assert Forget(1) in commands
    assert descent.measured(measured(1, pieces[1])) == []  # too late
    assert descent.measured(measured(0, pieces[0], 1.0)) == []
    again = lent(descent.asked(0))[0]
    assert (again.start, again.stop) == (2, 4)
    last = lent(descent.asked(0))[0]
    assert (last.start, last.stop) == (4, 5)
    training = lent(descent.asked(0))[0]
    assert training.purpose == "train"
    assert descent.measured(measured(0, last, 7.0)) == []
    assert descent.measured(measured(0, again, 4.0)) == [
        Validated(0, 0, {"loss": (2 * 1.0 + 1 * 7.0 + 2 * 4.0) / 5}, 5.0),
        Drop(0),
    ]
    assert descent.measured(measured(0, again, 4.0)) == []  # once is enough


def test_figures_of_another_kind_are_not_mixed() -> None:
    descent, given = begin(
        Course(4, 4, 1, validation_samples=2, validation_batch=1), ASYNCHRONOUS, 1
    )
    descent.done(push(0, 1, given[0]))
    one = lent(descent.asked(0))[0]
    descent.measured(measured(0, one))
    two = lent(descent.asked(0))[0]
    (note, *_) = descent.measured(Measured(0, two.number, 1.0, {"accuracy": 1.0}))
    assert isinstance(note, Note)
    assert note.kind == "spoiled"
    again = lent(descent.asked(0))[0]
    assert kinds(descent.measured(measured(0, again))) == [Validated, Drop, Finish]


def test_validation_without_weight_has_no_means() -> None:
    descent, given = begin(Course(4, 4, 1, validation_samples=2), ASYNCHRONOUS, 1)
    descent.done(push(0, 1, given[0]))
    for _ in range(2):
        lease = lent(descent.asked(0))[0]
        commands = descent.measured(Measured(0, lease.number, 0.0, {"loss": 0.0}))
    assert commands[0] == Validated(0, 0, {}, 0.0)


def test_a_limit_on_steps_ends_in_the_middle_of_an_epoch() -> None:
    course = Course(100, 4, 2, steps=3, validation_samples=3, validation_batch=8)
    descent, given = begin(course, ASYNCHRONOUS, 5)
    assert list(given) == [0, 1, 2]
    for worker in range(2):
        assert kinds(descent.done(push(worker, 1, given[worker]))) == [Apply]
    commands = descent.done(push(2, 1, given[2]))
    assert kinds(commands) == [Apply, Keep, Give]
    assert commands[1] == Keep(0, 0, 3, Reached(12), final=True)
    lease = lent(commands)[3]
    assert lease.purpose == "validate"
    assert kinds(descent.measured(measured(3, lease))) == [Validated, Drop, Finish]


def test_going_on_after_a_number_of_steps() -> None:
    course = Course(10, 4, 2, first_step=4)
    descent, given = begin(course, ASYNCHRONOUS, 1)
    assert (given[0].epoch, given[0].start, given[0].stop, given[0].step) == (1, 4, 8, 4)
    assert descent.done(push(0, 1, given[0], fetched=4))[0] == Apply(
        5, ((0, 1),), 4, 0, 4, 1, 4, 2.0
    )


def test_going_on_from_a_snapshot_that_others_had_overtaken() -> None:
    descent, given = begin(Course(12, 4, 2), ASYNCHRONOUS, 4)
    for worker in (3, 0, 2):
        descent.done(push(worker, 1, given[worker]))
    (keep,) = descent.keep()
    # Batch 1 of epoch 0 is missing, batch 0 of epoch 1 is there.
    assert keep == Keep(0, 0, 3, Reached(16, ((4, 8),)))
    resumed = Descent(Course(12, 4, 2, first_step=3), ASYNCHRONOUS, keep.reached)  # type: ignore[union-attr]
    resumed.joined(0)
    leases = [lent(resumed.asked(0))[0] for _ in range(3)]
    assert [(one.epoch, one.start) for one in leases] == [(0, 4), (1, 4), (1, 8)]
    assert Keep in kinds(resumed.done(push(0, 1, leases[0], fetched=3)))


def test_nothing_is_left_to_do() -> None:
    for course in (Course(4, 4, 1, first_step=1), Course(40, 4, 1, steps=3, first_step=3)):
        assert Descent(course, SYNCHRONOUS).joined(0) == [Finish()]


@pytest.mark.parametrize(
    ("gate", "message"),
    [
        (lambda: Gate("bulk"), "'bulk' does not exist: give one of"),  # type: ignore[arg-type]
        (lambda: Gate("asynchronous", bound=1), "has no bound of staleness"),
        (lambda: Gate("asynchronous", backups=1), "has no backup workers"),
        (lambda: Gate("synchronous", warm_start=1), "has no warm start"),
        (lambda: Gate("stale-synchronous", bound=-1), "negative number"),
    ],
)
def test_gates_that_mean_nothing(gate: Callable[[], Gate], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        gate()


@pytest.mark.parametrize("how", ["restarted", "refused"])
def test_a_snapshot_that_a_shard_lost_is_taken_again_and_validated_anew(how: str) -> None:
    fleet = Fleet(Course(8, 4, 2, validation_samples=4, validation_batch=2), Gate("asynchronous"))
    for _ in range(2):
        fleet.join()
    first, second = fleet.workers.values()
    for _ in range(2):
        fleet.ask(first)
        fleet.work(first)
        fleet.push(first)
    fleet.ask(first)
    fleet.ask(second)
    assert {worker.hand[0].purpose for worker in (first, second)} == {"validate"}
    fleet.work(first)  # half of it is measured, of a state that one shard has no more
    (old,) = fleet.kept
    if how == "restarted":
        fleet.carry_out(fleet.descent.retake())
    else:  # the order to keep it was lost with a connection
        lease = second.hand[0].number
        fleet.carry_out(fleet.descent.spoiled(Spoiled(second.number, lease, "none", gone=True)))
    (new,) = fleet.kept
    assert new != old
    assert fleet.kept[new].epoch == 0
    fleet.work(second)  # comes to nothing
    assert not fleet.validated
    for worker in (first, second):
        fleet.ask(worker)
        assert worker.hand[0].snapshot == new
        fleet.work(worker)
    assert fleet.validated[0].snapshot == new


def test_what_was_to_be_saved_is_taken_again_as_training_is_now() -> None:
    fleet = Fleet(Course(8, 4, 1), Gate("asynchronous"))
    fleet.join()
    (worker,) = fleet.workers.values()
    for _ in range(2):
        fleet.ask(worker)
        fleet.work(worker)
        fleet.push(worker)
    lost = next(command for command in fleet.log if isinstance(command, Keep))
    assert fleet.finished
    keep, drop = fleet.descent.retake([lost])
    assert isinstance(keep, Keep)
    assert (keep.epoch, keep.version, keep.final) == (0, 2, True)
    assert keep.reached == lost.reached
    assert drop == Drop(keep.number)
