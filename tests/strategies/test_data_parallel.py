from __future__ import annotations

import dataclasses
import statistics
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import wagontrain as wt
from tests.gang import Gang
from tests.problems import build, classes, numbers
from wagontrain import verify
from wagontrain.reference import Trace, train_plainly
from wagontrain.strategies.data_parallel import DataParallel
from wagontrain.transport import Context


def trained(context: Context, settings: dict[str, Any], *problem: str, steps: int = 6) -> Trace:
    with verify.computing_in("float64"):
        task, _ = verify.prepared(build(*problem), "float64")
        return verify.trace_strategy(
            task, wt.make_strategy("data-parallel", settings), context, steps
        )


def deviation(gang: Gang, size: int, settings: dict[str, Any], *problem: str) -> float:
    with verify.computing_in("float64"):
        task, _ = verify.prepared(build(*problem), "float64")
        reference = train_plainly(task, torch.device("cpu"), verify.first_step(task, 6), 6)
    strategy = wt.make_strategy("data-parallel", settings)
    trace = gang.run(size, trained, settings, *problem)[0]
    return verify.compare(trace, reference, strategy, size, "float64").max_parameter_deviation


@pytest.mark.parametrize("problem", ["conv-batch-norm", "padded-tokens", "embedding"])
@pytest.mark.parametrize("shares", [(1.0, 4.0, 2.0), (1.0, 0.0, 3.0)])
def test_uneven_shares_change_nothing(gang: Gang, problem: str, shares: tuple[float, ...]) -> None:
    assert deviation(gang, 3, {"shares": shares}, problem, "momentum", "accumulate") < 1e-8


@pytest.mark.parametrize(
    "settings", [{"bucket_mb": 0.0001}, {"find_unused_parameters": True}, {"balance": True}]
)
def test_settings_that_change_nothing(gang: Gang, settings: dict[str, Any]) -> None:
    assert deviation(gang, 2, settings, "conv-batch-norm") < 1e-8


def test_balance_and_shares_are_one_too_many() -> None:
    with pytest.raises(wt.UsageError, match="give one of them"):
        DataParallel(balance=True, shares=(1.0, 2.0))


@pytest.mark.parametrize("compression", ["bf16", "fp16", "powersgd"])
def test_compression_is_relaxed_and_near(gang: Gang, compression: str) -> None:
    assert not DataParallel(compression=compression).exact  # type: ignore[arg-type]
    far = deviation(gang, 2, {"compression": compression}, "linear-regression")
    assert far < 0.05
    if compression != "powersgd":  # PowerSGD sends whole gradients for its first steps
        assert far > 1e-8


