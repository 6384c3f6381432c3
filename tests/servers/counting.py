"""A task whose parameters say exactly which samples were applied how often, and which learns.

`counts` has a number for each sample. Its gradient is -1 per sample, a mean over a batch of 8 in
every update and 8 its learning rate: an update adds exactly 1 to the number of each of its samples.
Beside it a linear layer learns a line from noisy points.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset

import wagontrain as wt

SAMPLES, BATCH = 256, 8


class Points(Dataset[Any]):
    """((number, point), value) of the first so many samples."""

    def __init__(self, count: int = SAMPLES) -> None:
        numbers = torch.Generator().manual_seed(7)
        self.count = count
        self.points = torch.randn(SAMPLES, 6, generator=numbers)
        noise = torch.randn(SAMPLES, 1, generator=numbers) * 0.3
        self.values = self.points @ torch.arange(6.0).unsqueeze(1) + noise

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Any:
        return (index, self.points[index]), self.values[index]


class Counting(nn.Module):
    """(numbers [n], points [n, 6]) -> counts of these samples [n], line [n, 1], sum of all counts.

    Args:
        pace: called before every training step.
    """

    def __init__(self, pace: Callable[[], None]) -> None:
        super().__init__()
        self.counts = nn.Parameter(torch.zeros(SAMPLES))
        self.line = nn.Linear(6, 1)
        self.pace = pace

    def forward(self, numbers: Tensor, points: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if self.training:
            self.pace()
        return self.counts[numbers], self.line(points), self.counts.sum()


def loss(output: tuple[Tensor, Tensor, Tensor], target: Tensor) -> Tensor:
    """What the line misses, less the mean of the counts."""
    return F.mse_loss(output[1], target) - output[0].mean()


def error(output: tuple[Tensor, Tensor, Tensor], target: Tensor) -> Tensor:
    """What the line misses."""
    return F.mse_loss(output[1], target)


def applied(output: tuple[Tensor, Tensor, Tensor], target: Tensor) -> Tensor:
    """How many samples the parameters know of."""
    return output[2]


def optimizer(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    counts, *line = parameters
    groups = [{"params": [counts], "lr": float(BATCH)}, {"params": line, "lr": 0.01}]
    return torch.optim.SGD(groups)


def until_there_is(file: Path, seconds: float) -> None:
    """Wait before a step, as long as there is no such file."""
    if not file.exists():
        time.sleep(seconds)


def task(epochs: int, pace: Callable[[], None] = lambda: None) -> wt.Task:
    return wt.Task(
        model=partial(Counting, pace), loss=loss, optimizer=optimizer, train=Points(),
        validation=Points(2 * BATCH), metrics={"error": error, "applied": applied},
        batch_size=BATCH, epochs=epochs,
    )  # fmt: skip


def check(
    weights: dict[str, Tensor], summary: dict[str, Any], events: list[dict[str, Any]], epochs: int
) -> None:
    """Every sample counted once an epoch, on both halves, and the run knows it."""
    assert weights["counts"].eq(epochs).all(), weights["counts"].unique(return_counts=True)
    assert summary["samples"] == epochs * SAMPLES
    assert summary["steps"] == epochs * SAMPLES // BATCH
    assert summary["lost"] == 0
    if summary["settings"]["consistency"] != "synchronous":  # where a step is made of several
        assert sum(each["pushes"] for each in summary["workers"].values()) == summary["steps"]
    validations = [event for event in events if event["kind"] == "validation"]
    assert sorted(event["epoch"] for event in validations) == list(range(epochs))
    # What was validated is the same state on all shards.
    for event in validations:
        assert event["values"]["applied"] == BATCH * event["step"], event
