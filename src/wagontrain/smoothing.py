"""A moving average of the weights, which often validates better than the last weights do.

    average_0 = w_0          average_t = d · average_{t-1} + (1 - d) · w_t        after every step

Each rank averages what it has of the weights, so that the average is divided as they are.

Source: Polyak and Juditsky 1992, "Acceleration of Stochastic Approximation by Averaging".
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from wagontrain.layout import Layout, local
from wagontrain.state import Held, Source
from wagontrain.task import trainable


class WeightAverage:
    """The average of what one rank has of a model's weights.

    Args:
        model: whose trained parameters are averaged; buffers are taken as they are.
        layouts: which part of each tensor this rank has.
        decay: d, between 0 and 1.
    """

    def __init__(self, model: nn.Module, layouts: Mapping[str, Layout], decay: float) -> None:
        self._move = get_ema_multi_avg_fn(decay)
        self._averages = {value: local(value).detach().clone() for _, value in trainable(model)}
        self._names = {
            name: value
            for name, value in model.named_parameters(remove_duplicate=False)
            if value in self._averages and name in layouts
        }
        self._layouts = layouts

    def update(self) -> None:
        """Take the weights of one more step."""
        if self._averages:
            here = [local(value) for value in self._averages]
            self._move(list(self._averages.values()), here, 0)

    def begin_anew(self) -> None:
        """From the weights as they are now."""
        with torch.no_grad():
            for value, average in self._averages.items():
                average.copy_(local(value))

    @contextlib.contextmanager
    def shown(self) -> Iterator[None]:
        """Within, the model computes with the average."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    def _exchange(self) -> None:
        with torch.no_grad():
            for value, average in self._averages.items():
                own: Tensor = local(value)
                kept = own.clone()
                own.copy_(average)
                average.copy_(kept)

    def held(self) -> Held:
        """For a checkpoint: the average of each tensor under all of its names."""
        held = Held()
        for name, value in self._names.items():
            held.add(f"ema.{name}", self._averages[value], self._layouts[name])
        return held

    def restored(self, source: Source) -> None:
        """Begin anew where a saved state has no average."""
        shapes = source.shapes()
        if not all(f"ema.{name}" in shapes for name in self._names):
            self.begin_anew()
