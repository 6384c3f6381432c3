"""How far workers may be apart, and how far they were.

Source: Ho et al. 2013, "More Effective Distributed ML via a Stale Synchronous Parallel Parameter
Server" (NIPS), section 2.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Any


class Clocks:
    """The stale-synchronous gate: who may begin another lease.

    A worker's clock is how many leases it has finished; it begins at the slowest one's. A lease
    may be given to worker w if both hold:

    1. clock(w) + its leases in hand - the slowest clock <= s. It is Ho et al.'s condition, with a
       lease that is asked for in advance counted at the clock at which it will be worked on. With
       s = 0 nobody begins a round before all have ended the last one: bulk synchronous.
    2. No lease in another's hand would see more than s + 1 pushes of w from the moment it was
       given to its own. The first condition alone allows 2s + 1: w may lag by s when the other
       begins, and lead by s + 1 when it ends.

    A lease given to p sees at most what w has in hand at that moment, s + 1 by the first condition,
    and what w is given later, which the second counts together with it. So between the version
    that a push was taken at and the update that it makes there are never more than s + 1 pushes of
    any one peer.

    Nobody waits for ever: where no lease is in hand the slowest passes both; where one is, it
    will be finished or given back.
    """

    def __init__(self, bound: int) -> None:
        self.bound = bound
        self.slowest = 0
        self.finished: dict[int, int] = {}
        self._began: dict[int, int] = {}
        self._in_hand: dict[int, int] = {}
        self._at: dict[int, int] = {}  # clock -> workers that stand at it
        # In the order in which they were given, with everybody's clock at that moment: clocks
        # only grow, so the oldest lease of another is the one that the second condition is about.
        self._given: OrderedDict[int, tuple[int, dict[int, int]]] = OrderedDict()

    def may_begin(self, worker: int) -> bool:
        """Whether the worker may be given one more lease now; O(s), whatever the workers."""
        if worker not in self.finished:
            self._began[worker] = self.finished[worker] = self.slowest
            self._in_hand[worker] = 0
            self._at[self.slowest] = self._at.get(self.slowest, 0) + 1
        ahead = self.finished[worker] + self._in_hand[worker]
        if ahead - self.slowest > self.bound:
            return False
        for holder, clocks in self._given.values():
            if holder != worker:
                return ahead - clocks.get(worker, self._began[worker]) <= self.bound
        return True

    def give(self, worker: int, lease: int) -> None:
        """The worker, which may begin one, has been given this lease. O(workers)."""
        self._given[lease] = worker, self.finished.copy()
        self._in_hand[worker] += 1

    def finish(self, worker: int, lease: int) -> None:
        """The lease's push is applied."""
        self.take_back(worker, lease)
        clock = self.finished[worker]
        self.finished[worker] = clock + 1
        self._at[clock + 1] = self._at.get(clock + 1, 0) + 1
        self._depart(clock)

    def take_back(self, worker: int, lease: int) -> None:
        """There will be no push for the lease."""
        del self._given[lease]
        self._in_hand[worker] -= 1

    def leave(self, worker: int) -> None:
        """The worker, which has no lease any more, is gone: nobody waits for it."""
        if worker in self.finished:
            self._depart(self.finished.pop(worker))
            del self._began[worker], self._in_hand[worker]

    def _depart(self, clock: int) -> None:
        self._at[clock] -= 1
        if not self._at[clock]:
            del self._at[clock]
            self.slowest = min(self._at, default=clock)


@dataclass
class Speed:
    """What a worker has done."""

    pushes: int = 0
    samples: int = 0
    seconds: float = 0.0
    dropped: int = 0

    def plain(self) -> dict[str, Any]:
        """As plain data; `seconds` is the mean of a push, the speed is while it computes."""
        mean = self.seconds / self.pushes if self.pushes else 0.0
        return {
            "pushes": self.pushes,
            "samples": self.samples,
            "seconds": mean,
            "samples_per_second": self.samples / self.seconds if self.seconds else None,
            "dropped": self.dropped,
        }


@dataclass
class Tally:
    """Counts over all pushes. The staleness of a push is how many updates it did not know of."""

    staleness: dict[int, int] = field(default_factory=dict)
    workers: dict[int, Speed] = field(default_factory=dict)

    def of(self, worker: int) -> Speed:
        """The counts of one worker."""
        return self.workers.setdefault(worker, Speed())

    def count(self, worker: int, staleness: int, samples: int, seconds: float) -> None:
        """A push was applied."""
        self.staleness[staleness] = self.staleness.get(staleness, 0) + 1
        speed = self.of(worker)
        speed.pushes += 1
        speed.samples += samples
        speed.seconds += seconds

    def plain_staleness(self) -> dict[str, Any]:
        """Mean, median, 99th percentile (nearest rank), maximum and histogram, as plain data."""
        counts = sorted(self.staleness.items())
        pushes = sum(count for _, count in counts)
        if not pushes:
            return {"mean": None, "p50": None, "p99": None, "max": None, "histogram": {}}
        return {
            "mean": sum(value * count for value, count in counts) / pushes,
            "p50": _percentile(counts, pushes, 50),
            "p99": _percentile(counts, pushes, 99),
            "max": counts[-1][0],
            "histogram": {str(value): count for value, count in counts},
        }


def _percentile(counts: list[tuple[int, int]], total: int, percent: int) -> int:
    """The smallest value that at least `percent` of 100 are not above."""
    seen = 0
    for value, count in counts:
        seen += count
        if 100 * seen >= percent * total:
            return value
    return counts[-1][0]
