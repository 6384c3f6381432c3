"""What belongs to the weights and strays with them: buffers, and the state of optimizers."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase
from torch.optim import Optimizer

from wagontrain.averaging.fragments import Sum, total_weight
from wagontrain.batches import Cut
from wagontrain.errors import ModelError, ReplicaError, TaskError
from wagontrain.layout import as_bytes
from wagontrain.objective import Objective
from wagontrain.task import Task
from wagontrain.transport import Context, fingerprints
from wagontrain.trial import trial_batch, trial_model


class Beside:
    """Buffers and optimizer state of one rank, averaged with the other ranks' when asked.

    Args:
        context: this rank's place in the job.
        model: its buffers have the same names and shapes on all ranks.
        optimizer: this rank's own, over the same parameters on all ranks.
    """

    def __init__(self, context: Context, model: nn.Module, optimizer: Optimizer) -> None:
        self._context, self._model, self._optimizer = context, model, optimizer
        self.begin_anew()

    def begin_anew(self) -> None:
        """Count from here on, where all ranks hold the same."""
        self.buffers_even = self.optimizer_even = True
        self._since_buffers = self._since_optimizer = 0.0

    def strayed(self, weight: float) -> None:
        """Count a step: what this rank's samples counted for."""
        self.buffers_even = self.optimizer_even = False
        self._since_buffers += weight
        self._since_optimizer += weight

    def even_out_buffers(self) -> None:
        """Average buffers; every rank has to call this."""
        if not self.buffers_even:
            even_out_buffers(self._context, self._model, self._since_buffers)
        self.buffers_even, self._since_buffers = True, 0.0

    def even_out_optimizer(self) -> None:
        """Average the state of optimizers; every rank has to call this."""
        if not self.optimizer_even:
            names: dict[Tensor, str] = {
                value: name for name, value in self._model.named_parameters()
            }
            even_out_optimizer(self._context, self._optimizer, names, self._since_optimizer)
        self.optimizer_even, self._since_optimizer = True, 0.0


def require_samples(task: Task, objective: Objective, model: nn.Module, size: int) -> None:
    """Refuse shares of one sample where a batch norm cannot do with that: each has to see several.

    Tried out on another model before training, instead of at the end of the first epoch.

    Raises:
        TaskError: the message says which batch has such shares.
    """
    if not any(isinstance(module, _BatchNorm) for module in model.modules()):
        return
    for batch in {task.batch_size, task.samples % task.batch_size}:
        cuts = [
            Cut(rank, size).micro_batches(range(batch), task.accumulate) for rank in range(size)
        ]
        if not any(len(own) == 1 for pieces in cuts for _, own in pieces):
            continue
        try:
            with torch.random.fork_rng():
                objective.forward(trial_model(task, model), trial_batch(task, objective.device, 1))
        except ModelError as error:
            if "more than 1 value per channel" not in str(error):
                raise
            raise TaskError(
                f"of a batch of {batch} some of {size} workers have one sample, and a batch norm "
                "needs several: here it sees a worker's own samples only; give another "
                "batch_size or number of workers, or take data-parallel"
            ) from error
        return


def begin_alike(context: Context, model: nn.Module) -> None:
    """Give every rank the weights and buffers of rank 0, as DistributedDataParallel does."""
    with torch.no_grad():
        for value in [*model.parameters(), *model.buffers()]:
            if value.numel():
                content = value.detach().clone(memory_format=torch.contiguous_format)
                context.broadcast(as_bytes(content), 0)
                value.copy_(content)


def require_same(context: Context, tensors: Mapping[str, Tensor]) -> None:
    """Compare, bit by bit, tensors that all ranks hold alike, by name.

    Raises:
        ReplicaError: naming the first that differs and the rank.
    """
    rows = context.gather_integers(fingerprints(tensors.values()))
    for place, name in enumerate(tensors):
        for rank, row in enumerate(rows):
            if row[place] != rows[0][place]:
                raise ReplicaError(
                    f"{name!r} of rank {rank} is no longer that of rank 0: the model changes it, "
                    "other than by training, by something that differs between workers (its own "
                    "samples, random numbers, the clock)"
                )


