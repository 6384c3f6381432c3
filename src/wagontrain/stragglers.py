"""Which rank the others wait for, and how much of the time."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from wagontrain.signs import SLOWER, WAITED
from wagontrain.strategy import StepTimes


@dataclass(frozen=True)
class Straggler:
    """The slowest rank.

    Args:
        rank: which.
        host: where it runs.
        slower: its own time for a step, over the median of the others'.
        waited: part of the time that the others waited for it, from 0 to 1.
    """

    rank: int
    host: str
    slower: float
    waited: float

    def __str__(self) -> str:
        return (
            f"rank {self.rank} on host {self.host} is {self.slower:.1f}× slower; "
            f"the others waited {self.waited:.0%} of the time for it"
        )


class RankTimes:
    """Sums of what each rank spent on the steps so far.

    An all-reduce evens out what a whole step takes on each rank; so a rank's own time is counted
    up to where the exchange begins to wait.
    """

    def __init__(self, hosts: Sequence[str]) -> None:
        self._hosts = list(hosts)
        self._own = [0.0] * len(hosts)
        self._waiting = [0.0] * len(hosts)
        self._exchange = 0.0

    def add(self, times: StepTimes) -> None:
        """Count one step."""
        for rank, (compute, data, waiting) in enumerate(
            zip(times.compute, times.data, times.waiting, strict=True)
        ):
            self._own[rank] += compute + data
            self._waiting[rank] += waiting
        self._exchange += times.exchange

    def straggler(self) -> Straggler | None:
        """The rank that the others wait for; None where none stands out."""
        if len(self._own) < 2 or not any(self._own):
            return None
        rank = max(range(len(self._own)), key=self._own.__getitem__)
        others = [other for other in range(len(self._own)) if other != rank]
        usual = statistics.median(self._own[other] for other in others)
        waited = statistics.mean(
            self._waiting[other] / (self._own[other] + self._exchange + self._waiting[other])
            for other in others
        )
        slower = self._own[rank] / max(usual, 1e-9)
        if slower < SLOWER or waited < WAITED:
            return None
        return Straggler(rank, self._hosts[rank], slower, waited)

    def summary(self) -> list[dict[str, Any]]:
        """Seconds that each rank spent on its own work and waiting for others."""
        return [
            {"rank": rank, "host": host, "own_seconds": own, "waiting_seconds": waiting}
            for rank, (host, own, waiting) in enumerate(
                zip(self._hosts, self._own, self._waiting, strict=True)
            )
        ]
