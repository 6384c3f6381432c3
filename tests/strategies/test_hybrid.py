"""The hybrid: what it splits, what travels, what it refuses. That it is exact: test_conformance."""

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
from tests.problems import build, classes, numbers
from wagontrain import verify
from wagontrain.batches import Batches
from wagontrain.mesh import World
from wagontrain.reference import Trace, train_plainly
from wagontrain.strategies.hybrid import Hybrid
from wagontrain.transport import Context

BATCH, IN, WIDE, OUT = 16, 48, 96, 64
OVERHEAD = 1500  # bytes a step for figures, row counts and Gloo's own headers, per rank


def wide() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 3, 3, padding=1), nn.ReLU(), nn.Flatten(),
        nn.Linear(IN, WIDE), nn.ReLU(), nn.Linear(WIDE, OUT), nn.ReLU(), nn.Linear(OUT, 5),
    )  # fmt: skip


def wide_task(**changes: Any) -> wt.Task:
    task = wt.Task(
        model=wide,
        loss=F.cross_entropy,
        optimizer=partial(torch.optim.SGD, lr=0.1),
        train=TensorDataset(numbers(BATCH * 4, 3, 4, 4), classes(BATCH * 4, 5)),
        batch_size=BATCH,
    )
    return dataclasses.replace(task, **changes)


