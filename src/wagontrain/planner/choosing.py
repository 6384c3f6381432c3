"""All of it together: measure the cluster and the task, weigh every strategy, try the best.

Every rank does the same and comes to the same plan: what is decided on was gathered first.
"""

from __future__ import annotations

import statistics
import time
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from wagontrain.batches import Batches
from wagontrain.building import fits, forget_peak, resident_bytes
from wagontrain.cluster import Cluster
from wagontrain.costs import Costs
from wagontrain.errors import ModelError, TaskError, UsageError
from wagontrain.plan import Candidate, Plan
from wagontrain.planner import paper, pictures, search
from wagontrain.planner.probing import probe
from wagontrain.planner.profiling import arithmetic, copying, measure
from wagontrain.planner.search import Weighed
from wagontrain.profile import Profile
from wagontrain.strategy import Strategy
from wagontrain.task import Task
from wagontrain.transport import Context
from wagontrain.units import short_time

TRIED = 3
"""Candidates that are run for a few steps."""
_HOPELESS = 2.0
"""Who is expected to take so many times as long as the best is not tried."""
_STEPS = 4
_WARM_UP = 2
_RELAXED = (
    "relaxed strategies were weighed: of the steps that they need to the same loss, theory knows a "
    "range, and nothing was measured here; they are ranked as if it were the most"
)
_SECONDS = 6.0
"""Of a trial, after which no further step begins."""


@dataclass(frozen=True)
class Choice:
    """A plan, and the strategy that it chose."""

    strategy: Strategy
    plan: Plan


@dataclass(frozen=True)
class Wish:
    """What is wanted of a choice.

    Args:
        trial: whether the best are run for a few steps.
        relaxed: whether what is not the same mathematics as one process may be chosen.
        crewed: whether a strategy may be whose workers are no group of ranks: these ranks cannot
            train by it.
    """

    trial: bool = True
    relaxed: bool = False
    crewed: bool = False


_AS_EVER = Wish()


def choose(
    task: Task,
    context: Context,
    kinds: Iterable[type[Strategy]],
    wish: Wish = _AS_EVER,
) -> Choice:
    """Measure, weigh and try. Every rank has to call this.

    Args:
        task: what is to be trained.
        context: this rank's place in the job.
        kinds: the strategies to weigh.
        wish: what is wanted.

    Raises:
        UsageError: nothing can train this task on these workers; says what is closest.
        ModelError: the model or loss failed on the first batch.
    """
    kinds = list(kinds)
    clock = _Clock()
    with context.watch.doing("measuring the task", patient=True):
        profile, speeds = profiled(task, context)
    clock.lap("profile")
    with context.watch.doing("measuring the cluster"):
        cluster = probe(context, "this cluster", speeds)
        profile = at_rest(profile, context)
    clock.lap("probe")
    costs = Costs(profile, cluster)
    context.watch.at("weighing the strategies")
    weighed = search.weigh(kinds, costs, task, wish.relaxed)
    if not weighed or not weighed[0].fits:
        raise UsageError(search.lacking(weighed, costs))
    with context.watch.doing("comparing what was weighed"):
        _require_the_same(weighed, context)
    clock.lap("search")
    measured: dict[int, float] = {}
    if wish.trial and context.world.size > 1:
        measured = _try(task, context, weighed)
        clock.lap("trial")
    context.watch.at("explaining the plan")
    winner = _winner(weighed, measured, wish)
    plan = conclude(weighed, winner, costs, kinds, measured, profile.model)
    clock.lap("explaining")
    forget_peak(context.world.device)
    context.sent.forget()
    return Choice(winner.strategy, replace(plan, planning=clock.seconds))


def _winner(weighed: Sequence[Weighed], measured: Mapping[int, float], wish: Wish) -> Weighed:
    """The one with which a loss is reached first: after trials, one of those that were tried.

    Or a relaxed one: a few steps say nothing of those; they are taken as foretold and corrected.

    Raises:
        UsageError: what fits cannot be trained by these ranks.
    """
    ratios = _ratios(weighed, measured)
    expected: dict[int, float] = {}
    for place, each in enumerate(weighed):
        if not each.fits or (each.strategy.crewed and not wish.crewed):
            continue
        if place in measured:
            expected[place] = measured[place]
        elif not measured or not each.strategy.exact:
            most = each.to_loss / each.seconds
            expected[place] = _corrected(each, ratios) * most
    if not expected:
        raise UsageError(
            f"only {search.told(weighed[0].strategy)} fits, whose workers are no group of ranks: "
            f"name it, with --strategy {weighed[0].strategy.name}"
        )
    return weighed[min(expected, key=lambda each: expected[each])]


