"""Where a model is cut, and into how many micro-batches a batch: by time measured on a trial.

Small micro-batches leave less of a step idle, but each of them costs what does not shrink with
it: reading and writing the weights and their gradients. Rank 0 measures every call at the sizes
in question, and all ranks take its numbers.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils.flop_counter import FlopCounterMode

from wagontrain.batches import MicroBatch
from wagontrain.objective import Objective
from wagontrain.stages.cutting import Uses, cut, slowest
from wagontrain.stages.recording import Blueprint, Call, Held, Recording, Value
from wagontrain.task import Task
from wagontrain.transport import Context
from wagontrain.trial import trial_batch, trial_model

_FLOPS_PER_SECOND = 1e10
_TIMES = 3


@dataclass(frozen=True)
class Plan:
    """A model in stages.

    Args:
        recording: of its forward pass on one micro-batch.
        uses: of its tensors.
        borders: of the stages.
        micro_batches: that a batch is cut into.
    """

    recording: Recording
    uses: Uses
    borders: list[int]
    micro_batches: int


def plan(
    task: Task,
    context: Context,
    model: nn.Module,
    blueprint: Blueprint,
    counts: Sequence[int],
    samples: int,
    stages: int,
) -> Plan:
    """Choose among numbers of micro-batches, and cut. Every rank has to call this.

    A step takes (m + d - 1) times the slowest stage's time for one of m micro-batches.

    Args:
        task: what is trained.
        context: this rank's place.
        model: with or without memory; it is left as it is.
        blueprint: of it.
        counts: numbers of micro-batches to choose among.
        samples: that a pipeline gets at a time.
        stages: of it.

    Raises:
        UsageError: it cannot be cut so.
    """
    objective = Objective(task, context.world.device)
    bare = next(model.parameters()).is_meta
    other = None if bare or context.world.rank else trial_model(task, model)
    found: list[tuple[float, Plan]] = []
    for count in counts:
        micro = trial_batch(task, context.world.device, -(-samples // count))
        with objective.precision():
            recording = blueprint.record(micro.inputs, training=True)
        seconds = [0.0] * len(recording.calls)
        if bare:
            seconds = counted(recording, blueprint, micro, objective)
        elif other is not None:
            with torch.random.fork_rng():
                seconds = measured(recording, other, micro, objective)
        seconds = context.gather(seconds)[0]
        uses = Uses(blueprint.model, recording)
        borders = cut(recording, uses, seconds, stages)
        whole = (count + stages - 1) * slowest(recording, seconds, borders)
        found.append((whole, Plan(recording, uses, borders, count)))
    return min(found, key=lambda each: each[0])[1]


def measured(
    recording: Recording, model: nn.Module, micro: MicroBatch, objective: Objective
) -> list[float]:
    """Seconds of each call, forward and backward, the best of a few times; the last has the loss.

    Calls of the same kind on the same shapes count alike, whatever disturbed one of them.

    Args:
        recording: of the forward pass.
        model: with memory; its gradients and buffers are changed.
        micro: of the shapes recorded.
        objective: of the task.
    """
    best = [math.inf] * len(recording.calls)
    loss_best = math.inf
    for _ in range(_TIMES):
        values = dict(enumerate(pytree.tree_leaves(micro.inputs)))
        for position, call in enumerate(recording.calls):
            for number in set(call.takes):
                values[number] = _apart(values[number])
            began = time.perf_counter()
            with objective.precision():
                call.run(model, values)
            _backward([values[number] for number in call.results])
            best[position] = min(best[position], time.perf_counter() - began)
        output = pytree.tree_map(
            lambda leaf: _apart(leaf) if isinstance(leaf, Tensor) else leaf,
            recording.result(model, values),
        )
        began = time.perf_counter()
        _backward([objective(lambda *_, given=output, **__: given, micro)])
        loss_best = min(loss_best, time.perf_counter() - began)
    kinds: dict[Any, float] = {}
    names = [_kind(recording, model, call) for call in recording.calls]
    for kind, seconds in zip(names, best, strict=True):
        kinds[kind] = min(kinds.get(kind, math.inf), seconds)
    costs = [kinds[kind] for kind in names]
    costs[-1] += loss_best
    return costs


def _apart(value: Tensor) -> Tensor:
    """The same numbers, of another graph; no leaf, so that it can be changed in place."""
    return value.detach().requires_grad_(value.requires_grad).clone()


def _backward(results: list[Tensor]) -> None:
    wanted = [value for value in results if value.requires_grad]
    torch.autograd.backward(wanted, [torch.ones_like(value) for value in wanted])


def _kind(recording: Recording, model: nn.Module, call: Call) -> Any:
    """What a call is: the layer's class and shapes, or the function, and what it is given."""
    shapes = tuple(
        tuple(recording.values[leaf.number].shape) if isinstance(leaf, Value)
        else leaf.name if isinstance(leaf, Held) else repr(leaf)
        for leaf in call.leaves
    )  # fmt: skip
    if not isinstance(call.target, str):
        return call.target, shapes
    module = model.get_submodule(call.target)
    return type(module), tuple(tuple(each.shape) for each in module.parameters()), shapes


def counted(
    recording: Recording, blueprint: Blueprint, micro: MicroBatch, objective: Objective
) -> list[float]:
    """What each call would take at a nominal speed, from its operations: without any memory."""
    costs = []
    with blueprint.mode, objective.precision(), torch.no_grad():
        values: dict[int, Tensor] = {
            number: torch.empty(leaf.shape, dtype=leaf.dtype, device=blueprint.device)
            for number, leaf in enumerate(pytree.tree_leaves(micro.inputs))
        }
        for call in recording.calls:
            with FlopCounterMode(display=False) as counter:
                call.run(blueprint.model, values)
            costs.append(3 * counter.get_total_flops() / _FLOPS_PER_SECOND)
    return costs
