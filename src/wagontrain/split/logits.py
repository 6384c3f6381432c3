"""The loss over a softmax whose classes are divided: the whole scores are never gathered.

A model's last layer, split by columns, gives each rank the scores of some classes. They come as
a tensor that behaves like the whole one: shape and reshaping are answered here, cross-entropy is
computed from the parts, and anything else gathers the whole scores first.

    loss_i = log Σ_j exp(s_ij - m_i) + m_i - s_iy      m_i = max_j s_ij

with the maximum, the sum and the target's score each added up over ranks: 3 numbers a row travel
instead of all classes. Backward: softmax_ij - [j = y], each rank its own classes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from wagontrain.split.border import Border, LeaveColumns
from wagontrain.split.linear import as_rows


class _CrossEntropy(torch.autograd.Function):
    """Loss of each row: `[rows, own classes]`, `[rows]` -> `[rows]`; ignored rows give 0."""

    @staticmethod
    def forward(
        ctx: Any, scores: Tensor, target: Tensor, first: int, ignored: int, border: Border
    ) -> Tensor:
        group = border.axis.group
        highest = scores.detach().amax(1) if scores.shape[1] else scores.new_full(
            (len(scores),), -torch.inf
        )  # fmt: skip
        highest = highest.clone()
        dist.all_reduce(highest, dist.ReduceOp.MAX, group)
        raised = (scores - highest.unsqueeze(1)).exp()
        mine = target - first
        here = (mine >= 0) & (mine < scores.shape[1]) & (target != ignored)
        place = torch.where(here, mine, 0).unsqueeze(1)
        own = scores.gather(1, place).squeeze(1) if scores.shape[1] else highest
        sums = torch.stack([raised.sum(1), torch.where(here, own, 0)])
        dist.all_reduce(sums, group=group)
        total, of_target = sums
        ctx.save_for_backward(raised, total, place, here, target != ignored)
        loss = total.log() + highest - of_target
        return torch.where(target != ignored, loss, 0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Any:
        raised, total, place, here, kept = ctx.saved_tensors
        scale = torch.where(kept, gradient, 0)
        result = raised * (scale / total).unsqueeze(1)
        if result.shape[1]:
            result.scatter_add_(1, place, torch.where(here, -scale, 0).unsqueeze(1))
        return result, None, None, None, None


class SplitScores(Tensor):
    """Scores of which this rank holds some classes; seen from outside it is all of them."""

    _border: Border
    _widths: list[int]
    _dim: int

    @staticmethod
    def of(part: Tensor, border: Border, widths: list[int], dim: int) -> SplitScores:
        """Wrap a part, divided along `dim`."""
        result = part.as_subclass(SplitScores)
        result._border, result._widths, result._dim = border, widths, dim
        return result

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        handler = _HANDLERS.get(func)
        if handler is not None and isinstance(args[0] if args else None, SplitScores):
            answer = handler(*args, **kwargs)
            if answer is not NotImplemented:
                return answer
        if func in _ABOUT_THE_TENSOR:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        args = [each.whole() if isinstance(each, SplitScores) else each for each in args]
        kwargs = {
            key: each.whole() if isinstance(each, SplitScores) else each
            for key, each in kwargs.items()
        }
        return func(*args, **kwargs)

    def part(self) -> Tensor:
        """What this rank holds, as a plain tensor."""
        with torch._C.DisableTorchFunctionSubclass():
            return self.as_subclass(Tensor)

    def whole(self) -> Tensor:
        """All scores, gathered."""
        part = self.part()
        dim = self._dim % part.dim()
        moved = part.movedim(dim, -1)
        whole: Tensor = LeaveColumns.apply(as_rows(moved), self._border, self._widths)
        return whole.view(*moved.shape[:-1], sum(self._widths)).movedim(-1, dim)


def _shape(scores: SplitScores) -> torch.Size:
    with torch._C.DisableTorchFunctionSubclass():
        shape = list(scores.as_subclass(Tensor).shape)
    shape[scores._dim] = sum(scores._widths)
    return torch.Size(shape)


def _size(scores: SplitScores, dim: int | None = None) -> Any:
    return _shape(scores) if dim is None else _shape(scores)[dim]


def _again(scores: SplitScores, part: Tensor, dim: int) -> SplitScores:
    return SplitScores.of(part, scores._border, scores._widths, dim)


def _flatten(scores: SplitScores, start_dim: int = 0, end_dim: int = -1) -> Any:
    part = scores.part()
    start, end, dim = start_dim % part.dim(), end_dim % part.dim(), scores._dim % part.dim()
    if start <= dim <= end:
        return NotImplemented
    return _again(scores, part.flatten(start, end), dim if dim < start else dim - (end - start))


def _reshape(scores: SplitScores, *shape: Any) -> Any:
    if len(shape) == 1 and not isinstance(shape[0], int):
        shape = tuple(shape[0])
    part = scores.part()
    last = scores._dim % part.dim() == part.dim() - 1
    if not last or not shape or shape[-1] not in (sum(scores._widths),):
        return NotImplemented
    return _again(scores, part.reshape(*shape[:-1], part.shape[-1]), len(shape) - 1)


def _transpose(scores: SplitScores, one: int, other: int) -> Any:
    part = scores.part()
    one, other, dim = one % part.dim(), other % part.dim(), scores._dim % part.dim()
    moved = other if dim == one else one if dim == other else dim
    return _again(scores, part.transpose(one, other), moved)


def _float(scores: SplitScores) -> Any:
    return _again(scores, scores.part().float(), scores._dim)


def _cross_entropy(
    scores: Any,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: Any = None,
    ignore_index: int = -100,
    reduce: Any = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Any:
    plain = weight is None and not label_smoothing and size_average is None and reduce is None
    if not plain or target.is_floating_point():
        return NotImplemented
    part = scores.part()
    dim = scores._dim % part.dim()
    if dim != (1 if part.dim() > 1 else 0) or part.dim() < 2:
        return NotImplemented
    flat = as_rows(part.movedim(1, -1))
    codes = target.reshape(-1)
    bad = (codes != ignore_index) & ((codes < 0) | (codes >= sum(scores._widths)))
    if bool(bad.any()):
        raise IndexError(f"Target {int(codes[bad][0])} is out of bounds.")
    first = sum(scores._widths[: scores._border.axis.index])
    losses: Tensor = _CrossEntropy.apply(
        flat.float() if flat.dtype != torch.float64 else flat,
        codes, first, ignore_index, scores._border,
    )  # fmt: skip
    if reduction == "none":
        return losses.view(target.shape)
    if reduction == "sum":
        return losses.sum()
    return losses.sum() / (codes != ignore_index).sum()


_ABOUT_THE_TENSOR = {
    Tensor.dtype.__get__, Tensor.device.__get__, Tensor.requires_grad.__get__, Tensor.dim,  # type: ignore[attr-defined]
    Tensor.ndim.__get__, Tensor.is_floating_point, Tensor.is_complex, Tensor.layout.__get__,  # type: ignore[attr-defined]
    Tensor.is_sparse.__get__, Tensor.grad_fn.__get__, Tensor.ndimension, Tensor.as_subclass,  # type: ignore[attr-defined,union-attr]
}  # fmt: skip

_HANDLERS: dict[Any, Callable[..., Any]] = {
    Tensor.shape.__get__: _shape,  # type: ignore[attr-defined]
    Tensor.size: _size,
    Tensor.flatten: _flatten,
    torch.flatten: _flatten,
    Tensor.view: _reshape,
    Tensor.reshape: _reshape,
    torch.reshape: _reshape,
    Tensor.transpose: _transpose,
    torch.transpose: _transpose,
    Tensor.float: _float,
    Tensor.contiguous: lambda scores: scores,
    F.cross_entropy: _cross_entropy,
}
