"""Who gets samples when, and which pushes make one update together.

    WholeBatches   every push is an update by itself: asynchronous, or stale-synchronous
    EqualShares    an update is all shares of one batch: synchronous, exact
    FirstDone      an update is the first n pieces that are done: synchronous with backup workers

A lease is only given when all that its parameters have to contain is decided already: no worker
ever waits on a shard for what another worker has yet to do. It is why the next synchronous step
begins with the commit of the one before and not earlier: a worker that waits for those parameters
could not take over the share of one that is lost, and both would wait for ever.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Literal, Protocol

from wagontrain.errors import UsageError
from wagontrain.mesh import even_shares
from wagontrain.servers.leases import Course, Supply, Work, take_first
from wagontrain.servers.staleness import Clocks

Mode = Literal["asynchronous", "stale-synchronous", "synchronous"]


@dataclass(frozen=True)
class Gate:
    """How workers' updates may mix.

    Args:
        mode: "asynchronous": nobody waits for anybody (Dean et al. 2012); "stale-synchronous":
            see `staleness.Clocks`; "synchronous": one update of the whole batch after the other.
        bound: s of stale-synchronous.
        backups: b of synchronous: an update does not wait for the slowest b workers.
        warm_start: updates during which one worker at a time trains alone (Dean et al. 2012,
            section 4.1, against the instability of the first steps).

    Raises:
        UsageError: numbers that mean nothing in this mode.
    """

    mode: Mode
    bound: int = 0
    backups: int = 0
    warm_start: int = 0

    def __post_init__(self) -> None:
        modes = ("asynchronous", "stale-synchronous", "synchronous")
        if self.mode not in modes:
            raise UsageError(f"consistency {self.mode!r} does not exist: give one of {modes}")
        if min(self.bound, self.backups, self.warm_start) < 0:
            raise UsageError(f"{self} has a negative number: give numbers from 0 on")
        if self.bound and self.mode != "stale-synchronous":
            raise UsageError(f"{self.mode} has no bound of staleness: leave it out")
        if self.backups and self.mode != "synchronous":
            raise UsageError(f"{self.mode} has no backup workers: nobody waits for slow ones there")
        if self.warm_start and self.mode == "synchronous":
            raise UsageError("synchronous has no warm start: its updates are never stale")

    def least_version(self, version: int) -> int:
        """What the parameters for a lease that is given at `version` have to contain."""
        return min(version, self.warm_start) if self.mode == "asynchronous" else version


@dataclass(slots=True)
class Asking:
    """A worker that waits for a lease, and what it depends on whether it gets one.

    Args:
        worker: its number.
        lease: the number that the lease would have.
        busy: whether it is still at work on others.
        version: updates so far.
        ready: all workers that have ever asked and are not lost.
        anyone: whether work goes back even to the worker that spoiled it.
    """

    worker: int
    lease: int
    busy: bool
    version: int
    ready: Collection[int]
    anyone: bool

    def may_have(self, work: Work) -> bool:
        """Whether somebody else would have to try it."""
        return self.anyone or work.spoiled_by != self.worker


@dataclass(frozen=True)
class Gradient:
    """A push that counts: its name, and what it is of."""

    name: tuple[int, int]
    leases: tuple[int, ...]
    works: tuple[Work, ...]
    fetched: int
    weight: float
    loss: float
    seconds: float = 0.0

    @property
    def samples(self) -> int:
        """Samples that it is a sum over."""
        return sum(work.samples for work in self.works)


class Consistency(Protocol):
    """What `Descent` asks."""

    def choose(self, asking: Asking) -> Work | None:
        """What the worker is given now; None: it has to wait."""

    def give_back(self, worker: int, lease: int, work: Work) -> None:
        """The worker will not do it."""

    def accept(self, gradient: Gradient) -> tuple[Gradient, ...]:
        """The update that this one completes, in the order of adding; empty if none yet."""

    def recall(self) -> None:
        """What was accepted and is in no update yet is lost: its samples are to be had again."""

    def leave(self, worker: int) -> None:
        """The worker, whose leases were given back, is gone."""


class WholeBatches:
    """One lease is one batch, and one push one update, however many batches it is of.

    So a push does what a step does on one process, and learning rates mean the same. The next
    epoch's batches are given while some of the last ones are out: nobody waits at its end.
    """

    def __init__(self, supply: Supply, gate: Gate, limit: int | None) -> None:
        self.supply = supply
        self.limit = limit
        self.warm_start = gate.warm_start
        self.clocks = Clocks(gate.bound) if gate.mode == "stale-synchronous" else None
        self._in_hand: dict[int, int] = {}

    def choose(self, asking: Asking) -> Work | None:
        """A batch, unless somebody trains alone, or the worker is too far ahead."""
        if self.limit is not None and asking.version + len(self.supply.out) >= self.limit:
            return None
        alone = asking.version < self.warm_start
        if alone and self._in_hand and asking.worker not in self._in_hand:
            return None
        if self.clocks and not self.clocks.may_begin(asking.worker):
            return None
        work = self.supply.take(asking.may_have)
        if work is not None:
            self._in_hand[asking.worker] = self._in_hand.get(asking.worker, 0) + 1
            if self.clocks:
                self.clocks.give(asking.worker, asking.lease)
        return work

    def give_back(self, worker: int, lease: int, work: Work) -> None:
        """The next one that asks gets it."""
        self.supply.put_back(work)
        self._count_down(worker)
        if self.clocks:
            self.clocks.take_back(worker, lease)

    def accept(self, gradient: Gradient) -> tuple[Gradient, ...]:
        """An update by itself."""
        worker, _ = gradient.name
        for lease, work in zip(gradient.leases, gradient.works, strict=True):
            self.supply.apply(work)
            self._count_down(worker)
            if self.clocks:
                self.clocks.finish(worker, lease)
        return (gradient,)

    def _count_down(self, worker: int) -> None:
        self._in_hand[worker] -= 1
        if not self._in_hand[worker]:
            del self._in_hand[worker]

    def recall(self) -> None:
        """Nothing waits here to become part of an update."""

    def leave(self, worker: int) -> None:
        """Nobody is held back by its clock any more."""
        if self.clocks:
            self.clocks.leave(worker)


class EqualShares:
    """A step's batch is divided equally among the workers there are when the step begins.

    Each has one share of it. What a lost worker leaves goes to one that is done with its own; a
    worker that comes later has a share from the next step on, or one that is left over. The sum
    is formed in the order of the shares, whoever was first.
    """

    def __init__(self, supply: Supply, limit: int | None) -> None:
        self.supply = supply
        self.limit = limit
        self.batch: Work | None = None
        self._shares = 0
        self._to_give: deque[Work] = deque()
        self._owed: set[int] = set()
        self._done: dict[int, Gradient] = {}

    def choose(self, asking: Asking) -> Work | None:
        """The worker's share, or one that nobody else is going to ask for."""
        if asking.busy or (self.batch is None and not self._begin(asking)):
            return None
        if asking.worker not in self._owed and len(self._to_give) <= len(self._owed):
            return None
        work = take_first(self._to_give, asking.may_have)
        if work is not None:
            self._owed.discard(asking.worker)
        return work

    def _begin(self, asking: Asking) -> bool:
        if self.limit is not None and asking.version >= self.limit:
            return False
        self.batch = self.supply.take(asking.may_have)
        if self.batch is None:
            return False
        # Equal shares are rounded up: with as many shares as workers the last could be empty.
        each = -(-self.batch.samples // len(asking.ready))
        self._shares = -(-self.batch.samples // each)
        self._to_give = deque(
            replace(self.batch, share=share, shares=self._shares) for share in range(self._shares)
        )
        self._owed = set(asking.ready)
        return True

    def give_back(self, worker: int, lease: int, work: Work) -> None:
        """The share waits for a worker without one."""
        self._to_give.appendleft(replace(work, again=True))

    def accept(self, gradient: Gradient) -> tuple[Gradient, ...]:
        """All shares, once the last one is there."""
        (work,) = gradient.works
        self._done[work.share] = gradient
        if len(self._done) < self._shares or self.batch is None:
            return ()
        update = tuple(self._done[share] for share in range(self._shares))
        self.supply.apply(self.batch)
        self.batch = None
        self._done = {}
        return update

    def recall(self) -> None:
        """The shares that were done are to be done again."""
        for gradient in self._done.values():
            self._to_give.extend(replace(work, again=True) for work in gradient.works)
        self._done = {}

    def leave(self, worker: int) -> None:
        """Its share is left over."""
        self._owed.discard(worker)


class FirstDone:
    """Synchronous with b backup workers: an update is made of the first n = workers - b pieces.

    Source: Chen et al. 2016, "Revisiting Distributed Synchronous SGD", section 3. There, and in
    TensorFlow's `SyncReplicasOptimizer`, gradients that come too late are thrown away, and their
    samples with them; a worker that is always late then never contributes its data. Here a piece
    is one n-th of a batch in the epoch's order, and one that is out when a step ends is taken back
    at once: another worker applies it in a later step, so that an epoch still applies every sample
    once, and the end of an epoch does not wait for a gradient that would not count.

    A worker whose piece is done waits for the step's end rather than begin another one: whatever
    is begun before it at the old version does not count after it. It goes on to a further piece
    only where the step could not be completed otherwise. At the end of an epoch the step is made
    of what is left.
    """

    def __init__(self, supply: Supply, gate: Gate, limit: int | None) -> None:
        self.supply = supply
        self.backups = gate.backups
        self.limit = limit
        self.wanted = 0
        self._sizes: list[int] = []
        self._epoch = 0
        self._out = 0
        self._given = 0
        self._had: set[int] = set()
        self._done: list[Gradient] = []

    def choose(self, asking: Asking) -> Work | None:
        """A piece for each worker, and more where too few could be done."""
        if asking.busy or (not self.wanted and not self._begin(asking)):
            return None
        enough = len(self._done) + self._out >= self.wanted
        if enough and asking.worker in self._had:
            return None
        size = self._sizes[self._given % self.wanted]
        work = self.supply.take_piece(asking.may_have, self._epoch, size)
        if work is not None:
            self._had.add(asking.worker)
            self._given += 1
            self._out += 1
        return work

    def _begin(self, asking: Asking) -> bool:
        if self.supply.exhausted or (self.limit is not None and asking.version >= self.limit):
            return False
        self.wanted = max(1, len(asking.ready) - self.backups)
        self._epoch = self.supply.epoch
        self._given = 0
        batch = self.supply.course.batch_size
        self._sizes = [max(1, size) for size in even_shares(batch, self.wanted)]
        return True

    def give_back(self, worker: int, lease: int, work: Work) -> None:
        """The next one that asks gets it."""
        self.supply.put_back(work)
        self._out -= 1

    def accept(self, gradient: Gradient) -> tuple[Gradient, ...]:
        """The first n, or what is left of the epoch."""
        self._out -= 1
        self._done.append(gradient)
        rest = self._out or not self.supply.dry(self._epoch)
        if len(self._done) < self.wanted and rest:
            return ()
        update = tuple(sorted(self._done, key=lambda done: done.works[0].start))
        for done in update:
            self.supply.apply(done.works[0])
        self.wanted = 0
        self._had.clear()
        self._done = []
        return update

    def recall(self) -> None:
        """The pieces that were done are to be done again."""
        for gradient in self._done:
            self.supply.put_back(gradient.works[0])
        self._done = []

    def leave(self, worker: int) -> None:
        """Nothing is kept for a worker."""
        self._had.discard(worker)


def consistency_of(course: Course, gate: Gate, supply: Supply) -> Consistency:
    """What the gate asks for."""
    if gate.mode != "synchronous":
        return WholeBatches(supply, gate, course.steps)
    if gate.backups:
        return FirstDone(supply, gate, course.steps)
    return EqualShares(supply, course.steps)
