"""Who takes part, who waits for a lease, and which lease is in whose hand."""

from __future__ import annotations

from dataclasses import dataclass, field

from wagontrain.servers.leases import Work
from wagontrain.servers.messages import Lease

_WINDOW = 1024


@dataclass
class Sequences:
    """Which numbers have come; those far below the highest count as come."""

    highest: int = -1
    recent: set[int] = field(default_factory=set)

    def add(self, number: int) -> bool:
        """Whether it is new."""
        if number in self.recent or number <= self.highest - _WINDOW:
            return False
        self.recent.add(number)
        self.highest = max(self.highest, number)
        if len(self.recent) > 2 * _WINDOW:
            self.recent = {one for one in self.recent if one > self.highest - _WINDOW}
        return True


@dataclass
class Member:
    """A worker that takes part; `stale`: leases it works on that were taken from it."""

    leases: set[int] = field(default_factory=set)
    stale: set[int] = field(default_factory=set)
    sequences: Sequences = field(default_factory=Sequences)

    @property
    def busy(self) -> bool:
        """Whether it still has something to work on."""
        return bool(self.leases or self.stale)


@dataclass(frozen=True)
class Held:
    """A lease in a worker's hand."""

    worker: int
    work: Work
    lease: Lease


class Roster:
    """Workers in the order in which they came, and those that wait in the order of asking.

    `ready` are those that have asked at least once: one that never does is not waited for.
    """

    def __init__(self) -> None:
        self.members: dict[int, Member] = {}
        self.ready: dict[int, None] = {}
        self.waiting: dict[int, None] = {}
        self.held: dict[int, Held] = {}
        self.given = self.again = 0

    @property
    def stuck(self) -> bool:
        """Whether everybody waits and nothing is in anybody's hand."""
        return not self.held and len(self.waiting) == len(self.ready)

    def ask(self, worker: int) -> None:
        """A member wants a lease; asking again changes nothing."""
        self.ready[worker] = None
        self.waiting[worker] = None

    def give(self, worker: int, work: Work, lease: Lease) -> None:
        """One that waits gets it."""
        del self.waiting[worker]
        self.held[lease.number] = Held(worker, work, lease)
        self.members[worker].leases.add(lease.number)
        self.given += 1
        self.again += work.again

    def take(self, lease: int, stale: bool = False) -> Held:
        """The lease is in nobody's hand any more; `stale`: its holder does not know."""
        held = self.held.pop(lease)
        member = self.members[held.worker]
        member.leases.remove(lease)
        if stale:
            member.stale.add(lease)
        return held

    def held_by(self, worker: int, lease: int) -> Held | None:
        """The lease, if it is in this worker's hand."""
        held = self.held.get(lease)
        return held if held is not None and held.worker == worker else None

    def leave(self, worker: int) -> None:
        """The worker, whose leases were taken, is gone."""
        del self.members[worker]
        self.ready.pop(worker, None)
        self.waiting.pop(worker, None)

    def plain(self) -> dict[str, int]:
        """Counts of leases.

        Returns:
            given: all that ever were; again: those of them whose samples another worker, or the
            same one, had before; out: those in workers' hands now; waiting: workers without one.
        """
        return {
            "given": self.given, "again": self.again, "out": len(self.held),
            "waiting": len(self.waiting),
        }  # fmt: skip
