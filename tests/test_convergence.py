"""How many steps relaxed training needs: the ends of the ranges."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from wagontrain.convergence import EXACT, apart, late


def test_what_is_exact_needs_as_many() -> None:
    assert (EXACT.least, EXACT.most) == (1.0, 1.0)
    assert late(0, 0) == apart(8, 1) == apart(1, 500) == EXACT


def test_published_ends() -> None:
    # Without noise 3 updates' delay leaves a quarter of the gradients' worth.
    assert late(3, 3).most == 4
    assert late(3, 12).most == 7
    assert apart(4, 10**9).most == pytest.approx(4)  # each by itself, in the end
    assert apart(10**9, 16).most == pytest.approx(16)  # one step a round


@given(st.integers(2, 100), st.integers(2, 1000), st.floats(0, 1e6))
def test_the_end_is_the_worst_of_all_noise_scales(workers: int, period: int, noise: float) -> None:
    by_itself = (1 + workers * noise) / (1 + noise)
    in_rounds = (period + noise) / (1 + noise)
    found = apart(workers, period).most
    assert min(by_itself, in_rounds) <= found * (1 + 1e-9)
    worst = (period - 1) / (workers - 1)
    assert math.isclose(found, (period + worst) / (1 + worst))
    assert math.isclose(found, (1 + workers * worst) / (1 + worst))


@given(st.integers(2, 50), st.integers(1, 500))
def test_rarer_averages_are_no_better(workers: int, period: int) -> None:
    assert apart(workers, period).most <= apart(workers, period + 1).most <= workers
