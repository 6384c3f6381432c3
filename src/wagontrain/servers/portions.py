"""One batch in portions much smaller than a worker's share, for whoever is free.

Each portion is given to one worker, and once none is left, what others have not brought back is
given once more to workers that have nothing to do. What comes first counts:

    a push counts         if it brings a portion that is missing, and no push that counts overlaps
                          with it but such as it contains as a whole; those count no longer
    it is forgotten       otherwise, and what it would have brought is still to be had

So every portion is in exactly one push that counts, though a push may be the sum over several.

A worker adds up what it computes and sends it now and then. Its last portion it sends by itself,
beside everything from before: then nothing but that portion is missing if it is slow. Which one
will be its last is told from its pace: the others ask so and so often until it is back.

Source: Dean et al. 2012, section 4.2: portions much smaller than 1/N, given to free workers; the
slowest of them given twice at the end, as backup tasks in MapReduce; gradients are sent every few
portions.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from wagontrain.mesh import even_shares, ranges
from wagontrain.servers.leases import Allowed, Work, take_first
from wagontrain.servers.sums import sum_of

Name = tuple[int, int]
"""Worker and sequence of a push."""


@dataclass(frozen=True)
class Push:
    """A push that counts.

    Args:
        name: under which the shards have it.
        portions: first positions of those it is the sum over.
        weight: of their samples.
        loss: sum over them, weighted.
        seconds: of computing.
    """

    name: Name
    portions: frozenset[int]
    weight: float
    loss: float
    seconds: float = 0.0


@dataclass(frozen=True)
class Asker:
    """A worker that wants a portion.

    Args:
        worker: its number.
        busy: whether it has yet to bring back others.
        ready: workers there are.
        others: of those, how many have something to do, this one not counted.
        allowed: which portions it may have.
    """

    worker: int
    busy: bool
    ready: int
    others: int
    allowed: Allowed


@dataclass(frozen=True)
class Portion:
    """What a worker is given.

    Args:
        work: which samples.
        alone: to be pushed by itself, and at once.
        copy: whether another worker has it, too.
    """

    work: Work
    alone: bool
    copy: bool = False


@dataclass
class _Out:
    """A portion in workers' hands; `given`: when, counted in questions."""

    work: Work
    given: int
    holders: set[int] = field(default_factory=set)


class Pool:
    """The portions of one evaluation.

    Args:
        positions: of the batch, through all epochs.
        count: portions, as many as there are samples at most.
        twice: whether late ones are given to a second worker.
    """

    def __init__(self, positions: range, count: int, twice: bool = True) -> None:
        sizes = even_shares(len(positions), min(len(positions), count))
        self.fresh = deque(Work(part.start, part.stop) for part in ranges(sizes, positions.start))
        self.missing = {work.start for work in self.fresh}
        self.sizes = {work.start: work.stop - work.start for work in self.fresh}
        self.pushes: dict[Name, Push] = {}
        self.copies = 0
        self._twice = twice
        self._out: dict[int, _Out] = {}
        self._questions = 0
        self._last: dict[int, int] = {}

    # Who gets what

    def asked(self) -> None:
        """A worker is done with what it had."""
        self._questions += 1

    def choose(self, asker: Asker) -> Portion | None:
        """What the worker gets now."""
        work = take_first(self.fresh, asker.allowed)
        if work is not None:
            since = self._questions - self._last.get(asker.worker, self._questions - asker.ready)
            self._last[asker.worker] = self._questions
            held = self._out.setdefault(work.start, _Out(work, self._questions))
            held.holders.add(asker.worker)
            return Portion(work, alone=len(self.fresh) < since)
        if self.fresh or asker.busy or not self._twice:
            return None
        return self._copy(asker)

    def _copy(self, asker: Asker) -> Portion | None:
        """What somebody else has, if it is late, or nobody else has anything to do."""
        out = [
            each
            for each in self._out.values()
            if len(each.holders) == 1 and asker.worker not in each.holders
            and each.work.start in self.missing and asker.allowed(each.work)
            and (self._questions - each.given >= asker.ready or asker.others <= 1)
        ]  # fmt: skip
        if not out:
            return None
        oldest = min(out, key=lambda each: each.given)
        oldest.holders.add(asker.worker)
        self.copies += 1
        return Portion(oldest.work, alone=True, copy=True)

    def give_back(self, worker: int, work: Work) -> None:
        """The worker will not do it: somebody else may, unless another has it already.

        Args:
            worker: which.
            work: as it is to be given again: with who spoiled it, say.
        """
        out = self._out[work.start]
        out.holders.discard(worker)
        out.work = work
        if not out.holders and work.start in self.missing:
            del self._out[work.start]
            self.fresh.appendleft(replace(work, again=True))

    # What counts

    def accept(self, push: Push) -> list[Name] | None:
        """The pushes that count no longer; None if this one does not."""
        over = [each for each in self.pushes.values() if each.portions & push.portions]
        new = push.portions & self.missing
        if not new or not all(each.portions <= push.portions for each in over):
            return None
        for each in over:
            del self.pushes[each.name]
        self.pushes[push.name] = push
        self.missing -= new
        return [each.name for each in over]

    @property
    def complete(self) -> bool:
        """Whether every portion is in a push that counts."""
        return not self.missing

    @property
    def result(self) -> tuple[Sequence[Push], float, float]:
        """The pushes in the order of their samples, their weight, and the mean loss."""
        pushes = sorted(self.pushes.values(), key=lambda push: min(push.portions))
        weight = sum_of(push.weight for push in pushes)
        loss = sum_of(push.loss for push in pushes)
        return pushes, weight, loss / weight if weight else math.nan