class _Sparse(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(50, 4, sparse=True)
        self.head = nn.Linear(4, 2)

    def forward(self, codes: Tensor) -> Tensor:
        return self.head(self.table(codes).sum(1))


def sparse_task() -> wt.Task:
    codes = classes(54, 50).view(18, 3)
    return wt.Task(
        model=_Sparse, loss=F.cross_entropy, optimizer=partial(torch.optim.SGD, lr=0.1),
        train=TensorDataset(codes, classes(18, 2)), batch_size=8, epochs=2,
    )  # fmt: skip


def losses_of(context: Context, make: Any, **settings: Any) -> list[float]:
    task = make()
    with wt.Run(task, DataParallel(**settings), context) as run:
        losses = [run.step(batch).loss for batch in run.batches()]
        run.close()
    return losses  # type: ignore[return-value]


def test_sparse_gradients(gang: Gang) -> None:
    alone = losses_of(Context(), sparse_task)
    assert gang.run(2, losses_of, sparse_task)[0] == pytest.approx(alone, rel=1e-5)


def bytes_of_steps(context: Context, accumulate: int) -> list[int | None]:
    task = wt.Task(
        model=partial(nn.Linear, 300, 300), loss=F.mse_loss,
        optimizer=partial(torch.optim.SGD, lr=0.01),
        train=TensorDataset(numbers(32, 300), numbers(32, 300)), batch_size=8,
        accumulate=accumulate,
    )  # fmt: skip
    with wt.Run(task, DataParallel(), context) as run:
        sent = [run.step(batch).sent for batch in run.batches()]
        run.close()
    return sent


@pytest.mark.parametrize("accumulate", [1, 4])
@pytest.mark.parametrize("size", [2, 3])
def test_bytes_on_the_wire_are_those_of_an_all_reduce(
    gang: Gang, size: int, accumulate: int
) -> None:
    """2 (N - 1) / N · P a step as the kernel counts it, however many micro-batches there are."""
    expected = 2 * (size - 1) / size * (300 * 301 * 4)
    for sent in gang.run(size, bytes_of_steps, accumulate):
        # In the middle: on a starved machine the kernel sends some packets twice.
        assert statistics.median(sent[1:]) == pytest.approx(expected, rel=0.03)


class Conditional(nn.Module):
    """Uses its second layer only for batches whose first sample says so."""

    def __init__(self) -> None:
        super().__init__()
        self.always, self.sometimes = nn.Linear(3, 2), nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.always(x)
        return self.sometimes(y) if x[0, 0] > 0 else y


def conditional_task() -> wt.Task:
    return wt.Task(
        model=Conditional, loss=F.cross_entropy, optimizer=partial(torch.optim.SGD, lr=0.1),
        train=TensorDataset(numbers(64, 3), classes(64, 2)), batch_size=8,
    )  # fmt: skip


def test_parameters_that_some_steps_leave_out(gang: Gang) -> None:
    losses = gang.run(2, losses_of_conditional)[0]
    assert len(losses) == 8
    assert all(loss > 0 for loss in losses)


def losses_of_conditional(context: Context) -> list[float]:
    return losses_of(context, conditional_task, find_unused_parameters=True)


def test_more_workers_than_samples_are_refused() -> None:
    with pytest.raises(wt.UsageError, match="9 workers cannot share a batch of 8"):
        DataParallel().check(conditional_task(), wt.World(size=9))
    with pytest.raises(wt.UsageError, match="2 weights were given for 3 workers"):
        DataParallel(shares=(1.0, 2.0)).check(conditional_task(), wt.World(size=3))


def different_dropout(context: Context) -> Tensor:
    task = dataclasses.replace(
        conditional_task(), model=lambda: nn.Sequential(nn.Linear(3, 2), nn.Dropout(0.5))
    )
    with wt.Run(task, DataParallel(), context) as run:
        drawn = torch.rand(4)
        run.close()
    return drawn


def test_ranks_draw_different_random_numbers(gang: Gang) -> None:
    first, second = gang.run(2, different_dropout)
    assert not torch.equal(first, second)


def bfloat16_losses(context: Context) -> list[float]:
    return losses_of(context, lambda: dataclasses.replace(
        build("linear-regression"), precision="bfloat16"))  # fmt: skip


def test_bfloat16_autocast_trains_alike(gang: Gang) -> None:
    alone = bfloat16_losses(Context())
    full = losses_of(Context(), partial(build, "linear-regression"))
    assert alone != full
    assert gang.run(2, bfloat16_losses)[0] == pytest.approx(alone, rel=0.05)


def restored(context: Context) -> bool:
    """Two steps, the state taken to a second run, and the third step alike on both."""
    task = build("conv-batch-norm", "adam", "scheduler")
    with wt.Run(task, DataParallel(), context) as run:
        batches = list(run.batches())
        for batch in batches[:2]:
            run.step(batch)
        state = {key: _copy(value) for key, value in run.runner.state_dict().items()}
        loss = run.step(batches[2]).loss
        run.close()
    with wt.Run(task, DataParallel(), context) as other:
        other.runner.load_state_dict(state)
        again = other.step(batches[2]).loss
        other.close()
    return loss == again


def _copy(value: Any) -> Any:
    import copy

    return copy.deepcopy(value)


@pytest.mark.parametrize("size", [1, 2])
def test_state_is_taken_up_again(gang: Gang, size: int) -> None:
    assert all(gang.run(size, restored))


SHARED = nn.Linear(3, 2)


class _NormedLine(nn.Module):
    """A batch norm without running statistics: it takes those of the batch in evaluation too."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(3, track_running_stats=False)
        self.head = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(x))


def outcome(context: Context, kind: str) -> dict[str, Any]:
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in SHARED.parameters():
            parameter.copy_(torch.linspace(-1, 1, parameter.numel()).view_as(parameter))
            parameter.grad = torch.ones_like(parameter)  # as left by something before
    fields: dict[str, Any] = {
        "shared": {"model": lambda: SHARED},
        "untracked": {
            "model": _NormedLine,
            "validation": TensorDataset(numbers(19, 3, seed=6), classes(19, 2)),
        },
    }[kind]
    task = dataclasses.replace(conditional_task(), epochs=2, **fields)
    with wt.Run(task, DataParallel(), context) as run:
        for batch in run.batches():
            run.step(batch)
        values = run.validate()
        summary = run.finish()
    return {"loss": summary["train_loss"], **values}


@pytest.mark.parametrize("kind", ["shared", "untracked"])
@pytest.mark.parametrize("size", [2, 3])
def test_models_that_are_easily_trained_otherwise(gang: Gang, kind: str, size: int) -> None:
    """One module for all calls of the factory, with gradients in it; statistics in evaluation."""
    alone = outcome(Context(), kind)
    for found in gang.run(size, outcome, kind):
        assert found == pytest.approx(alone, rel=1e-4)
