"""One step as data, and the one simulator that times it, whatever strategy it is of.

A strategy says a step as operations: what each takes when nothing disturbs it, which resources it
holds meanwhile, and which operations have to be over before. Overlap, pipeline bubbles, stragglers
and queues at servers come out of timing these; there is no formula for any of them.

Ranks that do the same at the same time need to be told once only: one stands for all of them.

Source: the form is that of Jia et al. 2019, "Beyond Data and Model Parallelism" (FlexFlow),
section 5: a task graph, and a simulation in which every resource works on one task at a time.
"""

from __future__ import annotations

import contextlib
import gc
import heapq
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, NamedTuple

Part = Literal["device", "out", "in", "server"]


class Resource(NamedTuple):
    """What works on one operation at a time: a rank's device, its link in one direction, ..."""

    part: Part
    rank: int


class Operation(NamedTuple):
    """A piece of work.

    Args:
        label: what it is, for the timeline.
        seconds: what it takes undisturbed.
        resources: held while it lasts.
        after: numbers of operations that have to be over before it begins.
        sent: bytes that each rank whose "out" it holds sends.
    """

    label: str
    seconds: float
    resources: tuple[Resource, ...]
    after: tuple[int, ...] = ()
    sent: float = 0.0

    @property
    def computes(self) -> bool:
        """Whether it is work of devices, and not of links or servers."""
        return any(resource.part == "device" for resource in self.resources)


@dataclass
class Graph:
    """The operations of one step, or of several, each after those that it waits for."""

    steps: float = 1.0
    """Steps that it tells: where they differ, as between two averages, one would not do."""
    operations: list[Operation] = field(default_factory=list, init=False)
    _sent: dict[int, float] = field(default_factory=dict, init=False, repr=False)
    _held: dict[Any, tuple[Resource, ...]] = field(default_factory=dict, init=False, repr=False)

    def compute(self, label: str, seconds: float, rank: int, after: Iterable[int] = ()) -> int:
        """Add work of a rank's device; returns its number."""
        held = self._held.get(rank)
        if held is None:  # made once: a step of a pipeline has hundreds of thousands of operations
            held = self._held[rank] = (Resource("device", rank),)
        return self._add(Operation(label, seconds, held, tuple(after)))

    def exchange(
        self, label: str, seconds: float, ranks: Iterable[int], after: Iterable[int], sent: float
    ) -> int:
        """Add an exchange in which all of some ranks send and receive; returns its number.

        Args:
            label: what it is.
            seconds: what it takes while nobody computes.
            ranks: who takes part; of ranks that do the same, one is enough.
            after: what it waits for.
            sent: bytes that each of them sends.
        """
        ranks = tuple(ranks)
        held = tuple(Resource(part, rank) for rank in ranks for part in _BOTH)
        for rank in ranks:
            self._sent[rank] = self._sent.get(rank, 0.0) + sent
        return self._add(Operation(label, seconds, held, tuple(after), sent))

    def send(
        self, label: str, seconds: float, source: int, target: int, after: Iterable[int],
        sent: float,
    ) -> int:  # fmt: skip
        """Add bytes from one rank to another; returns its number."""
        held = self._held.get((source, target))
        if held is None:
            held = (Resource("out", source), Resource("in", target))
            self._held[source, target] = held
        self._sent[source] = self._sent.get(source, 0.0) + sent
        return self._add(Operation(label, seconds, held, tuple(after), sent))

    def serve(self, label: str, seconds: float, server: int, after: Iterable[int] = ()) -> int:
        """Add work of a server; returns its number."""
        return self._add(Operation(label, seconds, (Resource("server", server),), tuple(after)))

    def carry(
        self, label: str, seconds: float, over: tuple[Resource, ...], after: Iterable[int],
        source: int | None = None, sent: float = 0.0,
    ) -> int:  # fmt: skip
        """Add bytes over any resources; returns its number.

        Args:
            label: what it is.
            seconds: what it takes undisturbed.
            over: held meanwhile.
            after: what it waits for.
            source: the rank that sends them; None where no worker does.
            sent: bytes.
        """
        if source is not None:
            self._sent[source] = self._sent.get(source, 0.0) + sent
        return self._add(Operation(label, seconds, over, tuple(after), sent))

    def _add(self, operation: Operation) -> int:
        number = len(self.operations)
        if not operation[1] >= 0:  # not a number, too
            raise ValueError(f"{operation.label!r} takes {operation.seconds} seconds")
        after = operation[3]
        if after and not (min(after) >= 0 and max(after) < number):
            raise ValueError(f"{operation.label!r} waits for what is not there yet")
        self.operations.append(operation)
        return number

    @property
    def ranks(self) -> list[int]:
        """Workers that it tells, in order."""
        held = {each for operation in self.operations for each in operation.resources}
        return sorted({each.rank for each in held if each.part != "server"})

    def sent_by(self, rank: int) -> float:
        """Bytes that a rank sends."""
        return self._sent.get(rank, 0.0)


_BOTH: tuple[Part, Part] = ("out", "in")


