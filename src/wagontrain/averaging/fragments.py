"""Weights that each rank changes by itself, and that are averaged now and then.

    fragment    some of the parameters: they are averaged together
    flight      the exchange of a fragment, which may go on while ranks train
    anchor      what the ranks' weights were when an outer optimizer last set them

The mean counts each rank by what its samples counted for since the fragment was last averaged
(McMahan et al. 2017, "Communication-Efficient Learning of Deep Networks from Decentralized Data",
algorithm 1: n_k / n). So uneven shares are no bias, and a rank that had no sample has no say.

What a rank has trained while an average was under way is added to it (Shen et al. 2019,
"CoCoD-SGD"), so that no step is lost:

    x := new + (x - x when it was sent)
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from wagontrain.errors import ModelError
from wagontrain.transport import Context, Pending

# As in exchange: one piece at a time would leave the wire idle, small ones take more CPU.
PIECE_BYTES = 25 * 2**20


@dataclass(frozen=True)
class Outer:
    """Nesterov momentum on the mean of what the ranks have moved (DiLoCo).

    With anchor θ, mean x of the ranks' weights, momentum m:

        d = θ - x;    m := momentum · m + d;    θ := θ - lr · (d + momentum · m)

    Source: Douillard et al. 2023, "DiLoCo: Distributed Low-Communication Training of Language
    Models", algorithm 1 and section 3 (lr 0.7, momentum 0.9).
    """

    lr: float
    momentum: float

    def step(self, anchor: Tensor, momentum: Tensor, mean: Tensor) -> Tensor:
        """Move the anchor, and the momentum, by the mean of all ranks; returns the anchor."""
        moved = anchor - mean
        momentum.mul_(self.momentum).add_(moved)
        return anchor.sub_(moved.add_(momentum, alpha=self.momentum), alpha=self.lr)


class Sum:
    """Tensors of all ranks, each rank's times its own factors, on their way to be added up.

    Args:
        context: this rank's place in the job.
        tensors: of the same shapes on every rank.
        factors: one for each tensor.
    """

    def __init__(self, context: Context, tensors: Sequence[Tensor], factors: Sequence[float]):
        self._works: list[Any] = []
        self._parts: list[Tensor] = [torch.empty(0)] * len(tensors)
        for kind, places in _by_kind(tensors).items():
            sizes = [tensors[place].numel() for place in places]
            flat = tensors[places[0]].new_empty(sum(sizes), dtype=kind)
            for place, part in zip(places, flat.split(sizes), strict=True):
                own = tensors[place]
                part.copy_(own.detach().reshape(-1)).mul_(factors[place])
                self._parts[place] = part.view(own.shape)
            self._start(context, flat)

    def _start(self, context: Context, flat: Tensor) -> None:
        if context.group is None or not flat.numel():
            return
        wire = torch.view_as_real(flat) if flat.is_complex() else flat
        for piece in wire.split(max(1, PIECE_BYTES // flat.element_size())):
            self._works.append(dist.all_reduce(piece, group=context.group, async_op=True))

    def wait(self) -> list[Tensor]:
        """The sums, the same on every rank; of types narrower than float32, in float32."""
        for work in self._works:
            work.wait()
        self._works = []
        return self._parts


def _by_kind(tensors: Sequence[Tensor]) -> dict[torch.dtype, list[int]]:
    """Places of the tensors that can be added up as one, by the type to do so in."""
    kinds: dict[torch.dtype, list[int]] = {}
    for place, tensor in enumerate(tensors):
        kinds.setdefault(torch.promote_types(tensor.dtype, torch.float32), []).append(place)
    return kinds


@dataclass
class _Flight:
    """A fragment on its way."""

    sum: Sum
    told: Pending
    samples: int
    sent: list[Tensor] | None


@dataclass
class _Fragment:
    """Some of the parameters, by name.

    `weight` is what this rank's samples counted for since it was last sent, `samples` how many
    all ranks had.
    """

    names: list[str] = field(default_factory=list)
    weight: float = 0.0
    samples: int = 0
    flight: _Flight | None = None


class Averaging:
    """The parameters of one rank, averaged with the other ranks'.

    Args:
        context: this rank's place in the job.
        parameters: those that are trained, by name; the same on all ranks.
        fragments: how many parts they are averaged in. Parameters are dealt out in the model's
            order, each to the part that is smallest so far.
        outer: what follows on a mean; None takes the mean as it is.
    """

    def __init__(
        self,
        context: Context,
        parameters: Mapping[str, Tensor],
        fragments: int = 1,
        outer: Outer | None = None,
    ) -> None:
        self._context = context
        self._parameters = parameters
        self._fragments = [_Fragment() for _ in range(fragments)]
        sizes = [0] * fragments
        for name, value in parameters.items():
            least = sizes.index(min(sizes))
            self._fragments[least].names.append(name)
            sizes[least] += value.nbytes
        self._outer = outer
        self.anchors: dict[str, Tensor] = {}
        self.momenta: dict[str, Tensor] = {}
        if outer is not None:
            for name, value in parameters.items():
                kind = torch.promote_types(value.dtype, torch.float32)
                self.anchors[name] = value.detach().to(kind, copy=True)
                self.momenta[name] = torch.zeros_like(self.anchors[name])

    @property
    def level(self) -> bool:
        """Whether the ranks hold the same weights."""
        return all(part.samples == 0 and part.flight is None for part in self._fragments)

    def kept(self) -> dict[str, Tensor]:
        """What an outer optimizer keeps, by the names it has in a checkpoint."""
        both = (("anchor", self.anchors), ("momentum", self.momenta))
        return {
            f"outer.{name}.{key}": value for key, values in both for name, value in values.items()
        }

    def took(self, weight: float, samples: int) -> None:
        """Count a step: what this rank's samples counted for, and samples of all ranks."""
        for part in self._fragments:
            part.weight += weight
            part.samples += samples

    def send(self, index: int, figures: Sequence[float] = (), overlapped: bool = False) -> None:
        """Start to average a fragment. Every rank has to call this.

        Args:
            index: of the fragment.
            figures: to be told to all ranks with it.
            overlapped: whether ranks train on before `receive`.
        """
        part = self._fragments[index]
        assert part.flight is None
        told = self._context.gather_later([part.weight, *figures])
        own = [self._parameters[name] for name in part.names]
        # By the samples of all, which every rank knows: what they counted for, it is told later.
        total = Sum(self._context, own, [part.weight / part.samples] * len(own))
        sent = [value.detach().clone() for value in own] if overlapped else None
        part.flight = _Flight(total, told, part.samples, sent)
        part.weight, part.samples = 0.0, 0

    def receive(self, index: int) -> list[list[float]]:
        """Wait for a fragment that was sent, and take it up; returns each rank's figures.

        Raises:
            ModelError: all samples of all ranks together counted for nothing.
        """
        part = self._fragments[index]
        flight, part.flight = part.flight, None
        assert flight is not None
        sums = flight.sum.wait()
        rows = flight.told.result()
        divisor = total_weight(row[0] for row in rows) / flight.samples
        with torch.no_grad():
            for place, (name, mean) in enumerate(zip(part.names, sums, strict=True)):
                mean.div_(divisor)
                value, new = self._parameters[name], mean
                if self._outer is not None:
                    new = self._outer.step(self.anchors[name], self.momenta[name], mean)
                if flight.sent is None or part.samples == 0:
                    value.copy_(new)  # adding nothing would still round
                else:
                    value.add_((new - flight.sent[place]).to(value.dtype))
        return [row[1:] for row in rows]

    def flying(self) -> list[int]:
        """Fragments that were sent and not received."""
        return [index for index, part in enumerate(self._fragments) if part.flight is not None]

    def even_out(self, figures: Sequence[float]) -> list[list[float]]:
        """Take the mean of all weights at once, without a step of the outer optimizer.

        Every rank has to call this, with nothing on its way. Anchors and momenta stay, so that
        a round of an outer optimizer goes on as if nobody had looked.

        Raises:
            ModelError: all samples of all ranks together counted for nothing.
        """
        assert not self.flying()
        rows = self._context.gather([*(part.weight for part in self._fragments), *figures])
        values, factors = [], []
        for index, part in enumerate(self._fragments):
            if part.samples == 0:
                continue
            total = total_weight(row[index] for row in rows)
            own = [self._parameters[name] for name in part.names]
            values += own
            factors += [part.weight / total] * len(own)
            part.weight, part.samples = 0.0, 0
        with torch.no_grad():
            for value, mean in zip(values, Sum(self._context, values, factors).wait(), strict=True):
                value.copy_(mean)
        return [row[len(self._fragments) :] for row in rows]

    def begin_anew(self, anchors: bool = True, momenta: bool = True) -> None:
        """Forget what was trained since the last average, on weights that are the same everywhere.

        Args:
            anchors: put the anchors where the weights are.
            momenta: and stop the momenta.
        """
        for index, part in enumerate(self._fragments):
            if part.flight is not None:
                part.flight.sum.wait()
                part.flight.told.result()
            self._fragments[index] = _Fragment(part.names)
        for name, anchor in self.anchors.items() if anchors else ():
            anchor.copy_(self._parameters[name].detach())
        for momentum in self.momenta.values() if momenta else ():
            momentum.zero_()


def total_weight(weights: Iterable[float]) -> float:
    """What all ranks' samples counted for.

    Raises:
        ModelError: they counted for nothing.
    """
    total = sum(weights)
    if not total > 0:
        raise ModelError(
            f"the weights of all samples since the last average add up to {total}: a mean over "
            "them does not exist; leave such samples out or give them a weight"
        )
    return total
