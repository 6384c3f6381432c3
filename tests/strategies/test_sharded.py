"""Sharded: what a rank holds, what travels, what is refused. That it is exact: test_conformance."""

from __future__ import annotations

import dataclasses
import math
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import TensorDataset

import wagontrain as wt
from tests.gang import Gang
from tests.problems import build, classes, numbers
from wagontrain.folder import RunFolder
from wagontrain.layout import local
from wagontrain.mesh import World
from wagontrain.sharding import units
from wagontrain.transport import Context

WIDTH, LAYERS = 96, 4
PARAMETERS = LAYERS * (WIDTH * WIDTH + WIDTH) + 3 * WIDTH + 3


def deep() -> nn.Module:
    layers: list[nn.Module] = []
    for _ in range(LAYERS):
        layers += [nn.Linear(WIDTH, WIDTH), nn.Tanh()]
    return nn.Sequential(*layers, nn.Linear(WIDTH, 3))


def deep_task(model: Any = deep, **changes: Any) -> wt.Task:
    fields: dict[str, Any] = {
        "loss": F.cross_entropy, "optimizer": partial(torch.optim.Adam, lr=0.01),
        "train": TensorDataset(numbers(48, WIDTH), classes(48, 3)), "batch_size": 12,
    }  # fmt: skip
    return wt.Task(model=model, **(fields | changes))


def trained(context: Context, settings: dict[str, Any]) -> tuple[list[int | None], int, int]:
    """Bytes of each step; numbers of weights, and of optimizer state, that this rank holds."""
    with wt.Run(deep_task(), wt.make_strategy("sharded", settings), context) as run:
        found = [run.step(batch).sent for batch in run.batches()]
        run.check_replicas()
        weights = sum(local(value).numel() for value in run.model.parameters())
        state = sum(
            local(value).numel()
            for entries in run.runner.training.optimizer.state.values()
            for value in entries.values()
            if value.dim()
        )
        run.close()
    return found[1:], weights, state


@pytest.mark.parametrize(("stage", "times"), [(1, 2), (2, 2), (3, 3)])
@pytest.mark.parametrize("size", [2, 4])
def test_bytes_and_what_is_held(gang: Gang, size: int, stage: int, times: int) -> None:
    """In stage 3 the root's own weights stay gathered from forward to backward."""
    expected = times * (size - 1) / size * PARAMETERS * 4
    answers = gang.run(size, trained, {"stage": stage, "least": 1000})
    for found, weights, state in answers:
        for count in found:
            assert count is not None
            if stage != 1:  # which rank updates how much is even only over all of them
                assert 0.9 * expected < count < 1.1 * expected + 2000 * size
        held = PARAMETERS if stage == 1 else PARAMETERS / size
        assert weights == pytest.approx(held, rel=0.02)
        assert state == pytest.approx(2 * PARAMETERS / size, rel=0.15)
    total = sum(count or 0 for found, _, _ in answers for count in found)
    steps = len(answers[0][0])
    assert total / size / steps == pytest.approx(expected, rel=0.12)


def test_units_are_the_smallest_modules_that_are_large_enough() -> None:
    model = deep()
    assert units(model, 1000) == [model[index] for index in range(0, 2 * LAYERS, 2)]  # type: ignore[index]
    assert units(model, 10**6) == []
    nested = nn.Sequential(deep(), deep())
    assert units(nested, 30_000) == list(nested)


def test_tied_weights_are_in_one_unit() -> None:
    model = nn.Sequential(nn.Embedding(50, 8), nn.Linear(8, 8), nn.Linear(8, 50, bias=False))
    model[2].weight = model[0].weight
    assert units(model, 40) == [model[1]]


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale, self.line = nn.Parameter(torch.ones(())), nn.Linear(WIDTH, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.line(x) * self.scale


def refused(context: Context, changes: dict[str, Any]) -> str:
    try:
        wt.Run(deep_task(**changes), wt.make_strategy("sharded"), context).close()
    except wt.UsageError as error:
        return str(error)
    return "taken"


def muon(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.Adafactor(parameters)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model": Scaled}, "parameter 'scale' is a single number, which cannot be divided"),
        ({"optimizer": muon}, "Adafactor is not known to treat every number of a tensor by itself"),
    ],
)
def test_what_cannot_be_divided_is_refused(gang: Gang, changes: dict[str, Any], said: str) -> None:
    for message in gang.run(2, refused, changes):
        assert said in message


def test_settings_and_workers_are_checked() -> None:
    with pytest.raises(wt.UsageError, match="stage=4"):
        wt.make_strategy("sharded", {"stage": 4})
    with pytest.raises(wt.UsageError, match="least is 0"):
        wt.make_strategy("sharded", {"least": 0})
    with pytest.raises(wt.UsageError, match="13 workers cannot share a batch of 12"):
        wt.make_strategy("sharded").check(deep_task(), World(size=13))


def validated_and_saved(context: Context, folder: Path, stage: int) -> list[float]:
    task = dataclasses.replace(build("conv-batch-norm", "adam", "plain"), epochs=3)
    task = dataclasses.replace(task, validation=task.train)
    keep = RunFolder(folder) if context.world.rank == 0 else None
    strategy = wt.make_strategy("sharded", {"stage": stage, "least": 8})
    with wt.Run(task, strategy, context, keep) as run:
        losses = []
        for epoch in run.epochs():
            losses += [run.step(batch).loss or 0.0 for batch in run.batches(epoch)]
            run.validate()
            run.check_replicas()
            run.save()
        run.close()
    return losses


@pytest.mark.parametrize("stage", [2, 3])
def test_saves_between_validation_and_the_next_epoch(
    gang: Gang, tmp_path: Path, stage: int
) -> None:
    """Weights that validation gathered were once in the way of whoever looked at the state."""
    folder = RunFolder.create(tmp_path, "x").path
    losses = gang.run(2, validated_and_saved, folder, stage)[0]
    assert len(losses) == 9
    assert all(map(math.isfinite, losses))
    assert len(list((folder / "checkpoints").glob("step-*"))) >= 1
