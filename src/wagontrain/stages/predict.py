"""What steps of a pipeline take: where it is cut, and what goes from stage to stage."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from wagontrain.cluster import traffic
from wagontrain.costs import Costs
from wagontrain.errors import UsageError
from wagontrain.profile import Layer, Profile
from wagontrain.simulate import Graph, uncollected


def divisible(profile: Profile) -> bool:
    """Whether a batch can be cut into micro-batches: no layer looks across samples."""
    return not any(layer.kind.startswith("BatchNorm") for layer in profile.layers)


def samples(costs: Costs, degree: int) -> int:
    """That a pipeline gets at a time."""
    piece = -(-costs.profile.batch_size // costs.profile.accumulate)
    return -(-piece // max(1, costs.size // degree))


@lru_cache(maxsize=64)  # asked for again for every rank's memory
def borders(seconds: tuple[float, ...], stages: int) -> tuple[tuple[int, int], ...]:
    """Consecutive stages, none of them empty, of which the slowest is as quick as can be.

    By dynamic programming. The best of k stages for n layers ends its last but one where the
    stages before it become slower than the last one: there it is looked for, by bisection.

    Args:
        seconds: of each layer.
        stages: to make of them.

    Returns:
        The first layer of each stage, and the one after its last.

    Raises:
        UsageError: there are fewer layers than stages.
    """
    count = len(seconds)
    if stages > count:
        raise UsageError(f"{count} layers cannot be {stages} stages: give a lower degree")
    sums = [0.0, *itertools.accumulate(seconds)]
    # best[n - k]: the slowest of k stages made of the first n layers, n from k to the layers that
    # leave one for each stage that follows; begins[k][n - k]: where the last of these begins.
    best = sums[1 : count - stages + 2]
    begins = [[0] * len(best)]
    for k in range(2, stages + 1):
        found, starts = [], []
        for place in range(len(best)):
            whole = sums[place + k]

            low, high = 0, place
            while low < high:
                middle = (low + high) // 2
                if best[middle] >= whole - sums[middle + k - 1]:
                    high = middle
                else:
                    low = middle + 1
            tried = (low - 1, low) if low else (low,)
            value, start = min(
                (max(best[other], whole - sums[other + k - 1]), other) for other in tried
            )
            found.append(value)
            starts.append(start + k - 1)
        best = found
        begins.append(starts)
    made, end = [], count
    for k in range(stages, 0, -1):
        start = begins[k - 1][end - k]
        made.append((start, end))
        end = start
    return tuple(reversed(made))


def stages_of(costs: Costs, degree: int, count: int) -> list[list[Layer]]:
    """The model in so many stages, for so many micro-batches."""
    each = samples(costs, degree) / count
    blocks = _blocks(costs.profile.layers)
    seconds = tuple(
        sum(layer.forward(each) + layer.backward(each) for layer in block) for block in blocks
    )
    return [
        [layer for block in blocks[start:stop] for layer in block]
        for start, stop in borders(seconds, degree)
    ]


def bound(costs: Costs, degree: int, count: int) -> float:
    """Seconds of a step with equal stages and links that cost nothing: (m + d - 1) · slowest."""
    each = samples(costs, degree) / count
    slowest = max(
        sum(layer.forward(each) + layer.backward(each) for layer in stage)
        for stage in stages_of(costs, degree, count)
    )
    return (count + degree - 1) * slowest


def _blocks(layers: Sequence[Layer]) -> list[list[Layer]]:
    """Layers with weights, each with those after it that have none: pooling, say, makes small
    what travels, and costs little."""
    found: list[list[Layer]] = []
    for layer in layers:
        if not found or (layer.parts and any(each.parts for each in found[-1])):
            found.append([])
        found[-1].append(layer)
    return found


def step_graph(costs: Costs, degree: int, count: int, schedule: str) -> Graph:
    """One pipeline's step; what the others of the world do is the same.

    Raises:
        UsageError: the schedule is not predicted.
    """
    if schedule == "interleaved":
        raise UsageError("the schedule interleaved is not predicted yet: gpipe and 1f1b are")
    found = stages_of(costs, degree, count)
    size = samples(costs, degree) / count
    graph = Graph()
    last: dict[int, list[int]] = {stage: [] for stage in range(degree)}
    with uncollected():
        for _ in range(costs.profile.accumulate):
            _passes(graph, costs, found, size, orders(schedule, degree, count), last)
    rows = costs.size // degree
    for stage, layers in enumerate(found):
        nbytes = sum(layer.nbytes for layer in layers)
        if rows > 1:
            ranks = range(stage, costs.size, degree)
            seconds = costs.exchange("all_reduce", nbytes, ranks)
            sent = nbytes * traffic("all_reduce", rows)
            last[stage] = [graph.exchange("sum of gradients", seconds, [stage], last[stage], sent)]
        graph.compute("update", costs.update(nbytes, stage), stage, last[stage])
    return graph


def orders(schedule: str, degree: int, count: int) -> list[list[tuple[str, int]]]:
    """What each stage does, in order: ("forward" or "backward", micro-batch)."""
    everything = []
    for stage in range(degree):
        ahead = count if schedule == "gpipe" else min(count, degree - stage)
        order = [("forward", number) for number in range(ahead)]
        backward = 0
        for number in range(ahead, count):
            order += [("backward", backward), ("forward", number)]
            backward += 1
        order += [("backward", number) for number in range(backward, count)]
        everything.append(order)
    return everything


def _passes(
    graph: Graph,
    costs: Costs,
    found: Sequence[Sequence[Layer]],
    size: float,
    todo: Sequence[Sequence[tuple[str, int]]],
    last: dict[int, list[int]],
) -> None:
    """Add the passes in an order in which each comes after what it waits for."""
    ways = {name: _Way.of(name, costs, found, size) for name in ("forward", "backward")}
    arrived: dict[tuple[str, int, int], int] = {}
    places = [0] * len(found)
    degree = len(found)
    moved = True
    while moved:
        moved = False
        for stage in range(degree):
            while places[stage] < len(todo[stage]):
                name, number = todo[stage][places[stage]]
                way = ways[name]
                after = last[stage]
                if 0 <= stage - way.onward < degree:
                    came = arrived.get((name, number, stage))
                    if came is None:
                        break
                    after = [*after, came]
                done = graph.compute(f"{name} {number}", way.seconds[stage], stage, after)
                last[stage] = [done]
                target = stage + way.onward
                if 0 <= target < degree:
                    nbytes, seconds = way.sends[min(stage, target)]
                    arrived[name, number, target] = graph.send(
                        f"{name} {number} on", seconds, stage, target, [done], nbytes
                    )
                places[stage] += 1
                moved = True


@dataclass(frozen=True)
class _Way:
    """What one micro-batch takes in one direction, which is the same for all of them.

    Args:
        onward: from a stage's number to that of the next.
        seconds: of each stage.
        sends: bytes and seconds of what crosses the border behind each stage.
    """

    onward: int
    seconds: list[float]
    sends: list[tuple[float, float]]

    @classmethod
    def of(cls, name: str, costs: Costs, found: Sequence[Sequence[Layer]], size: float) -> _Way:
        cost = costs.forward if name == "forward" else costs.backward
        onward = 1 if name == "forward" else -1
        seconds = [
            sum(cost(layer, size, stage) for layer in layers) for stage, layers in enumerate(found)
        ]
        sends = []
        for stage, layers in enumerate(found[:-1]):
            nbytes = layers[-1].output * size
            sends.append((nbytes, costs.exchange("send", nbytes, (stage, stage + 1))))
        return cls(onward, seconds, sends)


def memory(costs: Costs, degree: int, count: int, schedule: str, rank: int) -> dict[str, float]:
    """Of the worker of a stage: the largest number of micro-batches that it holds at a time."""
    stage = rank % degree
    held = count if schedule == "gpipe" else min(count, degree - stage)
    size = samples(costs, degree) / count
    return costs.memory(stages_of(costs, degree, count)[stage], size * held)
