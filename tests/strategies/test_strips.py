"""Convolutions split in space train as one process does, and send what the formula says."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import wagontrain as wt
from tests.gang import Gang
from tests.problems import OPTIMIZERS, VARIANTS, classes, numbers
from wagontrain import verify
from wagontrain.reference import Trace, train_plainly
from wagontrain.transport import Context

SAMPLES, BATCH, STEPS = 10, 4, 6  # the last of three batches has 2


def max_pooled() -> nn.Module:
    """k = 3, 5 and 1; the heights 13, 6, 4 are no multiples of any number of ranks."""
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1), nn.ReLU(inplace=True), nn.MaxPool2d(2),
        nn.Conv2d(4, 4, 5, padding=1, groups=2), nn.Tanh(), nn.Conv2d(4, 3, 1, bias=False),
        nn.Flatten(), nn.Linear(60, 3),
    )  # fmt: skip


def average_pooled() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 4, 5, stride=2, padding=3), nn.AvgPool2d(3, 1, padding=1), nn.ReLU(),
        nn.Conv2d(4, 4, (3, 2), padding="same"), nn.GELU(),
        nn.AvgPool2d(3, 2, padding=1, count_include_pad=False), nn.Conv2d(4, 4, 3, padding=2),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3),
    )  # fmt: skip


def normed() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.ReLU(),
        nn.MaxPool2d(3, 2, padding=1), nn.Conv2d(4, 4, 3, dilation=2, padding=2), nn.ReLU(),
        nn.BatchNorm2d(4, momentum=None), nn.Conv2d(4, 5, 3, padding=1), nn.SiLU(),
        nn.BatchNorm2d(5, affine=False), nn.Flatten(), nn.Linear(245, 3),
    )  # fmt: skip


def unshared() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 3, 3, padding=1), nn.ReLU(),
        wt.nn.LocallyConnected2d(3, 4, (13, 14), 3, stride=2, padding=1), nn.ReLU(),
        wt.nn.LocallyConnected2d(4, 2, 7, (3, 2), bias=False), nn.Flatten(), nn.Linear(60, 3),
    )  # fmt: skip


class Reused(nn.Module):
    """One pooling used everywhere, a skip connection, a scale that is learned, and NHWC images."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(2))
        self.one, self.two = nn.Conv2d(2, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.frozen = nn.Conv2d(4, 4, 3, padding=1).requires_grad_(False)
        self.three = nn.Conv2d(4, 4, 3, padding=1)
        self.pool = nn.MaxPool2d(2)
        self.norm, self.head = nn.BatchNorm2d(4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(F.relu(self.one(x * self.scale[:, None, None])))
        x = self.frozen(F.relu(self.two(x)))
        x = self.pool(x + self.three(x))
        return self.head(self.norm(torch.tanh(x)).mean((2, 3)))


def convolutions_only() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 3, 3), nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    )  # fmt: skip


MODELS: dict[str, Callable[[], nn.Module]] = {
    function.__name__: function
    for function in (max_pooled, average_pooled, normed, unshared, Reused, convolutions_only)
}


def task_of(model: str, optimizer: str = "momentum", variant: str = "plain") -> wt.Task:
    data = TensorDataset(numbers(SAMPLES, 2, 13, 14), classes(SAMPLES, 3))
    return wt.Task(
        model=MODELS[model], loss=F.cross_entropy, optimizer=OPTIMIZERS[optimizer], train=data,
        validation=data, batch_size=BATCH, epochs=2, **VARIANTS[variant],
    )  # fmt: skip


@functools.cache
def expected(*problem: str) -> Trace:
    with verify.computing_in("float64"):
        task, _ = verify.prepared(task_of(*problem), "float64")
        return train_plainly(task, torch.device("cpu"), 0, STEPS)


def trained(context: Context, settings: dict[str, Any], *problem: str) -> Any:
    strategy = wt.make_strategy("split-weights", {"strips": True, **settings})
    with verify.computing_in("float64"):
        task, _ = verify.prepared(task_of(*problem), "float64")
        with wt.Run(task, strategy, context) as run:
            losses = [run.step(batch).loss for batch in run.batches()]
            run.runner.check_replicas()
            values = run.validate()
            held = {name: tuple(value.shape) for name, value in run.runner.model.named_parameters()}
            state = run.runner.state_dict()["model"]
            trace = Trace.of(losses, run.task.build_model(), state)
            run.close()
    return trace, held, values


CASES = [
    *((model, "momentum", "plain", {}, size) for model in MODELS for size in (1, 2, 3, 4)),
    *((model, "adam", "clip", {}, 3) for model in MODELS),
    *((model, "adam", "accumulate", {"degree": 2}, 4) for model in MODELS),
    *((model, "momentum", "clip", {"placement": {}}, 2) for model in MODELS),
]


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize(("model", "optimizer", "variant", "settings", "size"), CASES)
def test_trains_as_one_process(
    gang: Gang, model: str, optimizer: str, variant: str, settings: dict[str, Any], size: int
) -> None:
    reference = expected(model, optimizer, variant)
    for trace, _, _ in gang.run(size, trained, settings, model, optimizer, variant):
        strategy = wt.make_strategy("split-weights")
        verdict = verify.compare(trace, reference, strategy, size, "float64")
        assert verdict.passed, verdict
