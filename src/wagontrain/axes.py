"""Axes of the mesh: ranks arranged as rows and columns, with a process group along each.

What a strategy of degree d leaves of N ranks is data parallel: N / d rows of d ranks that lie
side by side. Ranks of a row see the same samples and divide the model; ranks of a column hold
the same part of it and divide the samples.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from torch import Tensor

from wagontrain.errors import UsageError
from wagontrain.transport import Context


@dataclass(frozen=True)
class Axis:
    """The ranks along one axis, as one of them sees it.

    Args:
        ranks: their numbers in the world.
        index: this rank's place among them.
        group: to exchange over; None where it is alone.
        side: the same for figures, which must not queue behind gradients.
    """

    ranks: tuple[int, ...] = (0,)
    index: int = 0
    group: dist.ProcessGroup | None = None
    side: dist.ProcessGroup | None = None

    @property
    def size(self) -> int:
        """How many they are."""
        return len(self.ranks)


@dataclass(frozen=True)
class Axes:
    """A mesh of two axes: `data`, over which samples are divided, and `model`."""

    data: Axis
    model: Axis
    made: tuple[Any, ...] = ()

    def close(self) -> None:
        """Let go of the groups that were made for this."""
        for group in self.made:
            dist.destroy_process_group(group)


def whole_world(context: Context) -> Axis:
    """All ranks as one axis."""
    world = context.world
    return Axis(tuple(range(world.size)), world.rank, context.group, context.side)


def check_degree(degree: int | None, size: int) -> None:
    """Refuse a degree that does not divide the world.

    Raises:
        UsageError: the message says which ones do.
    """
    if degree is not None and (degree < 1 or size % degree):
        fit = ", ".join(str(each) for each in range(1, size + 1) if size % each == 0)
        raise UsageError(f"degree {degree} does not divide {size} workers: give one of {fit}")


def lay_out(context: Context, degree: int) -> Axes:
    """Arrange the world in rows of `degree` ranks. Every rank has to call this."""
    size, rank = context.world.size, context.world.rank
    rows = [tuple(range(start, start + degree)) for start in range(0, size, degree)]
    columns = [tuple(range(start, size, degree)) for start in range(degree)]
    made: list[Any] = []

    def axis(lines: list[tuple[int, ...]]) -> Axis:
        own = next(line for line in lines if rank in line)
        if len(own) == 1:
            return Axis((rank,))
        if len(own) == size:
            return Axis(own, rank, context.group, context.side)
        groups = {line: (dist.new_group(list(line)), dist.new_group(list(line))) for line in lines}
        made.extend(groups[own])
        return Axis(own, own.index(rank), *groups[own])

    return Axes(axis(columns), axis(rows), tuple(made))


def exchange(
    axis: Axis, outgoing: Sequence[Tensor], incoming: Sequence[tuple[int, ...] | Tensor]
) -> list[Tensor]:
    """Give every rank of the axis its tensor; returns theirs, in the order of ranks.

    Args:
        axis: the ranks.
        outgoing: one tensor for each rank.
        incoming: shape of what each rank sends, or a contiguous tensor to put it into.
    """
    return start_exchange(axis, outgoing, incoming)()


def start_exchange(
    axis: Axis, outgoing: Sequence[Tensor], incoming: Sequence[tuple[int, ...] | Tensor]
) -> Callable[[], list[Tensor]]:
    """Begin an `exchange`; call the result to wait for it and to have the tensors.

    Straight from each rank to each other, in any sizes: a ring would need equal ones.
    """
    own = axis.index
    parts = [
        shape if isinstance(shape, Tensor) else outgoing[own].new_empty(shape) for shape in incoming
    ]
    parts[own] = outgoing[own]
    operations = []
    for step in range(1, axis.size):
        to, source = (own + step) % axis.size, (own - step) % axis.size
        if outgoing[to].numel():
            part = outgoing[to].contiguous()
            operations.append(dist.P2POp(dist.isend, part, axis.ranks[to], axis.group))
        if parts[source].numel():
            operations.append(dist.P2POp(dist.irecv, parts[source], axis.ranks[source], axis.group))
    works = dist.batch_isend_irecv(operations) if operations else []

    def finish() -> list[Tensor]:
        for work in works:
            work.wait()
        operations.clear()  # their tensors had to live until now
        return parts

    return finish
