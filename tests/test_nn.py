"""Layers that torch.nn does not have."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import wagontrain as wt


def by_hand(layer: wt.nn.LocallyConnected2d, x: Tensor) -> Tensor:
    """The equation, place by place."""
    (rows, columns), (down, right) = layer.padding, layer.stride
    high, wide = layer.kernel_size
    padded = torch.zeros(len(x), x.shape[1], x.shape[2] + 2 * rows, x.shape[3] + 2 * columns)
    padded[:, :, rows : rows + x.shape[2], columns : columns + x.shape[3]] = x
    y = torch.zeros(len(x), layer.out_channels, *layer.output_size)
    for i in range(layer.output_size[0]):
        for j in range(layer.output_size[1]):
            window = padded[:, :, i * down : i * down + high, j * right : j * right + wide]
            for o in range(layer.out_channels):
                y[:, o, i, j] = (window * layer.weight[i, j, o]).sum((1, 2, 3))
                if layer.bias is not None:
                    y[:, o, i, j] += layer.bias[i, j, o]
    return y


@pytest.mark.parametrize(
    "layer",
    [
        wt.nn.LocallyConnected2d(2, 3, (6, 5), 3),
        wt.nn.LocallyConnected2d(2, 3, (6, 5), (2, 3), stride=(2, 1), padding=(0, 1), bias=False),
        wt.nn.LocallyConnected2d(1, 2, 4, 1, stride=3, padding=2),
    ],
    ids=str,
)
def test_a_locally_connected_layer_is_its_equation(layer: wt.nn.LocallyConnected2d) -> None:
    x = torch.randn(4, layer.in_channels, *layer.input_size)
    y = layer(x)
    assert y.shape == (4, layer.out_channels, *layer.output_size)
    torch.testing.assert_close(y, by_hand(layer, x))


def test_with_shared_weights_it_is_a_convolution() -> None:
    convolution = torch.nn.Conv2d(2, 3, 3, stride=2, padding=1)
    layer = wt.nn.LocallyConnected2d(2, 3, (7, 8), 3, stride=2, padding=1)
    assert convolution.bias is not None
    with torch.no_grad():
        layer.weight.copy_(convolution.weight.expand_as(layer.weight))
        layer.bias.copy_(convolution.bias.expand_as(layer.bias))  # type: ignore[union-attr]
    x = torch.randn(2, 2, 7, 8)
    torch.testing.assert_close(layer(x), convolution(x))


def test_its_first_weights() -> None:
    layer = wt.nn.LocallyConnected2d(4, 2, 9, 5)
    bound = 1 / math.sqrt(4 * 5 * 5)
    assert 0.9 * bound < float(layer.weight.detach().abs().max()) <= bound
    before = layer.weight.detach().clone()
    layer.reset_parameters()
    assert not before.equal(layer.weight)


def test_sizes_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match="no window"):
        wt.nn.LocallyConnected2d(1, 1, (4, 2), 3)
    with pytest.raises(ValueError, match="made for"):
        wt.nn.LocallyConnected2d(1, 1, 4, 3)(torch.randn(1, 1, 5, 4))
