"""Validation of snapshots: its leases, and what came back for them."""

from __future__ import annotations

import math
from collections import deque
from dataclasses import replace

from wagontrain.servers.commands import Command, Drop, Keep, Validated
from wagontrain.servers.leases import Allowed, Course, Work, take_first
from wagontrain.servers.messages import Lease
from wagontrain.servers.roster import Roster
from wagontrain.servers.sums import sum_of


class Validation:
    """The validation data in pieces, each measured once by whoever asks.

    The sums of the pieces are added with one rounding: the values do not depend on who was
    quicker.
    """

    def __init__(self, course: Course, keep: Keep) -> None:
        self.keep = keep
        starts = range(0, course.validation_samples, course.validation_batch)
        self.to_give = deque(
            Work(
                start,
                min(start + course.validation_batch, course.validation_samples),
                snapshot=keep.number,
            )
            for start in starts
        )
        self._missing = len(starts)
        self._results: list[tuple[float, dict[str, float]]] = []

    def fits(self, weight: float, sums: dict[str, float]) -> bool:
        """Whether these are sums of the same figures as those that came before."""
        same = not self._results or self._results[0][1].keys() == sums.keys()
        return same and 0 <= weight < math.inf

    def add(self, weight: float, sums: dict[str, float]) -> None:
        """The sums over a piece."""
        self._results.append((weight, sums))
        self._missing -= 1

    def conclude(self) -> list[Command]:
        """The weighted means, once every piece is there; none exist where there is no weight."""
        if self._missing:
            return []
        number = self.keep.number
        if not self._results:
            return [Drop(number)]
        weight = sum_of(weight for weight, _ in self._results)
        values = {
            name: sum_of(sums[name] for _, sums in self._results) / weight
            for name in (self._results[0][1] if weight else ())
        }
        return [Validated(self.keep.epoch, number, values, weight), Drop(number)]


class Validations:
    """Those under way, the oldest first."""

    def __init__(self, course: Course) -> None:
        self.course = course
        self.open: dict[int, Validation] = {}

    def begin(self, keep: Keep) -> list[Command]:
        """A snapshot is to be validated; without validation data it is dropped again."""
        validation = Validation(self.course, keep)
        commands = validation.conclude()
        if not commands:
            self.open[keep.number] = validation
        return commands

    def abandon(self, roster: Roster) -> list[Keep]:
        """End all of them, for a shard has not their snapshots; what comes of leases is no use."""
        ended = [validation.keep for validation in self.open.values()]
        for lease in [each for each, one in roster.held.items() if one.work.snapshot in self.open]:
            roster.take(lease)
        self.open.clear()
        return ended

    def choose(self, allowed: Allowed) -> Work | None:
        """The next piece for one that asks."""
        for validation in self.open.values():
            if (work := take_first(validation.to_give, allowed)) is not None:
                return work
        return None

    def give_back(self, work: Work) -> None:
        """A piece was not measured."""
        self.of(work).to_give.appendleft(replace(work, again=True))

    def of(self, work: Work) -> Validation:
        """The one that a piece belongs to: a piece that is out keeps it open."""
        assert work.snapshot is not None
        return self.open[work.snapshot]

    def measured(self, work: Work, weight: float, sums: dict[str, float]) -> list[Command]:
        """The sums over a piece, and what follows if it was the last."""
        validation = self.of(work)
        validation.add(weight, sums)
        commands = validation.conclude()
        if commands:
            del self.open[validation.keep.number]
        return commands

    def lease(self, number: int, work: Work) -> Lease:
        """The lease of a piece; its step is the number of the piece."""
        keep = self.of(work).keep
        step = work.start // self.course.validation_batch
        return Lease(
            number, "validate", keep.epoch, step, work.start, work.stop,
            version=keep.version, snapshot=work.snapshot,
        )  # fmt: skip
