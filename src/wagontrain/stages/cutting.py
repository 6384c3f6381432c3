"""Where to cut a recorded forward pass into stages, and what each stage takes, gives and holds.

A border lies between two calls. What was computed before it and is needed after it crosses it;
the model's inputs do not, because every rank of a pipeline reads them itself. Borders are placed
so that the slowest stage is as quick as can be, by exact dynamic programming: a stage costs the
measured seconds of its calls and what its borders take to cross at a nominal speed.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from wagontrain.errors import UsageError
from wagontrain.stages.recording import Held, Recording, Value

BYTES_PER_SECOND = 125e6
"""Nominal speed at which activations cross a border: 1 Gbit/s."""


@dataclass(frozen=True)
class Crossing:
    """What crosses each border of a recording; border b lies before call b.

    Args:
        values: numbers of the tensors, at each border.
        bytes: that they take, forward and backward.
    """

    values: list[tuple[int, ...]]
    bytes: list[int]

    @classmethod
    def of(cls, recording: Recording) -> Crossing:
        """Seen from the last border to the first."""
        made = {
            number: position
            for position, call in enumerate(recording.calls)
            for number in call.results
        }
        needed = {
            leaf.number
            for leaf in pytree.tree_leaves(recording.output)
            if isinstance(leaf, Value) and leaf.number >= recording.inputs
        }
        values: list[tuple[int, ...]] = []
        for border in range(len(recording.calls), -1, -1):
            if border < len(recording.calls):
                needed.update(
                    number for number in recording.calls[border].takes if number >= recording.inputs
                )
            values.append(tuple(sorted(number for number in needed if made[number] < border)))
        values.reverse()
        examples = recording.values
        return cls(
            values,
            [sum(examples[n].nbytes * (1 + examples[n].requires_grad) for n in some)
             for some in values],
        )  # fmt: skip


class Uses:
    """Which call uses which of the model's tensors, under all of their names.

    Args:
        model: it may be without memory.
        recording: of its forward pass.
    """

    def __init__(self, model: nn.Module, recording: Recording) -> None:
        state = {
            **dict(model.named_parameters(remove_duplicate=False)),
            **dict(model.named_buffers(remove_duplicate=False)),
        }
        self.state = state
        self.by_call: list[set[int]] = []
        bound: set[int] = set()
        for call in recording.calls:
            used = set()
            if isinstance(call.target, str):
                module = model.get_submodule(call.target)
                used = {id(value) for value in (*module.parameters(), *module.buffers())}
                bound.update(map(id, module.buffers()))
            named = [leaf for leaf in call.leaves if isinstance(leaf, Held)]
            used.update(id(_at(model, leaf)) for leaf in named)
            bound.update(id(_at(model, leaf)) for leaf in call.changed if isinstance(leaf, Held))
            self.by_call.append(used)
        bound.update(id(value) for value in model.parameters() if value.requires_grad)
        self.spans: dict[int, tuple[int, int]] = {}
        for position, used in enumerate(self.by_call):
            for each in used & bound:
                self.spans[each] = (self.spans.get(each, (position, 0))[0], position)

    @property
    def weighty(self) -> list[bool]:
        """Whether each call uses any parameter."""
        parameters = {id(value) for value in self.state.values() if isinstance(value, nn.Parameter)}
        return [bool(used & parameters) for used in self.by_call]

    def tied(self) -> list[str]:
        """Names of what is used in two places."""
        return [
            name for name, value in self.state.items()
            if id(value) in self.spans and len(set(self.spans[id(value)])) == 2
        ]  # fmt: skip

    def held(self, borders: Sequence[int]) -> list[set[str]]:
        """Names of what each stage holds; what no call uses goes with what stands before it."""
        stages = [
            set().union(*self.by_call[first:last]) for first, last in itertools.pairwise(borders)
        ]
        names: list[set[str]] = [set() for _ in stages]
        last = 0
        for name, value in self.state.items():
            holders = [number for number, used in enumerate(stages) if id(value) in used]
            for number in holders or [last]:
                names[number].add(name)
            last = max(holders, default=last)
        return names


def _at(model: nn.Module, leaf: Any) -> Tensor:
    path, _, key = leaf.name.rpartition(".")
    found: Tensor = getattr(model.get_submodule(path), key)
    return found


def allowed(recording: Recording, crossing: Crossing, uses: Uses, tied: bool = False) -> list[bool]:
    """Whether each border may be cut: nothing that is trained or changed may be on both sides.

    Args:
        recording: of the forward pass.
        crossing: of its borders.
        uses: of the model's tensors.
        tied: leave out that what is used twice has to stay together.
    """
    borders = [bool(crossing.values[border]) for border in range(len(recording.calls) + 1)]
    spans = list(recording.together) + ([] if tied else list(uses.spans.values()))
    for position, call in enumerate(recording.calls):
        for leaf in call.changed:
            if isinstance(leaf, Value) and leaf.number < recording.inputs:
                spans.append((position, len(recording.calls)))
    for first, last in spans:
        for border in range(first + 1, min(last, len(recording.calls)) + 1):
            borders[border] = False
    borders[0] = borders[-1] = True
    return borders


class _Way(NamedTuple):
    """Borders up to some place, and their (slowest stage, sum of all)."""

    cost: tuple[float, float]
    borders: tuple[int, ...]


def balance(
    seconds: Sequence[float],
    crossing: Sequence[float],
    allowed: Sequence[bool],
    weighty: Sequence[bool],
    stages: int,
) -> list[int] | None:
    """Borders of the stages, the first and last included, so that the slowest is quickest.

    Args:
        seconds: of each call.
        crossing: seconds that each border takes to cross; one more than there are calls.
        allowed: whether each border may be cut.
        weighty: whether each call uses parameters; every stage needs one that does.
        stages: how many.

    Returns:
        None where it cannot be cut into so many.
    """
    places = [border for border, free in enumerate(allowed) if free]
    elapsed = [0.0, *itertools.accumulate(seconds)]
    heavy = [0, *itertools.accumulate(map(int, weighty))]
    best: dict[int, _Way] = {0: _Way((0.0, 0.0), (0,))}
    for _ in range(stages):
        found: dict[int, _Way] = {}
        for end in places[1:]:
            for start, (cost, before) in best.items():
                if start >= end or heavy[start] == heavy[end]:
                    continue
                own = elapsed[end] - elapsed[start]
                own += sum(crossing[border] for border in (start, end) if border != places[-1])
                total = (max(cost[0], own), cost[1] + own)
                if end not in found or total < found[end].cost:
                    found[end] = _Way(total, (*before, end))
        best = found
    last = best.get(places[-1])
    return None if last is None else list(last.borders)


def cut(recording: Recording, uses: Uses, seconds: Sequence[float], stages: int) -> list[int]:
    """Borders of `stages` stages.

    Raises:
        UsageError: the model has no place for so many.
    """
    crossing = Crossing.of(recording)
    crossed = [each / BYTES_PER_SECOND for each in crossing.bytes]
    weighty = uses.weighty

    def possible(count: int, tied: bool = False) -> list[int] | None:
        return balance(seconds, crossed, allowed(recording, crossing, uses, tied), weighty, count)

    found = possible(stages)
    if found is not None:
        return found
    most = max((count for count in range(1, stages) if possible(count)), default=1)
    instead = f"give a degree of at most {most}" if most > 1 else "use the strategy split-weights"
    tied = uses.tied()
    if tied and possible(most + 1, tied=True):
        raise UsageError(
            f"the model cannot be cut into {stages} stages: {' and '.join(tied[:2])} "
            f"{'are' if len(tied) > 1 else 'is'} used in places that would be in different stages "
            f"(tied weights); {instead}"
        )
    raise UsageError(
        f"the model cannot be cut into {stages} stages: it has parts with weights for {most} that "
        f"follow one another; {instead}"
    )


def _leaves(inputs: Any) -> list[Tensor]:
    return list(pytree.tree_leaves(inputs))


@dataclass(frozen=True)
class Stage:
    """A stretch of a recording.

    Args:
        recording: the whole.
        first: its first call.
        last: the call behind its last.
        receives: numbers of the values from the stage before.
        sends: numbers of the values for the stage behind.
    """

    recording: Recording
    first: int
    last: int
    receives: tuple[int, ...]
    sends: tuple[int, ...]

    def run(self, model: nn.Module, inputs: Any, received: Sequence[Tensor]) -> dict[int, Tensor]:
        """Compute it; returns all values by number."""
        values = dict(enumerate(_leaves(inputs)))
        values.update(zip(self.receives, received, strict=True))
        for call in self.recording.calls[self.first : self.last]:
            for leaf in call.changed:
                if isinstance(leaf, Value) and values[leaf.number].is_leaf:
                    # A received tensor is where its gradient is collected: not to be changed.
                    values[leaf.number] = values[leaf.number].clone()
            call.run(model, values)
        return values


def slowest(recording: Recording, seconds: Sequence[float], borders: Sequence[int]) -> float:
    """Seconds of the slowest stage, crossing its borders included."""
    crossed = [each / BYTES_PER_SECOND for each in Crossing.of(recording).bytes]
    crossed[0] = crossed[-1] = 0.0
    return max(
        sum(seconds[first:last]) + crossed[first] + crossed[last]
        for first, last in itertools.pairwise(borders)
    )


def stages_of(recording: Recording, borders: Sequence[int]) -> list[Stage]:
    """The stretches between borders."""
    crossing = Crossing.of(recording).values
    crossing[-1] = ()  # the output goes into the loss
    return [
        Stage(recording, first, last, crossing[first], crossing[last])
        for first, last in itertools.pairwise(borders)
    ]
