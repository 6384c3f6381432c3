"""Several optimizers in one task, each over parameters of its own."""

from __future__ import annotations

import dataclasses
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, OneCycleLR
from torch.utils.data import TensorDataset

import wagontrain as wt
from tests.gang import Gang
from tests.problems import BATCH, SAMPLES, classes
from tests.servers.crews import Threads
from tests.test_habits import CPU, Net, every_way, passed, plainly, task, trained
from wagontrain import verify
from wagontrain.batches import Batches
from wagontrain.optimizers import values_per_weight
from wagontrain.reference import Trace, copied
from wagontrain.transport import Context


def by_dims(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    values = list(model.parameters())
    return [v for v in values if v.ndim > 1], [v for v in values if v.ndim <= 1]


def sgd_and_adamw(model: nn.Module) -> list[Optimizer]:
    weights, biases = by_dims(model)
    return [
        torch.optim.SGD(weights, lr=0.1, momentum=0.9),
        torch.optim.AdamW([{"params": biases[:1], "lr": 0.05}, {"params": biases[1:]}], lr=0.01),
    ]


def muon_and_adamw(model: nn.Module) -> list[Optimizer]:
    weights, biases = by_dims(model)
    return [torch.optim.Muon(weights, lr=0.05), torch.optim.AdamW(biases, lr=0.01)]


def one_cycle(optimizer: Optimizer) -> LRScheduler:
    """It moves the momentum of SGD, and the first beta of AdamW."""
    return OneCycleLR(optimizer, max_lr=[0.2 for _ in optimizer.param_groups], total_steps=6)


def halving(optimizer: Optimizer) -> LRScheduler:
    return LambdaLR(optimizer, lambda step: 0.5**step)


several = partial(task, optimizer=sgd_and_adamw, scheduler=one_cycle, clip_grad_norm=0.5)
with_muon = partial(task, optimizer=muon_and_adamw)


def by_hand(made: wt.Task, steps: int = 6) -> Trace:
    """Training as a script would have it, with torch's optimizers one after the other."""
    with verify.computing_in("float64"):
        made, _ = verify.prepared(made, "float64")
        model = made.build_model()
        optimizers: Any = made.optimizer(model)
        schedulers = [made.scheduler(each) for each in optimizers] if made.scheduler else []
        losses: list[float] = []
        batches = Batches.of_training(made, CPU)
        while len(losses) < steps:
            for batch in batches.epoch(len(losses) // made.steps_per_epoch):
                (micro,) = batch.micro_batches
                for optimizer in optimizers:
                    optimizer.zero_grad()
                loss = made.loss(model(micro.inputs), micro.target)
                loss.backward()
                if made.clip_grad_norm is not None:
                    nn.utils.clip_grad_norm_(model.parameters(), made.clip_grad_norm)
                for each in (*optimizers, *schedulers):
                    each.step()
                losses.append(loss.item())
    return Trace(losses, copied(dict(model.named_parameters())), {})


@every_way
def test_several_train_as_in_a_script(gang: Gang, strategy: str, settings: dict[str, Any]) -> None:
    expected = by_hand(several())
    for found, _, _ in gang.run(2, trained, strategy, settings, several):
        assert passed(found, expected)


def test_each_has_a_schedule_of_its_own() -> None:
    expected = by_hand(several())
    assert passed(plainly(several), expected)
    halved = partial(several, scheduler=halving)
    assert not passed(plainly(halved), expected)
    assert passed(plainly(halved), by_hand(halved()))


def test_local_sgd_averages_the_state_of_all(gang: Gang) -> None:
    (alone, _, _) = gang.run(1, trained, "local-sgd", {"steps_between": 2}, several)[0]
    assert passed(alone, by_hand(several()))
    answers = gang.run(2, trained, "local-sgd", {"steps_between": 2}, several)
    (one, other) = (state["optimizer"] for _, _, state in answers)
    assert {"first.weight.momentum_buffer", "last.bias.exp_avg"} <= one.keys()
    for name, value in one.items():
        assert value.equal(other[name]), name
    assert all(len(found) == 3 for found in gang.run(2, trained, "local-sgd", {}, with_muon))


# --- optimizers that need whole matrices ----------------------------------------------------------


@pytest.mark.parametrize(
    ("strategy", "settings"),
    [("data-parallel", {}), ("sharded", {"stage": 1}), ("pipeline", {"micro_batches": 2})],
)
def test_muon_trains_where_tensors_are_whole(
    gang: Gang, strategy: str, settings: dict[str, Any]
) -> None:
    for found, _, _ in gang.run(2, trained, strategy, settings, with_muon):
        assert passed(found, by_hand(with_muon()))


@pytest.mark.parametrize(
    ("strategy", "settings"),
    [
        ("sharded", {"stage": 2, "least": 8}),
        ("sharded", {"least": 8}),
        ("split-weights", {}),
        ("hybrid", {"placement": "all"}),
    ],
)
def test_muon_is_refused_where_they_are_divided(
    gang: Gang, strategy: str, settings: dict[str, Any]
) -> None:
    for message in gang.run(2, trained, strategy, settings, with_muon):
        assert message.startswith("TaskError: optimizer Muon is not known to treat every number")


class Bag(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(50, 4, sparse=True), nn.Linear(4, 2)

    def forward(self, codes: torch.Tensor) -> torch.Tensor:
        return self.head(self.table(codes).sum(1))


def sparse() -> wt.Task:
    return wt.Task(
        model=Bag,
        loss=F.cross_entropy,
        optimizer=lambda model: [
            torch.optim.SparseAdam([model.table.weight], lr=0.05),
            torch.optim.Adam(model.head.parameters(), lr=0.01),
        ],
        train=(
            data := TensorDataset(classes(SAMPLES * 3, 50).view(SAMPLES, 3), classes(SAMPLES, 2))
        ),
        validation=data,
        batch_size=BATCH,
        epochs=2,
    )


def test_a_table_has_sparse_adam_and_the_rest_adam(gang: Gang) -> None:
    for found, _, _ in gang.run(2, trained, "data-parallel", {}, sparse):
        assert passed(found, by_hand(sparse()))


# --- checkpoints ----------------------------------------------------------------------------------

ROUND: list[tuple[str, dict[str, Any], int]] = [
    ("data-parallel", {}, 2), ("pipeline", {"micro_batches": 2}, 3), ("sharded", {"least": 8}, 3),
    ("hybrid", {"placement": "all"}, 2), ("sharded", {"stage": 1}, 2), ("split-weights", {}, 3),
]  # fmt: skip


def step(context: Context, strategy: str, settings: dict[str, Any], folder: Path) -> Trace:
    """One step more than the folder's newest checkpoint has, and another checkpoint."""
    with verify.computing_in("float64"):
        made, _ = verify.prepared(several(), "float64")
        chosen = wt.make_strategy(strategy, settings)
        resume = folder if (folder / "checkpoints").exists() else None
        with wt.Run(made, chosen, context, resume=resume) as run:
            loss = run.step(next(run.batches(run.step_count // made.steps_per_epoch))).loss
            run.save(folder / "checkpoints")
            state = run.runner.state_dict()["model"]
            run.close()
    return Trace.of([loss or 0.0], made.build_model(), state)


def test_every_strategy_goes_on_where_another_was(gang: Gang, tmp_path: Path) -> None:
    expected, losses = by_hand(several()), []
    for strategy, settings, size in ROUND:
        found = gang.run(size, step, strategy, settings, tmp_path)[0]
        losses += found.losses
    assert passed(dataclasses.replace(found, losses=losses), expected)


class Ahead(Optimizer):
    """An optimizer around another, whose groups and state are the other's."""

    def __init__(self, inner: Optimizer) -> None:
        super().__init__(inner.param_groups, {})
        self.inner, self.state, self.param_groups = inner, inner.state, inner.param_groups

    def step(self, closure: Any = None) -> Any:
        return self.inner.step(closure)


def test_the_state_of_one_around_another_is_theirs() -> None:
    def wrapped(model: nn.Module) -> list[Optimizer]:
        first, last = sgd_and_adamw(model)
        return [Ahead(first), last]

    made = task(optimizer=wrapped)
    model = made.build_model()
    optimizer = made.build_optimizer(model)
    F.cross_entropy(model(torch.ones(3, 5)), torch.tensor([0, 1, 2])).backward()
    assert not optimizer.state
    optimizer.step()
    assert "momentum_buffer" in optimizer.state[model.first.weight]
    assert set(optimizer.state) == set(model.parameters())
    del optimizer.state[model.last.bias]
    assert model.last.bias not in optimizer.state
    optimizer.state[model.last.bias]["exp_avg"] = torch.ones(3)
    assert len(optimizer.state_dict()["state"]) == 6


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"optimizer": lambda model: sgd_and_adamw(model)[::-1]},
         r"another optimizer: SGD \+ AdamW there, AdamW \+ SGD here"),
        ({"optimizer": partial(torch.optim.SGD, lr=0.1)}, "3 groups of .* one 1"),
        ({"scheduler": halving},
         r"another scheduler: OneCycleLR \+ OneCycleLR there, LambdaLR \+ LambdaLR here"),
    ],
)  # fmt: skip
def test_a_checkpoint_of_others_is_refused(
    changes: dict[str, Any], words: str, tmp_path: Path
) -> None:
    step(Context(), "data-parallel", {}, tmp_path)
    with pytest.raises(wt.UsageError, match=words):
        wt.Run(several(**changes), wt.make_strategy("data-parallel"), Context(), resume=tmp_path)


# --- what cannot be ------------------------------------------------------------------------------


def _overlapping(model: nn.Module) -> list[Optimizer]:
    return [torch.optim.SGD(model.parameters(), lr=0.1), torch.optim.Adam(by_dims(model)[1])]


def _of_others(model: nn.Module) -> list[Optimizer]:
    return [
        torch.optim.SGD(model.parameters(), lr=0.1),
        torch.optim.Adam([nn.Parameter(torch.ones(1))]),
    ]


def _minimising(model: nn.Module) -> list[Optimizer]:
    weights, biases = by_dims(model)
    return [torch.optim.SGD(weights, lr=0.1), torch.optim.LBFGS(biases)]


@pytest.mark.parametrize(
    ("optimizer", "words"),
    [
        (_overlapping, "have the parameter 'first.bias': give it to one of them"),
        (_of_others, "parameters that are not the model's"),
        (_minimising, "LBFGS is one of several optimizers"),
        (lambda model: [], "an empty list"),
        (lambda model: [*sgd_and_adamw(model), None], "a list with a NoneType"),
        (lambda model: None, "returned NoneType"),
    ],
)
def test_what_cannot_be_stepped_together_is_refused(optimizer: Any, words: str) -> None:
    made = task(optimizer=optimizer)
    with pytest.raises(wt.TaskError, match=words):
        made.build_optimizer(made.build_model(), closures=True)


def test_a_list_of_one_is_that_one() -> None:
    made = task(optimizer=lambda parameters: [torch.optim.SGD(parameters, lr=0.1)])
    assert type(made.build_optimizer(made.build_model())) is torch.optim.SGD


@pytest.mark.parametrize("strategy", ["parameter-server", "sandblaster"])
def test_servers_refuse_several(strategy: str, tmp_path: Path) -> None:
    with pytest.raises(wt.UsageError, match=r"several optimizers \(SGD \+ AdamW\), but servers"):
        Threads(several(), wt.make_strategy(strategy), 2, tmp_path / "run")


def test_memory_is_counted_for_each() -> None:
    """40 weights of the first layer without momentum, 107 numbers with two each."""
    model = Net()
    first, rest = model.first.weight, [v for v in model.parameters() if v is not model.first.weight]
    made = task(optimizer=lambda m: [torch.optim.SGD([first], lr=0.1), torch.optim.Adam(rest)])
    total = sum(value.numel() for value in model.parameters())
    assert values_per_weight(made.build_optimizer(model)) == 2 * (total - 40) / total
