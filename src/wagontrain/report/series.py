"""Long curves made short: the mean of neighbours, and between which values they lay."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from wagontrain.report.reading import Steps

POINTS = 1000
"""Of a curve, at most."""


@dataclass(frozen=True)
class Curve:
    """A curve, as it is or thinned.

    Args:
        x: where.
        y: the value, or the mean of those that one point stands for.
        low, high: the least and the greatest of these; none where every point is one value.
        each: values that a point stands for, at most.
        left_out: values that are not finite.
    """

    x: list[float]
    y: list[float]
    low: list[float] | None = None
    high: list[float] | None = None
    each: int = 1
    left_out: int = 0


def thin(x: Sequence[float], y: Sequence[float], most: int = POINTS) -> Curve:
    """A curve of at most so many points, of which none of the extremes is lost.

    Values that are not finite cannot be drawn, and are counted.
    """
    across, up = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    good = np.isfinite(up) & np.isfinite(across)
    left_out = int(len(up) - good.sum())
    across, up = across[good], up[good]
    if len(up) <= most:
        return Curve(across.tolist(), up.tolist(), left_out=left_out)
    starts = _starts(len(up), most)
    counts = np.diff([*starts, len(up)])
    return Curve(
        (np.add.reduceat(across, starts) / counts).tolist(),
        (np.add.reduceat(up, starts) / counts).tolist(),
        np.minimum.reduceat(up, starts).tolist(),
        np.maximum.reduceat(up, starts).tolist(),
        int(counts.max()),
        left_out,
    )


def throughput(steps: Steps, most: int = 120) -> Curve:
    """Samples a second against wall-clock: those of neighbouring steps, over the seconds in them.

    Single steps differ by what the machine happens to do; `y` at a point is a rate over all the
    seconds that the point stands for, so that the whole curve says what the summary says.
    """
    if not steps.time:
        return Curve([], [])
    time, count, seconds = (
        np.asarray(values, dtype=np.float64) for values in (steps.time, steps.count, steps.seconds)
    )
    starts = _starts(len(time), min(most, max(1, len(time) // 4)))
    ends = np.append(starts[1:], len(time)) - 1
    spent = np.add.reduceat(seconds, starts)
    rate = np.add.reduceat(count, starts) / np.maximum(spent, 1e-9)
    each = int((ends - starts + 1).max())
    return Curve(time[ends].tolist(), rate.tolist(), each=each)


def _starts(length: int, pieces: int) -> np.ndarray:
    """Where each of so many pieces begins, about equally long."""
    return np.arange(pieces) * length // pieces


def spread(values: Sequence[float]) -> float:
    """The greatest over the least; infinite where one is not above zero, 1 of nothing."""
    finite = [value for value in values if math.isfinite(value)]
    if not finite:
        return 1.0
    return max(finite) / min(finite) if min(finite) > 0 else math.inf


def histogram(steps: Steps) -> dict[int, int]:
    """How many updates had which staleness."""
    found: dict[int, int] = {}
    for value in steps.staleness:
        if math.isfinite(value):
            found[round(value)] = found.get(round(value), 0) + 1
    return dict(sorted(found.items()))