@dataclass(frozen=True)
class Interference:
    """What computing and exchanging on the same rank at the same time costs either, and what other
    ranks' computing costs.

    Args:
        compute: how many times as long computing takes meanwhile.
        exchange: and the exchange.
        crowded: how many times as long computing takes while all ranks are at it, as while no
            other is: they may share cores. What operations take is told for all.
    """

    compute: float = 1.0
    exchange: float = 1.0
    crowded: float = 1.0


_NONE = Interference()


class Span(NamedTuple):
    """When an operation began and ended, in seconds from the beginning of the step."""

    start: float
    end: float


@dataclass(frozen=True)
class Shares:
    """Where a rank's time in a step goes, in seconds: the four add up to the step.

    Args:
        compute: its device works.
        exposed: its device is idle, and its links are not.
        waiting: both are idle: a bubble, or others are slower.
        total: the step.
    """

    compute: float
    exposed: float
    waiting: float
    total: float


@dataclass(frozen=True)
class Timeline:
    """A graph that was timed."""

    graph: Graph
    spans: tuple[Span, ...]

    @cached_property
    def seconds(self) -> float:
        """Of all that the graph tells."""
        return max((span.end for span in self.spans), default=0.0)

    @property
    def step_seconds(self) -> float:
        """Of one step."""
        return self.seconds / self.graph.steps

    @cached_property
    def _by_rank(self) -> Mapping[int, tuple[list[Span], list[Span]]]:
        """When each rank's device was busy, and when its links were."""
        found: dict[int, tuple[list[Span], list[Span]]] = {}
        for operation, span in zip(self.graph.operations, self.spans, strict=True):
            before = None
            for part, rank in operation.resources:
                if part == "server" or rank == before:  # both directions of one rank: once
                    continue
                before = rank
                found.setdefault(rank, ([], []))[part != "device"].append(span)
        return found

    def shares(self, rank: int) -> Shares:
        """Where a rank's time goes."""
        computing, linked = self._by_rank.get(rank, ([], []))
        compute = _covered(computing)
        either = _covered(computing + linked)
        return Shares(compute, either - compute, self.seconds - either, self.seconds)


def _covered(spans: Sequence[Span]) -> float:
    """Seconds in which at least one of the spans is under way."""
    total, until = 0.0, 0.0
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, until))
        until = max(until, end)
    return total


def simulate(graph: Graph, interference: Mapping[int, Interference] | None = None) -> Timeline:
    """Time a step.

    Every resource works on one operation at a time, on those that are ready in the order in which
    the graph has them. While a rank both computes and exchanges, each is slowed. While only some
    of the graph's devices work, those of ranks that are crowded are quicker, in proportion to how
    many do not.

    Args:
        graph: the step.
        interference: of each rank; none where not given.

    Raises:
        ValueError: a rank of the graph is not in `interference`, where there is one.
    """
    with uncollected():
        simulation = _Simulation(graph)
        if interference is not None:
            simulation.disturb(interference)
        return simulation.run()


@contextlib.contextmanager
def uncollected() -> Iterator[None]:
    """Without looking for cycles: here are none, but a million tuples to look through for them."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()


class _Simulation:
    """Resources and operations are numbers here: a step may have a million operations."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        operations = graph.operations
        self.known: dict[Resource, int] = {}
        self.kinds: dict[tuple[Resource, ...], tuple[int, ...]] = {}  # many hold the same
        self.held: list[tuple[int, ...]] = []
        self.missing: list[int] = []
        self.followers: list[list[int]] = [[] for _ in operations]
        for number, (_, _, resources, after, _) in enumerate(operations):
            held = self.kinds.get(resources)
            if held is None:
                held = tuple(self.known.setdefault(each, len(self.known)) for each in resources)
                self.kinds[resources] = held
            self.held.append(held)
            if len(after) > 1:
                after = tuple(set(after))
            self.missing.append(len(after))
            for other in after:
                self.followers[other].append(number)
        self.busy = [-1] * len(self.known)  # with which operation
        self.queues: list[list[int]] = [[] for _ in self.known]  # ready, and not begun
        self.queued = [False] * len(operations)
        self.starts = [0.0] * len(operations)
        self.ends = [0.0] * len(operations)
        self.events: list[tuple[float, int]] = []
        self.paces: _Paces | None = None

    def disturb(self, interference: Mapping[int, Interference]) -> None:
        ranks = {rank for part, rank in self.known if part != "server"}
        if lacking := ranks - interference.keys():
            raise ValueError(f"no interference of rank {min(lacking)}")
        if any(interference[rank] != _NONE for rank in ranks):
            self.paces = _Paces(self, interference)

    def run(self) -> Timeline:
        events, paces, held, busy = self.events, self.paces, self.held, self.busy
        queues, missing = self.queues, self.missing
        over = 0
        ready = [number for number, left in enumerate(self.missing) if not left]
        self._begin(ready, 0.0)
        while events:
            now = events[0][0]
            finished: list[int] = []
            ready = []
            while events and events[0][0] == now:
                _, number = heapq.heappop(events)
                if paces is None or paces.is_over(number, now):
                    finished.append(number)
            for number in finished:
                self.ends[number] = now
                for resource in held[number]:
                    busy[resource] = -1
                    if queues[resource]:
                        ready.append(queues[resource][0])
                for follower in self.followers[number]:
                    missing[follower] -= 1
                    if not missing[follower]:
                        ready.append(follower)
            over += len(finished)
            self._begin(ready, now, finished)
        if over < len(held):  # cannot be: what waits comes after
            raise AssertionError(f"{len(held) - over} operations never began")
        return Timeline(self.graph, tuple(map(Span, self.starts, self.ends)))

    def _begin(self, ready: list[int], now: float, finished: Sequence[int] = ()) -> None:
        """Begin what can: all its resources are idle, and nobody is before it in their queues."""
        begun = []
        busy, queues = self.busy, self.queues
        held_by, waiting = self.held, self.queued
        for number in sorted(set(ready)) if len(ready) > 1 else ready:
            held, queued = held_by[number], waiting[number]
            for each in held:
                if busy[each] >= 0 or (queues[each] and queues[each][0] < number):
                    if not queued:
                        waiting[number] = True
                        for other in held:
                            heapq.heappush(queues[other], number)
                    break
            else:
                for each in held:
                    busy[each] = number
                    if queued:
                        heapq.heappop(queues[each])
                begun.append(number)
                self.starts[number] = now
        if self.paces is not None:
            for at, number in self.paces.changed(finished, begun, now):
                heapq.heappush(self.events, (at, number))
            return
        for number in begun:
            heapq.heappush(self.events, (now + self.graph.operations[number].seconds, number))


