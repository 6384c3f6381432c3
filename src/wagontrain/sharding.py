"""FSDP2's collectives, exchanged straight between ranks and not waited for until needed.

Over Gloo, FSDP2 alone loses its time in three places: Gloo's reduce-scatter is an all-reduce of
the whole and sends twice the bytes; without CUDA streams every collective is waited for on the
spot, so that nothing overlaps; and nothing is fetched ahead. Here each rank sends each other one
exactly its part, gathering goes on while the layer before computes, and gradients are added up
when the update needs them.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.fsdp._fully_shard._fsdp_api import AllGather, ReduceScatter
from torch.nn.modules.batchnorm import _BatchNorm

from wagontrain.axes import Axis, start_exchange

# Units whose gradients may be on their way at a time: each holds twice its size in memory.
_IN_FLIGHT = 2
_AHEAD = 2


class _Arriving(dist.Work):
    """What FSDP2 waits for."""

    def __init__(self, finish: Callable[[], Any]) -> None:
        super().__init__()
        self._finish: Callable[[], Any] | None = finish

    def wait(self, timeout: timedelta = timedelta(0)) -> bool:
        if self._finish is not None:
            finish, self._finish = self._finish, None
            finish()
        return True


class _Memory:
    def allocate(self, size: Any, *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(*size, dtype=dtype, device=device)


class DirectGather(_Memory, AllGather):
    """Every rank's part to all, begun and not waited for."""

    def __init__(self, axis: Axis) -> None:
        self.axis = axis

    def __call__(
        self,
        output_tensor: Tensor,
        input_tensor: Tensor,
        group: dist.ProcessGroup,
        async_op: bool = False,
    ) -> dist.Work | None:
        parts = list(output_tensor.view(self.axis.size, -1))
        coming = start_exchange(self.axis, [input_tensor] * self.axis.size, parts)

        def finish() -> None:
            coming()
            own = parts[self.axis.index]
            if own.data_ptr() != input_tensor.data_ptr():
                own.copy_(input_tensor)

        return _Arriving(finish)


class DirectReduceScatter(_Memory, ReduceScatter):
    """Sums of every rank's part, which come while the backward pass goes on.

    FSDP2 takes the result at once for the gradient; it is one only after `finish`.
    """

    def __init__(self, axis: Axis) -> None:
        self.axis = axis
        self._coming: list[tuple[Tensor, Callable[[], list[Tensor]]]] = []

    def __call__(
        self,
        output_tensor: Tensor,
        input_tensor: Tensor,
        group: dist.ProcessGroup,
        op: Any,
        async_op: bool = False,
    ) -> dist.Work | None:
        assert op == dist.ReduceOp.SUM, op
        parts = list(input_tensor.view(self.axis.size, -1))
        shapes = [tuple(output_tensor.shape)] * self.axis.size
        self._coming.append((output_tensor, start_exchange(self.axis, parts, shapes)))
        while len(self._coming) > _IN_FLIGHT:
            self._finish_first()
        return None

    def finish(self) -> None:
        """Add up what has come; waits for the rest."""
        while self._coming:
            self._finish_first()

    def _finish_first(self) -> None:
        output, coming = self._coming.pop(0)
        first, *others = coming()
        output.copy_(first)
        for part in others:
            output += part


def give_memory_back() -> None:
    """Have memory of a MB or more returned to the system when it is freed, where glibc is used.

    By itself glibc raises that limit to 32 MB as it goes and keeps what is freed below it in
    heaps. Gathered units of many sizes leave those so full of holes that in the end a rank takes
    as much as the whole model.
    """
    with contextlib.suppress(OSError, AttributeError):  # another C library, or another system
        ctypes.CDLL(None).mallopt(_MMAP_THRESHOLD, 2**20)


_MMAP_THRESHOLD = -3  # M_MMAP_THRESHOLD in malloc.h


def units(model: nn.Module, least: int) -> list[nn.Module]:
    """Modules that are gathered and let go together: the smallest of at least so many numbers.

    What is left belongs to the module around them, and at last to the model. A tied parameter is
    not torn apart.
    """
    users: dict[int, set[nn.Module]] = {}
    for module in model.modules():
        for value in module.parameters(recurse=False):
            users.setdefault(id(value), set()).add(module)
    found: list[nn.Module] = []

    def look(module: nn.Module) -> int:
        """Numbers in a module that no unit inside has taken."""
        inside = set(module.modules())
        left = sum(value.numel() for value in module.parameters(recurse=False))
        left += sum(look(child) for child in module.children())
        whole = all(users[id(value)] <= inside for value in module.parameters())
        called = type(module).forward is not nn.Module.forward  # a ModuleList never is
        # fully_shard changes the class of a module, and batch norms are known by theirs.
        norm = isinstance(module, _BatchNorm)
        if left >= least and whole and called and not norm and module is not model:
            found.append(module)
            return 0
        return left

    look(model)
    return found


def shard(
    model: nn.Module, mesh: Any, axis: Axis, least: int, keep: bool, unused: bool
) -> DirectReduceScatter | None:
    """Divide a model's parameters over ranks with FSDP2.

    Args:
        model: the whole one.
        mesh: of torch, over the ranks of `axis`.
        axis: the ranks.
        least: numbers that make a module a unit of its own.
        keep: whether gathered weights stay from forward to backward.
        unused: whether a step may leave parameters without gradient on some ranks.

    Returns:
        What gradients come by; None where torch's own collectives are used, on a GPU.
    """
    if mesh.device_type == "cpu":
        give_memory_back()
    parts = units(model, least)
    for module in (*parts, model):
        fully_shard(module, mesh=mesh, reshard_after_forward=not keep)
    all_of_it: list[Any] = [module for module in model.modules() if isinstance(module, FSDPModule)]
    on_cpu = mesh.device_type == "cpu" and axis.size > 1
    gather, reduce = DirectGather(axis), DirectReduceScatter(axis)
    for module in all_of_it:
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)
        if unused:
            module.set_reduce_scatter_unused_params(True, recurse=False)
        if on_cpu and any(
            state.fsdp_params for state in module._get_fsdp_state()._fsdp_param_groups
        ):
            module.set_custom_all_gather(gather)
            module.set_custom_reduce_scatter(reduce)
    return reduce if on_cpu else None


def fetch_ahead(units_in_order: list[Any]) -> None:
    """Have the next units' weights on their way while one computes, forward and backward.

    With one of them the link stands still while what has come is copied to its place.
    """
    for number, unit in enumerate(units_in_order):
        unit.set_modules_to_forward_prefetch(units_in_order[number + 1 : number + 1 + _AHEAD])
        behind = units_in_order[max(0, number - _AHEAD) : number]
        unit.set_modules_to_backward_prefetch(behind[::-1])
    if len(units_in_order) > 1:
        # The backward pass begins with what the forward pass ended with.
        units_in_order[-1].set_reshard_after_forward(False, recurse=False)
