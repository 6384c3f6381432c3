"""Every candidate of every strategy, timed by the simulator: the best, and why the rest lost."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

from wagontrain.cluster import Cluster, scaled, traffic
from wagontrain.costs import Costs
from wagontrain.errors import UsageError
from wagontrain.mesh import World
from wagontrain.plan import Candidate, Estimate
from wagontrain.simulate import simulate, uncollected
from wagontrain.strategy import Strategy
from wagontrain.task import Task
from wagontrain.units import short_time, size

_WIDEST = 1024.0
_BY_SAMPLES = ("activations", "backward", "loss", "batch", "at borders", "rows")
"""What is held of memory for each sample that is under way."""
_TIMED = 400_000
"""Operations that are simulated to find out at which point the choice would flip."""
_QUESTIONS = 30
"""Times that both steps are simulated for one such question, about."""


@dataclass(frozen=True)
class Weighed:
    """A strategy with what it is expected to take, or the reason why it cannot be."""

    strategy: Strategy
    estimate: Estimate | None
    refused: str = ""

    @property
    def fits(self) -> bool:
        """Whether it can be run."""
        return self.estimate is not None and self.estimate.fits

    @property
    def seconds(self) -> float:
        """Of a step; infinite where it cannot be run."""
        return self.estimate.seconds if self.estimate and self.estimate.fits else math.inf

    @property
    def to_loss(self) -> float:
        """Seconds to the loss that a step of exact training comes to, at worst."""
        return self.seconds * self.estimate.most_steps if self.estimate else math.inf


def estimate(strategy: Strategy, costs: Costs) -> Estimate:
    """What a step of a strategy takes, for a task on a cluster.

    Raises:
        UsageError: it cannot be, or the cluster lacks a measurement.
    """
    graph = strategy.step_graph(costs)
    timeline = simulate(graph, costs.interference)
    ranks = graph.ranks or [0]
    # The worker that computes longest is the one that the step waits for.
    shares = max((timeline.shares(rank) for rank in ranks), key=lambda each: each.compute)
    items, room = _tightest(strategy, costs, ranks)
    needed = strategy.steps_needed(costs)
    return Estimate(
        seconds=timeline.step_seconds,
        compute=shares.compute / graph.steps,
        exposed=shares.exposed / graph.steps,
        waiting=shares.waiting / graph.steps,
        memory=items,
        sent=max(graph.sent_by(rank) for rank in ranks) / graph.steps,
        room=room,
        least_steps=needed.least,
        most_steps=needed.most,
        statistics=needed.why,
    )


def _tightest(
    strategy: Strategy, costs: Costs, ranks: Iterable[int]
) -> tuple[dict[str, float], float]:
    """Bytes by what they are for, and bytes that may be taken, of the worker with least to spare.

    Args:
        strategy: that takes them.
        costs: of the task on the cluster.
        ranks: workers that its graph tells.
    """
    found = []
    for rank in dict.fromkeys([*costs.leaders, *ranks]):
        items = strategy.memory(costs, rank)
        trying = 0.0 if strategy.crewed else costs.trying(rank) - sum(items.values())
        if trying > 0:
            items = {**items, "trying the model": trying}
        found.append((items, costs.cluster.room(rank)))
    return min(found, key=lambda each: each[1] - sum(each[0].values()))


def weigh(
    kinds: Iterable[type[Strategy]], costs: Costs, task: Task | None = None, relaxed: bool = False
) -> list[Weighed]:
    """Every candidate that is the same mathematics as one process, the best first.

    Those that cannot be are at the end.

    Args:
        kinds: the strategies.
        costs: of the task on the cluster.
        task: asked whether it can be trained so, where given.
        relaxed: whether others are weighed as well, by what they take to a loss at worst.

    Raises:
        UsageError: the cluster lacks a measurement.
    """
    found: list[Weighed] = []
    with uncollected():
        for kind in kinds:
            different: list[Strategy] = []
            for strategy in kind.candidates(costs):
                if (strategy.exact or relaxed) and strategy not in different:
                    different.append(strategy)
                    found.append(_weighed(strategy, costs, task))
    return sorted(found, key=lambda each: each.to_loss)


def _weighed(strategy: Strategy, costs: Costs, task: Task | None) -> Weighed:
    if task is not None:
        try:
            strategy.check(task, World(size=costs.size))
        except UsageError as error:
            return Weighed(strategy, None, str(error))
    return Weighed(strategy, estimate(strategy, costs))


def lacking(weighed: Sequence[Weighed], costs: Costs) -> str:
    """What is closest to being possible, where nothing is, and what it lacks."""
    near = [each for each in weighed if each.estimate is not None]
    if not near:
        reasons = "; ".join(dict.fromkeys(each.refused for each in weighed)) or "none was weighed"
        return f"no strategy can train this task on these workers: {reasons}"
    least = min(near, key=lambda each: each.estimate.peak - each.estimate.room)  # type: ignore[union-attr]
    assert least.estimate is not None
    return (
        f"nothing fits: closest is {told(least.strategy)}, which needs "
        f"{size(least.estimate.peak)} per worker where {size(least.estimate.room)} may be "
        f"taken{_remedy(least, costs)}; give more workers or memory, or a smaller batch_size"
    )


def _remedy(each: Weighed, costs: Costs) -> str:
    """Whether fewer samples at a time would make it fit: smaller micro-batches do for activations
    what recomputing them does, which no strategy here can."""
    found = each.estimate
    assert found is not None
    over = found.peak - found.room
    grows = sum(found.memory.get(item, 0.0) for item in _BY_SAMPLES)
    if grows <= over:
        return f" ({size(over - grows)} too much even if no activations were kept)"
    ranks = each.strategy.step_graph(costs).ranks
    parts = costs.profile.accumulate
    while (parts := 2 * parts) <= costs.profile.batch_size // costs.size:
        smaller = replace(costs, profile=replace(costs.profile, accumulate=parts))
        items, room = _tightest(each.strategy, smaller, ranks)
        if sum(items.values()) <= room:
            return f" (Task.accumulate={parts} would make it fit)"
    return ""


# --- why ----------------------------------------------------------------------------------------


def candidates(weighed: Sequence[Weighed], winner: Weighed, costs: Costs) -> list[Candidate]:
    """What was weighed as candidates of a plan, each with the reason why it lost.

    Of every strategy the best is asked what would have to change for it to win, the best of all
    first, as long as that takes seconds: steps of thousands of workers are not timed dozens of
    times.
    """
    made = []
    asked: set[str] = set()
    small: set[str] = set()
    left, of_winner = _TIMED, len(winner.strategy.step_graph(costs).operations)
    for each in weighed:
        flip = more = ""
        if each.estimate is not None and not each.fits and each.strategy.name not in small:
            small.add(each.strategy.name)
            more = _remedy(each, costs)
        if each.fits and each.strategy.name not in asked and each is not winner:
            asked.add(each.strategy.name)
            both = of_winner + len(each.strategy.step_graph(costs).operations)
            if (left := left - _QUESTIONS * both) > 0:
                flip = flip_point(each, winner, costs)
        made.append(
            Candidate(
                each.strategy.name, each.strategy.settings, told(each.strategy),
                each.strategy.exact, each.estimate, why=_why(each, winner) + more, flip=flip,
            )
        )  # fmt: skip
    return made


_ALIKE = 0.01
"""Of a step: no reason why one is slower."""


def _why(each: Weighed, winner: Weighed) -> str:
    if each is winner:
        return ""
    found, best = each.estimate, winner.estimate
    if found is None:
        return each.refused
    if not found.fits:
        largest = max(found.memory, key=lambda item: found.memory[item])
        return (
            f"does not fit: needs {size(found.peak)} ({largest} "
            f"{size(found.memory[largest])}), a worker may take {size(found.room)}"
        )
    assert best is not None
    if each.strategy.crewed and each.to_loss < winner.to_loss:
        return (
            f"quicker as foretold ({short_time(found.seconds)} a step), but its workers are no "
            "group of ranks, so that auto cannot try it: name it to train so"
        )
    times = f"{each.to_loss / winner.to_loss:.2g}× as long"
    if found.most_steps > max(1.0, found.seconds / best.seconds):
        return (
            f"{times} to the same loss, if it takes {found.most_steps:.2g}× the steps "
            f"({found.statistics})"
        )
    more = {
        "compute": found.compute - best.compute,
        "exposed": found.exposed - best.exposed,
        "waiting": found.waiting - best.waiting,
    }
    cause = max(more, key=lambda part: more[part])
    if more[cause] < _ALIKE * best.seconds:
        return f"{times}: foretold alike"
    reasons = {
        "compute": f"computes {short_time(found.compute)} instead of {short_time(best.compute)}",
        "exposed": f"{size(found.sent)} cross the link every step and nothing hides "
        f"{short_time(found.exposed)} of it",
        "waiting": f"workers stand idle for {short_time(found.waiting)}",
    }
    return f"{times}: {reasons[cause]}"


def flip_point(each: Weighed, winner: Weighed, costs: Costs) -> str:
    """At which speed of links, or batch, a loser would be quicker than the winner."""
    found = []
    if costs.cluster.between or costs.cluster.within:
        factor = _bisect(lambda value: _ahead(each, winner, with_links(costs, value)))
        if factor is not None:
            rate = link_rate(costs.cluster) * factor
            found.append(f"{'above' if factor > 1 else 'below'} {rate:.3g} Gbit/s")
    factor = _bisect(lambda value: _ahead(each, winner, _with_batch(costs, value)))
    if factor is not None:
        batch = round(costs.profile.batch_size * factor)
        found.append(f"with batches {'above' if factor > 1 else 'below'} {batch}")
    return " or ".join(found)


def with_links(costs: Costs, factor: float) -> Costs:
    """The same task where links are so many times as fast."""
    return replace(costs, cluster=scaled(costs.cluster, factor))


def _with_batch(costs: Costs, factor: float) -> Costs | None:
    size = round(costs.profile.batch_size * factor)
    if size < costs.size * costs.profile.accumulate:
        return None
    return replace(costs, profile=replace(costs.profile, batch_size=size))


def _ahead(each: Weighed, winner: Weighed, costs: Costs | None) -> bool | None:
    """Whether the loser would be quicker; None where one of them could not be."""
    if costs is None:
        return None
    try:
        one, other = (_to_loss(strategy, costs) for strategy in (each.strategy, winner.strategy))
    except UsageError:
        return None
    return one < other


def _to_loss(strategy: Strategy, costs: Costs) -> float:
    timeline = simulate(strategy.step_graph(costs), costs.interference)
    return timeline.step_seconds * strategy.steps_needed(costs).most


def _bisect(ahead: Callable[[float], bool | None]) -> float | None:
    """The factor nearest to 1 at which an answer turns to yes; None where it does not."""
    found = []
    for step in (4.0, 0.25):
        low, high = 1.0, step
        while 1 / _WIDEST <= high <= _WIDEST and not (answer := ahead(high)):
            if answer is None:
                break
            low, high = high, high * step
        else:
            if 1 / _WIDEST <= high <= _WIDEST:
                for _ in range(6):
                    middle = math.sqrt(low * high)
                    low, high = (low, middle) if ahead(middle) else (middle, high)
                found.append(high)
    return min(found, key=lambda factor: abs(math.log(factor)), default=None)


def link_rate(cluster: Cluster) -> float:
    """Gbit/s that a worker sends in the largest all-reduce that was measured."""
    place = cluster.between or cluster.within
    kind, measured = next(iter(place.items()))
    kind, measured = (
        ("all_reduce", place["all_reduce"]) if "all_reduce" in place else (kind, measured)
    )
    ranks, size, seconds = max(measured.points, key=lambda point: (point[1], point[0]))
    return traffic(kind, ranks) * size * 8e-9 / seconds


def alone(kinds: Iterable[type[Strategy]], costs: Costs) -> float:
    """Seconds of a step on the quickest worker alone; infinite where it does not fit there."""
    host = max(costs.cluster.hosts, key=lambda each: each.speed * each.interference.crowded)
    free = host.speed * host.interference.crowded
    single = Cluster(costs.cluster.name, (replace(host, count=1, workers=1, speed=free),))
    one = replace(costs, cluster=single)
    return min((each.seconds for each in weigh(kinds, one)), default=math.inf)


def told(strategy: Strategy) -> str:
    """A strategy with the settings that are not its defaults, for people."""
    plain = type(strategy)()
    different = [
        f"{field.name}={_short(getattr(strategy, field.name))}"
        for field in dataclasses.fields(strategy)
        if getattr(strategy, field.name) != getattr(plain, field.name)
    ]
    return " ".join([strategy.name, *different])


def _short(value: object) -> str:
    if isinstance(value, dict):
        ways = [str(each) for each in value.values()]
        counts = [f"{ways.count(way)}×{way}" for way in dict.fromkeys(ways)]
        return "+".join(counts) or "nothing"
    text = str(value)
    return text if len(text) <= 40 else text[:37] + "..."
