"""Sharded data parallelism (ZeRO, FSDP): what every worker would hold alike is divided.

Each worker takes its share of every batch, as in data-parallel, but holds only its part of

    stage 1    the optimizer's state
    stage 2    ... and of the gradients, and of the weights between steps
    stage 3    ... and of the weights within a step: each unit of layers is gathered when it is
               needed, forward and backward, and let go again

Bytes sent per worker and step, P bytes of weights and N workers: stage 3 (N - 1) / N · 3 P,
stages 2 and 1 (N - 1) / N · 2 P: gradients to where they are needed, and the updated weights.

Source: Rajbhandari et al. 2020, "ZeRO", sections 5 and 7; Zhao et al. 2023, "PyTorch FSDP".
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from wagontrain.axes import whole_world
from wagontrain.building import initialise, require_room, skeleton, whole_or_skeleton
from wagontrain.errors import TaskError, UsageError
from wagontrain.layout import Layout
from wagontrain.mesh import World
from wagontrain.objective import Objective, Update
from wagontrain.replication import Buckets
from wagontrain.sharding import DirectReduceScatter, fetch_ahead, shard
from wagontrain.state import Training
from wagontrain.strategy import Runner, Strategy
from wagontrain.synchronous import Synchronous
from wagontrain.task import Task, trainable
from wagontrain.transport import Context
from wagontrain.trial import unused_in_trial


@dataclass(frozen=True)
class Sharded(Strategy):
    """Settings of sharded data parallelism.

    Args:
        stage: 1, 2 or 3: what is divided.
        least: parameters that make a module a unit of its own, gathered and let go together.
    """

    stage: Literal[1, 2, 3] = 3
    least: int = 1_000_000

    name: ClassVar[str] = "sharded"
    summary: ClassVar[str] = "weights, gradients, optimizer state divided (ZeRO, FSDP2)"

    def __post_init__(self) -> None:
        if self.least < 1:
            raise UsageError(f"least is {self.least}: give 1 or more parameters")

    @property
    def exact(self) -> bool:
        """Always."""
        return True

    def check(self, task: Task, world: World) -> None:
        """Refuse more workers than samples in a batch.

        Raises:
            UsageError: some would never have one.
        """
        if world.size > task.batch_size:
            raise UsageError(
                f"{world.size} workers cannot share a batch of {task.batch_size}: use at most "
                f"{task.batch_size} workers or a larger batch_size"
            )

    def setup(self, task: Task, context: Context) -> Runner:
        """Build the model and leave each rank its part."""
        if self.stage == 1:
            return OptimizerShards(task, context)
        return ShardedRunner(self, task, context)


class ShardedRunner(Synchronous):
    """Stages 2 and 3 at work on one rank."""

    def __init__(self, strategy: Sharded, task: Task, context: Context) -> None:
        device, axis = context.world.device, whole_world(context)
        model = whole_or_skeleton(task, context)
        bare = next(model.parameters()).is_meta
        unused = False
        if not bare:
            model = model.to(device)
            unused = bool(unused_in_trial(task, Objective(task, device), model))
        self._sums: DirectReduceScatter | None = None
        layouts = None
        if context.group is not None:
            require_dims(model)
            mesh = DeviceMesh.from_group(context.group, device.type)
            self._sums = shard(model, mesh, axis, strategy.least, strategy.stage == 2, unused)
            if bare:
                model.to_empty(device=device)
            layouts = {
                name: _layout(value, context.world.rank)
                for name, value in model.state_dict().items()
            }
        if bare:
            plain = skeleton(task)
            assert plain is not None
            state = layouts or {name: Layout.whole(v) for name, v in plain.state_dict().items()}
            initialise(model, plain, state, task.seed)
        super().__init__(task, context, model, layouts)
        fetch_ahead([module for module in model.modules() if isinstance(module, FSDPModule)])

    def holding(self, last: bool) -> contextlib.AbstractContextManager[Any]:
        """Exchange gradients in the last backward pass only; FSDP2 adds up the others'."""
        if isinstance(self.model, FSDPModule):
            self.model.set_requires_gradient_sync(last)
            self.model.set_is_last_backward(last)
        return contextlib.nullcontext()

    def exchange(self) -> None:
        """Add up the gradients that have come, and wait for the rest."""
        self.ready = self.clock.mark()
        if self._sums is not None:
            self._sums.finish()


class OptimizerShards(Synchronous):
    """Stage 1 at work on one rank: every parameter is updated by one rank, which tells the others.

    An optimizer makes its state for a parameter when it first updates it, so that each rank holds
    state for its own parameters only.
    """

    def __init__(self, task: Task, context: Context) -> None:
        require_room(task, context)
        device = context.world.device
        model = task.build_model().to(device)
        unused = bool(unused_in_trial(task, Objective(task, device), model))
        super().__init__(task, context, model)
        sizes = [0] * context.world.size
        self._updater: dict[Tensor, int] = {}
        for _, value in trainable(model):
            rank = sizes.index(min(sizes))
            self._updater[value] = rank
            sizes[rank] += value.nbytes
        self.update = _Divided(task, model, self._updater, context)
        self.replicate(self.data, Buckets(unused=unused, owners=self._updater))

    @property
    def training(self) -> Training:
        """All that has state here: whole weights, and the optimizer state of some of them."""
        rank = self.context.world.rank
        mine = {value for value, updater in self._updater.items() if updater == rank}
        return Training(
            self.model, self.layouts, self.update.optimizer, self.update.scheduler, mine
        )


class _Divided(Update):
    """An update of which each rank does a part."""

    def __init__(
        self, task: Task, model: nn.Module, updater: Mapping[Tensor, int], context: Context
    ) -> None:
        super().__init__(task, model)
        self.in_parts = False
        self.norm = self._norm  # not given above: each rank updates whole tensors
        self._updater, self._context = updater, context

    def step(self) -> None:
        """Update the own parameters, then take the others' from who updated them."""
        rank = self._context.world.rank
        touched = [value for value in self._updater if value.grad is not None]
        for value in touched:
            if self._updater[value] != rank:
                value.grad = None
        self.optimizer.step()
        with torch.no_grad():
            for value in touched:
                self._context.broadcast(value.detach(), self._updater[value])

    def _norm(self, parameters: Iterable[Tensor]) -> Tensor:
        """The norm of the whole gradient, of which each rank has its own parameters' part."""
        rank = self._context.world.rank
        squares = sum(
            float(value.grad.double().square().sum())
            for value in parameters
            if value.grad is not None and self._updater[value] == rank
        )
        return torch.tensor(self._context.sum([squares])[0]).sqrt()


def require_dims(model: nn.Module) -> None:
    """Refuse parameters that are single numbers.

    Raises:
        TaskError: FSDP2 divides the first dim, which they have not.
    """
    single = [name for name, value in model.named_parameters() if value.dim() == 0]
    if single:
        raise TaskError(
            f"parameter {single[0]!r} is a single number, which cannot be divided: make it of the "
            "shape [1], or take the strategy data-parallel"
        )


def _layout(value: Tensor, rank: int) -> Layout:
    if not isinstance(value, DTensor):
        return Layout.whole(value, owner=rank == 0)
    spec: Any = value
    sizes, offsets = compute_local_shape_and_global_offset(
        spec.shape, spec.device_mesh, spec.placements
    )
    return Layout(tuple(spec.shape), 0, (range(offsets[0], offsets[0] + sizes[0]),))
