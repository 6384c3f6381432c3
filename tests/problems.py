"""Small tasks that every strategy has to train as one process does.

18 samples in batches of 8: the last batch has 2, fewer than some worlds have ranks.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset

import wagontrain as wt

SAMPLES = 18
BATCH = 8


def numbers(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float32)


def classes(count: int, below: int, seed: int = 2) -> Tensor:
    return torch.randint(below, (count,), generator=torch.Generator().manual_seed(seed))


sgd = partial(torch.optim.SGD, lr=0.1, momentum=0.9)
adam = partial(torch.optim.Adam, lr=0.01)


def _task(model: Any, train: Any, loss: Any = F.cross_entropy, **fields: Any) -> wt.Task:
    return wt.Task(
        model=model, loss=loss, optimizer=sgd, train=train, batch_size=BATCH, epochs=2, **fields
    )


class _Row(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(5, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x).squeeze(1)


def linear_regression() -> wt.Task:
    return _task(_Row, TensorDataset(numbers(SAMPLES, 5), numbers(SAMPLES, seed=3)), F.mse_loss)


def _conv() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(4, 4, 3, bias=False), nn.BatchNorm2d(4, momentum=None), nn.ReLU(),
        nn.Flatten(), nn.Linear(16, 3),
    )  # fmt: skip


def conv_batch_norm() -> wt.Task:
    return _task(_conv, TensorDataset(numbers(SAMPLES, 2, 8, 8), classes(SAMPLES, 3)))


class _Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 6)
        self.mix = nn.Linear(6, 6)
        self.head = nn.Linear(6, 7, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, codes: Tensor) -> Tensor:
        return self.head(torch.tanh(self.mix(self.embedding(codes).mean(1))))


def tied_weights() -> wt.Task:
    codes = classes(SAMPLES * 4, 7).view(SAMPLES, 4)
    return _task(_Tied, TensorDataset(codes, classes(SAMPLES, 7, seed=4)))


class _Frozen(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.frozen = nn.Linear(5, 6).requires_grad_(False)
        self.head = nn.Linear(6, 3)
        self.unused = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.frozen(x)))


def frozen_unused() -> wt.Task:
    return _task(_Frozen, TensorDataset(numbers(SAMPLES, 5), classes(SAMPLES, 3)))


class _Embedding(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(50, 4, padding_idx=0)
        self.head = nn.Linear(4, 2)

    def forward(self, codes: Tensor) -> Tensor:
        return self.head(self.table(codes).sum(1))


def embedding() -> wt.Task:
    codes = classes(SAMPLES * 3, 50).view(SAMPLES, 3)
    return _task(_Embedding, TensorDataset(codes, classes(SAMPLES, 2)))


class Named(Dataset[Any]):
    def __init__(self) -> None:
        self.left, self.right = numbers(SAMPLES, 3), numbers(SAMPLES, 4, seed=5)
        self.target = classes(SAMPLES, 3)

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> Any:
        return {"left": self.left[index], "right": self.right[index]}, self.target[index]


class _Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(3, 3), nn.Linear(4, 3)

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        return self.left(left) * self.right(right)


def dict_inputs() -> wt.Task:
    return _task(_Two, Named())


class Pairs(Named):
    def __getitem__(self, index: int) -> Any:
        return (self.left[index], self.right[index]), self.target[index]


def tuple_inputs() -> wt.Task:
    return _task(_Two, Pairs())


def _with_dropout() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 3))


def dropout_off() -> wt.Task:
    return _task(_with_dropout, TensorDataset(numbers(SAMPLES, 5), classes(SAMPLES, 3)))


class _Tokens(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(9, 5)
        self.head = nn.Linear(5, 9)

    def forward(self, codes: Tensor) -> Tensor:
        return self.head(self.table(codes))


def token_loss(output: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(output.flatten(0, 1), target.flatten(), ignore_index=-1)


def count_tokens(target: Tensor) -> int:
    return int((target != -1).sum())


def padded_tokens() -> wt.Task:
    """Sequences of very different lengths, one of them all padding; the mean is over tokens."""
    codes = classes(SAMPLES * 6, 9).view(SAMPLES, 6)
    lengths = (torch.arange(SAMPLES) * 5) % 7
    target = torch.where(torch.arange(6) < lengths[:, None], codes.roll(1, 1), -1)
    return _task(_Tokens, TensorDataset(codes, target), token_loss, weight=count_tokens)


PROBLEMS: dict[str, Callable[[], wt.Task]] = {
    function.__name__.replace("_", "-"): function
    for function in (
        linear_regression, conv_batch_norm, tied_weights, frozen_unused, embedding, dict_inputs,
        tuple_inputs, dropout_off, padded_tokens,
    )
}  # fmt: skip

OPTIMIZERS = {"momentum": sgd, "adam": adam}

VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "accumulate": {"accumulate": 3},
    "clip": {"clip_grad_norm": 0.05},
    "scheduler": {"scheduler": partial(torch.optim.lr_scheduler.StepLR, step_size=2, gamma=0.3)},
}


def build(problem: str, optimizer: str = "momentum", variant: str = "plain") -> wt.Task:
    """A problem with an optimizer and a way of stepping."""
    task = PROBLEMS[problem]()
    return dataclasses.replace(task, optimizer=OPTIMIZERS[optimizer], **VARIANTS[variant])
