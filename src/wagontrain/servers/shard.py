"""What a shard does to its numbers, without sockets: put aside, apply, hand out, keep.

Everything that changes the state comes from the coordinator's one order of commits, so two
shards that were given the same pushes and commits are equal to the bit.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from wagontrain.errors import UsageError, WorkerError
from wagontrain.servers import rules
from wagontrain.servers.job import Job
from wagontrain.servers.lending import Values
from wagontrain.servers.messages import Push
from wagontrain.servers.orders import Commit
from wagontrain.servers.parts import ASSIGNED, PARAMETERS, PUSHED, WHOLE, Buffer, region_of
from wagontrain.servers.rules import State
from wagontrain.servers.staging import Gradient, Name, Staging
from wagontrain.servers.tables import KeptRows, Rows, summed
from wagontrain.servers.updating import Updater
from wagontrain.servers.vectors import RULE as VECTORS
from wagontrain.servers.vectors import Vectors

_FETCHED = 4
"""Versions kept of what a worker fetched: more than it has under way."""


@dataclass
class Kept:
    """The state as it was at a snapshot."""

    version: int
    values: Buffer
    states: list[State]
    tables: dict[str, KeptRows]


class Shard:
    """The numbers of one shard.

    Args:
        job: what it holds.

    Raises:
        UsageError: the rule cannot be applied to that.

    Attributes:
        version: commits applied so far.
        values: its parameters and buffers.
        staging: pushes that wait for their commit.
        kept: snapshots by number; they are taken in the order of their numbers.
        newest: number of the last one that was taken, or passed over.
        forgiving: whether pushes may be missing, because it has lost some.
        lost: how many were missing so far.
        numbers: what the operations of the last commit found out.
    """

    def __init__(self, job: Job) -> None:
        self.job = job
        self.version = 0
        self.values = Values(job.parts)
        self.staging = Staging(job.index, job.parts, job.most)
        self.kept: dict[int, Kept] = {}
        self.newest = -1
        self.forgiving = False
        self.lost = 0
        self.numbers: list[float] = []
        if job.tables and job.rule == "dc-asgd":
            raise UsageError(
                "dc-asgd keeps what each worker fetched, but not of rows of tables: use "
                "staleness-aware, or keep the tables in the model"
            )
        members = [part.group for part in job.parts if isinstance(part.group, int)]
        for group in (*members, *(table.group for table in job.tables)):
            if not 0 <= group < len(job.groups):
                raise UsageError(f"there is no group {group} of parameters, of {len(job.groups)}")
        self.vectors = Vectors(job.parts) if job.rule == VECTORS else None
        self.updater: Updater | Vectors = self.vectors or Updater(
            job.rule, job.optimizer, job.groups, self.values.parameters, members
        )
        self.tables = {}
        for table in job.tables:
            rule = rules.rule_of_tables(job.rule, job.optimizer, job.groups[table.group])
            self.tables[table.name] = Rows(table, rule, job.index, job.shards, job.seed)
        self._fetched: dict[int, dict[int, list[Tensor]]] = {}

    @property
    def _rule(self) -> Updater:
        assert isinstance(self.updater, Updater)
        return self.updater

    def table(self, name: str) -> Rows:
        """A table's rows.

        Raises:
            WorkerError: there is none of that name.
        """
        if name not in self.tables:
            raise WorkerError(f"there is no table {name!r} on the shards")
        return self.tables[name]

    # Pushes

    def stage(self, push: Push, slot: Buffer, rows: Mapping[str, tuple[Tensor, Tensor]]) -> None:
        """Put a gradient aside.

        Args:
            push: its header; `staging.knows` must have said no.
            slot: from `staging.slot`, filled.
            rows: table -> ids and gradients of its rows.

        Raises:
            WorkerError: a number is not finite, or a row is not here; the slot is back then.
        """
        wide = {name: (ids.long(), gradients) for name, (ids, gradients) in rows.items()}
        try:
            for name, (ids, _) in wide.items():
                self.table(name).require(ids)
        except WorkerError:
            self.staging.back(slot)
            raise
        self.staging.stage(push, slot, wide)

    def forget(self, worker: int, sequences: Sequence[int] | None) -> None:
        """Pushes that will never be applied, also if they come later; None: all of the worker."""
        self.staging.forget(worker, sequences)
        if sequences is None:
            self._fetched.pop(worker, None)

    # Commits

    def norm(self, pushes: Sequence[Name], divide: float) -> float:
        """Sum of squares of the gradient that these pushes make together.

        Raises:
            WorkerError: one of them is not here.
        """
        if self.forgiving and self.staging.missing(pushes):
            return 0.0  # the commit changes nothing here
        gradients = self.staging.get(pushes, "a norm")
        total = 0.0
        for runs in zip(*(gradient.buffer.runs for gradient in gradients), strict=True):
            together = runs[0]
            for other in runs[1:]:
                together = together + other
            total += _squares(together)
        for _, _, rows in self._touched(gradients):
            total += _squares(rows)
        return total / divide**2

    def commit(self, commit: Commit) -> bool:
        """Apply pushes as one update; False if that was done before.

        Raises:
            WorkerError: a push is missing, or a commit before this one; nothing was changed. Or
                operations cannot be carried out.
        """
        if commit.version <= self.version:
            return False
        if commit.version != self.version + 1:
            raise WorkerError(
                f"shard {self.job.index} has {self.version} commits and was given number "
                f"{commit.version}: those between are missing"
            )
        lost = len(self.staging.missing(commit.pushes)) if self.forgiving else 0
        self.lost += lost
        pushes = () if lost else commit.pushes
        gradients = self.staging.get(pushes, f"commit {commit.version}")
        if not 0 < commit.divide < math.inf or not math.isfinite(commit.factor):
            raise WorkerError(
                f"commit {commit.version} divides by {commit.divide} and multiplies by "
                f"{commit.factor}: no update is made of that"
            )
        self.updater.refresh(commit.groups)
        self.numbers = []
        if self.vectors is not None:
            self._operate(self.vectors, commit, gradients)
        elif commit.operations:
            raise WorkerError(f"shard {self.job.index} has no vectors to operate on")
        elif gradients:
            if self.values.make_way():
                self._rule.move(self.values.parameters)
            self._apply_rows(commit, gradients)
            self._apply(commit, gradients)
            self._assign(gradients)
        self.staging.settle(commit.pushes)
        self.version = commit.version
        return True

    def _operate(self, vectors: Vectors, commit: Commit, gradients: Sequence[Gradient]) -> None:
        total = _sum(commit, gradients) if gradients else None
        if vectors.moves(commit.operations):
            self.values.make_way()
        self.numbers = vectors.run(commit.operations, self.values.now, total)
        if gradients:
            self._assign(gradients)

    def _apply(self, commit: Commit, gradients: Sequence[Gradient]) -> None:
        total = _sum(commit, gradients)
        missing = set(gradients[0].without).intersection(*(each.without for each in gradients))
        changes = [
            None if part.name in missing else view
            for part, view in zip(total.parts, total.views, strict=True)
            if region_of(part.group) == PARAMETERS
        ]
        if self.job.rule == "dc-asgd":
            self._compensate(commit, changes)
        self._rule.apply(changes, commit.staleness)

    def _apply_rows(self, commit: Commit, gradients: Sequence[Gradient]) -> None:
        for table, ids, total in self._touched(gradients):
            _scale(total, commit)
            settings = self._rule.groups[table.table.group]
            if self.job.rule == "staleness-aware":
                settings = rules.delayed(settings, commit.staleness)
            for kept in self.kept.values():
                kept.tables[table.table.name].before(ids)
            table.update(ids, total, settings)

    def _touched(self, gradients: Sequence[Gradient]) -> Iterator[tuple[Rows, Tensor, Tensor]]:
        """Each table's ids and summed gradients."""
        for name, rows in self.tables.items():
            pushed = [gradient.rows[name] for gradient in gradients if name in gradient.rows]
            if pushed:
                yield rows, *summed([each[0] for each in pushed], [each[1] for each in pushed])

    def _assign(self, gradients: Sequence[Gradient]) -> None:
        """Buffers take the value pushed: the mean of several, or the last if they are counts."""
        now = self.values.now
        for at, part in enumerate(now.parts):
            if region_of(part.group) == ASSIGNED:
                pushed = [gradient.buffer.views[at] for gradient in gradients]
                if len(pushed) > 1 and now.views[at].is_floating_point():
                    now.views[at].copy_(torch.stack(pushed).mean(0))
                else:
                    now.views[at].copy_(pushed[-1])

    def _compensate(self, commit: Commit, changes: Sequence[Tensor | None]) -> None:
        """Only a single push has one place where its gradient was taken."""
        if len(commit.pushes) != 1:
            return
        worker, taken_at = commit.pushes[0][0], commit.version - 1 - commit.staleness
        own = self._fetched.get(worker, {})
        if taken_at not in own:  # fetched before this process took the place of another
            return
        strength = float(self.job.settings.get("strength", 0.04))
        for change, value, then in zip(changes, self._rule.values, own[taken_at], strict=True):
            if change is not None:
                rules.compensate(change, value, then, strength)
        self._fetched[worker] = {at: own[at] for at in own if at >= taken_at}

    # Values

    def pull(
        self, worker: int = -1, whole: bool = False, snapshot: int | None = None
    ) -> tuple[int, list[Tensor]]:
        """The version, and this shard's part of the values, now or at a snapshot.

        They share memory: who needs them beyond the next commit has to `lend` them from `values`.

        Raises:
            WorkerError: there is no such snapshot.
        """
        regions = WHOLE if whole else PUSHED
        if snapshot is not None:
            kept = self.snapshot(snapshot)
            return kept.version, kept.values.regions[:regions]
        if self.job.rule == "dc-asgd" and worker >= 0:
            self._note(worker)
        return self.version, self.values.now.regions[:regions]

    def _note(self, worker: int) -> None:
        """Keep what a worker fetches: one copy for all that fetch the same version."""
        held = (fetched.get(self.version) for fetched in self._fetched.values())
        copies = next((each for each in held if each is not None), None)
        own = self._fetched.setdefault(worker, {})
        own[self.version] = copies or [value.clone() for value in self._rule.values]
        while len(own) > _FETCHED:
            del own[min(own)]

    def pull_rows(
        self, rows: Mapping[str, Tensor], snapshot: int | None = None
    ) -> tuple[int, list[Tensor]]:
        """The version, and rows of tables by id, as copies.

        Raises:
            WorkerError: there is no such table, row or snapshot.
        """
        kept = None if snapshot is None else self.snapshot(snapshot)
        found = []
        for name, ids in rows.items():
            wide = ids.long()
            table = self.table(name)
            table.require(wide)
            found.append((kept.tables[name] if kept else table).read(wide))
        return (kept or self).version, found

    # Snapshots

    def keep(self, number: int) -> None:
        """Take a snapshot."""
        states = [
            {key: value.clone() for key, value in state.items()} for state in self.updater.states()
        ]
        tables = {name: KeptRows(rows) for name, rows in self.tables.items()}
        self.newest = max(self.newest, number)
        self.kept[number] = Kept(self.version, self.values.copy(), states, tables)

    def release(self, number: int) -> None:
        """A snapshot is needed no longer; one that was not taken will not be."""
        self.newest = max(self.newest, number)
        self.kept.pop(number, None)

    def snapshot(self, number: int) -> Kept:
        """A snapshot.

        Raises:
            WorkerError: there is none of that number.
        """
        if number not in self.kept:
            raise WorkerError(f"shard {self.job.index} has no snapshot {number}")
        return self.kept[number]


def _sum(commit: Commit, gradients: Sequence[Gradient]) -> Buffer:
    """The gradient that pushes make together, divided and multiplied as the commit says."""
    total = gradients[0].buffer  # is free afterwards, so the sum may be made in it
    for other in gradients[1:]:
        for own, more in zip(total.runs, other.buffer.runs, strict=True):
            own.add_(more)
    for run in total.runs:
        _scale(run, commit)
    return total


def _scale(gradient: Tensor, commit: Commit) -> None:
    if commit.divide != 1:
        gradient.div_(commit.divide)
    if commit.factor != 1:
        gradient.mul_(commit.factor)


def _squares(tensor: Tensor) -> float:
    return float(torch.linalg.vector_norm(tensor, dtype=torch.float64)) ** 2