def held(context: Context, settings: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    with wt.Run(wide_task(), wt.make_strategy("hybrid", settings), context) as run:
        shapes = {name: tuple(value.shape) for name, value in run.model.named_parameters()}
        run.close()
    return shapes


def test_auto_splits_what_sends_less_and_fuses_pairs(gang: Gang) -> None:
    shapes = gang.run(2, held, {})[1]
    assert shapes["3.weight"] == (WIDE // 2, IN)  # columns
    assert shapes["5.weight"] == (OUT, WIDE // 2)  # rows
    assert shapes["5.bias"] == (OUT,)
    assert shapes["0.weight"] == (3, 3, 3, 3)
    assert shapes["7.weight"] == (5, OUT)  # 5 columns, and a batch of 16


def sent(context: Context, settings: dict[str, Any], name: str = "hybrid") -> list[int | None]:
    with wt.Run(wide_task(), wt.make_strategy(name, settings), context) as run:
        found = [run.step(batch).sent for batch in run.batches()]
        run.close()
    return found[1:]


@pytest.mark.parametrize("size", [2, 4])
def test_bytes_are_those_of_the_formula(gang: Gang, size: int) -> None:
    share = 2 * (size - 1) / size
    fused = share * BATCH * (IN + OUT) * 4
    replicated = (3 * 3 * 9 + 3 + OUT + 5 * OUT + 5) * 4
    expected = fused + share * replicated
    for found in gang.run(size, sent, {}):
        for count in found:
            assert count is not None
            assert 0.9 * expected < count < 1.1 * expected + OVERHEAD * size


class Clicks(nn.Module):
    def __init__(self, rows: int, sparse: bool) -> None:
        super().__init__()
        self.table = nn.Embedding(rows, 8, sparse=sparse)
        self.head = nn.Linear(8, 1)

    def forward(self, codes: Tensor) -> Tensor:
        return self.head(self.table(codes).sum(1)).squeeze(1)


def clicks(rows: int, sparse: bool) -> wt.Task:
    return wt.Task(
        model=partial(Clicks, rows, sparse),
        loss=F.binary_cross_entropy_with_logits,
        optimizer=partial(torch.optim.SGD, lr=0.1),
        train=TensorDataset(classes(64 * 4, rows).view(64, 4), classes(64, 2).float()),
        batch_size=16,
        epochs=2,
    )


def clicked(
    context: Context, rows: int, sparse: bool
) -> tuple[list[Any], list[Any], tuple[int, ...]]:
    with verify.computing_in("float64"):
        task, _ = verify.prepared(clicks(rows, sparse), "float64")
        with wt.Run(task, Hybrid(), context) as run:
            reports = [run.step(batch) for batch in run.batches()]
            shape = tuple(run.model.get_parameter("table.weight").shape)
            run.close()
    return [report.loss for report in reports], [report.sent for report in reports], shape


@pytest.mark.parametrize("sparse", [False, True])
def test_a_table_is_divided_and_only_rows_of_the_batch_travel(gang: Gang, sparse: bool) -> None:
    with verify.computing_in("float64"):
        task, _ = verify.prepared(clicks(5000, sparse), "float64")
        plain = train_plainly(task, torch.device("cpu"), 0, 8)
    for losses, found, shape in gang.run(3, clicked, 5000, sparse):
        assert losses == pytest.approx(plain.losses, rel=1e-12)
        assert shape in ((1667, 8), (1666, 8))
        # 64 rows of 8 numbers of 8 bytes there and back, their numbers, and the small head.
        assert all(count < 2 * 64 * (64 + 8) + 4 * OVERHEAD for count in found)


def varied(context: Context) -> Trace:
    with verify.computing_in("float64"):
        task, _ = verify.prepared(wide_task(accumulate=4), "float64")
        strategy = wt.make_strategy("hybrid", {"variable_batch": True})
        assert not strategy.exact
        with wt.Run(task, strategy, context) as run:
            losses = [run.step(batch).loss or 0.0 for batch in run.batches()]
            trace = Trace.of(losses, run.model, run.runner.state_dict()["model"])
            run.close()
    return trace


def test_a_variable_batch_updates_split_layers_after_every_micro_batch(gang: Gang) -> None:
    """Against a plain loop with two optimizers."""
    with verify.computing_in("float64"):
        task, _ = verify.prepared(wide_task(accumulate=4), "float64")
        model = task.build_model()
        split = [*model[3].parameters(), model[5].weight]  # type: ignore[index]
        others = [value for value in model.parameters() if all(value is not x for x in split)]
        often, once = torch.optim.SGD(split, lr=0.1), torch.optim.SGD(others, lr=0.1)
        losses = []
        for batch in Batches.of_training(task, torch.device("cpu")).epoch(0):
            once.zero_grad()
            mean = 0.0
            for micro in batch.micro_batches:
                often.zero_grad()
                loss = task.loss(model(micro.inputs), micro.target)
                grads = torch.autograd.grad(loss, [*split, *others])
                for value, gradient in zip(split, grads, strict=False):
                    value.grad = gradient
                share = micro.count / batch.total
                for value, gradient in zip(others, grads[len(split) :], strict=True):
                    kept = 0 if value.grad is None else value.grad
                    value.grad = kept + share * gradient
                often.step()
                mean += share * loss.item()
            once.step()
            losses.append(mean)
    for trace in gang.run(2, varied):
        assert trace.losses == pytest.approx(losses, rel=1e-10)
        for name, value in model.named_parameters():
            torch.testing.assert_close(trace.parameters[name], value.detach())


def refused(
    context: Context, task: wt.Task, settings: dict[str, Any], strategy: str = "hybrid"
) -> str:
    try:
        wt.Run(task, wt.make_strategy(strategy, settings), context).close()
    except wt.UsageError as error:
        return str(error)
    return "taken"


class Attending(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention, self.head = nn.MultiheadAttention(16, 4, batch_first=True), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.flatten(2)
        return self.head(self.attention(rows, rows, rows)[0].mean(1))


class Functional(nn.Module):
    """Uses a layer's weight behind its back."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(5, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.two(self.one(x)) + F.linear(x, self.one.weight[:3])


def hooked() -> nn.Module:
    model = nn.Sequential(nn.Linear(5, 8), nn.Linear(8, 3))
    model[0].register_forward_hook(lambda *_: None)
    return model


def adafactor(parameters: Any) -> Any:
    return torch.optim.Adafactor(parameters)


@pytest.mark.parametrize(
    ("changes", "placement", "said"),
    [
        ({}, {"3.wieght": "column"}, "names no layer of the model: '3.wieght'; known: 0, 3, 5, 7"),
        ({}, {"0": "row"}, "layer '0' (Conv2d) cannot be split by row: it can be column"),
        (
            {},
            {"": "column"},
            "layer '' (Sequential) cannot be split by column: it can be only left",
        ),
        ({}, {"3": "heads"}, "layer '3' (Linear) cannot be split by heads: it can be column, row"),
        ({"model": Attending}, {"attention": "heads"}, "cannot be split by heads: it can be only"),
        ({"model": Attending}, {"attention.out_proj": "row"}, "cannot be split by row: it can be"),
        ({}, {"1": "column"}, "layer '1' (ReLU) cannot be split by column: it can be only left"),
        ({"optimizer": adafactor}, {"3": "column"}, "Adafactor is not known to treat every number"),
    ],
)
def test_bad_placements_are_refused(
    gang: Gang, changes: dict[str, Any], placement: dict[str, str], said: str
) -> None:
    for message in gang.run(2, refused, wide_task(**changes), {"placement": placement}):
        assert said in message


@pytest.mark.parametrize("strategy", ["hybrid", "split-weights"])
def test_tied_layers_are_named_together_or_not_at_all(gang: Gang, strategy: str) -> None:
    task = build("tied-weights")
    for placement, said in (
        ({"head": "column"}, "layer 'head' shares its weights with 'embedding', which would not"),
        ({"head": "row", "embedding": "row"}, "layer 'head' shares its weights with 'embedding'"),
        ({"head": "column", "embedding": "row"}, "taken"),
    ):
        for message in gang.run(2, refused, task, {"placement": placement}, strategy):
            assert said in message
            assert "\n" not in message


@pytest.mark.parametrize(
    ("model", "said"),
    [(Functional, "its weights are used by other code"), (hooked, "it has forward hooks")],
)
def test_layers_that_cannot_be_split_are_left_whole_or_refused(
    gang: Gang, model: Any, said: str
) -> None:
    task = dataclasses.replace(build("dropout-off"), model=model)
    name = "one" if model is Functional else "0"
    for message in gang.run(2, refused, task, {"placement": {name: "column"}}):
        assert said in message
    assert gang.run(2, refused, task, {"placement": "all"}) == ["taken", "taken"]


@pytest.mark.parametrize(
    ("settings", "changes", "said"),
    [
        ({}, {"batch_size": 1}, "2 workers cannot share a batch of 1"),
        ({"variable_batch": True}, {}, "the batch is not cut into any"),
        ({"variable_batch": True}, {"accumulate": 2, "clip_grad_norm": 1.0}, "no gradient of the"),
    ],
)
def test_what_the_task_cannot_have_is_refused(
    settings: dict[str, Any], changes: dict[str, Any], said: str
) -> None:
    strategy = wt.make_strategy("hybrid", settings)
    with pytest.raises(wt.UsageError, match=said):
        strategy.check(wide_task(**changes), World(size=2))
