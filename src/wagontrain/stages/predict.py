"""What steps of a pipeline take: where it is cut, and what goes from stage to stage."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

from wagontrain.cluster import traffic
from wagontrain.costs import Costs
from wagontrain.errors import UsageError
from wagontrain.profile import Layer
from wagontrain.simulate import Graph, uncollected
from wagontrain.stages.cutting import BYTES_PER_SECOND

_SWEEPS = 3


def samples(costs: Costs, degree: int) -> int:
    """That a pipeline gets at a time."""
    return -(-costs.profile.piece // max(1, costs.size // degree))


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


def stages_of(costs: Costs, degree: int, count: int, schedule: str = "gpipe") -> list[list[Layer]]:
    """The model in the stages of so many ranks, for so many micro-batches."""
    each = samples(costs, degree) / count
    blocks = _blocks(costs.profile.layers)
    seconds = tuple(
        sum(layer.forward(each) + layer.backward(each) for layer in block) for block in blocks
    )
    sizes = [block[-1].output * each for block in blocks]
    crossed = tuple(
        max(size / BYTES_PER_SECOND, costs.exchange("send", size, (0, degree - 1)))
        for size in sizes
    )
    return [
        [layer for block in blocks[start:stop] for layer in block]
        for start, stop in narrowed(
            seconds, crossed, borders(seconds, total_stages(degree, schedule))
        )
    ]


@lru_cache(maxsize=64)
def narrowed(
    seconds: tuple[float, ...], crossed: tuple[float, ...], found: tuple[tuple[int, int], ...]
) -> tuple[tuple[int, int], ...]:
    """The same stages, each border moved to where less crosses it, if the stages on either side
    are together no slower for it. Runs count crossing at a nominal speed (`stages.cutting`), and
    computing without what quotas take of it; here what slower links take stands for both.

    Args:
        seconds: of each layer.
        crossed: seconds for what crosses the border behind each layer.
        found: the stages, as `borders` gives them.
    """
    places = [start for start, _ in found] + [len(seconds)]
    sums = [0.0, *itertools.accumulate(seconds)]
    cost = [0.0, *crossed[:-1], 0.0]  # of a border in front of each layer

    def slower(first: int, border: int, last: int) -> tuple[float, float]:
        sides = [(first, border), (border, last)]
        taken = max(sums[stop] - sums[start] + cost[start] + cost[stop] for start, stop in sides)
        return taken, cost[border]

    for _ in range(_SWEEPS):
        for number in range(1, len(places) - 1):
            before, after = places[number - 1], places[number + 1]
            places[number] = min(
                range(before + 1, after), key=lambda each: slower(before, each, after)
            )
    return tuple(itertools.pairwise(places))


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


def total_stages(degree: int, schedule: str) -> int:
    """Stages of the whole pipeline: with "interleaved" every rank has two."""
    return degree * (2 if schedule == "interleaved" else 1)


def step_graph(costs: Costs, degree: int, count: int, schedule: str) -> Graph:
    """One pipeline's step; what the others of the world do is the same.

    Raises:
        UsageError: the model has fewer layers than stages.
    """
    found = stages_of(costs, degree, count, schedule)
    size = samples(costs, degree) / count
    graph = Graph()
    last: dict[int, list[int]] = {rank: [] for rank in range(degree)}
    with uncollected():
        for _ in range(costs.profile.accumulate):
            _passes(graph, costs, found, size, orders(schedule, degree, count), last)
    rows = costs.size // degree
    for rank in range(degree):
        nbytes = sum(layer.nbytes for stage in found[rank::degree] for layer in stage)
        if rows > 1:
            ranks = range(rank, costs.size, degree)
            seconds = costs.exchange("all_reduce", nbytes, ranks)
            sent = nbytes * traffic("all_reduce", rows)
            last[rank] = [graph.exchange("sum of gradients", seconds, [rank], last[rank], sent)]
        graph.compute("update", costs.update(nbytes, rank), rank, last[rank])
    return graph


class Turn(NamedTuple):
    """What a rank does at a time.

    Args:
        way: "forward" or "backward".
        stage: through which of its stages.
        number: of the micro-batch.
    """

    way: str
    stage: int
    number: int


@lru_cache(maxsize=64)  # asked for again for every rank's memory
def orders(schedule: str, degree: int, count: int) -> tuple[tuple[Turn, ...], ...]:
    """What each rank does, in order."""
    if schedule == "interleaved":
        return tuple(_interleaved(rank, degree, count) for rank in range(degree))
    everything = []
    for stage in range(degree):
        ahead = count if schedule == "gpipe" else min(count, degree - stage)
        order = [Turn("forward", stage, number) for number in range(ahead)]
        backward = 0
        for number in range(ahead, count):
            order += [Turn("backward", stage, backward), Turn("forward", stage, number)]
            backward += 1
        order += [Turn("backward", stage, number) for number in range(backward, count)]
        everything.append(tuple(order))
    return tuple(everything)


def _interleaved(rank: int, degree: int, count: int) -> tuple[Turn, ...]:
    """Of a rank with two stages: rounds of micro-batches go through the first, then the second.

    Where the micro-batches are no whole rounds, all go through each stage before the next.

    Source: Narayanan et al. 2021, "Efficient Large-Scale Language Model Training on GPU Clusters
    Using Megatron-LM", section 2.2; the order is that of torch's ScheduleInterleaved1F1B, and
    ScheduleLoopedBFS.
    """
    rounds = max(1, count // degree)
    if count % rounds:
        both = (rank, rank + degree)
        ahead = [Turn("forward", stage, number) for stage in both for number in range(count)]
        back = [
            Turn("backward", stage, number)
            for stage in reversed(both)
            for number in reversed(range(count))
        ]
        return (*ahead, *back)
    each = count // rounds
    whole = 2 * count

    def turns(way: str) -> list[Turn]:
        done = {0: 0, 1: 0}
        made = []
        for step in range(whole):
            place = step // each % 2
            place = 1 - place if way == "backward" else place
            made.append(Turn(way, place * degree + rank, done[place]))
            done[place] += 1
        return made

    forward, backward = turns("forward"), turns("backward")
    ahead_of = min(whole, each + 2 * (degree - 1 - rank))
    order = forward[:ahead_of]
    for number in range(ahead_of, whole):
        order += [forward[number], backward[number - ahead_of]]
    return (*order, *backward[whole - ahead_of :])


def _passes(
    graph: Graph,
    costs: Costs,
    found: Sequence[Sequence[Layer]],
    size: float,
    todo: Sequence[Sequence[Turn]],
    last: dict[int, list[int]],
) -> None:
    """Add the passes in an order in which each comes after what it waits for."""
    degree, total = len(todo), len(found)
    ways = {name: _Way.of(name, costs, found, size, degree) for name in ("forward", "backward")}
    arrived: dict[Turn, int] = {}
    places = [0] * degree
    moved = True
    while moved:
        moved = False
        for rank in range(degree):
            while places[rank] < len(todo[rank]):
                turn = todo[rank][places[rank]]
                name, stage, number = turn
                way = ways[name]
                after = last[rank]
                if 0 <= stage - way.onward < total:
                    came = arrived.get(turn)
                    if came is None:
                        break
                    after = [*after, came]
                done = graph.compute(f"{name} {number}", way.seconds[stage], rank, after)
                last[rank] = [done]
                target = stage + way.onward
                if 0 <= target < total:
                    nbytes, seconds = way.sends[min(stage, target)]
                    arrived[Turn(name, target, number)] = graph.send(
                        f"{name} {number} on", seconds, rank, target % degree, [done], nbytes
                    )
                places[rank] += 1
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
    def of(
        cls, name: str, costs: Costs, found: Sequence[Sequence[Layer]], size: float, degree: int
    ) -> _Way:
        cost = costs.forward if name == "forward" else costs.backward
        onward = 1 if name == "forward" else -1
        seconds = [
            sum(cost(layer, size, stage % degree) for layer in layers)
            for stage, layers in enumerate(found)
        ]
        sends = []
        for stage, layers in enumerate(found[:-1]):
            nbytes = layers[-1].output * size
            ends = (stage % degree, (stage + 1) % degree)
            sends.append((nbytes, costs.exchange("send", nbytes, sorted(ends))))
        return cls(onward, seconds, sends)


def memory(costs: Costs, degree: int, count: int, schedule: str, rank: int) -> dict[str, float]:
    """Of a rank: its stages, and the micro-batches that it holds of each at a time."""
    place = rank % degree
    found = stages_of(costs, degree, count, schedule)
    size = samples(costs, degree) / count
    own = list(range(place, len(found), degree))
    kept = {stage: size * sum(layer.kept for layer in found[stage]) for stage in own}
    held, most, under_way, ahead = 0.0, 0.0, 0, 0
    for turn in orders(schedule, degree, count)[place]:
        sign = 1 if turn.way == "forward" else -1
        held, under_way = held + sign * kept[turn.stage], under_way + sign
        most, ahead = max(most, held), max(ahead, under_way)
    items = costs.memory([layer for stage in own for layer in found[stage]], size)
    return {**items, "activations": most, "batch": costs.profile.sample * size * ahead}
