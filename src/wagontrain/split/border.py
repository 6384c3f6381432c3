"""How activations come to a split layer and go from it, forward and backward.

A layer split by columns needs all samples with all their features, and has some features of the
result; one split by rows needs some features, and has a part of a sum. Two kinds of border:

    Replicated   every rank has all samples: DistBelief's split weights
    Shards       every rank has its own samples, and gives them back: the hybrid's "one weird
                 trick" (Krizhevsky 2014, section 4, scheme (a))

               gather              leave_columns        enter_rows           total
    Replicated nothing             all-gather features  own features         all-reduce
    Shards     all-gather samples  all-to-all           all-to-all           reduce-scatter

Backward is the reverse of each: a sum becomes a copy, and a copy a sum. Dim 0 of tensors here is
samples (rows), dim 1 features or channels; others may follow.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from wagontrain.axes import Axis, exchange, start_exchange
from wagontrain.mesh import even_shares, ranges


@dataclass(frozen=True)
class Coming:
    """A tensor on its way; `get` waits for it."""

    get: Callable[[], Tensor]


class Border(ABC):
    """The border of split layers along an axis.

    Args:
        axis: the ranks that the weights are divided over.
    """

    def __init__(self, axis: Axis) -> None:
        self.axis = axis

    def opened(self, rows: int) -> Border:
        """The border for one pass of a layer to which this rank brings so many rows."""
        return self

    @abstractmethod
    def gather(self, x: Tensor) -> Tensor:
        """All samples: [own rows, features] -> [all rows, features]."""

    @abstractmethod
    def return_gradient(self, gradient: Tensor) -> Coming:
        """The reverse of `gather`: each rank's part of a gradient is added up."""

    @abstractmethod
    def leave_columns(self, y: Tensor, widths: Sequence[int]) -> Tensor:
        """[all rows, own features] -> [own rows, all features]."""

    @abstractmethod
    def enter_rows(self, x: Tensor, widths: Sequence[int]) -> Tensor:
        """[own rows, all features] -> [all rows, own features]: the reverse of `leave_columns`."""

    @abstractmethod
    def total(self, y: Tensor) -> Tensor:
        """Each rank's part of a sum added up: [all rows, features] -> [own rows, features]."""

    @abstractmethod
    def spread(self, gradient: Tensor) -> Tensor:
        """The reverse of `total`: [own rows, features] -> [all rows, features]."""


class Replicated(Border):
    """Every rank has all samples."""

    def gather(self, x: Tensor) -> Tensor:
        return x

    def return_gradient(self, gradient: Tensor) -> Coming:
        work: Any = dist.all_reduce(gradient, group=self.axis.group, async_op=True)

        def get() -> Tensor:
            work.wait()
            return gradient

        return Coming(get)

    def leave_columns(self, y: Tensor, widths: Sequence[int]) -> Tensor:
        shapes = [(y.shape[0], width, *y.shape[2:]) for width in widths]
        return torch.cat(exchange(self.axis, [y.contiguous()] * len(widths), shapes), 1)

    def enter_rows(self, x: Tensor, widths: Sequence[int]) -> Tensor:
        start = sum(widths[: self.axis.index])
        return x.narrow(1, start, widths[self.axis.index]).contiguous()

    def total(self, y: Tensor) -> Tensor:
        # Nothing can be computed meanwhile. A ring takes 2 (N - 1) hops, and stands still when any
        # host does; straight from each rank to each other it is two, with the same bytes.
        shares = even_shares(len(y), self.axis.size)
        own = shares[self.axis.index]
        mine = _added(
            exchange(self.axis, list(y.split(shares)), [(own, *y.shape[1:])] * len(shares))
        )
        result = list(y.split(shares))
        result[self.axis.index].copy_(mine)
        exchange(self.axis, [mine] * self.axis.size, result)
        return y

    def spread(self, gradient: Tensor) -> Tensor:
        return gradient


