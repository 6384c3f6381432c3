from __future__ import annotations

import itertools
import math

import pytest

from wagontrain.servers.sums import sum_of


def test_the_order_does_not_matter() -> None:
    numbers = (1e16, 1.0, -1e16, 0.1)
    assert {sum_of(each) for each in itertools.permutations(numbers)} == {1.1}


@pytest.mark.parametrize(
    ("numbers", "total"),
    [
        ((math.inf, 1.0), math.inf),
        ((1.7e308, 1.7e308), math.inf),
        ((math.inf, -math.inf), math.nan),
        ((math.nan, 1.0), math.nan),
        ((), 0.0),
    ],
)
def test_nothing_is_raised(numbers: tuple[float, ...], total: float) -> None:
    assert sum_of(numbers) == total or (math.isnan(sum_of(numbers)) and math.isnan(total))