class _Paces:
    """How quick what is under way is, where computing and exchanging disturb each other."""

    def __init__(self, of: _Simulation, interference: Mapping[int, Interference]) -> None:
        self.busy, self.held, operations = of.busy, of.held, of.graph.operations
        self.left = [each.seconds for each in operations]  # undisturbed, as of `since`
        self.since = [0.0] * len(operations)
        self.slowed = [0.0] * len(operations)  # how many times as long; 0 before it begins
        self.ends = [-1.0] * len(operations)
        # By what is held: the resources that disturb, and by how much.
        self.disturbed: dict[tuple[int, ...], list[tuple[int, float]]] = {}
        for resources, held in of.kinds.items():
            computes = any(each.part == "device" for each in resources)
            found = {}
            for part, rank in resources:
                if computes and part == "device":
                    for link in _BOTH:
                        found[Resource(link, rank)] = interference[rank].compute
                elif not computes and part != "server":
                    found[Resource("device", rank)] = interference[rank].exchange
            self.disturbed[held] = [
                (of.known[each], factor) for each, factor in found.items() if each in of.known
            ]
        self.devices = {of.known[each]: interference[each.rank].crowded
                        for each in of.known if each.part == "device"}  # fmt: skip
        if len(self.devices) == 1 or max(self.devices.values(), default=1.0) == 1.0:
            self.devices = {}  # one stands for all, or nobody minds the others
        self.working = 0

    def is_over(self, number: int, now: float) -> bool:
        """Whether an operation ends now; its pace may have changed since that was foreseen."""
        if self.ends[number] != now:
            return False
        self.ends[number] = -1.0  # the same end may have been foreseen twice
        return True

    def changed(
        self, ended: Iterable[int], begun: Iterable[int], now: float
    ) -> list[tuple[float, int]]:
        """The new ends of all whose pace changes as some end and others begin."""
        disturbed, held, busy, slow = self.disturbed, self.held, self.busy, self.slowed
        affected = list(begun)
        if self.devices:
            affected += self._crowd()
        for numbers in (ended, begun):
            for number in numbers:
                for resource, _ in disturbed[held[number]]:
                    if busy[resource] >= 0:
                        affected.append(busy[resource])
        found = []
        for number in affected:  # whoever is there twice has its new pace the second time
            before, slowed = slow[number], 1.0
            for resource, factor in disturbed[held[number]]:
                if factor > slowed and busy[resource] >= 0:
                    slowed = factor
            if self.devices:
                slowed *= self._alone(held[number])
            if slowed != before:
                if before:
                    done = (now - self.since[number]) / before
                    self.left[number] = max(0.0, self.left[number] - done)
                self.since[number], slow[number] = now, slowed
                self.ends[number] = end = now + self.left[number] * slowed
                found.append((end, number))
        return found

    def _crowd(self) -> list[int]:
        """Operations of devices, where more or fewer work than before: their pace changes."""
        numbers = [self.busy[each] for each in self.devices if self.busy[each] >= 0]
        if len(numbers) == self.working:
            return []
        self.working = len(numbers)
        return numbers

    def _alone(self, held: tuple[int, ...]) -> float:
        """How many times as long as while all devices work: 1 / crowded while only one does."""
        crowded = max((self.devices.get(each, 1.0) for each in held), default=1.0)
        if crowded == 1.0:
            return 1.0
        idle = (len(self.devices) - self.working) / (len(self.devices) - 1)
        return 1.0 - idle * (1.0 - 1.0 / crowded)
