"""Trainings that go wrong: the error says where, and nothing of it is kept."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import wagontrain as wt
from tests.gang import Gang
from tests.problems import classes
from tests.strategies.test_data_parallel import Conditional, conditional_task
from wagontrain.strategies.data_parallel import DataParallel
from wagontrain.transport import Context


class _Counting(nn.Module):
    """Keeps a running mean of its inputs in a buffer: different on each rank."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(3, 2)
        self.register_buffer("mean", torch.zeros(3))

    def forward(self, x: Tensor) -> Tensor:
        self.mean.lerp_(x.detach().mean(0), 0.1)
        return self.head(x)


def message_of(context: Context, model: Any, **fields: Any) -> str:
    """The error that training a model for a few steps ends with."""
    task = dataclasses.replace(conditional_task(), model=model, **fields)
    try:
        with wt.Run(task, DataParallel(), context) as run:
            for batch in run.batches():
                run.step(batch)
            run.check_replicas()
    except wt.WagontrainError as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def test_a_buffer_that_follows_each_ranks_own_samples_is_an_error(gang: Gang) -> None:
    assert "no error" in message_of(Context(), _Counting)
    for message in gang.run(2, message_of, _Counting):
        assert message.startswith("ReplicaError: buffer 'mean' of rank 1 is no longer")


def drift(context: Context) -> str:
    task = conditional_task()
    with wt.Run(task, DataParallel(find_unused_parameters=True), context) as run:
        run.check_replicas()
        if context.world.rank == 1:
            with torch.no_grad():
                run.model.always.weight[0, 0].add_(1e-6)
        try:
            run.check_replicas()
        except wt.ReplicaError as error:
            return str(error)
    return "no error"


def test_a_drifting_replica_is_noticed(gang: Gang) -> None:
    for message in gang.run(3, drift):
        assert "parameter 'always.weight' of rank 1" in message


class _Explodes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x) * (float("nan") if x[0, 0] > 2 else 1.0)


def test_a_nan_names_step_rank_and_samples(gang: Gang) -> None:
    data = torch.zeros(64, 3)
    data[3 * 8 + 4, 0] = 3.0  # step 3, first sample of rank 1
    fields = {"train": TensorDataset(data, classes(64, 2)), "shuffle": False}
    for message in gang.run(2, message_with, _Explodes, fields):
        assert message.startswith("LossError: the loss is nan at step 3 (epoch 0) on rank 1")
        assert "samples 28 to 31 in the epoch's order" in message


def message_with(context: Context, model: Any, fields: dict[str, Any]) -> str:
    return message_of(context, model, **fields)


def weights_after_nan(context: Context) -> bool:
    data = torch.zeros(64, 3)
    data[8, 0] = 3.0
    task = dataclasses.replace(
        conditional_task(), model=_Explodes, shuffle=False,
        train=TensorDataset(data, classes(64, 2)),
    )  # fmt: skip
    with wt.Run(task, DataParallel(), context) as run:
        batches = run.batches()
        run.step(next(batches))
        try:
            run.step(next(batches))
        except wt.LossError:
            return all(bool(value.isfinite().all()) for value in run.model.parameters())
    return False


@pytest.mark.parametrize("size", [1, 2])
def test_a_nan_never_reaches_the_weights(gang: Gang, size: int) -> None:
    assert all(gang.run(size, weights_after_nan))


def summed(output: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(output, target, reduction="sum")


def weighted(output: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(output, target, weight=torch.tensor([1.0, 20.0]))


@pytest.mark.parametrize("loss", [summed, weighted])
def test_a_loss_that_is_no_mean_is_refused(gang: Gang, loss: Any) -> None:
    for message in gang.run(2, message_with, partial(nn.Linear, 3, 2), {"loss": loss}):
        assert message.startswith("TaskError: the loss is not a mean over the samples given")


class _TwiceDifferentiated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 2))

    def forward(self, x: Tensor) -> Tensor:
        x = x.requires_grad_()
        with torch.enable_grad():
            y = self.net(x)
            (slope,) = torch.autograd.grad(y.sum(), x, create_graph=True)
        return y + slope[:, :2]


def twice(context: Context) -> str:
    try:
        return message_of(context, _TwiceDifferentiated)
    except RuntimeError as error:
        return str(error)


def test_a_second_derivative_through_batch_norm_is_an_error(gang: Gang) -> None:
    assert twice(Context()) == "no error"
    for message in gang.run(2, twice):
        assert "once_differentiable" in message


def test_a_parameter_left_out_names_the_setting(gang: Gang) -> None:
    """Half of the steps leave out a layer, which the trial step did not show."""
    data = torch.zeros(64, 3)
    data[:8] = 1.0  # the first batch uses it on all ranks, later ones on none
    fields = {"train": TensorDataset(data, classes(64, 2)), "shuffle": False}
    for message in gang.run(2, message_with, Conditional, fields):
        assert "--set find_unused_parameters=true" in message


class _InfiniteSlope(nn.Module):
    """A finite loss with an infinite gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.head(x)
        return y + (y * 0).abs().sqrt()


def spoiled_save(context: Context) -> tuple[str, str]:
    task = dataclasses.replace(conditional_task(), model=_InfiniteSlope)
    with wt.Run(task, DataParallel(), context) as run:
        batches = run.batches()
        run.step(next(batches))
        messages = []
        for attempt in (run.save, lambda: run.step(next(batches))):
            try:
                attempt()
            except wt.LossError as error:
                messages.append(str(error))
    return tuple(messages)  # type: ignore[return-value]


def test_a_gradient_that_is_not_finite_is_not_saved_and_not_blamed_on_the_next_step() -> None:
    on_save, on_step = spoiled_save(Context())
    assert "'head.weight' is not finite after step 0" in on_save
    assert "parameter 'head.weight' was not finite any more: a gradient of an earlier" in on_step
