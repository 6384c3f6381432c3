"""Sums that do not depend on the order of what is added, nor end a run by an infinity."""

from __future__ import annotations

import math
from collections.abc import Iterable


def sum_of(numbers: Iterable[float]) -> float:
    """The sum, rounded once.

    Where training has gone astray there may be infinities, or sums that become one: `math.fsum`
    raises for some of those, and the sum is then what the processor makes of them.
    """
    numbers = list(numbers)
    try:
        return math.fsum(numbers)
    except (OverflowError, ValueError):
        return sum(numbers)