def counters(model: nn.Module) -> dict[str, Tensor]:
    """What counts the batches of each norm with running statistics, by name.

    It differs between ranks: one without samples has passed some over.
    """
    return {
        f"{name}.num_batches_tracked" if name else "num_batches_tracked": module.num_batches_tracked
        for name, module in model.named_modules()
        if isinstance(module, _NormBase) and module.num_batches_tracked is not None
    }


def even_out_buffers(context: Context, model: nn.Module, weight: float) -> None:
    """Average the buffers that follow each rank's own samples, such as running statistics.

    Only those that differ: a mean would round the others, and of a mask's infinities make
    something else. Counters become the largest of all ranks'. Every rank has to call this.

    Args:
        context: this rank's place in the job.
        model: its buffers have the same names and shapes on all ranks.
        weight: what this rank's samples counted for since the last time.
    """
    buffers = [value for value in model.buffers() if value.is_floating_point()]
    counting = list(counters(model).values())
    if not buffers and not counting:
        return
    counts = [int(value) for value in counting]
    rows = context.gather_integers([*fingerprints(buffers), *counts])
    differing = [
        value
        for place, value in enumerate(buffers)
        if any(row[place] != rows[0][place] for row in rows)
    ]
    for place, counter in enumerate(counting, start=len(buffers)):
        counter.fill_(max(row[place] for row in rows))
    if differing:
        factor = weight / total_weight(row[0] for row in context.gather([weight]))
        means = Sum(context, differing, [factor] * len(differing)).wait()
        for value, mean in zip(differing, means, strict=True):
            value.copy_(mean)


def even_out_optimizer(
    context: Context, optimizer: Optimizer, names: Mapping[Tensor, str], weight: float
) -> None:
    """Average the state of the ranks' optimizers: momenta, squares of gradients.

    Counts of steps become the largest count. A rank that has no state for a parameter yet, for
    want of samples, is given the others'. Every rank has to call this.

    Args:
        context: this rank's place in the job.
        optimizer: this rank's own, over the same parameters on all ranks.
        names: of the parameters.
        weight: what this rank's samples counted for since the last time.
    """
    own = {
        (names[parameter], key): value
        for parameter, state in optimizer.state.items()
        if all(isinstance(value, Tensor) for value in state.values())
        for key, value in state.items()
    }
    told = [
        [*entry, list(value.shape), str(value.dtype).removeprefix("torch."),
         float(value) if value.numel() == 1 else None]
        for entry, value in own.items()
    ]  # fmt: skip
    everyones = [
        json.loads(text) for text in context.gather_bytes(json.dumps([weight, told]).encode())
    ]
    found: dict[tuple[str, str], dict[int, Any]] = {}
    for rank, (_, entries) in enumerate(everyones):
        for name, key, *rest in entries:
            found.setdefault((name, key), {})[rank] = rest
    parameters = {name: parameter for parameter, name in names.items()}
    values: list[Tensor] = []
    factors: list[float] = []
    for (name, key), having in found.items():
        total = sum(everyones[rank][0] for rank in having)
        if total == 0:
            continue  # nobody has used it
        shape, kind, number = next(iter(having.values()))
        device = torch.device("cpu") if key == "step" else parameters[name].device
        value = own.get((name, key))
        if value is None:
            value = torch.zeros(shape, dtype=getattr(torch, kind), device=device)
            optimizer.state[parameters[name]][key] = value
        if key == "step":
            value.fill_(max(entry[2] for entry in having.values()))
        elif number is not None:
            value.fill_(sum(having[rank][2] * everyones[rank][0] for rank in having) / total)
        elif value.is_floating_point():
            values.append(value)
            factors.append(weight / total if (name, key) in own else 0.0)
    for value, mean in zip(values, Sum(context, values, factors).wait(), strict=True):
        value.copy_(mean)
