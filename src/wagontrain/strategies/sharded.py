"""Sharded data parallelism (ZeRO, FSDP): what every worker would hold alike is divided.

Each worker takes its share of every batch, as in data-parallel, but holds only its part of

    stage 1    the optimizer's state
    stage 2    ... and of the gradients, and of the weights between steps
    stage 3    ... and of the weights within a step: each unit of layers is gathered when it is
               needed, forward and backward, and let go again

Bytes sent per worker and step, P bytes of weights and N workers: stage 3 (N - 1) / N · (3 P - L),
with L bytes of the last unit, which stays gathered: the backward pass begins with it. Stages 2 and
1 (N - 1) / N · 2 P: gradients to where they are needed, and the updated weights.

Source: Rajbhandari et al. 2020, "ZeRO", sections 5 and 7; Zhao et al. 2023, "PyTorch FSDP".
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from wagontrain.axes import whole_world
from wagontrain.building import (
    initialise,
    require_room,
    require_uncompiled,
    skeleton,
    whole_or_skeleton,
)
from wagontrain.costs import Costs, Step
from wagontrain.errors import TaskError, UsageError
from wagontrain.layout import Layout
from wagontrain.mesh import World
from wagontrain.objective import Objective, Update
from wagontrain.profile import Layer
from wagontrain.replication import Buckets
from wagontrain.sharding import DirectReduceScatter, fetch_ahead, shard
from wagontrain.simulate import Graph
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

    @classmethod
    def candidates(cls, costs: Costs) -> list[Sharded]:
        """The three stages."""
        if not 1 < costs.size <= costs.profile.batch_size:
            return []
        return [cls(stage=stage) for stage in (1, 2, 3)]

    def step_graph(self, costs: Costs) -> Graph:
        """Units are gathered two ahead of where they are needed; gradients leave as they come."""
        counts = {rank: costs.samples(rank) for rank in costs.leaders}
        step = Step(costs, costs.leaders, range(costs.size), counts)
        if self.stage == 1:
            return self._first_stage(step)
        found = units_of(costs.profile.layers, self.least)
        for micro in range(costs.profile.accumulate):
            last = micro == costs.profile.accumulate - 1
            _gathered(step, found, step.forward)
            if self.stage == 2:
                ways = [_backward_of(step, last) for _ in found]
                for layers, way in zip(reversed(found), ways, strict=True):
                    way(layers)
            else:
                _gathered(step, found[::-1], _backward_of(step, last), here=1)
        step.update_rest(costs.profile.nbytes / costs.size)
        return step.graph

    def _first_stage(self, step: Step) -> Graph:
        """Gradients go to who updates them, and the weights come back: a broadcast for each."""
        costs = step.costs
        for micro in range(costs.profile.accumulate):
            step.forward(costs.profile.layers)
            if micro < costs.profile.accumulate - 1:
                step.backward(costs.profile.layers[::-1])
            else:
                step.backward_summing(costs.profile.layers, "exchange")
        step.send_bucket("exchange")
        step.update_rest(costs.profile.nbytes / costs.size)
        for layer in costs.profile.layers:
            for part in layer.parts:
                step.exchange(f"weights of {part.name}", "broadcast", part.nbytes)
        return step.graph

    def memory(self, costs: Costs, rank: int) -> dict[str, float]:
        """Parts of what is divided, and the largest units that are whole at a time."""
        profile, part = costs.profile, 1 / costs.size
        items = costs.memory(profile.layers, costs.samples(rank))
        items["optimizer"] *= part
        if self.stage > 1:
            units = [
                sum(each.nbytes for each in unit) for unit in units_of(profile.layers, self.least)
            ]
            items["gradients"] *= part
            items["weights"] = profile.nbytes * part + profile.buffers
            whole = sum(units) if self.stage == 2 else 4 * max(units)
            items["gathered"] = whole + 2 * max(units)
        return items

    def setup(self, task: Task, context: Context) -> Runner:
        """Build the model and leave each rank its part."""
        if self.stage == 1:
            return OptimizerShards(task, context)
        return ShardedRunner(self, task, context)


def units_of(layers: Sequence[Layer], least: int) -> list[list[Layer]]:
    """Layers that are gathered together; small ones with those before them."""
    found: list[list[Layer]] = [[]]
    for layer in layers:
        numbers = sum(math.prod(part.shape) for part in layer.parts)
        if numbers >= least and found[-1]:
            found.append([])
        found[-1].append(layer)
    return found


def _gathered(
    step: Step,
    found: Sequence[list[Layer]],
    compute: Callable[[Sequence[Layer]], None],
    here: int = 0,
) -> None:
    """Compute units one behind the other, each when it has come; two are on their way.

    The first `here` of them, where there are more, need not come.
    """
    here = here if len(found) > 1 else 0
    coming: list[int | None] = []

    def start(number: int) -> None:
        if number < len(found):
            nbytes = sum(layer.nbytes for layer in found[number]) if number >= here else 0
            coming.append(step.start("gather weights", "exchange", nbytes) if nbytes else None)

    for number in range(_AHEAD_AT_FIRST):
        start(number)
    for number, layers in enumerate(found):
        step.wait(coming[number])
        compute(layers)
        start(number + _AHEAD_AT_FIRST)


_AHEAD_AT_FIRST = 3  # the one that is computed on, and two ahead


def _backward_of(step: Step, last: bool) -> Callable[[Sequence[Layer]], None]:
    def backward(layers: Sequence[Layer]) -> None:
        step.backward(layers[::-1])
        nbytes = sum(layer.nbytes for layer in layers)
        if last and nbytes:
            step.leave(step.start("sums of gradients", "exchange", nbytes))

    return backward


class ShardedRunner(Synchronous):
    """Stages 2 and 3 at work on one rank."""

    def __init__(self, strategy: Sharded, task: Task, context: Context) -> None:
        device, axis = context.world.device, whole_world(context)
        model = whole_or_skeleton(task, context)
        require_uncompiled(model, "gathers weights layer by layer")
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

    def settle(self, whole: bool = True) -> None:
        """Let go of weights that validation gathered, before anybody looks at the state.

        In stage 2 they stay for a backward pass, and after validation there is none. Whoever
        compares replicas would then look at them, as memory that cannot be let go of any longer.
        """
        for module in self.model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()

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
        more = super().training.more
        return Training(
            self.model, self.layouts, self.update.optimizer, self.update.scheduler, mine, more
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