def _require_the_same(weighed: Sequence[Weighed], context: Context) -> None:
    """Refuse to go on where ranks would try different things, and wait for each other for ever."""
    told = "; ".join(f"{each.strategy!r} {each.fits}" for each in weighed)
    marks = context.gather_integers([zlib.crc32(told.encode())])
    if len({row[0] for row in marks}) > 1:
        raise UsageError(
            "workers came to different orders of the strategies from the same figures: name one "
            "with --strategy"
        )


def conclude(
    weighed: Sequence[Weighed],
    winner: Weighed,
    costs: Costs,
    kinds: Iterable[type[Strategy]],
    measured: dict[int, float],
    model: str,
) -> Plan:
    """The plan that follows from what was weighed and tried."""
    ratios = _ratios(weighed, measured)
    made = [
        replace(
            each,
            measured=measured.get(number),
            corrected=_corrected(weighed[number], ratios) if measured else None,
        )
        for number, each in enumerate(search.candidates(weighed, winner, costs))
    ]
    place = next(number for number, each in enumerate(weighed) if each is winner)
    chosen = made.pop(place)
    others = sorted(made, key=_order)
    others = [_tried_and_lost(each, chosen) for each in others]
    notes = []
    if any(not each.exact for each in (chosen, *others)):
        notes.append(_RELAXED)
    single = search.alone(kinds, costs)
    if costs.size > 1 and chosen.to_loss is not None and single < chosen.to_loss:
        notes.append(
            f"one worker alone would take {short_time(single)} a step, less than all {costs.size} "
            "together: train with --workers 1, or over faster links"
        )
    device = "cpu" if costs.cluster.hosts[0].device == "cpu" else "cuda"
    hosts = sum(host.count for host in costs.cluster.hosts)
    return Plan(
        chosen, tuple(others), model, costs.size, costs.cluster.name, hosts, device, tuple(notes),
        curves=pictures.curves(weighed, winner, costs), bandwidth=pictures.bandwidth(costs),
        timeline=pictures.timeline(winner.strategy, costs),
    )  # fmt: skip


def _order(candidate: Candidate) -> float:
    fits = candidate.estimate is not None and candidate.estimate.fits
    return candidate.to_loss if fits and candidate.to_loss is not None else float("inf")


def _tried_and_lost(each: Candidate, chosen: Candidate) -> Candidate:
    """With what the trials say of it: its own, or how others of its kind went."""
    if chosen.corrected is None or each.estimate is None or not each.estimate.fits:
        return each
    assert chosen.to_loss is not None
    assert each.to_loss is not None
    times = each.to_loss / chosen.to_loss
    if each.measured is None:
        _, relation, cause = each.why.partition("× as long")
        return replace(each, why=f"{times:.2g}{relation}{cause}") if relation else each
    return replace(each, why=f"{times:.2g}× as long when tried: {short_time(each.measured)} a step")


class _Clock:
    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.seconds[name] = now - self._last
        self._last = now


# --- the task -----------------------------------------------------------------------------------


