"""Embedding tables of which every rank holds some rows.

With replicated samples every rank looks up what it has, zero elsewhere, and the results are
added. With shards each rank asks the others for the rows that its samples need, each row once,
and sends the gradients of those rows back: a table may then be larger than any rank's memory,
and what travels depends on the batch and not on the table.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from wagontrain.axes import Axis, exchange
from wagontrain.split.border import Border, Total


class SharedLookup:
    """Stands in for `nn.Embedding.forward` where all ranks have all samples.

    Args:
        layer: the layer, whose weight is this rank's rows already.
        border: a `Replicated` one.
        rows: the rows of each rank.
        padding: the row that gets no gradient, in the whole table.
    """

    def __init__(
        self, layer: Any, border: Border, rows: Sequence[range], padding: int | None
    ) -> None:
        self.layer, self.border, self.padding = layer, border, padding
        self.own = rows[border.axis.index]

    def __call__(self, codes: Tensor) -> Tensor:
        """int64 [...] -> [..., width]."""
        here = (codes >= self.own.start) & (codes < self.own.stop)
        weight = self.layer.weight
        if not len(self.own):
            found = weight.new_zeros(*codes.shape, weight.shape[1]) + weight.sum() * 0
        else:
            mine = torch.where(here, codes - self.own.start, 0)
            kept = here if self.padding is None else here & (codes != self.padding)
            looked_up = F.embedding(mine, weight, sparse=self.layer.sparse)
            # A row of padding is read, and gets no gradient.
            silent = F.embedding(mine, weight.detach())
            found = torch.where(kept.unsqueeze(-1), looked_up, silent) * here.unsqueeze(-1)
        result: Tensor = Total.apply(found.view(codes.numel(), weight.shape[1]), self.border)
        return result.view(*codes.shape, weight.shape[1])


class Fetched(torch.autograd.Function):
    """Rows of a divided table: `int64 [n]`, sorted and each once -> `[n, width]`."""

    @staticmethod
    def forward(
        ctx: Any, codes: Tensor, weight: Tensor, axis: Axis, starts: Tensor, sparse: bool
    ) -> Tensor:
        borders = torch.searchsorted(codes, starts)
        wanted = list(codes.split(borders.diff().tolist()))
        counts = [part.new_tensor([len(part)]) for part in wanted]
        asked = [int(each) for each in exchange(axis, counts, [(1,)] * axis.size)]
        requests = exchange(axis, wanted, [(count,) for count in asked])
        first = starts[axis.index]
        places = [request - first for request in requests]
        width = weight.shape[1]
        found = [weight[place] for place in places]
        rows = exchange(axis, found, [(len(part), width) for part in wanted])
        ctx.axis, ctx.sparse, ctx.shape = axis, sparse, weight.shape
        ctx.sizes, ctx.asked, ctx.places = [len(part) for part in wanted], asked, places
        return torch.cat(rows)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Any:
        width = ctx.shape[1]
        outgoing = list(gradient.contiguous().split(ctx.sizes))
        arrived = exchange(ctx.axis, outgoing, [(count, width) for count in ctx.asked])
        places, values = torch.cat(ctx.places), torch.cat(arrived)
        if ctx.sparse:
            of_weight = torch.sparse_coo_tensor(
                places.unsqueeze(0), values, ctx.shape, check_invariants=False
            )
        else:
            of_weight = values.new_zeros(ctx.shape).index_add_(0, places, values)
        return None, of_weight, None, None, None


class FetchedLookup:
    """Stands in for `nn.Embedding.forward` where every rank has its own samples.

    Args:
        layer: the layer, whose weight is this rank's rows already.
        axis: the ranks that the table is divided over.
        rows: the rows of each rank.
        padding: the row that gets no gradient, in the whole table.
    """

    def __init__(self, layer: Any, axis: Axis, rows: Sequence[range], padding: int | None) -> None:
        self.layer, self.axis, self.padding = layer, axis, padding
        self.count = rows[-1].stop
        self.starts = torch.tensor([part.start for part in rows] + [self.count])

    def __call__(self, codes: Tensor) -> Tensor:
        """int64 [...] -> [..., width]."""
        once, places = codes.unique(return_inverse=True)
        if len(once) and (int(once[0]) < 0 or int(once[-1]) >= self.count):
            raise IndexError(f"index out of range: {int(once[-1])} in a table of {self.count} rows")
        starts = self.starts.to(once.device)
        rows: Tensor = Fetched.apply(once, self.layer.weight, self.axis, starts, self.layer.sparse)
        if self.padding is not None:
            silent = (once == self.padding).unsqueeze(-1)
            rows = torch.where(silent, rows.detach(), rows)
        return F.embedding(places, rows)
