"""What is decided in plain situations; any order of events: test_interleavings."""

from __future__ import annotations

from tests.servers.descents import (
    ASYNCHRONOUS,
    SYNCHRONOUS,
    begin,
    kinds,
    lent,
    push,
    synchronous,
)
from wagontrain.servers.descent import (
    Apply,
    Course,
    Descent,
    Drop,
    Fail,
    Finish,
    Forget,
    Gate,
    Keep,
    Note,
    Reached,
)
from wagontrain.servers.messages import Done, Spoiled

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
