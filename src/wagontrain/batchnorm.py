"""Batch norm that sees the global batch.

torch.nn.SyncBatchNorm refuses CPU tensors and counts every rank that takes part. Here the
statistics of all ranks are combined, each weighted with its number of samples, and a rank whose
micro-batch is a stand-in counts for nothing, in the forward and in the backward pass.

Forward (Chan et al. 1979, "Updating formulae and a pairwise algorithm"), ranks r with n_r values
per channel, mean m_r and variance v_r (divided by n_r):

    n = Σ n_r      m = Σ n_r m_r / n      v = Σ n_r (v_r + (m_r - m)²) / n

Backward (Ioffe & Szegedy 2015), with the sums taken over all ranks:

    dx = w / √(v + ε) · (dy - Σ dy / n - x̂ · Σ (dy · x̂) / n)

One all-gather forward and one all-reduce backward, each of 2 C + 1 and 2 C numbers.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.modules.batchnorm import _BatchNorm

from wagontrain.errors import TaskError

_KNOWN = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


@dataclass
class Participation:
    """Whether this rank's current micro-batch holds samples or a stand-in."""

    counts: bool = True


@contextmanager
def global_batch_norm(
    model: nn.Module, group: dist.ProcessGroup, participation: Participation
) -> Iterator[None]:
    """Within, every batch norm in `model` sees the micro-batches of all ranks while training.

    The modules stay what they are (names, hooks, state_dict); only their forward is replaced.

    Raises:
        TaskError: a batch norm of a class that this cannot stand in for.
    """
    layers = [
        (name, layer) for name, layer in model.named_modules() if isinstance(layer, _BatchNorm)
    ]
    for name, layer in layers:
        if type(layer) not in _KNOWN:
            raise TaskError(
                f"layer {name!r} is a batch norm of the class {type(layer).__name__}, whose "
                "statistics cannot be taken over all workers: use torch.nn.BatchNorm1d/2d/3d"
            )
    for _, layer in layers:
        # An attribute of the instance goes before the method of its class.
        vars(layer)["forward"] = _Forward(layer, group, participation)
    try:
        yield
    finally:
        for _, layer in layers:
            del vars(layer)["forward"]


@dataclass
class _Forward:
    layer: _BatchNorm
    group: dist.ProcessGroup
    participation: Participation

    def __call__(self, inputs: Tensor) -> Tensor:
        layer = self.layer
        use_batch = layer.training or layer.running_mean is None
        if not use_batch:
            return F.batch_norm(
                inputs,
                layer.running_mean,
                layer.running_var,
                layer.weight,
                layer.bias,
                False,
                0.0,
                layer.eps,
            )
        output, mean, variance, count = _GlobalBatchNorm.apply(
            inputs, layer.weight, layer.bias, layer.eps, self.group, self.participation.counts
        )
        if layer.training and layer.track_running_stats and layer.running_mean is not None:
            assert layer.running_var is not None
            assert layer.num_batches_tracked is not None
            layer.num_batches_tracked.add_(1)
            factor: float = (
                1.0 / float(layer.num_batches_tracked) if layer.momentum is None else layer.momentum
            )
            unbiased = variance * (count / (count - 1))
            with torch.no_grad():
                layer.running_mean.lerp_(mean.to(layer.running_mean.dtype), factor)
                layer.running_var.lerp_(unbiased.to(layer.running_var.dtype), factor)
        result: Tensor = output
        return result


class _GlobalBatchNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        inputs: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
        group: dist.ProcessGroup,
        counts: bool,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        channels = inputs.shape[1]
        over = [dim for dim in range(inputs.dim()) if dim != 1]
        exact = inputs if inputs.dtype == torch.float64 else inputs.float()
        variance, mean = torch.var_mean(exact, over, correction=0)
        number = mean.new_tensor([inputs.numel() // channels if counts else 0])
        local = torch.cat([mean, variance, number])
        rows = [torch.empty_like(local) for _ in range(group.size())]
        dist.all_gather(rows, local, group=group)
        every = torch.stack(rows)
        numbers = every[:, -1:]
        count = numbers.sum()
        if count <= 1:
            raise ValueError(
                "Expected more than 1 value per channel when training, "
                f"got a global batch of {int(count)}"
            )
        means, variances = every[:, :channels], every[:, channels : 2 * channels]
        mean = (numbers * means).sum(0) / count
        variance = (numbers * (variances + (means - mean).square())).sum(0) / count
        # The evaluation kernel normalises with given statistics: they are the batch's here.
        output = F.batch_norm(exact, mean, variance, weight, bias, False, 0.0, eps)
        ctx.save_for_backward(inputs, weight, mean, torch.rsqrt(variance + eps), count)
        ctx.group, ctx.counts = group, counts
        ctx.mark_non_differentiable(mean, variance, count)
        return output.to(inputs.dtype), mean, variance, count

    @staticmethod
    @once_differentiable  # a second derivative through it would leave the other ranks out
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        inputs, weight, mean, inverse, count = ctx.saved_tensors
        shape = [1, -1] + [1] * (inputs.dim() - 2)
        over = [dim for dim in range(inputs.dim()) if dim != 1]
        outgoing = gradients[0].to(mean.dtype)
        normed = (inputs.to(mean.dtype) - mean.view(shape)) * inverse.view(shape)
        sum_outgoing = outgoing.sum(over)
        sum_product = (outgoing * normed).sum(over)
        sums = torch.cat([sum_outgoing, sum_product])
        if not ctx.counts:
            sums.zero_()
        dist.all_reduce(sums, group=ctx.group)
        all_outgoing, all_product = (sums / count).chunk(2)
        if ctx.counts:
            scale = inverse if weight is None else inverse * weight
            incoming = (outgoing - all_outgoing.view(shape) - normed * all_product.view(shape)) * (
                scale.view(shape)
            )
        else:
            # A stand-in touches no statistic, so nothing flows back through it.
            incoming = torch.zeros_like(normed)
        wants_weight, wants_bias = ctx.needs_input_grad[1:3]
        return (
            incoming.to(inputs.dtype),
            sum_product.to(weight.dtype) if wants_weight else None,
            sum_outgoing.to(weight.dtype) if wants_bias else None,
            None,
            None,
            None,
        )
