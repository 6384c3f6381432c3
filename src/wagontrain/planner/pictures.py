"""What a plan keeps for pictures: step times by bandwidth, and the predicted step as pieces.

Both cost simulations. Of clusters of thousands they are left out, as the points are at which the
choice would flip.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from wagontrain.costs import Costs
from wagontrain.errors import UsageError
from wagontrain.plan import Curve, Piece
from wagontrain.planner.search import Weighed, link_rate, told, with_links
from wagontrain.simulate import Operation, simulate
from wagontrain.strategy import Strategy

FACTORS = tuple(2.0**power for power in range(-6, 7))
"""Times the bandwidth of today."""
_TIMED = 200_000
"""Operations that are simulated for the curves of a plan."""
_DRAWN = 50_000
"""Operations of a step that is simulated once more to be drawn."""
RANKS = 16
PIECES = 400


def bandwidth(costs: Costs) -> float | None:
    """Bits a second that a worker sends in the largest exchange that was measured; None where
    nobody exchanges."""
    if not (costs.cluster.between or costs.cluster.within):
        return None
    return link_rate(costs.cluster) * 1e9


def curves(weighed: Sequence[Weighed], winner: Weighed, costs: Costs) -> tuple[Curve, ...]:
    """Step time by bandwidth: of the winner, then of the best setting of every other strategy.

    Args:
        weighed: what was, the best first.
        winner: the one that was chosen.
        costs: of the task on the cluster.
    """
    today = bandwidth(costs)
    if today is None or costs.size == 1:
        return ()
    found = []
    left = _TIMED
    drawn: set[str] = set()
    for each in (winner, *weighed):
        if not each.fits or each.strategy.name in drawn:
            continue
        drawn.add(each.strategy.name)
        left -= len(FACTORS) * len(each.strategy.step_graph(costs).operations)
        if left < 0:
            break
        points = _points(each.strategy, costs, today)
        found.append(Curve(each.strategy.name, told(each.strategy), points))
    return tuple(found)


def _points(strategy: Strategy, costs: Costs, today: float) -> tuple[tuple[float, float], ...]:
    found = []
    for factor in FACTORS:
        changed = with_links(costs, factor)
        try:
            timeline = simulate(strategy.step_graph(changed), costs.interference)
        except UsageError:  # it cannot be there
            continue
        found.append((today * factor, timeline.step_seconds))
    return tuple(found)


def timeline(strategy: Strategy, costs: Costs) -> tuple[Piece, ...]:
    """The predicted step, of some ranks: who is first of each kind of host, and then in order."""
    graph = strategy.step_graph(costs)
    if len(graph.operations) > _DRAWN:
        return ()
    timed = simulate(graph, costs.interference)
    pieces = [
        Piece(operation.label, rank, resource, span.start, span.end - span.start)
        for operation, span in zip(graph.operations, timed.spans, strict=True)
        for rank, resource in _busy(operation)
    ]
    ranks = graph.ranks
    first = [rank for rank in costs.leaders if rank in ranks]
    kept = set(list(dict.fromkeys([*first, *ranks]))[:RANKS])
    servers = sorted({piece.rank for piece in pieces if piece.resource == "server"})[:RANKS]
    shown = [
        piece for piece in pieces
        if piece.rank in (servers if piece.resource == "server" else kept)
    ]  # fmt: skip
    return joined(shown, PIECES)


def _busy(operation: Operation) -> list[tuple[int, str]]:
    """Whose what is busy; a link that is so both ways is told once."""
    parts: dict[int, list[str]] = {}
    for part, rank in operation.resources:
        parts.setdefault(rank, []).append(part)
    return [
        (rank, name)
        for rank, held in parts.items()
        for name in (["links"] if set(held) == {"out", "in"} else held)
    ]


def joined(pieces: Sequence[Piece], most: int) -> tuple[Piece, ...]:
    """Pieces in the order of their lanes; short neighbours become one where there are too many.

    Args:
        pieces: of a step.
        most: pieces to keep, but at least one of every rank's resource.
    """
    lanes: dict[tuple[int, str], list[Piece]] = {}
    for piece in sorted(pieces, key=lambda each: (each.rank, each.resource, each.start)):
        lanes.setdefault((piece.rank, piece.resource), []).append(piece)
    end = max((piece.start + piece.seconds for piece in pieces), default=0.0)
    grain = end / 1024
    kept = [piece for lane in lanes.values() for piece in lane]
    while len(kept) > most and grain <= 2 * end:
        kept = [piece for lane in lanes.values() for piece in _coarse(lane, grain)]
        grain *= 2
    return tuple(kept)


def _coarse(lane: Sequence[Piece], grain: float) -> list[Piece]:
    """A lane in which what lies within a grain is one piece."""
    found: list[list[Piece]] = []
    for piece in lane:
        group = found[-1] if found else None
        if group and piece.start + piece.seconds - group[0].start <= grain:
            group.append(piece)
        else:
            found.append([piece])
    return [_one(group) for group in found]


def _one(group: Sequence[Piece]) -> Piece:
    first = group[0]
    if len(group) == 1:
        return first
    end = max(piece.start + piece.seconds for piece in group)
    busy = math.fsum(piece.seconds for piece in group)
    label = f"{first.label} and {len(group) - 1} more"
    if busy < 0.995 * (end - first.start):
        label += f", busy {busy / (end - first.start):.0%} of it"
    return Piece(label, first.rank, first.resource, first.start, end - first.start)
