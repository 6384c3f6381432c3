"""Profiles on paper: what layers are, without memory, and what they take on a machine."""

from __future__ import annotations

import dataclasses
import math
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import wagontrain as wt
from benchmarks import models
from wagontrain.errors import TaskError, UsageError
from wagontrain.objective import Objective
from wagontrain.planner.facts import layers_of
from wagontrain.planner.paper import Machine, on_paper
from wagontrain.profile import Profile
from wagontrain.trial import trial_batch

MACHINE = Machine(speed=1000.0, bandwidth=100.0, device="cuda", call=1e-5)


def task_of(model: object, train: TensorDataset, **fields: object) -> wt.Task:
    given: dict[str, object] = {
        "loss": F.cross_entropy, "optimizer": partial(torch.optim.SGD, lr=0.1), "batch_size": 8,
        "epochs": 1,
    }  # fmt: skip
    return wt.Task(model=model, train=train, **(given | fields))  # type: ignore[arg-type]


def classes(*shape: int, below: int = 10) -> TensorDataset:
    return TensorDataset(torch.randn(16, *shape), torch.randint(below, (16,)))


@pytest.mark.parametrize("name", sorted(models.PROBLEMS))
def test_layers_without_memory_are_those_with(name: str) -> None:
    """But for the arithmetic of CPU kernels that have no match without memory."""
    task = models.task(name)
    profile = on_paper(task, MACHINE)
    assert profile.nbytes == models.exchanged_bytes(task.build_model()) or "recommender" in name
    if name in ("alexnet", "vgg16", "recommender", "dense_recommender"):
        return  # they take long, or much memory
    model = task.build_model().train()
    device = torch.device("cpu")
    layers = layers_of(model, Objective(task, device), trial_batch(task, device))
    assert len(layers) == len(profile.layers)
    for here, there in zip(layers, profile.layers, strict=True):
        apart: dict[str, Any] = {"kept": 0.0, "forward": None, "backward": None}
        if name == "gpt":  # attention is another kernel on the CPU, whose products are not counted
            apart["flops"] = 0.0
        assert dataclasses.replace(here, **apart) == dataclasses.replace(there, **apart)
    kept = [sum(layer.kept for layer in some) for some in (layers, profile.layers)]
    assert kept[1] == pytest.approx(kept[0], rel=0.15)


def test_alexnet_is_the_papers() -> None:
    """2.47 million weights in convolutions, 58.6 in the rest; 92 % of the products there."""
    layers = on_paper(models.task("alexnet"), MACHINE).layers
    convolutions = [layer for layer in layers if layer.kind == "Conv2d"]
    linear = [layer for layer in layers if layer.kind == "Linear"]
    assert sum(layer.nbytes for layer in convolutions) == 4 * 2_469_696
    assert sum(layer.nbytes for layer in linear) == 4 * 58_631_144
    flops = [sum(layer.flops for layer in some) for some in (convolutions, linear)]
    assert flops[0] / sum(flops) == pytest.approx(0.918, abs=0.001)
    assert sum(flops) == sum(layer.flops for layer in layers)


def test_either_roof_limits() -> None:
    """A product of 1,000 x 1,000: 2 · 10⁶ operations a sample, and 4 · 10⁶ bytes of weights."""
    task = task_of(
        partial(nn.Sequential, nn.Linear(1000, 1000, bias=False), nn.ReLU(),
                nn.Linear(1000, 1000, bias=False)),
        TensorDataset(torch.randn(1000, 1000), torch.randint(1000, (1000,))), batch_size=1000,
    )  # fmt: skip
    first, between, last = on_paper(task, MACHINE).layers
    weights, moved, flops = 4e6 / 100e9, 8000 / 100e9, 2e6 / 1000e9
    assert last.forward(1) == pytest.approx(1e-5 + weights + moved)
    assert last.forward(1000) == pytest.approx(1e-5 + 1000 * flops)
    assert last.backward(1000) == pytest.approx(1e-5 + 2000 * flops)
    assert first.backward(1000) == pytest.approx(1e-5 + 1000 * flops)  # no gradient of the input
    assert between.forward(1000) == pytest.approx(1e-5 + 1000 * moved)
    assert between.backward(1000) == pytest.approx(1e-5 + 1000 * moved)
    for layer in (first, between, last):
        for line in (layer.forward, layer.backward):
            assert line.fixed >= 0
            assert line.each > 0


def test_tables_are_not_read_whole() -> None:
    rows, width = 1_000_000, 16
    task = task_of(
        partial(nn.Sequential, nn.Embedding(rows, width), nn.Flatten(), nn.Linear(width, 10)),
        TensorDataset(torch.randint(rows, (16, 1)), torch.randint(10, (16,))),
    )
    table = on_paper(task, MACHINE).layers[0]
    assert table.forward(1) < 1.1e-5
    assert table.backward(1) == pytest.approx(1e-5 + 4 * rows * width / 100e9, rel=0.01)


@pytest.mark.parametrize(
    ("optimizer", "state"),
    [
        (partial(torch.optim.SGD, lr=0.1), 0),
        (partial(torch.optim.SGD, lr=0.1, momentum=0.9), 1),
        (partial(torch.optim.Adagrad, lr=0.1), 1),
        (partial(torch.optim.AdamW, lr=0.1), 2),
    ],
)
def test_what_the_optimizer_keeps(optimizer: object, state: int) -> None:
    task = task_of(partial(nn.Linear, 100, 10), classes(100), optimizer=optimizer)
    profile = on_paper(task, MACHINE)
    assert profile.optimizer == state
    assert profile.update(1e6) == pytest.approx(1e-5 + (3 + 2 * state) * 1e6 / 100e9)
    assert (profile.sample, profile.batch_size, profile.device) == (408, 8, "cuda")
    assert Profile.from_json(profile.to_json()) == profile


class Looking(nn.Module):
    """It scales its weights by what they are."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(100, 10)
        if float(self.linear.weight.abs().max()) > 1:
            raise AssertionError

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)


def test_a_model_that_looks_at_its_weights_is_refused() -> None:
    with pytest.raises(TaskError, match="cannot be built without memory"):
        on_paper(task_of(Looking, classes(100)), MACHINE)


def test_a_model_that_was_built_before_stays_as_it_is() -> None:
    model = nn.Linear(100, 10)
    before = model.weight.detach().clone()
    profile = on_paper(task_of(lambda: model, classes(100)), MACHINE)
    assert profile.nbytes == 4 * 1010
    assert torch.equal(model.weight, before)


def test_a_model_that_fits_nowhere() -> None:
    """70 billion weights take 280 GB; nothing of that is allocated."""

    def model() -> nn.Module:
        return nn.Sequential(*(nn.Linear(8192, 8192, bias=False) for _ in range(1043)))

    task = task_of(model, classes(8192, below=8192), precision="bfloat16")
    profile = on_paper(task, MACHINE)
    assert profile.nbytes == pytest.approx(280e9, rel=0.01)
    assert math.isfinite(sum(layer.backward(8) for layer in profile.layers))


@pytest.mark.parametrize("field", ["speed", "bandwidth", "call"])
def test_paces_are_needed(field: str) -> None:
    with pytest.raises(UsageError, match=f"{field} is 0: give a number above 0"):
        dataclasses.replace(MACHINE, **{field: 0})
