"""A shard's part of named vectors, and the operations on them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from wagontrain.errors import WorkerError
from wagontrain.servers import operations
from wagontrain.servers.operations import Operation
from wagontrain.servers.parts import PARAMETERS as REGION
from wagontrain.servers.parts import Buffer, Part, region_of
from wagontrain.servers.rules import State
from wagontrain.servers.sums import sum_of

RULE = "vectors"
"""The name under which a shard's job asks for this instead of an update rule."""

_CHUNK = 1 << 14
"""Numbers of each vector that products are formed of at a time: what fits a core's cache."""


class Vectors:
    """The vectors of one shard, beside its parameters.

    In the place of an `Updater`: nothing here is changed by gradients, only by operations.

    Args:
        parts: of the shard.
    """

    def __init__(self, parts: Sequence[Part]) -> None:
        self.parts = [part for part in parts if region_of(part.group) == REGION]
        self.groups: list[dict[str, Any]] = []
        self._held: dict[str, Buffer] = {}
        self._spare: list[Buffer] = []

    @property
    def values(self) -> list[Part]:
        """The parts that have state."""
        return self.parts

    @staticmethod
    def moves(commands: Sequence[Operation]) -> bool:
        """Whether they change the parameters."""
        made = (each.target for each in commands if isinstance(each, operations.Combine))
        return operations.PARAMETERS in made

    def run(
        self, commands: Sequence[Operation], values: Buffer, gradient: Buffer | None
    ) -> list[float]:
        """Carry operations out in their order; the numbers that they find out.

        Args:
            commands: the operations.
            values: the parameters, under the name `operations.PARAMETERS`.
            gradient: what `Gradient` takes.

        Raises:
            WorkerError: there is no such vector, or a number is not finite.
        """
        numbers: list[float] = []
        for each in commands:
            match each:
                case operations.Gradient(target):
                    if gradient is None:
                        raise WorkerError("a gradient is asked for, and none came with it")
                    self._combine(target, [(1.0, gradient.runs)], values)
                case operations.Combine(target, terms):
                    runs = [(factor, self._runs(name, values)) for factor, name in terms]
                    if target in [name for _, name in terms]:
                        raise WorkerError(f"vector {target!r} cannot be made of itself")
                    self._combine(target, runs, values)
                case operations.Products(left, right):
                    rows = [self._runs(name, values) for name in left]
                    columns = [self._runs(name, values) for name in right]
                    numbers += products(rows, columns).flatten().tolist()
                case operations.Largest(name):
                    numbers.append(_norm(self._runs(name, values), math.inf))
                case operations.Absolute(name):
                    numbers.append(_norm(self._runs(name, values), 1))
                case operations.Rename(old, new):
                    self._let_go(new)
                    self._held[new] = self._take(old)
                case operations.Discard(names):
                    for name in names:
                        self._let_go(name)
        if not all(map(math.isfinite, numbers)):
            raise WorkerError("a product of vectors is not finite: the numbers are too large")
        return numbers

    def _runs(self, name: str, values: Buffer) -> list[Tensor]:
        if name == operations.PARAMETERS:
            return values.runs
        if name not in self._held:
            if self.parts:
                raise WorkerError(f"there is no vector {name!r} here")
            return []  # with nothing to hold, names are not kept either
        return self._held[name].runs

    def _combine(
        self, target: str, terms: Sequence[tuple[float, list[Tensor]]], values: Buffer
    ) -> None:
        if target == operations.PARAMETERS:
            own = values.runs
        else:
            if target not in self._held:
                self._held[target] = self._spare.pop() if self._spare else self._new()
            own = self._held[target].runs
        (factor, first), *others = terms
        for at, run in enumerate(own):
            if factor == 1:
                run.copy_(first[at])
            else:
                torch.mul(first[at], factor, out=run)
            for more, runs in others:
                run.add_(runs[at], alpha=more)

    def _new(self) -> Buffer:
        return Buffer(self.parts, REGION + 1)

    def _take(self, name: str) -> Buffer:
        if name not in self._held:
            if self.parts:
                raise WorkerError(f"there is no vector {name!r} here")
            return self._new()
        return self._held.pop(name)

    def _let_go(self, name: str) -> None:
        if name in self._held:
            self._spare.append(self._held.pop(name))

    # As an `Updater` has it

    def refresh(self, groups: Sequence[Mapping[str, Any]]) -> None:
        """Settings of groups mean nothing to vectors."""

    def states(self) -> list[State]:
        """Each part of every vector, sharing memory."""
        return [
            {name: buffer.views[at] for name, buffer in self._held.items()}
            for at in range(len(self.parts))
        ]

    def restore(self, states: Sequence[State]) -> None:
        """Take up the vectors of another of the same parts."""
        self._held = {}
        for name in states[0] if states else ():
            buffer = self._held[name] = self._new()
            for view, state in zip(buffer.views, states, strict=True):
                view.copy_(state[name])


def products(left: Sequence[Sequence[Tensor]], right: Sequence[Sequence[Tensor]]) -> Tensor:
    """Scalar products of vectors, each a list of flat tensors: [left, right], in float64.

    Every number is read once for all products that it is part of.
    """
    total = torch.zeros(len(left), len(right), dtype=torch.float64)
    for at, run in enumerate(left[0]):
        for start in range(0, len(run), _CHUNK):
            rows, columns = (
                torch.stack([vector[at][start : start + _CHUNK] for vector in side]).double()
                for side in (left, right)
            )
            total.addmm_(rows, columns.T)
    return total


def _norm(runs: Sequence[Tensor], order: float) -> float:
    norms = [float(torch.linalg.vector_norm(run, order, dtype=torch.float64)) for run in runs]
    if not norms:
        return 0.0
    return max(norms) if order == math.inf else sum_of(norms)
