"""The decisions of a coordinator that minimises the objective of whole batches by L-BFGS.

Events in, commands out, as in `descent`: no socket, no clock, no tensor. Three things go on, one
inside the other:

    lbfgs.step            a step on one batch: which operations on vectors, where to evaluate
    portions.Pool         an evaluation: who computes which portion, and which pushes count
    Validations           after an epoch, on a snapshot, beside the next step

Every operation on the shards, and every gradient, is one commit in the order that all of them
follow. While a batch is evaluated there is none, so that all portions are of the same parameters.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from wagontrain.errors import LossError
from wagontrain.servers import complaints, lbfgs
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
)
from wagontrain.servers.deciding import Schedule
from wagontrain.servers.leases import Allowed, Course, Work
from wagontrain.servers.messages import Done, Lease, Measured, Spoiled
from wagontrain.servers.operations import Operation
from wagontrain.servers.portions import Asker, Pool, Portion, Push
from wagontrain.servers.roster import Held, Member, Roster
from wagontrain.servers.staleness import Tally
from wagontrain.servers.validation import Validations


class Minimisation:
    """One training, from the coordinator's side.

    Args:
        course: what there is to train; its steps are those on one batch.
        portions: into how many a batch is cut.
        schedule: the optimizer's settings.
        memory: what L-BFGS has kept from steps before.
        twice: whether portions that are late are given to a second worker.
    """

    def __init__(
        self,
        course: Course,
        portions: int,
        schedule: Schedule,
        memory: lbfgs.Memory,
        twice: bool = True,
    ) -> None:
        self.course = course
        self.portions = portions
        self.schedule = schedule
        self.memory = memory
        self.twice = twice
        self.steps = course.first_step
        self.version = 0
        self.over = False
        self.tally = Tally()
        self.copies = self.dropped = self.iterations = self.evaluations = 0
        self._roster = Roster()
        self._validations = Validations(course)
        self._step: lbfgs.Step | None = None
        self._evaluating: lbfgs.Evaluate | None = None
        self._pool: Pool | None = None
        self._awaited = -1
        self._loss = math.nan
        self._weight = 0.0
        self._leases = self._snapshots = 0
        self._again: list[tuple[int, bool, bool]] = []

    # ------------------------------------------------------------------------------- events

    def joined(self, worker: int) -> list[Command]:
        """A worker takes part."""
        if self.over:
            return []
        self._roster.members.setdefault(worker, Member())
        return self._settle([])

    def left(self, worker: int) -> list[Command]:
        """A worker is lost, was given up, or went: its portions are given to others."""
        member = self._roster.members.get(worker)
        if self.over or member is None:
            return []
        leases = sorted(member.leases)
        for lease in reversed(leases):
            self._give_back(self._roster.take(lease))
        self._roster.leave(worker)
        commands: list[Command] = [Note("lost", {"worker": worker, "leases": leases})]
        if self._pool is None or not any(name[0] == worker for name in self._pool.pushes):
            commands.append(Forget(worker))
        return self._settle(commands)

    def asked(self, worker: int) -> list[Command]:
        """A worker wants a lease. Asking again before the answer changes nothing."""
        if self.over or worker not in self._roster.members:
            return []
        if worker not in self._roster.waiting and self._pool is not None:
            self._pool.asked()
        self._roster.ask(worker)
        return self._settle([])

    def done(self, message: Done) -> list[Command]:
        """A gradient lies on all shards: it counts, or is forgotten."""
        if self.over:
            return []
        member = self._roster.members.get(message.worker)
        if member is None:
            return self._drop(message, "its worker is not, or no longer, taking part")
        again = not member.sequences.add(message.sequence)
        if again and self._counts(message.worker, message.sequence):
            return []
        late = member.stale.intersection(message.leases)
        member.stale -= late
        mine = [lease for lease in dict.fromkeys(message.leases) if lease in member.leases]
        held = [self._roster.take(lease) for lease in mine]
        wrong = "it was sent before" if again else complaints.what_is_wrong(message, held)
        if not wrong:
            return self._accept(message, held)
        for each in held:
            self._give_back(each)
        commands = self._drop(message, "it came too late" if late else wrong)
        return self._settle(commands)

    def _counts(self, worker: int, sequence: int | None) -> bool:
        """Whether a push of this name is part of the gradient that is being collected."""
        return self._pool is not None and (worker, sequence) in self._pool.pushes

    def spoiled(self, message: Spoiled) -> list[Command]:
        """An objective or gradient is not finite.

        Where a line search has gone too far, that is an answer; anywhere else another worker tries
        once more, then training fails.
        """
        member = self._roster.members.get(message.worker)
        if self.over or member is None:
            return []
        commands = self._forget_refused(message, member)
        member.stale.discard(message.lease)
        held = self._roster.held_by(message.worker, message.lease)
        if held is None:
            return self._settle(commands)
        if message.gone and held.work.purpose == "validate":
            return [*commands, complaints.spoiled(held, message.reason), *self.retake()]
        self._roster.take(message.lease)
        training = held.work.purpose == "train"
        if training and self._evaluating is not None and self._evaluating.trial:
            fields = {"step": self.steps, "reason": message.reason}
            commands += [Note("too_far", fields), *self._abandon()]
            return self._settle(commands + self._advance(lbfgs.Answer((), math.inf)))
        if held.work.spoiled_by is not None:
            return self._fail(complaints.spoiled_twice(held, message.reason))
        self._give_back(replace(held, work=replace(held.work, spoiled_by=message.worker)))
        return self._settle([*commands, complaints.spoiled(held, message.reason)])

    def _forget_refused(self, message: Spoiled, member: Member) -> list[Command]:
        """A push that one shard has refused, and others have put aside."""
        if message.sequence is None or self._counts(message.worker, message.sequence):
            return []
        member.sequences.add(message.sequence)
        return [Forget(message.worker, (message.sequence,))]

    def measured(self, message: Measured) -> list[Command]:
        """Sums over a piece of the validation data."""
        held = self._roster.held_by(message.worker, message.lease)
        if self.over or held is None or held.work.purpose != "validate":
            return []
        if not self._validations.of(held.work).fits(message.weight, message.sums):
            reason = f"figures {sorted(message.sums)} with weight {message.weight}"
            return self.spoiled(Spoiled(message.worker, message.lease, reason))
        self._roster.take(message.lease)
        return self._settle(self._validations.measured(held.work, message.weight, message.sums))

    def answered(self, version: int, numbers: tuple[float, ...]) -> list[Command]:
        """All shards have made a commit, and this is what they found out."""
        if self.over or version != self._awaited:
            return []
        self._awaited = -1
        return self._settle(self._advance(lbfgs.Answer(numbers, self._loss)))

    def mislaid(self) -> list[Command]:
        """A shard was started again without what it had."""
        if self.over or not self.version:
            return []
        return self._fail(
            "a server shard ended, and with it a part of L-BFGS's vectors: resume from the run's "
            "checkpoint, or use replicas=1 with at least 2 servers"
        )

    # ------------------------------------------------------------------------------ figures

    def staleness(self) -> dict[str, Any]:
        """There is none: an evaluation is of one state of the parameters."""
        return self.tally.plain_staleness()

    def workers(self) -> dict[int, dict[str, Any]]:
        """Pushes, samples, mean seconds and dropped pushes of every worker there was."""
        return {worker: speed.plain() for worker, speed in self.tally.workers.items()}

    def leases(self) -> dict[str, int]:
        """How many were given, and are out: see `Roster.plain`."""
        return self._roster.plain()

    def more(self) -> dict[str, Any]:
        """What else there is to tell at the end."""
        return {
            "minimised": {
                "iterations": self.iterations, "evaluations": self.evaluations,
                "given_twice": self.copies, "not_counted": self.dropped,
            }
        }  # fmt: skip

    # --------------------------------------------------------------------------- the steps

    @property
    def _exhausted(self) -> bool:
        every = self.course.epochs * self.course.steps_of_epoch
        return self.steps >= min(every, self.course.steps or every)

    def _begin(self) -> list[Command]:
        """Begin the next step."""
        settings = lbfgs.Settings.of(self.schedule.now()[0])
        self._step = lbfgs.step(settings, self.memory)
        return self._obey(next(self._step))

    def _advance(self, answer: lbfgs.Answer) -> list[Command]:
        """Go on with the step; begin no other: `_settle` does."""
        assert self._step is not None
        try:
            return self._obey(self._step.send(answer))
        except StopIteration as ended:
            self._step = None
            return self._end(ended.value)
        except LossError as error:
            return self._fail(str(error))

    def _obey(self, request: lbfgs.Order | lbfgs.Evaluate) -> list[Command]:
        if isinstance(request, lbfgs.Order):
            return [self._operate(request.operations)]
        commands: list[Command] = []
        if request.before:
            commands = [self._operate(request.before)]
            self._awaited = -1  # nobody has to wait for that
        self._evaluating = request
        self._pool = Pool(self.course.batch(self.steps), self.portions, self.twice)
        self.evaluations += 1
        return commands

    def _operate(
        self,
        operations: tuple[Operation, ...],
        pushes: tuple[tuple[int, int], ...] = (),
        divide: float = 1.0,
    ) -> Operate:
        self.version += 1
        self._awaited = self.version
        return Operate(self.version, operations, pushes, divide)

    def _end(self, made: lbfgs.Made) -> list[Command]:
        """A step is made; an epoch may be over by it."""
        epoch = self.steps // self.course.steps_of_epoch
        samples = len(self.course.batch(self.steps))
        self.steps += 1
        self.iterations += made.iterations
        self.schedule.advance()
        fields = {"iterations": made.iterations, "evaluations": made.evaluations}
        commands: list[Command] = [
            Stepped(self.steps, epoch, samples, made.loss, self._weight, fields)
        ]
        if self.steps % self.course.steps_of_epoch == 0 or self._exhausted:
            keep = self._keep(epoch, self._exhausted)
            commands += [keep, *self._validations.begin(keep)]
        return commands + self._keep_again()

    def _keep(self, epoch: int, final: bool) -> Keep:
        number, self._snapshots = self._snapshots, self._snapshots + 1
        reached = replace(self.course, first_step=self.steps).reached()
        return Keep(number, epoch, self.steps, reached, final, self.memory.copy())

    def retake(self, unsaved: Iterable[Keep] = ()) -> list[Command]:
        """A shard has lost its part of snapshots: others are made when no step is under way.

        Args:
            unsaved: snapshots that were to be saved, and have not been.
        """
        ended = self._validations.abandon(self._roster)
        commands: list[Command] = [Drop(keep.number) for keep in ended]
        self._again += [(keep.epoch, keep.final, True) for keep in ended]
        again = {epoch for epoch, _, _ in self._again}
        self._again += [(each.epoch, each.final, False) for each in unsaved
                        if each.epoch not in again]  # fmt: skip
        if self._step is None:
            commands += self._keep_again()
        return self._settle(commands) if commands else []

    def _keep_again(self) -> list[Command]:
        commands: list[Command] = []
        for epoch, final, validate in self._again:
            keep = self._keep(epoch, final)
            after = self._validations.begin(keep) if validate else [Drop(keep.number)]
            commands += [keep, *after]
        self._again.clear()
        return commands

    # -------------------------------------------------------------------- the evaluations

    def _accept(self, message: Done, held: list[Held]) -> list[Command]:
        assert self._pool is not None
        portions = frozenset(each.work.start for each in held)
        push = Push(
            (message.worker, message.sequence), portions, message.weight, message.loss,
            message.seconds,
        )  # fmt: skip
        over = self._pool.accept(push)
        for each in held:
            self._give_back(each)  # it is in this hand no longer; what counts is not given again
        if over is None:
            return self._settle(self._drop(message, "others brought its portions first"))
        self.dropped += len(over)
        commands: list[Command] = [Forget(worker, (number,)) for worker, number in over]
        if self._pool.complete:
            commands += self._conclude(self._pool)
        return self._settle(commands)

    def _conclude(self, pool: Pool) -> list[Command]:
        """Every portion is there: their sum is the gradient."""
        assert self._evaluating is not None
        pushes, weight, loss = pool.result
        if not 0 < weight < math.inf:
            return self._fail(complaints.no_mean(self.steps, weight))
        for push in pushes:
            samples = sum(pool.sizes[start] for start in push.portions)
            self.tally.count(push.name[0], 0, samples, push.seconds)
        names = tuple(push.name for push in pushes)
        self._loss, self._weight = loss, weight
        commands: list[Command] = [self._operate(self._evaluating.after, names, weight)]
        self._close()
        gone = {worker for worker, _ in names if worker not in self._roster.members}
        return [*commands, *(Forget(worker) for worker in sorted(gone))]

    def _abandon(self) -> list[Command]:
        """The evaluation is over without a result."""
        assert self._pool is not None
        names = sorted(self._pool.pushes)
        self._close()
        return [
            Forget(worker, (number,) if worker in self._roster.members else None)
            for worker, number in names
        ]

    def _close(self) -> None:
        assert self._pool is not None
        self.copies += self._pool.copies
        self._pool = self._evaluating = None
        held = self._roster.held.items()
        for lease in [number for number, each in held if each.work.purpose == "train"]:
            self._roster.take(lease, stale=True)

    def _fail(self, reason: str) -> list[Command]:
        self.over = True
        return [Fail(reason)]

    def _drop(self, message: Done, reason: str) -> list[Command]:
        """The push will not be applied."""
        self.dropped += 1
        self.tally.of(message.worker).dropped += 1
        fields = {"worker": message.worker, "sequence": message.sequence, "reason": reason}
        note = Note("dropped", {**fields, "leases": list(message.leases)})
        return [Forget(message.worker, (message.sequence,)), note]

    def _give_back(self, held: Held) -> None:
        if held.work.purpose == "validate":
            self._validations.give_back(held.work)
        elif self._pool is not None:
            self._pool.give_back(held.worker, held.work)

    # ------------------------------------------------------------------------------- leases

    def _settle(self, commands: list[Command]) -> list[Command]:
        """Begin what can begin, give what can be given; finish if that was all."""
        while not self.over and self._step is None and not self._exhausted and self._roster.members:
            commands += self._begin()
        if self.over:
            return commands
        for worker in list(self._roster.waiting):
            commands += self._give(worker)
        if self._exhausted and not self._validations.open:
            self.over = True
            commands.append(Finish())
        return commands

    def _give(self, worker: int) -> list[Command]:
        roster = self._roster
        anyone = len(roster.ready) <= 1 or roster.stuck

        def allowed(work: Work) -> bool:
            return anyone or work.spoiled_by != worker

        number = self._leases
        work = self._validations.choose(allowed)
        if work is not None:
            lease = self._validations.lease(number, work)
        elif self._pool is not None and (portion := self._choose(worker, allowed)):
            work = portion.work
            epoch, start = divmod(work.start, self.course.samples)
            stop = start + work.stop - work.start
            lease = Lease(
                number, "train", epoch, self.steps, start, stop, version=self.version,
                alone=portion.alone,
            )  # fmt: skip
        else:
            return []
        self._leases += 1
        roster.give(worker, work, lease)
        return [Give(worker, lease)]

    def _choose(self, worker: int, allowed: Allowed) -> Portion | None:
        assert self._pool is not None
        roster = self._roster
        busy = sum(roster.members[each].busy for each in roster.ready)
        own = roster.members[worker].busy
        asker = Asker(worker, own, len(roster.ready), busy - own, allowed)
        return self._pool.choose(asker)
