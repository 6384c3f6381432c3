"""How fast this rank computes steps of a task: measured by taking some."""

from __future__ import annotations

import copy
import dataclasses
import statistics
import time

import torch
from torch import nn

from wagontrain.batches import Batches
from wagontrain.objective import Objective, Update
from wagontrain.task import Task
from wagontrain.transport import Stopwatch

_SECONDS = 1.0


def step_cost(task: Task, device: torch.device) -> tuple[float, float]:
    """Seconds of a step here: what it takes anyway, and what each sample adds.

    Two sizes of batch are trained on for a while, on a model of their own. All ranks do so at
    the same time, as they will later.
    """
    sizes = sorted({max(1, task.batch_size // 8), max(1, task.batch_size // 2)})
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        model = copy.deepcopy(task.build_model()).to(device).train()
        update, objective = Update(task, model), Objective(task, device)
        update.scheduler = None  # it may be made for so many steps and no more
        taken = [_seconds(task, model, update, objective, size) for size in sizes]
    if len(sizes) == 1:
        return 0.0, taken[0]
    each = (taken[1] - taken[0]) / (sizes[1] - sizes[0])
    # Noise must not make a sample cost nothing.
    each = max(each, 0.1 * taken[1] / sizes[1])
    return max(0.0, taken[1] - each * sizes[1]), each


def _seconds(
    task: Task, model: nn.Module, update: Update, objective: Objective, size: int
) -> float:
    """Median seconds of a step on so many samples."""
    few = dataclasses.replace(task, batch_size=size, accumulate=1, shuffle=False, loader_workers=0)
    micro = next(Batches.of_training(few, objective.device).epoch(0)).micro_batches[0]
    clock = Stopwatch(objective.device)
    taken: list[float] = []
    began = time.perf_counter()
    # The first one warms up.
    while len(taken) < 4 or time.perf_counter() - began < _SECONDS:
        start = clock.mark()
        update.begin()
        objective(model, micro).backward()
        update.apply()
        taken.append(clock.between(start, clock.mark()))
    return statistics.median(taken[1:])
