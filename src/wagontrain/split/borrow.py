"""Rows of an image on their way between ranks, and their gradients on the way back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from wagontrain.axes import Axis, exchange, start_exchange
from wagontrain.split.halo import Halo


class Widen(torch.autograd.Function):
    """The rows that this rank has -> those that it needs, padding included."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis, halo: Halo, fill: float) -> Tensor:
        ctx.axis, ctx.halo = axis, halo
        own, needed = halo.owned[axis.index], halo.needed[axis.index]
        coming = _start(axis, x, own, halo.travelling)
        wide = x.new_full((*x.shape[:2], len(needed), x.shape[3]), fill)
        for source, part in enumerate(coming()):
            rows_of(wide, halo.travelling(source, axis.index), needed).copy_(part)
        return wide

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Any:
        axis, halo = ctx.axis, ctx.halo
        own, needed = halo.owned[axis.index], halo.needed[axis.index]
        coming = _start(axis, gradient, needed, halo.returning)
        result = gradient.new_zeros((*gradient.shape[:2], len(own), gradient.shape[3]))
        for to, part in enumerate(coming()):
            rows_of(result, halo.travelling(axis.index, to), own).add_(part)
        return result, None, None, None


def _start(
    axis: Axis, x: Tensor, held: range, travelling: Callable[[int, int], range]
) -> Callable[[], list[Tensor]]:
    """Begin to send everybody their rows of `x`, which holds the rows `held`."""
    ranks, index = range(axis.size), axis.index
    return start_exchange(
        axis,
        [rows_of(x, travelling(index, to), held) for to in ranks],
        [(*x.shape[:2], len(travelling(source, index)), x.shape[3]) for source in ranks],
    )


def rows_of(x: Tensor, wanted: range, held: range) -> Tensor:
    """A view of the wanted rows of a tensor that holds the rows `held`."""
    return x.narrow(2, wanted.start - held.start if len(wanted) else 0, len(wanted))


class Join(torch.autograd.Function):
    """This rank's rows -> all rows, on every rank."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, axis: Axis, owned: Sequence[range]) -> Tensor:
        ctx.own = owned[axis.index]
        shapes = [(*y.shape[:2], len(rows), y.shape[3]) for rows in owned]
        return torch.cat(exchange(axis, [y.contiguous()] * axis.size, shapes), 2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return gradient.narrow(2, ctx.own.start, len(ctx.own)).contiguous(), None, None
