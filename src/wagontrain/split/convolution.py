"""Convolutions of which every rank computes some output channels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from wagontrain.split.border import Border, Gather, LeaveColumns


class Channels:
    """Stands in for the forward of a convolution whose output channels are divided.

    Args:
        layer: an `nn.Conv2d` (or 1d, 3d), whose parameters are this rank's part already.
        border: how samples come and go.
        widths: output channels of each rank.
    """

    def __init__(self, layer: Any, border: Border, widths: Sequence[int]) -> None:
        self.layer, self.border, self.widths = layer, border, widths

    def __call__(self, x: Tensor) -> Tensor:
        """[n, channels, ...] -> [n, out channels, ...]."""
        border = self.border.opened(len(x))
        whole = Gather.apply(x, border)
        weight, bias = self.layer.weight, self.layer.bias
        if len(weight):
            part = self.layer._conv_forward(whole, weight, bias)
        else:  # more ranks than channels: this one still takes part in the exchanges
            one = self.layer._conv_forward(
                whole.to("meta"), weight.new_empty((1, *weight.shape[1:]), device="meta"), None
            )
            part = whole.new_zeros((len(whole), 0, *one.shape[2:])) + whole.sum() * 0
        result: Tensor = LeaveColumns.apply(part, border, self.widths)
        return result
