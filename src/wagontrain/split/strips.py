"""Layers that work on strips of an image: each rank has some of its rows, and borrows the next.

    y[a : b] = layer(x[a · s - p : (b - 1) · s - p + k])      rows that another rank has travel
    dx[own]  = own part + what the others return              the same rows, the other way
    dW       = Σ over strips                                  summed once per step

Forward, a layer of k x k windows and stride 1 sends ⌊k/2⌋ · W · C · b · s bytes to each neighbour;
backward as many. The first layer's border rows do not travel: every rank has loaded the image.

Source: Dean et al. 2012, "Large Scale Distributed Deep Networks", section 3.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wagontrain.axes import Axes, Axis
from wagontrain.batches import mix
from wagontrain.errors import ModelError, UsageError
from wagontrain.layout import Layout, full_name
from wagontrain.mesh import even_shares, ranges
from wagontrain.nn import LocallyConnected2d, locally_connected
from wagontrain.split.border import Gather, Replicated, Total
from wagontrain.split.borrow import Join, Widen, rows_of
from wagontrain.split.chain import Chain, sides, window_of
from wagontrain.split.divide import Divided, part_of
from wagontrain.split.halo import Halo, common, plan


class Strips:
    """The chain of layers at work on this rank's strip.

    Args:
        model: its layers' forwards are replaced, until `open` is closed.
        chain: the layers.
        axis: the ranks that share the image.
        norm: gives a batch norm the forward that sees all strips of all samples.
    """

    def __init__(
        self, model: nn.Module, chain: Chain, axis: Axis, norm: Callable[[Any], Callable[..., Any]]
    ) -> None:
        self.chain, self.axis = chain, axis
        self.open = contextlib.ExitStack()
        self._layers: list[Any] = [model.get_submodule(name) for name in chain.layers]
        self._windows = [window_of(layer) for layer in self._layers]
        self._plans: dict[int, list[Halo]] = {}
        self._plan: list[Halo] = []
        self._at = 0  # how many layers of the chain have been called in this pass
        self._random = contextlib.ExitStack()
        for name in dict.fromkeys(chain.layers):
            layer: Any = model.get_submodule(name)
            compute = norm(layer) if isinstance(layer, nn.BatchNorm2d) else computing(layer)
            again = layer.forward if isinstance(layer, _POOLINGS) else None
            usual = vars(layer).get("forward")
            # An attribute of the instance goes before the method of its class.
            vars(layer)["forward"] = self._forward(name, compute, again)
            if usual is None:
                self.open.callback(vars(layer).pop, "forward", None)
            else:
                self.open.callback(vars(layer).__setitem__, "forward", usual)

    def _forward(
        self,
        name: str,
        compute: Callable[[Tensor], Tensor],
        plain: Callable[[Tensor], Tensor] | None,
    ) -> Callable[[Tensor], Tensor]:
        """One layer's forward; `plain` is what it does outside of the chain, if it may."""

        def forward(x: Tensor) -> Tensor:
            names = self.chain.layers
            if name == names[0]:
                wide = self._begin(x)
            elif self._at == 0 and plain is not None:
                return plain(x)
            elif names[self._at] != name or self._at == 0:
                raise ModelError(
                    f"the model called layer {name!r} where it called {names[self._at]!r} in the "
                    "trial step: strips need the same order of layers in every pass"
                )
            else:
                wide = self._wide(x)
            self._at += 1
            if isinstance(self._layers[self._at - 1], nn.AdaptiveAvgPool2d):
                return self._end(self._mean(wide))
            y = compute(wide)
            if not getattr(self._layers[self._at - 1], "count_include_pad", True):
                y = y / compute(self._inside(wide))  # padding does not count in its averages
            return y if self._at < len(names) else self._end(self._joined(y))

        return forward

    def _begin(self, x: Tensor) -> Tensor:
        """What the first layer needs of the whole image, which every rank has."""
        self._plan, self._at = self._planned(x.shape[2]), 0
        self._random.close()
        if self.chain.draws:
            # Ranks draw for their own strips, but have to draw alike behind the chain. The seed
            # is drawn, so that the next micro-batch does not get the same masks again.
            seed = int(torch.randint(2**62, ()))
            devices = [x.device] if x.is_cuda else []
            self._random.enter_context(torch.random.fork_rng(devices))
            torch.manual_seed(mix(seed, "strip", self.axis.index))
        if x.requires_grad:
            x = Gather.apply(x, Replicated(self.axis))
        needed, image = self._plan[0].needed[self.axis.index], range(x.shape[2])
        inside = common(needed, image)
        above = inside.start - needed.start
        below = len(needed) - len(inside) - above
        return F.pad(rows_of(x, inside, image), (0, 0, above, below))

    def _planned(self, height: int) -> list[Halo]:
        if height not in self._plans:
            found = plan(self._windows, height, self.axis.size)
            for name, halo in zip(self.chain.layers, found[1:], strict=True):
                rows = halo.owned[-1].stop
                if rows < self.axis.size:
                    raise UsageError(
                        f"layer {name!r} makes {rows} rows of an image of {height}, fewer than "
                        f"one for each of {self.axis.size} workers: give a lower degree"
                    )
            self._plans[height] = found
        return self._plans[height]

    def _wide(self, x: Tensor) -> Tensor:
        halo = self._plan[self._at]
        if halo.quiet(self.axis.index):
            return x
        fill = -torch.inf if isinstance(self._layers[self._at], nn.MaxPool2d) else 0.0
        result: Tensor = Widen.apply(x, self.axis, halo, fill)
        return result

    def _inside(self, wide: Tensor) -> Tensor:
        """1 where a layer's input is part of the image, and 0 where it is padding."""
        halo = self._plan[self._at - 1]
        needed, image = halo.needed[self.axis.index], range(halo.owned[-1].stop)
        result = torch.zeros_like(wide[:1, :1])
        rows_of(result, common(needed, image), needed).fill_(1)
        return result

    def _joined(self, y: Tensor) -> Tensor:
        result: Tensor = Join.apply(y, self.axis, self._plan[-1].owned)
        return result

    def _mean(self, x: Tensor) -> Tensor:
        """The average over all places: each rank's sum added up."""
        height = self._plan[-1].owned[-1].stop
        part = x.sum((2, 3), keepdim=True) / (height * x.shape[3])
        result: Tensor = Total.apply(part, Replicated(self.axis))
        return result

    def _end(self, result: Tensor) -> Tensor:
        self._at = 0
        self._random.close()
        return result


