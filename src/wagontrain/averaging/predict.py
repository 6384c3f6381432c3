"""What steps of local SGD take: local ones, and the averages among them."""

from __future__ import annotations

from collections.abc import Callable

from wagontrain.averaging.fragments import PIECE_BYTES
from wagontrain.cluster import traffic
from wagontrain.costs import Costs
from wagontrain.simulate import Graph


def step_graph(
    costs: Costs, period: int, fragments: int, due: Callable[[int], int | None], delay: int
) -> Graph:
    """All steps from one average to the next.

    What is on its way at the end is waited for: the next steps would hide it, so that this is a
    little too much with an overlap.

    Args:
        costs: of the task on the cluster.
        period: local steps between averages.
        fragments: parts that are averaged by themselves.
        due: which fragment is sent after so many steps, if one is.
        delay: steps that are taken while it is on its way.
    """
    graph = Graph(steps=period)
    members = range(costs.size)
    last: dict[int, list[int]] = {rank: [] for rank in costs.leaders}
    flying: dict[int, list[int]] = {}
    begun = 0
    for step in range(1, period + 1):
        index = due(step) if costs.size > 1 else None
        if index is None and step not in flying and step < period:
            continue
        for rank in costs.leaders:  # steps between which nothing happens are told as one
            seconds = local_step(costs, rank) * (step - begun)
            last[rank] = [graph.compute(f"steps to {step}", seconds, rank, last[rank])]
        begun = step
        for number in flying.pop(step, []):
            _wait(last, number)
        if index is None:
            continue
        left = costs.profile.nbytes / fragments
        after = [number for numbers in last.values() for number in numbers]
        sent = []
        while left > 0:
            piece = min(left, PIECE_BYTES)
            seconds = costs.exchange("all_reduce", piece, members)
            moved = piece * traffic("all_reduce", costs.size)
            sent.append(graph.exchange("average", seconds, costs.leaders, after, moved))
            left -= piece
        if delay == 0:
            for number in sent:
                _wait(last, number)
        else:
            flying.setdefault(step + delay, []).extend(sent)
    return graph


def _wait(last: dict[int, list[int]], number: int) -> None:
    for numbers in last.values():
        numbers.append(number)


def local_step(costs: Costs, rank: int) -> float:
    """Seconds of one step of a worker by itself, on its share."""
    layers, samples = costs.profile.layers, costs.samples(rank)
    passes = sum(
        costs.forward(layer, samples, rank) + costs.backward(layer, samples, rank)
        for layer in layers
    )
    return passes * costs.profile.accumulate + costs.update(costs.profile.nbytes, rank)


def memory(costs: Costs, rank: int, fragments: int, outer: bool, delay: int) -> dict[str, float]:
    """Bytes of a worker: a whole copy of everything, and what averaging takes besides."""
    items = costs.memory(costs.profile.layers, costs.samples(rank))
    part = costs.profile.nbytes / fragments
    items["averaging"] = part * (2 if delay else 1) if costs.size > 1 else 0.0
    if outer:
        items["outer optimizer"] = 2.0 * costs.profile.nbytes
    return items
