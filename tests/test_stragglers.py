"""A slow worker gets less to do, or is named."""

from __future__ import annotations

import re
import time
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import wagontrain as wt
from tests.gang import Gang
from tests.strategies.test_data_parallel import conditional_task
from wagontrain.strategies.data_parallel import DataParallel
from wagontrain.transport import Context


def balanced(context: Context) -> tuple[float, ...]:
    class Slow(nn.Linear):
        def forward(self, inputs: Tensor) -> Tensor:
            # Three times as slow on rank 1, by the sample; long against a busy machine's noise.
            time.sleep(len(inputs) * (3e-2 if context.world.rank == 1 else 1e-2))
            return super().forward(inputs)

    task = wt.Task(
        model=lambda: Slow(3, 2), loss=F.cross_entropy,
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1),
        train=TensorDataset(torch.ones(64, 3), torch.zeros(64, dtype=torch.long)), batch_size=32,
    )  # fmt: skip
    run = wt.Run(task, DataParallel(balance=True), context)
    for batch in run.batches():
        run.step(batch)
    summary = run.finish()
    assert summary["straggler"] is None
    assert run.runner.cut.weights is not None
    assert summary["shares"] == run.runner.cut.weights
    return run.runner.cut.weights


def test_balance_gives_a_slow_worker_less(gang: Gang) -> None:
    first, second = gang.run(2, balanced)
    assert first == second
    assert 2.5 < first[0] / first[1] < 3.5


def straggling(context: Context) -> dict[str, Any]:
    class Slow(nn.Linear):
        def forward(self, inputs: Tensor) -> Tensor:
            # Long against what a step takes besides, also on a busy machine.
            time.sleep(0.12 if context.world.rank == 1 else 0.04)
            return super().forward(inputs)

    task = wt.Task(
        model=lambda: Slow(3, 2), loss=F.cross_entropy,
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1),
        train=TensorDataset(torch.ones(64, 3), torch.zeros(64, dtype=torch.long)), batch_size=8,
    )  # fmt: skip
    run = wt.Run(task, DataParallel(), context)
    for batch in run.batches():
        run.step(batch)
    return run.finish()


def test_who_is_waited_for_is_named(gang: Gang) -> None:
    """Though an exchange evens out what a whole step takes on each."""
    for summary in gang.run(3, straggling):
        found = re.fullmatch(
            r"rank 1 on host .* is (\d\.\d)× slower; the others waited (\d+) % of the time for it",
            summary["straggler"].replace("%", " %"),
        )
        assert found
        assert 1.8 < float(found[1]) < 3.2
        assert 40 < int(found[2]) < 75
        assert summary["times_per_rank"][1]["own_seconds"] > 0.2


def times(context: Context) -> list[Any]:
    with wt.Run(conditional_task(), DataParallel(find_unused_parameters=True), context) as run:
        reports = [run.step(batch).before for batch in run.batches()]
        run.close()
    return reports


def test_reports_carry_the_times_of_all_ranks(gang: Gang) -> None:
    first, *others = gang.run(3, times)[0]
    assert first is None
    for before in others:
        assert len(before.compute) == len(before.exposed) == 3
        assert all(seconds > 0 for seconds in before.compute)
        assert min(before.waiting) == 0
        assert before.exchange >= 0
