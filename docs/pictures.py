"""Draws a step of every strategy: `make pictures` writes docs/pictures/NAME.svg.

The network is made up, with round figures, and the same in all pictures: four convolutions that
compute much and weigh little, and three fully connected layers that weigh much and compute little,
on three or four workers with links of 1 Gbit/s. What is drawn is what the planner weighs: the
strategy's own `step_graph`, timed by wagontrain's simulator. Strategies without one (their workers
are no group) are drawn from the operations that their pages tell, timed by the same simulator.
"""

from __future__ import annotations

import html
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from wagontrain.cluster import KINDS, Cluster, Host, Measured, traffic
from wagontrain.costs import Costs
from wagontrain.profile import Cut, Layer, Line, Part, Profile
from wagontrain.registry import built_in, make_strategy
from wagontrain.simulate import Graph, Operation, Span, Timeline, simulate

FOLDER = Path(__file__).parent / "pictures"
RATE = 118e6
"""Bytes a second: 1 Gbit/s, less headers."""
SAMPLES = 64
SERVER = 3
"""The number that a server has where there are three workers."""

_COLOURS = {
    "forward": "#4c78a8", "backward": "#7ba6d0", "portion": "#5f90bd", "update": "#6aa56a",
    "exchange": "#e8923a", "server": "#9a6fb0",
}  # fmt: skip
_LEGEND = {
    "forward": "forward", "backward": "backward", "portion": "forward and backward",
    "update": "update", "exchange": "on the link", "server": "server",
}  # fmt: skip
_LEFT, _WIDTH, _RIGHT = 86, 600, 34
_DEVICE, _LINK, _GAP = 20, 13, 9
_LETTER = 6.2


# --- the network and the machines -----------------------------------------------------------------


def _layer(
    name: str, numbers: int, milliseconds: float, given: int, output: int, after: str = ""
) -> Layer:
    """A layer of so many numbers and milliseconds a sample, twice that backward."""
    cuts: tuple[Cut, ...] = ("column", "row") if name.startswith("fc") else ()
    forward, backward = Line(0.0, milliseconds / 1e3), Line(0.0, 2 * milliseconds / 1e3)
    return Layer(
        name, "Linear" if cuts else "Conv2d", (Part(f"{name}.weight", (numbers,), 4 * numbers),),
        forward, backward, 1.0, float(given), float(output), float(output), 2.0 * numbers, cuts,
        after,
    )  # fmt: skip


def network() -> Profile:
    """The network that all pictures are of: 25 million weights."""
    layers = (
        _layer("conv1", 100_000, 3.5, 150_528, 65_536),
        _layer("conv2", 100_000, 3.5, 65_536, 65_536),
        _layer("conv3", 150_000, 3.5, 65_536, 65_536),
        _layer("conv4", 150_000, 3.0, 65_536, 36_864),
        _layer("fc1", 16_000_000, 1.0, 36_864, 8_192, after="fc2"),
        _layer("fc2", 6_000_000, 0.6, 8_192, 8_192),
        _layer("fc3", 2_500_000, 0.4, 8_192, 4_000),
    )
    return Profile(
        "made up", SAMPLES, 1, layers, Line(0.0, 5e-10), 1.0, 0, 150_000.0, 200_000_000, 10.0, "cpu"
    )


def cluster(workers: int = 4) -> Cluster:
    """So many hosts with one worker each, all links alike."""
    sizes = [2**power for power in range(10, 31, 4)]
    links = {
        kind: Measured(tuple((2, size, 1e-4 + traffic(kind, 2) * size / RATE) for size in sizes))
        for kind in KINDS
    }
    return Cluster("made up", (Host(workers, 1, "cpu", 8_000_000_000, 10.0),), links, {})


@dataclass(frozen=True)
class Picture:
    """What is drawn: a timed step, and whose lanes are shown under which names."""

    timeline: Timeline
    lanes: Sequence[tuple[int, str]]


# --- strategies that say what their step is -------------------------------------------------------


def _told(name: str, **settings: object) -> Picture:
    costs = Costs(network(), cluster())
    graph = make_strategy(name, settings).step_graph(costs)
    ranks = sorted({rank for each in graph.operations for _, rank in each.resources})
    alike = len(ranks) == 1
    lanes = [(rank, "each of 4" if alike else f"worker {rank}") for rank in ranks]
    return Picture(simulate(graph, costs.interference), lanes)


