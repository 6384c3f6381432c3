"""Whatever happens in whatever order: each portion counts once, and it comes to an end."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from wagontrain.servers import lbfgs
from wagontrain.servers.commands import (
    Command,
    Drop,
    Fail,
    Finish,
    Forget,
    Give,
    Keep,
    Note,
    Operate,
    Stepped,
    Validated,
)
from wagontrain.servers.leases import Course
from wagontrain.servers.messages import Done, Lease, Measured, Spoiled
from wagontrain.servers.minimising import Minimisation
from wagontrain.servers.operations import Combine, Reduction, reductions
from wagontrain.servers.sums import sum_of


class Settings:
    """The same in every step."""

    def __init__(self, **changed: Any) -> None:
        self.group = {
            "lr": 1.0, "max_iter": 3, "max_eval": 4, "tolerance_grad": 0.0,
            "tolerance_change": 0.0, "history_size": 2, "line_search_fn": "strong_wolfe", **changed,
        }  # fmt: skip
        self.steps = 0

    def now(self) -> tuple[dict[str, Any], ...]:
        return (self.group,)

    def advance(self) -> None:
        self.steps += 1


@dataclass
class Worker:
    number: int
    sequence: int = 0
    asking: bool = False
    hand: Lease | None = None
    added: list[Lease] = field(default_factory=list)


class Model:
    """Workers and shards; carries commands out and checks each of them."""

    def __init__(self, course: Course, portions: int, **changed: Any) -> None:
        self.course = course
        self.schedule = Settings(**changed)
        self.decisions = Minimisation(course, portions, self.schedule, lbfgs.Memory())
        self.version = 0
        self.workers: dict[int, Worker] = {}
        self.joined = 0
        self.staged: dict[tuple[int, int], list[Lease]] = {}
        self.unanswered: list[tuple[int, list[Reduction]]] = []
        self.kept: set[int] = set()
        self.keeps: list[Keep] = []
        self.validated: list[int] = []
        self.steps: list[Stepped] = []
        self.evaluations = 0
        self.moved_at = 0
        self.evaluated_at = -1
        self.notes: Counter[str] = Counter()
        self.log: list[Command] = []
        self.finished = False
        self.failed = ""
        self.numbers = 0

    def carry_out(self, commands: list[Command]) -> None:
        for command in commands:
            assert not self.finished, command
            self.log.append(command)
            match command:
                case Give(number, lease):
                    self.give(self.workers[number], lease)
                case Operate():
                    self.operate(command)
                case Stepped():
                    self.steps.append(command)
                    assert command.version == self.course.first_step + len(self.steps)
                case Forget(worker, sequences):
                    for name in [name for name in self.staged if name[0] == worker]:
                        if sequences is None or name[1] in sequences:
                            del self.staged[name]
                case Keep():
                    assert command.version == self.course.first_step + len(self.steps)
                    self.kept.add(command.number)
                    self.keeps.append(command)
                case Drop(snapshot):
                    self.kept.remove(snapshot)
                case Validated():
                    assert command.weight == self.course.validation_samples
                    self.validated.append(command.epoch)
                case Note(kind, _):
                    self.notes[kind] += 1
                case Fail(reason):
                    self.failed = reason
                case Finish():
                    self.finished = True

    def give(self, worker: Worker, lease: Lease) -> None:
        assert worker.asking
        assert worker.hand is None
        worker.asking, worker.hand = False, lease
        if lease.purpose == "validate":
            assert lease.snapshot in self.kept
            return
        assert lease.version == self.version
        step = self.course.first_step + len(self.steps)
        epoch, within = divmod(step, self.course.steps_of_epoch)
        assert (lease.step, lease.epoch) == (step, epoch)
        assert within * self.course.batch_size <= lease.start < lease.stop
        assert lease.stop <= min(self.course.samples, (within + 1) * self.course.batch_size)

    def operate(self, command: Operate) -> None:
        assert command.version == self.version + 1
        before, self.version = self.version, command.version
        for each in command.operations:
            if isinstance(each, Combine):
                assert all(math.isfinite(factor) for factor, _ in each.terms)
        self.unanswered.append((self.version, reductions(command.operations)))
        if not command.pushes:
            return
        # One evaluation: every sample of the batch once, all at the version before.
        self.evaluations += 1
        leases = [lease for name in command.pushes for lease in self.staged.pop(name)]
        assert {lease.version for lease in leases} == {before}
        step = self.course.first_step + len(self.steps)
        start = step % self.course.steps_of_epoch * self.course.batch_size
        stop = min(start + self.course.batch_size, self.course.samples)
        samples = sorted(sample for lease in leases for sample in range(lease.start, lease.stop))
        assert samples == list(range(start, stop))
        assert command.divide == stop - start

    # what shards and workers do

    def answer(self) -> None:
        """The shards have made their oldest commit; what they found is like nothing real."""
        if not self.unanswered:
            return
        version, found = self.unanswered.pop(0)
        self.numbers += 1
        numbers = [0.01 + abs(math.cos(self.numbers + index)) for index in range(len(found))]
        if found == [sum_of, max]:  # a slope along the direction, and the largest in it
            numbers[0] *= -1
        self.carry_out(self.decisions.answered(version, tuple(numbers)))

    def join(self) -> None:
        self.joined += 1
        self.workers[self.joined] = Worker(self.joined)
        self.carry_out(self.decisions.joined(self.joined))

    def ask(self, worker: Worker) -> None:
        if worker.hand is None and not worker.asking:
            worker.asking = True
            self.carry_out(self.decisions.asked(worker.number))

    def work(self, worker: Worker, push: bool = False) -> None:
        """As `PortionWorker` does: alone or of another version is pushed by itself."""
        lease, worker.hand = worker.hand, None
        if lease is not None and lease.purpose == "validate":
            weight = float(lease.stop - lease.start)
            self.carry_out(
                self.decisions.measured(
                    Measured(worker.number, lease.number, weight, {"loss": 2 * weight})
                )
            )
        elif lease is not None:
            if worker.added and (lease.alone or worker.added[0].version != lease.version):
                self.push(worker)
            worker.added.append(lease)
        if worker.added and (push or worker.added[-1].alone):
            self.push(worker)

    def push(self, worker: Worker) -> None:
        leases, worker.added = worker.added, []
        worker.sequence += 1
        samples = sum(lease.stop - lease.start for lease in leases)
        if worker.number not in self.workers:
            return
        self.staged[worker.number, worker.sequence] = leases
        self.carry_out(
            self.decisions.done(
                Done(
                    worker.number, worker.sequence, tuple(lease.number for lease in leases),
                    leases[0].version, float(samples), samples,
                    samples * (3.0 + math.sin(leases[0].version)),
                )
            )
        )  # fmt: skip

    def leave(self, worker: Worker) -> None:
        del self.workers[worker.number]
        self.carry_out(self.decisions.left(worker.number))

    def spoil(self, worker: Worker) -> None:
        """As `Worker._train` does: all that was added up is given back."""
        lease, worker.hand = worker.hand, None
        assert lease is not None
        added, worker.added = worker.added, []
        for each in (*added, lease):
            if not (self.failed or self.finished):
                spoiled = Spoiled(worker.number, each.number, "loss is nan")
                self.carry_out(self.decisions.spoiled(spoiled))

    def to_the_end(self) -> None:
        for _ in range(5000):
            if self.finished or self.failed:
                return
            if not self.workers:
                self.join()
            before = len(self.log)
            self.answer()
            moved = bool(self.unanswered)
            for worker in list(self.workers.values()):
                if self.finished or self.failed:
                    return
                moved |= worker.hand is not None or bool(worker.added)
                self.work(worker, push=True)
                if not (self.finished or self.failed):
                    self.ask(worker)
            assert moved or len(self.log) > before, "everybody waits"
        raise AssertionError("no end")

    def check_end(self) -> None:
        assert self.finished
        assert not self.kept
        every = self.course.epochs * self.course.steps_of_epoch
        last = max(min(every, self.course.steps or every), self.course.first_step)
        assert self.course.first_step + len(self.steps) == last
        assert self.schedule.steps == len(self.steps)
        told = self.decisions.more()["minimised"]
        assert told["evaluations"] >= self.evaluations
        if self.steps:
            assert self.keeps[-1].final
            ends = list(dict.fromkeys(keep.epoch for keep in self.keeps))  # some are taken again
            assert all(keep.final == (keep.epoch == ends[-1]) for keep in self.keeps)
            assert sorted(self.validated) == (ends if self.course.validation_samples else [])


COURSES = st.builds(
    Course,
    samples=st.integers(1, 20),
    batch_size=st.integers(1, 20),
    epochs=st.integers(1, 2),
    steps=st.none() | st.integers(1, 6),
    validation_samples=st.integers(0, 5),
    validation_batch=st.integers(1, 3),
).filter(lambda course: course.batch_size <= course.samples)
EVENTS = [
    "ask", "ask", "ask", "work", "work", "work", "push", "answer", "answer", "join", "leave",
    "replay", "foreign", "retake",
]  # fmt: skip
ACTIONS = st.lists(st.tuples(st.sampled_from(EVENTS), st.integers(0, 99)), max_size=80)


def play(model: Model, actions: list[tuple[str, int]]) -> None:
    model.join()
    for event, which in actions:
        if model.finished or model.failed:
            break
        workers = list(model.workers.values())
        if event == "join" and len(workers) < 5:
            model.join()
        elif event == "answer":
            model.answer()
        elif event == "retake":
            model.carry_out(model.decisions.retake())
        elif workers:
            worker = workers[which % len(workers)]
            match event:
                case "ask":
                    model.ask(worker)
                case "work":
                    model.work(worker)
                case "push":
                    model.work(worker, push=True)
                case "leave":
                    model.leave(worker)
                case "replay" if worker.sequence:
                    name = (worker.number, worker.sequence)
                    before = model.staged.get(name)
                    again = Done(*name, (0,), model.version, 1.0, 1, 3.0)
                    model.carry_out(model.decisions.done(again))
                    assert model.staged.get(name) == before
                case "foreign":
                    others = [one for one in workers if one is not worker and one.hand]
                    if others and others[0].hand:
                        worker.sequence += 1
                        name = (worker.number, worker.sequence)
                        model.staged[name] = [others[0].hand]
                        stolen = Done(*name, (others[0].hand.number,), model.version, 1.0, 1, 3.0)
                        model.carry_out(model.decisions.done(stolen))
                        assert name not in model.staged
    model.to_the_end()


@given(COURSES, st.integers(1, 9), st.sampled_from(["strong_wolfe", None]), ACTIONS)
@settings(
    deadline=None,
    max_examples=200,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
def test_every_portion_counts_once(
    course: Course, portions: int, line: str | None, actions: list[tuple[str, int]]
) -> None:
    model = Model(course, portions, line_search_fn=line)
    play(model, actions)
    if not model.failed:
        model.check_end()
    else:  # the numbers of the valley are not those of any
        assert "no direction of L-BFGS is finite" in model.failed


def started(workers: int, portions: int, samples: int = 12) -> Model:
    model = Model(Course(samples, samples, 1), portions)
    for _ in range(workers):
        model.join()
    for worker in model.workers.values():
        model.ask(worker)
    return model


def test_a_value_that_is_not_finite_is_tried_by_another_worker() -> None:
    model = started(2, 4)
    first, second = model.workers.values()
    assert first.hand is not None
    at = first.hand.start
    model.spoil(first)
    model.ask(first)
    assert first.hand is not None
    assert first.hand.start != at
    while not (second.hand and second.hand.start == at):
        model.work(second)
        model.ask(second)
    model.spoil(second)
    assert "on worker 2, after worker 1 had failed on them, too" in model.failed


def test_a_trial_that_goes_too_far_is_an_answer() -> None:
    model = started(2, 4)
    first, second = model.workers.values()
    while not (model.decisions._evaluating and model.decisions._evaluating.trial):
        for worker in (first, second):
            model.work(worker, push=True)
            model.ask(worker)
        model.answer()
    model.work(second, push=True)
    model.ask(second)
    assert first.hand is not None
    evaluations = model.decisions.evaluations
    model.spoil(first)
    assert model.notes["too_far"] == 1
    assert not model.failed
    assert not model.staged  # what others had brought of it is forgotten
    assert model.decisions.evaluations == evaluations + 1
    model.to_the_end()
    model.check_end()


def test_a_push_that_one_shard_refused_is_forgotten_by_the_others() -> None:
    model = started(2, 4)
    first, second = model.workers.values()
    lease, other = first.hand, second.hand
    assert lease is not None
    assert other is not None
    for worker in (first, second):
        worker.hand = None
        worker.sequence += 1
    model.staged[1, 1] = [lease]
    model.carry_out(model.decisions.spoiled(Spoiled(1, lease.number, "inf", sequence=1)))
    assert (1, 1) not in model.staged
    # Somebody else used the name of this push first: its portion is done again.
    model.carry_out(model.decisions.done(Done(2, 1, (10**6,), model.version, 1.0, 1, 3.0)))
    model.staged[2, 1] = [other]
    model.carry_out(model.decisions.done(Done(2, 1, (other.number,), other.version, 1.0, 1, 3.0)))
    assert not model.staged
    model.to_the_end()
    model.check_end()


def test_a_shard_without_its_vectors_ends_the_run() -> None:
    model = started(1, 2)
    model.carry_out(model.decisions.mislaid())
    assert not model.failed  # nothing was lost yet
    while not model.version:
        model.work(model.workers[1], push=True)
        model.ask(model.workers[1])
    model.carry_out(model.decisions.mislaid())
    assert "resume from the run's checkpoint, or use replicas=1" in model.failed


def test_weights_that_add_up_to_nothing_are_told() -> None:
    model = started(1, 1)
    lease = model.workers[1].hand
    assert lease is not None
    model.staged[1, 1] = [lease]
    model.carry_out(model.decisions.done(Done(1, 1, (lease.number,), 0, 0.0, 12, 0.0)))
    assert "add up to 0" in model.failed
