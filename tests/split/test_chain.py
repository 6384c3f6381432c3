"""How far the layers go that can work on strips."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import wagontrain as wt
from tests.strategies.test_strips import MODELS, task_of
from wagontrain.batches import MicroBatch
from wagontrain.objective import Objective
from wagontrain.split.chain import Chain, find
from wagontrain.split.observe import observe


def chain_of(model: nn.Module, ranks: int = 3) -> Chain:
    micro = MicroBatch(torch.randn(2, 2, 13, 14), None, 2, 2)
    objective = Objective(task_of("max_pooled"), torch.device("cpu"))
    return find(model, observe(model, objective, micro), ranks)


@pytest.mark.parametrize(
    ("model", "layers"),
    [
        ("max_pooled", "0 2 3 5"),
        ("average_pooled", "0 1 3 5 6 7"),
        ("normed", "0 1 3 4 6 7 9"),
        ("unshared", "0 2 4"),
        ("Reused", "one pool two frozen"),
        ("convolutions_only", "0 2 3"),
        ("dropping", "0 2"),  # 13 rows by 6 are 2, fewer than 3 ranks
    ],
)
@pytest.mark.filterwarnings("ignore:Using padding='same'")
def test_the_chain_of_a_model(model: str, layers: str) -> None:
    chain = chain_of(MODELS[model]())
    assert chain.layers == tuple(layers.split())
    assert chain.draws == (model == "dropping")


class Two(nn.Module):
    """Two convolutions, and something between them."""

    def __init__(self, between: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(2, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.between = between

    def forward(self, x: Tensor) -> Any:
        x = self.between(self.one(x))
        return self.two(x)


def with_shape(x: Tensor) -> Tensor:
    return x if x.shape[2] > 3 else x + 1


def with_item(x: Tensor) -> Tensor:
    x[:, :, 0] = 0
    return x


def in_place(x: Tensor) -> Tensor:
    return x.add_(torch.arange(14.0))


@pytest.mark.parametrize(
    ("between", "length"),
    [
        (F.relu, 2),
        (torch.relu_, 2),
        (nn.Identity(), 2),
        (nn.Dropout(0.5, inplace=True), 2),
        (nn.AvgPool2d(2), 2),
        (nn.BatchNorm2d(4), 2),
        (nn.GroupNorm(2, 4), 1),
        (nn.Dropout2d(), 1),
        (nn.MaxPool2d(2, ceil_mode=True), 1),
        (nn.AvgPool2d(5), 1),  # 2 rows for 3 ranks
        (lambda x: F.max_pool2d(x, 2), 1),
        (lambda x: x + x.mean(), 1),
        (lambda x: x.flip(2), 1),
        (with_shape, 1),
        (with_item, 1),
        (in_place, 1),
    ],
)
def test_what_ends_a_chain(between: Callable[[Tensor], Tensor], length: int) -> None:
    chain = chain_of(Two(between))
    assert (chain.layers[-1] == "two") == (length == 2)


class Returning(Two):
    def forward(self, x: Tensor) -> Any:
        x = self.one(x)
        return self.two(x), x


def test_what_is_returned_is_whole() -> None:
    assert chain_of(Returning(F.relu)).layers == ("one",)


def test_hooks_see_the_whole() -> None:
    model = Two(F.relu)
    model.two.register_forward_hook(lambda *_: None)
    assert chain_of(model).layers == ("one",)


def test_a_model_without_layers_is_refused() -> None:
    with pytest.raises(wt.UsageError, match="begin with a convolution"):
        chain_of(nn.Flatten())
