"""Descents: validation, limits, resuming, and snapshots that were lost."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.servers.descents import ASYNCHRONOUS, SYNCHRONOUS, begin, kinds, lent, measured, push
from tests.servers.fleet import Fleet
from wagontrain.errors import UsageError
from wagontrain.servers.descent import (
    Apply,
    Course,
    Descent,
    Drop,
    Finish,
    Forget,
    Gate,
    Give,
    Keep,
    Note,
    Reached,
    Validated,
)
from wagontrain.servers.messages import Measured, Spoiled


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