def _hybrid() -> Picture:
    """Of the placements worth weighing, the quickest."""
    costs = Costs(network(), cluster())
    strategies = built_in()["hybrid"].candidates(costs)
    graphs = [each.step_graph(costs) for each in strategies]
    timed = [simulate(graph, costs.interference) for graph in graphs]
    return Picture(min(timed, key=lambda each: each.seconds), [(0, "each of 4")])


# --- strategies whose workers are no group --------------------------------------------------------


def _seconds(samples: float) -> tuple[float, float]:
    layers = network().layers
    return sum(x.forward(samples) for x in layers), sum(x.backward(samples) for x in layers)


def _parameter_server() -> Picture:
    """Each worker fetches, computes the gradient of a batch and pushes it; worker 2 is slower."""
    graph, profile = Graph(), network()
    wire, apply = profile.nbytes / 8 / RATE, profile.update(profile.nbytes)
    ready: dict[int, list[int]] = {worker: [] for worker in range(3)}
    paces, rounds = (1.0, 1.1, 1.9), (3, 3, 2)
    forward, backward = _seconds(SAMPLES / 4)
    for turn in range(max(rounds)):
        for worker in (each for each in range(3) if turn < rounds[each]):
            here = graph.send("fetch", wire, SERVER, worker, ready[worker], profile.nbytes)
            here = graph.compute("forward", forward * paces[worker], worker, [here])
            here = graph.compute("backward", backward * paces[worker], worker, [here])
            here = graph.send("push", wire, worker, SERVER, [here], profile.nbytes)
            ready[worker] = [graph.serve("apply", apply, SERVER, [here])]
    return Picture(simulate(graph), _LANES)


def _local_sgd() -> Picture:
    """Three steps of each worker's own, then an average of the weights; twice."""
    graph, profile = Graph(), network()
    forward, backward = _seconds(SAMPLES / 4)
    last: dict[int, list[int]] = {worker: [] for worker in range(4)}
    average = cluster().seconds("all_reduce", profile.nbytes, range(4))
    by_turns = ((1.0, 1.4, 1.0), (1.3, 1.0, 1.1), (1.0, 1.0, 1.4), (1.1, 1.0, 1.2))
    for _ in range(2):
        for step in range(3):
            for worker, paces in enumerate(by_turns):
                here = graph.compute("forward", forward * paces[step], worker, last[worker])
                here = graph.compute("backward", backward * paces[step], worker, [here])
                update = profile.update(profile.nbytes)
                last[worker] = [graph.compute("update", update, worker, [here])]
        together = [number for numbers in last.values() for number in numbers]
        sent = profile.nbytes * traffic("all_reduce", 4)
        met = graph.exchange("average of the weights", average, range(4), together, sent)
        last = {worker: [met] for worker in range(4)}
    return Picture(simulate(graph), [(worker, f"worker {worker}") for worker in range(4)])


