"""Fully connected layers of which every rank holds some columns or some rows.

Columns (of W in y = x W, that is rows of `weight`): every rank computes some features of the
result from all of x. Rows: every rank takes some features of x and computes a part of the sum.
Columns followed by rows need no exchange in between.

    columns   Y_k = X W_k + b_k          dX = Σ_k dY_k W_kᵀ     dW_k = Xᵀ dY_k
    rows      Y = Σ_k X_k W_k + b        dX_k = dY W_kᵀ         dW_k = X_kᵀ dY

While dX is on its way, dW is computed.

Source: Dean et al. 2012, section 3; Shoeybi et al. 2019, "Megatron-LM", section 3 (columns then
rows).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from wagontrain.batches import mix
from wagontrain.split.border import Border, EnterRows, LeaveColumns, Shards, Total


class ColumnProduct(torch.autograd.Function):
    """`[own rows, in] -> [all rows, own out]`: gather, then this rank's columns."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, border: Border) -> Tensor:
        whole = border.gather(x)
        ctx.save_for_backward(whole, weight)
        ctx.border, ctx.biased = border, bias is not None
        return F.linear(whole, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Any:
        x, weight = ctx.saved_tensors
        gradient = gradient.contiguous()
        coming = None
        if ctx.needs_input_grad[0]:
            coming = ctx.border.return_gradient(gradient @ weight)
        of_weight = gradient.T @ x if ctx.needs_input_grad[1] else None
        of_bias = gradient.sum(0) if ctx.biased and ctx.needs_input_grad[2] else None
        return (coming.get() if coming else None), of_weight, of_bias, None


class ChunkedProduct(torch.autograd.Function):
    """`ColumnProduct` in chunks: what one computes hides what the next one sends."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, border: Shards) -> Tensor:
        rows = sum(border.rows)
        whole = x.new_empty(rows, x.shape[1])
        result = x.new_empty(rows, len(weight))
        for places, part in border.gather_chunks(x):
            whole[places] = part
            result[places] = F.linear(part, weight, bias)
        ctx.save_for_backward(whole, weight)
        ctx.border, ctx.biased = border, bias is not None
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Any:
        x, weight = ctx.saved_tensors
        gradient = gradient.contiguous()
        coming = []
        if ctx.needs_input_grad[0]:
            for number, places in enumerate(ctx.border.pieces):
                part = gradient[places.to(gradient.device)] @ weight
                coming.append(ctx.border.return_chunk(number, part))
        of_weight = gradient.T @ x if ctx.needs_input_grad[1] else None
        of_bias = gradient.sum(0) if ctx.biased and ctx.needs_input_grad[2] else None
        of_x = torch.cat([part.get() for part in coming]) if coming else None
        return of_x, of_weight, of_bias, None


_RESTORE: tuple[Any, ...] = (torch.set_rng_state, torch.cuda.set_rng_state)


class Region:
    """What lies between a layer split by columns and the one split by rows that follows.

    There every rank has some features of all samples. Random numbers differ from rank to rank
    within, and are those of before again behind it: with replicated samples all ranks have to
    draw alike everywhere else.

    Args:
        index: this rank's place.
        draws: whether random numbers are drawn in between, by a dropout.
        shaped: whether the samples look in between as they do outside, but for their features.
    """

    def __init__(self, index: int, draws: bool, shaped: bool = False) -> None:
        self.index, self.draws, self.shaped = index, draws, shaped
        self.leading: torch.Size = torch.Size()
        self.border: Border | None = None
        self._before: list[Any] = []

    def enter(self, x: Tensor, border: Border) -> None:
        """Note what the samples look like outside."""
        self.leading, self.border = x.shape[:-1], border
        if self.draws:
            drawn = int(torch.randint(2**62, ()))  # alike on all ranks, other in every pass
            states = [torch.get_rng_state()]
            if x.is_cuda:
                states.append(torch.cuda.get_rng_state(x.device))
            self._before = states
            torch.manual_seed(mix(drawn, self.index))

    def leave(self) -> None:
        """Back to the random numbers of before."""
        for state, restore in zip(self._before, _RESTORE, strict=False):
            restore(state)
        self._before = []


class Columns:
    """Stands in for `nn.Linear.forward` where the layer's columns are divided.

    Args:
        layer: the layer, whose parameters are this rank's part already.
        border: how samples come and go.
        widths: output features of each rank.
        region: where the result stays divided up to a layer split by rows; else None.
        first: whether the region begins here, if there is one.
    """

    def __init__(
        self,
        layer: Any,
        border: Border,
        widths: Sequence[int],
        region: Region | None = None,
        first: bool = True,
    ) -> None:
        self.layer, self.border, self.widths, self.region = layer, border, widths, region
        self.first = first

    def __call__(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]; where it stays divided [all rows, own out] or [..., own out]."""
        border, y = self.product(x)
        if self.region is not None:
            if self.first:
                self.region.enter(x, border)
            return y.view(*x.shape[:-1], y.shape[1]) if self.region.shaped else y
        whole: Tensor = LeaveColumns.apply(y, border, self.widths)
        return whole.view(*x.shape[:-1], sum(self.widths))

    def product(self, x: Tensor) -> tuple[Border, Tensor]:
        """[..., in] -> [all rows, own out]."""
        flat = as_rows(x)
        border = self.border.opened(len(flat))
        weight, bias = as_precise(flat, self.layer.weight), as_precise(flat, self.layer.bias)
        chunked = isinstance(border, Shards) and border.chunks > 1
        product: Any = ChunkedProduct if chunked else ColumnProduct
        y: Tensor = product.apply(flat.to(weight.dtype), weight, bias, border)
        return border, y


class Rows:
    """Stands in for `nn.Linear.forward` where the layer's rows are divided.

    Args:
        layer: the layer, whose weight is this rank's part already, and whose bias is whole.
        border: how samples come and go.
        widths: input features of each rank.
        region: where the input comes divided from a layer split by columns; else None.
    """

    def __init__(
        self, layer: Any, border: Border, widths: Sequence[int], region: Region | None = None
    ) -> None:
        self.layer, self.border, self.widths, self.region = layer, border, widths, region

    def __call__(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]."""
        if self.region is not None:
            assert self.region.border is not None
            border, leading, mine = self.region.border, self.region.leading, as_rows(x)
            self.region.leave()
        else:
            leading, flat = x.shape[:-1], as_rows(x)
            border = self.border.opened(len(flat))
            mine = EnterRows.apply(flat, border, self.widths)
        weight = as_precise(mine, self.layer.weight)
        y: Tensor = Total.apply(F.linear(mine.to(weight.dtype), weight), border)
        if self.layer.bias is not None:
            y = y + as_precise(y, self.layer.bias)
        return y.view(*leading, y.shape[1])


def as_rows(x: Tensor) -> Tensor:
    """[..., features] -> [rows, features], also without features."""
    return x.reshape(x.shape[:-1].numel(), x.shape[-1])


def as_precise(x: Tensor, parameter: Any) -> Any:
    """The parameter in the precision that autocast asks for on x's device."""
    if parameter is not None and torch.is_autocast_enabled(x.device.type):
        return parameter.to(torch.get_autocast_dtype(x.device.type))
    return parameter
