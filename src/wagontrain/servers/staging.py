"""Pushes that were put aside, and which are over: each counts once, whatever comes twice."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from wagontrain.errors import WorkerError
from wagontrain.servers.messages import Push
from wagontrain.servers.parts import ASSIGNED, PUSHED, Buffer, Part, region_of

GIVEN_UP = "was given up: say hello again"
"""How a refusal ends that is for a worker which takes part no longer."""

Name = tuple[int, int]
"""Worker and sequence of a push."""


@dataclass
class Gradient:
    """A push that is put aside.

    Args:
        buffer: the shard's part of the gradient, and of what is assigned to.
        without: parameters that got none.
        rows: table -> ids, int64, and gradients of its rows.
        mirrored: whether the mirror has it too.
    """

    buffer: Buffer
    without: tuple[str, ...] = ()
    rows: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    mirrored: bool = False


class Settled:
    """Sequences of one worker whose pushes are over: applied, or never to be."""

    def __init__(self, below: int = 0, more: Sequence[int] = ()) -> None:
        self.below = below
        self.more = set(more)

    def __contains__(self, sequence: int) -> bool:
        return sequence < self.below or sequence in self.more

    def add(self, sequence: int) -> None:
        """One more."""
        if sequence not in self:
            self.more.add(sequence)
        while self.below in self.more:
            self.more.remove(self.below)
            self.below += 1


class Staging:
    """The pushes of one shard.

    Args:
        index: of the shard.
        parts: its own.
        most: pushes of one worker that may be put aside at a time.
    """

    def __init__(self, index: int, parts: Sequence[Part], most: int) -> None:
        self.index = index
        self.parts = parts
        self.most = most
        self.held: dict[Name, Gradient] = {}
        self.settled: dict[int, Settled] = {}
        self.gone: set[int] = set()
        self._spare: list[Buffer] = []

    def slot(self) -> Buffer:
        """Memory to receive a push into; give it to `stage` or `back`."""
        return self._spare.pop() if self._spare else Buffer(self.parts, PUSHED)

    def back(self, slot: Buffer) -> None:
        """A slot is needed no longer."""
        self._spare.append(slot)

    def knows(self, push: Push) -> bool:
        """Whether a push is here already, or is over.

        Raises:
            WorkerError: it is none for this shard, or its worker may not push.
        """
        worker, sequence = push.worker, push.sequence
        if (worker, sequence) in self.held or sequence in self.settled.get(worker, ()):
            return True
        if worker in self.gone:
            raise WorkerError(f"worker {worker} {GIVEN_UP}")
        if sequence < 0 or worker < 0:
            raise WorkerError(f"push {sequence} of worker {worker} has no proper name")
        waiting = sum(owner == worker for owner, _ in self.held)
        if waiting >= self.most:
            raise WorkerError(
                f"{waiting} pushes of worker {worker} wait to be applied: push no more before"
            )
        return False

    def stage(self, push: Push, slot: Buffer, rows: Mapping[str, tuple[Tensor, Tensor]]) -> None:
        """Put a gradient aside.

        Args:
            push: its header; `knows` must have said no.
            slot: from `slot`, filled.
            rows: table -> ids and gradients of its rows.

        Raises:
            WorkerError: a number is not finite; the slot is back then.
        """
        try:
            if not all(map(finite, slot.runs)):
                self._name_bad(slot)
            for part, view in zip(slot.parts, slot.views, strict=True):
                if region_of(part.group) == ASSIGNED and not finite(view):
                    self._name_bad(slot)
            for name, (_, gradients) in rows.items():
                if not finite(gradients):
                    raise WorkerError(f"the gradient of table {name!r} is not finite")
        except WorkerError:
            self.back(slot)
            raise
        self.held[push.worker, push.sequence] = Gradient(slot, push.without, dict(rows))

    def _name_bad(self, slot: Buffer) -> None:
        for part, view in zip(slot.parts, slot.views, strict=True):
            if not finite(view):
                kind = "gradient" if isinstance(part.group, int) else "value"
                raise WorkerError(f"the {kind} of {part.name!r} is not finite")

    def missing(self, pushes: Sequence[Name]) -> list[Name]:
        """Those of them that are not here."""
        return [name for name in pushes if name not in self.held]

    def get(self, pushes: Sequence[Name], what: str) -> list[Gradient]:
        """What was pushed.

        Raises:
            WorkerError: a push is not here.
        """
        for worker, sequence in self.missing(pushes):
            raise WorkerError(
                f"{what} needs push {sequence} of worker {worker}, which shard {self.index} does "
                "not have"
            )
        return [self.held[name] for name in pushes]

    def settle(self, pushes: Collection[Name]) -> None:
        """These are over."""
        for worker, sequence in pushes:
            gradient = self.held.pop((worker, sequence), None)
            if gradient is not None:
                self.back(gradient.buffer)
            self.settled.setdefault(worker, Settled()).add(sequence)

    def forget(self, worker: int, sequences: Sequence[int] | None) -> None:
        """These will never be applied, also if they come later; None: all of the worker."""
        if sequences is None:
            self.gone.add(worker)
            sequences = [sequence for owner, sequence in self.held if owner == worker]
        self.settle([(worker, sequence) for sequence in sequences])


def finite(tensor: Tensor) -> bool:
    """Whether all numbers are. A sum shows it in one go, unless it is too large itself."""
    if not tensor.is_floating_point() or math.isfinite(float(tensor.sum())):
        return True
    return bool(tensor.isfinite().all())
