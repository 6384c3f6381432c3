"""Hosts on which no whole copy of the model fits, and nothing shared. Needs a test bed."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import pytest

from tests.whole.beds import said_on_hosts

pytestmark = [pytest.mark.whole, pytest.mark.testbed]

HOSTS, LAYERS, WIDTH = 4, 60, 1024
NEEDED = LAYERS * (WIDTH * WIDTH + WIDTH) * 4 * 4  # float32: weights, gradients, two of Adam's
MEMORY = "800M"  # an interpreter that has imported torch takes some 350 of it
assert NEEDED > 1e9

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


def run(folder: Path, strategy: str) -> tuple[int, str]:
    (folder / "job.py").write_text(TASK)
    command = ("wagontrain", "run", "job.py", "--strategy", strategy, "--run-dir", "R")
    status, said = said_on_hosts(folder, *command, hosts=HOSTS, more=("--memory", MEMORY))
    print(said)  # shown whole where the test fails
    return status, said


def test_data_parallel_refuses_with_the_numbers(tmp_path: Path) -> None:
    status, said = run(tmp_path, "data-parallel")
    assert status == 2, said
    found = re.search(r"takes (\S+) GB, but a worker has (\S+) GB left: take a strategy", said)
    assert found, said
    assert float(found[1]) == pytest.approx(NEEDED / 1e9, abs=0.005)
    assert float(found[2]) < 0.8
    assert not (tmp_path / "R").exists()


def test_those_that_divide_it_train_from_the_same_weights(tmp_path: Path) -> None:
    curves = {}
    for strategy in ("split-weights", "hybrid", "sharded", "pipeline"):
        folder = tmp_path / strategy
        folder.mkdir()
        status, said = run(folder, strategy)
        assert status == 0, (strategy, said[-4000:])
        lines = (folder / "R" / "events.jsonl").read_text().splitlines()
        events = [json.loads(line) for line in lines]
        curves[strategy] = [event["loss"] for event in events if event["kind"] == "step"]
        assert len(curves[strategy]) == 2
        assert all(map(math.isfinite, curves[strategy]))
    for strategy, losses in curves.items():
        assert losses == pytest.approx(curves["split-weights"], rel=1e-5), strategy