def sizes(task: Task, workers: int) -> list[int]:
    """Samples to profile: a worker's share of a micro-batch, half of it, and twice."""
    share = -(-task.batch_size // task.accumulate // workers) or 1
    return [max(1, share // 2), share, min(2 * share, task.batch_size)]


def profiled(task: Task, context: Context) -> tuple[Profile, list[float]]:
    """Rank 0's profile, and the pace of every rank in the unit of its `speed`."""
    world = context.world
    if fits(task, context)[0]:
        counts = sizes(task, world.size)
        own = measure(task, world.device, counts)
        mine = 1 / sum(layer.forward(counts[1]) + layer.backward(counts[1]) for layer in own.layers)
    else:
        pace = arithmetic(world.device)
        rate = copying(world.device)
        own = paper.on_paper(task, paper.Machine(pace, rate, world.device.type))
        mine = pace
    profile = Profile.from_json(context.gather_bytes(own.to_json().encode())[0].decode())
    paces = [row[0] for row in context.gather([mine])]
    return profile, [profile.speed * pace / paces[0] for pace in paces]


def at_rest(profile: Profile, context: Context) -> Profile:
    """A profile with what workers have taken now that all is connected and nothing is trained."""
    device = context.world.device
    forget_peak(device)
    taken = [row[0] for row in context.gather_integers([resident_bytes(device)])]
    return replace(profile, base=max(taken))


# --- the trial ----------------------------------------------------------------------------------


def _try(task: Task, context: Context, weighed: Sequence[Weighed]) -> dict[int, float]:
    """Seconds of a step of the best, by their place."""
    measured: dict[int, float] = {}
    for place in _promising(weighed):
        seconds = _seconds_of(task, context, weighed[place].strategy)
        if seconds is not None:
            measured[place] = seconds
    return measured


def _ratios(weighed: Sequence[Weighed], measured: Mapping[int, float]) -> dict[str, float]:
    """Measured of estimated time by strategy; under "" that of all that were tried.

    Corrected so, nobody who was not tried can be expected to beat the best that was: those are the
    first in order, and no mean of ratios is below the least of them.
    """
    found: dict[str, list[float]] = {}
    for place, seconds in measured.items():
        ratio = seconds / weighed[place].seconds
        for name in (weighed[place].strategy.name, ""):
            found.setdefault(name, []).append(ratio)
    return {name: statistics.geometric_mean(ratios) for name, ratios in found.items()}


def _corrected(each: Weighed, ratios: Mapping[str, float]) -> float:
    """Seconds of a step, as estimated and corrected."""
    return each.seconds * ratios.get(each.strategy.name, ratios.get("", 1.0))


def _promising(weighed: Sequence[Weighed]) -> list[int]:
    """Places of those worth trying: the best, and of one strategy two at most.

    Of strategies that are relaxed a few steps show neither averages nor what is learnt by them.
    """
    found: list[int] = []
    able = [each for each in weighed if each.strategy.exact and not each.strategy.crewed]
    least = min((each.seconds for each in able), default=0.0)
    for place, each in enumerate(weighed):
        hopeless = each.seconds > _HOPELESS * least
        if hopeless or each.strategy.crewed or not each.strategy.exact:
            continue
        names = [weighed[other].strategy.name for other in found]
        if names.count(each.strategy.name) < 2:
            found.append(place)
        if len(found) == TRIED:
            break
    return found


def _seconds_of(task: Task, context: Context, strategy: Strategy) -> float | None:
    """Seconds of a step in a trial; None where it turns out to be impossible.

    It trains a model of its own: nothing of it is left.
    """
    device, trial = context.world.device, f"a trial of {search.told(strategy)}"
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        refused, runner = "", None
        with context.watch.doing(f"setting up {trial}", patient=True):
            try:
                runner = strategy.setup(task, context)
            except (UsageError, TaskError, ModelError) as error:  # the plain model did run
                refused = str(error)
            stopped = any(context.gather_text(refused))
        if stopped:
            if runner is not None:
                runner.close()
            return None
        assert runner is not None
        try:
            batches = Batches.of_training(replace(task, loader_workers=0), device, runner.cut)
            loaded = batches.epoch(0)
            taken: list[float] = []
            for number in range(min(batches.order.steps, _WARM_UP + _STEPS)):
                with context.watch.doing(f"in step {number} of {trial}"):
                    taken.append(_step_seconds(context, lambda: runner.step(next(loaded))))
                if sum(taken) > _SECONDS and number > 0:
                    break
        finally:
            runner.close()
    return statistics.median(taken[min(_WARM_UP, len(taken) - 1) :]) if taken else None


def _step_seconds(context: Context, step: Callable[[], object]) -> float:
    """Of the slowest rank."""
    context.barrier()
    began = time.perf_counter()
    step()
    if context.world.device.type == "cuda":
        torch.cuda.synchronize(context.world.device)
    return max(row[0] for row in context.gather([time.perf_counter() - began]))


# --- without a cluster --------------------------------------------------------------------------


def choose_offline(
    task: Task | None,
    profile: Profile,
    cluster: Cluster,
    kinds: Iterable[type[Strategy]],
    relaxed: bool = False,
) -> Plan:
    """A plan for a cluster that is described in a file.

    Raises:
        UsageError: nothing can train the task there, or the file lacks a measurement.
    """
    kinds = list(kinds)
    costs = Costs(profile, cluster)
    weighed = search.weigh(kinds, costs, task, relaxed)
    if not weighed or not weighed[0].fits:
        raise UsageError(search.lacking(weighed, costs))
    return conclude(weighed, weighed[0], costs, kinds, {}, profile.model)