class Shards(Border):
    """Every rank has its own samples.

    Args:
        axis: the ranks that the weights are divided over.
        chunks: pieces in which each rank's samples travel: while one is computed on, the next
            is on its way (Krizhevsky 2014, scheme (c)).
        rows: how many rows each rank has, in this pass.
    """

    def __init__(self, axis: Axis, chunks: int = 1, rows: Sequence[int] = ()) -> None:
        super().__init__(axis)
        self.chunks = chunks
        self.rows = list(rows)

    def opened(self, rows: int) -> Border:
        """With everybody's number of rows, which follow from no rule: sequences differ."""
        device = torch.device("cpu")
        if dist.get_backend(self.axis.side) == "nccl":
            device = torch.device("cuda", torch.cuda.current_device())
        own = torch.tensor([rows], device=device)
        found = [torch.empty_like(own) for _ in self.axis.ranks]
        dist.all_gather(found, own, group=self.axis.side)
        return Shards(self.axis, self.chunks, [int(each) for each in found])

    @property
    def pieces(self) -> list[Tensor]:
        """Rows of each chunk, among the rows of all ranks: every rank's part of it."""
        found: list[list[Tensor]] = [[] for _ in range(self.chunks)]
        for whole in ranges(self.rows):
            for part, piece in zip(
                ranges(even_shares(len(whole), self.chunks), whole.start), found, strict=True
            ):
                piece.append(torch.arange(part.start, part.stop))
        return [torch.cat(parts) for parts in found]

    def gather_chunks(self, x: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Chunk by chunk, (which of all rows, those rows), all of them on their way at once."""
        sizes = [even_shares(rows, self.chunks) for rows in self.rows]
        coming = [
            start_exchange(
                self.axis,
                [part.contiguous()] * self.axis.size,
                [(each[number], *x.shape[1:]) for each in sizes],
            )
            for number, part in enumerate(x.split(sizes[self.axis.index]))
        ]
        for places, parts in zip(self.pieces, coming, strict=True):
            yield places.to(x.device), torch.cat(parts())

    def return_chunk(self, number: int, gradient: Tensor) -> Coming:
        """The reverse for one chunk: [rows of the chunk, features] -> [own rows of it, ...]."""
        sizes = [even_shares(rows, self.chunks)[number] for rows in self.rows]
        own = sizes[self.axis.index]
        coming = start_exchange(
            self.axis, list(gradient.split(sizes)), [(own, *gradient.shape[1:])] * self.axis.size
        )
        return Coming(lambda: _added(coming()))

    def gather(self, x: Tensor) -> Tensor:
        parts = exchange(
            self.axis,
            [x.contiguous()] * self.axis.size,
            [(rows, *x.shape[1:]) for rows in self.rows],
        )
        return torch.cat(parts)

    def return_gradient(self, gradient: Tensor) -> Coming:
        own = self.rows[self.axis.index]
        coming = start_exchange(
            self.axis,
            list(gradient.split(self.rows)),
            [(own, *gradient.shape[1:])] * self.axis.size,
        )
        return Coming(lambda: _added(coming()))

    def leave_columns(self, y: Tensor, widths: Sequence[int]) -> Tensor:
        own = self.rows[self.axis.index]
        shapes = [(own, width, *y.shape[2:]) for width in widths]
        return torch.cat(exchange(self.axis, list(y.split(self.rows)), shapes), 1)

    def enter_rows(self, x: Tensor, widths: Sequence[int]) -> Tensor:
        width = widths[self.axis.index]
        parts = exchange(
            self.axis,
            [part.contiguous() for part in x.split(list(widths), 1)],
            [(rows, width, *x.shape[2:]) for rows in self.rows],
        )
        return torch.cat(parts)

    def total(self, y: Tensor) -> Tensor:
        return self.return_gradient(y).get()

    def spread(self, gradient: Tensor) -> Tensor:
        return self.gather(gradient)


def _added(parts: Sequence[Tensor]) -> Tensor:
    result = parts[0].clone()
    for part in parts[1:]:
        result += part
    return result


class LeaveColumns(torch.autograd.Function):
    """`Border.leave_columns`, with its reverse for gradients."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, border: Border, widths: Sequence[int]) -> Tensor:
        ctx.border, ctx.widths = border, widths
        return border.leave_columns(y, widths)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return ctx.border.enter_rows(gradient, ctx.widths), None, None


class EnterRows(torch.autograd.Function):
    """`Border.enter_rows`, with its reverse for gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, border: Border, widths: Sequence[int]) -> Tensor:
        ctx.border, ctx.widths = border, widths
        return border.enter_rows(x, widths)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return ctx.border.leave_columns(gradient.contiguous(), ctx.widths), None, None


class Gather(torch.autograd.Function):
    """`Border.gather`, with its reverse for gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, border: Border) -> Tensor:
        ctx.border = border
        return border.gather(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return ctx.border.return_gradient(gradient.clone()).get(), None


class Total(torch.autograd.Function):
    """`Border.total`, with its reverse for gradients."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, border: Border) -> Tensor:
        ctx.border = border
        return border.total(y.clone())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return ctx.border.spread(gradient), None
