"""One process and plain PyTorch: what every exact strategy has to equal.

This is the oracle of `wagontrain verify` and of the conformance tests. It uses the task and the
order of samples and nothing else of wagontrain, so that a mistake in a runner is not repeated
here.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from wagontrain.batches import Batch, Batches
from wagontrain.task import Task, call_model


@dataclass(frozen=True)
class Trace:
    """What a stretch of training gave: the loss of every step, and the state after the last.

    `initial` holds the parameters before the first step, where they were kept.
    """

    losses: list[float]
    parameters: dict[str, Tensor]
    buffers: dict[str, Tensor]
    initial: dict[str, Tensor] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        losses: list[float],
        model: nn.Module,
        state: Mapping[str, Any],
        initial: dict[str, Tensor] | None = None,
    ) -> Trace:
        """The losses, with a copy of the model's parameters and persistent buffers in `state`.

        The names are the model's, a tied parameter comes once; the values are the state's,
        because a strategy may keep only a part of a tensor in the model.
        """
        parameters = {name: state[name] for name, _ in model.named_parameters()}
        buffers = {name: state[name] for name, _ in model.named_buffers() if name in state}
        return cls(losses, copied(parameters), copied(buffers), initial or {})


def copied(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies on the CPU."""
    return {name: value.detach().cpu().clone() for name, value in tensors.items()}


def stretch(batches: Batches, first_step: int, steps: int) -> Iterator[Batch]:
    """`steps` batches from step `first_step` of the whole training on, across epochs."""
    epoch, step = divmod(first_step, batches.order.steps)
    epochs = itertools.count(epoch)
    every = itertools.chain.from_iterable(
        batches.epoch(number, step if number == epoch else 0) for number in epochs
    )
    return itertools.islice(every, steps)


def train_plainly(task: Task, device: torch.device, first_step: int, steps: int) -> Trace:
    """Train on one process for `steps` steps from fresh weights, and keep what happened."""
    model = task.build_model().to(device).train()
    initial = copied(dict(model.named_parameters()))
    optimizer = task.build_optimizer(model, closures=True)
    scheduler = task.build_scheduler(optimizer)
    losses = []
    for batch in stretch(Batches.of_training(task, device), first_step, steps):
        weights = [_weight(task, micro.target, micro.count) for micro in batch.micro_batches]

        def gradient(batch: Batch = batch, weights: list[float] = weights) -> float:
            optimizer.zero_grad()
            mean = 0.0
            for micro, weight in zip(batch.micro_batches, weights, strict=True):
                with torch.autocast(
                    device.type, dtype=torch.bfloat16, enabled=task.precision == "bfloat16"
                ):
                    loss = task.loss(call_model(model, micro.inputs), micro.target)
                (loss * (weight / sum(weights))).backward()
                mean += float(loss.detach()) * weight / sum(weights)
            if task.clip_grad_norm is not None:
                torch.nn.utils.clip_grad_norm_(model.parameters(), task.clip_grad_norm)
            return mean

        if isinstance(optimizer, torch.optim.LBFGS):
            loss_before = optimizer.step(gradient)  # which it takes at several points
        else:
            loss_before = gradient()
            optimizer.step()
        if scheduler is not None:
            scheduler.step()
        losses.append(float(loss_before))
    return Trace.of(losses, model, model.state_dict(), initial)


def _weight(task: Task, target: Any, count: int) -> float:
    return float(count if task.weight is None else task.weight(target))
