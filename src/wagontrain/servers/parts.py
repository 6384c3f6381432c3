"""How a model's tensors lie in flat memory, and which stretch of it belongs to which shard.

Tensors are ordered in three regions: parameters, buffers that training assigns to, and what never
changes. Each region is one stretch of bytes, cut into as many slices as there are shards, between
rows of a tensor. So a shard's part of the model is one slice of each region: a worker whose
parameters and gradients are views of the regions sends and receives slices without copying, also
where a tensor is cut between shards.

    region        parameters            assigned    constant
    tensors       A A A A B B B B B C   d d d e     f f f f
    shard         0 0 0 0 0 1 1 1 1 1   0 0 1 1     0 0 1 1
"""

from __future__ import annotations

import bisect
import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from wagontrain.errors import UsageError

Group = int | Literal["assigned", "constant"]
"""Number of the optimizer's group of parameters, or what a tensor is otherwise."""

PARAMETERS, ASSIGNED, CONSTANT = range(3)
PUSHED = 2
"""Regions that change: a push has them, and a pull unless it is of everything."""
WHOLE = 3

_ALIGNMENT = 64


@dataclass(frozen=True)
class Entry:
    """A tensor of the model.

    Args:
        name: in the model's `state_dict`.
        shape: of it.
        dtype: its type, as torch names it without "torch.".
        group: of parameters that it belongs to, or "assigned" or "constant".
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    group: Group

    @property
    def bytes(self) -> int:
        """Of the tensor."""
        return math.prod(self.shape) * itemsize(self.dtype)

    @property
    def row(self) -> int:
        """Bytes of a row: what one index of the first dim longer than 1 stands for."""
        inner = list(itertools.dropwhile(lambda length: length == 1, self.shape))[1:]
        return math.prod(inner) * itemsize(self.dtype)


@dataclass(frozen=True)
class Part:
    """Elements `start` to `stop` of a tensor, counted as if it were flat."""

    name: str
    start: int
    stop: int
    dtype: str
    group: Group

    @property
    def bytes(self) -> int:
        """Of the part."""
        return (self.stop - self.start) * itemsize(self.dtype)


def torch_type(dtype: str) -> torch.dtype:
    """The type of a name such as "float32".

    Raises:
        UsageError: there is none of that name.
    """
    found = getattr(torch, dtype, None)
    if not isinstance(found, torch.dtype):
        raise UsageError(f"there is no type of tensor {dtype!r}: give one of torch, like 'float32'")
    return found


def itemsize(dtype: str) -> int:
    """Bytes of one element."""
    return torch_type(dtype).itemsize


def region_of(group: Group) -> int:
    """The region that a tensor of this group lies in."""
    if isinstance(group, int):
        return PARAMETERS
    return ASSIGNED if group == "assigned" else CONSTANT


def ordered(entries: Iterable[Entry]) -> list[list[Entry]]:
    """The entries of each region in the order in which they lie there.

    By falling size of an element, so that each tensor begins at a multiple of its own; and those
    of one type next to each other, so that they can be added up in one go.
    """
    regions: list[list[Entry]] = [[], [], []]
    for entry in sorted(entries, key=lambda entry: (-itemsize(entry.dtype), entry.dtype)):
        regions[region_of(entry.group)].append(entry)
    return regions


def divide(entries: Iterable[Entry], shards: int) -> list[list[Part]]:
    """The parts of each shard, in the order in which they lie in its memory.

    Every region is divided evenly by bytes, within one row of its widest tensor; with more shards
    than rows some get nothing of it.

    Raises:
        UsageError: there is no shard.
    """
    parts: list[list[Part]] = [[] for _ in range(shards)]
    for region in ordered(entries):
        cuts = _cuts(region, shards)
        start = 0
        for entry in region:
            size = itemsize(entry.dtype)
            stop = start + entry.bytes
            for shard in range(shards):
                low, high = max(start, cuts[shard]), min(stop, cuts[shard + 1])
                if low < high:
                    first, last = (low - start) // size, (high - start) // size
                    parts[shard].append(Part(entry.name, first, last, entry.dtype, entry.group))
            start = stop
    return parts


def _cuts(region: Sequence[Entry], shards: int) -> list[int]:
    """Where in a region's bytes each shard's slice begins, and the end."""
    if shards < 1:
        raise UsageError(f"parameters cannot be divided over {shards} shards: give at least 1")
    starts = [0, *itertools.accumulate(entry.bytes for entry in region)]
    total = starts[-1]
    widest = max((entry.row for entry in region), default=0)
    cuts = [0]
    for shard in range(1, shards):
        wanted = total * shard / shards
        inside = bisect.bisect_right(starts, wanted) - 1
        border = min(starts[inside : inside + 2], key=lambda at: abs(at - wanted))
        if abs(border - wanted) > widest / 2:  # else one part less is worth more
            row = region[inside].row
            border = starts[inside] + round((wanted - starts[inside]) / row) * row
        cuts.append(max(cuts[-1], border))
    return [*cuts, total]


Memory = Callable[[int], Tensor]
"""Gives so many zero bytes, as a flat tensor of uint8."""


def own_memory(size: int) -> Tensor:
    """Memory of this process."""
    return torch.zeros(size, dtype=torch.uint8)


class Buffer:
    """The parts of one shard in one piece of memory, region by region.

    Args:
        parts: as `divide` gave them.
        regions: how many of the regions it has: gradients need `PUSHED`, values `WHOLE`.
        memory: gives the bytes.

    Attributes:
        parts: those in these regions.
        regions: bytes of each; what a message's frames hold, one after the other.
        views: each part as a flat tensor of its own type.
        runs: stretches of parameters of one type, as flat tensors.
    """

    def __init__(
        self, parts: Sequence[Part], regions: int = WHOLE, memory: Memory = own_memory
    ) -> None:
        self.parts = tuple(part for part in parts if region_of(part.group) < regions)
        sizes = [0] * regions
        for part in self.parts:
            sizes[region_of(part.group)] += part.bytes
        starts = [0]
        for size in sizes:  # each region begins where every type may begin
            starts.append(starts[-1] + -(-size // _ALIGNMENT) * _ALIGNMENT)
        self.memory = memory(starts[-1])
        self.regions = [
            self.memory[start : start + size] for start, size in zip(starts, sizes, strict=False)
        ]
        self.views: list[Tensor] = []
        self.runs: list[Tensor] = []
        filled = [0] * regions
        for part in self.parts:
            region = region_of(part.group)
            start, filled[region] = filled[region], filled[region] + part.bytes
            view = self.regions[region][start : filled[region]]
            self.views.append(view.view(torch_type(part.dtype)))
        for dtype, group in itertools.groupby(
            (part for part in self.parts if region_of(part.group) == PARAMETERS),
            key=lambda part: part.dtype,
        ):
            start = sum(run.nbytes for run in self.runs)
            stop = start + sum(part.bytes for part in group)
            self.runs.append(self.regions[PARAMETERS][start:stop].view(torch_type(dtype)))

    def copy_(self, other: Buffer) -> None:
        """Take over the content of another of the same parts; regions that both have."""
        for own, its in zip(self.regions, other.regions, strict=False):
            own.copy_(its)


class Whole:
    """All of a model in flat memory, with the slice that each shard has of it.

    Args:
        entries: the model's tensors.
        shards: how many share them.
        regions: how many of the regions it has.
        memory: gives the bytes of a region.

    Attributes:
        regions: the bytes of each.
        views: name -> tensor of its own shape and type; for those in these regions.
    """

    def __init__(
        self,
        entries: Iterable[Entry],
        shards: int,
        regions: int = WHOLE,
        memory: Memory = own_memory,
    ) -> None:
        self.regions: list[Tensor] = []
        self.views: dict[str, Tensor] = {}
        self._cuts: list[list[int]] = []
        for region in ordered(entries)[:regions]:
            cuts = _cuts(region, shards)
            self._cuts.append(cuts)
            self.regions.append(memory(cuts[-1]))
            start = 0
            for entry in region:
                stop = start + entry.bytes
                flat = self.regions[-1][start:stop].view(torch_type(entry.dtype))
                self.views[entry.name] = flat.view(entry.shape)
                start = stop

    def slices(self, shard: int, regions: int = PUSHED) -> list[Tensor]:
        """The bytes that a shard has, in the order in which they travel."""
        return [
            region[cuts[shard] : cuts[shard + 1]]
            for region, cuts in zip(self.regions[:regions], self._cuts, strict=False)
        ]
