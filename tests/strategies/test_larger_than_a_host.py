"""Hosts on which no whole copy of the model fits: who refuses, and who trains. Needs a test bed."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.forks import Fork
from tests.hosts import Nursery

pytestmark = pytest.mark.testbed

HOSTS, LAYERS, WIDTH = 3, 20, 1024
NEEDED = LAYERS * (WIDTH * WIDTH + WIDTH) * 4 * 4  # float32: weights, gradients, two of Adam's
# What a host has beside a process that has imported torch: less than NEEDED, but more than a
# third of it, what a run takes for itself (some 80 MB) and a part of a checkpoint on its way.
ROOM = NEEDED - 20 * 10**6

TASK = f"""
from functools import partial
import torch
from torch import nn
import torch.nn.functional as F
from torch.utils.data import TensorDataset
import wagontrain as wt

def model():
    layers = (layer for _ in range({LAYERS}) for layer in (nn.Linear({WIDTH}, {WIDTH}), nn.Tanh()))
    return nn.Sequential(*layers)

def task():
    x = torch.randn(16, {WIDTH}, generator=torch.Generator().manual_seed(1))
    return wt.Task(model=model, loss=F.mse_loss, optimizer=partial(torch.optim.Adam, lr=1e-4),
                   train=TensorDataset(x, x), batch_size=16, epochs=2)
"""
DIVIDING = ["split-weights", "hybrid", "sharded", "pipeline"]


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nursery]:
    """Hosts with little memory beside what importing torch has taken.

    Runs there are forks, and what a fork shares with others is not charged to its host: the
    kernel leaves it more than it is told.
    """
    folder = tmp_path_factory.mktemp("taken")
    program = "from wagontrain.building import taken_bytes; print(taken_bytes())"
    taken = int(Fork(["-"], folder, dict(os.environ), program).communicate(60)[0])
    made = Nursery(HOSTS)
    try:
        for host in range(HOSTS):
            made.bed.caps.set_memory(host, taken + ROOM)
        yield made
    finally:
        made.down()


def run(small: Nursery, folder: Path, strategy: str) -> list[tuple[int, str]]:
    """Exit status and output of every rank."""
    (folder / "job.py").write_text(TASK)
    asked = ("run", "job.py", "--strategy", strategy, "--run-dir", "R")
    children = [small.run(host, HOSTS, folder, *asked) for host in range(HOSTS)]
    return [child.end(within=100) for child in children]


def test_data_parallel_refuses_with_the_numbers(small: Nursery, tmp_path: Path) -> None:
    for status, said in run(small, tmp_path, "data-parallel"):
        assert status == 2, said
        found = re.search(r"takes (\S+) GB, but a worker has (\S+) GB left: take a strategy", said)
        assert found, said
        needed, left = (float(number) for number in found.groups())
        assert needed == pytest.approx(NEEDED / 1e9, abs=0.005)
        assert NEEDED / HOSTS / 1e9 < left < needed
        assert said.count("\n") == 1
    assert not (tmp_path / "R").exists()


def test_those_that_divide_it_train_from_the_same_weights(small: Nursery, tmp_path: Path) -> None:
    curves = {}
    for strategy in DIVIDING:
        folder = tmp_path / strategy
        folder.mkdir()
        for status, said in run(small, folder, strategy):
            assert status == 0, (strategy, said[-2000:])
        lines = (folder / "R" / "events.jsonl").read_text().splitlines()
        events = [json.loads(line) for line in lines]
        curves[strategy] = [event["loss"] for event in events if event["kind"] == "step"]
        assert len(curves[strategy]) == 2
        assert all(map(math.isfinite, curves[strategy]))
        assert (folder / "R" / "checkpoints" / "step-2" / "state.json").exists()
    for strategy, losses in curves.items():
        assert losses == pytest.approx(curves[DIVIDING[0]], rel=1e-5), strategy
