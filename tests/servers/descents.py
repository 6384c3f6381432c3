"""Descents in plain situations, step by step."""

from __future__ import annotations

from typing import Any

from wagontrain.servers.descent import Command, Course, Descent, Gate, Give, Note
from wagontrain.servers.messages import Done, Lease, Measured

ASYNCHRONOUS = Gate("asynchronous")
SYNCHRONOUS = Gate("synchronous")


def lent(commands: list[Command]) -> dict[int, Lease]:
    """Worker -> the lease it is given."""
    return {one.worker: one.lease for one in commands if isinstance(one, Give)}


def kinds(commands: list[Command]) -> list[type[Command]]:
    return [type(one) for one in commands if not isinstance(one, Note)]


def begin(course: Course, gate: Gate, workers: int) -> tuple[Descent, dict[int, Lease]]:
    """A descent whose workers have all joined, then all asked."""
    descent = Descent(course, gate)
    for worker in range(workers):
        assert descent.joined(worker) == []
    given: dict[int, Lease] = {}
    for worker in range(workers):
        given |= lent(descent.asked(worker))
    return descent, given


def push(worker: int, sequence: int, *leases: Lease, **fields: Any) -> Done:
    count = sum((one.stop - one.start) // one.shares for one in leases)
    numbers = tuple(one.number for one in leases)
    known = {"fetched": leases[0].version, "weight": count, "samples": count, "loss": 2.0 * count}
    return Done(worker, sequence, numbers, **{**known, **fields})


def measured(worker: int, lease: Lease, mean: float = 1.0) -> Measured:
    count = float(lease.stop - lease.start)
    return Measured(worker, lease.number, count, {"loss": mean * count})


def synchronous(workers: int, course: Course) -> tuple[Descent, dict[int, Lease]]:
    """A descent in the second step, of which every worker has a share."""
    descent, given = begin(course, SYNCHRONOUS, workers)
    commands = descent.done(push(0, 1, given[0]))
    shares = lent(commands) | lent(descent.asked(0))
    assert len(shares) == workers
    return descent, shares