_POOLINGS = (nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d)
"""Layers that one model may use several times, in the chain and behind it."""


def computing(layer: Any) -> Callable[[Tensor], Tensor]:
    """A layer's function of rows that have their padding above and below already."""
    left, right = (0, 0) if isinstance(layer, nn.AdaptiveAvgPool2d) else sides(layer, 1)

    def convolution(x: Tensor) -> Tensor:
        if left != right:  # padding "same" of an even window
            x = F.pad(x, (left, right, 0, 0))
        columns = left if left == right else 0
        return F.conv2d(
            x, layer.weight, layer.bias, layer.stride, (0, columns), layer.dilation, layer.groups
        )

    def locally(x: Tensor) -> Tensor:
        padded = F.pad(x, (left, right, 0, 0))
        return locally_connected(padded, layer.weight, layer.bias, layer.stride)

    def largest(x: Tensor) -> Tensor:
        return F.max_pool2d(x, layer.kernel_size, layer.stride, (0, left), layer.dilation)

    def average(x: Tensor) -> Tensor:
        # With padding to the left and right that counts: what does not is taken out afterwards.
        return F.avg_pool2d(
            x, layer.kernel_size, layer.stride, (0, left), divisor_override=layer.divisor_override
        )

    ways = {LocallyConnected2d: locally, nn.MaxPool2d: largest, nn.AvgPool2d: average}
    return ways.get(type(layer), convolution)


def divide_rows(model: nn.Module, chain: Chain, divided: Divided, axes: Axes, device: Any) -> None:
    """Leave each rank the unshared weights of its own rows. Layouts and parts are noted."""
    for name in chain.layers:
        layer = model.get_submodule(name)
        if not isinstance(layer, LocallyConnected2d):
            continue
        for key, parameter in list(layer.named_parameters(recurse=False)):
            mine = ranges(even_shares(parameter.shape[0], axes.model.size))[axes.model.index]
            shape, owner = tuple(parameter.shape), axes.data.index == 0
            full = full_name(name, key)
            layout = divided.layouts[full] = Layout(shape, 0, (mine,), owner=owner)
            layer._parameters[key] = part_of(parameter, layout, device)
            divided.parts.add(full)


def shared_by(model: nn.Module, chain: Chain) -> set[str]:
    """Names of parameters whose gradients on each rank are those of its strip only."""
    return {
        full_name(name, key)
        for name in chain.layers
        if not isinstance(layer := model.get_submodule(name), LocallyConnected2d)
        for key, value in layer.named_parameters(recurse=False)
        if value.requires_grad
    }
