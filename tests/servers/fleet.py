"""Workers and shards as a model: carries a Descent's commands out and checks each of them."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

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


@dataclass
class Worker:
    """`hand`: leases to work on, in the order given; `added`: worked on, not pushed yet."""

    number: int
    sequence: int = 0
    asking: bool = False
    hand: list[Lease] = field(default_factory=list)
    added: list[tuple[Lease, int]] = field(default_factory=list)


@dataclass
class Staged:
    leases: tuple[Lease, ...]
    fetched: int


class Fleet:
    """What the shards hold, what the workers do, and what has to be true of it at all times.

    Args:
        together: leases that a worker adds up for one push (n_push).
    """

    def __init__(self, course: Course, gate: Gate, together: int = 1) -> None:
        self.course = course
        self.gate = gate
        self.together = together
        self.descent = Descent(course, gate)
        self.version = course.first_step
        self.workers: dict[int, Worker] = {}
        self.joined = 0
        self.staged: dict[tuple[int, int], Staged] = {}
        self.applied: Counter[int] = Counter()
        for position in range(course.reached().position):
            self.applied[position] += 1
        self.commits: list[dict[int, int]] = []  # of each update since the start: worker -> pushes
        self.start = course.first_step
        self.kept: dict[int, Keep] = {}
        self.ends: list[Keep] = []
        self.validated: dict[int, Validated] = {}
        self.numbers: set[int] = set()
        self.sent: list[Done] = []
        self.spoiled: list[Lease] = []
        self.notes: Counter[str] = Counter()
        self.log: list[Command] = []
        self.failed = ""
        self.finished = False
        self.resumed = False

    # what the shards and workers do

    def carry_out(self, commands: list[Command]) -> None:
        for command in commands:
            assert not self.finished, command
            self.log.append(command)
            match command:
                case Give():
                    self.give(command)
                case Apply():
                    self.apply(command)
                case Forget(worker, sequences):
                    for name in [name for name in self.staged if name[0] == worker]:
                        if sequences is None or name[1] in sequences:
                            del self.staged[name]
                case Keep():
                    self.keep(command)
                case Drop(snapshot):
                    del self.kept[snapshot]
                case Validated():
                    assert command.snapshot in self.kept
                    assert command.weight == self.course.validation_samples
                    assert command.values == {"loss": 2.0}
                    self.validated[command.epoch] = command
                case Note(kind, _):
                    self.notes[kind] += 1
                case Fail(reason):
                    self.failed = reason
                case Finish():
                    self.finished = True
        assert self.version == self.descent.version

    def give(self, command: Give) -> None:
        worker, lease = self.workers[command.worker], command.lease
        assert worker.asking
        worker.asking = False
        assert lease.number not in self.numbers
        self.numbers.add(lease.number)
        assert lease.version <= self.version  # a lease never waits for what others have to do
        if lease.purpose == "validate":
            assert lease.snapshot in self.kept
            assert 0 <= lease.start < lease.stop <= self.course.validation_samples
        else:
            assert 0 <= lease.epoch < self.course.epochs
            assert 0 <= lease.start < lease.stop <= self.course.samples
            assert lease.stop - lease.start <= self.course.batch_size
            steps = -(-self.course.samples // self.course.batch_size)
            assert lease.step == lease.epoch * steps + lease.start // self.course.batch_size
            if self.version < self.gate.warm_start:
                assert not any(
                    one.added or any(other.purpose == "train" for other in one.hand)
                    for one in self.workers.values()
                    if one is not worker
                )
        worker.hand.append(lease)

    def apply(self, command: Apply) -> None:
        assert command.version == self.version + 1
        self.version = command.version
        assert self.course.steps is None or self.version <= self.course.steps
        pushes = [(name, self.staged.pop(name)) for name in command.pushes]
        leases = [lease for _, push in pushes for lease in push.leases]
        assert command.epoch == leases[0].epoch
        assert command.step == leases[0].step
        samples = [position for lease in leases for position in self.positions(lease)]
        assert command.samples == len(samples)
        assert command.divide == len(samples)
        assert command.loss == 3.0
        for position in samples:
            assert not self.applied[position]
            self.applied[position] += 1
        self.commits.append(dict(Counter(worker for (worker, _), _ in pushes)))
        stale = [self.version - 1 - push.fetched for _, push in pushes]
        assert command.staleness == max(stale) >= min(stale) >= 0
        if self.gate.mode == "synchronous":
            assert command.staleness == 0
            assert all(len(push.leases) == 1 for _, push in pushes)
            if not self.gate.backups:
                assert len({(lease.start, lease.stop, lease.step) for lease in leases}) == 1
                assert [lease.share for lease in leases] == list(range(leases[0].shares))
        elif self.gate.mode == "stale-synchronous":
            for (worker, _), push in pushes:
                between = self.commits[push.fetched - self.start : -1]
                peers = sum((Counter(one) for one in between), Counter())
                del peers[worker]
                assert all(count <= self.gate.bound + 1 for count in peers.values())

    def positions(self, lease: Lease) -> range:
        """Positions through all epochs of the lease's share, as torch.chunk cuts it."""
        each = -(-(lease.stop - lease.start) // lease.shares)
        first = lease.epoch * self.course.samples + lease.start + lease.share * each
        last = lease.epoch * self.course.samples + lease.stop
        return range(first, min(first + each, last))

    def keep(self, command: Keep) -> None:
        assert command.version == self.version
        assert command.number not in self.kept
        self.kept[command.number] = command
        reached = command.reached
        missing = {place for gap in reached.gaps for place in range(*gap)}
        assert all(gap[1] <= reached.position for gap in reached.gaps)
        missing.update(range(reached.position, self.course.end))
        assert missing == {place for place in range(self.course.end) if not self.applied[place]}

    # events

    def join(self) -> None:
        self.workers[self.joined] = Worker(self.joined)
        self.joined += 1
        self.carry_out(self.descent.joined(self.joined - 1))

    def ask(self, worker: Worker) -> None:
        worker.asking = True
        self.carry_out(self.descent.asked(worker.number))

    def leave(self, worker: Worker) -> None:
        del self.workers[worker.number]
        self.carry_out(self.descent.left(worker.number))

    def work(self, worker: Worker, lag: int = 0) -> None:
        """Work on the next lease: measure it, or compute a gradient at a version it allows."""
        lease = worker.hand.pop(0)
        if lease.purpose == "validate":
            count = float(lease.stop - lease.start)
            message = Measured(worker.number, lease.number, count, {"loss": 2 * count})
            self.carry_out(self.descent.measured(message))
            return
        newest = self.version if self.gate.mode != "synchronous" else lease.version
        worker.added.append((lease, max(lease.version, newest - lag)))

    def push(self, worker: Worker, fetched: int | None = None) -> None:
        """Put what was added up on the shards, and say so."""
        leases = tuple(lease for lease, _ in worker.added)
        oldest = min(fetched for _, fetched in worker.added)
        worker.added.clear()
        worker.sequence += 1
        count = sum(len(self.positions(lease)) for lease in leases)
        message = Done(
            worker.number,
            worker.sequence,
            tuple(lease.number for lease in leases),
            oldest if fetched is None else fetched,
            count,
            count,
            3.0 * count,
            seconds=0.5,
        )
        self.stage(message, leases)

    def stage(self, message: Done, leases: tuple[Lease, ...]) -> None:
        self.staged[message.worker, message.sequence] = Staged(leases, message.fetched)
        self.sent.append(message)
        self.carry_out(self.descent.done(message))

    def spoil(self, worker: Worker) -> None:
        lease = worker.hand.pop(0)
        self.spoiled.append(lease)
        self.carry_out(self.descent.spoiled(Spoiled(worker.number, lease.number, "loss is nan")))

    def was_spoiled(self, lease: Lease) -> bool:
        """Whether some of the lease's samples were spoiled before."""
        return any(
            (one.purpose, one.epoch, one.snapshot) == (lease.purpose, lease.epoch, lease.snapshot)
            and one.start < lease.stop
            and lease.start < one.stop
            for one in self.spoiled
        )

    def replay(self, message: Done) -> None:
        """What was said before is said again; nothing changes but that a push may be forgotten."""
        version, staged = self.version, dict(self.staged)
        hands = {number: list(worker.hand) for number, worker in self.workers.items()}
        self.carry_out(self.descent.done(message))
        assert self.version == version
        assert self.staged == staged
        assert hands == {number: worker.hand for number, worker in self.workers.items()}

    def mislay(self) -> None:
        """A shard loses what it has put aside."""
        self.staged.clear()
        self.carry_out(self.descent.mislaid())

    def retake(self) -> None:
        """A shard loses what it has kept."""
        self.carry_out(self.descent.retake())

    def resume(self) -> None:
        """Everything ends and goes on from a snapshot, with workers that know of nothing."""
        (keep,) = self.descent.keep()
        assert isinstance(keep, Keep)
        self.keep(keep)
        self.workers.clear()
        self.staged.clear()
        self.kept.clear()
        self.commits.clear()
        self.numbers.clear()
        self.start = keep.version
        self.resumed = True
        course = Course(**{**vars(self.course), "first_step": keep.version})
        reached = Reached(keep.reached.position, keep.reached.gaps)
        self.course = course
        self.descent = Descent(course, self.gate, reached)

    def to_the_end(self) -> None:
        """Everybody works, in turn, until it is finished; fails if nobody can."""
        if not self.workers:
            self.join()
        while not (self.finished or self.failed):
            before = len(self.log)
            moved = False
            for worker in list(self.workers.values()):
                if self.finished or self.failed:
                    break
                if not worker.asking and len(worker.hand) < 2:
                    self.ask(worker)
                if worker.hand:
                    self.work(worker)
                    moved = True
                if worker.added and (len(worker.added) >= self.together or not worker.hand):
                    self.push(worker)
                    moved = True
            assert moved or len(self.log) > before, "everybody waits"

    def check_end(self) -> None:
        """Every sample was applied once, every epoch kept and validated, in order."""
        assert self.finished
        assert not self.failed
        assert not self.kept
        if self.course.steps is None:
            assert self.applied == Counter(range(self.course.end))
        else:
            everything = self.applied == Counter(range(self.course.end))
            assert everything or self.version == self.course.steps
        keeps = [one for one in self.log if isinstance(one, Keep)]
        if not self.resumed:
            ends = list(dict.fromkeys(one.epoch for one in keeps))  # some were taken again
            assert ends == list(range(keeps[0].epoch, keeps[0].epoch + len(ends)))
            assert all(one.final == (one.epoch == ends[-1]) for one in keeps)
            assert max(one.version for one in keeps) == self.version
            measured = set(ends) if self.course.validation_samples else set()
            assert set(self.validated) == measured
