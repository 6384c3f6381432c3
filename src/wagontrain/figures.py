"""A few figures of every rank, known to all by the end of a backward pass.

Every step, ranks tell each other their part of the loss and how long they took. As a collective
of its own that costs several per cent of a short step on a busy CPU: not for the bytes, but for
waking threads. So the figures travel inside a bucket of gradients: an extra parameter whose
gradient they are, each rank in its own slots and zero elsewhere, so that the sum over ranks is
the collection. Where buckets cannot carry them (lossy compression rounds them; on a GPU, reading
them would wait for the whole backward) they are gathered beside it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from wagontrain.exchange import Exchange
from wagontrain.transport import Context, Pending

Weighted = tuple[Tensor, float]


class Figures(ABC):
    """The figures of one step after the other, on their way between ranks."""

    @abstractmethod
    def backward(
        self, loss: Tensor, scale: float, part: Sequence[Weighted], times: Sequence[float]
    ) -> None:
        """The backward pass of `scale` times the loss, in which this rank's figures leave.

        Args:
            loss: of the last micro-batch, a scalar tensor.
            scale: factor on its gradient.
            part: loss and weight of each micro-batch; their products added are the first figure.
            times: the other figures.
        """

    @abstractmethod
    def result(self) -> list[list[float]]:
        """The figures of every rank, once the backward pass is over."""


class GatheredFigures(Figures):
    """Figures collected by an all-gather of their own, beside the backward pass."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._pending: Pending | None = None

    def backward(
        self, loss: Tensor, scale: float, part: Sequence[Weighted], times: Sequence[float]
    ) -> None:
        """Start to gather, then go backward."""
        # On the device: reading the loss here would wait for it.
        weighted = [value.detach() * weight for value, weight in part if weight]
        self.tell(torch.stack(weighted).sum() if weighted else loss.new_zeros(()), times)
        loss.backward(loss.new_tensor(scale))

    def tell(self, total: Tensor, times: Sequence[float]) -> None:
        """Start to gather: the sum of weighted losses, a scalar tensor, and the other figures."""
        figures = torch.cat([total.view(1), total.new_tensor(times)])
        self._pending = self._context.gather_later(figures)

    def result(self) -> list[list[float]]:
        """What was gathered."""
        assert self._pending is not None
        return self._pending.result()


class WithSlots(nn.Module):
    """A model with an extra parameter of `count` slots: returns the output and the slots."""

    def __init__(self, model: nn.Module, count: int) -> None:
        super().__init__()
        self.model = model
        # After the model's parameters: buckets are filled from the last one, so that the figures
        # leave first, and losses are known before the first gradient is used.
        self._last = nn.ParameterList([torch.zeros(count)])

    @property
    def slots(self) -> Tensor:
        """The extra parameter."""
        slots: Tensor = self._last[0]
        return slots

    def forward(self, *inputs: Any, **named: Any) -> tuple[Any, Tensor]:
        """The model's output, and the slots as a tensor to go backward from."""
        return self.model(*inputs, **named), self.slots.view_as(self.slots)


class CarriedFigures(Figures):
    """Figures carried by the buckets of a DistributedDataParallel over `WithSlots`.

    Stands in for the distributed model: calling it gives the model's own output.

    Args:
        distributed: the model with slots.
        exchange: what sums the buckets, if DistributedDataParallel does not do so itself.
        rank: this rank.
        size: how many there are.
    """

    def __init__(
        self,
        distributed: DistributedDataParallel,
        exchange: Exchange | None,
        rank: int,
        size: int,
    ) -> None:
        self._distributed = distributed
        self._exchange = exchange
        self._inner: WithSlots = distributed.module
        self._rank, self._size = rank, size
        self._outgoing: Tensor | None = None

    def __call__(self, *inputs: Any, **named: Any) -> Any:
        """The model's output."""
        output, self._outgoing = self._distributed(*inputs, **named)
        return output

    def backward(
        self, loss: Tensor, scale: float, part: Sequence[Weighted], times: Sequence[float]
    ) -> None:
        """Go backward from the loss and from the slots at once."""
        assert self._outgoing is not None
        total = sum(value.item() * weight for value, weight in part if weight)
        # DistributedDataParallel by itself divides what it sums by the number of workers.
        factor = self._size if self._exchange is None else 1
        own = [figure * factor for figure in (total, *times)]
        before = [0.0] * (len(own) * self._rank)
        after = [0.0] * (len(own) * (self._size - self._rank - 1))
        figures = self._outgoing.new_tensor(before + own + after)
        torch.autograd.backward([loss, self._outgoing], [loss.new_tensor(scale), figures])
        self._outgoing = None

    def result(self) -> list[list[float]]:
        """What the buckets brought; waits for the one that carries them."""
        if self._exchange is not None:
            self._exchange.wait_for(self._inner.slots)
        gradient = self._inner.slots.grad
        assert gradient is not None
        rows: list[list[float]] = gradient.view(self._size, -1).tolist()
        self._inner.slots.grad = None
        return rows