def _sandblaster() -> Picture:
    """One evaluation: whoever is free takes the next portion; worker 2 is slower."""
    graph, profile = Graph(), network()
    wire = profile.nbytes / 8 / RATE
    each = sum(_seconds(SAMPLES / 8))
    paces = (1.0, 1.0, 2.5)
    fetched = {
        worker: graph.send("fetch x", wire, SERVER, worker, [], profile.nbytes)
        for worker in range(3)
    }
    free = {worker: (worker + 1) * wire for worker in range(3)}
    taken: dict[int, list[int]] = {worker: [] for worker in range(3)}
    last = {worker: fetched[worker] for worker in range(3)}
    for number in range(12):
        worker = min(free, key=lambda one: free[one] + each * paces[one])
        free[worker] += each * paces[worker]
        label = f"portion {number + 1}"
        last[worker] = graph.compute(label, each * paces[worker], worker, [last[worker]])
        taken[worker].append(last[worker])
    pushed = []
    for worker in sorted(free, key=free.__getitem__):
        halves = [taken[worker][len(taken[worker]) // 2 - 1]] if len(taken[worker]) > 1 else []
        for after in [*halves, last[worker]]:
            pushed.append(graph.send("sum", wire, worker, SERVER, [after], profile.nbytes))
    graph.serve("g, d, trial", profile.update(profile.nbytes), SERVER, pushed)
    return Picture(simulate(graph), _LANES)


_LANES = [*((worker, f"worker {worker}") for worker in range(3)), (SERVER, "server")]

PICTURES: dict[str, Callable[[], Picture]] = {
    "data-parallel": lambda: _told("data-parallel"),
    "sharded": lambda: _told("sharded"),
    "split-weights": lambda: _told("split-weights"),
    "hybrid": _hybrid,
    "pipeline": lambda: _told("pipeline", micro_batches=8),
    "parameter-server": _parameter_server,
    "local-sgd": _local_sgd,
    "sandblaster": _sandblaster,
}


# --- drawing --------------------------------------------------------------------------------------


def draw(picture: Picture) -> str:
    """A timed step as SVG: a band for each worker, its device above and its link below."""
    timeline = picture.timeline
    scale = _WIDTH / timeline.seconds
    heights = [_heights(timeline, rank) for rank, _ in picture.lanes]
    parts, top = [], 28
    for (rank, name), (device, link) in zip(picture.lanes, heights, strict=True):
        parts.append(_text(8, top + 14, name))
        parts += _band(timeline, rank, top, device, scale)
        top += device + link + _GAP
    parts += _axis(timeline.seconds, scale, top)
    whole = top + 22
    shown = {_kind(each) for each in timeline.graph.operations}
    parts += _legend([kind for kind in _COLOURS if kind in shown])
    width = _LEFT + _WIDTH + _RIGHT
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {whole}" '
        f'width="{width}" height="{whole}" font-family="sans-serif" font-size="11" role="img">\n'
        f'<rect width="{width}" height="{whole}" rx="6" fill="#ffffff"/>\n'
        + "\n".join(parts)
        + "\n</svg>\n"
    )


def _heights(timeline: Timeline, rank: int) -> tuple[int, int]:
    parts = {
        resource.part
        for each in timeline.graph.operations
        for resource in each.resources
        if resource.rank == rank
    }
    return _DEVICE * bool(parts & {"device", "server"}), _LINK * bool(parts & {"in", "out"})


def _band(timeline: Timeline, rank: int, top: int, device: int, scale: float) -> Iterator[str]:
    for operation, span in zip(timeline.graph.operations, timeline.spans, strict=True):
        held = {resource.part for resource in operation.resources if resource.rank == rank}
        if held & {"device", "server"}:
            yield _bar(operation, span, top, device, scale)
        elif held == {"in", "out"}:
            yield _bar(operation, span, top + device, _LINK, scale)
        elif held:  # half a link: what is sent above, what is received below
            lower = _LINK / 2 if held == {"in"} else 0.0
            yield _bar(operation, span, top + device + lower, _LINK / 2, scale)


def _bar(operation: Operation, span: Span, top: float, height: float, scale: float) -> str:
    left, wide = _LEFT + span.start * scale, (span.end - span.start) * scale
    label = html.escape(operation.label)
    drawn = (
        f'<rect x="{left:.1f}" y="{top:g}" width="{max(wide, 0.4):.1f}" height="{height:g}" '
        f'fill="{_COLOURS[_kind(operation)]}" stroke="#ffffff" stroke-width="0.6">'
        f"<title>{label}</title></rect>"
    )
    if height >= _LINK and len(operation.label) * _LETTER + 4 < wide:
        drawn += _text(left + 3, top + height / 2 + 4, operation.label, "#ffffff")
    return drawn


def _kind(operation: Operation) -> str:
    if operation.computes:
        return operation.label.split()[0]
    server = any(resource.part == "server" for resource in operation.resources)
    return "server" if server else "exchange"


def _text(x: float, y: float, text: str, colour: str = "#222222") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" fill="{colour}">{html.escape(text)}</text>'


def _axis(seconds: float, scale: float, top: int) -> Iterator[str]:
    yield (f'<line x1="{_LEFT}" y1="{top}" x2="{_LEFT + _WIDTH}" y2="{top}" stroke="#888888"/>')
    step = next(each for each in (0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0) if seconds / each <= 8)
    for number in range(int(seconds / step + 1e-9) + 1):
        x = _LEFT + number * step * scale
        yield f'<line x1="{x:.1f}" y1="{top}" x2="{x:.1f}" y2="{top + 4}" stroke="#888888"/>'
        yield _text(x - 2, top + 16, f"{number * step:.3g} s")


def _legend(kinds: Sequence[str]) -> Iterator[str]:
    x = float(_LEFT)
    for kind in kinds:
        yield f'<rect x="{x:.1f}" y="8" width="10" height="10" fill="{_COLOURS[kind]}"/>'
        yield _text(x + 14, 17, _LEGEND[kind])
        x += 26 + len(_LEGEND[kind]) * _LETTER


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for title, made in PICTURES.items():
        (FOLDER / f"{title}.svg").write_text(draw(made()))
