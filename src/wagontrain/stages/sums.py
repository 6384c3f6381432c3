"""Gradients summed over the ranks that hold the same stage."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

_BUCKET_BYTES = 5 * 2**20


def sum_gradients(parameters: Sequence[Tensor], group: dist.ProcessGroup) -> None:
    """Sum gradients over a group, some MiB at a time; what has none anywhere is left without."""
    sparse = [value.grad for value in parameters if value.grad is not None and value.grad.is_sparse]
    on_their_way: list[Any] = [dist.all_reduce(each, group=group, async_op=True) for each in sparse]
    parameters = [value for value in parameters if value.grad is None or not value.grad.is_sparse]
    if parameters:
        _sum_dense(parameters, group)
    for work in on_their_way:
        work.wait()


def _sum_dense(parameters: Sequence[Tensor], group: dist.ProcessGroup) -> None:
    missing = parameters[0].new_tensor([value.grad is None for value in parameters])
    buckets: list[list[Tensor]] = [[]]
    size = 0
    for value in parameters:
        if value.grad is None:
            value.grad = torch.zeros_like(value)
        if buckets[-1] and (
            size + value.nbytes > _BUCKET_BYTES or value.dtype != buckets[-1][0].dtype
        ):
            buckets.append([])
            size = 0
        buckets[-1].append(value.grad)
        size += value.nbytes
    sums = [missing, *(torch.cat([each.reshape(-1) for each in bucket]) for bucket in buckets)]
    works: list[Any] = [dist.all_reduce(each, group=group, async_op=True) for each in sums]
    works[0].wait()
    for bucket, total, work in zip(buckets, sums[1:], works[1:], strict=True):
        work.wait()
        parts = torch.split(total, [each.numel() for each in bucket])
        for gradient, part in zip(bucket, parts, strict=True):
            gradient.copy_(part.view_as(gradient))
    for value, ranks in zip(parameters, missing.tolist(), strict=True):
        if ranks == group.size():
            value.grad = None
