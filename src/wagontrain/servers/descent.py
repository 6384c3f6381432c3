"""The decisions of a parameter server's coordinator: events in, commands out.

No socket, no clock, no tensor: what is given to whom, which push counts, and the one order of
updates that every shard follows. The coordinator carries the commands out in the order in which
they stand.

What makes a sample's gradient count once per epoch: its position is in one lease at a time
(`leases.Supply`), a lease is in one worker's hand at a time, and a push counts only if its sender
has all the leases it is of. A worker that is lost takes nothing with it: pushes that were
accepted count, and its leases are given again.

A worker asks for one lease at a time, but may do so while it works on the one before. If it adds up
several leases for one push, it has to push what it has when it has nothing left to work on: an ask
may wait for that very push.

    descent = Descent(Course(samples=60000, batch_size=128, epochs=5), Gate("asynchronous"))
    descent.joined(0)
    descent.asked(0)         -> [Give(0, Lease(...))]
    descent.done(Done(...))  -> [Apply(version=1, ...)]
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from wagontrain.servers import complaints
from wagontrain.servers.commands import (
    Apply,
    Command,
    Drop,
    Fail,
    Finish,
    Forget,
    Give,
    Keep,
    Note,
    Validated,
)
from wagontrain.servers.consistency import Asking, Gate, Gradient, consistency_of
from wagontrain.servers.leases import Course, Reached, Supply, Work
from wagontrain.servers.messages import Done, Lease, Measured, Spoiled
from wagontrain.servers.roster import Held, Member, Roster
from wagontrain.servers.staleness import Tally
from wagontrain.servers.sums import sum_of
from wagontrain.servers.validation import Validations

__all__ = [
    "Apply", "Command", "Course", "Descent", "Drop", "Fail", "Finish", "Forget", "Gate", "Give",
    "Keep", "Note", "Reached", "Validated",
]  # fmt: skip


class Descent:
    """One training, from the coordinator's side.

    Args:
        course: what there is to train.
        gate: how workers' updates may mix.
        reached: from where training goes on, as `Keep` said it; by default `course.first_step`
            whole batches are taken as applied.
    """

    def __init__(self, course: Course, gate: Gate, reached: Reached | None = None) -> None:
        self.course = course
        self.gate = gate
        self.version = course.first_step
        self.over = False
        self.tally = Tally()
        self._roster = Roster()
        self._supply = Supply(course, reached or course.reached())
        self._consistency = consistency_of(course, gate, self._supply)
        self._validations = Validations(course)
        # Accepted, and in no update yet: shards have to keep them even if their worker is lost.
        self._pending: set[tuple[int, int]] = set()
        self._leases = 0
        self._snapshots = 0

    # ------------------------------------------------------------------------------- events

    def joined(self, worker: int) -> list[Command]:
        """A worker takes part; it counts from its first ask on, and costs nothing before."""
        if self.over:
            return []
        self._roster.members.setdefault(worker, Member())
        return self._settle([], only=worker)

    def left(self, worker: int) -> list[Command]:
        """A worker is lost, was given up, or went: its leases are given to others."""
        member = self._roster.members.get(worker)
        if self.over or member is None:
            return []
        leases = sorted(member.leases)
        self._take_back(leases)
        self._roster.leave(worker)
        self._consistency.leave(worker)
        commands: list[Command] = [Note("lost", {"worker": worker, "leases": leases})]
        if not any(name[0] == worker for name in self._pending):
            commands.append(Forget(worker))
        return self._settle(commands)

    def asked(self, worker: int) -> list[Command]:
        """A worker wants a lease. Asking again before the answer changes nothing."""
        if self.over or worker not in self._roster.members:
            return []
        self._roster.ask(worker)
        return self._settle([], only=worker)

    def done(self, message: Done) -> list[Command]:
        """A gradient lies on all shards: it counts, or is forgotten."""
        if self.over:
            return []
        member = self._roster.members.get(message.worker)
        if member is None:
            return self._drop(message, "its worker is not, or no longer, taking part")
        again = not member.sequences.add(message.sequence)
        late = member.stale.intersection(message.leases)
        member.stale -= late
        mine = [lease for lease in dict.fromkeys(message.leases) if lease in member.leases]
        held = [self._roster.held[lease] for lease in mine]
        wrong = "it was sent before" if again else self._what_is_wrong(message, held)
        if wrong:
            commands = self._drop(message, "it came too late" if late else wrong)
            self._take_back(mine)
            return self._settle(commands)
        if math.isfinite(message.loss) and 0 <= message.weight < math.inf:
            return self._accept(message, held)
        reason = f"its loss is {message.loss}, its weight {message.weight}"
        commands = self._drop(message, reason)
        for lease in mine:
            commands += [] if self.over else self._spoil(lease, reason)
        return self._settle(commands)

    def spoiled(self, message: Spoiled) -> list[Command]:
        """A gradient is not finite: another worker tries once more, then training fails."""
        member = self._roster.members.get(message.worker)
        if self.over or member is None:
            return []
        name = (message.worker, message.sequence)
        commands: list[Command] = []
        if message.sequence is not None and name not in self._pending:
            # One shard has refused it, others have put it aside.
            member.sequences.add(message.sequence)
            commands.append(Forget(message.worker, (message.sequence,)))
        member.stale.discard(message.lease)
        held = self._roster.held_by(message.worker, message.lease)
        if held is None:
            return self._settle(commands)
        if message.gone and held.work.purpose == "validate":
            return [*commands, complaints.spoiled(held, message.reason), *self.retake()]
        return self._settle(commands + self._spoil(message.lease, message.reason))

    def measured(self, message: Measured) -> list[Command]:
        """Sums over a piece of the validation data."""
        held = self._roster.held_by(message.worker, message.lease)
        if self.over or held is None or held.work.purpose != "validate":
            return []
        if not self._validations.of(held.work).fits(message.weight, message.sums):
            reason = f"figures {sorted(message.sums)} with weight {message.weight}"
            return self._settle(self._spoil(message.lease, reason))
        self._roster.take(message.lease)
        commands = self._validations.measured(held.work, message.weight, message.sums)
        return self._settle(commands, only=message.worker)

    def mislaid(self) -> list[Command]:
        """A shard has lost gradients that it had put aside: what is in no update yet is redone."""
        if self.over or not self._pending:
            return []
        names, self._pending = sorted(self._pending), set()
        self._consistency.recall()
        commands: list[Command] = [Note("mislaid", {"pushes": [list(name) for name in names]})]
        for worker in dict.fromkeys(worker for worker, _ in names):
            of = tuple(sequence for other, sequence in names if other == worker)
            commands.append(Forget(worker, of if worker in self._roster.members else None))
        return self._settle(commands)

    def answered(self, version: int, numbers: tuple[float, ...]) -> list[Command]:
        """Nothing is asked of the shards here."""
        return []

    def retake(self, unsaved: Iterable[Keep] = ()) -> list[Command]:
        """A shard has lost its part of snapshots: others are made, as training is now.

        Validations begin again, of a state that all shards have.

        Args:
            unsaved: snapshots that were to be saved, and have not been.
        """
        commands: list[Command] = []
        for lost in self._validations.abandon(self._roster):
            keep = self._keep(lost.epoch, lost.final)
            commands += [Drop(lost.number), keep, *self._validations.begin(keep)]
        again = {command.epoch for command in commands if isinstance(command, Keep)}
        for keep in unsaved:
            if keep.epoch not in again:
                made = self._keep(keep.epoch, keep.final)
                commands += [made, Drop(made.number)]
        return self._settle(commands) if commands else []

    def keep(self) -> list[Command]:
        """A snapshot now, to be saved; it is not validated, and nobody drops it but who asked."""
        return [self._keep(self._supply.epoch)]

    # ------------------------------------------------------------------------------ figures

    def staleness(self) -> dict[str, Any]:
        """Staleness over all pushes: mean, p50, p99, max and histogram."""
        return self.tally.plain_staleness()

    def workers(self) -> dict[int, dict[str, Any]]:
        """Pushes, samples, mean seconds and dropped pushes of every worker there was."""
        return {worker: speed.plain() for worker, speed in self.tally.workers.items()}

    def leases(self) -> dict[str, int]:
        """How many were given, and are out: see `Roster.plain`."""
        return self._roster.plain()

    def more(self) -> dict[str, Any]:
        """Nothing beside these."""
        return {}

    # ---------------------------------------------------------------------------- decisions

    def _what_is_wrong(self, message: Done, held: list[Held]) -> str:
        """Why a push cannot be for its leases; `held`: those that are its worker's."""
        training = [one for one in held if one.work.purpose == "train"]
        if not training or len(training) < len(message.leases):
            return "it is of leases that are not its worker's"
        if not min(one.lease.version for one in held) <= message.fetched <= self.version:
            return f"it was taken at version {message.fetched}, which its leases do not allow"
        return ""

    def _drop(self, message: Done, reason: str) -> list[Command]:
        """The push will not be applied, unless it is one that was accepted and came again."""
        worker, sequence = message.worker, message.sequence
        self.tally.of(worker).dropped += 1
        fields = {"worker": worker, "sequence": sequence, "reason": reason}
        note = Note("dropped", {**fields, "leases": list(message.leases)})
        counts = (worker, sequence) in self._pending
        return [note] if counts else [Forget(worker, (sequence,)), note]

    def _accept(self, message: Done, held: list[Held]) -> list[Command]:
        for lease in message.leases:
            self._roster.take(lease)
        gradient = Gradient(
            (message.worker, message.sequence), message.leases, tuple(one.work for one in held),
            message.fetched, message.weight, message.loss, message.seconds,
        )  # fmt: skip
        self._pending.add(gradient.name)
        update = self._consistency.accept(gradient)
        if not update:
            return self._settle([], only=message.worker)
        return self._settle(self._update(update))

    def _update(self, update: tuple[Gradient, ...]) -> list[Command]:
        weight = sum_of(one.weight for one in update)
        first = update[0].works[0].start
        step, epoch = self.course.step_at(first), first // self.course.samples
        if not 0 < weight < math.inf:
            return self._fail(complaints.no_mean(step, weight))
        stale = [self.version - one.fetched for one in update]
        for one, staleness in zip(update, stale, strict=True):
            self.tally.count(one.name[0], staleness, one.samples, one.seconds)
        self.version += 1
        names = tuple(one.name for one in update)
        samples = sum(one.samples for one in update)
        loss = sum_of(one.loss for one in update) / weight
        commands: list[Command] = [
            Apply(self.version, names, weight, max(stale), step, epoch, samples, loss)
        ]
        self._pending.difference_update(names)
        gone = {worker for worker, _ in names if worker not in self._roster.members}
        commands += [Forget(worker) for worker in sorted(gone)]
        if self.gate.mode == "synchronous":
            # What is out at the version before would not count: others may do it at this one.
            held = self._roster.held.items()
            late = [number for number, one in held if one.work.purpose == "train"]
            self._take_back(late, stale=True)
        return commands + self._end_epochs()

    def _end_epochs(self) -> list[Command]:
        commands: list[Command] = []
        ended, self._supply.ended = self._supply.ended, []
        if not ended and self._exhausted:
            ended = [self._supply.epoch]
        for epoch in ended:
            keep = self._keep(epoch, final=self._exhausted and epoch == ended[-1])
            commands += [keep, *self._validations.begin(keep)]
        return commands

    def _keep(self, epoch: int, final: bool = False) -> Keep:
        number, self._snapshots = self._snapshots, self._snapshots + 1
        return Keep(number, epoch, self.version, self._supply.reached(), final)

    @property
    def _exhausted(self) -> bool:
        limit = self.course.steps
        return self._supply.exhausted or (limit is not None and self.version >= limit)

    def _spoil(self, lease: int, reason: str) -> list[Command]:
        held = self._roster.take(lease)
        if held.work.spoiled_by is not None:
            return self._fail(complaints.spoiled_twice(held, reason))
        self._give_back(lease, replace(held, work=replace(held.work, spoiled_by=held.worker)))
        return [complaints.spoiled(held, reason)]

    def _take_back(self, leases: Iterable[int], stale: bool = False) -> None:
        # Each is put before what was given back earlier: the oldest comes to stand first.
        for lease in sorted(leases, reverse=True):
            self._give_back(lease, self._roster.take(lease, stale))

    def _give_back(self, lease: int, held: Held) -> None:
        if held.work.purpose == "validate":
            self._validations.give_back(held.work)
        else:
            self._consistency.give_back(held.worker, lease, held.work)

    def _fail(self, reason: str) -> list[Command]:
        self.over = True
        return [Fail(reason)]

    def _settle(self, commands: list[Command], only: int | None = None) -> list[Command]:
        """Give what can be given to those that wait, longest first; finish if that was all.

        Args:
            commands: to be carried out before.
            only: the one worker for which something has changed; None: it may be any.
        """
        roster = self._roster
        if self.over:
            return commands
        others = len(roster.ready) > 1
        for worker in list(roster.waiting) if only is None else [only]:
            if worker in roster.waiting:
                commands += self._give(worker, anyone=not others)
        if others and roster.stuck:
            # What is left is barred to some because they spoiled it, and to the others by the
            # gate, which waits for the former: better the same worker once more than nobody.
            for worker in list(roster.waiting):
                commands += self._give(worker, anyone=True)
        if self._exhausted and not self._validations.open:
            self.over = True
            commands.append(Finish())
        return commands

    def _give(self, worker: int, anyone: bool) -> list[Command]:
        number, roster = self._leases, self._roster
        busy = roster.members[worker].busy
        asking = Asking(worker, number, busy, self.version, roster.ready, anyone)
        work = self._validations.choose(asking.may_have) or self._consistency.choose(asking)
        if work is None:
            return []
        self._leases += 1
        lease = self._lease(number, work)
        roster.give(worker, work, lease)
        if not work.again:
            return [Give(worker, lease)]
        fields = {"worker": worker, "lease": number, "epoch": lease.epoch, "step": lease.step}
        return [Give(worker, lease), Note("again", {**fields, "purpose": lease.purpose})]

    def _lease(self, number: int, work: Work) -> Lease:
        if work.purpose == "validate":
            return self._validations.lease(number, work)
        epoch, start = divmod(work.start, self.course.samples)
        step, stop = self.course.step_at(work.start), start + work.stop - work.start
        version = self.gate.least_version(self.version)
        return Lease(number, "train", epoch, step, start, stop, work.share, work.shares, version)
