"""Layers that torch.nn does not have."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Pair = int | tuple[int, ...]


class LocallyConnected2d(nn.Module):
    """A convolution whose weights are not shared: every place of the image has its own.

        y[n, o, i, j] = b[i, j, o]
                        + Σ_{c, u, v} w[i, j, o, c, u, v] · x[n, c, i·s + u - p, j·s + v - p]

    Input [n, in_channels, height, width], output [n, out_channels, out height, out width]. As the
    places do not share weights, the image has one size. Split over machines, each holds the
    weights of its places alone, and no gradient of them travels between those that divide it.

    Args:
        in_channels: of the input.
        out_channels: of the output.
        input_size: (height, width) of the input.
        kernel_size: (height, width) of a window, or one number for both.
        stride: rows and columns from one window to the next.
        padding: zeros around the image.
        bias: whether every place and channel has a number that is added.

    Raises:
        ValueError: no window fits into the image, or the input is of another size.

    Source: LeCun 1989, "Generalization and Network Design Strategies"; in Dean et al. 2012,
    section 3, the model that gains most from being split.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        input_size: Pair,
        kernel_size: Pair,
        stride: Pair = 1,
        padding: Pair = 0,
        bias: bool = True,
    ) -> None:
        super().__init__()
        self.in_channels, self.out_channels = in_channels, out_channels
        self.input_size, self.kernel_size = pair(input_size), pair(kernel_size)
        self.stride, self.padding = pair(stride), pair(padding)
        self.output_size = tuple(
            (size + 2 * around - window) // step + 1
            for size, around, window, step in zip(
                self.input_size, self.padding, self.kernel_size, self.stride, strict=True
            )
        )
        if min(self.output_size) < 1:
            raise ValueError(
                f"no window of {self.kernel_size} fits into an image of {self.input_size} with "
                f"padding {self.padding}"
            )
        places = (*self.output_size, out_channels)
        self.weight = nn.Parameter(torch.empty(*places, in_channels, *self.kernel_size))
        self.bias = nn.Parameter(torch.empty(places)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Evenly distributed within ±1 / √(numbers in a window), as torch has it for Conv2d."""
        bound = 1 / math.sqrt(math.prod(self.weight.shape[3:]))
        for parameter in self.parameters(recurse=False):
            nn.init.uniform_(parameter, -bound, bound)

    def forward(self, x: Tensor) -> Tensor:
        """[n, in_channels, height, width] -> [n, out_channels, out height, out width]."""
        if tuple(x.shape[2:]) != self.input_size:
            raise ValueError(
                f"an image of {tuple(x.shape[2:])} came to a layer made for {self.input_size}"
            )
        rows, columns = self.padding
        padded = F.pad(x, (columns, columns, rows, rows))
        return locally_connected(padded, self.weight, self.bias, self.stride)

    def extra_repr(self) -> str:
        """What it was made with."""
        return (
            f"{self.in_channels}, {self.out_channels}, input_size={self.input_size}, "
            f"kernel_size={self.kernel_size}, stride={self.stride}, padding={self.padding}, "
            f"bias={self.bias is not None}"
        )


def locally_connected(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: tuple[int, int]
) -> Tensor:
    """A convolution with unshared weights, of an image that is padded already.

    Args:
        x: [n, c, height, width].
        weight: [rows, columns, o, c, window height, window width].
        bias: [rows, columns, o].
        stride: rows and columns from one window to the next.

    Returns:
        [n, o, rows, columns].
    """
    rows, columns, _, _, height, width = weight.shape
    windows = x.unfold(2, height, stride[0]).unfold(3, width, stride[1])
    y = torch.einsum("ncijuv,ijocuv->noij", windows[:, :, :rows, :columns], weight)
    return y if bias is None else y + bias.permute(2, 0, 1)


def pair(value: Pair) -> tuple[int, int]:
    """One number for both of height and width, or one for each."""
    return (value, value) if isinstance(value, int) else (value[0], value[1])
