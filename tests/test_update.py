"""The update in parts, as gradients arrive, is the update in one."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import TensorDataset

import wagontrain as wt
from tests.problems import numbers
from wagontrain.objective import Update


def several(model: nn.Module) -> list[torch.optim.Optimizer]:
    matrices = [value for value in model.parameters() if value.ndim > 1]
    others = [value for value in model.parameters() if value.ndim <= 1]
    return [torch.optim.Muon(matrices, lr=0.1), torch.optim.AdamW(others, lr=0.01)]


OPTIMIZERS: dict[str, Callable[..., Any]] = {
    "sgd": partial(torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=0.01),
    "adam": partial(torch.optim.Adam, lr=0.01),
    "adamw-foreach": partial(torch.optim.AdamW, lr=0.01, foreach=True),
    "adagrad": partial(torch.optim.Adagrad, lr=0.01),
    "rmsprop": partial(torch.optim.RMSprop, lr=0.01, momentum=0.5),
    "nadam": partial(torch.optim.NAdam, lr=0.01),
    "several": several,
}


def updated(optimizer: Any, parts: bool, **fields: Any) -> list[torch.Tensor]:
    data = TensorDataset(numbers(8, 4), numbers(8, 2))
    task = wt.Task(
        model=lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2)),
        loss=F.mse_loss, optimizer=optimizer, train=data, batch_size=8, **fields,
    )  # fmt: skip
    model = task.build_model()
    update = Update(task, model)
    for _ in range(4):
        update.begin()
        F.mse_loss(model(data.tensors[0]), data.tensors[1]).backward()
        last, first = list(model[2].parameters()), list(model[0].parameters())
        gradients = [value.grad for value in model.parameters()]
        update.apply(iter([last, first]) if parts else ())
        kept = [value.grad for value in model.parameters()]
        assert all(one is other for one, other in zip(gradients, kept, strict=True))
    return [value.detach() for value in model.parameters()]


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("clip", [None, 0.01])
def test_in_parts_is_in_one(optimizer: str, clip: float | None) -> None:
    whole, parts = (
        updated(OPTIMIZERS[optimizer], parts, clip_grad_norm=clip) for parts in (False, True)
    )
    for one, other in zip(whole, parts, strict=True):
        assert one.equal(other)


class _Counting(torch.optim.SGD):
    """An optimizer of one's own, which counts its steps."""

    steps = 0

    def step(self, closure: Any = None) -> Any:
        type(self).steps += 1
        return super().step(closure)


def test_an_optimizer_of_ones_own_steps_once() -> None:
    updated(partial(_Counting, lr=0.1), parts=True)
    assert _Counting.steps == 4


def test_one_of_ones_own_among_several_steps_once() -> None:
    _Counting.steps = 0
    last = partial(torch.optim.SGD, lr=0.1)
    updated(
        lambda model: [_Counting(model[0].parameters(), lr=0.1), last(model[2].parameters())], True
    )
    assert _Counting.steps == 4


def test_a_hook_on_one_of_several_is_called_once_a_step() -> None:
    calls: list[Any] = []

    def hooked(model: nn.Module) -> list[torch.optim.Optimizer]:
        made = several(model)
        made[1].register_step_post_hook(lambda *told: calls.append(told))
        return made

    updated(hooked, parts=True)
    assert len(calls) == 4


def test_what_never_arrives_is_updated_last() -> None:
    task = wt.Task(
        model=lambda: nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)),
        loss=F.mse_loss, optimizer=partial(torch.optim.SGD, lr=1.0),
        train=TensorDataset(numbers(4, 2), numbers(4, 2)), batch_size=4,
    )  # fmt: skip
    model = task.build_model()
    before = [value.detach().clone() for value in model.parameters()]
    for value in model.parameters():
        value.grad = torch.ones_like(value)
    Update(task, model).apply(iter([list(model[1].parameters())]))
    for old, new in zip(before, model.parameters(), strict=True):
        assert new.equal(old - 1)
