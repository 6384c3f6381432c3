"""A curve of bounded size: the more points there are, the more of them stand together."""

from __future__ import annotations

import math
from dataclasses import dataclass

POINTS = 1024
"""Of a curve at most; a screen has not many more columns."""


@dataclass(slots=True)
class Bucket:
    """Neighbouring points together.

    Args:
        step, time: of the last one.
        above, below: sums of numerators and denominators, the mean being their ratio.
        low, high: the least and the largest value.
        count: how many points.
    """

    step: int
    time: float
    above: float
    below: float
    low: float
    high: float
    count: int = 1

    @property
    def mean(self) -> float:
        """Of the points, by their weight."""
        return self.above / self.below

    def add(self, other: Bucket) -> None:
        """Take up the one that follows."""
        self.step, self.time = other.step, other.time
        self.above += other.above
        self.below += other.below
        self.low, self.high = min(self.low, other.low), max(self.high, other.high)
        self.count += other.count

    def plain(self) -> list[float]:
        """Step, seconds, mean, least and largest value, and what the mean weighs."""
        figures = (self.mean, self.low, self.high, self.below)
        return [self.step, round(self.time, 3), *map(_short, figures)]


class Curve:
    """Points of one figure.

    Args:
        points: how many buckets there are at most; an even number.
    """

    def __init__(self, points: int = POINTS) -> None:
        assert points % 2 == 0
        self.buckets: list[Bucket] = []
        self.generation = 0
        self.stride = 1
        self._points = points

    def add(self, step: int, time: float, above: float, below: float = 1.0) -> None:
        """A point whose value is above / below; one that is not finite is left out."""
        if not below > 0 or not math.isfinite(above) or not math.isfinite(above / below):
            return
        value = above / below
        point = Bucket(step, time, above, below, value, value)
        last = self.buckets[-1] if self.buckets else None
        if last is not None and last.count < self.stride:
            last.add(point)
            return
        if len(self.buckets) == self._points:
            self._halve()
        self.buckets.append(point)

    def _halve(self) -> None:
        """Put every two together: each is of `stride` points, as there are no others but the last,
        which is full when another is added."""
        for first, second in zip(self.buckets[::2], self.buckets[1::2], strict=True):
            first.add(second)
        self.buckets = self.buckets[::2]
        self.stride *= 2
        self.generation += 1

    def since(self, generation: int, count: int) -> tuple[int, list[list[float]]]:
        """What somebody lacks who has seen `count` buckets of that generation.

        Returns:
            From which bucket on, and the buckets.
        """
        start = max(0, count - 1) if generation == self.generation else 0
        return start, [bucket.plain() for bucket in self.buckets[start:]]


class Rate:
    """A curve of something a second, each of whose points is of a second at least.

    Updates of workers that do not wait for each other come in bursts: the time from one to the next
    says nothing of how many there are in a second.
    """

    SECONDS = 1.0

    def __init__(self, curve: Curve) -> None:
        self.curve = curve
        self._amount = self._seconds = 0.0

    def add(self, step: int, time: float, amount: float, seconds: float) -> None:
        """So much more in so many seconds more."""
        if not math.isfinite(amount) or not 0 <= seconds < math.inf:
            return
        self._amount += amount
        self._seconds += seconds
        if self._seconds >= self.SECONDS:
            self.curve.add(step, time, self._amount, self._seconds)
            self._amount = self._seconds = 0.0


def _short(value: float) -> float:
    return float(f"{value:.6g}")
