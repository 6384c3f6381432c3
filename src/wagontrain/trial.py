"""Trying a task on a few samples before anything is exchanged: what fails, fails here.

It runs on a second model, so that the first one's buffers and state stay untouched.
"""

from __future__ import annotations

import copy
import dataclasses

import torch
from torch import nn

from wagontrain.batches import Batches, MicroBatch
from wagontrain.objective import Objective
from wagontrain.task import Task, trainable

_SAMPLES = 8


def trial_batch(task: Task, device: torch.device, samples: int = _SAMPLES) -> MicroBatch:
    """A few samples, the same on every rank."""
    few = dataclasses.replace(
        task,
        batch_size=min(samples, task.batch_size),
        accumulate=1,
        shuffle=False,
        loader_workers=0,
    )
    return next(Batches.of_training(few, device).epoch(0)).micro_batches[0]


def trial_model(task: Task, model: nn.Module) -> nn.Module:
    """Another model like `model`, in training mode."""
    device = next(model.parameters()).device
    other = task.build_model().to(device).train()
    own = {id(parameter) for parameter in model.parameters()}
    if any(id(parameter) in own for parameter in other.parameters()):
        return copy.deepcopy(model).train()  # the task gives out the same one each time
    return other


def unused_in_trial(task: Task, objective: Objective, model: nn.Module) -> list[str]:
    """Names of parameters without gradient after a backward pass on a few samples.

    It runs on every rank: a model that fails does so here.

    Raises:
        TaskError: the loss is no mean over samples.
        ModelError: the model or the loss failed.
    """
    other, batch = trial_model(task, model), trial_batch(task, objective.device)
    with torch.random.fork_rng():
        loss = objective(other, batch)
        loss.backward()
        objective.require_mean(other.eval(), batch)
    return [name for name, parameter in trainable(other) if parameter.grad is None]
