"""A line search for the strong Wolfe conditions, on numbers alone: no vector is seen here.

Along x + t d, with f(t) and its slope f'(t), a step is wanted with

    f(t) ≤ f(0) + c1 t f'(0)      it decreases enough
    |f'(t)| ≤ c2 |f'(0)|          and is nearly flat there

First the step grows until an interval must hold such a point, then the interval shrinks; each next
trial is where a cubic through both ends has its minimum.

Source: Nocedal and Wright, "Numerical Optimization", algorithms 3.5 and 3.6, equation 3.59. Where
these leave a choice it is made as torch.optim.LBFGS makes it, so that the steps are the same.
"""

from __future__ import annotations

import math
from collections.abc import Generator
from dataclasses import dataclass

C1 = 1e-4
C2 = 0.9


@dataclass(frozen=True)
class Point:
    """A point on the line.

    Args:
        t: the step.
        f: the objective; infinite where it is not finite.
        slope: along the line.
        gradient: name of the vector that it has there; "" where there is none.
        largest: absolute value in that gradient.
    """

    t: float
    f: float
    slope: float
    gradient: str = ""
    largest: float = math.inf


@dataclass(frozen=True)
class Probe:
    """The objective is wanted at a step; gradients of other points than `keep` are not any more."""

    t: float
    keep: tuple[Point, ...]


Search = Generator[Probe, Point, tuple[Point, int]]
"""Asks for points; gives the one to go to, and how many were tried."""


def strong_wolfe(start: Point, t: float, largest: float, tolerance: float, most: int) -> Search:
    """Search from `start`, whose slope is negative.

    Args:
        start: the point at step 0.
        t: first step to try.
        largest: absolute value in the direction.
        tolerance: a shorter move of every parameter than this is none.
        most: trials beyond the first.
    """
    new = yield Probe(t, (start,))
    trials, previous = 0, start
    ends: list[Point] | None = None
    while trials < most:
        rises = new.f > start.f + C1 * new.t * start.slope or (trials > 1 and new.f >= previous.f)
        if not rises and abs(new.slope) <= -C2 * start.slope:
            return new, trials + 1
        if rises or new.slope >= 0:
            ends = [previous, new]
            break
        bounds = new.t + 0.01 * (new.t - previous.t), 10 * new.t
        t = minimum_of_cubic(previous, new, bounds)
        previous = new
        new = yield Probe(t, (start, previous))
        trials += 1
    if ends is None:  # still falling after as many trials as there may be
        return (start if start.f <= new.f else new), trials + 1
    return (yield from _zoom(start, ends, trials, largest, tolerance, most))


def _zoom(
    start: Point, ends: list[Point], trials: int, largest: float, tolerance: float, most: int
) -> Search:
    """Shrink an interval that holds a point as wanted; its lower end is the best so far."""
    low, high = (0, 1) if ends[0].f <= ends[1].f else (1, 0)
    crept = False
    while trials < most and not abs(ends[1].t - ends[0].t) * largest < tolerance:
        t, crept = _inside(minimum_of_cubic(ends[0], ends[1]), ends, crept)
        new = yield Probe(t, (start, *ends))
        trials += 1
        if new.f > start.f + C1 * t * start.slope or new.f >= ends[low].f:
            ends[high] = new
            low, high = (0, 1) if ends[0].f <= ends[1].f else (1, 0)
            continue
        flat = abs(new.slope) <= -C2 * start.slope
        if not flat and new.slope * (ends[high].t - ends[low].t) >= 0:
            ends[high] = ends[low]
        ends[low] = new
        if flat:
            break
    return ends[low], trials + 1


def _inside(t: float, ends: list[Point], crept: bool) -> tuple[float, bool]:
    """Keep trials from creeping along an end: the second one near it is moved a tenth inside."""
    first, last = sorted(point.t for point in ends)
    margin = 0.1 * (last - first)
    if not min(last - t, t - first) < margin:
        return t, False
    if crept or t >= last or t <= first:
        return (last - margin if abs(t - last) < abs(t - first) else first + margin), False
    return t, True


def minimum_of_cubic(one: Point, other: Point, bounds: tuple[float, float] | None = None) -> float:
    """Where the cubic with the values and slopes of two points has its minimum, within bounds.

    Where there is none, or a value is not finite: the middle of the bounds.
    """
    least, most = bounds or (min(one.t, other.t), max(one.t, other.t))
    middle = (least + most) / 2
    left, right = (one, other) if one.t <= other.t else (other, one)
    width = right.t - left.t
    if width == 0:
        return middle
    between = left.slope + right.slope - 3 * (left.f - right.f) / (left.t - right.t)
    square = between * between - left.slope * right.slope
    if not 0 <= square < math.inf:
        return middle
    root = math.sqrt(square)
    rise, run = right.slope + root - between, right.slope - left.slope + 2 * root
    if run == 0:  # a straight line, which falls without end to one side
        return middle if rise == 0 else most if rise < 0 else least
    return min(max(right.t - width * (rise / run), least), most)
